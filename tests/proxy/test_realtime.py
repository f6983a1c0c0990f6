"""`/v1/realtime`, byte by byte: the laws of every endpoint, then bytes both ways, and how a session ends."""

from __future__ import annotations

from typing import Any, cast

import orjson
import pytest
from websockets.frames import Close, Frame, Opcode

from policies.base import Outcome
from proxy.access.keys import Key, KeyStore
from proxy.endpoints import TABLE, WEBSOCKET
from proxy.realtime import CLOSING_S
from proxy.server import PIPELINE_BYTES, WRITE_BUFFER_BYTES
from proxy.upstream import BackendConnection
from proxy.websocket import MOST_MESSAGE
from tests.proxy.fakes import FakeTransport, World, close, transport_of, whole
from tests.proxy.test_server import BadKeys, OneKey, Peer
from tests.proxy.test_websocket import ACCEPT, frame, handshake

SWITCH = (
    b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
    b"sec-websocket-accept: %b\r\n\r\n" % ACCEPT
)


def masked(payload: bytes, opcode: Opcode = Opcode.TEXT, *, fin: bool = True) -> bytes:
    """A client's frame."""
    return Frame(opcode, payload, fin).serialize(mask=True)


SAYS = masked(b'{"type":"response.create"}')
DONE = orjson.dumps(
    {
        "type": "response.done",
        "response": {
            "usage": {"input_tokens": 7, "output_tokens": 5, "input_token_details": {"cached_tokens": 2}}
        },
    }
)
BYE = frame(Close(1000, "").serialize(), Opcode.CLOSE)


class Caller(Peer):
    """A client that has sent its handshake."""

    def __init__(self, world: World, raw: bytes = b"", key: Key | None = None) -> None:
        super().__init__(world)
        if key is not None:
            world.runtime.keys = cast("KeyStore", OneKey(key))
        self.send(raw or handshake())

    def switched(self, name: str = "a") -> BackendConnection:
        """The backend has agreed; nothing else is written to either side yet."""
        connection = self.world.connects(name)
        connection.data_received(SWITCH)
        assert self.statuses == [101]
        self.transport.written = transport_of(connection).written = b""
        return connection

    @property
    def row(self) -> Any:
        [row] = self.world.journal.closed
        return row

    @property
    def close_code(self) -> int:
        """Of the frame that was written last."""
        at = self.transport.written.rindex(b"\x88")
        return int.from_bytes(self.transport.written[at + 2 : at + 4], "big")


def ended(caller: Caller) -> tuple[str, str, int]:
    """Outcome, code, and how many requests its backend has."""
    if caller.transport.aborted:
        caller.connection.connection_lost(None)
    assert caller.connection.exchange is None
    return caller.row.outcome, caller.row.code, caller.world.backend("a").in_flight


# The laws of every endpoint


def test_it_is_the_only_websocket() -> None:
    assert [route.name for route in TABLE if route.body == WEBSOCKET] == ["realtime"]


def test_it_is_routed_by_its_model() -> None:
    world = World("a", aliases={"gpt": "m"})
    caller = Caller(
        world, handshake(b"sec-websocket-protocol: realtime", target=b"/v1/realtime?x=1&model=gpt")
    )
    connection = world.connects("a")
    asked = transport_of(connection).written
    assert asked.startswith(b"GET /v1/realtime?model=m HTTP/1.1\r\nhost: a.test:8000\r\n")
    assert b"\r\nupgrade: websocket\r\n" in asked
    assert b"\r\nsec-websocket-protocol: realtime\r\n" in asked
    connection.data_received(SWITCH[:-2] + b"sec-websocket-protocol: realtime\r\n\r\n")
    answer = caller.transport.written
    assert answer.startswith(b"HTTP/1.1 101 ")
    for field in (
        b"sec-websocket-accept: " + ACCEPT,
        b"sec-websocket-protocol: realtime",
        b"x-tidegate-backend: a",
    ):
        assert b"\r\n%b\r\n" % field in answer
    assert world.backend("a").in_flight == 1


def test_extensions_are_not_offered_to_the_backend() -> None:
    world = World("a")
    Caller(world, handshake(b"sec-websocket-extensions: permessage-deflate; client_max_window_bits"))
    assert b"extensions" not in transport_of(world.connects("a")).written.lower()


