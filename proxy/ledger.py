"""Moves finished rows from the journal to SQL, each exactly once.

Rows come from the journal's thread, durable already. One thread of our own inserts what has gathered for half
a second, in one transaction: the rows, many to a statement, and their hourly sums. A row whose operation id is
known is skipped, so a batch whose commit was uncertain, or a journal replayed twice, changes nothing.

Hourly sums are made here and not by the database, which takes four times as long. They can only be of rows that
were really inserted: when the database says that it skipped one, nothing of that transaction stays, and the
batch is inserted anew without the rows that are known.

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
from math import inf
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeAlias

from sqlalchemy import Connection, Engine, select
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from proxy import postgres
from proxy.access.shared import RowCounter
from proxy.database import BUSY_TIMEOUT_S, said, writing
from proxy.journal import Journal, JournalLockedError
from proxy.prices import Prices
from proxy.records import CLIENT_GONE, COLUMNS, FAILED, OK, Values, as_json, from_values
from proxy.replay import Replayed, replay
from proxy.tables import HOUR_US, HOURLY_GROUPS, HOURLY_SUMS, ledger, usage_hourly

log = logging.getLogger("tidegate")

BLOCKS = (128, 16, 4, 1)
"""Rows to a statement: a batch is cut into the largest that fit, so that only four statements are prepared.
Binding and adding up the values of the largest holds the interpreter for about 0.1 ms."""
BATCH_ROWS = 4096
"""Rows of one transaction, or a few more: it costs a millisecond or two before its first row."""
KNOWN_ROWS = 500
"""Operation ids that are looked up at once."""
LONGEST_PAUSE_S = 5.0
SAID_AGAIN_S, LONGEST_SILENCE_S = 10.0, 300.0
"""A database that is away is told at once, then after twice as long each time."""
Sums: TypeAlias = dict[tuple[Any, ...], list[int]]
FINAL_SQLITE_ERRORS = (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
SHORTAGES = (
    sqlite3.SQLITE_IOERR_SHMSIZE,
    sqlite3.SQLITE_IOERR_SHMMAP,
    sqlite3.SQLITE_IOERR_SHMOPEN,
    sqlite3.SQLITE_IOERR_NOMEM,
)
"""I/O errors that pass: no room, memory or file descriptor for the index of the WAL."""


class Ledger:
    """The journal's other end: replays and starts it, and empties it into SQL.

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
        budgets: RowCounter | None = None,
    ) -> None:
        """`most_waiting`: rows (about 1 KB each) that may wait in memory before `failed` is set.

        `budgets`: to be told which rows of ours are in the database.
        """
        self.engine = engine
        self.journal = journal
        self.prices = prices
        self.trouble = ""
        """What the database last said while rows wait for it; empty when all is well."""
        self.refused = 0
        """Rows that the database would not take, written to the log instead: a bug if not 0."""
        self._interval_s = interval_s
        self._most_waiting = most_waiting
        self._budgets = budgets
        self._insert = _Insert(engine)
        self._may_pass = postgres.may_pass if postgres.is_postgres(engine.url) else _may_pass
        self._queue: SimpleQueue[tuple[float, list[Values]]] = SimpleQueue()
        """Rows, and when they came."""
        self._oldest = inf
        """When the first of those came that are being moved; inf: there are none."""
        self._followed = -1
        """Rows that the database has taken since its trouble was told; -1: nothing is to be told."""
        self._say_at = 0.0
        self._silence_s = SAID_AGAIN_S
        self._taken = 0
        self._moved = 0
        self._unsaved: dict[str, Values] = {}
        """Rows that the journal did not take either, by operation id: nobody else has them."""
        self._broken = False
        self._stopping = threading.Event()
        self._give_up_at = inf
        self._worker: threading.Thread | None = None

    @property
    def lag(self) -> int:
        """Finished rows that are in the journal but not in SQL yet."""
        return self._taken - self._moved

    @property
    def oldest_s(self) -> float:
        """Seconds for which the oldest of those rows has waited: half of one, while all is well."""
        return max(0.0, time.monotonic() - self._oldest)

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
        replayed = self._replay(self.journal.directory)
        self.journal.start(loop, self.take, on_failed)
        self._worker = threading.Thread(target=self._run, name="tidegate-ledger", daemon=True)
        self._worker.start()
        return replayed

    def adopt(self, directory: Path) -> Replayed | None:
        """Take over what a process that is gone left in another journal; None: it is still writing there.

        From any thread, also while rows are moved. Raises as `start` does.
        """
        try:
            left = Journal(directory)
        except JournalLockedError:
            return None
        try:
            return self._replay(directory)
        finally:
            left.release()

    def _replay(self, directory: Path) -> Replayed:
        replayed = replay(directory, self._insert.rows, self.prices)
        for damage in replayed.damages:
            log.error("journal: %s; what it held is lost", damage)
        if replayed.rows or replayed.lost:
            log.warning(
                "journal replayed: %d finished row%s, %d lost request%s",
                replayed.rows,
                "" if replayed.rows == 1 else "s",
                replayed.lost,
                "" if replayed.lost == 1 else "s",
            )
        return replayed

    def take(self, rows: list[Values]) -> None:
        """Rows to be moved, from the journal's thread."""
        self._taken += len(rows)
        if self.journal.ended:
            self._unsaved.update((row[0], row) for row in rows)
        if not self._broken:
            self._queue.put((time.monotonic(), rows))

    def stop(self, timeout_s: float = 10.0) -> None:
        """Flush, sync, drain into SQL, release the journal. Blocks: run it in a thread.

        What does not reach SQL in time stays in the journal for the next start; what is not in that either is
        written to the log whole, as the last place there is.
        """
        deadline = time.monotonic() + timeout_s
        self.journal.stop(timeout_s)
        self._give_up_at = deadline
        self._stopping.set()
        self._queue.put((inf, []))  # for a thread that waits for rows
        if self._worker is not None:
            self._worker.join(max(0.0, deadline - time.monotonic()) + BUSY_TIMEOUT_S)
        unsaved = list(self._unsaved.values())
        if later := self.lag - len(unsaved):
            log.error("%d rows are not in the ledger yet: the next start takes them from the journal", later)
        if unsaved:
            log.critical("%d rows are neither in the ledger nor in the journal, only here:", len(unsaved))
            for row in unsaved:
                log.critical("%s", as_json(from_values(row)).decode())
        self.journal.release()

    def _run(self) -> None:
        try:
            while batch := self._gather():
                if not self._move(batch):
                    return
                self._oldest = inf
                if self._followed >= 0 and self._queue.empty():
                    log.info("ledger: %s followed, nothing waits", _rows(self._followed))
                    self._followed, self._say_at, self._silence_s = -1, 0.0, SAID_AGAIN_S
        except Exception as error:  # a thread that ends must not end unseen
            log.exception("ledger: rows are not moved any more, new requests are refused")
            self.trouble = repr(error)
            self._broken = True

    def _gather(self) -> list[Values]:
        """Wait for rows, then for what else comes within the interval, unless a batch of them waits already.

        Empty: stopped, and none are left.
        """
        batch: list[Values] = []
        if not self._stopping.is_set():
            came, rows = self._queue.get()
            self._oldest = came
            batch += rows
            self._take_waiting(batch)
            if len(batch) < BATCH_ROWS:
                self._stopping.wait(self._interval_s)
        self._take_waiting(batch)
        return batch

    def _take_waiting(self, batch: list[Values]) -> None:
        """Add what waits already, until the batch is full."""
        while len(batch) < BATCH_ROWS:
            try:
                came, rows = self._queue.get_nowait()
            except Empty:
                return
            self._oldest = min(self._oldest, came)
            batch += rows

    def _put(self, rows: list[Values]) -> None:
        if self._budgets is None:
            self._insert.rows(rows)
            return
        with self._budgets.lock:
            self._insert.rows(rows)
            self._budgets.count(rows)

    def _move(self, rows: list[Values]) -> bool:
        """Insert, however often it takes. False: it will not succeed any more."""
        pause_s = 0.05
        while True:
            try:
                self._put(rows)
            except Exception as error:
                self.trouble = said(error)
                if _is_final(error):
                    self._broken = True
                    log.critical(
                        "ledger: %s; rows stay in the journal, new requests are refused", self.trouble
                    )
                    return False
                if not self._may_pass(error):
                    if len(rows) > 1:  # one of them is the cause: the others must not wait for it
                        return all(self._move([row]) for row in rows)
                    self.refused += 1
                    log.exception("ledger: this row was refused: %r", rows[0])
                    break
            else:
                break
            if time.monotonic() + pause_s > self._give_up_at:
                return False
            self._say_that_rows_wait(pause_s)
            time.sleep(pause_s) if self._stopping.is_set() else self._stopping.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        self.trouble = ""
        self._moved += len(rows)
        if self._followed >= 0:
            self._followed += len(rows)
        if self._unsaved:
            for row in rows:
                self._unsaved.pop(row[0], None)
        self.journal.settled(self._moved)
        return True

    def _say_that_rows_wait(self, pause_s: float) -> None:
        """At once, then ever more rarely: `/state` has it all the time."""
        self._followed = max(self._followed, 0)
        now = time.monotonic()
        if now < self._say_at:
            return
        self._say_at = now + self._silence_s
        self._silence_s = min(2 * self._silence_s, LONGEST_SILENCE_S)
        log.warning("ledger: %s; %s waiting, next try in %.2g s", self.trouble, _rows(self.lag), pause_s)


