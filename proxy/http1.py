"""HTTP/1.1 as bytes and values: every framing rule, no I/O.

A head is matched, whole, by one compiled expression that *is* the grammar of RFC 9112. What does not match is
refused; nothing is repaired, skipped or guessed, and nothing is passed on that was not matched. Where the RFC
lets a recipient choose between leniency and refusal, we refuse: two parsers that disagree on a byte are how
requests are smuggled.

All expressions use possessive quantifiers over disjoint classes, so matching is linear in the input. A head that
comes in pieces is checked as it comes and matched once, when it is whole, so that is linear too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from proxy.errors import RequestError
from proxy.websocket import key_among

_TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
_TEXT: Final = rb"[\t -~\x80-\xff]"
_FIELD: Final = _TOKEN + rb"++:" + _TEXT + rb"*+\r\n"
_REQUEST_LINE: Final = rb"(" + _TOKEN + rb"{1,32}+) ([!-~]++) HTTP/1\.([01])\r"
_STATUS_LINE: Final = rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: (" + _TEXT + rb"*+))?+\r"
_FIELDS: Final = rb"(\n(?:" + _FIELD + rb")*+)"

_REQUEST_HEAD: Final = re.compile(_REQUEST_LINE + _FIELDS + rb"\r\n")
_REQUEST_BEGUN: Final = re.compile(_REQUEST_LINE + _FIELDS)
_RESPONSE_HEAD: Final = re.compile(_STATUS_LINE + _FIELDS + rb"\r\n")
_FIELD_LINE: Final = re.compile(_FIELD)
_OTHER_VERSION: Final = re.compile(_TOKEN + rb"++ [!-~]++ HTTP/(?:[02-9]|1\.[2-9])")


def _beginning_of(*parts: bytes) -> bytes:
    """An expression for every beginning of a sequence, the empty one and the whole included."""
    expression = b""
    for part in reversed(parts):
        expression = rb"(?:" + part + expression + rb")?+"
    return expression


# Lines that have not ended. What the groups match, put together, is a short line that may go on in the same ways:
# one byte of a name or a target stands for any number of them, and none for those of a value.
_VERSION_BEGUN: Final = _beginning_of(b" ", b"H", b"T", b"T", b"P", b"/", b"1", rb"\.", b"[01]", rb"\r")
_REQUEST_LINE_BEGUN: Final = (
    rb"(?:(" + _TOKEN + rb"{1,32}+)(?:( [!-~])[!-~]*+(" + _VERSION_BEGUN + rb")|( ))?+)?+"
)
_STATUS: Final = (b"H", b"T", b"T", b"P", b"/", b"1", rb"\.", b"[01]", b" ", b"[1-9]", b"[0-9]", b"[0-9]")
_STATUS_LINE_BEGUN: Final = (
    rb"(" + b"".join(_STATUS) + rb" )" + _TEXT + rb"*+(\r?+)|(" + _beginning_of(*_STATUS, rb"\r") + rb")"
)
_FIELD_BEGUN: Final = re.compile(
    rb"(?:(" + _TOKEN + rb")" + _TOKEN + rb"*+(?:(:)" + _TEXT + rb"*+(\r?+))?+|(\r))?+"
)

METHODS: Final = frozenset(
    b"GET HEAD POST PUT DELETE OPTIONS TRACE PATCH ACL BIND CHECKOUT COPY LABEL LINK LOCK MERGE MKACTIVITY "
    b"MKCALENDAR MKCOL MOVE ORDERPATCH PROPFIND PROPPATCH PURGE QUERY REBIND REPORT SEARCH SOURCE UNBIND "
    b"UNCHECKOUT UNLINK UNLOCK UPDATE VERSION-CONTROL M-SEARCH NOTIFY SUBSCRIBE UNSUBSCRIBE".split()
)
"""Registered methods and a few that are common, without CONNECT: others are refused before they are routed."""

_BODY_IS_ODD: Final = frozenset((b"GET", b"HEAD"))
"""A body of theirs is legal but some servers leave it unread: the connection ends behind it."""

_HOST: Final = re.compile(rb"(?:\[[0-9A-Fa-f:.]++\]|[A-Za-z0-9._~!$&'()*+;=%\-]++)(?::[0-9]{0,5}+)?+")
_ABSOLUTE: Final = re.compile(
    rb"(?i:https?+)://(?:[A-Za-z0-9._~!$&'()*+,;=:%\-]*+@)?+([^/?#]++)(.*+)", re.DOTALL
)
_DIGITS: Final = re.compile(rb"[0-9]{1,15}+")

# Chunk extensions are matched so that they can be dropped; 256 bytes of them are plenty (RFC 9112 7.1.1). Blanks
# behind `;` are the only ones of those allowed there that are in use.
_CHUNK_LINE: Final = re.compile(
    rb"([0-9A-Fa-f]{1,8}+)(?=([^\r\n]{0,256}+)\r\n)"
    rb"(?:;[ \t]*+" + _TOKEN + rb"++"
    rb"(?:=(?:" + _TOKEN + rb'++|"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*+"))?+)*+\r\n'
)
_CHUNK_LINE_BEGIN: Final = re.compile(rb"[0-9A-Fa-f]{1,8}+(?:;|\r?+\Z)")
_CHUNK_LINE_MAX: Final = 8 + 256 + 2
_TRAILERS_MAX: Final = 4096
_CONTROL: Final = re.compile(rb"[\x00-\x08\x0a-\x0c\x0e-\x1f\x7f]|\r(?!\Z)")
"""What no line may hold before its end."""

_FORBIDDEN_TRAILERS: Final = frozenset(
    b"host content-length transfer-encoding authorization connection te trailer upgrade expect cookie set-cookie "
    b"content-encoding content-range x-api-key x-request-id x-session-id idempotency-key".split()
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
    by_api_key: bool = False
    """It is the latter's."""
    request_id: bytes = b""
    session: bytes = b""
    idempotency_key: bytes = b""
    origin: bytes = b""
    """The web page that sends it, as browsers say; empty: none does."""
    content_encoding: bytes = b""
    forwarded: bytes = b""
    """Who it comes from, as proxies in front say; empty: nobody says, or nobody is asked."""
    forward: bytes = b""
    """Field lines that go on to the backend, each ending in CRLF."""
    websocket: list[tuple[bytes, bytes]] | None = None
    """Fields of a handshake, where one is expected (`proxy/websocket.py`); None: `Upgrade` is not looked at."""


