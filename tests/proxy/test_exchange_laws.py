"""Laws of the exchange, whatever its client, its backends and the clock do, and in whatever order.

Every request ends in one row and gives back what it held; every answer is HTTP that h11 accepts; no stream says
both that it is complete and that it is not; no more tokens are billed than backends reported, or, of an answer that
nobody can read, than its bytes may hold.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from proxy.access.keys import Key
from proxy.exchange import Exchange, State
from proxy.meter import BYTES_PER_TOKEN
from proxy.records import Row
from proxy.upstream import BackendConnection
from tests.patience import examples
from tests.proxy.fakes import (
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    UNTIL_CLOSE_HEAD,
    World,
    answer_body,
    chunked,
    close,
    error_event,
    event,
    transport_of,
    usage_event,
    whole,
)

NAMES = ("a", "b", "c")
RESET = ConnectionResetError(104, "Connection reset by peer")
JSON_UNTIL_CLOSE = UNTIL_CLOSE_HEAD.replace(b"text/event-stream", b"application/json")

WHOLE_REPLIES = [
    whole(200, answer_body(7, 5)),
    whole(400, b'{"error":{"message":"no"}}'),
    whole(401, b"{}"),
    whole(429, b"{}", b"retry-after: 3"),
    whole(500, b"{}"),
    whole(503, b"", b"retry-after: 2", b"connection: close"),
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.0 200 OK\r\ncontent-type: text/plain\r\n\r\nhello",
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"\x00garbage\r\n\r\n",
]
CODED_HEAD = STREAM_HEAD[:-2] + b"content-encoding: gzip\r\n\r\n"
HEADS = [STREAM_HEAD, STREAM_HEAD, STREAM_HEAD, UNTIL_CLOSE_HEAD, JSON_UNTIL_CLOSE, CODED_HEAD]
"""The stream that everybody sends is drawn more often than the rest."""


class Answering:
    """What a backend has sent on one connection since its last request."""

    def __init__(self, request: int, head: bytes) -> None:
        self.request = request
        self.chunked = b"chunked" in head
        self.coded = head == CODED_HEAD
        self.tokens = 0


class ExchangeMachine(RuleBasedStateMachine):
    """Three backends of two slots each, and a key with every limit."""

    def __init__(self) -> None:
        super().__init__()
        self.reported = 0
        """Completion tokens, summed over the answers of backends."""
        self.coded = 0
        """Bytes of answers that cannot be read for their coding."""
        self.answering: dict[BackendConnection, Answering] = {}

    @initialize(
        strict=st.booleans(),
        attempts=st.integers(1, 3),
        idempotent=st.booleans(),
        hedge=st.sampled_from(["off", "200ms", "1s"]),
        heartbeat=st.sampled_from([0, 0, 0.25, 3]),
    )
    def begin(self, strict: bool, attempts: int, idempotent: bool, hedge: str, heartbeat: float) -> None:
        self.world = World(
            *NAMES,
            slots=2,
            key=Key("k", "acme", rpm=1000, tpm=10**6, concurrency=1000, budget_nano=10**12),
            durability="strict" if strict else "normal",
            retries={"attempts": attempts, "idempotent": idempotent or hedge != "off"},
            hedging={"after": hedge, "ratio": 1.0},
            timeouts={
                "first_token": 20,
                "between_tokens": 10,
                "total": 60,
                "client_write": 15,
                "heartbeat": heartbeat,
            },
        )

    # What there is

    def running(self, *states: State) -> list[Exchange]:
        return [e for e in self.world.all if e.state in states]

    def pick(self, data: st.DataObject, items: list[Any]) -> Any:
        return data.draw(st.sampled_from(items))

    def waiting(self) -> list[BackendConnection]:
        """Connections whose answer is not complete."""
        second = [e.hedge for e in self.world.all if e.hedge is not None]
        return [e.connection for e in [*self.world.all, *second] if e.connection is not None]

    # The client

    @rule(
        stream=st.booleans(),
        version=st.sampled_from([1, 1, 0]),
        keep_alive=st.booleans(),
        usage=st.booleans(),
        far=st.integers(0, 4),
    )
    def request(self, stream: bool, version: int, keep_alive: bool, usage: bool, far: int) -> None:
        """A request arrives, and comes `far`: to a backend, to its head, to its first token."""
        options: dict[str, Any] = {"stream_options": {"include_usage": True}} if stream and usage else {}
        exchange = self.world.start(stream=stream, version=version, keep_alive=keep_alive, **options)
        if far:
            self.world.syncs()
            if exchange.state is State.CONNECTING and exchange.connecting is not None:
                while exchange.state is State.CONNECTING:
                    self.world.connects(exchange.target.name)
        connection = exchange.connection
        if far > 1 and connection is not None:
            state = self.answering[connection] = Answering(connection.requests, STREAM_HEAD)
            connection.data_received(STREAM_HEAD)
            if far > 2:
                state.tokens = 1
                self.reported += 1
                connection.data_received(chunked(event("x", completion=1)))
                assert exchange.state is State.RELAYING

    @rule(raw=st.sampled_from([b"", b"[]", b'{"model":1}', b'{"model":"nobody","messages":[]}']))
    def bad_request(self, raw: bytes) -> None:
        if len(self.world.all) % 4 == 0:  # not too many of them
            exchange = self.world.start(raw=raw)
            assert exchange.state is State.ENDED

    @precondition(lambda self: self.running(State.HELD, State.CONNECTING, State.SENT, State.RELAYING))
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        states = (State.HELD, State.CONNECTING, State.SENT, State.RELAYING)
        self.pick(data, self.running(*states)).client_gone()

    @precondition(lambda self: self.running(State.RELAYING))
    @rule(data=st.data())
    def block(self, data: st.DataObject) -> None:
        exchange = self.pick(data, self.running(State.RELAYING))
        if exchange.blocked_since is None:
            exchange.block()
            assert not transport_of(exchange.connection).reading

    @precondition(lambda self: any(e.blocked_since is not None for e in self.running(State.RELAYING)))
    @rule(data=st.data())
    def unblock(self, data: st.DataObject) -> None:
        blocked = [e for e in self.running(State.RELAYING) if e.blocked_since is not None]
        exchange = self.pick(data, blocked)
        exchange.unblock()
        assert transport_of(exchange.connection).reading

    # The backends

    @precondition(lambda self: self.world.dialled())
    @rule(data=st.data(), how=st.sampled_from(["made", "made", "made", "refused", "dead"]))
    def connect(self, data: st.DataObject, how: str) -> None:
        name = self.pick(data, self.world.dialled())
        if how == "refused":
            self.world.refuses(name)
        else:
            self.world.endpoints[name].next_is_dead = how == "dead"
            self.world.connects(name)

    @precondition(lambda self: self.waiting())
    @rule(data=st.data(), cut=st.floats(0, 1), pieces=st.integers(1, 4))
    def send(self, data: st.DataObject, cut: float, pieces: int) -> None:
        connection = self.pick(data, self.waiting())
        for _ in range(pieces):
            if connection in self.waiting() and transport_of(connection).reading:
                self.send_piece(data, connection, cut)

    def send_piece(self, data: st.DataObject, connection: BackendConnection, cut: float) -> None:
        state = self.answering.get(connection)
        if state is None or state.request != connection.requests:
            piece = self.pick(data, HEADS + WHOLE_REPLIES)
            state = self.answering[connection] = Answering(connection.requests, piece)
            if b'"completion_tokens":5' in piece:
                self.reported += 5
        else:
            piece = self.next_piece(data, state)
            self.coded += len(piece) if state.coded else 0
        middle = int(cut * len(piece))
        for part in (piece[:middle], piece[middle:]):
            if part and not connection.closed and connection in self.waiting():
                connection.data_received(part)

    def next_piece(self, data: st.DataObject, state: Answering) -> bytes:
        kind = self.pick(data, ["event"] * 4 + ["comment", "done", "done", "error", "half", "end", "end"])
        if kind == "end":
            return LAST_CHUNK if state.chunked else b": \n\n"
        if kind == "event":
            new = data.draw(st.integers(0, 3))
            state.tokens += new
            self.reported += new
            pieces = [event("x", completion=state.tokens)]
        else:
            pieces = {
                "comment": [b": keep-alive\n\n", b"data:\n\n"],
                "done": [usage_event(7, state.tokens), DONE],
                "error": [error_event(), DONE],
                "half": [b'data: {"choi'],
            }[kind]
        return chunked(*pieces) if state.chunked else b"".join(pieces)

    @precondition(lambda self: self.waiting())
    @rule(data=st.data(), error=st.sampled_from([None, RESET]))
    def break_off(self, data: st.DataObject, error: Exception | None) -> None:
        connection = self.pick(data, self.waiting())
        if transport_of(connection).reading or error is not None:
            close(connection, error)

    @rule(name=st.sampled_from(NAMES), data=st.sampled_from([b"", b"HTTP/1.1 200 OK\r\n\r\n"]))
    def disturb_idle(self, name: str, data: bytes) -> None:
        """An idle connection is closed by its backend, or speaks without being asked."""
        for connection in list(self.world.endpoints[name].pool._idle):
            connection.data_received(data) if data else close(connection)
            assert connection.closed

    @rule(name=st.sampled_from(NAMES), up=st.sampled_from([True, True, False]))
    def probe(self, name: str, up: bool) -> None:
        self.world.backend(name).probed(up, self.world.loop.now)
        self.world.runtime.fleet.refresh(self.world.loop.now)
        self.world.runtime.poll(self.world.loop.now)

    # The rest

    @rule(error=st.sampled_from([None, None, OSError("disk full")]))
    def sync(self, error: Exception | None) -> None:
        self.world.syncs(error)

    @rule(seconds=st.sampled_from([0.0, 0.25, 0.25, 0.25, 1.0, 1.0, 4.5, 11.0, 16.0, 21.0, 61.0]))
    def wait(self, seconds: float) -> None:
        self.world.wait(seconds)
        for exchange in self.world.all:
            if exchange.state is not State.ENDED and exchange.client.ended == "abort":  # type: ignore[attr-defined]
                exchange.client_gone()  # as its connection would

    @precondition(lambda self: len(self.world.all) % 4 == 3)
    @rule()
    def stop_one(self) -> None:
        self.world.all[-1].stop()

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "world"):
            self.world.check()
            check_bill([exchange.row for exchange in self.world.all], self.reported, self.coded)

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        for exchange in self.world.all:
            exchange.stop()
        self.world.check()
        assert all(backend.in_flight == 0 for backend in self.world.runtime.fleet)
        assert not self.world.runtime.exchanges
        assert not self.world.runtime.held
        usage = self.world.runtime.limits.usage(self.world.key, self.world.runtime.wall())  # type: ignore[arg-type]
        assert usage.running == 0
        assert usage.month.reserved == 0
        assert self.world.dialled() == []


def check_bill(rows: list[Row], reported: int, coded: int) -> None:
    """No more is billed than was reported, or estimated from `coded` bytes; each estimate is rounded up."""
    estimated = [row.completion_tokens for row in rows if row.usage_source == "estimated"]
    billed = sum(row.completion_tokens + row.overhead_completion_tokens for row in rows) - sum(estimated)
    assert billed <= reported
    assert BYTES_PER_TOKEN * sum(estimated) <= coded + (BYTES_PER_TOKEN - 1) * len(estimated)


def test_an_answer_that_cannot_be_read_is_billed_by_its_bytes() -> None:
    world = World("a")
    exchange = world.start()
    comment = b": keep-alive\n\ndata:\n\n"
    connection = world.answers(exchange, "a")
    for piece in (CODED_HEAD, chunked(comment), LAST_CHUNK):
        connection.data_received(piece)
    row = exchange.row
    assert (row.usage_source, row.completion_tokens) == ("estimated", -(-len(comment) // BYTES_PER_TOKEN))
    check_bill([row], 0, len(comment))
    with pytest.raises(AssertionError):
        check_bill([row], 0, len(comment) - BYTES_PER_TOKEN)


TestExchange = ExchangeMachine.TestCase
TestExchange.settings = settings(max_examples=examples(120), stateful_step_count=40)
TestExchange.pytestmark = [pytest.mark.timeout(300)]  # on a busy machine it is slow, not wrong
