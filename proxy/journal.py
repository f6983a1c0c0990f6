"""What a crash must not lose: an append-only log of requests in flight and of finished rows.

Signatures first; the exchange is written against them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from proxy.records import Row, Values


class JournalFailed(Exception):
    """The journal could not be written or synced: nothing since its last sync is durable. Final."""


class Journal:
    """Appended to on the event loop (under 0.5 µs a call); written and synced by one thread of its own."""

    def __init__(
        self, directory: Path, *, sync_interval_s: float = 0.02, segment_bytes: int = 16 * 1024 * 1024
    ) -> None:
        """Lock `directory`. Raises `JournalLocked` when another process has it, OSError."""
        self.instance = ""
        self.failed = ""
        """Why nothing is durable any more; empty while all is well. Refuse new requests when set."""

    def start(
        self,
        loop: asyncio.AbstractEventLoop,
        deliver: Callable[[list[Values]], None],
        on_failed: Callable[[str], None],
    ) -> None:
        """Begin a segment and the thread. `on_failed` runs on the loop, once."""
        raise NotImplementedError

    def open(self, row: Row) -> None:
        """A request is about to be dispatched to `row.backend`. The same object is closed later.

        The row is read within 20 ms by another thread: fields set by now are what a crash would leave.
        """
        raise NotImplementedError

    def progress(
        self, op: str, backend: str, prompt: int, cached: int, completion: int, source: str = "reported"
    ) -> None:
        """Tokens so far (totals, not increments) of an open request on the backend it is on now."""
        raise NotImplementedError

    def close(self, row: Row) -> None:
        """A request has ended, or was refused without ever being opened. The row must not change any more."""
        raise NotImplementedError

    async def synced(self) -> None:
        """Return when everything appended so far is durable (`durability: strict`). Raises JournalFailed."""
        raise NotImplementedError
