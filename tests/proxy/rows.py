"""Rows for tests of journal, ledger and reports."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from sqlalchemy import Engine

from benchmarks.rows import PRICES, a_row
from proxy.database import DATABASE_FILE, open_database

__all__ = ["PRICES", "a_row", "empty_database", "eventually", "segments"]


@functools.cache
def _migrated() -> bytes:
    with TemporaryDirectory() as directory:
        open_database(directory).dispose()
        return (Path(directory) / DATABASE_FILE).read_bytes()


def empty_database(directory: Path) -> Engine:
    """A database as `open_database` makes it, without the tenth of a second that migrations take."""
    (directory / DATABASE_FILE).write_bytes(_migrated())
    return open_database(directory, check=False)


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for another thread. Fails after 20 s, which only a broken one takes."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)


def segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.journal"))