def test_it_is_metered() -> None:
    world = World("a")
    caller = Caller(world)
    connection = caller.switched()
    connection.data_received(frame(b'{"type":"session.created"}') + frame(DONE))
    connection.data_received(frame(DONE)[:9])
    connection.data_received(frame(DONE)[9:] + BYE)
    close(connection)
    row = caller.row
    assert (row.outcome, row.status, row.endpoint, row.stream) == ("ok", 101, "realtime", True)
    assert (row.prompt_tokens, row.cached_tokens, row.completion_tokens) == (14, 4, 10)
    assert (row.usage_source, row.unmetered) == ("reported", "")
    assert row.cost_nano > 0
    assert world.backend("a").in_flight == 0


def test_a_backend_that_reports_nothing_is_not_estimated() -> None:
    caller = Caller(World("a"))
    connection = caller.switched()
    connection.data_received(frame(b'{"type":"response.output_text.delta","delta":"hello"}') + BYE)
    close(connection)
    row = caller.row
    assert (row.outcome, row.usage_source, row.unmetered) == ("ok", "none", "no usage was reported")


def test_it_is_limited_by_its_key() -> None:
    world = World("a")
    key = Key("k", "acme", rpm=5, concurrency=1)
    caller = Caller(world, key=key)
    caller.switched()
    refused = Caller(world, key=key)
    assert (refused.statuses, refused.code) == ([429], "concurrency")
    caller.connection.connection_lost(None)
    assert Caller(world, key=key).connection.exchange is not None


def test_a_bad_key_is_401() -> None:
    world = World("a")
    world.runtime.keys = cast("KeyStore", BadKeys())
    caller = Caller(world)
    assert (caller.statuses, caller.code) == ([401], "invalid_api_key")


def test_an_unknown_model_is_404() -> None:
    caller = Caller(World("a"), handshake(target=b"/v1/realtime?model=other"))
    assert (caller.statuses, caller.code) == ([404], "model_not_found")
    assert caller.row.outcome == "client_error"


def test_a_key_may_use_its_models_only() -> None:
    caller = Caller(World("a"), key=Key("k", "acme", models=frozenset({"other"})))
    assert (caller.statuses, caller.code) == ([403], "model_not_allowed")


@pytest.mark.parametrize(
    ("raw", "status", "code"),
    [
        (handshake(target=b"/v1/realtime"), 400, "missing_field"),
        (handshake(upgrade=None), 426, "upgrade_required"),
        (handshake(sec_websocket_key=None), 400, "malformed_request"),
    ],
)
def test_what_is_no_handshake_is_refused_and_the_connection_closed(
    raw: bytes, status: int, code: str
) -> None:
    world = World("a")
    caller = Caller(world, raw)
    assert (caller.statuses, caller.code) == ([status], code)
    assert (b"\r\nsec-websocket-version: 13\r\n" in caller.transport.written) == (status == 426)
    assert caller.transport.ended
    assert caller.row.outcome == "client_error"
    assert not world.dialled()


def test_no_backend_is_502() -> None:
    caller = Caller(World("a"))
    caller.world.refuses("a")
    assert (caller.statuses, caller.code) == ([502], "backend_unreachable")
    assert ended(caller) == ("backend_failed", "backend_unreachable", 0)


@pytest.mark.parametrize(
    "answer",
    [
        whole(500, b"{}"),
        whole(200, b"{}"),
        SWITCH.replace(ACCEPT, b"dGhlIHNhbXBsZSBub25jZQ=="),
        SWITCH[:-2] + b"sec-websocket-extensions: permessage-deflate\r\n\r\n",
        b"HTTP/1.1 301 X\r\nlocation: /\r\ncontent-length: 0\r\n\r\n",
    ],
)
def test_a_failed_handshake_goes_to_another_backend(answer: bytes) -> None:
    world = World("a", "b")
    caller = Caller(world)
    first = world.connects("a")
    first.data_received(answer)
    assert first.closed
    caller.switched("b")
    assert world.backend("a").in_flight == 0


def test_a_backends_own_refusal_reaches_the_client() -> None:
    caller = Caller(World("a"))
    connection = caller.world.connects("a")
    connection.data_received(whole(404, b'{"detail":"Not Found"}'))
    assert caller.statuses == [404]
    assert b"the backend of 'm' has no /v1/realtime" in caller.transport.written
    assert caller.transport.ended
    assert connection.closed  # it may not be in the state that it says
    assert ended(caller) == ("client_error", "", 0)


def test_a_stale_connection_is_replaced() -> None:
    world = World("a")
    world.start(stream=False)
    idle = world.connects("a")
    idle.data_received(whole(200, b"{}"))
    Caller(world)
    assert transport_of(idle).written.count(b"upgrade: websocket") == 1
    close(idle)
    assert b"upgrade: websocket" in transport_of(world.connects("a")).written


