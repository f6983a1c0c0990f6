"""Every rule of `http1.py` about requests by an example that keeps it and one that breaks it."""

from __future__ import annotations

import pytest

from proxy.errors import RequestError
from proxy.http1 import (
    METHODS,
    NEVER_FORWARDED,
    HeadLimits,
    PartialHead,
    RepeatedHead,
    RequestGrammar,
    RequestHead,
)

GRAMMAR = RequestGrammar()


def parse(data: bytes, grammar: RequestGrammar = GRAMMAR) -> RequestHead:
    """A head that is complete and takes all of `data`."""
    parsed = grammar.parse(data)
    assert isinstance(parsed, tuple), "incomplete"
    head, end = parsed
    assert end == len(data)
    return head


def request(*fields: bytes, line: bytes = b"POST / HTTP/1.1", host: bytes | None = b"Host: a") -> bytes:
    return b"\r\n".join([line, *([] if host is None else [host]), *fields, b"", b""])


def refused(data: bytes, grammar: RequestGrammar = GRAMMAR) -> str:
    """The code that a head is refused with."""
    with pytest.raises(RequestError) as caught:
        grammar.parse(data)
    return caught.value.code


# The request line


def test_the_request_line() -> None:
    head = parse(request(line=b"GET /a/b?c=d HTTP/1.0"))
    assert (head.method, head.target, head.version) == (b"GET", b"/a/b?c=d", 0)
    assert parse(request()).version == 1


def test_a_head_is_read_where_it_begins_and_ends() -> None:
    data = b"before" + request() + b"behind"
    parsed = GRAMMAR.parse(data, 6)
    assert isinstance(parsed, tuple)
    assert parsed[1] == len(data) - 6


@pytest.mark.parametrize(
    "line",
    [
        *(b"GET  / HTTP/1.1", b"GET\t/ HTTP/1.1", b" GET / HTTP/1.1", b"GET / HTTP/1.1 "),
        b"GET / HTTP/1.1\t",
        *(b"GET /", b"GET / ", b"GET HTTP/1.1", b"/ HTTP/1.1", b"", b"GET / http/1.1", b"GET / HTTP/1,1"),
        *(b"GET / HTTP/11", b"GET / HTTP/1.11", b"GET / HTTP/+1.1", b"GET / HTTQ/1.1"),
        *(b"GET /\x00 HTTP/1.1", b"GET /\x7f HTTP/1.1", b"GET /\xc3\xa4 HTTP/1.1", b"GET /a b HTTP/1.1"),
        *(b"G(T / HTTP/1.1", b"G\x00T / HTTP/1.1", b"G\xe4T / HTTP/1.1", b"G" * 33 + b" / HTTP/1.1"),
        *(b"GET /\rHTTP/1.1", b"GET / HTTP/1.1\rX: y"),
    ],
)
def test_a_malformed_request_line(line: bytes) -> None:
    assert refused(request(line=line)) == "malformed_request"


@pytest.mark.parametrize("version", [b"0.9", b"1.2", b"2.0", b"3.0", b"9.9"])
def test_other_versions(version: bytes) -> None:
    assert refused(request(line=b"GET / HTTP/" + version)) == "unsupported_version"


def test_http_2_with_prior_knowledge() -> None:
    assert refused(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n") == "unsupported_version"


@pytest.mark.parametrize("method", sorted(METHODS))
def test_known_methods(method: bytes) -> None:
    assert parse(request(line=method + b" / HTTP/1.1")).method == method


@pytest.mark.parametrize("line", [b"FOO /", b"get /", b"Get /", b"CONNECT a:80", b"CONNECT /", b"PRI *"])
def test_other_methods(line: bytes) -> None:
    assert refused(request(line=line + b" HTTP/1.1")) == "unsupported_method"


# Targets


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"http://host/p?q", b"/p?q"),
        (b"HTTPS://host:443/", b"/"),
        (b"http://host", b"/"),
        (b"http://host?q=1", b"/?q=1"),
        (b"http://[::1]:8080/x", b"/x"),
        (b"http://user:secret@host/x", b"/x"),
        (b"http://host/x@y", b"/x@y"),
        (b"//host/x", b"//host/x"),
        (b"/%00/../x", b"/%00/../x"),
    ],
)
def test_absolute_targets_become_paths(target: bytes, path: bytes) -> None:
    assert parse(request(line=b"GET " + target + b" HTTP/1.1")).target == path


