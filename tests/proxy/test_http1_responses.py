"""Every rule of `http1.py` about responses and chunks by an example that keeps it and one that breaks it."""

from __future__ import annotations

import pytest

from proxy.http1 import (
    LAST_CHUNK,
    ChunkedDecoder,
    MalformedResponseError,
    RepeatedResponseHead,
    ResponseHead,
    chunk,
    parse_response_head,
)


def response(*fields: bytes, line: bytes = b"HTTP/1.1 200 OK") -> bytes:
    return b"\r\n".join([line, *fields, b"", b""])


def parse_response(data: bytes, *, to_head_request: bool = False) -> ResponseHead:
    parsed = parse_response_head(data, 0, to_head_request=to_head_request)
    assert isinstance(parsed, tuple), "incomplete"
    assert parsed[1] == len(data)
    return parsed[0]


@pytest.mark.parametrize(
    ("line", "status", "phrase"),
    [
        (b"HTTP/1.1 200 OK", 200, b"OK"),
        (b"HTTP/1.0 404 Not \tFound\xe4", 404, b"Not \tFound\xe4"),
        (b"HTTP/1.1 503 ", 503, b""),
        (b"HTTP/1.1 999", 999, b""),
    ],
)
def test_status_lines(line: bytes, status: int, phrase: bytes) -> None:
    head = parse_response(response(line=line))
    assert (head.status, head.phrase) == (status, phrase)


@pytest.mark.parametrize(
    "line",
    [
        *(b"HTTP/2.0 200 OK", b"HTTP/1.2 200 OK", b"http/1.1 200 OK", b"HTTP/1.1  200 OK"),
        *(b"HTTP/1.1 20 OK", b"ICY 200"),
        *(b"HTTP/1.1 2000 OK", b"HTTP/1.1 099 OK", b"HTTP/1.1 +20 OK", b"HTTP/1.1 200 \x00"),
        *(b"HTTP/1.1 200 a\rb", b""),
        *(b" HTTP/1.1 200 OK", b"HTTP/1.1", b"HTTP/1.1 200\tOK", b"HTTP/1.1\t200 OK", b"HTTP/1.1 200 OK\n"),
    ],
)
def test_malformed_status_lines(line: bytes) -> None:
    with pytest.raises(MalformedResponseError):
        parse_response_head(response(line=line), 0)


@pytest.mark.parametrize(
    "field", [b" X: a", b"X : a", b"X: \x00", b"X: a\nY: b", b"X", b": a", b"X: a\r\n folded"]
)
def test_malformed_response_fields(field: bytes) -> None:
    with pytest.raises(MalformedResponseError):
        parse_response_head(response(field), 0)


def test_response_framing() -> None:
    for fields, length, chunked in (
        ((b"Content-Length: 5 ",), 5, False),
        ((b"transfer-encoding: Chunked",), None, True),
        ((), None, False),
    ):
        head = parse_response(response(*fields))
        assert (head.content_length, head.chunked) == (length, chunked)
        assert head.until_close is (length is None and not chunked)


@pytest.mark.parametrize("line", [b"HTTP/1.1 204 x", b"HTTP/1.1 304 x", b"HTTP/1.1 100 x", b"HTTP/1.1 103 x"])
def test_responses_that_have_no_body(line: bytes) -> None:
    for field in (b"Content-Length: 5", b"Transfer-Encoding: chunked", b"X: y"):
        head = parse_response(response(field, line=line))
        assert (head.content_length, head.chunked) == (0, False)


def test_answers_to_head_have_no_body() -> None:
    head = parse_response(response(b"Content-Length: 5"), to_head_request=True)
    assert (head.content_length, head.chunked) == (0, False)


