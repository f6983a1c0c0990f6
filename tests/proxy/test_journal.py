from __future__ import annotations

import asyncio
import errno
import os
import resource
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest

import proxy.journal
from proxy.journal import RESERVE_BYTES, Journal, JournalError, JournalLockedError
from proxy.records import LOST, Row, Values, from_values
from proxy.replay import Replayed, replay
from proxy.segments import Disk, frame, read_segment
from tests.proxy.rows import PRICES, a_row, eventually, segments


class Delivered:
    """Where a journal's closed rows end up in these tests."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.failures: list[str] = []

    def __call__(self, rows: list[Values]) -> None:
        self.rows += map(from_values, rows)

    @property
    def ops(self) -> list[str]:
        return [row.op for row in self.rows]


class FailingDisk(Disk):
    """Fails one call and remembers what was done after it."""

    def __init__(self, call: str, code: int, after: int = 0) -> None:
        self.call = call
        self.code = code
        self.after = after
        self.failed = False
        self.later: list[str] = []

    def _count(self, call: str) -> None:
        if self.failed:
            self.later.append(call)
        if call == self.call:
            self.after -= 1
            if self.after < 0:
                self.failed = True
                raise OSError(self.code, os.strerror(self.code))

    def create(self, path: Path, size: int) -> int:
        self._count("create")
        return super().create(path, size)

    def write(self, handle: int, data: bytes) -> None:
        try:
            self._count("write")
        except OSError:
            os.write(handle, data[: len(data) // 2])  # as a full disk does
            raise
        super().write(handle, data)

    def sync(self, handle: int) -> None:
        self._count("sync")
        super().sync(handle)


@contextmanager
def running(journal: Journal, delivered: Delivered) -> Iterator[Journal]:
    journal.start(asyncio.get_running_loop(), delivered, delivered.failures.append)
    try:
        yield journal
    finally:
        journal.stop()
        journal.release()


def replayed_from(directory: Path) -> tuple[list[Row], Replayed]:
    delivered = Delivered()
    return delivered.rows, replay(directory, delivered, PRICES)


async def test_closed_rows_are_delivered_in_order(tmp_path: Path) -> None:
    delivered = Delivered()
    with running(Journal(tmp_path), delivered) as journal:
        rows = [a_row() for _ in range(300)]
        for row in rows:
            journal.open(row)
            journal.progress(row.op, "nanjing", 800, 512, 5)
            journal.close(row)
        await journal.synced()
        assert delivered.rows == rows
        assert {row.instance for row in delivered.rows} == {journal.instance}
    assert delivered.failures == []


async def test_what_the_ledger_never_took_is_replayed_once(tmp_path: Path) -> None:
    delivered = Delivered()
    rows = [a_row() for _ in range(200)]
    with running(Journal(tmp_path), delivered) as journal:
        for row in rows:
            journal.close(row)
    found, replayed = replayed_from(tmp_path)
    assert found == rows
    assert replayed == Replayed(rows=200)
    assert replayed_from(tmp_path) == ([], Replayed())


async def test_a_clean_stop_leaves_nothing(tmp_path: Path) -> None:
    delivered = Delivered()
    journal = Journal(tmp_path)
    journal.start(asyncio.get_running_loop(), delivered, delivered.failures.append)
    journal.open(row := a_row())
    journal.close(row)
    journal.stop()
    journal.settled(len(delivered.rows))
    journal.release()
    assert segments(tmp_path) == []


@pytest.mark.parametrize(
    "payload",
    [
        b"not JSON",
        b"7",
        b"[[],[]]",
        b'{"a":1,"b":2,"c":3}',
        b'[["head"],[],[]]',
        b"[[[]],[],[]]",
        b'[[["op","i","yesterday"]],[],[]]',
        b'[[[["op"],"i"]],[],[]]',
        b'[[["op",{}]],[],[]]',
        b'[[],[["op","nj",1,2,"3","reported"]],[]]',
        b'[[],[],[["op","instance"]]]',
        b"[[],[],[null]]",
        b"[[],[],[[" + b"7," * 20 + b"7]]]",
    ],
)
def test_a_frame_that_somebody_else_wrote_is_an_error_and_stays(tmp_path: Path, payload: bytes) -> None:
    path = tmp_path / "00000001.journal"
    path.write_bytes(frame(payload))
    with pytest.raises(JournalError, match="a frame holds no records"):
        replay(tmp_path, Delivered(), PRICES)
    assert path.exists()


async def test_the_replay_deletes_nothing_when_the_ledger_fails(tmp_path: Path) -> None:
    with running(Journal(tmp_path), Delivered()) as journal:
        journal.close(a_row())

    def take(rows: list[Values]) -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        replay(tmp_path, take, PRICES)
    assert len(replayed_from(tmp_path)[0]) == 1


async def test_an_open_request_is_lost_with_its_last_progress(tmp_path: Path) -> None:
    with running(Journal(tmp_path), Delivered()) as journal:
        row = a_row(prompt_tokens=0, cached_tokens=0, completion_tokens=0, cost_nano=0, currency="")
        journal.open(row)
        journal.progress(row.op, "nanjing", 800, 512, 5)
        await journal.synced()
        journal.progress(row.op, "nanjing", 800, 512, 77, "counted")
        await journal.synced()
    (lost,), replayed = replayed_from(tmp_path)
    assert (replayed.rows, replayed.lost) == (0, 1)
    assert (lost.op, lost.outcome, lost.tenant, lost.backend, lost.site) == (
        row.op,
        LOST,
        "acme",
        "nanjing",
        "nj",
    )
    assert (lost.prompt_tokens, lost.cached_tokens, lost.completion_tokens) == (800, 512, 77)
    assert lost.usage_source == "counted"
    assert (lost.cost_nano, lost.currency) == PRICES.cost("nanjing", "SmolLM2", 800, 512, 77)


async def test_an_open_request_without_progress_is_lost_without_tokens(tmp_path: Path) -> None:
    with running(Journal(tmp_path), Delivered()) as journal:
        journal.open(a_row())
    (lost,), _ = replayed_from(tmp_path)
    assert (lost.prompt_tokens, lost.cached_tokens, lost.completion_tokens, lost.cost_nano) == (0, 0, 0, 0)
    assert (lost.outcome, lost.usage_source) == (LOST, "estimated")


async def test_progress_on_another_backend_moves_a_lost_request_there(tmp_path: Path) -> None:
    with running(Journal(tmp_path), Delivered()) as journal:
        journal.open(row := a_row())
        journal.progress(row.op, "elsewhere", 8, 0, 1)
    (lost,), _ = replayed_from(tmp_path)
    assert (lost.backend, lost.site, lost.completion_tokens) == ("elsewhere", "", 1)
    assert (lost.cost_nano, lost.currency) == (0, ""), "nobody said what it costs there"


async def test_a_request_opened_again_is_lost_where_it_was_last(tmp_path: Path) -> None:
    with running(Journal(tmp_path), Delivered()) as journal:
        journal.open(row := a_row(attempts=1))
        await journal.synced()
        row.backend, row.site, row.attempts = "elsewhere", "there", 2
        journal.open(row)
        await journal.synced()
    (lost,), _ = replayed_from(tmp_path)
    assert (lost.backend, lost.site, lost.attempts) == ("elsewhere", "there", 2)


async def test_progress_of_a_request_that_is_not_open_is_ignored(tmp_path: Path) -> None:
    with running(Journal(tmp_path), Delivered()) as journal:
        journal.close(row := a_row())
        journal.progress(row.op, "nanjing", 1, 1, 1)
        journal.progress("nobody", "nanjing", 1, 1, 1)
    found, replayed = replayed_from(tmp_path)
    assert (found, replayed.lost) == ([row], 0)


async def test_segments_rotate_and_are_deleted_when_the_ledger_has_them(tmp_path: Path) -> None:
    delivered = Delivered()
    with running(Journal(tmp_path, segment_bytes=8192), delivered) as journal:
        stays_open = a_row()
        journal.open(stays_open)
        for count in range(40):
            for _ in range(5):
                journal.close(a_row())
            journal.progress(stays_open.op, "nanjing", 800, 512, count)
            await journal.synced()
        assert len(segments(tmp_path)) > 5
        journal.settled(len(delivered.rows) - 1)
        journal.settled(len(delivered.rows))
        assert len(segments(tmp_path)) == 1, "the open request keeps no old segment"
    found, replayed = replayed_from(tmp_path)
    assert replayed.lost == 1
    assert (found[-1].op, found[-1].completion_tokens) == (stays_open.op, 39)


async def test_a_segment_stays_while_one_of_its_rows_is_not_in_the_ledger(tmp_path: Path) -> None:
    delivered = Delivered()
    with running(Journal(tmp_path, segment_bytes=8192), delivered) as journal:
        for _ in range(100):
            journal.close(a_row())
            await journal.synced()
        for settled in range(0, 101, 10):
            journal.settled(settled)
            kept = {from_values(values).op for path in segments(tmp_path) for values in records_in(path)[2]}
            assert set(delivered.ops[settled:]) <= kept
        assert len(segments(tmp_path)) == 1


def records_in(path: Path) -> list[list[Any]]:
    """Opened, progress and closed records of a segment."""
    found: list[list[Any]] = [[], [], []]
    for payload in read_segment(path):
        assert isinstance(payload, bytes)
        for kind, records in zip(found, orjson.loads(payload), strict=True):
            kind += records
    return found


async def test_what_opens_and_closes_in_one_moment_is_written_once(tmp_path: Path) -> None:
    with running(Journal(tmp_path, sync_interval_s=60), Delivered()) as journal:
        journal.open(row := a_row())
        journal.progress(row.op, "nanjing", 1, 1, 1)
        journal.close(row)
        await journal.synced()
        opened, progress, closed = records_in(segments(tmp_path)[0])
        assert (len(opened), len(progress), len(closed)) == (0, 0, 1)


async def test_the_last_of_several_figures_is_written(tmp_path: Path) -> None:
    with running(Journal(tmp_path, sync_interval_s=60), Delivered()) as journal:
        journal.open(row := a_row())
        for tokens in range(5):
            journal.progress(row.op, "nanjing", 1, 1, tokens)
        await journal.synced()
        _, progress, _ = records_in(segments(tmp_path)[0])
        assert progress == [[row.op, "nanjing", 1, 1, 4, "reported"]]


async def test_a_new_segment_begins_with_what_is_open_and_nothing_else(tmp_path: Path) -> None:
    with running(Journal(tmp_path, segment_bytes=16_384), Delivered()) as journal:
        rows = [a_row() for _ in range(6)]
        for row in rows:
            journal.open(row)
            await journal.synced()
            journal.progress(row.op, "nanjing", 800, 512, 5)
            await journal.synced()
        for row in rows[:-1]:
            journal.close(row)
        await journal.synced()
        while len(segments(tmp_path)) < 2:
            journal.close(a_row())
            await journal.synced()
        opened, progress, _ = records_in(segments(tmp_path)[1])
        assert [head[0] for head in opened] == [rows[-1].op]
        assert progress == [[rows[-1].op, "nanjing", 800, 512, 5, "reported"]]


async def test_more_open_requests_than_a_segment_holds(tmp_path: Path) -> None:
    delivered = Delivered()
    with running(Journal(tmp_path, segment_bytes=4096), delivered) as journal:
        opened = [a_row() for _ in range(100)]
        for row in opened:
            journal.open(row)
        await journal.synced()
        for _ in range(50):
            journal.close(a_row())
            await journal.synced()
        count = len(segments(tmp_path))
        assert count < 25, "it does not begin a segment for every record"
    _, replayed = replayed_from(tmp_path)
    assert (replayed.rows, replayed.lost) == (50, 100)


@pytest.mark.parametrize(
    ("call", "code", "after"),
    [
        ("sync", errno.EIO, 1),  # that of the full segment
        ("sync", errno.ENOSPC, 1),  # a full disk is no excuse for a sync
        ("write", errno.EIO, 1),
        ("sync", errno.EIO, 2),  # that of the next one
    ],
)
async def test_a_failure_is_final(tmp_path: Path, call: str, code: int, after: int) -> None:
    delivered = Delivered()
    disk = FailingDisk(call, code, after)
    journal = Journal(tmp_path, segment_bytes=2048, disk=disk)
    with running(journal, delivered):
        journal.close(acknowledged := a_row())
        await journal.synced()
        assert journal.failed == ""
        for _ in range(10):  # enough to need another segment
            journal.close(a_row())
        with pytest.raises(JournalError, match=os.strerror(code)):
            await journal.synced()
        assert os.strerror(code) in journal.failed
        with pytest.raises(JournalError):
            await journal.synced()
        journal.close(late := a_row())
        eventually(lambda: late.op in delivered.ops)
        assert len(delivered.rows) == 12, "rows still go to the ledger"
        journal.settled(12)
        assert segments(tmp_path), "what failed is not deleted"
        await asyncio.sleep(0)
    assert delivered.failures == [journal.failed], "the loop is told once"
    assert disk.later == [], "nothing is written or synced after a failure"
    assert acknowledged.op in [row.op for row in replayed_from(tmp_path)[0]]


class FullDisk(Disk):
    """Takes nothing any more once it is `full`, but what goes where its room was taken before."""

    def __init__(self) -> None:
        self.full = False
        self.room: dict[int, int] = {}

    def create(self, path: Path, size: int) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        handle = super().create(path, size)
        self.room[handle] = size
        return handle

    def write(self, handle: int, data: bytes) -> None:
        left = self.room[handle] - os.lseek(handle, 0, os.SEEK_CUR)
        if self.full and len(data) > left:
            os.write(handle, data[: max(left, 0)])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(handle, data)


async def test_what_runs_when_the_disk_fills_is_closed_durably(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    delivered = Delivered()
    disk = FullDisk()
    journal = Journal(tmp_path, segment_bytes=2048, reserve_bytes=65_536, disk=disk)
    with running(journal, delivered):
        opened = [a_row(completion_tokens=900) for _ in range(8)]
        for row in opened:
            journal.open(row)
            await journal.synced()
        disk.full = True
        while not journal.failed:
            journal.close(a_row())
            eventually(lambda: not journal._queue)
        assert "No space left on device" in journal.failed
        assert not journal.ended
        with pytest.raises(JournalError):
            await journal.synced()
        for row in opened[:-1]:
            journal.close(row)
        journal.progress(opened[-1].op, "nanjing", 800, 512, 77)
        eventually(lambda: opened[-2].op in delivered.ops)
        journal.settled(len(delivered.rows))
        await asyncio.sleep(0)
    assert delivered.failures == [journal.failed]
    assert "what runs is still recorded" in caplog.text
    found, replayed = replayed_from(tmp_path)
    assert replayed.damages == [], "the half frame was taken off"
    by_op = {row.op: row for row in found}
    assert set(delivered.ops) <= set(by_op)
    assert [by_op[row.op] for row in opened[:-1]] == opened[:-1]
    lost = by_op[opened[-1].op]
    assert (lost.outcome, lost.completion_tokens, replayed.lost) == (LOST, 77, 1)
    assert os.listdir(tmp_path) == ["lock"]


async def test_a_segment_is_kept_if_what_runs_could_not_be_written_again(tmp_path: Path) -> None:
    class NoRoomForTheNext(FullDisk):
        def create(self, path: Path, size: int) -> int:
            handle = super().create(path, size)
            if path.name not in ("reserve", first.name):
                self.full, self.room[handle] = True, 0
            return handle

    delivered = Delivered()
    disk = NoRoomForTheNext()
    with tempfile.TemporaryDirectory() as elsewhere, running(Journal(Path(elsewhere)), Delivered()):
        first = segments(Path(elsewhere))[0]
    journal = Journal(tmp_path, segment_bytes=2048, reserve_bytes=65_536, disk=disk)
    with running(journal, delivered):
        journal.open(runs := a_row(completion_tokens=0))
        await journal.synced()
        while not journal.failed:
            journal.close(a_row())
            eventually(lambda: not journal._queue)
        journal.settled(len(delivered.rows))
        kept = tmp_path / first.name
        journal.close(a_row())
        eventually(lambda: not journal._queue)
        journal.settled(len(delivered.rows))
        assert kept.exists()
        await asyncio.sleep(0)
    assert runs.op in [row.op for row in replayed_from(tmp_path)[0]]


def has(delivered: Delivered, count: int) -> bool:
    return len(delivered.rows) == count


async def test_a_reserve_that_is_used_up_is_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    delivered = Delivered()
    disk = FullDisk()
    journal = Journal(tmp_path, segment_bytes=2048, reserve_bytes=4096, disk=disk)
    with running(journal, delivered):
        disk.full = True
        rows = [a_row() for _ in range(20)]
        for number, row in enumerate(rows, 1):
            journal.close(row)
            eventually(partial(has, delivered, number))
        assert journal.ended
        await asyncio.sleep(0)
    assert delivered.failures == [journal.failed], "the loop is told once"
    assert caplog.text.count("what runs is still recorded") == caplog.text.count("is not durable") == 1
    found, _ = replayed_from(tmp_path)
    kept = [row.op for row in found]
    assert 3 < len(kept) < 20
    assert kept == [row.op for row in rows[: len(kept)]]


async def test_a_reserve_there_was_no_room_for_is_made_when_there_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class CrampedDisk(Disk):
        room = False

        def create(self, path: Path, size: int) -> int:
            if path.name == "reserve" and not self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().create(path, size)

    disk = CrampedDisk()
    reserve = tmp_path / "reserve"
    with running(Journal(tmp_path, segment_bytes=2048, disk=disk), Delivered()) as journal:
        assert "no room can be reserved" in caplog.text
        disk.room = True
        while len(segments(tmp_path)) < 2:
            assert not reserve.exists()
            journal.close(a_row())
            await journal.synced()
        assert reserve.stat().st_size == RESERVE_BYTES
    assert not reserve.exists()


async def test_rows_that_a_hanging_disk_never_took_go_to_the_ledger(tmp_path: Path) -> None:
    class HangingDisk(Disk):
        def sync(self, handle: int) -> None:
            entered.set()
            proceed.wait(20)

    entered, proceed = threading.Event(), threading.Event()
    delivered = Delivered()
    journal = Journal(tmp_path, sync_interval_s=0, disk=HangingDisk())
    journal.start(asyncio.get_running_loop(), delivered, delivered.failures.append)
    journal.close(a_row())
    await asyncio.to_thread(entered.wait, 20)
    journal.close(late := a_row())
    journal.stop(timeout_s=0.01)
    assert journal.ended
    assert [row.op for row in delivered.rows] == [late.op]
    proceed.set()
    journal.stop()
    journal.release()


async def test_a_segment_that_cannot_be_deleted_is_deleted_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def denied(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    delivered = Delivered()
    with running(Journal(tmp_path, segment_bytes=2048), delivered) as journal:
        while len(segments(tmp_path)) < 4:
            journal.close(a_row())
            await journal.synced()
        with monkeypatch.context() as patched:
            patched.setattr(Path, "unlink", denied)
            journal.settled(len(delivered.rows))
            journal.settled(len(delivered.rows))
        assert len(segments(tmp_path)) == 4
        assert caplog.text.count("cannot be deleted") == 1, "it is told once"
        journal.settled(len(delivered.rows))
        assert len(segments(tmp_path)) == 1


@pytest.mark.parametrize(
    "error",
    [OSError(code, os.strerror(code)) for code in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC)]
    + [MemoryError()],
    ids=repr,
)
async def test_a_segment_that_cannot_be_begun_is_begun_later(
    tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    class CrampedDisk(Disk):
        cramped = False

        def create(self, path: Path, size: int) -> int:
            if self.cramped:
                raise error
            return super().create(path, size)

    async def close(count: int) -> None:
        for _ in range(count):
            journal.close(a_row())
            await journal.synced()

    delivered = Delivered()
    disk = CrampedDisk()
    journal = Journal(tmp_path, segment_bytes=2048, disk=disk)
    with running(journal, delivered):
        journal.open(stays_open := a_row())
        disk.cramped = True
        await close(20)
        assert (journal.failed, delivered.failures) == ("", [])
        assert len(segments(tmp_path)) == 1
        assert segments(tmp_path)[0].stat().st_size > 2048
        kept = tmp_path / "copy"
        kept.mkdir()
        (kept / segments(tmp_path)[0].name).write_bytes(segments(tmp_path)[0].read_bytes())
        found, replayed = replayed_from(kept)
        assert (replayed.rows, replayed.lost, replayed.damages) == (20, 1, []), "all of it was durable"
        assert found[:20] == delivered.rows
        assert len([record for record in caplog.records if record.name == "tidegate"]) == 1, "it is told once"
        disk.cramped = False
        await close(1)
        assert len(segments(tmp_path)) == 2
        journal.settled(21)
        assert len(segments(tmp_path)) == 1
    found, replayed = replayed_from(tmp_path)
    assert (found[-1].op, replayed.lost) == (stays_open.op, 1), "the new segment has what is open"


async def test_a_process_without_file_descriptors_goes_on(tmp_path: Path) -> None:
    """The real thing: not even a temporary descriptor is to be had."""
    delivered = Delivered()
    with running(Journal(tmp_path, segment_bytes=2048), delivered) as journal:
        _, hard = limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
        try:
            for _ in range(20):
                journal.close(a_row())
                await journal.synced()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert len(segments(tmp_path)) == 1
        journal.close(a_row())
        await journal.synced()
        assert len(segments(tmp_path)) == 2
        assert (journal.failed, len(delivered.rows)) == ("", 21)


async def test_the_thread_is_woken_only_after_a_quiet_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rings = []
    with running(Journal(tmp_path, sync_interval_s=0.001), Delivered()) as journal:
        ring = journal._ring
        monkeypatch.setattr(journal, "_ring", lambda: (rings.append(1), ring()))
        monkeypatch.setattr(proxy.journal, "QUIET_STEPS", 10**9)
        await journal.synced()
        for _ in range(5):
            journal.close(a_row())
            eventually(lambda: not journal._queue)
        assert len(rings) == 1, "who waits for a sync does not wait for the next step"
        monkeypatch.setattr(proxy.journal, "QUIET_STEPS", 1)
        journal.close(a_row())
        eventually(lambda: journal._idle)
        journal.close(last := a_row())
        assert len(rings) == 2
        eventually(lambda: journal.syncs >= 7)
        await journal.synced()
    assert last.op in [row.op for row in replayed_from(tmp_path)[0]]


async def test_an_error_that_nobody_expected_is_a_failure_too(tmp_path: Path) -> None:
    class BrokenDisk(Disk):
        def sync(self, handle: int) -> None:
            raise ZeroDivisionError

    delivered = Delivered()
    with running(Journal(tmp_path, disk=BrokenDisk()), delivered) as journal:
        journal.close(a_row())
        with pytest.raises(JournalError, match="ZeroDivisionError"):
            await journal.synced()
        await asyncio.sleep(0)
    assert delivered.failures == [journal.failed]


async def test_a_row_that_cannot_be_encoded_takes_no_other_with_it(tmp_path: Path) -> None:
    delivered = Delivered()
    odd = a_row(tenant="half \ud800 a pair", candidates=[[object()]], reason="\udfff")
    with running(Journal(tmp_path), delivered) as journal:
        journal.open(odd)
        await journal.synced()
        for row in (a_row(), odd, a_row()):
            journal.close(row)
        await journal.synced()
        assert journal.failed == ""
    assert len(delivered.rows) == 3
    found, _ = replayed_from(tmp_path)
    assert [row.tenant for row in found] == ["acme", "half ? a pair", "acme"]
    assert found == delivered.rows


async def test_two_journals_in_one_directory_are_refused(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    with pytest.raises(JournalLockedError, match="state directory of its own"):
        Journal(tmp_path)
    first.release()
    second = Journal(tmp_path)
    assert second.instance == first.instance, "the directory keeps its instance id"
    second.release()
    other = Journal(tmp_path / "other")
    assert other.instance != first.instance
    other.release()


async def test_synced_of_a_journal_that_does_not_run(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(JournalError):
        await journal.synced()
    with running(journal, Delivered()):
        pass
    with pytest.raises(JournalError):
        await journal.synced()


async def test_a_cancelled_wait_harms_nobody(tmp_path: Path) -> None:
    with running(Journal(tmp_path), Delivered()) as journal:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(journal.synced(), timeout=0)
        await journal.synced()


async def test_appending_goes_on_while_a_sync_takes_long(tmp_path: Path) -> None:
    class SlowDisk(Disk):
        def sync(self, handle: int) -> None:
            entered.set()
            proceed.wait(20)
            super().sync(handle)

    entered, proceed = threading.Event(), threading.Event()
    delivered = Delivered()
    with running(Journal(tmp_path, sync_interval_s=0, disk=SlowDisk()), delivered) as journal:
        journal.close(a_row())
        await asyncio.to_thread(entered.wait, 20)
        journal.close(a_row())
        assert delivered.rows == [], "not durable, not delivered"
        proceed.set()
        await journal.synced()
        assert len(delivered.rows) == 2


async def test_only_what_is_new_is_synced(tmp_path: Path) -> None:
    with running(Journal(tmp_path, sync_interval_s=0), Delivered()) as journal:
        journal.close(a_row())
        await journal.synced()
        before = journal.syncs
        await journal.synced()
        await journal.synced()
        assert journal.syncs == before
