"""Laws of uploads and WebSockets.

An upload that is accepted is read alike by another parser, and what goes on of it is one too. However the bytes of
a server are cut, the same messages are found in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from email.message import Message
from email.parser import BytesParser
from email.policy import compat32
from typing import Any, Final

from websockets.frames import Close, Frame, Opcode

from proxy.errors import RequestError
from proxy.http1 import PartialHead, RequestGrammar
from proxy.multipart import Form
from proxy.openai import ENGINE_FIELDS, body_for_backend, read_form
from proxy.websocket import Frames, Handshake
from tests.fuzz.target import Target, cuts, words
from tests.proxy.test_websocket import KEY, handshake
from tests.proxy.uploads import BOUNDARY, FORM_TYPE, field, file, form, upload


def _uploads(data: bytes) -> None:
    try:
        read = Form(data, FORM_TYPE)
    except RequestError:
        return
    assert read.names == other_names(data)
    assert Form(read.changed({"x": "y"}), FORM_TYPE).text("x") == "y"
    try:
        body = read_form("transcriptions", data, FORM_TYPE)
    except RequestError:
        return
    sent = Form(body_for_backend(body, model="other", continuous=True), FORM_TYPE)
    assert sent.text("model") == "other"
    assert not ENGINE_FIELDS.intersection(sent.names)
    assert sent.flag("stream_include_usage") == body.stream


def other_names(data: bytes) -> list[str]:
    """Of the parts, as Python's own parser of mail has them."""
    message = BytesParser(policy=compat32).parsebytes(b"Content-Type: " + FORM_TYPE + b"\r\n\r\n" + data)
    parts = message.get_payload()
    assert isinstance(parts, list)
    assert all(isinstance(part, Message) for part in parts)
    return [str(part.get_param("name", header="content-disposition")) for part in parts]  # type: ignore[union-attr]


def _frames(data: bytes) -> None:
    whole = _followed([data])
    for pieces in cuts(data):
        assert _followed(pieces) == whole


def _followed(pieces: Sequence[bytes]) -> Any:
    frames, found = Frames(), []
    try:
        for piece in pieces:
            found += frames.feed(piece)
    except ValueError as error:
        return str(error)
    return found, frames.between, frames.closed


def _handshakes(data: bytes) -> None:
    try:
        parsed = RequestGrammar().parse(data)
        if isinstance(parsed, PartialHead) or parsed[0].websocket is None:
            return
        read = Handshake(parsed[0])
    except RequestError:
        return
    lines = read.fields()
    assert b"openai-insecure-api-key." not in lines.lower()
    assert lines.count(b"\r\n") == 4 + bool(read.protocols)


def _frames_of_servers() -> list[bytes]:
    def frame(payload: bytes, opcode: Opcode = Opcode.TEXT, fin: bool = True) -> bytes:
        return Frame(opcode, payload, fin).serialize(mask=False)

    return [
        frame(b"hello") + frame(b"", Opcode.PING),
        frame(b"a" * 126) + frame(b"b" * 70000, Opcode.BINARY),
        frame(b"one", fin=False) + frame(b"x", Opcode.PONG) + frame(b"two", Opcode.CONT),
        frame(Close(1000, "bye").serialize(), Opcode.CLOSE),
    ]


TARGETS: Final[dict[str, Target]] = {
    "uploads": Target(
        _uploads,
        lambda: [
            upload(),
            upload(stream="true", prompt="sea", priority="1"),
            form(file("image[]"), file("image[]", b""), field("model", "m"), field("n", "2")),
            form(field("model", "m", b"Content-Type: text/plain; charset=utf-8")),
        ],
        (*words("uploads"), b"--" + BOUNDARY, b"\r\n--" + BOUNDARY + b"--\r\n"),
    ),
    "frames": Target(
        _frames, _frames_of_servers, (b"\x81", b"\x01\x00", b"\x80\x7e", b"\x88\x02", b"\x89\x00")
    ),
    "handshakes": Target(
        _handshakes,
        lambda: [
            handshake(),
            handshake(b"sec-websocket-protocol: realtime, openai-insecure-api-key.x"),
            handshake(b"sec-websocket-extensions: permessage-deflate", target=b"/v1/realtime?a=b&model=%41"),
            handshake(upgrade=None),
        ],
        (
            *words("http"),
            b"upgrade: websocket\r\n",
            b"sec-websocket-key: " + KEY,
            b"openai-insecure-api-key.",
        ),
    ),
}
