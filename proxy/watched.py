"""Files that are watched for changes, by their times and sizes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


class WatchedFiles:
    """Their marks of the last reading, to compare with those of now."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[int, ...]] = {}

    @property
    def changed(self) -> bool:
        """Whether one is not as it was when it was last read."""
        return any(_mark(file) != seen for file, seen in self._seen.items())

    def read(self) -> None:
        """All of them are going to be read now."""
        self._seen = {file: _mark(file) for file in self._seen}

    def watch(self, files: Iterable[Path]) -> None:
        """Watch these from now on, those that are new among them as they are now.

        To be called before they are read: what changes in between is seen as a change.
        """
        self._seen = {file: self._seen[file] if file in self._seen else _mark(file) for file in files}

    def forget(self) -> None:
        """Take all for changed."""
        self._seen = dict.fromkeys(self._seen, (-1,))


def _mark(file: Path) -> tuple[int, ...]:
    """Changes when a file does; empty: there is none."""
    try:
        status = file.stat()
    except OSError:
        return ()
    return status.st_mtime_ns, status.st_size, status.st_ino
