"""A whole proxy without sockets, threads and clocks: real exchanges, valve, fleet, limits and backend
connections over transports that only write down what is written.

The test is everything else: it moves the clock, lets connections be made or refused, plays the backends byte by
byte, and is the client that reads, stops reading or leaves. Nothing happens between two of its lines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator, Iterator
from types import CoroutineType
from typing import Any, cast

import h11
import orjson

from policies.files import KnownNames, read_policy
from policies.state import Backend
from proxy.access.keys import Key, KeyStore
from proxy.access.limits import Limits
from proxy.build import build
from proxy.config import Config
from proxy.exchange import Exchange, State
from proxy.heartbeat import HEARTBEAT
from proxy.hedge import Hedge
from proxy.http1 import RequestHead
from proxy.journal import Journal
from proxy.ledger import Ledger
from proxy.observe import Observer
from proxy.records import Row
from proxy.runtime import Runtime
from proxy.tasks import Tasks
from proxy.upstream import BackendConnection, Endpoint

STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
UNTIL_CLOSE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def chunked(*payloads: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(payload), payload) for payload in payloads)


def event(text: str, *, completion: int | None = None, prompt: int = 7) -> bytes:
    """A chat event as vLLM writes it; `completion`: with running usage."""
    document: dict[str, Any] = {
        "id": "c1",
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}],
    }
    if completion is not None:
        document["usage"] = {
            "prompt_tokens": prompt,
            "total_tokens": prompt + completion,
            "completion_tokens": completion,
        }
    return b"data: " + orjson.dumps(document) + b"\n\n"


def usage_event(prompt: int, completion: int) -> bytes:
    """The event at the end of a stream whose client asked for usage."""
    usage = {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}
    document = {"id": "c1", "object": "chat.completion.chunk", "choices": [], "usage": usage}
    return b"data: " + orjson.dumps(document) + b"\n\n"


def error_event(message: str = "engine died") -> bytes:
    return b"data: " + orjson.dumps({"error": {"message": message, "type": "x", "code": 500}}) + b"\n\n"


def answer_body(prompt: int = 7, completion: int = 5) -> bytes:
    return orjson.dumps(
        {
            "id": "c1",
            "object": "chat.completion",
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}
            ],
            "usage": {
                "prompt_tokens": prompt,
                "total_tokens": prompt + completion,
                "completion_tokens": completion,
            },
        }
    )


def whole(status: int, body: bytes, *fields: bytes) -> bytes:
    """A reply with Content-Length."""
    lines = b"".join(field + b"\r\n" for field in (b"content-type: application/json", *fields))
    return b"HTTP/1.1 %d X\r\n%bcontent-length: %d\r\n\r\n%b" % (status, lines, len(body), body)


class FakeLoop:
    """Time and timers."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.timers: list[Timer] = []

    def time(self) -> float:
        return self.now

    def call_soon(self, callback: Callable[..., None], *arguments: Any) -> Timer:
        return self.call_later(1e-6, callback, *arguments)  # the next turn, not this one

    def call_later(self, delay: float, callback: Callable[..., None], *arguments: Any) -> Timer:
        timer = Timer(self.now + delay, callback, arguments)
        self.timers.append(timer)
        return timer

    def run_due(self) -> None:
        """Run the timers whose time has come, those included that they set."""
        while due := [timer for timer in self.timers if not timer.cancelled and timer.at <= self.now]:
            for timer in due:
                self.timers.remove(timer)
                if not timer.cancelled:
                    timer.callback(*timer.arguments)


