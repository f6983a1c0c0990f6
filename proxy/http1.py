"""HTTP/1.1 as bytes and values: every framing rule, no I/O.

A head is matched, whole, by one compiled expression that *is* the grammar of RFC 9112. What does not match is
refused; nothing is repaired, skipped or guessed, and nothing is passed on that was not matched. Where the RFC
lets a recipient choose between leniency and refusal, we refuse: two parsers that disagree on a byte are how
requests are smuggled.

All expressions use possessive quantifiers over disjoint classes, so matching is linear in the input. The byte
limits are the caller's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from proxy.errors import RequestError

_TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
_FIELD: Final = _TOKEN + rb"++:[\t -~\x80-\xff]*+\r\n"

_REQUEST_LINE: Final = rb"(" + _TOKEN + rb"{1,32}+) ([!-~]++) HTTP/1\.([01])\r"
_REQUEST_HEAD: Final = re.compile(_REQUEST_LINE + rb"(\n(?:" + _FIELD + rb")*+)\r\n")
_REQUEST_FIRST_LINE: Final = re.compile(_REQUEST_LINE + rb"\n")
_STATUS_LINE: Final = rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: ([\t -~\x80-\xff]*+))?+\r"
_RESPONSE_HEAD: Final = re.compile(_STATUS_LINE + rb"(\n(?:" + _FIELD + rb")*+)\r\n")
_RESPONSE_FIRST_LINE: Final = re.compile(_STATUS_LINE + rb"\n")
_FIELD_LINE: Final = re.compile(_FIELD)
_OTHER_VERSION: Final = re.compile(_TOKEN + rb"++ [!-~]++ HTTP/(?!1\.[01])[0-9]\.[0-9](?:\r\n|\Z)")

# What may still become a request line, and a field line.
_PARTIAL_REQUEST_LINE: Final = re.compile(
    _TOKEN + rb"{0,32}+(?: [!-~]*+(?: (?:H(?:T(?:T(?:P(?:/(?:1(?:\.(?:[01]\r?+)?+)?+)?+)?+)?+)?+)?+)?+)?+)?+"
)
_PARTIAL_STATUS_LINE: Final = re.compile(
    rb"(?:H(?:T(?:T(?:P(?:/(?:1(?:\.(?:[01](?: (?:[1-9](?:[0-9](?:[0-9](?: [\t -~\x80-\xff]*+)?+\r?+"
    rb")?+)?+)?+)?+)?+)?+)?+)?+)?+)?+)?+)?+"
)
_PARTIAL_FIELD_LINE: Final = re.compile(rb"(?:" + _TOKEN + rb"++(?::[\t -~\x80-\xff]*+\r?+)?+|\r)?+")

METHODS: Final = frozenset(
    b"GET HEAD POST PUT DELETE OPTIONS TRACE PATCH ACL BIND CHECKOUT COPY LABEL LINK LOCK MERGE MKACTIVITY "
    b"MKCALENDAR MKCOL MOVE ORDERPATCH PROPFIND PROPPATCH PURGE QUERY REBIND REPORT SEARCH SOURCE UNBIND "
    b"UNCHECKOUT UNLINK UNLOCK UPDATE VERSION-CONTROL M-SEARCH NOTIFY SUBSCRIBE UNSUBSCRIBE CONNECT".split()
)
"""Registered methods, and a few that are common. A name that nobody knows is refused before it is routed."""

_BODY_IS_ODD: Final = frozenset((b"GET", b"HEAD"))
"""A body of theirs is legal but some servers leave it unread: the connection ends behind it."""

_HOST: Final = re.compile(rb"(?:\[[0-9A-Fa-f:.]++\]|[A-Za-z0-9._~!$&'()*+;=%\-]++)(?::[0-9]{0,5}+)?+")
_ABSOLUTE: Final = re.compile(rb"(?i:https?)://(?:[^@/?#]*+@)?([^/?#]++)(.*+)", re.DOTALL)
_DIGITS: Final = re.compile(rb"[0-9]{1,15}+")

# Chunk extensions are matched so that they can be dropped; 256 bytes of them are plenty (RFC 9112 7.1.1).
_CHUNK_LINE: Final = re.compile(
    rb"([0-9A-Fa-f]{1,8}+)(?=([^\r\n]{0,256}+)\r\n)"
    rb"(?:[ \t]*+;[ \t]*+" + _TOKEN + rb"++"
    rb"(?:[ \t]*+=[ \t]*+(?:" + _TOKEN + rb'++|"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*+"))?+)*+\r\n'
)
_CHUNK_LINE_BEGIN: Final = re.compile(rb"[0-9A-Fa-f]{1,8}+(?:[ \t]*+(?:;|\Z)|\r\Z)")
_CHUNK_LINE_MAX: Final = 8 + 256 + 2

_FORBIDDEN_TRAILERS: Final = frozenset(
    b"host content-length transfer-encoding authorization connection te trailer upgrade expect cookie set-cookie "
    b"content-encoding content-range x-api-key x-request-id x-session-id".split()
)
_KNOWN_CODINGS: Final = frozenset((b"gzip", b"x-gzip", b"deflate", b"compress", b"x-compress", b"identity"))


def _field_finder(names: bytes) -> Callable[[bytes], list[tuple[bytes, bytes]]]:
    """-> function that finds the named fields in a block of lines, as (name, value with trailing blanks)."""
    return re.compile(rb"\n((?i:" + names + rb")):[\t ]*+([^\r]*+)\r").findall


@dataclass(slots=True)
class HeadLimits:
    """Bytes and counts of one head."""

    head_bytes: int = 65536
    target_bytes: int = 8192
    fields: int = 100


@dataclass(slots=True)
class RequestHead:
    """One request head, its framing decided."""

    method: bytes
    target: bytes
    """Path and query, as sent (absolute form reduced to its path); or `*`."""
    version: int
    """Minor version: 0 or 1."""
    content_length: int = 0
    chunked: bool = False
    codings: tuple[bytes, ...] = ()
    """Transfer codings below `chunked`."""
    keep_alive: bool = True
    expects_continue: bool = False
    credential: bytes | None = None
    """Value of `Authorization`, or of `x-api-key`."""
    request_id: bytes = b""
    session: bytes = b""
    content_encoding: bytes = b""
    forward: bytes = b""
    """Field lines that go on to the backend, each ending in CRLF."""


class RequestGrammar:
    """Reads request heads. `forward` names the end-to-end fields that go on to backends.

    It is an allow-list: what a client puts into other fields (cookies, addresses, internal headers) concerns
    neither an engine nor another site's operator.
    """

    FORWARDED: Final = ("accept", "content-type", "traceparent", "tracestate", "user-agent")
    _OWN: Final = (
        "host|content-length|transfer-encoding|connection|expect|authorization|x-api-key|x-request-id|"
        "x-session-id|content-encoding|content[_-]+length|transfer[_-]+encoding"
    )

    def __init__(self, limits: HeadLimits | None = None, forward: tuple[str, ...] = ()) -> None:
        self.limits = limits or HeadLimits()
        names = [*self.FORWARDED, *(name.lower() for name in forward)]
        self._forward = frozenset(name.encode("ascii") for name in names)
        pattern = self._OWN + "|" + "|".join(re.escape(name) for name in names)
        self._find = _field_finder(pattern.encode("ascii"))

    def parse(self, data: bytes, start: int = 0) -> tuple[RequestHead, int] | None:
        """-> (head, position behind it), or None when the head is not complete yet.

        Raises RequestError when it cannot become a valid head; the connection must then be closed.
        """
        match = _REQUEST_HEAD.match(data, start)
        if match is None:
            self._explain(data, start)
            return None
        method, target, version, fields = match.groups()
        limits = self.limits
        if match.end() - start > limits.head_bytes or fields.count(b"\n") > limits.fields + 1:
            raise RequestError("header_too_large", "request head too large")
        if len(target) > limits.target_bytes:
            raise RequestError("target_too_long", f"request target longer than {limits.target_bytes} bytes")
        if method not in METHODS:
            raise RequestError("unsupported_method", "unknown method")
        head = RequestHead(method, target, 1 if version == b"1" else 0)
        self._read_fields(head, fields)
        if target[0] != 47:  # not "/"
            _read_target(head)
        return head, match.end()

    def _read_fields(self, head: RequestHead, fields: bytes, complete: bool = True) -> None:
        host: bytes | None = None
        length: bytes | None = None
        codings: bytes | None = None
        connection = b""
        api_key: bytes | None = None
        content_type = twin = False
        forward = self._forward
        kept: list[bytes] = []
        for name, value in self._find(fields):
            name = name.lower()
            if name in forward:
                if name == b"content-type":
                    if content_type:
                        raise RequestError("malformed_request", "more than one Content-Type field")
                    content_type = True
                kept.append(b"%b: %b\r\n" % (name, value))
            elif name == b"host":
                if host is not None:
                    raise RequestError("bad_host", "more than one Host field")
                host = value
            elif name == b"content-length":
                if length is not None:
                    raise RequestError("ambiguous_framing", "more than one Content-Length")
                length = value.rstrip(b" \t")
            elif name == b"connection":
                connection = connection + b"," + value.lower() if connection else value.lower()
            elif name == b"authorization":
                if head.credential is not None:
                    raise RequestError("malformed_request", "more than one Authorization field")
                head.credential = value.rstrip(b" \t")
            elif name == b"transfer-encoding":
                codings = value if codings is None else codings + b"," + value
            elif name == b"x-api-key":
                api_key = value.rstrip(b" \t")
            elif name == b"x-request-id":
                head.request_id = value.rstrip(b" \t")
            elif name == b"x-session-id":
                head.session = value.rstrip(b" \t")
            elif name == b"expect":
                if value.rstrip(b" \t").lower() != b"100-continue":
                    raise RequestError("expectation_failed", "only Expect: 100-continue is understood")
                head.expects_continue = head.version == 1
            elif name == b"content-encoding":
                head.content_encoding = value.rstrip(b" \t").lower()
            else:
                # `Content_Length` and the like: some servers read them as the real ones. We don't, and what
                # might be read in two ways ends the connection.
                twin = True
        head.forward = b"".join(kept)
        if head.credential is None:
            head.credential = api_key
        if host is None:
            if head.version == 1 and complete:
                raise RequestError("bad_host", "HTTP/1.1 request without a Host field")
        elif _HOST.fullmatch(host.rstrip(b" \t")) is None:
            raise RequestError("bad_host", "invalid Host field")
        if length is not None:
            if codings is not None:
                raise RequestError("ambiguous_framing", "both Content-Length and Transfer-Encoding")
            if _DIGITS.fullmatch(length) is None:
                raise RequestError("ambiguous_framing", "invalid Content-Length")
            head.content_length = int(length)
        elif codings is not None:
            if head.version == 0:
                raise RequestError("ambiguous_framing", "Transfer-Encoding in HTTP/1.0")
            head.codings = _read_codings(codings)
            head.chunked = True
        if connection:
            options = {option.strip(b" \t") for option in connection.split(b",")}
            head.keep_alive = b"close" not in options and (head.version == 1 or b"keep-alive" in options)
        else:
            head.keep_alive = head.version == 1
        if twin or (head.method in _BODY_IS_ODD and (head.content_length or head.chunked)):
            head.keep_alive = False

    def _explain(self, data: bytes, start: int) -> None:
        """Raise when `data` can no longer grow into a valid head; return when it still can."""
        if _OTHER_VERSION.match(data, start):
            raise RequestError("unsupported_version", "only HTTP/1.0 and HTTP/1.1 are spoken here")
        fields = _complete_fields(data, start, _REQUEST_FIRST_LINE, _PARTIAL_REQUEST_LINE, self.limits)
        if fields is None:
            raise RequestError("malformed_request", "malformed request line")
        if fields:
            match = _REQUEST_FIRST_LINE.match(data, start)
            assert match is not None
            self._read_fields(RequestHead(match[1], match[2], 1), fields, complete=False)


class RepeatedHead:
    """The last head of a connection, to know it again.

    Clients send the same head with every request, but for the digits of `Content-Length`. A head that equals the
    last one in every other byte has been matched whole already; only its length is read.
    """

    __slots__ = ("_after", "_before", "_head")

    MAX_BYTES: Final = 4096

    def __init__(self) -> None:
        self._before = b""
        """All bytes up to the digits; empty: nothing to compare with."""
        self._after = b""
        self._head: RequestHead | None = None

    def remember(self, data: bytes, start: int, end: int, head: RequestHead) -> None:
        """Keep a head that has just been parsed from `data[start:end]`."""
        self._before, self._head = b"", None
        if end - start > self.MAX_BYTES:
            return
        digits = _LENGTH_DIGITS.search(data, start, end)
        if digits is None:
            if head.content_length or head.chunked:
                return
            self._before, self._after = data[start:end], b""
        else:
            self._before, self._after = data[start : digits.start(1)], data[digits.end(1) : end]
        self._head = head

    def recall(self, data: bytes, start: int) -> tuple[RequestHead, int] | None:
        """-> (the same head object with its new length, position behind it), or None when it is another head."""
        head = self._head
        if head is None or not data.startswith(self._before, start):
            return None
        position = start + len(self._before)
        if not self._after:
            return head, position
        digits = _DIGITS.match(data, position)
        if digits is None or not data.startswith(self._after, digits.end()):
            return None
        head.content_length = int(digits[0])
        return head, digits.end() + len(self._after)


_LENGTH_DIGITS: Final = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: ([0-9]{1,15}+)\r\n")


def _complete_fields(
    data: bytes,
    start: int,
    first_line: re.Pattern[bytes],
    partial_first_line: re.Pattern[bytes],
    limits: HeadLimits,
) -> bytes | None:
    """The complete field lines of an unfinished head, checked; None when its first line is bad.

    Raises RequestError for everything else that can't become a valid head.
    """
    size = len(data) - start
    match = first_line.match(data, start)
    if match is None:
        if partial_first_line.fullmatch(data, start) is None:
            return None
        if size > limits.target_bytes + 64:
            raise RequestError("target_too_long", f"request target longer than {limits.target_bytes} bytes")
        return b""
    if size > limits.head_bytes:
        raise RequestError("header_too_large", f"head larger than {limits.head_bytes} bytes")
    position, count = match.end(), 0
    while (line := _FIELD_LINE.match(data, position)) is not None:
        position = line.end()
        count += 1
    if count > limits.fields:
        raise RequestError("header_too_large", f"more than {limits.fields} header fields")
    if _PARTIAL_FIELD_LINE.fullmatch(data, position) is None:
        raise RequestError("malformed_request", "malformed header field")
    return data[match.end() - 1 : position]


_PARTIAL_LINE_BAD: Final = re.compile(rb"[\x00-\x08\x0a-\x0c\x0e-\x1f\x7f]|\r(?!\Z)")


def _read_target(head: RequestHead) -> None:
    """Targets that are not a path: absolute form, `*`, authority (RFC 9112 3.2)."""
    if head.method == b"CONNECT":
        raise RequestError("unsupported_method", "CONNECT is not offered")
    if head.target == b"*" and head.method == b"OPTIONS":
        return
    absolute = _ABSOLUTE.fullmatch(head.target)
    if absolute is None or _HOST.fullmatch(absolute[1]) is None:
        raise RequestError("malformed_request", "invalid request target")
    rest = absolute[2]
    head.target = rest if rest[:1] == b"/" else b"/" + rest


def _read_codings(value: bytes) -> tuple[bytes, ...]:
    """Transfer codings below a final `chunked` (RFC 9112 6.1)."""
    names = [name.strip(b" \t").lower() for name in value.split(b",")]
    if names[-1] != b"chunked" or b"chunked" in names[:-1]:
        known = all(name in _KNOWN_CODINGS or name == b"chunked" for name in names)
        code = "ambiguous_framing" if known or not all(names) else "unsupported_transfer_coding"
        raise RequestError(code, "Transfer-Encoding must end in one chunked")
    for name in names[:-1]:
        if name not in _KNOWN_CODINGS:
            raise RequestError("unsupported_transfer_coding", "unknown transfer coding")
    return tuple(names[:-1])


class MalformedResponseError(Exception):
    """A backend's message that breaks the framing rules; its connection is never used again."""