@pytest.mark.parametrize(
    "target",
    [
        *(b"x", b"*", b"?q", b"host:80", b"http:/x", b"http:///x", b"http://", b"ftp://host/", b"file:///x"),
        *(b"http://a,b/", b"http://a\\b/", b"http://a@b@c/", b"http://u\\p@h/", b"http://[::1/"),
        b"http://h:x/",
        *(b"http://h:123456/", b"http://h@/x"),
    ],
)
def test_other_targets(target: bytes) -> None:
    assert refused(request(line=b"GET " + target + b" HTTP/1.1")) in ("malformed_request", "bad_host")


def test_options_may_ask_for_everything() -> None:
    assert parse(request(line=b"OPTIONS * HTTP/1.1")).target == b"*"


# Field lines


@pytest.mark.parametrize(
    "field",
    [
        *(b"X : a", b" X: a", b"\tX: a", b"X", b": a", b"X\x00: a", b"X\xe4: a", b"X Y: a", b"(X): a"),
        b"X\t: a",
        *(b"X: \x00", b"X: a\x01", b"X: a\x0bb", b"X: a\x0c", b"X: \x7f", b"X: a\rb", b"X: a\r"),
        b"X: a\nY: b",
        *(b"X: a\r\n folded", b"X: a\r\n\tfolded", b"\n", b"\r"),
    ],
)
def test_malformed_fields(field: bytes) -> None:
    assert refused(request(field)) == "malformed_request"


@pytest.mark.parametrize(
    "field", [b"X:", b"X: ", b"X:\t a b \t", b"X: \xff", b"x!#$%&'*+-.^_`|~9: y", b"X: a: b"]
)
def test_well_formed_fields(field: bytes) -> None:
    parse(request(field))


@pytest.mark.parametrize("end", [b"\n\n", b"\n", b"\r\r", b"\n\r\n", b"\r\n\n"])
def test_lines_end_in_cr_lf(end: bytes) -> None:
    assert refused(b"GET / HTTP/1.1\r\nHost: a" + end + b"X: y\r\n\r\n") == "malformed_request"


def test_what_goes_on_to_a_backend() -> None:
    head = parse(
        request(
            b"Accept:  a/b ",
            b"USER-AGENT: x",
            b"Content-Type:application/json",
            b"traceparent: 00",
            b"Cookie: secret",
            b"X-Forwarded-For: 1.2.3.4",
            b"X-Session-Id: s",
            b"X-Own: y",
            b"Authorization: Bearer k",
        )
    )
    assert head.forward == (
        b"accept: a/b \r\nuser-agent: x\r\ncontent-type: application/json\r\ntraceparent: 00\r\n"
    )


def test_further_fields_may_go_on() -> None:
    grammar = RequestGrammar(forward=("X-Own", "cookie"))
    head = parse(request(b"x-own: 1", b"Cookie: a", b"X-Own: 2"), grammar)
    assert head.forward == b"x-own: 1\r\ncookie: a\r\nx-own: 2\r\n"


@pytest.mark.parametrize(
    "name", [*sorted(NEVER_FORWARDED), b"Content-LENGTH", b"content_length", b"transfer_encoding"]
)
def test_what_frames_a_message_cannot_go_on(name: bytes) -> None:
    with pytest.raises(ValueError, match="cannot be forwarded"):
        RequestGrammar(forward=(name.decode(),))


def test_fields_that_connection_names_stay_here() -> None:
    head = parse(request(b"Accept: a", b"Connection: Accept , close", b"User-Agent: x"))
    assert head.forward == b"user-agent: x\r\n"


def test_two_content_types() -> None:
    assert refused(request(b"Content-Type: a/b", b"content-type: a/b")) == "malformed_request"


# Host


@pytest.mark.parametrize(
    "host", [b"a", b"a:", b"a:80", b"127.0.0.1:8080", b"[::1]", b"[::1]:80 ", b"a_b.C", b"\ta"]
)
def test_hosts(host: bytes) -> None:
    parse(request(host=b"Host: " + host))


@pytest.mark.parametrize(
    "host", [b"", b"a b", b"a/b", b"a@b", b"a,b", b"a:x", b"a:123456", b"[::1", b"a\\b", b"\xe4"]
)
def test_bad_hosts(host: bytes) -> None:
    assert refused(request(host=b"Host: " + host)) == "bad_host"


