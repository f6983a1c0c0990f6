"""The real proxy in this process, on real sockets, and a client that speaks bytes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Protocol, TypeVar

import aiohttp
import h11
import pytest

from policies.state import Backend as BackendState
from proxy.access.keys import create_key
from proxy.access.pepper import load_pepper
from proxy.config import Config, load_config
from proxy.database import open_database
from proxy.records import Row
from proxy.serve import Service
from tests.e2e.backends import Backend
from tests.e2e.tidegate_process import COMMAND
from tests.patience import PATIENCE

T = TypeVar("T")
HELLO = [{"role": "user", "content": "Hello"}]


async def eventually(condition: Callable[[], T], within_s: float = 10.0) -> T:
    """Wait for something that other connections bring about; returns the first true value. AssertionError if it
    takes longer."""
    async with asyncio.timeout(within_s):
        while not (found := condition()):  # noqa: ASYNC110 - sockets have no event to wait for
            await asyncio.sleep(0.005)
    return found


async def command(*arguments: str) -> tuple[int, str, str]:
    """Run `tidegate` with these arguments. -> (exit status, what it printed, what it complained of)."""
    process = await asyncio.create_subprocess_exec(
        COMMAND, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, complaint = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), complaint.decode()


def chat_body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": HELLO, **fields}).encode()


def chat(body: bytes | None = None, *lines: str, **fields: Any) -> bytes:
    """A whole request as bytes; `lines`: further header fields."""
    body = chat_body(**fields) if body is None else body
    head = ["POST /v1/chat/completions HTTP/1.1", "host: proxy", f"content-length: {len(body)}", *lines]
    return "\r\n".join([*head, "", ""]).encode() + body


class Answer:
    """One answer as h11 reads it."""

    def __init__(self) -> None:
        self.status = 0
        self.fields: dict[str, str] = {}
        self.body = b""
        self.complete = False
        """False: it broke off."""

    def __repr__(self) -> str:
        return f"<{self.status} {'complete' if self.complete else 'cut'} {self.body[:200]!r}>"

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """Of an error of ours."""
        code: str = self.json["error"]["code"]
        return code

    @property
    def backend(self) -> str:
        return self.fields["x-tidegate-backend"]

    @property
    def id(self) -> str:
        return self.fields["x-request-id"]

    @property
    def events(self) -> list[bytes]:
        """The data of a stream's events."""
        lines = self.body.replace(b"\r\n", b"\n").split(b"\n")
        return [line.removeprefix(b"data: ") for line in lines if line.startswith(b"data: ")]

    @property
    def text(self) -> str:
        """The content of a stream."""
        documents = [json.loads(data) for data in self.events if data != b"[DONE]"]
        choices = [choice for document in documents for choice in document.get("choices", ())]
        return "".join(choice["delta"]["content"] for choice in choices)

    @property
    def errors(self) -> list[Any]:
        """Codes of a stream's error events."""
        documents = [json.loads(data) for data in self.events if data != b"[DONE]"]
        return [document["error"]["code"] for document in documents if "error" in document]

    @property
    def done(self) -> bool:
        return self.events[-1:] == [b"[DONE]"] and self.events.count(b"[DONE]") == 1