class _KnownError(Exception):
    """Some row of a batch is in the ledger already."""


class _Insert:
    """The statements that put rows into the ledger and its sums, compiled once."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._is_postgres = postgres.is_postgres(engine.url)
        self._blocks = [] if self._is_postgres else [(size, _insert_text(size)) for size in BLOCKS]
        self._add_up = _add_up_text()

    def rows(self, rows: list[Values]) -> None:
        """Insert rows that are not there yet, in one transaction. Raises SQLAlchemy's errors."""
        while rows:
            try:
                with writing(self._engine) as connection:
                    if self._is_postgres:
                        postgres.add_sums(connection, self._put_json(connection, rows))
                        return
                    sums = self._put(connection, rows)
                    connection.exec_driver_sql(
                        self._add_up, [(*group, *figures) for group, figures in sums.items()]
                    )
                return
            except _KnownError:
                rows = self._unknown(rows)

    def _put(self, connection: Connection, rows: list[Values]) -> Sums:
        """-> what they add to the hours. Raises _KnownError: one of them was skipped."""
        sums: Sums = {}
        start = 0
        for size, text in self._blocks:
            while len(rows) - start >= size:
                block = rows[start : start + size]
                values: list[Any] = []
                for row in block:
                    values += row
                if connection.exec_driver_sql(text, tuple(values)).rowcount != size:
                    raise _KnownError
                add_up(block, sums)
                start += size
        return sums

    def _put_json(self, connection: Connection, rows: list[Values]) -> Sums:
        """The same on PostgreSQL, where one statement takes any number of rows."""
        sums: Sums = {}
        for start in range(0, len(rows), BLOCKS[0]):
            document, block = postgres.storable(rows[start : start + BLOCKS[0]])
            if postgres.insert_rows(connection, document) != len(block):
                raise _KnownError
            add_up(block, sums)
        return sums

    def _unknown(self, rows: list[Values]) -> list[Values]:
        """Those that are not in the ledger, each once."""
        fresh: dict[str, Values] = {}
        for row in rows:
            fresh.setdefault(row[0], row)
        ops = list(fresh)
        with self._engine.connect() as connection:
            for start in range(0, len(ops), KNOWN_ROWS):
                known = select(ledger.c.op).where(ledger.c.op.in_(ops[start : start + KNOWN_ROWS]))
                for op in connection.execute(known).scalars():
                    del fresh[op]
        return list(fresh.values())


