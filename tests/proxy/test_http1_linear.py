"""Reading takes time linear in the bytes, whatever they are and however they come.

By structure: no expression can go back over what a repeat has taken (all repeats are possessive), so one match
looks at a byte a number of times that the expression's size bounds; and expressions that search can begin at a
line feed only, which they never pass. By counting: bytes that come one by one are not looked at from the start
each time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from proxy import http1, meter
from proxy.http1 import ChunkedDecoder, HeadLimits, PartialHead, RequestGrammar, parse_response_head

sre: Any = re._parser  # type: ignore[attr-defined]  # the only way to see an expression's structure
constants: Any = re._constants  # type: ignore[attr-defined]

PATTERNS = {
    f"{module.__name__}.{name}.{number}": pattern
    for module in (http1, meter)
    for name, value in vars(module).items()
    for number, pattern in enumerate(value if isinstance(value, tuple) else [value])
    if isinstance(pattern, re.Pattern)
}
SEARCHES = {
    "requests": RequestGrammar()._find.__self__,  # type: ignore[attr-defined]
    "responses": http1._find_response_fields.__self__,  # type: ignore[attr-defined]
    "passed on": http1._find_passed_on.__self__,
    "length": http1._LENGTH_DIGITS,
}


def nodes(parsed: Any) -> Iterator[tuple[Any, Any]]:
    """All operations of a parsed expression, outer ones first."""
    if isinstance(parsed, sre.SubPattern):
        for operation, argument in parsed:
            yield operation, argument
            yield from nodes(argument)
    elif isinstance(parsed, tuple | list):
        for part in parsed:
            yield from nodes(part)


def test_the_expressions_are_found() -> None:
    assert len(PATTERNS) >= 20
    assert len({pattern.pattern for pattern in SEARCHES.values()}) == 4


@pytest.mark.parametrize("name", [*PATTERNS, *SEARCHES])
def test_no_repeat_gives_back(name: str) -> None:
    pattern = PATTERNS.get(name) or SEARCHES[name]
    for operation, argument in nodes(sre.parse(pattern.pattern, pattern.flags)):
        if operation in (constants.MAX_REPEAT, constants.MIN_REPEAT):
            assert argument[0] == argument[1], f"{name} repeats {argument[2]} with backtracking"


@pytest.mark.parametrize("name", SEARCHES)
def test_searches_begin_at_line_feeds_and_never_pass_one(name: str) -> None:
    pattern = SEARCHES[name]
    begin, *rest = sre.parse(pattern.pattern, pattern.flags)
    assert begin in ((constants.LITERAL, 10), (constants.LITERAL, 13))
    for operation, argument in nodes(rest):
        if operation is constants.LITERAL:
            assert argument != 10 or name == "length"
        assert operation is not constants.ANY
        if operation is constants.IN and argument[0] == (constants.NEGATE, None):
            assert (
                constants.LITERAL,
                13,
            ) in argument  # a line feed stands behind a CR only, in what was matched


class Work:
    """Bytes that expressions have looked at."""

    def __init__(self) -> None:
        self.bytes = 0


class Counting:
    """An expression that counts."""

    def __init__(self, pattern: re.Pattern[bytes], work: Work) -> None:
        self.pattern = pattern
        self.work = work

    def match(self, data: bytes, position: int = 0) -> re.Match[bytes] | None:
        match = self.pattern.match(data, position)
        self.work.bytes += (match.end() if match else len(data)) - position + 1
        return match

    def fullmatch(self, data: bytes) -> re.Match[bytes] | None:
        self.work.bytes += len(data) + 1
        return self.pattern.fullmatch(data)

    def search(self, data: bytes) -> re.Match[bytes] | None:
        self.work.bytes += len(data) + 1
        return self.pattern.search(data)

    def sub(self, replacement: bytes, data: bytes) -> bytes:
        self.work.bytes += len(data) + 1
        return self.pattern.sub(replacement, data)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    """What the expressions of `http1` look at from now on."""
    work = Work()
    for name, value in list(vars(http1).items()):
        if isinstance(value, re.Pattern):
            monkeypatch.setattr(http1, name, Counting(value, work))
        elif isinstance(value, http1._Grammar):
            counting = {
                field: Counting(getattr(value, field), work) for field in ("first_line", "first_line_begun")
            }
            monkeypatch.setattr(http1, name, value._replace(**counting))  # type: ignore[arg-type]
    return work


HOSTILE = {
    "target": (b"GET /", b"a", b" HTTP/1.1\r\nHost: a\r\n\r\n"),
    "name": (b"GET / HTTP/1.1\r\nHost: a\r\n", b"a", b":\r\n\r\n"),
    "value": (b"GET / HTTP/1.1\r\nHost: a\r\nA: ", b" ", b"\r\n\r\n"),
    "fields": (b"GET / HTTP/1.1\r\nHost: a\r\n", b"a:\r\n", b"\r\n"),
    "names like ours": (b"GET / HTTP/1.1\r\nHost: a\r\n", b"content-_:\r\n", b"\r\n"),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("size", [8192, 65536])
def test_a_head_that_comes_byte_by_byte(kind: str, size: int, work: Work) -> None:
    grammar = RequestGrammar(HeadLimits(2 * size, 2 * size, size))
    begin, repeated, end = HOSTILE[kind]
    data = begin + repeated * (size // len(repeated)) + end
    read(grammar, data, 1)
    assert work.bytes < 50 * len(data)


@pytest.mark.parametrize("size", [8192, 65536])
def test_a_response_that_comes_byte_by_byte(size: int, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1, "_RESPONSE_LIMITS", HeadLimits(2 * size, 2 * size, size))
    data = b"HTTP/1.1 200 " + b"a" * size + b"\r\n\r\n"
    partial = parse_response_head(data[:1], 0)
    assert isinstance(partial, PartialHead)
    assert [partial.add(data[at : at + 1]) for at in range(1, len(data))].index(True) == len(data) - 2
    assert isinstance(parse_response_head(partial.whole(), 0), tuple)
    assert work.bytes < 50 * len(data)


@pytest.mark.parametrize(
    "chunks", [b"1;" + b"a" * 250 + b"\r\nx\r\n", b"1\r\nx\r\n", b"ff\r\n" + b"x" * 255 + b"\r\n"]
)
def test_chunks_that_come_byte_by_byte(chunks: bytes, work: Work) -> None:
    # A line that has not ended is looked at again, but it is short.
    decoder = ChunkedDecoder()
    data = chunks * (65536 // len(chunks)) + b"0\r\n" + b"a: b\r\n" * 600 + b"\r\n"
    for at in range(len(data)):
        assert decoder.feed(data[at : at + 1])[1] == 1
    assert decoder.done
    assert work.bytes < 600 * len(data)


def read(grammar: RequestGrammar, data: bytes, size: int) -> None:
    """Read one head in pieces of `size`."""
    partial = grammar.parse(data[:size])
    assert isinstance(partial, PartialHead)
    for at in range(size, len(data), size):
        complete = partial.add(data[at : at + size])
        assert complete == (at + size >= len(data))
    assert isinstance(grammar.parse(partial.whole()), tuple)