def test_a_late_handshake_goes_to_another_backend() -> None:
    world = World("a", "b", hedging={"after": "1s"})
    caller = Caller(world)
    first = world.connects("a")
    world.wait(world.runtime.timeouts.first_token + 1)
    assert first.closed
    caller.switched("b")


def test_a_trial_is_over_with_the_handshake() -> None:
    world = World("a")
    breaker = world.backend("a").breaker
    for _ in range(breaker.threshold):
        breaker.record(Outcome.FAILED, world.loop.now, world.loop.now)
    assert breaker.is_open
    world.wait(breaker.backoff_s + 1)
    Caller(world).switched()
    assert not breaker.is_open
    assert world.backend("a").in_flight == 1


# Bytes


def test_bytes_go_both_ways_as_they_are() -> None:
    caller = Caller(World("a"))
    connection = caller.switched()
    caller.send(SAYS[:5])
    caller.send(SAYS[5:])
    assert transport_of(connection).written == SAYS
    raw = frame(b"x" * 300, Opcode.BINARY) + frame(b"", Opcode.PING)
    for byte in raw:
        connection.data_received(bytes((byte,)))
    assert caller.transport.written == raw


def test_what_comes_with_the_answer_and_ahead_of_it_is_not_lost() -> None:
    caller = Caller(World("a"), handshake() + SAYS)
    connection = caller.world.connects("a")
    connection.data_received(SWITCH + frame(b"hello"))
    assert caller.transport.written.endswith(b"\r\n\r\n" + frame(b"hello"))
    assert transport_of(connection).written.endswith(b"\r\n\r\n" + SAYS)


def test_who_sends_too_much_ahead_is_refused() -> None:
    caller = Caller(World("a"))
    caller.send(b"x" * (PIPELINE_BYTES + 1))
    assert (caller.statuses, caller.code) == ([400], "malformed_request")
    assert ended(caller) == ("client_error", "malformed_request", 0)


def test_what_follows_a_refused_handshake_is_never_a_request() -> None:
    world = World("a")
    caller = Caller(world, handshake(target=b"/v1/realtime?model=other") + handshake())
    assert caller.statuses == [404]
    assert not world.dialled()


def test_a_slow_client_slows_its_backend() -> None:
    caller = Caller(World("a"))
    connection = caller.switched()
    caller.transport.stop_reading(cast("Any", caller.connection))
    connection.data_received(frame(b"x" * WRITE_BUFFER_BYTES))
    assert not transport_of(connection).reading
    caller.transport.read_all()
    assert transport_of(connection).reading
    connection.data_received(frame(b"x" * WRITE_BUFFER_BYTES))
    caller.world.wait(caller.world.runtime.timeouts.client_write + 1)
    assert caller.transport.aborted


def test_a_slow_backend_slows_its_client() -> None:
    caller = Caller(World("a"))
    connection = caller.switched()
    transport: FakeTransport = transport_of(connection)
    transport.stop_reading(cast("Any", connection))
    caller.send(masked(b"x" * (transport.limit + 1), Opcode.BINARY))
    assert not caller.transport.reading
    transport.read_all()
    assert caller.transport.reading


# What a client may say


def update(**session: Any) -> bytes:
    return orjson.dumps({"type": "session.update", "session": session})


PICTURE = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}


@pytest.mark.parametrize(
    "message",
    [
        update(model="m", instructions='Say "url".'),
        update(model="gpt"),
        update(model=None),
        b'{"type":"session.update","model":"m"}',
        update(input_audio_transcription={"model": "whisper-1"}),  # beside the answers
        orjson.dumps({"type": "conversation.item.create", "item": {"content": [PICTURE]}}),
        update(tools=[{"parameters": orjson.loads('{"url":' * 20 + '{"type":"string"}' + "}" * 20)}]),
        b'{"type":"input_audio_buffer.append","audio":"AAAA"}',
    ],
)
def test_a_message_within_its_session_goes_on_as_it_is(message: bytes) -> None:
    caller = Caller(World("a", aliases={"gpt": "m"}))
    connection = caller.switched()
    raw = masked(message[:9], fin=False) + masked(b"", Opcode.PING) + masked(message[9:], Opcode.CONT)
    for byte in raw:
        caller.send(bytes((byte,)))
    assert transport_of(connection).written == raw


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (update(model="other"), "model_not_allowed"),
        (update(model=["m"]), "model_not_allowed"),
        (b'{"type":"session.update","model":"other"}', "model_not_allowed"),
        (b'{"type":"session.update","session":{"m\\u006fdel":"other"}}', "model_not_allowed"),
        (b'{"type":"response.create","response":{"model":"other"}}', "model_not_allowed"),
        (b'{"session":{"model":"other"},"session":{"model":"m"}}', "duplicate_key"),
        (b'{"session":{"model":"other","speed":NaN}}', "invalid_json"),
        (update(tools=[{"type": "mcp", "server_url": "http://10.0.0.1"}]), "media_url"),
        (b'{"item":{"content":[{"image_url":"http://10.0.0.1/x.png"}]}}', "media_url"),
        (b'{"item":{"content":[{"image_ur\\u006c":"http://10.0.0.1/x.png"}]}}', "media_url"),
    ],
)
def test_a_message_that_asks_for_more_ends_its_session_and_never_arrives(message: bytes, code: str) -> None:
    caller = Caller(World("a"))
    connection = caller.switched()
    connection.data_received(frame(DONE))
    raw = masked(message[:9], fin=False) + masked(message[9:], Opcode.CONT)
    for byte in raw:
        caller.send(bytes((byte,)))
    assert transport_of(connection).written == raw[:-1]
    assert connection.closed
    assert caller.close_code == 1008
    assert ended(caller) == ("client_error", code, 0)
    assert caller.row.completion_tokens == 5
    assert caller.world.backend("a").breaker.failures == 0


