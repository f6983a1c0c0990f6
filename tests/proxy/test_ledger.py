from __future__ import annotations

import asyncio
import errno
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, delete, event, func, select
from sqlalchemy.exc import OperationalError

import proxy.database
import proxy.ledger
from proxy.database import DATABASE_FILE, writing
from proxy.journal import Journal, JournalLockedError
from proxy.ledger import BLOCKS, KNOWN_ROWS, Ledger, _Insert
from proxy.records import COLUMNS, OUTCOMES, Row, Values, from_values, to_values
from proxy.segments import Disk
from proxy.tables import HOURLY_GROUPS, HOURLY_SUMS, ledger, usage_hourly
from tests.databases import NewDatabase
from tests.proxy.rows import PRICES, a_row, empty_database, eventually, segments


class State:
    """A state directory with the ledgers that a test starts on it."""

    def __init__(self, directory: Path, engine: Engine) -> None:
        self.directory = directory
        self.engine = engine
        self.running: Ledger | None = None
        self.failures: list[str] = []

    def start(self, **options: Any) -> Ledger:
        journal = Journal(self.directory / "journal", disk=options.pop("disk", None))
        self.running = Ledger(self.engine, journal, PRICES, **({"interval_s": 0.0} | options))
        self.replayed = self.running.start(asyncio.get_running_loop(), self.failures.append)
        return self.running

    def stop(self, timeout_s: float = 20.0) -> None:
        if self.running is not None:
            self.running.stop(timeout_s)
            self.running = None

    def rows(self) -> list[Row]:
        return rows_of(self.engine)


def rows_of(engine: Engine) -> list[Row]:
    columns = [ledger.c[name] for name in (*COLUMNS, "detail")]
    with engine.connect() as connection:
        return [from_values(row) for row in connection.execute(select(*columns).order_by(ledger.c.id))]


def hourly(engine: Engine) -> list[Any]:
    names = (*HOURLY_GROUPS, *HOURLY_SUMS)
    with engine.connect() as connection:
        return sorted(
            tuple(row) for row in connection.execute(select(*(usage_hourly.c[name] for name in names)))
        )


def added_up(rows: Sequence[Row]) -> list[Any]:
    """What `usage_hourly` must hold, by another way than SQL."""
    sums: dict[tuple[Any, ...], list[int]] = {}
    for row in rows:
        hour = round(row.arrived * 1e6) // 3_600_000_000 * 3600
        model = row.served_model if row.backend else ""
        group = (hour, row.tenant, row.key_id, model, row.backend, row.site, row.currency)
        amounts = [
            1,
            row.outcome not in ("ok", "client_gone"),
            row.currency == "" and row.prompt_tokens + row.completion_tokens > 0,
            row.prompt_tokens,
            row.cached_tokens,
            row.completion_tokens,
            row.overhead_prompt_tokens,
            row.overhead_completion_tokens,
            row.cost_nano,
            row.outcome in ("backend_failed", "cut", "shutdown", "lost"),
        ]
        sums[group] = [a + b for a, b in zip(sums.get(group, [0] * 10), amounts, strict=True)]
    return sorted((*group, *amounts) for group, amounts in sums.items())


@pytest.fixture
def state(tmp_path: Path, new_database: NewDatabase) -> Iterator[State]:
    """On each of the databases."""
    with using(State(tmp_path, new_database(tmp_path))) as state:
        yield state


@pytest.fixture
def sqlite_state(tmp_path: Path) -> Iterator[State]:
    """For what only SQLite does."""
    with using(State(tmp_path, empty_database(tmp_path))) as state:
        yield state


@contextmanager
def using(state: State) -> Iterator[State]:
    yield state
    state.stop()
    state.engine.dispose()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tidegate")]