def add_up(rows: list[Values], groups: Sums) -> None:
    """Add rows to what `usage_hourly` gets: the values of `HOURLY_SUMS` by those of `HOURLY_GROUPS`."""
    # fmt: off
    for (
        _, _, arrived_us, tenant, key_id, served_model, backend, site, _, outcome, prompt, cached, completion,
        overhead_prompt, overhead_completion, cost_nano, currency, _, _, _,
    ) in rows:
        # fmt: on
        model = served_model if backend else ""
        group = (arrived_us // HOUR_US * 3600, tenant, key_id, model, backend, site, currency)
        sums = groups.get(group)
        if sums is None:
            sums = groups[group] = [0] * len(HOURLY_SUMS)
        sums[0] += 1
        if outcome != OK and outcome != CLIENT_GONE:
            sums[1] += 1
            if outcome in FAILED:
                sums[9] += 1
        if not currency and prompt + completion:
            sums[2] += 1
        sums[3] += prompt
        sums[4] += cached
        sums[5] += completion
        sums[6] += overhead_prompt
        sums[7] += overhead_completion
        sums[8] += cost_nano


def _insert_text(rows: int) -> str:
    """`INSERT ... VALUES (...), (...) ON CONFLICT (op) DO NOTHING` with positional parameters."""
    names = (*COLUMNS, "detail")
    insert = sqlite.insert(ledger).values([dict.fromkeys(names, "")] * rows)
    return _positional(insert.on_conflict_do_nothing(index_elements=["op"]))


def _add_up_text() -> str:
    """Add one group's sums to its hour, with positional parameters."""
    names = (*HOURLY_GROUPS, *HOURLY_SUMS)
    insert = sqlite.insert(usage_hourly).values(dict.fromkeys(names, ""))
    add = {name: usage_hourly.c[name] + insert.excluded[name] for name in HOURLY_SUMS}
    return _positional(insert.on_conflict_do_update(index_elements=list(HOURLY_GROUPS), set_=add))


def _positional(statement: Any) -> str:
    return str(statement.compile(dialect=sqlite.dialect(paramstyle="qmark")))


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _is_final(error: Exception) -> bool:
    code = _sqlite_code(error)
    return code & 0xFF in FINAL_SQLITE_ERRORS and code not in SHORTAGES


def _may_pass(error: Exception) -> bool:
    """Whether the same insert may succeed later: locked, full, away, without a table, no memory; not: a row that
    does not fit."""
    code = _sqlite_code(error)
    if code:
        return code & 0xFF not in (sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_TOOBIG)
    return isinstance(error, OperationalError | InterfaceError | MemoryError)


def _sqlite_code(error: Exception) -> int:
    """SQLite's extended result code; 0: the error has none."""
    code = getattr(error.orig, "sqlite_errorcode", 0) if isinstance(error, DBAPIError) else 0
    return int(code)
