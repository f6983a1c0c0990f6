"""What a disk that is full is called when a proxy starts or a ledger is begun."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from proxy.database import OpenError
from proxy.journal import FULL

NEEDED_BYTES = 24 * 1024 * 1024
"""For a start: a segment of the journal, and its reserve."""
MIB = 1024 * 1024


@contextmanager
def told_if_full(directory: Path) -> Iterator[None]:
    """Say that the disk of a state directory is full where that is why something failed. Raises OpenError."""
    try:
        yield
    except Exception as error:
        free = _free(directory)
        if free is not None and free < _too_little(error):
            raise OpenError(
                f"{directory} is on a full disk: {free // MIB} MiB free, {NEEDED_BYTES // MIB} MiB needed"
            ) from error
        raise


def _too_little(error: BaseException | None) -> int:
    """With less room than this, bytes, the error is for want of it; 0: it has another reason."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return NEEDED_BYTES
        if isinstance(error, sqlite3.Error):
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code == sqlite3.SQLITE_FULL:
                return NEEDED_BYTES
            if (
                code == sqlite3.SQLITE_IOERR
            ):  # what it says of its index of the WAL, and of a disk that breaks
                return MIB
        error = error.__cause__ or error.__context__
    return 0


def _free(directory: Path) -> int | None:
    """Bytes that we may still write there; None: it cannot be told."""
    for folder in (directory, *directory.absolute().parents):
        try:
            figures = os.statvfs(folder)
        except FileNotFoundError:
            continue
        except OSError:
            return None
        return figures.f_bavail * figures.f_frsize
    return None