NEVER_FORWARDED: Final = frozenset(
    b"host content-length transfer-encoding connection keep-alive proxy-connection proxy-authorization te trailer "
    b"upgrade expect authorization x-api-key x-request-id x-session-id content-encoding accept-encoding "
    b"origin idempotency-key sec-websocket-key sec-websocket-version sec-websocket-protocol "
    b"sec-websocket-extensions".split()
)
"""Fields that frame the message, belong to one connection, or are ours to set or to judge."""


class RequestGrammar:
    """Reads request heads. `forward` names the end-to-end fields that go on to backends.

    It is an allow-list: what a client puts into other fields (cookies, addresses, internal headers) concerns
    neither an engine nor another site's operator.
    """

    FORWARDED: Final = ("accept", "content-type", "traceparent", "tracestate", "user-agent")
    _OWN: Final = (
        "host|content-length|transfer-encoding|connection|expect|authorization|x-api-key|x-request-id|"
        "x-session-id|origin|idempotency-key|content-encoding|content[_-]++length|transfer[_-]++encoding"
    )

    def __init__(
        self, limits: HeadLimits | None = None, forward: tuple[str, ...] = (), addresses: str = ""
    ) -> None:
        """`addresses`: the field in which proxies in front name the client; empty: none is read."""
        self.limits = limits or HeadLimits()
        names = [*self.FORWARDED, *(name.lower() for name in forward)]
        self._forward = frozenset(name.encode("ascii") for name in names)
        for name in self._forward:
            if name.replace(b"_", b"-") in NEVER_FORWARDED:
                raise ValueError(f"the field {name.decode()} cannot be forwarded")
        pattern = self._OWN + "|" + "|".join(re.escape(name) for name in names)
        self._find = _field_finder(pattern.encode("ascii"))
        self._find_addresses = _field_finder(re.escape(addresses).encode("ascii")) if addresses else None

    def parse(self, data: bytes, start: int = 0) -> tuple[RequestHead, int] | PartialHead:
        """-> (head, position behind it), or its beginning when it is not complete yet.

        Raises RequestError when it cannot become a valid head; the connection must then be closed.
        """
        match = _REQUEST_HEAD.match(data, start)
        if match is None:
            partial = PartialHead(_REQUEST, self.limits)
            partial.add(data[start:])
            begun = _REQUEST_BEGUN.match(data, start)
            if begun is not None:
                # Whoever stops in the midst of a head hears at once what is wrong with it so far.
                self._read_fields(RequestHead(b"", b"", int(begun[3])), begun[4], complete=False)
            return partial
        method, target, version, fields = match.groups()
        limits = self.limits
        if match.end() - start > limits.head_bytes or fields.count(b"\n") > limits.fields + 1:
            raise RequestError("header_too_large", "request head too large")
        if len(target) > limits.target_bytes:
            raise RequestError("target_too_long", f"request target longer than {limits.target_bytes} bytes")
        if method not in METHODS:
            raise RequestError("unsupported_method", "unknown method, or one that is not offered")
        head = RequestHead(method, target, 1 if version == b"1" else 0)
        self._read_fields(head, fields)
        if self._find_addresses is not None:
            head.forwarded = b",".join([value for _, value in self._find_addresses(fields)])
        if target[0] != 47:  # not "/"
            _read_target(head)
        if method == b"GET" and _WEBSOCKET_TARGET.match(head.target) is not None:
            head.websocket = _find_handshake(fields)
            if head.credential is None:
                head.credential = key_among(head.websocket)
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
                if api_key is not None:
                    raise RequestError("malformed_request", "more than one X-Api-Key field")
                api_key = value.rstrip(b" \t")
            elif name == b"x-request-id":
                head.request_id = value.rstrip(b" \t")
            elif name == b"x-session-id":
                head.session = value.rstrip(b" \t")
            elif name == b"origin":
                head.origin = value.rstrip(b" \t")
            elif name == b"idempotency-key":
                if head.idempotency_key:
                    raise RequestError("malformed_request", "more than one Idempotency-Key field")
                head.idempotency_key = value.rstrip(b" \t")
            elif name == b"expect":
                if value.rstrip(b" \t").lower() != b"100-continue":
                    raise RequestError("expectation_failed", "only Expect: 100-continue is understood")
                head.expects_continue = head.version == 1
            elif name == b"content-encoding":
                before = head.content_encoding + b"," if head.content_encoding else b""
                head.content_encoding = before + value.rstrip(b" \t").lower()
            else:
                # `Content_Length` and the like: some servers read them as the real ones. We don't, and what
                # might be read in two ways ends the connection.
                twin = True
        if head.credential is None and api_key is not None:
            head.credential, head.by_api_key = api_key, True
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
            if complete:  # else a line that ends in `chunked` may follow
                head.codings = _read_codings(codings)
            head.chunked = True
        if connection:
            options = {option.strip(b" \t") for option in connection.split(b",")}
            head.keep_alive = b"close" not in options and (head.version == 1 or b"keep-alive" in options)
            if not options.isdisjoint(forward):  # named there, a field is for this connection only
                kept = [line for line in kept if line.partition(b":")[0] not in options]
        else:
            head.keep_alive = head.version == 1
        head.forward = b"".join(kept)
        if twin or (head.method in _BODY_IS_ODD and (head.content_length or head.chunked)):
            head.keep_alive = False