async def test_closed_rows_reach_sql_whole(state: State) -> None:
    moved = state.start()
    rows = [a_row(tenant=f"t{i % 3}") for i in range(500)]
    for row in rows:
        moved.journal.open(row)
        moved.journal.close(row)
    eventually(lambda: len(state.rows()) == 500)
    assert state.rows() == rows
    assert hourly(state.engine) == added_up(rows)
    eventually(lambda: moved.lag == 0)
    assert (moved.failed, moved.trouble, moved.refused, state.failures) == ("", "", 0, [])


async def test_a_clean_stop_drains_everything(state: State) -> None:
    moved = state.start(interval_s=60.0)
    for _ in range(5000):
        moved.journal.close(a_row())
    state.stop()
    assert len(state.rows()) == 5000
    assert segments(state.directory / "journal") == []
    state.start()
    assert (state.replayed.rows, state.replayed.lost) == (0, 0)


async def test_who_is_behind_does_not_pause(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy.ledger, "BATCH_ROWS", 4)
    moved = state.start(interval_s=600.0)
    for _ in range(5):
        moved.take([to_values(a_row()) for _ in range(4)])
    eventually(lambda: moved.lag == 0)  # far sooner than the interval
    assert len(state.rows()) == 20
    state.stop()


async def test_a_restart_takes_what_the_last_run_left(state: State) -> None:
    journal = Journal(state.directory / "journal")
    journal.start(asyncio.get_running_loop(), lambda rows: None, state.failures.append)
    rows = [a_row() for _ in range(100)]
    for row in rows:
        journal.close(row)
    journal.open(lost := a_row())
    journal.progress(lost.op, "nanjing", 800, 512, 50)
    journal.stop()
    journal.release()
    state.start()
    assert (state.replayed.rows, state.replayed.lost) == (100, 1)
    found = state.rows()
    assert found[:-1] == rows
    assert (found[-1].op, found[-1].outcome, found[-1].completion_tokens) == (lost.op, "lost", 50)
    assert hourly(state.engine) == added_up(found)


