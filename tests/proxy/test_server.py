"""A client connection, byte by byte: order, deadlines, slow readers, and how it ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import orjson
import pytest

from proxy.access.keys import Key, KeyStore
from proxy.exchange import State
from proxy.server import (
    FREE_CHUNKS,
    LINGER_S,
    PIPELINE_BYTES,
    REQUESTS_PER_TURN,
    WRITE_BUFFER_BYTES,
    ClientConnection,
)
from tests.proxy.fakes import (
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    FakeTransport,
    World,
    answer_body,
    chunked,
    event,
    transport_of,
    whole,
)

BODY = orjson.dumps({"model": "m", "messages": []})
STREAM_BODY = orjson.dumps({"model": "m", "messages": [], "stream": True})
BIG = b'{"x":"' + b"x" * 2 * WRITE_BUFFER_BYTES + b'"}'


def request(body: bytes = BODY, *fields: bytes, path: bytes = b"/v1/chat/completions") -> bytes:
    lines = b"".join(field + b"\r\n" for field in (b"host: x", *fields))
    return b"POST %b HTTP/1.1\r\n%bcontent-length: %d\r\n\r\n%b" % (path, lines, len(body), body)


class Peer:
    """One client and its connection to the proxy."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.connection = ClientConnection(world.runtime)
        self.transport = FakeTransport()
        self.connection.connection_made(self.transport)

    def send(self, data: bytes) -> None:
        assert self.transport.reading
        self.connection.data_received(data)

    @property
    def statuses(self) -> list[int]:
        parts = self.transport.written.split(b"HTTP/1.1 ")[1:]
        return [int(part[:3]) for part in parts]

    @property
    def code(self) -> str:
        """Code of the only error."""
        body = self.transport.written.partition(b"\r\n\r\n")[2]
        code: str = orjson.loads(body)["error"]["code"]
        return code


class OneKey:
    """A key that every request has."""

    empty = False
    version = ""

    def __init__(self, key: Key) -> None:
        self.key = key

    def authenticate(self, credential: bytes | None, now: float) -> Key:
        return self.key


@pytest.fixture
def key() -> Key:
    return Key("k", "t", rpm=1)


class BadKeys:
    """Keys that let nobody in."""

    empty = False
    version = ""

    def authenticate(self, credential: bytes | None, now: float) -> None:
        return None


