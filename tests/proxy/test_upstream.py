"""Backend connections: when one may be used again, what is told of its end, and the pool of idle ones."""

from __future__ import annotations

import pytest

from probes.passive import AttemptError
from proxy.http1 import ResponseHead
from proxy.upstream import MAX_INFORMATIONAL, BackendConnection
from tests.proxy.fakes import FakeEndpoint, FakeLoop, FakeTransport, close, transport_of

RESET = ConnectionResetError(104, "Connection reset by peer")
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"


class Heard:
    """A receiver that remembers."""

    def __init__(self) -> None:
        self.status = 0
        self.payload = b""
        self.done = False
        self.error: AttemptError | None = None

    def head(self, head: ResponseHead) -> None:
        assert not self.status
        self.status = head.status

    def body(self, payload: bytes, done: bool) -> None:
        assert not self.done
        assert self.error is None
        self.payload += payload
        self.done = done

    def lost(self, error: AttemptError, message: str) -> None:
        assert not self.done
        assert self.error is None
        self.error = error


class Played:
    """One connection with a request on it."""

    def __init__(self, endpoint: FakeEndpoint | None = None) -> None:
        self.endpoint = endpoint or FakeEndpoint("a", FakeLoop())
        self.connection = BackendConnection(self.endpoint)
        self.connection.connection_made(FakeTransport())
        self.heard = self.ask()

    def ask(self, *, head: bool = False) -> Heard:
        heard = Heard()
        self.connection.send(heard, b"GET / HTTP/1.1\r\n\r\n", to_head_request=head)
        return heard

    @property
    def pooled(self) -> bool:
        return len(self.endpoint.pool) == 1


@pytest.mark.parametrize("cut", range(1, len(CHUNKED)))
def test_a_reply_may_be_cut_anywhere(cut: int) -> None:
    for reply in (CHUNKED, OK):
        played = Played()
        for part in (reply[:cut], reply[cut:]):
            if part:
                played.connection.data_received(part)
        heard = played.heard
        assert (heard.status, heard.payload, heard.done, heard.error) == (200, b"ok", True, None)
        assert played.pooled


@pytest.mark.parametrize(
    ("reply", "pooled"),
    [
        (OK, True),
        (CHUNKED, True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", True),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * MAX_INFORMATIONAL + OK, True),
        (b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + OK, True),
        (OK.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"), False),
        (OK.replace(b"HTTP/1.1", b"HTTP/1.0"), False),
        (OK + b"H", False),
        (CHUNKED + b"HTTP/1.1 200 OK\r\n", False),
        (CHUNKED.replace(b"0\r\n\r\n", b"0\r\nx-trailer: 1\r\n\r\n"), True),
    ],
)
def test_what_makes_a_connection_fit_for_another_request(reply: bytes, pooled: bool) -> None:
    played = Played()
    played.connection.data_received(reply)
    assert played.heard.done
    assert played.pooled == pooled
    assert transport_of(played.connection).aborted != pooled
    if pooled:
        assert played.endpoint.pool.take() is played.connection
        second = played.ask()
        played.connection.data_received(b"HTTP/1.1 100 Continue\r\n\r\n" * MAX_INFORMATIONAL + OK)
        assert (second.payload, second.done) == (b"ok", True)


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 100 Continue\r\n\r\n" * (MAX_INFORMATIONAL + 1),
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nokX",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n",
        b"<html>",
    ],
)
def test_what_breaks_the_framing_is_told_once_and_ends_the_connection(reply: bytes) -> None:
    played = Played()
    played.connection.data_received(reply)
    assert played.heard.error is AttemptError.MALFORMED
    assert transport_of(played.connection).aborted
    played.connection.connection_lost(None)
    assert not played.pooled


def test_an_answer_to_head_has_no_body() -> None:
    played = Played()
    played.connection.data_received(OK)
    played.endpoint.pool.take()
    heard = played.ask(head=True)
    played.connection.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
    assert (heard.payload, heard.done) == (b"", True)
    assert played.pooled


@pytest.mark.parametrize("error", [None, RESET])
@pytest.mark.parametrize("came", [b"", b"H", OK[:-1]])
@pytest.mark.parametrize("reused", [False, True])
def test_only_a_reused_connection_that_said_nothing_is_stale(
    reused: bool, came: bytes, error: Exception | None
) -> None:
    played = Played()
    heard = played.heard
    if reused:
        played.connection.data_received(OK)
        played.endpoint.pool.take()
        heard = played.ask()
    if came:
        played.connection.data_received(came)
    close(played.connection, error)
    stale = reused and not came
    assert heard.error is (AttemptError.STALE_CONNECTION if stale else AttemptError.RESET)
    assert not heard.done


@pytest.mark.parametrize("error", [None, RESET])
def test_a_reply_until_close_ends_well_with_a_close_and_badly_with_a_reset(error: Exception | None) -> None:
    played = Played()
    played.connection.data_received(b"HTTP/1.1 200 OK\r\n\r\nwhole?")
    assert not played.heard.done
    close(played.connection, error)
    assert played.heard.payload == b"whole?"
    assert (played.heard.done, played.heard.error) == (
        (True, None) if error is None else (False, AttemptError.RESET)
    )
    assert not played.pooled


@pytest.mark.parametrize("reply", [OK[:-1], CHUNKED[:-1], CHUNKED[:20], b""])
def test_an_aborted_connection_tells_nobody(reply: bytes) -> None:
    played = Played()
    if reply:
        played.connection.data_received(reply)
    played.connection.abort()
    assert transport_of(played.connection).aborted
    played.connection.connection_lost(None)
    assert (played.heard.done, played.heard.error) == (False, None)
    assert played.connection.closed


def test_a_paused_connection_reads_again_and_an_idle_one_is_never_paused() -> None:
    played = Played()
    played.connection.pause()
    assert not transport_of(played.connection).reading
    played.connection.resume()
    assert transport_of(played.connection).reading
    played.connection.data_received(OK)
    played.connection.pause()
    assert transport_of(played.connection).reading


def test_the_pool_gives_the_last_used_and_closes_what_idles() -> None:
    loop = FakeLoop()
    endpoint = FakeEndpoint("a", loop, idle_s=4.0)
    old, new = Played(endpoint), Played(endpoint)
    old.connection.data_received(OK)
    loop.now += 3.0
    new.connection.data_received(OK)
    assert len(endpoint.pool) == 2
    endpoint.pool.sweep(loop.now)
    assert endpoint.pool.take() is new.connection
    new.ask()
    loop.now += 1.0
    endpoint.pool.sweep(loop.now)
    assert transport_of(old.connection).aborted
    assert endpoint.pool.take() is None


@pytest.mark.parametrize("end", ["closed", "closing", "spoke"])
def test_the_pool_gives_nothing_that_has_ended(end: str) -> None:
    played = Played()
    played.connection.data_received(OK)
    match end:
        case "closed":
            close(played.connection)
        case "closing":  # its end is known, but not told yet
            transport_of(played.connection).closed = True
        case "spoke":
            played.connection.data_received(b"HTTP/1.1 200 OK\r\n\r\n")
            assert transport_of(played.connection).aborted
    assert played.endpoint.pool.take() is None


def test_a_closed_pool_keeps_nothing() -> None:
    endpoint = FakeEndpoint("a", FakeLoop())
    idle, running = Played(endpoint), Played(endpoint)
    idle.connection.data_received(OK)
    endpoint.pool.close()
    running.connection.data_received(OK)
    assert running.heard.done
    for played in (idle, running):
        assert transport_of(played.connection).aborted
    assert endpoint.pool.take() is None
