"""Streams that a real vLLM sent, through reader and meter in any pieces, read by the official client."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from proxy.http1 import ChunkedDecoder, parse_response_head
from proxy.meter import Meter
from proxy.sse import EventReader
from tests.conftest import SHARED
from tests.proxy.http_bytes import pieces_of, random_pieces
from tests.proxy.official_client import OfficialClient, official_client

CAPTURES = SHARED / "vllm" / "captures"
PATHS = ("/v1/chat/completions", "/v1/completions")

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not CAPTURES.is_dir(), reason=f"NOT COMPARED with real streams: {CAPTURES} is absent"),
]


def stream_of(response: Path) -> bytes:
    """The event stream of a recorded reply; empty when it is something else."""
    raw = response.read_bytes()
    parsed = parse_response_head(raw, 0)
    assert isinstance(parsed, tuple)
    head, position = parsed
    if not head.content_type.startswith(b"text/event-stream"):
        return b""
    return ChunkedDecoder().feed(raw, position)[0]


def request_of(response: Path) -> tuple[str, bytes]:
    """Path and body of the request that a recorded reply belongs to."""
    request = response.with_name(response.name.replace("response", "request"))
    if not request.exists():
        return "", b""
    head, _, body = request.read_bytes().partition(b"\r\n\r\n")
    return head.split(b" ")[1].decode(), body


def choices_of(response: Path) -> int:
    """How many choices were asked for."""
    choices: int = json.loads(request_of(response)[1]).get("n", 1)
    return choices


STREAMS = {
    f"{response.parent.name}/{response.name.partition('.')[0]}": response
    for response in sorted(CAPTURES.glob("*/*.response.http"))
    if request_of(response)[0] in PATHS and stream_of(response)
}


def relay(pieces: Sequence[bytes], meter: Meter, include_usage: bool, every_event: bool) -> bytes:
    reader = EventReader()
    return b"".join(
        meter.event(event, include_usage=include_usage, every_event=every_event)
        for piece in pieces
        for event in reader.feed(piece)
    )


@pytest.fixture(scope="module")
def official() -> Iterator[OfficialClient]:
    with official_client() as client:
        yield client


def as_read_by(official: OfficialClient, path: str, stream: bytes) -> list[dict[str, Any]]:
    """The chunks that the client makes of a stream."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n" % len(stream)
    client = official.reads(head + b"connection: close\r\n\r\n" + stream)
    if path == PATHS[0]:
        return [
            chunk.model_dump()
            for chunk in client.chat.completions.create(model="m", messages=[], stream=True)
        ]
    return [chunk.model_dump() for chunk in client.completions.create(model="m", prompt="", stream=True)]


def test_there_are_streams_of_every_kind() -> None:
    kinds = (
        "chat_stream",
        "usage_continuous",
        "n2",
        "tool",
        "completions_stream",
        "keepalive",
        "forced_usage",
    )
    assert [kind for kind in kinds if not any(kind in name for name in STREAMS)] == []


@pytest.mark.parametrize("name", STREAMS)
def test_any_pieces_give_the_same(name: str) -> None:
    stream = stream_of(STREAMS[name])
    choices = choices_of(STREAMS[name])
    rng = Random(name)
    for asked in ((False, False), (True, False), (True, True)):
        meter = Meter(choices)
        whole = relay([stream], meter, *asked)
        cuts = [pieces_of(stream, size) for size in (1, 2, 3, 7, 1000)]
        for pieces in (*cuts, *(random_pieces(rng, stream) for _ in range(5))):
            other = Meter(choices)
            assert relay(pieces, other, *asked) == whole
            assert other.usage == meter.usage
        assert meter.done
        if asked == (True, True):
            assert whole == stream


@pytest.mark.parametrize("name", STREAMS)
def test_the_client_reads_the_same_but_for_usage(name: str, official: OfficialClient) -> None:
    path, _ = request_of(STREAMS[name])
    stream = stream_of(STREAMS[name])
    chunks = as_read_by(official, path, stream)
    usages = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    last = [chunk for chunk in chunks if chunk["choices"]]
    for include_usage in (False, True):
        meter = Meter(choices_of(STREAMS[name]))
        passed = as_read_by(official, path, relay([stream], meter, include_usage, False))
        expected = [
            chunk if include_usage and not chunk["choices"] else {**chunk, "usage": None}
            for chunk in (chunks if include_usage else last)
        ]
        assert [{"usage": None, **chunk} for chunk in passed] == expected
        if usages:
            final = usages[-1]
            cached = (final.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            assert meter.usage == (final["prompt_tokens"], cached, final["completion_tokens"])
            assert meter.reported
        else:
            assert not meter.reported
            assert meter.text_bytes > 0