def test_one_host_exactly() -> None:
    assert refused(request(host=None)) == "bad_host"
    assert refused(request(b"host: a")) == "bad_host"
    assert parse(request(line=b"GET / HTTP/1.0", host=None)).version == 0


# Framing


def test_no_body() -> None:
    head = parse(request())
    assert (head.content_length, head.chunked, head.codings) == (0, False, ())


@pytest.mark.parametrize("value", [b"5", b"05", b" 5", b"5 \t", b"\t5", b"000000000000005"])
def test_content_length(value: bytes) -> None:
    head = parse(request(b"Content-Length:" + value))
    assert (head.content_length, head.chunked) == (5, False)


@pytest.mark.parametrize(
    "value",
    [
        *(b"", b"+5", b"-5", b"5,5", b"5, 5", b"5 5", b"0x5", b"5.0", b"5e1", b"five", b"5_0", b"1" * 16),
        *("٥".encode(), b"5;", b'"5"'),
    ],
)
def test_invalid_content_length(value: bytes) -> None:
    assert refused(request(b"Content-Length: " + value)) == "ambiguous_framing"


@pytest.mark.parametrize("second", [b"5", b"6"])
def test_two_content_lengths(second: bytes) -> None:
    assert refused(request(b"Content-Length: 5", b"content-length: " + second)) == "ambiguous_framing"


@pytest.mark.parametrize(
    ("values", "codings"),
    [
        ((b"chunked",), ()),
        ((b"Chunked",), ()),
        ((b"\t chunked \t",), ()),
        ((b"gzip, chunked",), (b"gzip",)),
        ((b"deflate ,\tGZIP,chunked",), (b"deflate", b"gzip")),
        ((b"gzip", b"chunked"), (b"gzip",)),
    ],
)
def test_transfer_encoding(values: tuple[bytes, ...], codings: tuple[bytes, ...]) -> None:
    head = parse(request(*(b"Transfer-Encoding: " + value for value in values)))
    assert (head.content_length, head.chunked, head.codings) == (0, True, codings)


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ((b"",), "ambiguous_framing"),
        ((b"identity",), "ambiguous_framing"),
        ((b"gzip",), "ambiguous_framing"),
        ((b"chunked, gzip",), "ambiguous_framing"),
        ((b"chunked, chunked",), "ambiguous_framing"),
        ((b"chunked", b"chunked"), "ambiguous_framing"),
        ((b"chunked", b"gzip"), "ambiguous_framing"),
        ((b"chunked,",), "ambiguous_framing"),
        ((b",chunked",), "unsupported_transfer_coding"),
        ((b"xchunked",), "unsupported_transfer_coding"),
        ((b"chunked;q=1",), "unsupported_transfer_coding"),
        ((b'"chunked"',), "unsupported_transfer_coding"),
        ((b"br, chunked",), "unsupported_transfer_coding"),
    ],
)
def test_other_transfer_encodings(values: tuple[bytes, ...], code: str) -> None:
    assert refused(request(*(b"Transfer-Encoding: " + value for value in values))) == code


@pytest.mark.parametrize("length", [b"5", b"0"])
def test_a_length_and_a_transfer_encoding(length: bytes) -> None:
    both = [b"Content-Length: " + length, b"Transfer-Encoding: chunked"]
    assert refused(request(*both)) == "ambiguous_framing"
    assert refused(request(*reversed(both))) == "ambiguous_framing"


def test_no_transfer_encoding_in_http_1_0() -> None:
    line = b"POST / HTTP/1.0"
    assert refused(request(b"Transfer-Encoding: chunked", line=line)) == "ambiguous_framing"


@pytest.mark.parametrize(
    "name", [b"Content_Length", b"content__length", b"Transfer_Encoding", b"transfer-_encoding"]
)
def test_names_that_some_servers_read_as_others(name: bytes) -> None:
    head = parse(request(name + b": 5"))
    assert (head.content_length, head.chunked, head.keep_alive) == (0, False, False)


# Connection