@pytest.mark.parametrize(
    "fields",
    [
        (b"Content-Length: 5", b"Content-Length: 5"),
        (b"Content-Length: 5", b"content-length: 6"),
        (b"Content-Length: 5", b"Transfer-Encoding: chunked"),
        (b"Content-Length: +5",),
        (b"Content-Length: 5, 5",),
        (b"Content-Length:",),
        (b"Content-Length: " + b"1" * 16,),
        (b"Transfer-Encoding: gzip, chunked",),
        (b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"),
        (b"Transfer-Encoding: identity",),
        (b"Transfer-Encoding:",),
    ],
)
def test_ambiguous_response_framing(fields: tuple[bytes, ...]) -> None:
    with pytest.raises(MalformedResponseError):
        parse_response_head(response(*fields), 0)


def test_no_transfer_encoding_in_http_1_0_responses() -> None:
    with pytest.raises(MalformedResponseError):
        parse_response_head(response(b"Transfer-Encoding: chunked", line=b"HTTP/1.0 200 OK"), 0)


def test_nobody_asked_to_switch_protocols() -> None:
    with pytest.raises(MalformedResponseError, match="protocol switch"):
        parse_response_head(response(line=b"HTTP/1.1 101 Switching Protocols"), 0)


def test_backend_connections_are_kept_when_both_want() -> None:
    assert parse_response(response()).keep_alive
    assert not parse_response(response(b"Connection: x, Close")).keep_alive
    assert not parse_response(response(line=b"HTTP/1.0 200 OK")).keep_alive
    assert not parse_response(response(b"Connection: keep-alive", line=b"HTTP/1.0 200 OK")).keep_alive


def test_which_response_fields_go_on() -> None:
    head = parse_response(
        response(
            b"Server: x",
            b"Connection: keep-alive, X-Internal,, Content-Type",
            b"Keep-Alive: timeout=5",
            b"X-Internal: secret",
            b"Content-Type: a/b",
            b"Content-Length: 5",
            b"Trailer: x",
            b"Upgrade: h2c",
            b"Proxy-Authenticate: Basic",
            b"X-Request-Id: theirs",
            b"X-Tidegate-Backend: forged",
            b"X-RateLimit-Limit-Requests: theirs",
            b"Set-Cookie: a=b",
            b"OpenAI-Organization: theirs",
            b"CF-Ray: 1",
            b"X-Powered-By: y",
            b"Location: http://10.0.0.1/",
            b"WWW-Authenticate: Basic",
            b"Vary: Origin",
        )
    )
    assert head.fields == b"Content-Type: a/b\r\nVary: Origin\r\n"


@pytest.mark.parametrize("fields", [(), (b"Connection: close",), (b"connection: ,close",)])
def test_nothing_goes_on_where_nothing_is(fields: tuple[bytes, ...]) -> None:
    assert parse_response(response(*fields)).fields == b""
    assert parse_response(response(*fields, b"Date: b")).fields == b"Date: b\r\n"


def test_what_else_is_read_of_a_response() -> None:
    head = parse_response(
        response(b"content-type: text/event-stream ", b"Content-Encoding: GZIP", b"Retry-After: 7")
    )
    assert (head.content_type, head.content_encoding, head.retry_after) == (
        b"text/event-stream",
        b"gzip",
        b"7",
    )


def test_response_head_limit() -> None:
    with pytest.raises(MalformedResponseError):
        parse_response_head(response(b"X: " + b"a" * 65536), 0)
    with pytest.raises(MalformedResponseError):
        parse_response_head(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 65536, 0)


# Chunks


def unchunk(data: bytes) -> tuple[bytes, int]:
    decoder = ChunkedDecoder()
    payload, end = decoder.feed(data)
    assert decoder.done
    return payload, end


@pytest.mark.parametrize(
    ("data", "payload"),
    [
        (b"0\r\n\r\n", b""),
        (b"000\r\n\r\n", b""),
        (b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
        (b"1\r\nh\r\n00000004\r\nello\r\n0\r\n\r\n", b"hello"),
        (b"A\r\n0123456789\r\na\r\n0123456789\r\n0\r\n\r\n", b"0123456789" * 2),
        (b'1;a;b=c; d="e \\" f"\r\nx\r\n0;z\r\n\r\n', b"x"),
        (b"2\r\n\r\n\r\n0\r\nX-Sum: 1\r\nY:\r\n\r\n", b"\r\n"),
    ],
)
def test_chunks(data: bytes, payload: bytes) -> None:
    assert unchunk(data) == (payload, len(data))
    assert unchunk(data + b"GET / HTTP/1.1") == (payload, len(data))


@pytest.mark.parametrize(
    "data",
    [
        *(b"\r\n", b"g\r\n", b"-1\r\n", b"+1\r\n", b"0x1\r\n", b" 1\r\n", b"1 \r\n", b"1\t\r\n", b"1\n"),
        *(
            b"1\rx",
            b"1\r\r\n",
            b"000000001\r\n",
            b"1;\r\n",
            b"1;;\r\n",
            b"1;=a\r\n",
            b"1;a=\r\n",
            b"1 ;a\r\n",
        ),
        *(b"1;a = b\r\n", b"1;a b\r\n", b'1;a="\r\n', b'1;a="b" c\r\n', b"1;a\x00\r\n", b"1;a\nb\r\n"),
        *(b"1;a\rb\r\n", b"1;\xe4\r\n", b"1;" + b"a" * 257 + b"\r\n", b"1\r\nxx", b"1\r\nx\n", b"1\r\nx\rx"),
        *(b"1\r\nx0\r\n", b"0\r\n\n", b"0\r\n\rx", b"0\r\nX\r\n", b"0\r\n X: y\r\n", b"0\r\nX : y\r\n"),
        *(b"0\r\nX: \x00\r\n", b"0\r\nX: y\n", b"0\r\nX: a\r\n b\r\n", b"0\r\nX: " + b"a" * 4096),
        *(b"0\r\nX: " + b"a" * 4096 + b"\r\n", b"0\r\n" + b"X: y\r\n" * 700),
    ],
)
def test_malformed_chunks(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"malformed|does not end|too large"):
        ChunkedDecoder().feed(data)


@pytest.mark.parametrize(
    "name", [b"Host", b"content-length", b"Transfer-Encoding", b"AUTHORIZATION", b"x-api-key", b"Cookie"]
)
def test_trailers_that_would_change_the_head(name: bytes) -> None:
    with pytest.raises(ValueError, match="forbidden trailer"):
        ChunkedDecoder().feed(b"0\r\n" + name + b": x\r\n\r\n")


def test_a_finished_decoder_reads_nothing() -> None:
    decoder = ChunkedDecoder()
    assert decoder.feed(b"0\r\n\r\nrest") == (b"", 5)
    assert decoder.feed(b"rest") == (b"", 0)


def test_chunks_of_our_own() -> None:
    assert (
        unchunk(chunk(b"hello") + chunk(b"") + chunk(b"\x00" * 300) + LAST_CHUNK)[0]
        == b"hello" + b"\x00" * 300
    )
    assert chunk(b"") == b""


HEADS = [
    response(*fields, line=line)
    for line in (b"HTTP/1.1 200 OK", b"HTTP/1.0 200 OK", b"HTTP/1.1 500 No", b"HTTP/1.1 204 None")
    for fields in (
        (b"date: Mon, 23 Nov 2026 17:41:12 GMT", b"content-length: 5", b"content-type: a/b"),
        (b"date: Mon, 23 Nov 2026 17:41:13 GMT", b"content-length: 5", b"content-type: a/b"),
        (b"date: Mon, 23 Nov 2026 17:41:12 GMT", b"content-length: 1234", b"content-type: a/b"),
        (b"date: Mon, 23 Nov 2026 17:41:12 GMT", b"content-length: 0", b"content-type: a/b"),
        (b"content-length: 5", b"connection: close, x", b"x: content-length: 7"),
        (b"Content-Length:5",),
        (b"content-length: 5 ",),
        (b"transfer-encoding: chunked", b"content-type: text/event-stream"),
        (b"content-type: text/event-stream",),
        (b"retry-after: 3", b"content-encoding: gzip", b"content-length: 9"),
    )
    if line != b"HTTP/1.0 200 OK" or b"transfer-encoding: chunked" not in fields
]


@pytest.mark.parametrize("first", HEADS)
def test_a_head_that_is_known_again_reads_as_if_it_were_parsed(first: bytes) -> None:
    repeated = RepeatedResponseHead()
    repeated.remember(b"junk" + first, 4, 4 + len(first), parse_response(first))
    for second in HEADS:
        recalled = repeated.recall(second + b"body", 0)
        if recalled is not None:
            assert recalled == (parse_response(second), len(second))
            assert recalled[0] is not repeated.recall(second, 0)[0]  # type: ignore[index]
        assert repeated.recall(second[:-1], 0) is None


def test_the_usual_head_is_known_again_with_another_length_and_no_other_head_is() -> None:
    usual, longer, later = HEADS[0], HEADS[2], HEADS[1]
    repeated = RepeatedResponseHead()
    assert repeated.recall(usual, 0) is None
    repeated.remember(usual, 0, len(usual), parse_response(usual))
    found = repeated.recall(longer, 0)
    assert found is not None
    assert found[0].content_length == 1234
    assert repeated.recall(later, 0) is None
    assert repeated.recall(usual.replace(b": 5", b": x"), 0) is None
