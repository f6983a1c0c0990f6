"""The file of an event log (`policies/eventlog.py`), read. Not compiled: a generator that nobody finishes closes
its file only where it is Python's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson


class BadLogError(Exception):
    """This is no event log that can be replayed; the message says in which line, and why."""

    def __init__(self, line: int, problem: str) -> None:
        """`line`: of the file, from 1; there is one record in each."""
        super().__init__(f"line {line}: {problem}")


class Recording:
    """The records of a file, read one at a time."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self.path = path
        self.size = path.stat().st_size
        """Bytes."""
        self.position = 0
        """Bytes that have been read."""
        self.torn = 0
        """The last line, if only the beginning of it was written; 0: it is whole."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """From the first record on. Raises BadLogError or OSError."""
        self.position = self.torn = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                self.position += len(line)
                try:
                    record = orjson.loads(line)
                except orjson.JSONDecodeError:
                    if not line.endswith(b"\n"):
                        self.torn = number
                        return
                    raise BadLogError(number, "this is no JSON") from None
                if not isinstance(record, dict):
                    raise BadLogError(number, "this is no record")
                yield record
