"""Moves finished rows from the journal to SQL, each exactly once.

Rows come from the journal's thread, durable already. One thread of our own inserts what has gathered for half
a second, in one transaction (which costs a millisecond or two of CPU before its first row): the rows, many to
a statement, and the hourly sums of those that were really inserted. A row whose operation id is known is
skipped, so a batch whose commit was uncertain, or a journal replayed twice, changes nothing; and the sums are
made from the rows that this transaction added, so they cannot differ from them.

Many rows to a statement because sqlite3 gives up the interpreter lock around every step and must get it back
afterwards, from an event loop that is busy: per statement, that is, not per row.

While the database is locked or away, rows wait in memory (they are in the journal too) and the insert is tried
again with growing pauses; requests go on until `most_waiting` rows wait. A database that cannot read or write
its disk, or finds itself damaged, is not tried again (fsync errors: see `journal.py`): `failed` says so.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from itertools import chain
from math import inf
from queue import Empty, SimpleQueue
from typing import Any

from sqlalchemy import Connection, Engine, Insert, bindparam, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from proxy.database import BUSY_TIMEOUT_S, writing
from proxy.journal import Journal
from proxy.prices import Prices
from proxy.records import COLUMNS, Values
from proxy.replay import Replayed, replay
from proxy.reports import spent
from proxy.tables import HOURLY_GROUPS, HOURLY_SUMS, ledger, usage_hourly

log = logging.getLogger("tidegate")

BLOCKS = (64, 16, 4, 1)
"""Rows to a statement: a batch is cut into the largest that fit, so that only four statements are prepared."""
BATCH_ROWS = 2048
"""Most rows of one transaction."""
LONGEST_PAUSE_S = 5.0
FINAL_SQLITE_ERRORS = (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class Ledger:
    """The journal's other end: replays and starts it, empties it into SQL, and says what was spent.

    `ledger = Ledger(open_database(state), Journal(state / "journal"), prices)`, then `start`.
    """

    def __init__(
        self,
        engine: Engine,
        journal: Journal,
        prices: Prices,
        *,
        interval_s: float = 0.5,
        most_waiting: int = 100_000,
    ) -> None:
        """`most_waiting`: rows (about 1 KB each) that may wait in memory before `failed` is set."""
        self.engine = engine
        self.journal = journal
        self.prices = prices
        self.trouble = ""
        """What the database last said while rows wait for it; empty when all is well."""
        self.refused = 0
        """Rows that the database would not take, written to the log instead: a bug if not 0."""
        self._interval_s = interval_s
        self._most_waiting = most_waiting
        self._insert = _Insert(engine)
        self._queue: SimpleQueue[list[Values]] = SimpleQueue()
        self._taken = 0
        self._moved = 0
        self._broken = False
        self._stopping = threading.Event()
        self._give_up_at = inf
        self._thread: threading.Thread | None = None

    @property
    def lag(self) -> int:
        """Finished rows that are in the journal but not in SQL yet."""
        return self._taken - self._moved

    @property
    def failed(self) -> str:
        """Why new requests should be refused: the database is broken, or too many rows wait; else empty."""
        if self._broken:
            return f"the ledger cannot be written: {self.trouble}"
        if self.lag > self._most_waiting:
            return f"{self.lag} rows wait for the ledger: {self.trouble}"
        return ""

    def start(self, loop: asyncio.AbstractEventLoop, on_failed: Callable[[str], None]) -> Replayed:
        """Take over what the last run left, then start journal and mover. Blocks; call it before serving.

        `on_failed` is called on the loop when the journal fails, once. Raises JournalError, OSError and
        SQLAlchemy's errors: without its ledger the proxy must not start.
        """
        replayed = replay(self.journal.directory, self._insert.rows, self.prices)
        for damage in replayed.damages:
            log.error("journal: %s; what it held is lost", damage)
        if replayed.rows or replayed.lost:
            log.warning("journal replayed: %d finished rows, %d lost requests", replayed.rows, replayed.lost)
        self.journal.start(loop, self.take, on_failed)
        self._thread = threading.Thread(target=self._run, name="tidegate-ledger", daemon=True)
        self._thread.start()
        return replayed

    def take(self, rows: list[Values]) -> None:
        """Rows to be moved, from the journal's thread."""
        self._taken += len(rows)
        if not self._broken:
            self._queue.put(rows)

    def stop(self, timeout_s: float = 10.0) -> None:
        """Flush, sync, drain into SQL, release the journal. Blocks: run it in a thread.

        What does not reach SQL in time stays in the journal for the next start.
        """
        deadline = time.monotonic() + timeout_s
        self.journal.stop(timeout_s)
        self._give_up_at = deadline
        self._stopping.set()
        self._queue.put([])  # for a thread that waits for rows
        if self._thread is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()) + BUSY_TIMEOUT_S)
        if self.lag:
            log.error(
                "%d rows are not in the ledger yet: the next start takes them from the journal", self.lag
            )
        self.journal.release()

    def spent(self, key_id: str, since: float) -> int:
        """What a key has cost since a Unix time, nano-units; rows that still wait are not in it (blocking)."""
        return spent(self.engine, key_id, since)

    def _run(self) -> None:
        while batch := self._gather():
            if not self._move(batch):
                return

    def _gather(self) -> list[Values]:
        """Wait for rows, then for what else comes within the interval. Empty: stopped, and none are left."""
        batch: list[Values] = []
        if not self._stopping.is_set():
            batch += self._queue.get()
            self._stopping.wait(self._interval_s)
        while len(batch) < BATCH_ROWS:
            try:
                batch += self._queue.get_nowait()
            except Empty:
                break
        return batch

    def _move(self, rows: list[Values]) -> bool:
        """Insert, however often it takes. False: it will not succeed any more."""
        pause_s = 0.05
        while True:
            try:
                self._insert.rows(rows)
            except Exception as error:
                self.trouble = str(error.orig) if isinstance(error, DBAPIError) else repr(error)
                if _is_final(error):
                    self._broken = True
                    log.critical(
                        "ledger: %s; rows stay in the journal, new requests are refused", self.trouble
                    )
                    return False
                if not _may_pass(error):
                    if len(rows) > 1:  # one of them is the cause: the others must not wait for it
                        return all(self._move([row]) for row in rows)
                    self.refused += 1
                    log.exception("ledger: this row was refused: %r", rows[0])
                    break
            else:
                break
            if time.monotonic() + pause_s > self._give_up_at:
                return False
            log.warning("ledger: %s; %d rows wait, next try in %.2g s", self.trouble, self.lag, pause_s)
            time.sleep(pause_s) if self._stopping.is_set() else self._stopping.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        self.trouble = ""
        self._moved += len(rows)
        self.journal.settled(self._moved)
        return True