class Timer:
    def __init__(self, at: float, callback: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self.at = at
        self.callback = callback
        self.arguments = arguments
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Gate:
    """Something that a coroutine waits for and the test decides."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __await__(self) -> Generator[Gate, None, None]:
        yield self
        if self.error is not None:
            raise self.error


class InOrder(set[Exchange]):
    """A set that is walked in order of insertion: the same test makes the same run."""

    def __init__(self) -> None:
        super().__init__()
        self._order: dict[Exchange, None] = {}

    def add(self, element: Exchange) -> None:
        super().add(element)
        self._order[element] = None

    def discard(self, element: object) -> None:
        super().discard(element)
        self._order.pop(cast("Exchange", element), None)

    def __iter__(self) -> Iterator[Exchange]:
        return iter(list(self._order))


class FakeTask:
    """A coroutine that runs when the test says so."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], name: str) -> None:
        self.coroutine = coroutine
        self.name = name
        self.done = False
        self.gate: Gate | None = None

    def step(self) -> None:
        """Run to the next `await`."""
        try:
            self.gate = self.coroutine.send(None)
        except StopIteration:
            self.done = True
        except BaseException:
            self.done = True
            raise

    def cancel(self) -> None:
        if not self.done:
            self.done = True
            self.coroutine.close()


class FakeTasks(Tasks):
    def __init__(self) -> None:
        super().__init__()
        self.all: list[FakeTask] = []

    def spawn(self, coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        task = FakeTask(coroutine, name)
        task.step()
        self.all.append(task)
        return cast("asyncio.Task[Any]", task)

    def pending(self, name: str) -> list[FakeTask]:
        return [task for task in self.all if not task.done and task.name == name]


class FakeTransport(asyncio.Transport):
    """Writes down what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False
        self.aborted = False
        self.ended = False
        """Our half is closed."""
        self.reading = True
        self.unread = 0
        """Bytes in its buffer, where the other side does not read (`stop_reading`)."""
        self.limit = 65536
        self._protocol: asyncio.Protocol | None = None

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        assert not self.closed, "written to a closed transport"
        assert not self.ended, "written after the end"
        self.written += bytes(data)
        if self._protocol is not None:
            before, self.unread = self.unread, self.unread + len(data)
            if before <= self.limit < self.unread:
                self._protocol.pause_writing()

    def stop_reading(self, protocol: asyncio.Protocol) -> None:
        """The other side reads nothing from now on."""
        self._protocol = protocol

    def read_all(self) -> None:
        """The other side reads what is there, and goes on reading nothing."""
        was_full, self.unread = self.unread > self.limit, 0
        if was_full and self._protocol is not None:
            self._protocol.resume_writing()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high is not None
        self.limit = high

    def get_write_buffer_size(self) -> int:
        return self.unread

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


class FakeEndpoint(Endpoint):
    """A backend that the test plays: `World.connects` and `World.refuses` decide over its connections."""

    def __init__(self, name: str, loop: FakeLoop, **options: Any) -> None:
        super().__init__(name, f"http://{name}.test:8000", cast("asyncio.AbstractEventLoop", loop), **options)
        self.connections: list[BackendConnection] = []
        self.next_is_dead = False
        """The next connection closes before its task runs again."""

    async def connect(self, timeout_s: float) -> BackendConnection:
        await Gate()
        connection = BackendConnection(self)
        self.connections.append(connection)
        connection.connection_made(FakeTransport())
        if self.next_is_dead:
            self.next_is_dead = False
            close(connection)
        return connection


def transport_of(connection: BackendConnection) -> FakeTransport:
    assert isinstance(connection.transport, FakeTransport)
    return connection.transport


def close(connection: BackendConnection, error: Exception | None = None) -> None:
    """The backend closes (or resets) a connection."""
    transport_of(connection).closed = True
    connection.connection_lost(error)


class FakeJournal:
    """What was appended."""

    def __init__(self) -> None:
        self.instance = "test"
        self.failed = ""
        self.opened: list[Row] = []
        self.progressed: list[tuple[Any, ...]] = []
        self.closed: list[Row] = []

    def open(self, row: Row) -> None:
        self.opened.append(row)

    def progress(self, *figures: Any) -> None:
        self.progressed.append(figures)

    def close(self, row: Row) -> None:
        assert row not in self.closed, "closed twice"
        self.closed.append(row)

    async def synced(self) -> None:
        await Gate()


class FakeLedger:
    failed = ""
    trouble = ""
    lag = 0
    oldest_s = 0.0
    refused = 0


class FakeKeys:
    empty = True
    trouble = ""
    version = ""


class FakeClient:
    """A client connection as an exchange sees it, checked as HTTP by h11."""

    def __init__(self) -> None:
        self.out = b""
        self.ended: str = ""
        """`keep`, `close` or `abort`."""

    def write(self, data: bytes) -> None:
        assert not self.ended, f"written after {self.ended}: {data[:80]!r}"
        assert data, "an empty write"
        self.out += data

    def finished(self, *, keep_alive: bool) -> None:
        assert not self.ended, "ended twice"
        self.ended = "keep" if keep_alive else "close"

    def abort(self) -> None:
        # What has been handed back can't be taken back; a slow client is aborted and then told about.
        assert self.ended in ("", "abort"), "ended twice"
        self.ended = "abort"

    def read(self, *, version: int = 1, method: str = "POST") -> Read:
        """The answer as h11 reads it. Raises h11.RemoteProtocolError when it breaks the grammar."""
        parser = h11.Connection(h11.CLIENT)
        fields = [("host", "x"), ("content-length", "0")]
        if version == 0:
            fields.append(("connection", "keep-alive"))
        parser.send(h11.Request(method=method, target="/", headers=fields))
        parser.send(h11.EndOfMessage())
        if self.out:
            parser.receive_data(self.out)
        found = Read()
        while True:
            message = parser.next_event()
            if message is h11.NEED_DATA:
                if self.ended == "close" and not found.complete:
                    parser.receive_data(b"")
                    continue
                return found
            if isinstance(message, h11.Response):
                found.status = message.status_code
                found.fields = {name.decode(): value.decode("latin-1") for name, value in message.headers}
            elif isinstance(message, h11.Data):
                found.body += bytes(message.data)
            elif isinstance(message, h11.EndOfMessage):
                found.complete = True
                assert parser.trailing_data[0] == b"", "bytes behind the end of the message"
                return found
            elif isinstance(message, h11.ConnectionClosed):
                return found


class Read:
    """What a client has read."""

    def __init__(self) -> None:
        self.status = 0
        self.fields: dict[str, str] = {}
        self.body = b""
        self.complete = False

    def __repr__(self) -> str:
        return f"<{self.status} {'complete' if self.complete else 'incomplete'} {self.body!r}>"

    @property
    def events(self) -> list[bytes]:
        """The data of the stream's events. Heartbeats of ours, lines without a blank one, are left out."""
        body = self.body.replace(HEARTBEAT, b"")
        assert not body or body.endswith(b"\n\n"), self.body
        return [
            block.removeprefix(b"data: ") for block in body.split(b"\n\n")[:-1] if block.startswith(b"data: ")
        ]

    @property
    def documents(self) -> list[dict[str, Any]]:
        """The events that are JSON objects, as all are but `[DONE]` unless a backend sends nonsense."""
        return [orjson.loads(data) for data in self.events if data[:1] == b"{" and is_json(data)]

    @property
    def errors(self) -> list[Any]:
        """Codes of the error events."""
        return [document["error"]["code"] for document in self.documents if "error" in document]

    @property
    def text(self) -> str:
        """Content of the events, joined."""
        choices = [choice for document in self.documents for choice in document.get("choices", ())]
        return "".join(choice["delta"].get("content", "") for choice in choices)

    @property
    def done(self) -> bool:
        return b"[DONE]" in self.events

    @property
    def error(self) -> dict[str, Any]:
        """The error object of a JSON answer."""
        error: dict[str, Any] = orjson.loads(self.body)["error"]
        return error


POLICY = """
rules:
  - name: all
    prefer: [{site: local}, {site: "*"}]
    pick: least-load
    queue: {wait: 10s, depth: 3}
"""


class World:
    """One proxy: backends `names`, all serving the model `m`, the first of them local."""

    def __init__(self, *names: str, slots: int = 8, key: Key | None = None, **config: Any) -> None:
        self.loop = FakeLoop()
        loop = cast("asyncio.AbstractEventLoop", self.loop)
        sections = [
            {
                "name": name,
                "url": f"http://{name}.test:8000",
                "site": "local" if number == 0 else "away",
                "slots": slots,
                "models": ["m"],
                "price": {"input": "1", "output": "2", "currency": "EUR"},
            }
            for number, name in enumerate(names)
        ]
        settings = {"backends": sections, "sites": {"away": {}}, **config}
        built = build(Config.model_validate(settings), loop, 0)
        built.policy = read_policy(POLICY, "test", KnownNames(built.backends, frozenset({"away"})), 0)
        self.endpoints = {name: FakeEndpoint(name, self.loop) for name in names}
        built.endpoints = dict(self.endpoints)
        self.journal = FakeJournal()
        self.ledger = FakeLedger()
        self.key = key
        self.runtime = Runtime(
            built,
            loop=loop,
            journal=cast("Journal", self.journal),
            ledger=cast("Ledger", self.ledger),
            keys=cast("KeyStore", FakeKeys()),
            limits=Limits(0.0),
            observer=Observer(),
            salt=b"0123456789abcdef",
        )
        self.runtime.now = self.loop.time
        self.runtime.wall = lambda: self.loop.now + 1_700_000_000.0
        self.runtime.exchanges = InOrder()
        self.tasks = FakeTasks()
        self.runtime.tasks = self.tasks
        self.all: list[Exchange] = []

    # The client's part

    def start(
        self,
        *,
        stream: bool = True,
        version: int = 1,
        endpoint: str = "chat",
        raw: bytes | None = None,
        keep_alive: bool = True,
        method: bytes = b"POST",
        target: bytes = b"/v1/chat/completions",
        idempotency_key: bytes = b"",
        forward: bytes = b"",
        **fields: Any,
    ) -> Exchange:
        """A request arrives."""
        document = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": stream, **fields}
        head = RequestHead(method, target, version, keep_alive=keep_alive)
        head.idempotency_key = idempotency_key
        head.forward = forward
        exchange = Exchange(self.runtime, FakeClient(), head, endpoint, self.key, self.loop.now)
        self.all.append(exchange)
        exchange.start(orjson.dumps(document) if raw is None else raw)
        return exchange

    # The backends' part

    def connects(self, name: str) -> BackendConnection:
        """The oldest connection that is being opened to a backend is made."""
        task = next(task for task in self.tasks.pending("connect") if self._target(task) == name)
        self._resolve(task, None)
        return self.endpoints[name].connections[-1]

    def refuses(self, name: str, error: Exception | None = None) -> None:
        """The oldest connection that is being opened to a backend is refused."""
        task = next(task for task in self.tasks.pending("connect") if self._target(task) == name)
        self._resolve(task, error or ConnectionRefusedError(111, "Connection refused"))

    def dialled(self) -> list[str]:
        """Backends that connections are being opened to."""
        return [self._target(task) for task in self.tasks.pending("connect")]

    def syncs(self, error: Exception | None = None) -> None:
        """The journal has synced what it has."""
        for task in self.tasks.pending("journal sync"):
            self._resolve(task, error)

    def backend(self, name: str) -> Backend:
        return self.runtime.fleet[name]

    def answers(self, exchange: Exchange, name: str) -> BackendConnection:
        """A backend takes the request of an exchange that is being connected to it."""
        connection = self.connects(name)
        assert exchange.connection is connection
        return connection

    def relaying(self, exchange: Exchange, name: str) -> BackendConnection:
        """As `answers`, with a stream begun."""
        connection = self.answers(exchange, name)
        connection.data_received(STREAM_HEAD + chunked(event("one", completion=1)))
        assert exchange.state is State.RELAYING
        return connection

    # Time

    def wait(self, seconds: float) -> None:
        """Time passes; the timers and the sweep do their work."""
        self.loop.now += seconds
        self.loop.run_due()
        self.runtime.sweep(self.loop.now)

    # What must be true

    def check(self) -> None:
        """The books balance at every moment."""
        running = [exchange for exchange in self.all if exchange.state is not State.ENDED]
        for name in self.endpoints:
            second = [e.hedge for e in running if e.hedge is not None]
            leases = [e.lease for e in [*running, *second] if e.lease is not None]
            leased = [lease for lease in leases if lease.backend.name == name]
            assert self.backend(name).in_flight == len(leased)
            assert self.backend(name).in_flight_tokens == sum(lease.tokens for lease in leased)
        closed = [row.op for row in self.journal.closed]
        assert len(set(closed)) == len(closed)
        ended = [e for e in self.all if e.state is State.ENDED]
        assert set(closed) == {e.row.op for e in ended if is_recorded(e)}
        assert len(self.runtime.observer.recent) == len(ended)
        held = {e.row.op for e in running if e.state is State.HELD}
        assert set(self.runtime.held) == held
        assert self.runtime.valve.queued == len(held)
        assert self.runtime.exchanges == {
            e for e in running if e.state in (State.CONNECTING, State.SENT, State.RELAYING)
        }
        if self.key is not None:
            admitted = [e for e in running if e.reservation is not None]
            assert self.runtime.limits.usage(self.key, self.runtime.wall()).running == len(admitted)
        for exchange in self.all:
            self._check_one(exchange)

    def _check_one(self, exchange: Exchange) -> None:
        assert isinstance(exchange.client, FakeClient)
        ended = exchange.state is State.ENDED
        assert bool(exchange.client.ended) == ended
        read = exchange.client.read(version=exchange.request.version)
        if ended:
            assert exchange.lease is None
            assert exchange.connection is None
            assert exchange.connecting is None
            if exchange.hedge is not None:
                assert exchange.hedge.lease is None
                assert exchange.hedge.connection is None
                assert exchange.hedge.connecting is None
                assert exchange.hedge.timer is None
            assert (exchange.row in self.journal.closed) == is_recorded(exchange)
            assert exchange.row.outcome != "ok" or 200 <= read.status < 300
            if exchange.client.ended != "abort":
                assert read.complete, read
        else:
            assert not read.complete, read
        kind, encoding = read.fields.get("content-type", ""), read.fields.get("content-encoding")
        if kind.startswith("text/event-stream") and encoding is None:
            self._check_stream(exchange, read)

    @staticmethod
    def _check_stream(exchange: Exchange, read: Read) -> None:
        assert len(read.errors) <= 1
        assert not (read.errors and read.done), read
        if read.done:
            assert read.events[-1] == b"[DONE]"
            assert read.events.count(b"[DONE]") == 1
        if read.errors:
            assert b'"error"' in read.events[-1], "something follows the error"
            assert exchange.row.outcome in ("cut", "shutdown") or exchange.head_sent

    @staticmethod
    def _target(task: FakeTask) -> str:
        assert isinstance(task.coroutine, CoroutineType)
        assert task.coroutine.cr_frame is not None
        attempt = task.coroutine.cr_frame.f_locals["self"]
        assert isinstance(attempt, Exchange | Hedge)
        assert attempt.target is not None
        return attempt.target.name

    @staticmethod
    def _resolve(task: FakeTask, error: Exception | None) -> None:
        if error is not None:
            assert task.gate is not None
            task.gate.error = error
        task.step()


def is_recorded(exchange: Exchange) -> bool:
    """Whether an ended exchange has a row: all have but those that were refused because there is no ledger."""
    return exchange.row.attempts > 0 or exchange.row.code != "ledger_unavailable"


def is_json(data: bytes) -> bool:
    try:
        orjson.loads(data)
    except orjson.JSONDecodeError:
        return False
    return True


def client_of(exchange: Exchange) -> FakeClient:
    assert isinstance(exchange.client, FakeClient)
    return exchange.client


def read(exchange: Exchange) -> Read:
    """What the client of an exchange has read."""
    return client_of(exchange).read(version=exchange.request.version)