def test_pipelined_requests_are_answered_one_after_the_other_in_their_order() -> None:
    world = World("a")
    peer = Peer(world)
    peer.send(request() + request(b"{") + request() + b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
    assert world.dialled() == ["a"]
    first = world.connects("a")
    assert peer.statuses == []
    first.data_received(whole(200, answer_body()))
    # The bad one is answered, and the next one sent on the connection that came free.
    assert peer.statuses == [200, 400]
    assert first.requests == 2
    first.data_received(whole(200, answer_body()))
    assert peer.statuses == [200, 400, 200, 200]
    assert b'"id":"m"' in peer.transport.written


def test_a_flood_of_pipelined_requests_ends_the_connection_behind_the_answer() -> None:
    world = World("a")
    peer = Peer(world)
    peer.send(request())
    peer.send(request() * (PIPELINE_BYTES // len(request()) + 1))
    peer.send(request())
    assert peer.transport.reading  # or nobody would see that it leaves
    assert not peer.connection.pending
    world.connects("a").data_received(whole(200, answer_body()))
    assert peer.statuses == [200]
    assert b"connection: close" in peer.transport.written
    assert peer.transport.ended


def test_a_client_that_has_sent_far_ahead_can_leave() -> None:
    world = World("a")
    peer = Peer(world)
    peer.send(request(STREAM_BODY))
    connection = world.connects("a")
    peer.send(b"x" * (PIPELINE_BYTES + 1))
    peer.connection.eof_received()
    assert connection.closed


def test_nothing_further_is_begun_for_a_client_that_does_not_read() -> None:
    world = World("a")
    peer = Peer(world)
    peer.transport.stop_reading(peer.connection)
    peer.send(request() + request(STREAM_BODY) + request())
    connection = world.connects("a")
    connection.data_received(whole(200, BIG))
    assert peer.transport.unread > WRITE_BUFFER_BYTES
    assert connection.requests == 1
    peer.send(request())  # nor when more of them come
    assert connection.requests == 1
    peer.transport.read_all()
    assert connection.requests == 2
    connection.data_received(STREAM_HEAD + chunked(event("x" * WRITE_BUFFER_BYTES)))
    assert not transport_of(connection).reading
    peer.transport.read_all()
    assert transport_of(connection).reading
    connection.data_received(chunked(DONE) + LAST_CHUNK)
    connection.data_received(whole(200, answer_body()))
    connection.data_received(whole(200, answer_body()))
    assert peer.statuses == [200] * 4


def test_answers_that_need_no_backend_wait_for_their_reader_too() -> None:
    world = World("a", aliases={f"alias-{n}": "m" for n in range(500)})
    peer = Peer(world)
    peer.transport.stop_reading(peer.connection)
    peer.send(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n" * 10)
    answered = len(peer.statuses)
    assert 0 < answered < 10
    while peer.transport.unread > WRITE_BUFFER_BYTES:
        peer.transport.read_all()
    assert peer.statuses == [200] * 10


def test_a_client_that_reads_nothing_between_two_requests_is_cut_off() -> None:
    world = World("a", timeouts={"client_write": 20, "idle": 75})
    peer = Peer(world)
    peer.transport.stop_reading(peer.connection)
    peer.send(request())
    world.connects("a").data_received(whole(200, BIG))
    world.wait(19.0)
    assert not peer.transport.closed
    world.wait(1.1)
    assert peer.transport.aborted


def test_an_idle_connection_is_closed_in_time() -> None:
    world = World("a", timeouts={"idle": 10})
    peer, used = Peer(world), Peer(world)
    world.wait(9.0)
    used.send(request())
    world.connects("a").data_received(whole(200, answer_body()))
    world.wait(1.1)
    assert peer.transport.closed
    assert not used.transport.closed
    world.wait(9.0)
    assert used.transport.closed
    assert peer.statuses == []


def test_an_idle_connection_with_unread_bytes_does_not_stay_for_ever() -> None:
    world = World("a", timeouts={"idle": 10})
    peer = Peer(world)
    peer.transport.stop_reading(peer.connection)
    peer.send(request())
    world.connects("a").data_received(whole(200, answer_body()))
    world.wait(10.1)
    assert peer.transport.aborted


def test_a_head_has_its_time_from_its_first_byte() -> None:
    world = World("a", timeouts={"head": 10})
    peer = Peer(world)
    peer.send(request() + b"GET / HT")
    world.connects("a").data_received(whole(200, answer_body()))
    for byte in b"TP/1.1\r\nhost: "[:11]:
        world.wait(0.9)
        peer.send(bytes([byte]))
    assert peer.statuses == [200]
    world.wait(0.2)
    assert peer.statuses == [200, 408]
    assert peer.transport.ended


def test_a_body_has_its_time() -> None:
    world = World("a", timeouts={"body": 10})
    peer = Peer(world)
    peer.send(request()[:-5])
    world.wait(9.9)
    peer.send(b"x")
    world.wait(0.2)
    assert (peer.statuses, peer.code) == ([408], "request_timeout")
    assert world.all == []
    assert world.dialled() == []


def test_after_a_refusal_the_rest_is_read_and_dropped_for_a_moment() -> None:
    world = World("a")
    peer = Peer(world)
    peer.send(b"\x00\x01 what\r\n\r\n" + request())
    assert peer.statuses == [400]
    assert peer.transport.ended
    assert not peer.transport.closed
    peer.send(request())
    assert world.dialled() == []
    world.wait(LINGER_S + 0.1)
    assert peer.transport.aborted
    assert peer.statuses == [400]


def test_an_answer_is_not_cut_short_because_its_reader_is_slow() -> None:
    world = World("a", timeouts={"client_write": 20})
    peer = Peer(world)
    peer.transport.stop_reading(peer.connection)
    peer.send(request(BODY, b"connection: close"))
    world.connects("a").data_received(whole(200, BIG))
    assert peer.transport.ended
    world.wait(LINGER_S + 1.0)
    assert not peer.transport.closed
    world.wait(20.0)
    assert peer.transport.aborted


@pytest.mark.parametrize("way", ["end", "loss"])
def test_a_client_that_closes_or_half_closes_is_gone(way: str) -> None:
    world = World("a")
    peer = Peer(world)
    peer.transport.stop_reading(peer.connection)
    peer.send(request(STREAM_BODY))
    connection = world.connects("a")
    connection.data_received(STREAM_HEAD + chunked(event("one", completion=1)))
    exchange = peer.connection.exchange
    assert exchange is not None
    if way == "end":
        assert peer.connection.eof_received() is False
        assert peer.transport.aborted  # what is buffered has no reader
    peer.connection.connection_lost(None)
    assert transport_of(connection).aborted
    assert (exchange.state, exchange.row.outcome) == (State.ENDED, "client_gone")
    assert world.runtime.clients == set()


def test_expect_is_answered_after_the_checks_and_before_the_body() -> None:
    world = World("a")
    peer = Peer(world)
    head, body = request(BODY, b"expect: 100-continue")[: -len(BODY)], BODY
    peer.send(head)
    assert peer.transport.written == b"HTTP/1.1 100 Continue\r\n\r\n"
    peer.send(body)
    world.connects("a").data_received(whole(200, answer_body()))
    assert peer.statuses == [100, 200]
    peer.send(head + body)  # it did not wait for it
    world.endpoints["a"].connections[0].data_received(whole(200, answer_body()))
    assert peer.statuses == [100, 200, 200]
    peer.send(head + body[:3])  # nor is it waiting
    peer.send(body[3:])
    world.endpoints["a"].connections[0].data_received(whole(200, answer_body()))
    assert peer.statuses == [100, 200, 200, 200]


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\nexpect: 100-continue\r\n",
            401,
        ),
        (b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n", 401),
        (b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999\r\n", 413),
        (b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\nexpect: magic\r\n", 417),
    ],
)
def test_a_body_that_will_not_be_used_is_not_asked_for(head: bytes, status: int) -> None:
    world = World("a")
    world.runtime.keys = cast("KeyStore", BadKeys())
    peer = Peer(world)
    peer.send(head + b"\r\n")
    assert peer.statuses == [status]
    assert peer.transport.ended


def test_a_small_body_of_a_refused_request_is_read_and_the_connection_kept() -> None:
    world = World("a")
    world.runtime.keys = cast("KeyStore", BadKeys())
    peer = Peer(world)
    peer.send(request() + request())
    assert peer.statuses == [401, 401]
    assert not peer.transport.ended


def chunks(size: int, count: int) -> bytes:
    return chunked(*[b"x" * size] * count)


@pytest.mark.parametrize(
    ("body", "status", "keys"),
    [
        (chunks(1000, 1100), 413, True),
        (chunks(1000, 80), 401, False),
        (b"5\r\nhello", 0, True),
        (b"5\r\nhelloX", 400, True),
        (b"-5\r\n", 400, True),
    ],
)
def test_chunked_bodies_are_bounded_and_checked_as_they_come(body: bytes, status: int, keys: bool) -> None:
    world = World("a", limits={"body": 1_000_000})
    if not keys:
        world.runtime.keys = cast("KeyStore", BadKeys())
    peer = Peer(world)
    peer.send(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
    for start in range(0, len(body), 100_000):
        if not peer.transport.ended:
            peer.send(body[start : start + 100_000])
    assert peer.statuses == ([status] if status else [])


def test_a_chunked_request_goes_on_with_a_length_and_without_its_trailers() -> None:
    world = World("a")
    peer = Peer(world)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    peer.send(head + chunked(BODY[:5], BODY[5:]) + b"0\r\nx-trailer: yes\r\n\r\n")
    sent = transport_of(world.connects("a")).written
    assert sent.endswith(b"content-length: %d\r\n\r\n%b" % (len(BODY), BODY))
    assert b"trailer" not in sent


def test_while_the_proxy_drains_no_connection_is_kept() -> None:
    world = World("a")
    peer = Peer(world)
    world.runtime.draining = True
    peer.send(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n" * 2)
    assert peer.statuses == [200]
    assert peer.transport.ended


def test_too_many_connections_are_told_so() -> None:
    world = World("a", limits={"connections": 2})
    peers = [Peer(world) for _ in range(2)]
    for peer in peers:
        peer.send(b"GET")  # idle ones would have to go
    peers.append(Peer(world))
    assert [peer.statuses for peer in peers] == [[], [], [503]]
    assert peers[2].transport.ended
    for peer in peers:
        peer.connection.connection_lost(None)
    assert Peer(world).statuses == []


@pytest.mark.parametrize("begin", [lambda peer: None, lambda peer: peer.send(b"GET")])
def test_what_counts_as_idle(begin: Callable[[Peer], None]) -> None:
    world = World("a")
    peer = Peer(world)
    begin(peer)
    assert peer.connection.idle == (peer.connection.partial is None)
    peer = Peer(world)
    peer.send(request())
    assert not peer.connection.idle
    world.connects("a").data_received(whole(200, answer_body()))
    assert peer.connection.idle


def test_a_flood_of_small_requests_lets_others_have_their_turn() -> None:
    world = World("a")
    peer = Peer(world)
    peer.send(request(b"{") * 100)
    assert peer.statuses == [400] * REQUESTS_PER_TURN
    assert not peer.transport.reading
    for turn in (2, 3):
        world.wait(1e-6)
        assert peer.statuses == [400] * REQUESTS_PER_TURN * turn
    world.wait(1e-6)
    assert peer.statuses == [400] * 100
    assert peer.transport.reading


def test_a_body_in_very_small_chunks_is_refused_before_it_costs_much() -> None:
    world = World("a")
    peer = Peer(world)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    peer.send(head + b"1\r\nx\r\n" * FREE_CHUNKS)
    assert peer.statuses == []
    peer.send(b"1\r\nx\r\n")
    assert (peer.statuses, peer.code) == ([400], "malformed_body")


@pytest.mark.parametrize("coding", ["length", "chunked"])
def test_bodies_have_one_bound_together(coding: str) -> None:
    world = World("a", limits={"bodies": 4096})
    first, second = Peer(world), Peer(world)
    big = request(b"x" * 3000)
    first.send(big[:-1])
    assert world.runtime.body_bytes == 2999
    if coding == "length":
        second.send(big[:-2000])  # what is announced takes no room
        assert second.statuses == []
        second.send(b"x" * 1000)
    else:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        second.send(head + b"7d0\r\n" + b"x" * 1000)
        assert second.statuses == []
        second.send(b"x" * 1000)
    assert (second.statuses, second.code) == ([503], "overloaded")
    first.send(b"x")
    assert (first.statuses, world.runtime.body_bytes) == ([400], 0)
    third = Peer(world)
    third.send(request())
    assert world.runtime.body_bytes == len(BODY)
    third.connection.connection_lost(None)
    assert world.runtime.body_bytes == 0


def test_who_has_used_up_its_limits_need_not_send_a_large_body(key: Key) -> None:
    world = World("a")
    world.runtime.keys = cast("KeyStore", OneKey(key))
    peer = Peer(world)
    peer.send(request())
    world.connects("a").data_received(whole(200, answer_body()))
    peer.send(request(BODY, b"expect: 100-continue")[: -len(BODY)])
    assert peer.statuses == [200, 429]
    assert peer.transport.ended


def test_a_web_page_needs_a_key() -> None:
    world = World("a")
    peer = Peer(world)
    for origin in (b"https://evil.example", b"null", b"http://127.0.0.1.evil.example"):
        peer.send(request(BODY, b"origin: " + origin))
    assert peer.statuses == [403] * 3
    peer.send(request(BODY, b"Origin: http://localhost:3000"))
    world.connects("a").data_received(whole(200, answer_body()))
    assert peer.statuses == [403] * 3 + [200]
    world.runtime.keys = cast("KeyStore", OneKey(Key("k", "t")))
    peer.send(request(BODY, b"origin: https://page.example"))
    world.endpoints["a"].connections[0].data_received(whole(200, answer_body()))
    assert peer.statuses == [403] * 3 + [200, 200]


def test_connections_beyond_the_cap_are_answered_and_closed_and_others_are_not_touched() -> None:
    world = World("a")
    world.runtime.most_clients = 2
    first, second = Peer(world), Peer(world)
    first.send(b"POST")
    second.send(b"POST")
    third = Peer(world)
    assert third.statuses == [503]
    assert b"too many connections" in third.transport.written
    assert third.connection.lingering
    first.send(request().removeprefix(b"POST"))
    assert len(world.runtime.exchanges) == 1
    third.connection.connection_lost(None)
    assert len(world.runtime.clients) == 2
    first.connection.connection_lost(None)
    assert Peer(world).statuses == []
