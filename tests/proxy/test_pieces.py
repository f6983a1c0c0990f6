"""Connections whose bytes come in any pieces: the same answers, and no work done twice."""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.passive import AttemptError
from proxy import http1
from proxy.access.keys import KeyStore
from proxy.http1 import ResponseHead
from proxy.server import ClientConnection
from proxy.upstream import BackendConnection
from tests.proxy.fakes import FakeEndpoint, FakeLoop, FakeTransport, World, answer_body, transport_of, whole
from tests.proxy.http_bytes import a_response, pieces_of, random_pieces

CHAT = b'{"model":"m","messages":[{"role":"user","content":"hi"}]}'
PLAIN = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (len(CHAT), CHAT)
CHUNKED = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5;a=b\r\n%b\r\n%x\r\n%b\r\n0\r\nX-Sum: 1\r\n\r\n"
) % (CHAT[:5], len(CHAT) - 5, CHAT[5:])
MODELS = b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n"
UNKNOWN = b"POST /v2/chat HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc"
EXPECTING = PLAIN.replace(b"Host: a", b"Host: a\r\nExpect: 100-continue")
CLOSING = PLAIN.replace(b"Host: a", b"Host: a\r\nConnection: close")
OLD = PLAIN.replace(b"HTTP/1.1", b"HTTP/1.0")
AMBIGUOUS = PLAIN.replace(b"Host: a", b"Host: a\r\nTransfer-Encoding: chunked")
MALFORMED = b"POST / HTTP/1.1\r\nHost : a\r\n\r\n"
BAD_CHUNK = CHUNKED.replace(b"5;a=b", b"5 ;a=b")
REQUESTS = [
    PLAIN,
    PLAIN,
    CHUNKED,
    MODELS,
    UNKNOWN,
    b"\r\n" + PLAIN,
    CLOSING,
    OLD,
    AMBIGUOUS,
    MALFORMED,
    BAD_CHUNK,
]


class ClientTransport(FakeTransport):
    """A client's."""

    ended = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        assert not self.ended
        self.ended = True

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.ended, "written behind the end"
        super().write(data)


class Client:
    """A connection to a proxy whose one backend answers at once, or when it is told to."""

    def __init__(self, world: World, *, answering: bool = True) -> None:
        self.world = world
        self.transport = ClientTransport()
        self.connection = ClientConnection(self.world.runtime)
        self.connection.connection_made(self.transport)
        self.answering = answering
        self.bodies: list[bytes] = []
        """What the backend got."""

    def send(self, data: bytes) -> None:
        self.connection.data_received(data)
        while self.answering and self.connection.exchange is not None:
            self.answer()

    def answer(self) -> None:
        """The backend answers what it was asked."""
        if self.world.dialled():
            self.world.connects("a")
        exchange = self.connection.exchange
        assert exchange is not None
        backend = exchange.connection
        assert backend is not None
        transport = transport_of(backend)
        self.bodies.append(transport.written.split(b"\r\n\r\n", 1)[1])
        transport.written = b""
        backend.data_received(whole(200, answer_body()))

    @property
    def answers(self) -> bytes:
        """All that was written, without what differs from run to run; then how the connection ended."""
        text = re.sub(
            rb"(?i)(x-request-id|x-tidegate-overhead-ms|date): [^\r]*\r\n", b"", self.transport.written
        )
        return text + (b"(ended)" if self.transport.ended else b"(open)")


class Keys:
    """Nobody needs one."""

    empty = True
    version = 0


@pytest.fixture(scope="module")
def world() -> World:
    world = World("a")
    world.runtime.keys = cast("KeyStore", Keys())
    return world


def run(world: World, pieces: Sequence[bytes]) -> tuple[bytes, list[bytes]]:
    client = Client(world)
    for piece in pieces:
        if piece:
            client.send(piece)
    return client.answers, client.bodies


def test_what_the_requests_below_are_answered(world: World) -> None:
    def status(data: bytes) -> tuple[list[bytes], bytes]:
        answers, _ = run(world, [data])
        return re.findall(rb"HTTP/1\.1 ([0-9]+)", answers), answers.rpartition(b"(")[2]

    assert [status(data) for data in (PLAIN, CHUNKED, MODELS, UNKNOWN)] == [
        ([b"200"], b"open)"),
        ([b"200"], b"open)"),
        ([b"200"], b"open)"),
        ([b"404"], b"open)"),
    ]
    assert [status(data) for data in (CLOSING, OLD, AMBIGUOUS, MALFORMED, BAD_CHUNK)] == [
        ([b"200"], b"ended)"),
        ([b"200"], b"ended)"),
        *[([b"400"], b"ended)")] * 3,
    ]
    assert status(EXPECTING.partition(b"{")[0]) == ([b"100"], b"open)")
    assert run(world, [PLAIN, CHUNKED])[1] == [CHAT, CHAT]


@settings(max_examples=60)
@given(st.lists(st.sampled_from(REQUESTS), min_size=1, max_size=5), st.integers(0, 2**32))
def test_requests_in_any_pieces_have_the_same_answers(world: World, requests: list[bytes], seed: int) -> None:
    data = b"".join(requests)
    expected = run(world, [data])
    assert run(world, requests) == expected
    assert run(world, random_pieces(Random(seed), data)) == expected
    for size in (1, 2, 3, 7):
        assert run(world, pieces_of(data, size)) == expected