class _Insert:
    """The statements that put rows into the ledger and its sums, compiled once."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._blocks = [(size, _insert_text(engine, size)) for size in BLOCKS]
        self._add_up = _add_up(engine)

    def rows(self, rows: list[Values]) -> None:
        """Insert rows that are not there yet, in one transaction. Raises SQLAlchemy's errors."""
        instances = {row[1] for row in rows}
        with writing(self._engine) as connection:
            before = {instance: _newest(connection, instance) for instance in instances}
            start = 0
            for size, text in self._blocks:
                while len(rows) - start >= size:
                    block = rows[start : start + size]
                    connection.exec_driver_sql(text, tuple(chain.from_iterable(block)))
                    start += size
            for instance, newest in before.items():
                connection.execute(self._add_up, {"from_instance": instance, "after_id": newest})


def _newest(connection: Connection, instance: str) -> int:
    """Only one process writes the rows of an instance, so what it adds has greater ids than this."""
    newest = select(ledger.c.id).where(ledger.c.instance == instance).order_by(ledger.c.id.desc()).limit(1)
    return connection.execute(newest).scalar() or 0


def _insert_text(engine: Engine, rows: int) -> str:
    """`INSERT ... VALUES (...), (...) ON CONFLICT (op) DO NOTHING` with positional parameters."""
    names = (*COLUMNS, "detail")
    insert = _dialect_insert(engine)(ledger).values([dict.fromkeys(names, "")] * rows)
    positional = "qmark" if engine.dialect.name == "sqlite" else "format"
    dialect: Any = type(engine.dialect)
    statement = insert.on_conflict_do_nothing(index_elements=["op"])
    return str(statement.compile(dialect=dialect(paramstyle=positional)))


def _add_up(engine: Engine) -> Insert:
    """Add an instance's rows that are newer than a given one to the hourly sums."""
    columns = [expression.label(name) for name, expression in (HOURLY_GROUPS | HOURLY_SUMS).items()]
    rows = (
        select(*columns)
        .where(ledger.c.instance == bindparam("from_instance"), ledger.c.id > bindparam("after_id"))
        .group_by(*HOURLY_GROUPS)
    )
    insert = _dialect_insert(engine)(usage_hourly).from_select([*HOURLY_GROUPS, *HOURLY_SUMS], rows)
    sums: Insert = insert.on_conflict_do_update(
        index_elements=list(HOURLY_GROUPS),
        set_={name: usage_hourly.c[name] + insert.excluded[name] for name in HOURLY_SUMS},
    )
    return sums


def _dialect_insert(engine: Engine) -> Any:
    """`insert` with `ON CONFLICT`, which both databases have and SQLAlchemy spells twice."""
    return postgresql.insert if engine.dialect.name == "postgresql" else sqlite.insert


def _is_final(error: Exception) -> bool:
    code = _sqlite_code(error)
    # No room for the index of the WAL is an I/O error too, but passes when there is room again.
    return code & 0xFF in FINAL_SQLITE_ERRORS and code != sqlite3.SQLITE_IOERR_SHMSIZE


def _may_pass(error: Exception) -> bool:
    """Whether the same insert may succeed later: locked, full, away; not: a row that does not fit."""
    code = _sqlite_code(error)
    if code:
        return code & 0xFF not in (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH)
    return isinstance(error, OperationalError | InterfaceError)


def _sqlite_code(error: Exception) -> int:
    """SQLite's extended result code; 0: the error has none."""
    code = getattr(error.orig, "sqlite_errorcode", 0) if isinstance(error, DBAPIError) else 0
    return int(code)
