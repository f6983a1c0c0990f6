"""Whatever `http1.py` accepts, llhttp (strict, by httptools) and h11 accept with the same meaning.

The other way round there is nothing to prove: where the RFC leaves a choice, we refuse. The messages come from
seeded generators of well-formed, odd and broken ones, about half of which we accept.

The exceptions, all of them about things that never leave this proxy, since bodies are taken out of their chunks and
sent on with framing of our own:

* llhttp refuses blanks behind the `;` of a chunk extension (legal: RFC 9112 7.1.1), and a tab behind `chunked` in a
  request (legal: RFC 9110 5.5); in a response with such a tab it reads the body until close;
* llhttp stops at `Connection: upgrade`, which we ignore (RFC 9110 7.8);
* h11 knows no transfer coding but a single `chunked`, and keeps no HTTP/1.0 connection alive.
"""

from __future__ import annotations

import re
from random import Random
from typing import NamedTuple

import h11
import httptools
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import RequestError
from proxy.http1 import MalformedResponseError, RequestGrammar, RequestHead, ResponseHead
from tests.proxy.http_bytes import Message, a_request, a_response, read_request, read_response

TAB_BEHIND_CHUNKED = rb"(?i)chunked ?\t"

CASES = 50
"""Messages per seed."""

Fields = list[tuple[bytes, bytes]]
Parser = httptools.HttpRequestParser | httptools.HttpResponseParser


class Meaning(NamedTuple):
    """What a parser made of a message."""

    first: tuple[bytes, ...]
    """Method and target, or status."""
    fields: Fields
    """Names in lower case; values without blanks around them."""
    body: bytes
    keep_alive: bool


class _Llhttp:
    """Callbacks of httptools."""

    parser: Parser
    complete = 0

    def on_message_begin(self) -> None:
        self.target = self.phrase = self.body = b""
        self.fields: Fields = []
        self.in_head = True
        self.keep_alive = False

    def on_status(self, phrase: bytes) -> None:
        self.phrase += phrase

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.in_head:
            self.fields.append((name.lower(), value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        self.in_head = False
        self.keep_alive = self.parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        parser = self.parser
        if isinstance(parser, httptools.HttpRequestParser) or parser.get_status_code() >= 200:
            self.complete += 1


def llhttp(data: bytes, parser_type: type[Parser], until_close: bool = False) -> Meaning | None:
    """The meaning of exactly one message; None: it stops to speak HTTP there."""
    seen = _Llhttp()
    parser = seen.parser = parser_type(seen)
    try:
        parser.feed_data(data[:-1])
        assert seen.complete == 0, "complete before its last byte"
        parser.feed_data(data[-1:])
    except httptools.HttpParserUpgrade:
        return None
    assert seen.complete == (0 if until_close else 1)
    if isinstance(parser, httptools.HttpRequestParser):
        first = parser.get_method(), seen.target
    else:
        first = str(parser.get_status_code()).encode(), seen.phrase
    return Meaning(first, seen.fields, seen.body, seen.keep_alive)


def h11_meaning(connection: h11.Connection, data: bytes, until_close: bool = False) -> Meaning:
    """The meaning of exactly one message."""
    connection.receive_data(data)
    if until_close:
        connection.receive_data(b"")
    while isinstance(head := connection.next_event(), h11.InformationalResponse):
        pass
    assert isinstance(head, h11.Request | h11.Response)
    body = b""
    while isinstance(event := connection.next_event(), h11.Data):
        body += bytes(event.data)
    assert isinstance(event, h11.EndOfMessage), event
    assert connection.trailing_data == (b"", until_close)
    # h11 keeps no HTTP/1.0 connection alive.
    keep_alive = connection.their_state is not h11.MUST_CLOSE or head.http_version == b"1.0"
    if isinstance(head, h11.Request):
        first = head.method, head.target
    else:
        first = str(head.status_code).encode(), bytes(head.reason)
    return Meaning(first, list(head.headers), body, keep_alive)


def h11_client() -> h11.Connection:
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="POST", target="/", headers=[("Host", "a"), ("Content-Length", "0")]))
    connection.send(h11.EndOfMessage())
    return connection


def only_stricter(error: httptools.HttpParserError, data: bytes) -> bool:
    """Whether llhttp refused one of the things that this module's docstring names."""
    for message, shape in (
        ("Invalid character in chunk extensions", rb"[0-9A-Fa-f];[ \t]"),
        ("Request has invalid `Transfer-Encoding`", TAB_BEHIND_CHUNKED),
    ):
        if message in str(error) and re.search(shape, data):
            return True
    return False


def values(fields: Fields, name: bytes) -> list[bytes]:
    return [value for field, value in fields if field == name]