async def test_a_journal_replayed_again_changes_nothing(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a crash between the replay's commit and the deletion of its files."""
    moved = state.start()
    rows = [a_row() for _ in range(100)]
    for row in rows:
        moved.journal.close(row)
    moved.journal.open(a_row())
    monkeypatch.setattr(moved.journal, "settled", lambda count: None)
    state.stop()
    left = {path: path.read_bytes() for path in segments(state.directory / "journal")}
    assert left
    for _ in range(3):
        for path, data in left.items():
            path.write_bytes(data)
        state.start()
        assert (state.replayed.rows, state.replayed.lost) == (100, 1)
        state.stop()
        found = state.rows()
        assert (len(found), found[-1].outcome) == (101, "lost")
        assert hourly(state.engine) == added_up(found)


async def test_two_processes_are_refused(state: State) -> None:
    state.start()
    with pytest.raises(JournalLockedError):
        Journal(state.directory / "journal")


ROWS = st.builds(
    a_row,
    op=st.text("ab", min_size=1, max_size=3),
    instance=st.sampled_from(["one", "two"]),
    arrived=st.sampled_from([0.0, 3599.999999, 3600.0, 1.7e9, 1.7e9 + 5000]),
    tenant=st.sampled_from(["", "acme"]),
    key_id=st.sampled_from(["k1", "k2"]),
    served_model=st.sampled_from(["", "m"]),
    backend=st.sampled_from(["", "nanjing"]),
    outcome=st.sampled_from(OUTCOMES),
    prompt_tokens=st.integers(0, 2**31 - 1),
    completion_tokens=st.integers(0, 3),
    cost_nano=st.integers(0, 2**50 - 1),
    currency=st.sampled_from(["", "CNY"]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(ROWS, max_size=90), max_size=4))
def test_sums_are_those_of_the_rows_whatever_comes_twice(state: State, batches: list[list[Row]]) -> None:
    with writing(state.engine) as connection:
        connection.execute(delete(ledger))
        connection.execute(delete(usage_hourly))
    insert = _Insert(state.engine)
    first: dict[str, Row] = {}
    for batch in batches:
        insert.rows([to_values(row) for row in batch])
        for row in batch:
            first.setdefault(row.op, row)
    assert state.rows() == list(first.values())
    assert hourly(state.engine) == added_up(list(first.values()))


@pytest.mark.parametrize("count", [1, 3, 127, 128, 129, 300])
def test_any_number_of_rows_is_cut_into_blocks(state: State, count: int) -> None:
    rows = [a_row() for _ in range(count)]
    _Insert(state.engine).rows([to_values(row) for row in rows])
    assert state.rows() == rows
    assert BLOCKS[-1] == 1


async def test_rows_wait_while_the_database_is_locked(
    sqlite_state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy.database, "BUSY_TIMEOUT_S", 0.01)
    sqlite_state.engine.dispose()  # its connections wait longer
    moved = sqlite_state.start(most_waiting=150)
    other = sqlite3.connect(sqlite_state.directory / DATABASE_FILE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    rows = [a_row() for _ in range(200)]
    for row in rows[:100]:
        moved.journal.close(row)
    eventually(lambda: "locked" in moved.trouble and moved.lag == 100)
    assert moved.failed == "", "requests go on"
    await moved.journal.synced()
    for row in rows[100:]:
        moved.journal.close(row)
    eventually(lambda: moved.lag == 200)
    assert "200 rows wait for the ledger: database is locked" in moved.failed
    other.execute("ROLLBACK")
    other.close()
    eventually(lambda: moved.lag == 0)
    assert (moved.failed, moved.trouble) == ("", "")
    assert sqlite_state.rows() == rows


async def test_a_database_that_is_away_and_comes_back_is_told_in_two_lines(
    sqlite_state: State, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(proxy.database, "BUSY_TIMEOUT_S", 0.01)
    sqlite_state.engine.dispose()
    moved = sqlite_state.start()
    assert moved.oldest_s == 0.0
    tries: list[Exception] = []
    may_pass = moved._may_pass

    def failed(error: Exception) -> bool:
        tries.append(error)
        return may_pass(error)

    moved._may_pass = failed
    other = sqlite3.connect(sqlite_state.directory / DATABASE_FILE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with caplog.at_level("INFO"):
        moved.journal.close(a_row())
        eventually(lambda: len(tries) > 3)
        first = moved.oldest_s
        moved.journal.close(a_row())
        eventually(lambda: moved.lag == 2)
        assert 0.0 < first < moved.oldest_s, "the oldest one goes on waiting"
        other.execute("ROLLBACK")
        other.close()
        eventually(lambda: "followed" in caplog.text)
        for _ in range(3):
            moved.journal.close(a_row())
        eventually(lambda: moved.lag == 0 and moved.oldest_s == 0.0)
    assert [record.getMessage() for record in caplog.records] == [
        "ledger: database is locked; 1 row waiting, next try in 0.05 s",
        "ledger: 2 rows followed, nothing waits",
    ]


def test_what_lasts_is_told_ever_more_rarely(
    sqlite_state: State, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    moved = Ledger(sqlite_state.engine, Journal(sqlite_state.directory / "journal"), PRICES)
    told: list[float] = []
    for second in range(0, 1500, 5):
        monkeypatch.setattr(time, "monotonic", lambda now=float(second): now)
        caplog.clear()
        moved._say_that_rows_wait(5.0)
        told += [second] * len(caplog.records)
    assert told == [0, 10, 30, 70, 150, 310, 610, 910, 1210]
    moved.journal.release()


async def test_what_the_database_never_took_is_there_after_a_restart(
    sqlite_state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy.database, "BUSY_TIMEOUT_S", 0.01)
    sqlite_state.engine.dispose()
    moved = sqlite_state.start()
    other = sqlite3.connect(sqlite_state.directory / DATABASE_FILE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    rows = [a_row() for _ in range(100)]
    for row in rows:
        moved.journal.close(row)
    sqlite_state.stop(timeout_s=0.2)
    assert moved.lag == 100
    other.execute("ROLLBACK")
    other.close()
    sqlite_state.start()
    assert sqlite_state.replayed.rows == 100
    assert sqlite_state.rows() == rows


async def test_a_full_database_takes_the_rows_when_there_is_room_again(sqlite_state: State) -> None:
    room = 0

    @event.listens_for(sqlite_state.engine, "connect")
    def limit(dbapi: sqlite3.Connection, _: object) -> None:
        if not room:
            dbapi.execute("PRAGMA max_page_count = 1")

    sqlite_state.engine.dispose()
    moved = sqlite_state.start()
    rows = [a_row() for _ in range(300)]
    for row in rows:
        moved.journal.close(row)
    eventually(lambda: "full" in moved.trouble)
    room = 1
    sqlite_state.engine.dispose()
    eventually(lambda: moved.lag == 0)
    assert sqlite_state.rows() == rows
    assert hourly(sqlite_state.engine) == added_up(rows)


class FailingInsert:
    """In place of the statements: fails with an SQLite error, a number of times."""

    def __init__(self, insert: _Insert, error: Exception, times: int = 1_000_000) -> None:
        self.insert = insert
        self.error = error
        self.times = times
        self.calls = 0

    def rows(self, rows: list[Values]) -> None:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        self.insert.rows(rows)


def sqlite_error(code: int, message: str) -> Exception:
    error = sqlite3.OperationalError(message)
    error.sqlite_errorcode = code
    return OperationalError("INSERT", {}, error)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (sqlite3.SQLITE_IOERR_FSYNC, "disk I/O error"),
        (sqlite3.SQLITE_CORRUPT, "database disk image is malformed"),
    ],
)
async def test_a_broken_disk_is_not_tried_again(
    sqlite_state: State, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    moved = sqlite_state.start()
    failing = FailingInsert(_Insert(sqlite_state.engine), sqlite_error(code, message))
    monkeypatch.setattr(moved, "_insert", failing)
    moved.journal.close(row := a_row())
    eventually(lambda: message in moved.failed)
    moved.journal.close(late := a_row())
    await moved.journal.synced()
    assert moved._queue.empty(), "what nobody will take is not kept in memory"
    sqlite_state.stop()
    assert (failing.calls, moved.lag) == (1, 2)
    sqlite_state.start()
    assert sqlite_state.rows() == [row, late], "they were in the journal"


class FullDisk(Disk):
    """Has no room any more, not even where it was taken before."""

    full = False

    def write(self, handle: int, data: bytes) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(handle, data)


@pytest.mark.parametrize("broken", [False, True], ids=["locked", "broken"])
async def test_rows_that_nobody_took_are_in_the_log(
    sqlite_state: State, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: bool
) -> None:
    disk = FullDisk()
    moved = sqlite_state.start(disk=disk)
    moved.journal.close(first := a_row())
    eventually(lambda: moved.lag == 0)
    code = sqlite3.SQLITE_IOERR_FSYNC if broken else sqlite3.SQLITE_FULL
    monkeypatch.setattr(
        moved, "_insert", FailingInsert(_Insert(sqlite_state.engine), sqlite_error(code, "no room"))
    )
    moved.journal.close(kept := a_row())
    await moved.journal.synced()
    disk.full = True
    rows = [a_row(reason="ä, 100 %s") for _ in range(3)]
    for row in rows:
        moved.journal.close(row)
        eventually(lambda: not moved.journal._queue)
    sqlite_state.stop(timeout_s=0.2)
    assert "1 rows are not in the ledger yet: the next start takes them from the journal" in caplog.text
    assert "3 rows are neither in the ledger nor in the journal" in caplog.text
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("{")]
    assert [Row(**json.loads(line)) for line in lines] == rows
    sqlite_state.start()
    assert sqlite_state.rows() == [first, kept]


async def test_rows_that_only_the_ledger_took_are_not_in_the_log(
    state: State, caplog: pytest.LogCaptureFixture
) -> None:
    disk = FullDisk()
    moved = state.start(disk=disk)
    disk.full = True
    moved.journal.close(row := a_row())
    eventually(lambda: moved.journal.ended and moved.lag == 0)
    state.stop()
    assert state.rows() == [row]
    assert row.op not in caplog.text


async def test_an_error_that_nobody_expected_is_seen(
    state: State, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever ends the thread: requests are refused, and the rows are in the journal."""
    moved = state.start()
    with monkeypatch.context() as patched:
        patched.setattr(moved.journal, "settled", lambda count: 1 / 0)
        moved.journal.close(row := a_row())
        eventually(lambda: "ZeroDivisionError" in moved.failed)
        moved.journal.close(late := a_row())
        await moved.journal.synced()
    state.stop()
    state.start()
    assert {found.op for found in state.rows()} == {row.op, late.op}


@pytest.mark.parametrize(
    "error",
    [
        sqlite_error(sqlite3.SQLITE_IOERR_SHMSIZE, "disk I/O error"),
        sqlite_error(sqlite3.SQLITE_IOERR_NOMEM, "disk I/O error"),
        sqlite_error(sqlite3.SQLITE_CANTOPEN, "unable to open database file"),
        MemoryError(),
    ],
    ids=repr,
)
async def test_an_error_that_passes_is_tried_again(
    sqlite_state: State, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    moved = sqlite_state.start()
    failing = FailingInsert(_Insert(sqlite_state.engine), error, times=2)
    monkeypatch.setattr(moved, "_insert", failing)
    rows = [a_row(), a_row()]
    for row in rows:
        moved.journal.close(row)
    await moved.journal.synced()
    eventually(lambda: moved.lag == 0)
    assert (failing.calls, moved.refused, moved.failed) == (3, 0, "")
    assert sqlite_state.rows() == rows


async def test_a_table_that_is_missing_is_no_fault_of_the_rows(state: State) -> None:
    moved = state.start()
    with state.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE usage_hourly RENAME TO away")
    rows = [a_row(), a_row()]
    for row in rows:
        moved.journal.close(row)
    await moved.journal.synced()
    eventually(lambda: bool(moved.trouble))
    assert (moved.refused, moved.lag) == (0, 2)
    with state.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE away RENAME TO usage_hourly")
    eventually(lambda: moved.lag == 0)
    assert (moved.refused, moved.trouble) == (0, "")
    assert state.rows() == rows


async def test_a_row_that_sql_refuses_keeps_none_of_the_others(
    state: State, caplog: pytest.LogCaptureFixture
) -> None:
    moved = state.start()
    rows = [a_row() for _ in range(80)]
    rows[79].tenant = None  # type: ignore[assignment]
    for row in rows:
        moved.journal.close(row)
    await moved.journal.synced()
    eventually(lambda: moved.lag == 0)
    assert (moved.refused, moved.trouble) == (1, "")
    assert state.rows() == rows[:79]
    assert hourly(state.engine) == added_up(state.rows())
    assert rows[79].op in caplog.text, "it is in the log whole"


def test_columns_stand_in_the_order_of_the_values() -> None:
    assert [column.name for column in ledger.columns] == ["id", *COLUMNS, "detail"]


def test_a_batch_with_known_rows_adds_only_the_others(state: State) -> None:
    """More of them than are looked up at once, and one of them twice in the batch."""
    insert = _Insert(state.engine)
    known = [a_row() for _ in range(KNOWN_ROWS + 1)]
    insert.rows([to_values(row) for row in known])
    fresh = [a_row(tenant="new") for _ in range(300)]
    insert.rows([to_values(row) for row in (*fresh, *known, fresh[0])])
    assert state.rows() == known + fresh
    assert hourly(state.engine) == added_up(known + fresh)


def test_no_row_is_counted_twice_in_sql(state: State) -> None:
    insert = _Insert(state.engine)
    row = to_values(a_row())
    insert.rows([row])
    insert.rows([row])
    with state.engine.connect() as connection:
        assert connection.execute(select(func.count()).select_from(ledger)).scalar_one() == 1
