"""Moves finished rows from the journal to SQL. Signatures first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from sqlalchemy import Engine

from proxy.journal import Journal
from proxy.prices import Prices


class Ledger:
    """The journal's other end: starts it, replays it, empties it into SQL from a thread of its own.

    One object for the process: `ledger = Ledger(open_database(state), Journal(state / "journal"), prices)`.
    """

    def __init__(self, engine: Engine, journal: Journal, prices: Prices) -> None:
        self.engine = engine
        self.journal = journal
        self.failed = ""
        """Why rows pile up, once too many do; empty again when they have drained. Refuse new requests."""

    @property
    def lag(self) -> int:
        """Finished rows that are not in SQL yet."""
        raise NotImplementedError

    def start(self, loop: asyncio.AbstractEventLoop, on_failed: Callable[[str], None]) -> None:
        """Replay what the last run left (blocking), then start journal and mover."""
        raise NotImplementedError

    def stop(self, timeout_s: float = 10.0) -> None:
        """Flush, sync, drain to SQL, close (blocking: run it in a thread). What does not reach SQL in time
        stays in the journal for the next start."""
        raise NotImplementedError

    def spent(self, key_id: str, since: float) -> int:
        """What a key has cost since a Unix time, nano-units (blocking)."""
        raise NotImplementedError
