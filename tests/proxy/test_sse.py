"""Event streams as the HTML standard reads them (section 9.2.6), in any pieces, with every byte accounted for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy import sse
from proxy.sse import Event, EventReader
from tests.proxy.http_bytes import pieces_of, random_pieces
from tests.proxy.sse_events import BOM, canonical, is_bom


def read(*pieces: bytes) -> list[Event]:
    reader = EventReader()
    return [event for piece in pieces for event in reader.feed(piece)]


def dispatched(*pieces: bytes) -> list[tuple[bytes, bytes]]:
    """(name, data) of the events that a browser would see."""
    return [(event.name, event.data) for event in read(*pieces) if event.data is not None]


# The rules


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: a\n\n", [b"a"]),
        (b"data:a\n\n", [b"a"]),
        (b"data:  a \n\n", [b" a "]),
        (b"data:\ta\n\n", [b"\ta"]),
        (b"data\n\n", [b""]),
        (b"data:\n\n", [b""]),
        (b"data: \n\n", [b""]),
        (b"data: a\ndata: b\n\n", [b"a\nb"]),
        (b"data\ndata\n\n", [b"\n"]),
        (b"data: a: b:c\n\n", [b"a: b:c"]),
        (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data: a\n\n\n\n\ndata: b\n\n", [b"a", b"b"]),
    ],
)
def test_data(stream: bytes, events: list[bytes]) -> None:
    assert [data for _, data in dispatched(stream)] == events


@pytest.mark.parametrize(
    "stream", [b": comment\n\n", b"\n\n", b"id: 1\n\n", b"retry: 1\n\n", b"event: x\n\n", b"x\n\n"]
)
def test_blocks_that_dispatch_nothing(stream: bytes) -> None:
    assert dispatched(stream) == []
    assert b"".join(event.raw for event in read(stream)) == stream


@pytest.mark.parametrize(
    "stream",
    [b" data: a\n\n", b"Data: a\n\n", b"data : a\n\n", b"xdata: a\n\n", b":data: a\n\n", b"\x00data: a\n\n"],
)
def test_other_fields_are_ignored(stream: bytes) -> None:
    assert dispatched(stream) == []


def test_names() -> None:
    assert dispatched(b"event: x\ndata: a\n\ndata: b\n\n") == [(b"x", b"a"), (b"", b"b")]
    assert dispatched(b"event: x\nevent:y\ndata: a\n\n") == [(b"y", b"a")]
    assert dispatched(b"event: x\n\ndata: a\n\n") == [(b"", b"a")]
    assert dispatched(b"data: a\nevent\n\n") == [(b"", b"a")]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_lines_end_in_lf_cr_lf_or_cr(end: bytes) -> None:
    assert dispatched(b"data: a" + end + b"data: b" + end + end + b"data: c" + end * 2) == [
        (b"", b"a\nb"),
        (b"", b"c"),
    ]


def test_lines_end_in_nothing_else() -> None:
    for code in (b"\x0b", b"\x0c", b"\x1c", b"\x85", b"\xe2\x80\xa8", b"\xc2\x85", b"\x00"):
        assert dispatched(b"data: a" + code + b"b\n\n") == [(b"", b"a" + code + b"b")]


def test_mixed_line_ends() -> None:
    assert dispatched(b"data: a\rdata: b\n\n") == [(b"", b"a\nb")]
    assert dispatched(b"data: a\r\rdata: b\n\n") == [(b"", b"a"), (b"", b"b")]
    assert dispatched(b"data: a\r\n\ndata: b\n\n") == [(b"", b"a"), (b"", b"b")]
    assert dispatched(b"data: a\r\rdata: b\n\r\ndata: c\r\n\r") == [(b"", b"a"), (b"", b"b"), (b"", b"c")]


def test_an_event_is_there_as_soon_as_its_last_line_has_ended() -> None:
    assert dispatched(b"data: a\r\r") == [(b"", b"a")]
    assert dispatched(b"data: a\r\n\r") == [(b"", b"a")]
    reader = EventReader()
    assert [event.data for event in reader.feed(b"data: a\n\r")] == [b"a"]
    assert reader.feed(b"\n") == []
    assert [event.data for event in reader.feed(b"data: b\n\n")] == [b"b"]


def test_an_unfinished_event_is_not_dispatched() -> None:
    for stream in (b"data: a", b"data: a\n", b"data: a\r\n", b"\n\ndata: a\ndata: b\n"):
        reader = EventReader()
        assert [event for event in reader.feed(stream) if event.data is not None] == []
        assert reader.unfinished
    reader = EventReader()
    reader.feed(b"data: a\n\n")
    assert not reader.unfinished


def test_one_byte_order_mark_at_the_beginning_is_dropped() -> None:
    assert dispatched(BOM + b"data: a\n\n") == [(b"", b"a")]
    assert dispatched(BOM + BOM + b"data: a\n\n") == []
    assert dispatched(b"data: a\n\n" + BOM + b"data: b\n\n") == [(b"", b"a")]
    assert dispatched(b"data: " + BOM + b"\n\n") == [(b"", BOM)]
    for pieces in (
        [BOM[:1], BOM[1:2], BOM[2:], b"data: a\n\n"],
        [BOM[:2], BOM[2:] + b"data: a\n\n"],
        [b"", BOM],
    ):
        assert read(*pieces) == read(b"".join(pieces))
    assert dispatched(BOM[:2], b"data: a\n\n") == []


# Any pieces

LINES = st.sampled_from(
    [
        *(
            b"data: a",
            b"data:b",
            b"data",
            b'data: {"x":1}',
            b"event: x",
            b"event:",
            b": c",
            b"",
            b"",
            b"",
            b"id: 1",
        ),
        *(
            b"retry: 5",
            b"dat",
            b" data: x",
            b"data: \xe2\x82\xac",
            BOM + b"data: z",
            BOM,
            b"data: " + b"y" * 50,
            b":",
            b"x",
        ),
    ]
)
ENDS = st.sampled_from([b"\n", b"\n", b"\n", b"\r\n", b"\r"])
STREAMS = st.lists(st.tuples(LINES, ENDS).map(b"".join), max_size=14).map(b"".join)
USUAL = st.lists(
    st.sampled_from(
        [b"data: a\n\n", b"data: {}\n\n", b"data: [DONE]\n\n", b": ping\n\n", b"data: a\ndata: b\n\n"]
    )
)


def merged(events: Sequence[Event]) -> list[tuple[bytes, bytes | None]]:
    return [(event.name, event.data) for event in events]


@settings(max_examples=300)
@given(st.one_of(STREAMS, USUAL.map(b"".join)), st.integers(0, 2**32))
@example(b"data: a\r\n\r\n", 0)
@example(BOM + b"data: a\n\n", 0)
def test_any_cut_gives_the_same_events(stream: bytes, seed: int) -> None:
    whole = merged(read(stream))
    for pieces in (*(pieces_of(stream, size) for size in (1, 2, 3, 7)), random_pieces(Random(seed), stream)):
        assert merged(read(*pieces)) == whole


@settings(max_examples=300)
@given(st.one_of(STREAMS, USUAL.map(b"".join), st.binary(max_size=40)), st.integers(0, 2**32))
@example(b"data: a\r\n\n", 0)
@example(b"data: a\r\n\r\n\n", 0)
def test_every_byte_is_in_one_event_or_held(stream: bytes, seed: int) -> None:
    for pieces in ([stream], pieces_of(stream, 1), random_pieces(Random(seed), stream)):
        reader = EventReader()
        passed = b"".join(event.raw for piece in pieces for event in reader.feed(piece))
        held = b"".join(reader._block) + bytes(reader._pending)
        assert reader.unfinished == bool(held)
        assert canonical(passed + held) == canonical(stream if is_bom(stream) else stream.removeprefix(BOM))
        assert dispatched(passed) == dispatched(stream)


@given(USUAL, st.integers(0, 2**32))
def test_lf_streams_go_on_byte_for_byte(events: list[bytes], seed: int) -> None:
    stream = b"".join(events)
    for pieces in ([stream], pieces_of(stream, 1), random_pieces(Random(seed), stream)):
        assert b"".join(event.raw for event in read(*pieces)) == stream


# Events that are too long to keep


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 100)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("size", [1, 7, 90, 1000])
@pytest.mark.parametrize(
    "long", [b"data: " + b"a" * 300, b"data: b\n" * 40 + b"data", b"x" * 99 + b"\n" + b"y" * 99]
)
@pytest.mark.parametrize("rest", [b"", b"\ndata: [DONE]", b"\r\ndata: {}\r\nevent: x", b"\n: c"])
def test_what_is_too_long_is_passed_on_unread(size: int, long: bytes, rest: bytes) -> None:
    stream = b"data: before\n\n" + long + rest + b"\n\n" + b"data: behind\n\n"
    reader = EventReader()
    events, held = [], 0
    for piece in pieces_of(stream, size):
        events += reader.feed(piece)
        held = max(held, sum(map(len, reader._block)) + len(reader._pending))
    assert canonical(b"".join(event.raw for event in events)) == canonical(stream)
    data = [(event.name, event.data) for event in events if event.data is not None]
    if size < 100:  # what comes whole in one read is read
        assert data == [(b"", b"before"), (b"", b"behind")]
        assert held <= 100
    assert data[0] == (b"", b"before")
    assert data[-1] == (b"", b"behind")


@pytest.mark.usefixtures("short")
def test_the_rest_of_a_long_event_is_not_finished() -> None:
    reader = EventReader()
    assert len(reader.feed(b"data: " + b"a" * 100)) == 1
    assert reader.unfinished
    assert [event.raw for event in reader.feed(b"\n")] == []
    assert [event.raw for event in reader.feed(b"\n")] == [b"\n\n"]
    assert not reader.unfinished


# Against recorded streams


@pytest.mark.shared
def test_recorded_streams(shared: Path) -> None:
    check = shared / "conformance" / "sse_check.py"
    done = subprocess.run(
        [sys.executable, str(check), "tests.proxy.sse_events:Reader"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "208" in done.stdout