def test_what_was_said_ahead_is_read_too() -> None:
    caller = Caller(World("a"), handshake() + masked(update(model="other")))
    connection = caller.world.connects("a")
    connection.data_received(SWITCH + frame(b"hello"))
    assert transport_of(connection).written.endswith(b"\r\n\r\n")
    assert caller.close_code == 1008
    assert ended(caller) == ("client_error", "model_not_allowed", 0)


def test_urls_pass_where_they_may() -> None:
    caller = Caller(World("a", media_urls=True))
    connection = caller.switched()
    caller.send(raw := masked(b'{"item":{"content":[{"image_url":"http://x.test/x.png"}]}}'))
    assert transport_of(connection).written == raw


def test_a_message_that_is_too_long_to_read_ends_its_session() -> None:
    caller = Caller(World("a"))
    connection = caller.switched()
    caller.send(raw := masked(b"x" * MOST_MESSAGE, fin=False))
    assert transport_of(connection).written == raw
    caller.send(masked(b"x", Opcode.CONT))
    assert transport_of(connection).written == raw
    assert caller.close_code == 1009
    assert ended(caller) == ("client_error", "body_too_large", 0)


def test_what_a_client_sends_has_to_be_a_websocket() -> None:
    caller = Caller(World("a"))
    connection = caller.switched()
    caller.send(frame(b"no mask"))
    assert transport_of(connection).written == b""
    assert caller.close_code == 1002
    assert ended(caller) == ("client_error", "malformed_request", 0)


def test_nothing_goes_on_behind_a_clients_close_frame() -> None:
    caller = Caller(World("a"))
    connection = caller.switched()
    bye = masked(Close(1000, "").serialize(), Opcode.CLOSE)
    caller.send(bye)
    caller.send(masked(update(model="other")))
    assert transport_of(connection).written == bye
    connection.data_received(BYE)
    close(connection)
    assert ended(caller) == ("ok", "", 0)


# The end


def test_a_client_that_leaves_stops_its_session() -> None:
    caller = Caller(World("a"))
    connection = caller.switched()
    connection.data_received(frame(DONE))
    caller.connection.connection_lost(ConnectionResetError())
    assert connection.closed
    assert ended(caller) == ("client_gone", "", 0)
    assert caller.row.completion_tokens == 5


def test_a_client_that_closes_its_half_hears_the_rest() -> None:
    caller = Caller(World("a"))
    connection = caller.switched()
    assert caller.connection.eof_received()
    assert transport_of(connection).ended
    connection.data_received(frame(DONE) + BYE)
    close(connection)
    assert caller.transport.written == frame(DONE) + BYE
    assert caller.transport.closed
    assert ended(caller) == ("ok", "", 0)


@pytest.mark.parametrize("error", [None, ConnectionResetError()])
def test_a_backend_that_follows_its_client_is_not_to_blame(error: Exception | None) -> None:
    caller = Caller(World("a"))
    connection = caller.switched()
    caller.connection.eof_received()
    close(connection, error)
    assert ended(caller) == ("client_gone", "", 0)
    assert caller.world.backend("a").breaker.failures == 0


def test_a_client_that_closes_its_half_is_gone_after_a_while() -> None:
    caller = Caller(World("a"))
    caller.switched()
    caller.connection.eof_received()
    caller.world.wait(CLOSING_S - 1)
    assert caller.connection.exchange is not None
    caller.world.wait(2)
    assert ended(caller) == ("client_gone", "", 0)


