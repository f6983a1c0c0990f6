"""What a target is, and what all of them need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from zlib import crc32

from tests.proxy.http_bytes import pieces_of, random_pieces


@dataclass(frozen=True, slots=True)
class Target:
    """One law over any bytes."""

    run: Callable[[bytes], None]
    """Raises when they break it."""
    seeds: Callable[[], list[bytes]]
    """Good inputs to begin with."""
    words: tuple[bytes, ...]
    """What is worth putting into them."""


def words(*names: str) -> tuple[bytes, ...]:
    """Those of files in `words/`: one in quotes on each line, as libFuzzer reads them."""
    lines = [line for name in names for line in (_WORDS / f"{name}.dict").read_text("ascii").splitlines()]
    return tuple(line[1:-1].encode().decode("unicode_escape").encode("latin-1") for line in lines)


MANY_BYTES = 400
_WORDS = Path(__file__).with_name("words")


def cuts(data: bytes) -> list[list[bytes]]:
    """The same bytes in pieces: of one byte, or seven if there are many, and of lengths that the bytes decide."""
    small = 1 if len(data) <= MANY_BYTES else 7
    return [pieces_of(data, small), random_pieces(Random(crc32(data)), data)]
