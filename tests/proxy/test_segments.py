from __future__ import annotations

from pathlib import Path

import pytest

from proxy.segments import MAGIC, Damage, Disk, JournalError, Segment, frame, list_segments, read_segment

PAYLOADS = [b'["first"]', b"[2]", b'["third",{"x":"\xc3\xb1"}]', b"[]", b'["fifth"]']
FRAMES = [frame(payload) for payload in PAYLOADS]
WHOLE = b"".join(FRAMES)
STARTS = [sum(map(len, FRAMES[:index])) for index in range(len(FRAMES))]
ALLOCATED = b"\0" * 300


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "00000001.journal"


def read(path: Path, data: bytes) -> tuple[list[bytes], list[Damage]]:
    path.write_bytes(data)
    found = list(read_segment(path))
    return [item for item in found if isinstance(item, bytes)], [
        item for item in found if isinstance(item, Damage)
    ]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    segment = Segment(tmp_path / "00000007.journal", 4096, Disk())
    for data in FRAMES:
        segment.write(data)
    segment.sync()
    segment.close()
    assert segment.path.stat().st_size == 4096, "its space is there from the beginning"
    assert segment.path.stat().st_mode & 0o077 == 0, "it is nobody else's to read"
    assert list(read_segment(segment.path)) == PAYLOADS


@pytest.mark.parametrize("tail", [b"", ALLOCATED])
def test_cut_at_every_byte_of_the_last_three(path: Path, tail: bytes) -> None:
    for cut in range(STARTS[2], len(WHOLE)):
        payloads, damages = read(path, WHOLE[:cut] + tail)
        whole = sum(start + len(data) <= cut for start, data in zip(STARTS, FRAMES, strict=True))
        assert payloads == PAYLOADS[:whole]
        torn = [damage.offset for damage in damages]
        assert torn == ([STARTS[whole]] if cut > STARTS[whole] else [])
        assert all(damage.torn for damage in damages)


def test_a_flipped_bit_in_each_byte_of_the_last_three(path: Path) -> None:
    for position in range(STARTS[2], len(WHOLE)):
        data = bytearray(WHOLE)
        data[position] ^= 1 << (position % 8)
        hit = max(index for index, start in enumerate(STARTS) if start <= position)
        payloads, damages = read(path, bytes(data) + ALLOCATED)
        assert payloads == PAYLOADS[:hit] + PAYLOADS[hit + 1 :], "the others are read"
        assert [(damage.offset, damage.torn) for damage in damages] == [(STARTS[hit], hit == 4)]
        assert str(path) in str(damages[0])


def test_garbage_that_looks_like_a_frame(path: Path) -> None:
    junk = MAGIC + b"\x05\x00\x00\x00abcd12345" + MAGIC + b"\xff\xff\xff\xff1234"
    payloads, damages = read(path, FRAMES[0] + junk + FRAMES[1])
    assert payloads == PAYLOADS[:2]
    assert [(damage.offset, damage.length, damage.torn) for damage in damages] == [
        (STARTS[1], len(junk), False)
    ]


@pytest.mark.parametrize("data", [b"", ALLOCATED])
def test_an_empty_segment(path: Path, data: bytes) -> None:
    assert read(path, data) == ([], [])


def test_a_newer_format_is_refused_not_called_damage(path: Path) -> None:
    path.write_bytes(MAGIC[:3] + b"2" + FRAMES[0][4:])
    with pytest.raises(JournalError, match="newer tidegate"):
        list(read_segment(path))


def test_segments_are_listed_in_order(tmp_path: Path) -> None:
    for number in (10, 9, 100_000_000, 99_999_999):
        (tmp_path / f"{number:08d}.journal").touch()
    (tmp_path / "lock").touch()
    (tmp_path / "reserve").touch()
    assert [path.name for path in list_segments(tmp_path)] == [
        "00000009.journal",
        "00000010.journal",
        "99999999.journal",
        "100000000.journal",
        "reserve",
    ]


def test_a_segment_that_cannot_be_allocated_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"File too large|No space left"):
        Disk().create(tmp_path / "00000001.journal", 2**62)
    assert list(tmp_path.iterdir()) == []