def test_a_client_behind_tls_has_no_half() -> None:
    caller = Caller(World("a"))
    connection = caller.switched()
    caller.transport.can_write_eof = lambda: False  # type: ignore[method-assign]
    assert not caller.connection.eof_received()
    assert connection.closed
    assert ended(caller) == ("client_gone", "", 0)


@pytest.mark.parametrize("error", [None, ConnectionResetError()])
def test_a_backend_that_is_lost_is_told_in_a_close_frame(error: Exception | None) -> None:
    caller = Caller(World("a"))
    connection = caller.switched()
    connection.data_received(frame(DONE))
    close(connection, error)
    assert caller.close_code == 1014
    assert caller.transport.ended
    assert ended(caller) == ("cut", "backend_reset", 0)
    assert caller.row.completion_tokens == 5


def test_amid_a_frame_the_connection_is_cut() -> None:
    caller = Caller(World("a"))
    connection = caller.switched()
    connection.data_received(frame(DONE)[:-1])
    close(connection)
    assert caller.transport.aborted
    assert caller.transport.written == frame(DONE)[:-1]
    assert ended(caller) == ("cut", "backend_reset", 0)


def test_a_backend_that_speaks_something_else_is_cut() -> None:
    caller = Caller(World("a"))
    connection = caller.switched()
    connection.data_received(frame(b"x"))
    connection.data_received(b"HTTP/1.1 500 X\r\n")
    assert connection.closed
    assert caller.transport.aborted
    assert caller.transport.written == frame(b"x")
    assert ended(caller) == ("cut", "backend_protocol", 0)


def test_nothing_counts_behind_a_close_frame() -> None:
    caller = Caller(World("a"))
    connection = caller.switched()
    connection.data_received(frame(DONE) + BYE)
    connection.data_received(frame(DONE))
    caller.world.wait(CLOSING_S + 1)
    assert caller.transport.written == frame(DONE) + BYE
    assert ended(caller) == ("ok", "", 0)
    assert caller.row.completion_tokens == 5


def test_a_session_in_which_nothing_is_said_ends() -> None:
    world = World("a")
    caller = Caller(world)
    connection = caller.switched()
    idle = world.runtime.timeouts.idle
    for _ in range(2):
        for _ in range(2):
            caller.send(SAYS)
            world.wait(idle - 1)
        for _ in range(2):
            connection.data_received(frame(b"", Opcode.PONG))
            world.wait(idle - 1)
        assert caller.connection.exchange is not None
    world.wait(1)  # the sweep sees that something was said
    world.wait(idle + 1)
    assert caller.close_code == 1001
    assert ended(caller) == ("ok", "", 0)


def test_a_replaced_process_leaves_sessions_their_time() -> None:
    world = World("a")
    caller = Caller(world)
    caller.switched()
    before, world.runtime.timeouts.idle = world.runtime.timeouts.idle, 5.0
    world.wait(before - 1)
    assert caller.connection.exchange is not None


def test_a_session_lasts_as_long_as_any_request_may() -> None:
    world = World("a", timeouts={"total": "100s"})
    caller = Caller(world)
    connection = caller.switched()
    for _ in range(5):
        world.wait(21)
        connection.data_received(frame(b"x"))
    assert caller.close_code == 1001
    assert ended(caller) == ("ok", "", 0)


def test_a_stop_ends_a_session_in_a_close_frame() -> None:
    caller = Caller(World("a"))
    connection = caller.switched()
    connection.data_received(frame(DONE))
    assert caller.connection.exchange is not None
    caller.connection.exchange.stop()
    assert caller.close_code == 1001
    assert caller.transport.ended
    assert connection.closed
    assert ended(caller) == ("shutdown", "shutting_down", 0)


def test_a_stop_before_the_answer_is_503() -> None:
    caller = Caller(World("a"))
    caller.world.connects("a")
    assert caller.connection.exchange is not None
    caller.connection.exchange.stop()
    assert (caller.statuses, caller.code) == ([503], "shutting_down")


def test_its_tokens_are_in_the_journal_while_it_runs() -> None:
    caller = Caller(World("a"))
    connection = caller.switched()
    connection.data_received(frame(b'{"type":"x.delta","delta":"hello"}'))
    caller.world.wait(1)
    assert caller.world.journal.progressed == []
    connection.data_received(frame(DONE))
    caller.world.wait(1)
    assert caller.world.journal.progressed == [(caller.connection.exchange.row.op, "a", 7, 2, 5)]  # type: ignore[union-attr]
