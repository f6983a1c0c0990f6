"""However a stream is cut, the same is read from it; and whatever its bytes, reading ends in a known way."""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.errors import RequestError
from proxy.http1 import LAST_CHUNK, ChunkedDecoder, RepeatedHead, chunk
from tests.proxy.http_bytes import (
    GRAMMAR,
    REFUSED,
    WAITS,
    Reader,
    a_chunked_body,
    a_request,
    a_response,
    outcome,
    pieces_of,
    random_pieces,
    read_request,
    read_response,
    unchunked,
)

CASES = 20
"""Messages per seed."""


@pytest.mark.parametrize(("make", "read"), [(a_request, read_request), (a_response, read_response)])
@settings(max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_any_cut_gives_the_same(make: Callable[[Random], bytes], read: Reader, seed: int) -> None:
    rng = Random(seed)
    for _ in range(CASES):
        data = make(rng)
        if rng.random() < 0.3:
            data = data[: rng.randrange(len(data) + 1)]
        whole = outcome(read, [data])
        cuts = [pieces_of(data, size) for size in (1, 2, 3, 7)] + [random_pieces(rng, data)]
        for pieces in cuts:
            cut = outcome(read, pieces)
            # What is wrong with a set of fields is said when they are complete, or at once when all that there is
            # of them comes in one piece.
            assert cut == whole or ((whole, cut) == (REFUSED, WAITS) and b"\r\n\r\n" not in data), data


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_any_cut_of_chunks_gives_the_same(seed: int) -> None:
    rng = Random(seed)
    for _ in range(CASES):
        payload = rng.randbytes(rng.choice((0, 1, 10, 300)))
        data = a_chunked_body(rng, payload) + b"GET / HTTP/1.1\r\n"
        whole = unchunked([data])
        for size in (1, 2, 3, 7):
            assert unchunked(pieces_of(data, size)) == whole, data
        assert unchunked(random_pieces(rng, data)) == whole, data


LIKE_CHUNKS = st.lists(
    st.sampled_from([b"\r\n", b"0", b"a", b"10\r\n", b"1e\r\n", b"x" * 16, b"x" * 30]),
    min_size=3,
    max_size=14,
).map(b"".join)


@settings(max_examples=400)
@given(st.lists(LIKE_CHUNKS, max_size=3), LIKE_CHUNKS, st.lists(st.integers(0, 200), max_size=3))
@example([b"x" * 16], b"10\r\n" + b"x" * 18, [])
@example([], b"10\r\n" + b"\r\n" * 9, [2])
def test_a_read_that_looks_like_one_whole_chunk_need_not_be_one(
    payloads: list[bytes], tail: bytes, cuts: list[int]
) -> None:
    data = b"".join(map(chunk, payloads)) + tail
    ends = sorted(min(cut, len(data)) for cut in cuts)
    pieces = [data[start:end] for start, end in zip([0, *ends], [*ends, len(data)], strict=True)]
    assert unchunked(pieces) == unchunked(pieces_of(data, 1))


@pytest.mark.parametrize("size", [0x10, 0x1E, 0xFF, 0x100, 0xFFF])
def test_one_byte_too_many_or_too_few_is_no_chunk(size: int) -> None:
    whole = chunk(b"x" * size)
    decoder = ChunkedDecoder()
    assert decoder.feed(whole) == (b"x" * size, len(whole))
    assert decoder.feed(chunk(whole)) == (whole, len(chunk(whole)))  # a chunk inside of one
    outer = chunk(b"a" * 30 + whole + b"b" * 30)
    at = outer.index(whole)
    pieces = (outer[:at], whole, outer[at + len(whole) :])  # and a read of its own
    assert b"".join(decoder.feed(piece)[0] for piece in pieces) == b"a" * 30 + whole + b"b" * 30
    with pytest.raises(ValueError, match="chunk data"):
        decoder.feed(whole[:-2] + b"xy")


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=8), st.integers(0, 2**32))
def test_our_chunks_are_read_back(payloads: list[bytes], seed: int) -> None:
    data = b"".join(map(chunk, payloads)) + LAST_CHUNK
    assert unchunked(random_pieces(Random(seed), data)) == (b"".join(payloads), len(data))


# Bytes of every kind, with those in front that decide.
ALPHABET = b"\r\n\t :;,/0159afGEHPT.\x00\x7f\x80\xff"
ANY_BYTES = st.one_of(
    st.binary(max_size=60),
    st.lists(st.sampled_from([bytes([code]) for code in ALPHABET]), max_size=40).map(b"".join),
)
BEGINNINGS = st.sampled_from(
    [
        b"",
        b"GET / HTTP/1.1\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length:",
        b"HTTP/1.1 200 OK\r\n",
        b"5\r\nhello",
    ]
)


@settings(max_examples=300)
@given(BEGINNINGS, ANY_BYTES)
@example(b"", b"")
def test_reading_ends_in_a_known_way(beginning: bytes, rest: bytes) -> None:
    data = beginning + rest
    for read in (read_request, read_response):
        for pieces in ([data], pieces_of(data, 1)):
            outcome(read, pieces)  # raises nothing that it does not know
    unchunked([data])


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_a_head_that_is_known_again_is_the_head_that_would_be_read(seed: int) -> None:
    rng = Random(seed)
    for _ in range(CASES):
        data = a_request(rng, oddness=0)
        try:
            parsed = GRAMMAR.parse(data)
        except RequestError:
            continue
        assert isinstance(parsed, tuple)
        repeated = RepeatedHead()
        repeated.remember(data, 0, parsed[1], parsed[0])
        other = b"xy" + LENGTH.sub(b"%d" % rng.randrange(10**6), data, count=1)
        recalled = repeated.recall(other, 2)
        if recalled is not None:
            assert recalled == GRAMMAR.parse(other, 2)
        assert repeated.recall(other[: rng.randrange(2, parsed[1])], 2) is None


LENGTH = re.compile(rb"(?<=-[Ll]ength: )[0-9]+")
