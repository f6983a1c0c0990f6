"""HTTP messages for tests: well-formed, odd and broken ones, and readers that take them in any pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from random import Random
from typing import NamedTuple, TypeVar

from proxy.errors import RequestError
from proxy.http1 import (
    ChunkedDecoder,
    MalformedResponseError,
    PartialHead,
    RequestGrammar,
    RequestHead,
    ResponseHead,
    parse_response_head,
)

Head = TypeVar("Head", RequestHead, ResponseHead)

GRAMMAR = RequestGrammar()


class Message(NamedTuple):
    """What was read of one message."""

    head: RequestHead | ResponseHead
    body: bytes
    size: int
    """Bytes it took."""


def read_request(pieces: Iterable[bytes]) -> Message | None:
    """The first request in a stream, or None when it is not complete. Raises what the reading raises."""
    return _read(pieces, GRAMMAR.parse)


def read_response(pieces: Iterable[bytes]) -> Message | None:
    """The first response that is final; a body until close is complete with the last piece."""
    return _read(pieces, _final_response)


def _final_response(data: bytes, position: int) -> tuple[ResponseHead, int] | PartialHead:
    while True:
        parsed = parse_response_head(data, position)
        if isinstance(parsed, PartialHead) or parsed[0].status >= 200:
            return parsed
        position = parsed[1]


def _read(
    pieces: Iterable[bytes], parse: Callable[[bytes, int], tuple[Head, int] | PartialHead]
) -> Message | None:
    partial: PartialHead | None = None
    head: RequestHead | ResponseHead | None = None
    decoder: ChunkedDecoder | None = None
    body = b""
    size = 0
    for piece in pieces:
        data = piece
        size += len(data)
        if head is None:
            if partial is not None:
                if not partial.add(data):
                    continue
                data = partial.whole()
            parsed = parse(data, 0)
            if isinstance(parsed, PartialHead):
                partial = parsed
                continue
            head, position = parsed
            data = data[position:]
            if head.chunked:
                decoder = ChunkedDecoder()
        if decoder is not None:
            payload, end = decoder.feed(data)
            body += payload
            if decoder.done:
                return Message(head, body, size - len(data) + end)
        elif head.content_length is None:
            body += data
        else:
            missing = head.content_length - len(body)
            body += data[:missing]
            if len(body) == head.content_length:
                return Message(head, body, size - max(len(data) - missing, 0))
    if head is not None and head.content_length is None and not head.chunked:
        return Message(head, body, size)
    return None


Reader = Callable[[Sequence[bytes]], Message | None]

REFUSED, WAITS = ("refused",), ("waits",)


def outcome(read: Reader, pieces: Sequence[bytes]) -> tuple[object, ...]:
    """What reading ends in. Which fault is named may depend on the cut, but not that there is one."""
    try:
        message = read(pieces)
    except (RequestError, MalformedResponseError, ValueError):
        return REFUSED
    if message is None:
        return WAITS
    head = message.head
    return *(getattr(head, field.name) for field in fields(head)), message.body, message.size


def unchunked(pieces: Sequence[bytes]) -> tuple[bytes, int] | str:
    """Payload and bytes read; or that it is refused, or waits for more."""
    decoder = ChunkedDecoder()
    parts, size = [], 0
    try:
        for piece in pieces:
            payload, end = decoder.feed(piece)
            assert decoder.done or end == len(piece)
            parts.append(payload)
            size += end
    except ValueError:
        return "refused"
    return (b"".join(parts), size) if decoder.done else "waits"


def pieces_of(data: bytes, size: int) -> list[bytes]:
    """Pieces of one size; 0: all in one."""
    return [data[at : at + size] for at in range(0, len(data), size)] if size else [data]


def random_pieces(rng: Random, data: bytes) -> list[bytes]:
    cuts = sorted(rng.choices(range(len(data) + 1), k=rng.randint(1, 6)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def _words(text: bytes) -> list[bytes]:
    return text.split(b" | ")


# Requests. Each vocabulary has its usual words, often several times, and odd ones that may not pass.

_METHODS = _words(b"POST | POST | POST | GET | GET | HEAD | PUT | OPTIONS | M-SEARCH | QUERY | CONNECT | PRI")
_ODD_METHODS = [b"get", b"FOO", b"", b"GE T", b"P\x00ST", b"POST\t", b"A" * 33]
_TARGETS = [b"/v1/chat/completions"] * 8 + _words(
    b'/ | /a?b=c#d | //host/x | /%00%zz | /"<>\\^`{} | http://h/p?q | http://u:p@h:80 | HTTPS://[::1]:8/x | https://h?x'
    b" | http://a,b/ | ftp://h/ | http:///x | http://h:1/x@y | * | h:80"
)
_ODD_TARGETS = [b"", b"x", b"/\x80", b"/a b", b"/\x7f", b"/\x00", b"http://"]
_VERSIONS = [b"HTTP/1.1"] * 12 + [b"HTTP/1.0"] * 3
_ODD_VERSIONS = _words(
    b"HTTP/1.2 | HTTP/2.0 | HTTP/0.9 | http/1.1 | HTTP/1.1  | HTTP/01.1 | HTTP/1.10 | HTTP |  HTTP/1.1"
)
_FIELDS = _words(
    b"Accept: */* | accept:text/event-stream | Content-Type: application/json | User-Agent:\t a b \t"
    b' | Cookie: a="b"'
    b" | Authorization: Bearer k | x-api-key: k | X-Request-Id: r-1 | x-session-id:s | Expect: 100-continue | X-A:"
    b" | Connection: keep-alive | Connection: close | connection: Keep-Alive , close | Connection: accept, TE"
    b" | Connection: upgrade | Upgrade: websocket | TE: trailers | Content-Encoding: identity | X-Obs: \xe4\xff"
    b" | x!#$%&'*+-.^_`~9: tokens | traceparent: 00-a-b-01 | X-A: a:b: c"
)
_ODD_FIELDS = _words(
    b"Host: b | Host: | host : a | Host: a/b | Accept : x |  folded | \tfolded | X-A: a\r\n b | : empty | no colon"
    b" | X\xe4: a | X-A: \x00 | X-A: a\x0bb | X-A: a\rb | X-A: a\nb: c | X-A: \x7f | Expect: x | Content_Length: 3"
    b" | Transfer-Encoding\x0b: chunked | X-A: a\r | Content-Type: a/b | authorization: x | X-API-Key: y"
    b" | Content-Encoding: gzip | transfer_encoding: chunked"
)
_HOSTS = [b"Host: localhost:8080"] * 8 + [b"host:a", b"HOST: [::1]:80 ", b"Host: a_b.c"]
_LENGTHS = [b"%d"] * 8 + [b"0%d", b" %d\t", b"\t%d"]
_ODD_LENGTHS = _words(
    b"+%d | -%d | %d,%d | %d , | 0x%d | | %d a | 1%d000000000000000 | %d\x0b | %d.0 | %d_0 | \x0c%d | %d\x00"
)
_CODINGS = [b"chunked"] * 8 + _words(b"Chunked |  chunked\t | gzip, chunked | deflate,gzip ,chunked")
_ODD_CODINGS = _words(
    b"chunked, chunked | chunked, gzip | identity | identity, chunked | xchunked | chunked;q=1 | | ,chunked"
    b' | chunked, | gzip | "chunked" | chunked\x0b | br,chunked | chunked\r\n , gzip | \x0cchunked'
    b" | gzip\r\nTransfer-Encoding: chunked"
)
_LINE_ENDS = [b"\n", b"\r", b"\r\r\n", b"\n\r", b"\r\n\r\n", b"\x0b\r\n"]
_SPLICES = [bytes([code]) for code in b'\r\n\0 \t:,;"\\_0f\x80\x7f\x0b\x0c'] + [
    *(b"\r\n", b"\r\n\r\n", b"chunked", b"Content-Length: 1\r\n", b"Transfer-Encoding: chunked\r\n"),
    *(b"GET / HTTP/1.1\r\n", b""),
]


def _one(rng: Random, usual: Sequence[bytes], odd: Sequence[bytes], oddness: float) -> bytes:
    return rng.choice(odd if rng.random() < oddness else usual)


def a_request(rng: Random, oddness: float = 0.02) -> bytes:
    """A request with bytes behind it. `oddness`: how probably each part is a broken one."""

    def one(usual: Sequence[bytes], odd: Sequence[bytes]) -> bytes:
        return _one(rng, usual, odd, oddness)

    method, target = one(_METHODS, _ODD_METHODS), one(_TARGETS, _ODD_TARGETS)
    version = one(_VERSIONS, _ODD_VERSIONS)
    fields = [one(_FIELDS, _ODD_FIELDS) for _ in range(rng.randint(0, 5))]
    fields.append(one(_HOSTS, _ODD_FIELDS))
    framing, body = _framing(rng, oddness)
    fields += framing
    rng.shuffle(fields)
    lines = [b"%b %b %b" % (method, target, version), *fields, b""]
    return _mutated(rng, b"".join(line + one((b"\r\n",), _LINE_ENDS) for line in lines) + body, oddness)


def _framing(rng: Random, oddness: float) -> tuple[list[bytes], bytes]:
    """Fields, and a body with bytes behind it."""
    payload = rng.choice((b"", b"a", b"hello", b"\r\n0\r\n\r\n", bytes(range(256))))
    behind = rng.choice((b"", b"", b"GET / HTTP/1.1\r\nHost: b\r\n\r\n", b"\r\n", b"x"))
    kind = rng.random()
    fields, body = [], payload
    if kind < 0.45 or rng.random() < oddness:
        value = _one(rng, _LENGTHS, _ODD_LENGTHS, oddness).replace(b"%d", b"%d" % len(payload))
        fields.append(rng.choice((b"Content-Length:", b"content-length: ")) + value)
    if 0.45 <= kind < 0.9 or rng.random() < oddness:
        fields.append(b"Transfer-Encoding: " + _one(rng, _CODINGS, _ODD_CODINGS, oddness))
        body = a_chunked_body(rng, payload, oddness)
    if rng.random() < oddness:
        fields.append(rng.choice(fields or [b"Content-Length: 0"]))
    return fields, body + behind


_SIZES = [b"%x"] * 6 + [b"%X", b"0%x", b"0000%x"]
_ODD_SIZES = _words(
    b"0x%x | +%x | -%x | %x  | |  %x | 1%x | %x%x | %xg | 00000000%x | %x\x0b | f0000000%x | %x\r"
)
_EXTENSIONS = [b""] * 8 + _words(b';a | ;a=b | ;a="b c;\\"" | ;a;b=1 | ; a | ;a=b;c | ;a="\xe4"')
_ODD_EXTENSIONS = _words(
    b' ;a | ;a = b | ; | ;; | ;=b | ;a=" | ;a=b\x00 | ;a\rb | ;a\nb |   | \t | ;a b | ;a="\x0b" | ;a="b" c'
    b" | ;\xe4 | ;a= | ;%b" % (b"a" * 300)
)
_TRAILERS = [b""] * 6 + [b"X-Sum: 1\r\n", b"a:\r\nB: c d\r\n", b"X-Obs: \xff\r\n"]
_ODD_TRAILERS = _words(
    b"Content-Length: 5\r\n | Host: b\r\n | no colon\r\n |  folded\r\n | X: a\n | X : a\r\n | X: \x00\r\n | \r | \n"
    b" | transfer-encoding: chunked\r\n | : a\r\n"
)


def a_chunked_body(rng: Random, payload: bytes, oddness: float = 0.02) -> bytes:
    parts = []
    for piece in [*filter(None, random_pieces(rng, payload)), b""]:
        size = _one(rng, _SIZES, _ODD_SIZES, oddness)
        size = size.replace(b"%x", b"%x" % len(piece)).replace(b"%X", b"%X" % len(piece))
        parts += [
            size,
            _one(rng, _EXTENSIONS, _ODD_EXTENSIONS, oddness),
            _one(rng, (b"\r\n",), _LINE_ENDS, oddness),
        ]
        if piece:
            parts += [piece, _one(rng, (b"\r\n",), _LINE_ENDS, oddness)]
    return b"".join(parts) + _one(rng, _TRAILERS, _ODD_TRAILERS, oddness) + b"\r\n"


def _mutated(rng: Random, data: bytes, oddness: float) -> bytes:
    """Sometimes with bytes inserted, removed or replaced."""
    while rng.random() < oddness * 5:
        at = rng.randrange(len(data) + 1)
        data = data[:at] + rng.choice(_SPLICES) + data[at + rng.randrange(2) :]
    return data


# Responses

_STATUS_LINES = [b"HTTP/1.1 200 OK"] * 10 + _words(
    b"HTTP/1.0 200 OK | HTTP/1.1 404  | HTTP/1.1 503 | HTTP/1.1 204 No Content | HTTP/1.1 304 x \t\xe4"
    b" | HTTP/1.1 999 x"
)
_ODD_STATUS_LINES = _words(
    b"HTTP/1.1 099 x | HTTP/1.1 20 OK | HTTP/1.1 2000 OK | HTTP/2.0 200 OK | HTTP/1.1  200 OK | http/1.1 200 OK | "
    b" | HTTP/1.1 200 \x00 | HTTP/1.1\t200 OK | HTTP/1.1 101 Switching Protocols | ICY 200 OK | HTTP/1.1 +20 OK"
)
_INFORMATIONAL = [b""] * 8 + [
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n",
]
_RESPONSE_FIELDS = _words(
    b"server: uvicorn | Date: Mon | content-type: application/json | Connection: close"
    b" | connection: x-a, keep-alive | X-A: 1 | retry-after: 3 | Keep-Alive: timeout=5 | X-Obs: \xff"
    b" | set-cookie: a=b | Trailer: x | x-empty:"
)


def a_response(rng: Random, oddness: float = 0.02) -> bytes:
    """A response with bytes behind it, sometimes behind informational ones."""
    fields = [_one(rng, _RESPONSE_FIELDS, _ODD_FIELDS, oddness) for _ in range(rng.randint(0, 5))]
    framing, body = _framing(rng, oddness)
    fields += framing
    rng.shuffle(fields)
    lines = [_one(rng, _STATUS_LINES, _ODD_STATUS_LINES, oddness), *fields, b""]
    head = b"".join(line + _one(rng, (b"\r\n",), _LINE_ENDS, oddness) for line in lines)
    return _mutated(rng, rng.choice(_INFORMATIONAL) + head + body, oddness)
