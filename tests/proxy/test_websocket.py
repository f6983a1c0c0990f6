"""The handshake of a WebSocket on both sides, and the frames of a server, by RFC 6455."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Close, Frame, Opcode

from proxy.errors import RequestError
from proxy.http1 import PartialHead, RequestGrammar, RequestHead, ResponseHead, parse_response_head
from proxy.websocket import MOST_MESSAGE, Frames, Handshake, accept_of, close_frame, target_for

KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
LINES = {
    b"host": b"x",
    b"connection": b"Upgrade",
    b"upgrade": b"websocket",
    b"sec-websocket-key": KEY,
    b"sec-websocket-version": b"13",
}


def handshake(
    *more: bytes, target: bytes = b"/v1/realtime?model=m", version: int = 1, **lines: bytes | None
) -> bytes:
    """As a client sends it; `lines`: fields to replace, by their names, or to leave out."""
    fields = {**LINES, **{name.replace("_", "-").encode(): value for name, value in lines.items()}}
    given = [b"%b: %b" % (name, value) for name, value in fields.items() if value is not None]
    return b"\r\n".join([b"GET %b HTTP/1.%d" % (target, version), *given, *more, b"", b""])


def head_of(raw: bytes) -> RequestHead:
    parsed = RequestGrammar().parse(raw)
    assert not isinstance(parsed, PartialHead)
    return parsed[0]


def refusal(raw: bytes) -> RequestError:
    with pytest.raises(RequestError) as refused:
        Handshake(head_of(raw))
    return refused.value


# From the client


def test_a_handshake_is_read() -> None:
    found = Handshake(
        head_of(handshake(b"sec-websocket-protocol: realtime, a", b"Sec-WebSocket-Protocol: b"))
    )
    assert (found.key, found.model, found.protocols) == (KEY, "m", [b"realtime", b"a", b"b"])


@pytest.mark.parametrize(
    "raw",
    [
        handshake(upgrade=b"WebSocket", connection=b"keep-alive, upgrade"),
        handshake(b"connection: upgrade", connection=b"keep-alive"),
        handshake(sec_websocket_version=b"13 "),
    ],
)
def test_what_clients_write_otherwise_is_the_same(raw: bytes) -> None:
    assert Handshake(head_of(raw)).model == "m"


@pytest.mark.parametrize(
    "raw",
    [
        handshake(upgrade=None),
        handshake(upgrade=b"h2c"),
        handshake(upgrade=b"websocket, h2c"),
        handshake(b"upgrade: websocket"),
        handshake(version=0),
        handshake(sec_websocket_version=None),
        handshake(sec_websocket_version=b"8"),
        handshake(sec_websocket_version=b"8, 13"),
        handshake(b"sec-websocket-version: 13"),
    ],
)
def test_what_asks_for_no_websocket_is_told_to(raw: bytes) -> None:
    error = refusal(raw)
    assert (error.code, error.status) == ("upgrade_required", 426)


@pytest.mark.parametrize(
    "raw",
    [
        handshake(connection=None),
        handshake(connection=b"keep-alive"),
        handshake(connection=b"upgraded"),
        handshake(sec_websocket_key=None),
        handshake(sec_websocket_key=b"dGhlIHNhbXBsZSBub25jZQ="),
        handshake(sec_websocket_key=b"dGhlIHNhbXBsZSBub25jZR=="),
        handshake(sec_websocket_key=b"dGhlIHNhbXBsZSBub25jZQ==x"),
        handshake(b"sec-websocket-key: " + KEY),
        handshake(b"content-length: 1"),
        handshake(b"transfer-encoding: chunked"),
        handshake(sec_websocket_protocol=b"a b"),
        handshake(sec_websocket_protocol=b"a, a"),
        handshake(b"sec-websocket-protocol: a", sec_websocket_protocol=b"a"),
        handshake(sec_websocket_protocol=b",".join(b"p%d" % n for n in range(17))),
    ],
)
def test_a_malformed_handshake_is_refused(raw: bytes) -> None:
    error = refusal(raw)
    assert (error.code, error.status) == ("malformed_request", 400)


@pytest.mark.parametrize(
    ("query", "model"),
    [
        (b"?model=m", "m"),
        (b"?a=b&model=gpt%2D4%20o&c", "gpt-4 o"),
        (b"?model=a+b", "a b"),
        (b"?model=%E6%BD%AE", "潮"),
        (b"?Model=m", ""),
        (b"?model=", ""),
        (b"?", ""),
        (b"", ""),
    ],
)
def test_the_model_is_in_the_query(query: bytes, model: str) -> None:
    assert Handshake(head_of(handshake(target=b"/v1/realtime" + query))).model == model


@pytest.mark.parametrize(
    "query", [b"?model=m&model=n", b"?model=m&mod%65l=n", b"?model=%FF", b"?model=%2", b"?%zz=a&model=m"]
)
def test_a_query_that_may_be_read_in_two_ways_is_refused(query: bytes) -> None:
    assert refusal(handshake(target=b"/v1/realtime" + query)).param == "model"


def test_the_key_of_a_browser_is_taken_out_of_the_subprotocols() -> None:
    protocols = b"realtime, openai-insecure-api-key.KEY, openai-organization.org, openai-project.p"
    head = head_of(handshake(sec_websocket_protocol=protocols))
    assert head.credential == b"KEY"
    found = Handshake(head)
    assert found.protocols == [b"realtime"]
    assert b"KEY" not in found.fields()
    assert b"openai-" not in found.fields()
    mistyped = head_of(handshake(sec_websocket_protocol=b"OpenAI-Insecure-API-Key.KEY, x-openai-project.p"))
    assert mistyped.credential is None
    assert Handshake(mistyped).protocols == []
    both = head_of(handshake(b"authorization: Bearer A", sec_websocket_protocol=protocols))
    assert both.credential == b"Bearer A"


@pytest.mark.parametrize(
    "raw",
    [
        handshake(target=b"/v1/chat/completions"),
        handshake(target=b"/v1/realtime/x"),
        handshake(target=b"/v1/realtimes"),
        handshake().replace(b"GET", b"POST"),
    ],
)
def test_nowhere_else_is_an_upgrade_looked_at(raw: bytes) -> None:
    head = head_of(raw[:-2] + b"sec-websocket-protocol: openai-insecure-api-key.KEY\r\n\r\n")
    assert head.websocket is None
    assert head.credential is None


@pytest.mark.parametrize("name", ["sec-websocket-protocol", "sec-websocket-extensions", "sec-websocket-key"])
def test_fields_of_a_handshake_are_never_forwarded_as_they_are(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be forwarded"):
        RequestGrammar(forward=(name,))


# To the backend and back


def answered(*lines: bytes, protocols: bytes = b"") -> bytes:
    """The answer of a backend to the handshake, for the client. Raises ValueError."""
    more = [b"sec-websocket-protocol: " + protocols] if protocols else []
    raw = b"\r\n".join([b"HTTP/1.1 101 Switching Protocols", *lines, b"", b""])
    parsed = parse_response_head(raw, 0, to_upgrade=True)
    assert not isinstance(parsed, PartialHead)
    fields = parsed[0].handshake
    assert fields is not None
    return Handshake(head_of(handshake(*more))).answer(fields)


GOOD = (b"upgrade: websocket", b"connection: upgrade", b"sec-websocket-accept: " + ACCEPT)


def test_the_answer_proves_that_the_key_was_read() -> None:
    assert accept_of(KEY) == ACCEPT  # RFC 6455 1.3
    lines = answered(*GOOD, b"set-cookie: a=b", b"server: x")
    assert lines == b"connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: %b\r\n" % ACCEPT


def test_a_subprotocol_is_one_that_was_offered() -> None:
    chosen = b"sec-websocket-protocol: realtime"
    assert answered(*GOOD, chosen, protocols=b"a, realtime").endswith(chosen + b"\r\n")
    for lines in ([b"sec-websocket-protocol: other"], [chosen, chosen], [b"sec-websocket-protocol: "]):
        with pytest.raises(ValueError, match="subprotocol"):
            answered(*GOOD, *lines, protocols=b"realtime")


@pytest.mark.parametrize(
    "lines",
    [
        GOOD[1:],
        (GOOD[0], GOOD[2]),
        GOOD[:2],
        (*GOOD[:2], b"sec-websocket-accept: " + KEY),
        (*GOOD, GOOD[2]),
        (*GOOD, b"sec-websocket-extensions: permessage-deflate"),
        (b"upgrade: h2c", *GOOD[1:]),
    ],
)
def test_another_answer_is_refused(lines: tuple[bytes, ...]) -> None:
    with pytest.raises(ValueError, match="it"):
        answered(*lines)


def test_a_101_lasts_until_the_connection_ends() -> None:
    parsed = parse_response_head(b"HTTP/1.1 101 X\r\ncontent-length: 3\r\n\r\nabc", 0, to_upgrade=True)
    assert not isinstance(parsed, PartialHead)
    head: ResponseHead = parsed[0]
    assert head.until_close


def test_a_model_goes_into_the_query_of_a_backend() -> None:
    assert target_for(b"/v1/realtime", "a/b&c=潮") == b"/v1/realtime?model=a%2Fb%26c%3D%E6%BD%AE"


# Frames


def frame(payload: bytes, opcode: Opcode = Opcode.TEXT, *, fin: bool = True, mask: bool = False) -> bytes:
    """As another implementation writes it."""
    return Frame(opcode, payload, fin).serialize(mask=mask)


MESSAGE = st.tuples(
    st.sampled_from((Opcode.TEXT, Opcode.BINARY)), st.lists(st.binary(max_size=300), min_size=1, max_size=4)
)
CONTROL = st.tuples(st.sampled_from((Opcode.PING, Opcode.PONG)), st.binary(max_size=125))


@given(st.booleans(), st.lists(st.tuples(MESSAGE, st.lists(CONTROL, max_size=2)), max_size=5), st.data())
def test_messages_are_found_wherever_the_bytes_are_cut(
    masked: bool,
    messages: list[tuple[tuple[Opcode, list[bytes]], list[tuple[Opcode, bytes]]]],
    data: st.DataObject,
) -> None:
    raw, texts = b"", []
    for (opcode, pieces), controls in messages:
        for number, piece in enumerate(pieces):
            kind = Opcode.CONT if number else opcode
            raw += frame(piece, kind, fin=number == len(pieces) - 1, mask=masked)
            raw += b"".join(frame(payload, control, mask=masked) for control, payload in controls)
        if opcode is Opcode.TEXT:
            texts.append(b"".join(pieces))
    cuts = data.draw(st.lists(st.integers(0, len(raw)), max_size=8))
    frames, found, at = Frames(masked=masked), [], 0
    for cut in [*sorted(cuts), len(raw)]:
        found += frames.feed(raw[at:cut])
        at = cut
    assert found == texts
    assert frames.between
    assert not frames.closed


@pytest.mark.parametrize("size", [0, 125, 126, 65535, 65536, MOST_MESSAGE])
def test_messages_of_all_lengths(size: int) -> None:
    assert Frames().feed(frame(b"x" * size)) == [b"x" * size]


def test_a_message_that_is_too_long_is_passed_over() -> None:
    frames = Frames()
    half = b"x" * (MOST_MESSAGE // 2 + 1)
    assert frames.feed(frame(half, fin=False) + frame(half, Opcode.CONT)) == []
    assert frames.feed(frame(b"next")) == [b"next"]


@pytest.mark.parametrize("opcode", [Opcode.TEXT, Opcode.BINARY])
def test_a_text_that_is_too_long_is_told(opcode: Opcode) -> None:
    frames = Frames(masked=True)
    frames.feed(frame(b"x" * MOST_MESSAGE, opcode, fin=False, mask=True))
    assert not frames.too_long
    frames.feed(frame(b"x", Opcode.CONT, mask=True))
    assert frames.too_long == (opcode is Opcode.TEXT)


def test_a_clients_frame_needs_its_mask() -> None:
    with pytest.raises(ValueError, match="no mask"):
        Frames(masked=True).feed(frame(b"x"))


def test_a_frame_of_ours_stands_between_two() -> None:
    frames = Frames()
    raw = frame(b"x" * 200)
    for byte in raw[:-1]:
        frames.feed(bytes((byte,)))
        assert not frames.between
    frames.feed(raw[-1:])
    assert frames.between


def test_the_close_frame_is_seen() -> None:
    frames = Frames()
    frames.feed(frame(b"x", fin=False) + frame(Close(1000, "").serialize(), Opcode.CLOSE))
    assert frames.closed


@pytest.mark.parametrize(
    "raw",
    [
        b"\xc1\x00",  # compressed
        b"\x83\x00",  # an unknown opcode
        b"\x8b\x00",
        b"\x81\x80\x00\x00\x00\x00",  # masked
        b"\x81\x7e\x00\x7d",  # a length that needs no such form
        b"\x81\x7f\x00\x00\x00\x00\x00\x00\xff\xff",
        b"\x81\x7f\xff\x00\x00\x00\x00\x00\x00\x00",
        b"\x89\x7e\x00\x7e",  # a long ping
        b"\x09\x00",  # a fragment of one
        b"\x80\x00",  # nothing to continue
        b"\x01\x00\x81\x00",  # not continued
    ],
)
def test_what_is_no_frame_of_a_server_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match="its"):
        Frames().feed(raw)


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=4))
def test_any_bytes_are_read_or_refused_alike_wherever_they_are_cut(raw: bytes, cuts: list[int]) -> None:
    def read(pieces: list[bytes]) -> Any:
        frames, found = Frames(), []
        try:
            for piece in pieces:
                found += frames.feed(piece)
        except ValueError as error:
            return str(error)
        return found, frames.between, frames.closed

    ends = [*sorted(min(cut, len(raw)) for cut in cuts), len(raw)]
    assert read([raw]) == read([raw[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)])


def test_our_close_frame_is_one() -> None:
    raw = close_frame(1001, "x" * 200)
    assert raw == frame(Close(1001, "x" * 123).serialize(), Opcode.CLOSE)