@pytest.mark.parametrize(
    ("version", "values", "keep_alive"),
    [
        (b"1.1", (), True),
        (b"1.1", (b"keep-alive",), True),
        (b"1.1", (b"x",), True),
        (b"1.1", (b"close",), False),
        (b"1.1", (b"Close ",), False),
        (b"1.1", (b"keep-alive, close",), False),
        (b"1.1", (b"keep-alive", b"\tclose"), False),
        (b"1.1", (b"closed",), True),
        (b"1.0", (), False),
        (b"1.0", (b"Keep-Alive",), True),
        (b"1.0", (b"keep-alive", b"close"), False),
        (b"1.0", (b"x",), False),
    ],
)
def test_keep_alive(version: bytes, values: tuple[bytes, ...], keep_alive: bool) -> None:
    fields = [b"Connection: " + value for value in values]
    assert parse(request(*fields, line=b"POST / HTTP/" + version)).keep_alive is keep_alive


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
@pytest.mark.parametrize("framing", [b"Content-Length: 1", b"Transfer-Encoding: chunked"])
def test_a_body_that_some_servers_leave_unread_ends_the_connection(method: bytes, framing: bytes) -> None:
    assert not parse(request(framing, line=method + b" / HTTP/1.1")).keep_alive
    assert parse(request(b"Content-Length: 0", line=method + b" / HTTP/1.1")).keep_alive


# What else is read


def test_credentials() -> None:
    assert parse(request()).credential is None
    assert parse(request(b"Authorization: Bearer k ")).credential == b"Bearer k"
    assert parse(request(b"X-Api-Key: k")).credential == b"k"
    assert parse(request(b"x-api-key: a", b"authorization: b")).credential == b"b"
    assert parse(request(b"Authorization:")).credential == b""


@pytest.mark.parametrize("name", [b"Authorization", b"X-Api-Key"])
def test_two_credentials(name: bytes) -> None:
    assert refused(request(name + b": a", name.lower() + b": a")) == "malformed_request"


def test_ids_and_encoding() -> None:
    head = parse(
        request(b"X-Request-Id: r ", b"X-Session-Id:\ts", b"Content-Encoding: GZIP ", b"content-encoding: br")
    )
    assert (head.request_id, head.session, head.content_encoding) == (b"r", b"s", b"gzip,br")


def test_expect() -> None:
    assert parse(request(b"Expect: 100-Continue ")).expects_continue
    assert not parse(request(b"Expect: 100-continue", line=b"POST / HTTP/1.0")).expects_continue
    assert refused(request(b"Expect: 200-ok")) == "expectation_failed"
    assert refused(request(b"Expect: 100-continue, x")) == "expectation_failed"


# Limits


def test_limits_of_a_head() -> None:
    grammar = RequestGrammar(HeadLimits(head_bytes=1024, target_bytes=64, fields=5))
    fixed = len(request(b"X: "))
    parse(request(b"X: " + b"a" * (1024 - fixed)), grammar)
    assert refused(request(b"X: " + b"a" * (1025 - fixed)), grammar) == "header_too_large"
    parse(request(*[b"X:"] * 4), grammar)
    assert refused(request(*[b"X:"] * 5), grammar) == "header_too_large"
    parse(request(line=b"GET /" + b"a" * 63 + b" HTTP/1.1"), grammar)
    assert refused(request(line=b"GET /" + b"a" * 64 + b" HTTP/1.1"), grammar) == "target_too_long"


def test_limits_hold_before_a_head_is_complete() -> None:
    grammar = RequestGrammar(HeadLimits(head_bytes=1024, target_bytes=64, fields=5))
    begun = request()[:-2]
    assert isinstance(grammar.parse(begun + b"X: " + b"a" * (1021 - len(begun))), PartialHead)
    assert refused(begun + b"X: " + b"a" * (1022 - len(begun)), grammar) == "header_too_large"
    assert isinstance(grammar.parse(begun + b"X:\r\n" * 4), PartialHead)
    assert refused(begun + b"X:\r\n" * 5, grammar) == "header_too_large"
    assert isinstance(grammar.parse(b"GET /" + b"a" * 63), PartialHead)
    assert refused(b"GET /" + b"a" * 200, grammar) == "target_too_long"


# Heads that are not complete


@pytest.mark.parametrize("size", range(len(request(b"Accept: x", b"Content-Length: 5"))))
def test_every_beginning_of_a_head_waits(size: int) -> None:
    data = request(b"Accept: x", b"Content-Length: 5")
    partial = GRAMMAR.parse(data[:size])
    assert isinstance(partial, PartialHead)
    assert partial.add(data[size:] + b"body")
    assert partial.whole() == data + b"body"