class Client:
    """One connection to the proxy."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._unread = b""

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, method: str = "POST", *, version: int = 1) -> Answer:
        """The next answer, read to its end, or to where it breaks off. TimeoutError after 20 s."""
        found = Answer()
        async with asyncio.timeout(20):
            async for _ in self.parts(found, method, version=version):
                pass
        return found

    async def parts(self, found: Answer, method: str = "POST", *, version: int = 1) -> AsyncIterator[bytes]:
        """Fill in an answer and yield what comes of its body as it comes."""
        parser = h11.Connection(h11.CLIENT)
        parser.send(h11.Request(method=method, target="/", headers=[("host", "x"), ("content-length", "0")]))
        parser.send(h11.EndOfMessage())
        if self._unread:
            parser.receive_data(self._unread)
            self._unread = b""
        while True:
            event = parser.next_event()
            if event is h11.NEED_DATA:
                try:
                    data = await self.reader.read(65536)
                except ConnectionError:
                    return
                try:
                    parser.receive_data(data)
                    if not data:
                        event = parser.next_event()
                except h11.RemoteProtocolError:
                    return
                if data:
                    continue
            if isinstance(event, h11.InformationalResponse):
                found.status = event.status_code
                return
            if isinstance(event, h11.Response):
                found.status = event.status_code
                found.fields = {name.decode(): value.decode("latin-1") for name, value in event.headers}
            elif isinstance(event, h11.Data):
                found.body += bytes(event.data)
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                found.complete = True
                self._unread = parser.trailing_data[0]
                return
            else:
                return

    async def first(self, found: Answer) -> bytes:
        """The first part of an answer that has just begun; nothing more is read."""
        async for part in self.parts(found):
            return part
        raise AssertionError(f"it ended: {found}")

    async def closed(self) -> bytes:
        """Wait until the proxy closes the connection. -> what came before."""
        came = b""
        try:
            async with asyncio.timeout(20):
                while data := await self.reader.read(65536):
                    came += data
        except ConnectionError:
            pass
        return came

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        self.writer.transport.abort()


class Proxy:
    """A running proxy and what a test asks of it."""

    def __init__(self, service: Service, state: Path) -> None:
        self.service = service
        self.state_folder = state
        self._clients: list[Client] = []

    @property
    def runtime(self) -> Any:
        return self.service.runtime

    @property
    def url(self) -> str:
        return f"http://{self.service.ports.listen}"

    @property
    def admin(self) -> str:
        return f"http://{self.service.ports.admin}"

    def backend(self, name: str) -> BackendState:
        backend: BackendState = self.runtime.fleet[name]
        return backend

    async def connect(self, receive_buffer: int | None = None) -> Client:
        """A connection, closed at the end of the test; `receive_buffer`: of the system, bytes."""
        host, _, port = self.service.ports.listen.rpartition(":")
        if receive_buffer is None:
            reader, writer = await asyncio.open_connection(host, int(port))
        else:
            import socket

            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
            reader, writer = await asyncio.open_connection(sock=sock, limit=1024)
        client = Client(reader, writer)
        self._clients.append(client)
        return client

    async def ask(self, request: bytes) -> Answer:
        """One request on a connection of its own."""
        client = await self.connect()
        await client.send(request)
        answer = await client.answer(request.partition(b" ")[0].decode())
        client.close()
        return answer

    async def chat(self, *lines: str, **fields: Any) -> Answer:
        """One chat request; `lines`: further header fields."""
        return await self.ask(chat(None, *lines, **fields))

    async def get(self, path: str) -> tuple[int, bytes]:
        """From the admin port."""
        async with aiohttp.ClientSession() as session, session.get(self.admin + path) as response:
            return response.status, await response.read()

    async def state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((await self.get("/state"))[1])
        return state

    async def row(self, answer: Answer) -> Row:
        """The row of an answered request, once it is closed."""
        return await self.row_of(answer.id)

    async def row_of(self, request_id: str) -> Row:
        record = await eventually(lambda: self.runtime.observer.find(request_id))
        row: Row = record.row
        return row

    def close(self) -> None:
        """End all connections to it."""
        for client in self._clients:
            client.reset()

    async def idle(self) -> None:
        """Wait until nothing runs; then nothing may be held."""
        runtime = self.runtime
        await eventually(lambda: not runtime.exchanges and not runtime.held)
        assert all(backend.in_flight == 0 for backend in runtime.fleet)
        assert runtime.valve.queued == 0


class StartProxy(Protocol):
    def __call__(self, *backends: Backend | dict[str, Any], **config: Any) -> Awaitable[Proxy]: ...


def section(name: str, backend: Backend | dict[str, Any], first: bool) -> dict[str, Any]:
    """A backend's part of the configuration: the first one is local, the others are remote."""
    given = backend if isinstance(backend, dict) else {"url": backend.url}
    price = {"input": "1", "output": "2", "currency": "EUR"}
    site = "local" if first else "away"
    return {"name": name, "site": site, "slots": 8, "models": ["m"], "price": price, **given}


def settings(state: Path, *backends: Backend | dict[str, Any], **config: Any) -> dict[str, Any]:
    """A configuration with backends called a, b, c, ...; probing is off unless it is given."""
    sections = [section("abcdefgh"[n], backend, n == 0) for n, backend in enumerate(backends)]
    sites = {s["site"]: {} for s in sections if s["site"] != "local"} | config.pop("sites", {})
    return {
        "listen": "127.0.0.1:0",
        "admin": "127.0.0.1:0",
        "state": str(state),
        "log": "off",
        "backends": sections,
        "sites": sites,
        "probing": {"enabled": False},
        **config,
        "timeouts": {"drain": 0, **config.get("timeouts", {})},
    }


@pytest.fixture
async def start_proxy(tmp_path: Path) -> AsyncIterator[StartProxy]:
    """Starts proxies; `file=PATH` writes the configuration there and lets the proxy watch it, `record=PATH` is
    where its event log goes."""
    async with AsyncExitStack() as stack:

        async def start(*backends: Backend | dict[str, Any], **config: Any) -> Proxy:
            file: Path | None = config.pop("file", None)
            state = config.pop("state", tmp_path / "state")
            record: Path | None = config.pop("record", None)
            service = _service(settings(state, *backends, **config), file, record)
            await service.start()
            stack.push_async_callback(_stop, service)
            proxy = Proxy(service, state)
            stack.callback(proxy.close)
            return proxy

        yield start


def _service(document: dict[str, Any], file: Path | None, record: Path | None) -> Service:
    if file is None:
        return Service(Config.model_validate(document), record=record)
    file.write_text(json.dumps(document))  # JSON is YAML
    return Service(load_config(file), file, record=record)


async def _stop(service: Service) -> None:
    if service.runtime.draining:
        return  # the test has stopped it
    await service.stop()


@pytest.fixture
async def start_backend() -> AsyncIterator[Callable[..., Awaitable[Backend]]]:
    """Starts scripted backends: `await start_backend(stalls, then=answers(5))`."""
    async with AsyncExitStack() as stack:

        async def start(*script: Any, **options: Any) -> Backend:
            return await stack.enter_async_context(Backend.of(*script, **options))

        yield start


class StartBackend(Protocol):
    def __call__(self, *script: Any, **options: Any) -> Awaitable[Backend]: ...


class MakeKey(Protocol):
    def __call__(self, **fields: Any) -> str: ...


@pytest.fixture
def make_key(tmp_path: Path) -> MakeKey:
    """Makes a key in the state directory of `start_proxy` and returns the header line that carries it."""

    def make(**fields: Any) -> str:
        state = tmp_path / "state"
        state.mkdir(exist_ok=True)
        engine = open_database(state)
        try:
            text, _ = create_key(engine, load_pepper(state), **({"tenant": "acme"} | fields))
        finally:
            engine.dispose()
        return f"authorization: Bearer {text}"

    return make


def bound(promised_s: float) -> float:
    """How long a test may wait for what is promised within so many seconds."""
    return promised_s * PATIENCE