class _Repeated:
    """The bytes of a head around the digits of its `Content-Length`, to know it again.

    Both sides of a connection send the same head with every message, but for that length. A head that equals the
    last one in every other byte has been matched whole already; only its length is read.
    """

    __slots__ = ("_after", "_before")

    MAX_BYTES: Final = 4096

    def __init__(self) -> None:
        self._before = b""
        """All bytes up to the digits; empty: nothing to compare with."""
        self._after = b""
        """All bytes behind the digits; empty: the head has no length."""

    def _keep(self, data: bytes, start: int, end: int, has_length: bool) -> bool:
        """Take the head at `data[start:end]`. False: it is too long, or its length is written otherwise."""
        self._before = b""
        if end - start > self.MAX_BYTES:
            return False
        digits = _LENGTH_DIGITS.search(data, start, end)
        if (digits is not None) != has_length:
            return False
        if digits is None:
            self._before, self._after = data[start:end], b""
        else:
            self._before, self._after = data[start : digits.start(1)], data[digits.end(1) : end]
        return True

    def _find(self, data: bytes, start: int) -> tuple[int, int]:
        """-> (length, position behind the head), position 0: it is another head."""
        before = self._before
        if not before or not (data.startswith(before, start) if start else data.startswith(before)):
            return 0, 0
        position = start + len(before)
        after = self._after
        if not after:
            return 0, position
        # Byte by byte: compiled, that is a tenth of what finding, slicing and `int` cost.
        length, last = 0, min(position + _LONGEST_LENGTH, len(data))
        begin = position
        while position < last and 48 <= data[position] <= 57:
            length = 10 * length + data[position] - 48
            position += 1
        end = position + len(after)
        if position == begin or data[position:end] != after:
            return 0, 0
        return length, end


