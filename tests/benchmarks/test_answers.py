"""The reader of answers: right ones however they are cut, wrong ones by their reason."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import shapes
from benchmarks.answers import AnswerError, EventReader, Expected, ResponseReader

SEED, TOKENS = 11, 4


def stream(usage: bool = False, running: bool = False) -> bytes:
    """A whole streamed answer as a backend writes it."""
    head = shapes.event_head("chatcmpl-1", 1)

    def use(tokens: int) -> bytes:
        return shapes.usage(9, tokens) if running else b""

    parts = [shapes.chunk(head, shapes.ROLE, use(0), shapes.ROLE_END)]
    for position in range(TOKENS):
        shape = shapes.LAST_TOKEN if position == TOKENS - 1 else shapes.TOKEN
        parts.append(shapes.chunk(head, shape % shapes.word(SEED, position), use(position + 1)))
    if usage:
        parts.append(shapes.chunk(head, b"]", shapes.usage(9, TOKENS), shapes.FINGERPRINT))
    return b"HTTP/1.1 200 OK\r\n" + shapes.STREAM_FIELDS + b"".join(parts) + shapes.DONE


def read_stream(expected: Expected, *pieces: bytes) -> tuple[int, int]:
    """Read a stream; returns the tokens counted on the way and the events that had text."""
    response, events, tokens = ResponseReader(), EventReader(expected), 0
    for piece in pieces:
        tokens += events.feed(response.feed(piece))
    events.finish()
    assert response.complete
    return tokens, len(events.words)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """The bytes in pieces."""
    ends = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[start:end] for start, end in pairwise(ends)]


@given(st.lists(st.integers(0, 10_000), max_size=40), st.booleans())
def test_any_cut_of_a_stream_reads_the_same(places: list[int], usage: bool) -> None:
    data = stream(usage=usage, running=usage)
    assert read_stream(Expected(SEED, TOKENS, usage=usage), *cut(data, places)) == (TOKENS, TOKENS)


def test_chunks_may_be_joined_on_the_way() -> None:
    # A proxy may frame anew: the same events, all in one chunk.
    head, _, body = stream().partition(b"\r\n\r\n")
    events = b"".join(re.findall(rb"data: .*?\n\n", body, re.DOTALL))
    data = b"%b\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (head, len(events), events)
    assert read_stream(Expected(SEED, TOKENS), data) == (TOKENS, TOKENS)


WRONG_STREAMS: dict[str, Callable[[bytes], bytes]] = {
    "stream without [DONE]": lambda data: data.replace(b"e\r\ndata: [DONE]\n\n\r\n", b""),
    "wrong text": lambda data: data.replace(shapes.word(SEED, 2), b" x" + shapes.word(SEED, 2)[2:]),
    "usage that was not asked for": lambda data: stream(usage=True),
    "event is not JSON": lambda data: data.replace(b'"object"', b"'object'"),
    "broken chunk": lambda data: data.replace(b"\n\n\r\n", b"\n\n\n\n", 1),
    "bytes after the end": lambda data: data + b"x",
    "answer without length": lambda data: data.replace(b"transfer-encoding: chunked\r\n", b""),
    "event after [DONE]": lambda data: data.replace(b"[DONE]\n\n\r\n", b"[DONE]\n\n\r\n9\r\ndata: 1\n\n\r\n"),
    "not an event": lambda data: data.replace(b"data: {", b"dota: {"),
    "error event": lambda data: data.replace(b'"object"', b'"error" '),
}


@pytest.mark.parametrize("reason", WRONG_STREAMS)
def test_a_wrong_stream_is_known_by_its_reason(reason: str) -> None:
    wrong = WRONG_STREAMS[reason](stream())
    assert wrong != stream()
    with pytest.raises(AnswerError, match=re.escape(reason)):
        read_stream(Expected(SEED, TOKENS), wrong)


def test_usage_that_was_asked_for_must_come_and_be_right() -> None:
    with pytest.raises(AnswerError, match="wrong usage"):
        read_stream(Expected(SEED, TOKENS, usage=True), stream())
    wrong = stream(usage=True).replace(b'"completion_tokens":4', b'"completion_tokens":5')
    with pytest.raises(AnswerError, match="wrong usage"):
        read_stream(Expected(SEED, TOKENS, usage=True), wrong)


def test_somebody_elses_answer_is_wrong() -> None:
    with pytest.raises(AnswerError, match="wrong text"):
        read_stream(Expected(SEED + 1, TOKENS), stream())


def plain(body: bytes, fields: bytes = b"") -> bytes:
    """An answer in one piece."""
    return b"HTTP/1.1 200 OK\r\n%bcontent-length: %d\r\n\r\n%b" % (fields, len(body), body)


@given(st.lists(st.integers(0, 10_000), max_size=10), st.booleans())
def test_any_cut_of_a_plain_answer_reads_the_same(places: list[int], packed: bool) -> None:
    body = shapes.completion("chatcmpl-1", 1, SEED, 9, TOKENS)
    fields = b"Content-Encoding: gzip\r\n" if packed else b""
    response = ResponseReader()
    pieces = [
        response.feed(piece) for piece in cut(plain(gzip.compress(body) if packed else body, fields), places)
    ]
    assert response.complete
    assert response.status == 200
    content = response.content(pieces)
    assert content == body
    Expected(SEED, TOKENS).check_chat(content)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"{}", "not a chat completion"),
        (b"[1]", "not a chat completion"),
        (shapes.completion("1", 1, SEED, 9, TOKENS - 1), "wrong text"),
        (
            shapes.completion("1", 1, SEED, 9, TOKENS).replace(b'ion_tokens":4', b'ion_tokens":3'),
            "wrong usage",
        ),
    ],
)
def test_a_wrong_plain_answer_is_known_by_its_reason(body: bytes, reason: str) -> None:
    with pytest.raises(AnswerError, match=reason):
        Expected(SEED, TOKENS).check_chat(body)


def test_more_bytes_than_announced_are_wrong() -> None:
    with pytest.raises(AnswerError, match="bytes after the end"):
        ResponseReader().feed(plain(b"{}") + b"x")


def test_fields_of_an_answer() -> None:
    response = ResponseReader()
    response.feed(plain(b"", b"Connection: close\r\nX-Request-Id: abc\r\n"))
    assert response.complete
    assert response.closes
    assert response.field("x-request-id") == "abc"
    assert response.field("server") == ""
