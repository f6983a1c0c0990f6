"""WebSocket (RFC 6455) as bytes and values: the handshake on both sides, and the frames. No I/O.

The handshake is the client's own, passed on: its key proves to it that the backend has understood. What is taken
out of it are extensions, so that every frame can be read, and the API key that browsers put among the subprotocols,
as they can set no header.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, TypeAlias
from urllib.parse import quote, unquote_to_bytes

from proxy.errors import RequestError

if TYPE_CHECKING:
    from proxy.http1 import RequestHead

_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_KEY: Final = re.compile(rb"[A-Za-z0-9+/]{21}[AQgw]==")
"""16 bytes in Base64."""
_PROTOCOL: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,256}+")
_KEY_PREFIX: Final = b"openai-insecure-api-key."
_ACCOUNT: Final = re.compile(rb"(?i:openai-(?:insecure-api-key|organization|project)\.)")
"""Stands in subprotocols that are none: they say who asks, and end here, however they are mistyped."""
_ESCAPED: Final = re.compile(rb"(?:[^%]|%[0-9A-Fa-f]{2})*+")

MOST_PROTOCOLS: Final = 16

GOING_AWAY: Final = 1001
PROTOCOL_ERROR: Final = 1002
POLICY_VIOLATION: Final = 1008
TOO_BIG: Final = 1009
BAD_GATEWAY: Final = 1014
"""Codes of close frames (IANA's registry of them)."""

Fields: TypeAlias = Sequence[tuple[bytes, bytes]]
"""Names in any case, and values with trailing blanks."""


def accept_of(key: bytes) -> bytes:
    """What proves that the server has read the key (RFC 6455 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key + _GUID, usedforsecurity=False).digest())


def key_among(fields: Fields) -> bytes | None:
    """The API key among the subprotocols; None: there is none."""
    for protocol in _listed(fields, b"sec-websocket-protocol"):
        if protocol.startswith(_KEY_PREFIX):
            return protocol[len(_KEY_PREFIX) :]
    return None


class Handshake:
    """What a client has asked for."""

    __slots__ = ("key", "model", "protocols")

    def __init__(self, head: RequestHead) -> None:
        """Raises RequestError for what is no handshake by the letter."""
        fields = head.websocket or ()
        if head.version == 0 or [value.lower() for value in _values(fields, b"upgrade")] != [b"websocket"]:
            raise RequestError(
                "upgrade_required", "this is a WebSocket: send `Upgrade: websocket` by HTTP/1.1"
            )
        if _values(fields, b"sec-websocket-version") != [b"13"]:
            raise RequestError("upgrade_required", "Sec-WebSocket-Version must be 13")
        if b"upgrade" not in [option.lower() for option in _listed(fields, b"connection")]:
            raise RequestError("malformed_request", "a WebSocket needs `Connection: Upgrade`")
        keys = _values(fields, b"sec-websocket-key")
        if len(keys) != 1 or _KEY.fullmatch(keys[0]) is None:
            raise RequestError("malformed_request", "Sec-WebSocket-Key must be 16 bytes in Base64")
        if head.content_length or head.chunked:
            raise RequestError("malformed_request", "the handshake of a WebSocket has no body")
        protocols = _listed(fields, b"sec-websocket-protocol")
        if (
            len(protocols) > MOST_PROTOCOLS
            or len(set(protocols)) != len(protocols)
            or not all(map(_PROTOCOL.fullmatch, protocols))
        ):
            raise RequestError("malformed_request", "Sec-WebSocket-Protocol is malformed")
        self.key = keys[0]
        self.protocols = [protocol for protocol in protocols if _ACCOUNT.search(protocol) is None]
        self.model = _model(head.target)

    def fields(self) -> bytes:
        """The field lines of the handshake with a backend."""
        lines = (
            b"connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: %b\r\n"
            % self.key
        )
        if self.protocols:
            lines += b"sec-websocket-protocol: %b\r\n" % b", ".join(self.protocols)
        return lines

    def answer(self, fields: Fields) -> bytes:
        """The field lines of the answer to the client, after a backend's 101 with such fields. Raises ValueError
        when that is not the answer to this handshake."""
        if [value.lower() for value in _values(fields, b"upgrade")] != [b"websocket"]:
            raise ValueError("its Upgrade is not websocket")
        if b"upgrade" not in [option.lower() for option in _listed(fields, b"connection")]:
            raise ValueError("its Connection is not Upgrade")
        accept = accept_of(self.key)
        if _values(fields, b"sec-websocket-accept") != [accept]:
            raise ValueError("its Sec-WebSocket-Accept is wrong")
        if _values(fields, b"sec-websocket-extensions"):
            raise ValueError("it takes an extension that nobody offered")
        chosen = _values(fields, b"sec-websocket-protocol")
        if len(chosen) > 1 or not set(chosen) <= set(self.protocols):
            raise ValueError("it takes a subprotocol that nobody offered")
        lines = b"connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: %b\r\n" % accept
        if chosen:
            lines += b"sec-websocket-protocol: %b\r\n" % chosen[0]
        return lines


def target_for(path: bytes, model: str) -> bytes:
    """Path and query for a backend."""
    return b"%b?model=%b" % (path, quote(model, safe="").encode("ascii"))


def _model(target: bytes) -> str:
    """The one `model` of a query; empty: it has none. Raises RequestError. No other parameter goes on."""
    found: list[str] = []
    for pair in target.partition(b"?")[2].split(b"&"):
        name, _, value = pair.partition(b"=")
        try:
            if _decoded(name) == "model":
                found.append(_decoded(value))
        except ValueError:
            raise RequestError("invalid_value", "the query is not percent-encoded UTF-8", "model") from None
    if len(found) > 1:
        raise RequestError("duplicate_key", "model stands twice in the query", "model")
    return found[0] if found else ""


def _decoded(text: bytes) -> str:
    if _ESCAPED.fullmatch(text) is None:
        raise ValueError("a percent sign that escapes nothing")
    return unquote_to_bytes(text.replace(b"+", b" ")).decode()


def _values(fields: Fields, wanted: bytes) -> list[bytes]:
    return [value.rstrip(b" \t") for name, value in fields if name.lower() == wanted]


def _listed(fields: Fields, wanted: bytes) -> list[bytes]:
    """The members of a list, over all its fields."""
    joined = b",".join(_values(fields, wanted))
    return [member for member in (part.strip(b" \t") for part in joined.split(b",")) if member]


# Frames

MOST_MESSAGE: Final = 1024 * 1024
"""Bytes of a text message that is read; a longer one of a backend is passed on unread, one of a client refused."""

_TEXT: Final = 1
_CLOSE: Final = 8
_OPCODES: Final = frozenset((0, _TEXT, 2, _CLOSE, 9, 10))


class Frames:
    """Follows the frames that one side sends: finds whole text messages, and its close frame."""

    __slots__ = (
        "_begun",
        "_control",
        "_head",
        "_kept",
        "_mask",
        "_masked",
        "_missing",
        "_open",
        "_parts",
        "_size",
        "closed",
        "too_long",
    )

    def __init__(self, *, masked: bool = False) -> None:
        """`masked`: they are a client's."""
        self._masked = masked
        self._mask = b""
        """Of the next bytes of the frame's payload."""
        self._head = b""
        """Of a frame whose head is not whole yet."""
        self._open = False
        """Inside of a frame."""
        self._control = False
        """It is a control frame, which may stand inside of a message."""
        self._missing = 0
        """Bytes of its payload that are still to come."""
        self._begun = False
        """The message goes on in another frame."""
        self._kept = False
        """The message is text, and not too long."""
        self._parts: list[bytes] = []
        self._size = 0
        """Of the message so far, bytes."""
        self.closed = False
        """A close frame has come: nothing behind it counts."""
        self.too_long = False
        """A text message has begun that is too long to be read."""

    @property
    def between(self) -> bool:
        """Whether a frame of ours may come in here."""
        return not self._head and not self._open

    def feed(self, data: bytes) -> list[bytes]:
        """-> the text messages that are complete now. Raises ValueError for what is no frame of this side's."""
        messages: list[bytes] = []
        position = 0
        if self._head:
            data, self._head = self._head + data, b""
        while True:
            if self._open:
                piece = data[position : min(position + self._missing, len(data))]
                position += len(piece)
                self._missing -= len(piece)
                if self._kept and not self._control and piece:
                    if self._masked:
                        mask, turn = self._mask, len(piece) % 4
                        piece, self._mask = _unmasked(piece, mask), mask[turn:] + mask[:turn]
                    self._parts.append(piece)
                if self._missing:
                    break
                self._open = False
                if self._kept and not self._control and not self._begun:
                    messages.append(b"".join(self._parts))
                    self._drop()
            if position == len(data):
                break
            behind = self._read_head(data, position)
            if not behind:
                self._head = data[position:]
                break
            position = behind
        return messages

    def _read_head(self, data: bytes, position: int) -> int:
        """-> position behind the head of a frame; 0: it is not whole."""
        if len(data) < position + 2:
            return 0
        first, second = data[position], data[position + 1]
        opcode, final = first & 15, first >= 128
        if first & 0x70 or opcode not in _OPCODES:
            raise ValueError("its frame has reserved bits or an unknown opcode")
        if (second >= 128) != self._masked:
            raise ValueError("its frame has no mask" if self._masked else "its frame has a mask")
        size, behind = second & 127, position + 2
        if size >= 126:
            behind += 2 if size == 126 else 8
            if len(data) < behind:
                return 0
            least = 126 if size == 126 else 65536
            size = int.from_bytes(data[position + 2 : behind], "big")
            if not least <= size < 2**63:
                raise ValueError("the length of its frame is malformed")
        if self._masked:
            behind += 4
            if len(data) < behind:
                return 0
            self._mask = data[behind - 4 : behind]
        self._control = opcode >= _CLOSE
        if self._control:
            if size > 125 or not final:
                raise ValueError("its control frame is too long, or a fragment")
            self.closed = self.closed or opcode == _CLOSE
        else:
            if (opcode == 0) != self._begun:
                raise ValueError("its message is not continued, or none was begun")
            if opcode:
                self._drop()
                self._kept = opcode == _TEXT
            self._size += size
            if self._size > MOST_MESSAGE:
                self.too_long = self.too_long or self._kept
                self._drop()
            self._begun = not final
        self._open = True
        self._missing = size
        return behind

    def _drop(self) -> None:
        self._parts.clear()
        self._size, self._kept = 0, False


def _unmasked(piece: bytes, mask: bytes) -> bytes:
    """`piece` without its mask, which begins with it (RFC 6455 5.3)."""
    size = len(piece)
    key = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(piece, "big") ^ int.from_bytes(key, "big")).to_bytes(size, "big")


def close_frame(code: int, reason: str) -> bytes:
    """A server's last frame. `reason`: up to 123 bytes of it are told."""
    payload = code.to_bytes(2, "big") + reason.encode()[:123]
    return bytes((0x80 | _CLOSE, len(payload))) + payload
