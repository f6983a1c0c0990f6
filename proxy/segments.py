"""The journal's files: what stands in them, and how they are written and read.

A segment is a file of frames. A frame is a magic number, the length of its payload and the CRC-32 of that
length and the payload; the payload is JSON, so the first byte of the magic, which UTF-8 does not have, occurs
only where a frame begins. A payload holds the records of one moment: `[opened, progress, closed]`.

Space is allocated before it is written to, so that a full disk shows when a segment begins and a sync need
not grow the file; what follows the last frame is zeros. A frame that a crash cut short, or that rotted, is
recognised by its CRC. Reading then goes on at the next whole frame: what is found is put into the ledger by
unique ids, so reading too much harms nothing, and reading too little loses tokens.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAGIC = b"\xf1TJ1"
"""Its last byte is the version of the format."""
_HEAD = struct.Struct("<4sII")
SUFFIX = ".journal"
RESERVE = "reserve"
"""Name of the segment that stands ready for the day on which the disk is full."""


class JournalError(Exception):
    """The journal cannot be read, or can no longer be written or synced."""


class Disk:
    """The system calls that writing needs. Tests put failing ones in their place."""

    def create(self, path: Path, size: int) -> int:
        """A new file with `size` bytes of zeros that are really there, its name durable. Returns it open."""
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            try:
                os.posix_fallocate(handle, 0, size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise  # these two: a file system that cannot; the file then grows as it is written
            os.fsync(handle)
            sync_directory(path.parent)
        except OSError:
            os.close(handle)
            path.unlink(missing_ok=True)
            raise
        return handle

    def write(self, handle: int, data: bytes) -> None:
        """Append all of `data`."""
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(handle, rest) :]

    def sync(self, handle: int) -> None:
        os.fdatasync(handle)

    def cut(self, handle: int, size: int) -> None:
        """Take off what stands behind `size` bytes."""
        os.ftruncate(handle, size)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Segment:
    """One file being written, by one thread."""

    def __init__(self, path: Path, size: int, disk: Disk) -> None:
        """Raises OSError."""
        self.path = path
        self.size = size
        """Bytes to hold before the next segment is begun."""
        self.written = 0
        self._disk = disk
        self._handle = disk.create(self.path, size)

    def write(self, frame: bytes) -> None:
        """Raises OSError; the segment must not be used after that."""
        self._disk.write(self._handle, frame)
        self.written += len(frame)

    def sync(self) -> None:
        """Raises OSError; the segment must not be used after that, and never synced again: the kernel may
        have dropped what it could not write, and would then call the next sync a success."""
        self._disk.sync(self._handle)

    def cut(self) -> None:
        """Take off what a failed write left. Raises OSError."""
        self._disk.cut(self._handle, self.written)

    def close(self) -> None:
        os.close(self._handle)


def frame(payload: bytes) -> bytes:
    """A payload as it stands in a segment."""
    length = len(payload)
    return _HEAD.pack(MAGIC, length, _crc(length, payload)) + payload


@dataclass(slots=True)
class Damage:
    """A stretch of a segment that holds no whole frame."""

    path: Path
    offset: int
    length: int
    """Bytes."""
    torn: bool
    """Nothing follows: a write that a crash cut short, or the end of a file that lost it."""

    def __str__(self) -> str:
        what = "a torn write at the end" if self.torn else "damage before whole frames"
        return f"{self.path}: {what}, {self.length} bytes at offset {self.offset}"


def read_segment(path: Path) -> Iterator[bytes | Damage]:
    """Payloads in order, and what stands between them that is none. Raises JournalError, OSError."""
    data = path.read_bytes().rstrip(b"\0")  # a payload is JSON: it never ends in a zero
    if data[:3] == MAGIC[:3] and data[3:4] > MAGIC[3:]:
        raise JournalError(f"{path} was written by a newer tidegate; start that one to empty it")
    offset = 0
    while offset < len(data):
        payload = _payload(data, offset)
        if payload is not None:
            yield payload
            offset += _HEAD.size + len(payload)
            continue
        resumed = _next_frame(data, offset + 1)
        end = len(data) if resumed is None else resumed
        yield Damage(path, offset, end - offset, torn=resumed is None)
        offset = end


def list_segments(directory: Path) -> list[Path]:
    """Segments in the order they were written; the reserve, if it is there, is the last."""
    reserve = directory / RESERVE
    numbered = sorted(directory.glob(f"[0-9]*{SUFFIX}"), key=segment_number)
    return [*numbered, *([reserve] if reserve.exists() else [])]


def segment_path(directory: Path, number: int) -> Path:
    return directory / f"{number:08d}{SUFFIX}"


def segment_number(path: Path) -> int:
    """0: it is the reserve."""
    return 0 if path.name == RESERVE else int(path.name.removesuffix(SUFFIX))


def _crc(length: int, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(length.to_bytes(4, "little")))


def _payload(data: bytes, offset: int) -> bytes | None:
    """The payload of the frame at `offset`; None: there is no whole frame."""
    if len(data) - offset < _HEAD.size:
        return None
    magic, length, crc = _HEAD.unpack_from(data, offset)
    start = offset + _HEAD.size
    if magic != MAGIC or length > len(data) - start:
        return None
    payload = data[start : start + length]
    return payload if _crc(length, payload) == crc else None


def _next_frame(data: bytes, offset: int) -> int | None:
    while (offset := data.find(MAGIC, offset)) >= 0:
        if _payload(data, offset) is not None:
            return offset
        offset += 1
    return None