def items(fields: Fields, name: bytes) -> list[bytes]:
    """What a list in one or more fields holds."""
    return [item.strip(b" \t") for item in b",".join(values(fields, name)).lower().split(b",")]


def compare_framing(message: Message, theirs: Meaning) -> None:
    head, fields = message.head, theirs.fields
    assert message.body == theirs.body
    # Who keeps a connection that the other one closes would read a message where there is none.
    assert theirs.keep_alive or not head.keep_alive or (isinstance(head, ResponseHead) and head.until_close)
    lengths = values(fields, b"content-length")
    if head.chunked:
        assert lengths == []
    elif lengths and not isinstance(head, ResponseHead):
        assert head.content_length == int(lengths[0])


def compare_request(message: Message, theirs: Meaning) -> None:
    compare_framing(message, theirs)
    head, fields = message.head, theirs.fields
    assert isinstance(head, RequestHead)
    method, target = theirs.first
    assert head.method == method
    if target.lower().startswith((b"http://", b"https://")):
        path = target.split(b"/", 3)[3:]
        target = b"/" + path[0] if path else b"/" + b"?".join(target.split(b"?", 1)[1:])
    assert head.target == target or head.target == b"/?" + target[1:]
    named = items(fields, b"connection")
    forwarded = {name.encode() for name in RequestGrammar.FORWARDED}.difference(named)
    ours = [line.split(b": ", 1) for line in head.forward.splitlines()]
    assert [(name, value.strip(b" \t")) for name, value in ours] == [f for f in fields if f[0] in forwarded]
    if head.chunked:
        assert [*head.codings, b"chunked"] == items(fields, b"transfer-encoding")
    assert head.credential == [*values(fields, b"authorization"), *values(fields, b"x-api-key"), None][0]
    assert head.request_id == [b"", *values(fields, b"x-request-id")][-1]
    assert head.session == [b"", *values(fields, b"x-session-id")][-1]
    assert head.content_encoding == b",".join(values(fields, b"content-encoding")).lower()
    assert head.expects_continue == (b"100-continue" in values(fields, b"expect") and head.version == 1)


def compare_response(message: Message, theirs: Meaning) -> None:
    compare_framing(message, theirs)
    head = message.head
    assert isinstance(head, ResponseHead)
    status, phrase = theirs.first
    assert head.status == int(status)
    assert head.phrase.strip(b" \t") == phrase.strip(b" \t")
    kept = PASSED_ON - ({*items(theirs.fields, b"connection")} - {b"content-type", b"content-encoding"})
    fields = [field for field in theirs.fields if field[0] in kept]
    ours = [line.split(b":", 1) for line in head.fields.splitlines()]
    assert [(name.lower(), value.strip(b" \t")) for name, value in ours] == fields


PASSED_ON = frozenset(
    b"date content-type content-encoding content-language content-disposition cache-control etag last-modified "
    b"vary retry-after allow".split()
)
"""What a client may see of a backend's head."""


@settings(max_examples=120)
@given(st.integers(0, 2**32))
def test_requests_mean_to_others_what_they_mean_to_us(seed: int) -> None:
    rng = Random(seed)
    for _ in range(CASES):
        data = a_request(rng)
        try:
            message = read_request([data])
        except (RequestError, ValueError):
            continue
        if message is not None:
            check_request(message, data[: message.size])


def check_request(message: Message, data: bytes) -> None:
    try:
        theirs = llhttp(data, httptools.HttpRequestParser)
    except httptools.HttpParserError as error:
        if not only_stricter(error, data):
            raise
    else:
        if theirs is not None:
            compare_request(message, theirs)
    head = message.head
    assert isinstance(head, RequestHead)
    if not head.codings:
        compare_request(message, h11_meaning(h11.Connection(h11.SERVER), data))


@settings(max_examples=120)
@given(st.integers(0, 2**32))
def test_responses_mean_to_others_what_they_mean_to_us(seed: int) -> None:
    rng = Random(seed)
    for _ in range(CASES):
        data = a_response(rng)
        try:
            message = read_response([data])
        except (MalformedResponseError, ValueError):
            continue
        if message is not None:
            check_response(message, data[: message.size])


def check_response(message: Message, data: bytes) -> None:
    head = message.head
    assert isinstance(head, ResponseHead)
    if not re.search(TAB_BEHIND_CHUNKED, data):
        try:
            theirs = llhttp(data, httptools.HttpResponseParser, head.until_close)
        except httptools.HttpParserError as error:
            if not only_stricter(error, data):
                raise
        else:
            if theirs is not None:
                compare_response(message, theirs)
    compare_response(message, h11_meaning(h11_client(), data, head.until_close))