def test_one_empty_line_in_front_of_a_request_may_come_in_any_way(world: World) -> None:
    for pieces in ([b"\r\n" + PLAIN], [b"\r", b"\n" + PLAIN], [b"\r\n", PLAIN], [b"\r", b"\n", PLAIN]):
        assert b"HTTP/1.1 200" in run(world, pieces)[0]
    for pieces in ([b"\r\n\r\n" + PLAIN], [b"\r\n", b"\r\n"], [b"\r", b"\r"], [b"\r", PLAIN], [b"\n"]):
        assert b"HTTP/1.1 400" in run(world, pieces)[0]


def test_an_empty_line_starts_no_clock(world: World) -> None:
    client = Client(world)
    client.send(b"\r\n")
    assert client.connection.idle
    client.world.wait(30)
    client.send(PLAIN)
    assert b"HTTP/1.1 200" in client.answers


def test_the_clock_of_a_head_runs_from_its_first_byte(world: World) -> None:
    client = Client(world)
    for at in range(9):
        client.send(PLAIN[at : at + 1])
        client.world.wait(1.0)
        assert not client.connection.idle
    assert client.transport.written == b""
    client.world.wait(1.5)
    assert b"HTTP/1.1 408" in client.answers
    assert b"request_timeout" in client.answers


def test_requests_that_wait_their_turn(world: World) -> None:
    client = Client(world, answering=False)
    client.send(PLAIN)
    for at in range(len(PLAIN)):
        client.send(PLAIN[at : at + 1])
    assert client.transport.reading
    client.send(b"x" * 1000)
    client.answer()
    assert client.transport.reading
    client.answer()
    assert client.bodies == [CHAT, CHAT]
    assert client.answers.count(b"HTTP/1.1 200") == 2
    assert b"HTTP/1.1 400" in client.answers


@pytest.fixture
def heads_matched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what is matched as a whole head."""
    sizes: list[int] = []

    class Counting:
        def __init__(self, pattern: re.Pattern[bytes]) -> None:
            self.pattern = pattern

        def match(self, data: bytes, position: int) -> re.Match[bytes] | None:
            sizes.append(len(data) - position)
            return self.pattern.match(data, position)

    for name in ("_REQUEST_HEAD", "_RESPONSE_HEAD", "_REQUEST_BEGUN"):
        monkeypatch.setattr(http1, name, Counting(getattr(http1, name)))
    return sizes


def test_a_client_that_drips_a_long_head(world: World, heads_matched: list[int]) -> None:
    head = PLAIN.replace(b"Host: a", b"Host: a\r\nX: " + b"a" * 60000)
    client = Client(world)
    for at in range(len(head)):
        client.send(head[at : at + 1])
    assert b"HTTP/1.1 200" in client.answers
    assert sum(heads_matched) < 2 * len(head) + 1000


class Receiver:
    """Who asked a backend."""

    def __init__(self) -> None:
        self.reply: ResponseHead | None = None
        self.parts: list[bytes] = []
        self.ended = ""

    def head(self, head: ResponseHead) -> None:
        assert self.reply is None
        self.reply = head

    def body(self, payload: bytes, done: bool) -> None:
        assert self.reply is not None
        assert not self.ended
        self.parts.append(payload)
        if done:
            self.ended = "done"

    def lost(self, error: AttemptError, message: str) -> None:
        assert not self.ended
        self.ended = error.name


def ask(pieces: Sequence[bytes], *, closes: bool) -> tuple[object, ...]:
    """What a reply amounts to, and whether its connection may be used again."""
    endpoint = FakeEndpoint("a", FakeLoop())
    connection = BackendConnection(endpoint)
    connection.connection_made(FakeTransport())
    receiver = Receiver()
    connection.send(receiver, b"request")
    for piece in pieces:
        if piece and not transport_of(connection).closed and len(endpoint.pool) == 0:
            connection.data_received(piece)
    if closes and not transport_of(connection).closed:
        connection.connection_lost(None)
    body = b"".join(receiver.parts) if receiver.ended == "done" else b""
    return receiver.ended, receiver.reply if receiver.ended == "done" else None, body


@settings(max_examples=60)
@given(st.integers(0, 2**32))
def test_replies_in_any_pieces_are_the_same(seed: int) -> None:
    rng = Random(seed)
    for _ in range(20):
        data = a_response(rng)
        expected = ask([data], closes=True)
        for size in (1, 2, 3, 7):
            assert ask(pieces_of(data, size), closes=True) == expected, data
        assert ask(random_pieces(rng, data), closes=True) == expected, data


def test_a_backend_that_drips_a_long_head(heads_matched: list[int]) -> None:
    head = (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nX: "
        + b"a" * 60000
        + b"\r\nContent-Length: 2\r\n\r\nok"
    )
    ended, _, body = ask(pieces_of(head, 1), closes=False)
    assert (ended, body) == ("done", b"ok")
    assert sum(heads_matched) < 2 * len(head) + 1000


def test_a_connection_is_used_again_after_a_reply_in_pieces() -> None:
    endpoint = FakeEndpoint("a", FakeLoop())
    connection = BackendConnection(endpoint)
    connection.connection_made(FakeTransport())
    for body in (b"one", b"two", b"three"):
        receiver = Receiver()
        connection.send(receiver, b"request")
        for piece in pieces_of(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body), 1):
            connection.data_received(piece)
        assert (receiver.ended, b"".join(receiver.parts)) == ("done", body)
        assert endpoint.pool.take() is connection


def test_informational_replies_are_no_flood() -> None:
    reply = b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n"
    last = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    for pieces in ([reply * 16 + last], [*[reply] * 16, last], pieces_of(reply * 16 + last, 1)):
        assert ask(pieces, closes=False)[0] == "done"
    for pieces in ([reply * 17 + last], [*[reply] * 17, last]):
        assert ask(pieces, closes=False)[0] == "MALFORMED"