class RepeatedHead(_Repeated):
    """The last request head of a connection."""

    __slots__ = ("_head",)

    def __init__(self) -> None:
        super().__init__()
        self._head: RequestHead | None = None

    def remember(self, data: bytes, start: int, end: int, head: RequestHead) -> None:
        """Keep a head that has just been parsed from `data[start:end]`."""
        has_length = bool(head.content_length)
        keep = (
            head.method not in _BODY_IS_ODD and not head.chunked and self._keep(data, start, end, has_length)
        )
        self._head = head if keep else None

    def recall(self, data: bytes, start: int) -> tuple[RequestHead, int] | None:
        """-> (the same head object with its new length, position behind it), or None when it is another head."""
        length, position = self._find(data, start)
        head = self._head
        if not position or head is None:
            return None
        head.content_length = length
        return head, position


_LONGEST_LENGTH: Final = 15
_LENGTH_DIGITS: Final = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: ([0-9]{1,%d}+)\r\n" % _LONGEST_LENGTH)


class _Grammar(NamedTuple):
    first_line: re.Pattern[bytes]
    first_line_begun: re.Pattern[bytes]
    error: Callable[[str, str], Exception]


class PartialHead:
    """The beginning of a head: kept, and checked as it comes, each byte once however small the pieces are.

    Adding raises RequestError (MalformedResponseError for a response) when it can't become a valid head.
    """

    __slots__ = ("_data", "_grammar", "_in_fields", "_limits", "_line", "_lines")

    def __init__(self, grammar: _Grammar, limits: HeadLimits) -> None:
        self._grammar = grammar
        self._limits = limits
        self._data = bytearray()
        self._in_fields = False
        """Behind the first line."""
        self._lines = 0
        """Complete field lines."""
        self._line = b""
        """The line that has not ended, in short."""

    def whole(self) -> bytes:
        """All bytes that were added."""
        return bytes(self._data)

    def add(self, data: bytes) -> bool:
        """-> whether the head is complete now; what stands behind its end has not been looked at."""
        grammar, limits = self._grammar, self._limits
        self._data += data
        line = self._line + data
        position = 0
        if not self._in_fields:
            match = grammar.first_line.match(line)
            if match is None:
                self._line = self._in_short(grammar.first_line_begun, line, "malformed first line")
                if len(self._data) > limits.target_bytes + 64:
                    raise grammar.error("target_too_long", "first line too long")
                return False
            position, self._in_fields = match.end(), True
        while (match := _FIELD_LINE.match(line, position)) is not None:
            position = match.end()
            self._lines += 1
        if line.startswith(b"\r\n", position):
            return True
        self._line = self._in_short(_FIELD_BEGUN, line[position:], "malformed header field")
        if len(self._data) > limits.head_bytes:
            raise grammar.error("header_too_large", f"head larger than {limits.head_bytes} bytes")
        if self._lines > limits.fields:
            raise grammar.error("header_too_large", f"more than {limits.fields} header fields")
        return False

    def _in_short(self, begun: re.Pattern[bytes], line: bytes, message: str) -> bytes:
        """A short line that may go on in the same ways as `line`."""
        match = begun.fullmatch(line)
        if match is None:
            if not self._in_fields and _OTHER_VERSION.match(line):
                raise self._grammar.error("unsupported_version", "only HTTP/1.0 and HTTP/1.1 are spoken here")
            raise self._grammar.error("malformed_request", message)
        return b"".join(filter(None, match.groups()))


