"""Who may use a state directory, and what becomes of the journal of one who is gone."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from proxy import state_lock
from proxy.journal import Journal, JournalLockedError
from proxy.ledger import Ledger
from proxy.state_lock import adopt_when_left, lock_state, open_journal, other_journals
from proxy.tasks import Tasks
from tests.proxy.rows import PRICES, a_row, empty_database
from tests.proxy.test_ledger import added_up, hourly, rows_of


def test_the_lock_passes_with_its_open_file(tmp_path: Path) -> None:
    first = lock_state(tmp_path)
    with pytest.raises(JournalLockedError, match="in use by another tidegate"):
        lock_state(tmp_path)
    second = os.dup(first)  # as SCM_RIGHTS does
    os.close(first)
    with pytest.raises(JournalLockedError):
        lock_state(tmp_path)
    os.close(second)
    os.close(lock_state(tmp_path))


def test_each_process_has_a_journal_of_its_own(tmp_path: Path) -> None:
    first, second, third = (open_journal(tmp_path) for _ in range(3))
    folder = tmp_path / "journal"
    assert [journal.directory for journal in (first, second, third)] == [folder, folder / "2", folder / "3"]
    assert len({journal.instance for journal in (first, second, third)}) == 1
    assert other_journals(tmp_path, second) == [folder, folder / "3"]
    second.release()
    fourth = open_journal(tmp_path)
    assert fourth.directory == folder / "2"
    for journal in (first, third, fourth):
        journal.release()


async def test_what_another_process_still_writes_is_left_until_it_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_lock, "LOOK_S", 0)
    loop = asyncio.get_running_loop()
    engine = empty_database(tmp_path)
    writer = open_journal(tmp_path)
    writer.start(loop, lambda rows: None, print)
    finished, running = a_row(), a_row()
    writer.open(running)
    writer.close(finished)
    await writer.synced()

    ledger = Ledger(engine, open_journal(tmp_path), PRICES)
    ledger.start(loop, print)
    assert ledger.adopt(writer.directory) is None
    assert rows_of(engine) == []
    watching = Tasks().spawn(adopt_when_left(ledger, [writer.directory]), "watch")
    writer.stop()
    assert ledger.adopt(writer.directory) is None
    writer.release()
    async with asyncio.timeout(20):
        await watching
    found = rows_of(engine)
    assert sorted((row.op, row.outcome) for row in found) == sorted(
        [(finished.op, "ok"), (running.op, "lost")]
    )
    assert hourly(engine) == added_up(found)
    again = ledger.adopt(writer.directory)
    assert again is not None
    assert (again.rows, again.lost) == (0, 0)
    await asyncio.to_thread(ledger.stop)
    engine.dispose()


async def test_a_journal_that_cannot_be_read_does_not_keep_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(state_lock, "LOOK_S", 0)
    engine = empty_database(tmp_path)
    ledger = Ledger(engine, Journal(tmp_path / "own"), PRICES)
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "00000001.journal").write_bytes(b"\xf1TJ9")  # of a newer version
    ended = asyncio.Event()
    tasks = Tasks()
    tasks.spawn(adopt_when_left(ledger, [bad, tmp_path / "good"], [ended.set]), "watch")
    async with asyncio.timeout(20):
        await ended.wait()
    await tasks.cancel_all()
    assert caplog.text.count("cannot be taken over now") == 1
    assert (bad / "00000001.journal").exists()
    assert (tmp_path / "good" / "lock").exists()
    ledger.journal.release()
    engine.dispose()


async def test_what_cannot_be_taken_now_is_taken_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(state_lock, "LOOK_S", 0)
    engine = empty_database(tmp_path)
    writer = open_journal(tmp_path)
    writer.start(asyncio.get_running_loop(), lambda rows: None, print)
    writer.close(a_row())
    await writer.synced()
    writer.stop()
    writer.release()
    ledger = Ledger(engine, Journal(tmp_path / "own"), PRICES)
    adopt, times = ledger.adopt, iter(range(3))

    def away(folder: Path) -> object:
        if next(times, None) is not None:
            raise OSError("the database is away")
        return adopt(folder)

    monkeypatch.setattr(ledger, "adopt", away)
    async with asyncio.timeout(20):
        await adopt_when_left(ledger, [writer.directory])
    assert len(rows_of(engine)) == 1
    assert caplog.text.count("it is tried again") == 1
    ledger.journal.release()
    engine.dispose()