@dataclass(slots=True)
class ResponseHead:
    """One response head, its framing decided."""

    status: int
    phrase: bytes
    fields: bytes
    """End-to-end field lines, each ending in CRLF, for the client."""
    content_length: int | None = None
    chunked: bool = False
    keep_alive: bool = True
    content_type: bytes = b""
    content_encoding: bytes = b""
    retry_after: bytes = b""

    @property
    def until_close(self) -> bool:
        return self.content_length is None and not self.chunked


_find_response_fields: Final = _field_finder(
    b"content-length|transfer-encoding|connection|content-type|content-encoding|retry-after"
)
# `Connection` may name further fields; a response that does is re-read below.
_HOP_BY_HOP: Final = re.compile(
    rb"\n(?i:connection|keep-alive|proxy-connection|proxy-authenticate|te|trailer|transfer-encoding|upgrade|"
    rb"content-length|x-request-id|x-tidegate-[a-z-]+|x-ratelimit-[a-z-]+):[^\r]*+\r"
)
_RESPONSE_LIMITS: Final = HeadLimits()


def parse_response_head(
    data: bytes, start: int, *, to_head_request: bool = False
) -> tuple[ResponseHead, int] | None:
    """-> (head, position behind it), or None when incomplete. Raises MalformedResponseError.

    Informational responses are returned like others: the caller skips below 200. A message without a body
    (HEAD, 1xx, 204, 304) has `content_length == 0`.
    """
    match = _RESPONSE_HEAD.match(data, start)
    if match is None:
        try:
            lines = _complete_fields(
                data, start, _RESPONSE_FIRST_LINE, _PARTIAL_STATUS_LINE, _RESPONSE_LIMITS
            )
        except RequestError as error:
            raise MalformedResponseError(error.message) from None
        if lines is None:
            raise MalformedResponseError("malformed status line")
        return None
    version, status_text, phrase, fields = match.groups()
    if match.end() - start > _RESPONSE_LIMITS.head_bytes:
        raise MalformedResponseError("response head too large")
    head = ResponseHead(int(status_text), phrase or b"", b"")
    length: bytes | None = None
    codings: bytes | None = None
    connection = b""
    for name, value in _find_response_fields(fields):
        name = name.lower()
        value = value.rstrip(b" \t")
        if name == b"content-type":
            head.content_type = value
        elif name == b"content-length":
            if length is not None and length != value:
                raise MalformedResponseError("more than one Content-Length")
            length = value
        elif name == b"transfer-encoding":
            codings = value if codings is None else codings + b"," + value
        elif name == b"connection":
            connection = connection + b"," + value if connection else value
        elif name == b"content-encoding":
            head.content_encoding = value.lower()
        else:
            head.retry_after = value
    head.keep_alive = version == b"1"
    kept = _HOP_BY_HOP.sub(b"", fields)
    if connection:
        kept = _apply_connection(head, connection, kept)
    head.fields = kept[1:]
    if length is not None:
        if codings is not None:
            raise MalformedResponseError("both Content-Length and Transfer-Encoding")
        if _DIGITS.fullmatch(length) is None:
            raise MalformedResponseError("invalid Content-Length")
        head.content_length = int(length)
    elif codings is not None:
        if codings.lower() != b"chunked" or version == b"0":
            raise MalformedResponseError("Transfer-Encoding other than chunked")
        head.chunked = True
    if to_head_request or head.status < 200 or head.status in (204, 304):
        head.content_length, head.chunked = 0, False
    if head.status == 101:
        raise MalformedResponseError("protocol switch that nobody asked for")
    return head, match.end()