_WEBSOCKET_TARGET: Final = re.compile(rb"/v1/realtime(?:\?|\Z)")
_find_handshake: Final = _field_finder(b"connection|upgrade|sec-websocket-[a-z]++")
_REQUEST: Final = _Grammar(re.compile(_REQUEST_LINE + rb"\n"), re.compile(_REQUEST_LINE_BEGUN), RequestError)


def _read_target(head: RequestHead) -> None:
    """Targets that are not a path: absolute form, and `*` (RFC 9112 3.2)."""
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
    handshake: list[tuple[bytes, bytes]] | None = None
    """With 101: its fields."""

    @property
    def until_close(self) -> bool:
        return self.content_length is None and not self.chunked


class RepeatedResponseHead(_Repeated):
    """The last usual response head of a backend. It holds a date, so it serves for a second."""

    __slots__ = ("_head",)

    def __init__(self) -> None:
        super().__init__()
        self._head: ResponseHead | None = None

    def remember(self, data: bytes, start: int, end: int, head: ResponseHead) -> None:
        """Keep a head that has just been parsed from `data[start:end]`, not in answer to HEAD."""
        keep = head.status == 200 and self._keep(data, start, end, head.content_length is not None)
        self._head = head if keep else None

    def recall(self, data: bytes, start: int) -> tuple[ResponseHead, int] | None:
        """-> (a head like it with its own length, position behind it), or None when it is another head."""
        length, position = self._find(data, start)
        head = self._head
        if not position or head is None:
            return None
        return (
            ResponseHead(
                head.status,
                head.phrase,
                head.fields,
                None if head.content_length is None else length,
                head.chunked,
                head.keep_alive,
                head.content_type,
                head.content_encoding,
                head.retry_after,
            ),
            position,
        )


_find_response_fields: Final = _field_finder(
    b"content-length|transfer-encoding|connection|content-type|content-encoding|retry-after"
)
# What a client may see of a backend's head, as an allow-list: other fields tell of its operator, of the account
# there, of hosts behind it, or belong to one connection.
_find_passed_on: Final = re.compile(
    rb"\n((?i:date|content-type|content-encoding|content-language|content-disposition|cache-control|etag|last-modified|"
    rb"vary|retry-after|allow):[^\r]*+\r)"
).findall
_RESPONSE_LIMITS: Final = HeadLimits(head_bytes=65536, target_bytes=65536, fields=65536)
"""Bytes alone limit a backend's head."""
_RESPONSE: Final = _Grammar(
    re.compile(_STATUS_LINE + rb"\n"),
    re.compile(_STATUS_LINE_BEGUN),
    lambda _, message: MalformedResponseError(message),
)


def parse_response_head(
    data: bytes, start: int, *, to_head_request: bool = False, to_upgrade: bool = False
) -> tuple[ResponseHead, int] | PartialHead:
    """-> (head, position behind it), or its beginning when incomplete. Raises MalformedResponseError.

    Informational responses are returned like others: the caller skips below 200. A message without a body
    (HEAD, 1xx, 204, 304) has `content_length == 0`. `to_upgrade`: 101 may be the answer, and what follows it lasts
    until the connection ends.
    """
    match = _RESPONSE_HEAD.match(data, start)
    if match is None:
        partial = PartialHead(_RESPONSE, _RESPONSE_LIMITS)
        partial.add(data[start:])
        return partial
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
            if length is not None:
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
    kept = _find_passed_on(fields)
    if connection:
        kept = _apply_connection(head, connection, kept)
    head.fields = b"\n".join([*kept, b""])
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
        if not to_upgrade:
            raise MalformedResponseError("protocol switch that nobody asked for")
        head.content_length = None
        head.handshake = _find_handshake(fields)
    return head, match.end()