@pytest.mark.parametrize(
    "begun",
    [
        *(b" ", b"\n", b"G\x00", b"G" * 33, b"GET\t", b"GET  ", b"GET /\x00", b"GET / G"),
        b"GET / HTTP/1.1 ",
        *(b"GET / HTTP/1.1\n", b"GET / HTTP/1.1\r\n ", b"GET / HTTP/1.1\r\n:", b"GET / HTTP/1.1\r\nA "),
        *(b"GET / HTTP/1.1\r\nA: \x00", b"GET / HTTP/1.1\r\nA: b\n", b"GET / HTTP/1.1\r\nA: b\rc"),
        *(b"GET / HTTP/1.1\r\nA: b\r\n ", b"GET / HTTP/1.1\r\n\rX"),
    ],
)
def test_what_cannot_become_a_head_is_refused_at_once(begun: bytes) -> None:
    assert refused(begun) == "malformed_request"
    partial = GRAMMAR.parse(begun[:-1])
    assert isinstance(partial, PartialHead)
    with pytest.raises(RequestError):
        partial.add(begun[-1:])


@pytest.mark.parametrize("begun", [b"GET / HTTP/2", b"GET / HTTP/1.2", b"PRI * HTTP/2.0\r\n"])
def test_another_version_is_told_at_once(begun: bytes) -> None:
    assert refused(begun) == "unsupported_version"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        (b"Content-Length: 1\r\nContent-Length: 2\r\n", "ambiguous_framing"),
        (b"Content-Length: x\r\n", "ambiguous_framing"),
        (b"Content-Length: 1\r\nTransfer-Encoding: gzip\r\n", "ambiguous_framing"),
        (b"Host: a\r\nHost: a\r\n", "bad_host"),
        (b"Expect: x\r\nB", "expectation_failed"),
    ],
)
def test_the_fields_that_there_are_are_checked_at_once(fields: bytes, code: str) -> None:
    assert refused(b"POST / HTTP/1.1\r\n" + fields) == code


def test_what_may_yet_become_right_is_not_refused() -> None:
    for fields in (b"A: b\r\n", b"Transfer-Encoding: gzip\r\n", b"Transfer-Encoding: gzip\r\nTransfer-"):
        assert isinstance(GRAMMAR.parse(b"POST / HTTP/1.1\r\n" + fields), PartialHead)


# The same head again


def remembered(data: bytes) -> RepeatedHead:
    repeated = RepeatedHead()
    repeated.remember(data, 0, len(data), parse(data))
    return repeated


def test_the_same_head_is_known_again() -> None:
    data = request(b"Content-Length: 5", b"Accept: x")
    repeated = remembered(data)
    recalled = repeated.recall(b"xx" + data.replace(b": 5", b": 123") + b"body", 2)
    assert recalled is not None
    head, end = recalled
    assert (head.content_length, head.method, head.forward) == (123, b"POST", b"accept: x\r\n")
    assert end == 2 + len(data) + 2


@pytest.mark.parametrize(
    "other",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: b\r\nContent-Length: 5\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +5\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: \r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nX: y\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"5" * 16 + b"\r\n\r\n",
    ],
)
def test_another_head_is_not(other: bytes) -> None:
    assert remembered(request(b"Content-Length: 5")).recall(other, 0) is None


def test_heads_that_are_not_remembered() -> None:
    for data in (
        request(b"X: " + b"a" * RepeatedHead.MAX_BYTES),
        request(b"CONTENT-LENGTH: 5"),
        request(b"Transfer-Encoding: chunked"),
        # Whether its connection is kept depends on the length.
        request(b"Content-Length: 0", line=b"GET / HTTP/1.1"),
    ):
        assert remembered(data).recall(data, 0) is None


def test_the_next_head_is_remembered_instead() -> None:
    first, second = request(b"Content-Length: 5"), request(b"Content-Length: 5", b"X: y")
    repeated = remembered(first)
    repeated.remember(second, 0, len(second), parse(second))
    assert repeated.recall(first, 0) is None
    assert repeated.recall(second, 0) is not None


def test_a_head_without_length_is_known_by_all_its_bytes() -> None:
    data = request(b"CONTENT-LENGTH: 0")
    repeated = remembered(data)
    assert repeated.recall(data, 0) is not None
    assert repeated.recall(data.replace(b"0", b"9"), 0) is None