def _apply_connection(head: ResponseHead, connection: bytes, kept: bytes) -> bytes:
    """`Connection: close`, and the removal of fields that it names (RFC 9110 7.6.1)."""
    for option in connection.split(b","):
        option = option.strip(b" \t").lower()
        if option == b"close":
            head.keep_alive = False
        elif option == b"keep-alive":
            continue
        elif option and option not in (b"content-type", b"content-encoding"):
            kept = re.sub(rb"\n(?i:" + re.escape(option) + rb"):[^\r]*+\r", b"", kept)
    return kept


_SIZE, _DATA, _DATA_END, _TRAILER, _DONE = range(5)


class ChunkedDecoder:
    """Takes a chunked body apart, in any pieces (RFC 9112 7.1). Extensions and trailers are dropped.

    Raises ValueError on the first byte that breaks the grammar.
    """

    __slots__ = ("_line", "_remaining", "_state", "_trailer_bytes")

    def __init__(self) -> None:
        self._state = _SIZE
        self._remaining = 0
        self._line = b""
        """Beginning of a line whose end has not come yet."""
        self._trailer_bytes = 0

    @property
    def done(self) -> bool:
        return self._state == _DONE

    def feed(self, data: bytes, position: int = 0) -> tuple[bytes, int]:
        """-> (payload bytes, position behind what was read).

        All of `data` is read unless the body ends before; what stands behind the end is not this message's.
        """
        if not self._line:
            return self._read(data, position)
        line, self._line = self._line, b""
        payload, end = self._read(line + data[position:], 0)
        return payload, position + end - len(line)

    def _read(self, data: bytes, position: int) -> tuple[bytes, int]:
        size = len(data)
        parts: list[bytes] = []
        state = self._state
        while position < size:
            if state == _DATA:
                end = position + self._remaining
                if end > size:
                    parts.append(data[position:])
                    self._remaining = end - size
                    position = size
                    break
                parts.append(data[position:end])
                position, state = end, _DATA_END
            elif state == _SIZE:
                match = _CHUNK_LINE.match(data, position)
                if match is None:
                    self._line = _unfinished(data, position, _CHUNK_LINE_MAX)
                    if not _CHUNK_LINE_BEGIN.match(self._line):
                        raise ValueError("malformed chunk size")
                    position = size
                    break
                position = match.end()
                self._remaining = int(match[1], 16)
                state = _DATA if self._remaining else _TRAILER
            elif state == _DATA_END:
                if data.startswith(b"\r\n", position):
                    position, state = position + 2, _SIZE
                elif size - position == 1 and data[position] == 13:
                    self._line, position = b"\r", size
                    break
                else:
                    raise ValueError("chunk data does not end where its size says")
            elif state == _TRAILER:
                if data.startswith(b"\r\n", position):
                    position, state = position + 2, _DONE
                    break
                position = self._read_trailer(data, position)
                if position < 0:
                    position = size
                    break
            else:
                break
        self._state = state
        return parts[0] if len(parts) == 1 else b"".join(parts), position

    def _read_trailer(self, data: bytes, position: int) -> int:
        """One trailer line. -> position behind it, or -1 when it is not complete."""
        match = _FIELD_LINE.match(data, position)
        if match is None:
            self._line = _unfinished(data, position, 8192)
            return -1
        name = data[position : data.index(b":", position)].lower()
        if name in _FORBIDDEN_TRAILERS:
            raise ValueError("forbidden trailer field")
        self._trailer_bytes += match.end() - position
        if self._trailer_bytes > 16384:
            raise ValueError("trailer section too large")
        return match.end()


def _unfinished(data: bytes, position: int, limit: int) -> bytes:
    """The rest of `data` as the beginning of a line; ValueError when it can't become a valid one."""
    line = data[position:]
    if b"\n" in line or len(line) > limit or _PARTIAL_LINE_BAD.search(line):
        raise ValueError("malformed chunk framing")
    return line


def chunk(payload: bytes) -> bytes:
    """One chunk. An empty payload would end the body, so it gives nothing."""
    return b"%x\r\n%b\r\n" % (len(payload), payload) if payload else b""


LAST_CHUNK: Final = b"0\r\n\r\n"