def _apply_connection(head: ResponseHead, connection: bytes, kept: list[bytes]) -> list[bytes]:
    """`Connection: close`, and the removal of fields that it names (RFC 9110 7.6.1)."""
    options = {option.strip(b" \t").lower() for option in connection.split(b",")}
    if b"close" in options:
        head.keep_alive = False
    named = options - {b"", b"close", b"keep-alive", b"content-type", b"content-encoding"}
    if not named:
        return kept
    return [line for line in kept if line.partition(b":")[0].lower() not in named]


_SIZE: Final = 0
_DATA: Final = 1
_DATA_END: Final = 2
_TRAILER: Final = 3
_DONE: Final = 4
_WHOLE_CHUNKS: Final = [b""] * 0x1000
"""By the length of a read: the size line of the one chunk that it may be."""
for _size in range(0x10, 0x1000 - 7):
    _WHOLE_CHUNKS[len(b"%x\r\n" % _size) + _size + 2] = b"%x\r\n" % _size

_USUAL_SIZES: Final = {b"%x\r\n" % size: size for size in range(0x10, 0x1000)}
"""By the whole line."""


class ChunkedDecoder:
    """Takes a chunked body apart, in any pieces (RFC 9112 7.1). Extensions and trailers are dropped.

    Raises ValueError on the first byte that breaks the grammar.
    """

    __slots__ = ("_line", "_remaining", "_state", "_trailer_bytes", "chunks")

    def __init__(self) -> None:
        self._state = _SIZE
        self._remaining = 0
        self._line = b""
        """Beginning of a line whose end has not come yet."""
        self._trailer_bytes = 0
        self.chunks = 0
        """Chunks that have begun."""

    @property
    def done(self) -> bool:
        return self._state == _DONE

    def feed(self, data: bytes, position: int = 0) -> tuple[bytes, int]:
        """-> (payload bytes, position behind what was read).

        All of `data` is read unless the body ends before; what stands behind the end is not this message's.
        """
        if not self._line:
            if self._state == _SIZE and not position:
                size = len(data)
                line = _WHOLE_CHUNKS[size] if size < len(_WHOLE_CHUNKS) else b""
                if line and data.startswith(line) and data.endswith(b"\r\n"):
                    self.chunks += 1
                    return data[len(line) : size - 2], size
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
                # The size of nearly every chunk of a stream has two or three digits.
                end = data.find(b"\n", position, position + 5) + 1
                size_of_chunk = _USUAL_SIZES.get(data[position:end], 0) if end else 0
                if size_of_chunk:
                    self._remaining = size_of_chunk
                    position = end
                    self.chunks += 1
                    state = _DATA
                    continue
                match = _CHUNK_LINE.match(data, position)
                if match is None:
                    self._line = _unfinished(data, position, _CHUNK_LINE_MAX)
                    if not _CHUNK_LINE_BEGIN.match(self._line):
                        raise ValueError("malformed chunk framing")
                    position = size
                    break
                position = match.end()
                self.chunks += 1
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
            self._line = _unfinished(data, position, _TRAILERS_MAX - self._trailer_bytes)
            return -1
        name = data[position : data.index(b":", position)].lower()
        if name in _FORBIDDEN_TRAILERS:
            raise ValueError("forbidden trailer field")
        self._trailer_bytes += match.end() - position
        if self._trailer_bytes > _TRAILERS_MAX:
            raise ValueError("trailer section too large")
        return match.end()


def _unfinished(data: bytes, position: int, limit: int) -> bytes:
    """The rest of `data` as the beginning of a line; ValueError when it can't become a valid one."""
    line = data[position:]
    if b"\n" in line or len(line) > limit or _CONTROL.search(line):
        raise ValueError("malformed chunk framing")
    return line


SIZE_LINES: Final = [b"%x\r\n" % size for size in range(4096)]
"""The first line of a chunk, by its size."""


def chunk(payload: bytes) -> bytes:
    """One chunk. An empty payload would end the body, so it gives nothing."""
    size = len(payload)
    if not size:
        return b""
    line = SIZE_LINES[size] if size < len(SIZE_LINES) else b"%x\r\n" % size
    return b"%b%b\r\n" % (line, payload)


LAST_CHUNK: Final = b"0\r\n\r\n"
