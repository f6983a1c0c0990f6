"""What a crash must not lose: an append-only log of requests in flight and of finished rows.

The event loop only appends to a queue in memory: `open` before a request is dispatched, `progress` every half
second of a stream, `close` with the finished row. One thread takes what has gathered for 20 ms, writes it to
the current segment (`segments.py`) and syncs it; then the closed rows go on to the ledger. Nothing is written
on the loop: a write beside a sync of the same file waits for as long as the sync. While requests come, the thread
looks every 20 ms on its own; only after a fifth of a second without any must the loop wake it.

What is settled within one such moment leaves less behind: a request that opened and closed in it is written
once, and of several figures of a stream the last one.

A segment is deleted when every row closed in it is in the ledger. Requests that are still open when the next
one begins are written into that one again, so no segment is kept for the sake of a long stream.

A segment that cannot be begun, for want of file descriptors, memory or room, is no failure: the present one
grows beyond its size until the next one can be made.

A sync that fails is final, and so is a write that fails for any other reason than a full disk. The kernel may
have dropped the pages it could not write, and would call the next sync a success
(https://lwn.net/Articles/752063/), so it is never tried again: `failed` says why, new requests are to be
refused, rows still go to the ledger, and nothing is called durable any more.

A write that fails because the disk (or a quota) is full has lost nothing: what it was to write is still in
memory. The journal then goes over to its reserve, a segment whose room was taken at the start, for the sake of
the requests that run: they are closed durably. New ones are refused all the same. From then on no further
segment is given up: the next start reads them all.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TypeAlias, TypeVar

import orjson

from proxy.records import Head, Row, Values, plain, to_head, to_values
from proxy.segments import (
    RESERVE,
    Disk,
    JournalError,
    Segment,
    frame,
    list_segments,
    segment_number,
    segment_path,
    sync_directory,
)

log = logging.getLogger("tidegate")

RESERVE_BYTES = 8 * 1024 * 1024
"""Enough for the ends of ten thousand requests, or nearly: a row takes half a kilobyte to one."""
FULL = (errno.ENOSPC, errno.EDQUOT)
FRAME_RECORDS = 64
"""Records to a frame: encoding them holds the interpreter for about 0.1 ms, writing them lets the loop run."""
QUIET_STEPS = 10
"""Intervals without a record before the thread sleeps until it is woken."""

Progress: TypeAlias = tuple[str, str, int, int, int, str]
"""Operation id, backend, prompt, cached and completion tokens, source."""
Item: TypeAlias = Row | tuple[Row] | Progress | asyncio.Future[None]
"""What the loop appends: a closed row, a row to open, progress, a wait for the sync."""
T = TypeVar("T")


class JournalLockedError(JournalError):
    """Another process writes this journal."""


class Journal:
    """Appended to by the event loop (`open`, `progress`, `close`: well under 0.5 µs a call)."""

    def __init__(
        self,
        directory: Path,
        *,
        sync_interval_s: float = 0.02,
        segment_bytes: int = 16 * 1024 * 1024,
        reserve_bytes: int = RESERVE_BYTES,
        disk: Disk | None = None,
    ) -> None:
        """Lock `directory`, made if missing. Raises JournalLockedError, OSError."""
        self.directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock_handle, self.instance = _lock(directory)
        self.failed = ""
        """Why new requests are to be refused; empty while all is well."""
        self.ended = False
        """Whether nothing is written any more: what is appended from then on is durable nowhere."""
        self.syncs = 0
        self.written_bytes = 0
        self._sync_interval_s = sync_interval_s
        self._segment_bytes = segment_bytes
        self._reserve_bytes = reserve_bytes
        self._reserve: Segment | None = None
        """Until it is needed."""
        self._disk = disk or Disk()
        self._segment: Segment | None = None
        self._live: dict[str, Row] = {}
        self._last: dict[str, Progress] = {}
        self._waiting: list[asyncio.Future[None]] = []
        self._delivered = 0
        self._cramped = False
        """Whether the last attempt to begin a segment failed."""
        self._rotated: list[Path] = []
        """Full segments, until what is still open has been written again and synced."""
        self._retired: deque[tuple[Path, int]] = deque()
        """Full segments that may be deleted once so many delivered rows are in the ledger."""
        self._retired_lock = threading.Lock()
        self._settled = 0
        self._kept = False
        """Whether the last attempt to delete a segment failed."""

        self._queue: deque[Item] = deque()
        self._append = self._queue.append
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._idle = False
        self._urgent = False
        self._stopping = False
        self._worker: threading.Thread | None = None

    # On the event loop

    def open(self, row: Row) -> None:
        """A request is about to be dispatched to `row.backend`; call again when it moves to another one.

        The same object is closed later. It is read within 20 ms by another thread: what it says by then is
        what a crash would leave of it.
        """
        self._append((row,))
        if self._idle:
            self._ring()

    def progress(
        self, op: str, backend: str, prompt: int, cached: int, completion: int, source: str = "reported"
    ) -> None:
        """Tokens so far (totals, not increments) of an open request on the backend it is on now."""
        self._append((op, backend, prompt, cached, completion, source))
        if self._idle:
            self._ring()

    def close(self, row: Row) -> None:
        """A request has ended, or was refused without being opened. The row must not change any more."""
        self._append(row)
        if self._idle:
            self._ring()

    async def synced(self) -> None:
        """Return when everything appended so far is durable (`durability: strict`). Raises JournalError."""
        if self.failed or self._stopping or self._worker is None:
            raise JournalError(self.failed or "the journal is not running")
        future = asyncio.get_running_loop().create_future()
        self._append(future)
        self._urgent = True
        self._ring()
        await future

    def _ring(self) -> None:
        """Wake the thread. A ring too many makes it write early, no more."""
        self._idle = False
        self._bell.put(None)

    # Beginning and end, from any thread

    def start(
        self,
        loop: asyncio.AbstractEventLoop,
        deliver: Callable[[list[Values]], None],
        on_failed: Callable[[str], None],
    ) -> None:
        """Begin a segment and the thread. Raises OSError.

        `deliver` gets closed rows, in the thread, once they are durable (or the journal has failed). It must
        not raise. `on_failed` runs on the loop, once, with the reason.
        """
        last = max(map(segment_number, list_segments(self.directory)), default=0)
        self._segment = Segment(segment_path(self.directory, last + 1), self._segment_bytes, self._disk)
        self._make_reserve()
        self._loop = loop
        self._deliver = deliver
        self._on_failed = on_failed
        self._worker = threading.Thread(target=self._run, name="tidegate-journal", daemon=True)
        self._worker.start()

    def settled(self, count: int) -> None:
        """The first `count` rows delivered since start are in the ledger: what only held them is deleted.

        A file that cannot be deleted now is deleted later: the ledger skips the rows that it has.
        """
        with self._retired_lock:
            self._settled = count
            while self._retired and self._retired[0][1] <= count:
                if not self._delete(self._retired[0][0]):
                    return
                self._retired.popleft()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Write, sync and deliver what was appended, end the thread. Blocks for a sync or two.

        `timeout_s` is for a disk that hangs: the thread is then left to it, and the journal has failed.
        """
        if self._worker is not None:
            self._stopping = True
            self._ring()
            self._worker.join(timeout_s)
            if self._worker.is_alive():
                self._fail(f"the journal's disk did not answer for {timeout_s:g} s")
                self._deliver_unwritten()

    def release(self) -> None:
        """After `stop`: delete what the ledger has, and let other processes in."""
        if self._segment is not None:
            self._segment.close()
            if self._settled == self._delivered and not self._live and not self.failed:
                self._delete(self._segment.path)
            self._segment = None
        if self._reserve is not None:
            self._reserve.close()
            self._delete(self._reserve.path)
            self._reserve = None
        if self._lock_handle >= 0:
            os.close(self._lock_handle)
            self._lock_handle = -1

    def _deliver_unwritten(self) -> None:
        """Closed rows that the thread, which hangs, has not taken yet: the ledger may still take them."""
        rows: list[Values] = []
        while self._queue:
            item = self._queue.popleft()
            if type(item) is Row:
                item.instance = self.instance
                rows.append(to_values(item))
        if rows:
            self._delivered += len(rows)
            self._deliver(rows)

    # In the thread

    def _run(self) -> None:
        while self._wait():
            self._urgent = False
            try:
                self._commit()
            except Exception as error:
                log.exception("journal")
                self._fail(f"journal: {error!r}")
            if self._waiting:
                self._call(self._answer, self._waiting)
                self._waiting = []

    def _wait(self) -> bool:
        """Block until something was appended and the interval is over. False: stopped, and nothing is left."""
        steps = QUIET_STEPS
        while True:
            if not self._urgent and not self._stopping:
                try:
                    self._bell.get(timeout=self._sync_interval_s)
                except Empty:
                    pass
            if self._queue:
                return True
            if self._stopping:
                return False
            self._urgent = False  # who waits for a sync rings after setting it: that is not lost
            steps -= 1
            if steps <= 0:
                # The loop appends first and looks at `_idle` then; here it is the other way round.
                self._idle = True
                if not self._queue and not self._stopping:
                    self._bell.get()
                self._idle = False

    def _commit(self) -> None:
        opened, progress, closed = self._take()
        frames: list[bytes] = []
        delivered: list[Values] = []
        for heads, figures, rows in _frames(opened, progress, closed):
            values = list(map(to_values, rows))
            frames.append(_encode(list(map(to_head, heads)), figures, values))
            delivered += values
        if frames:
            self._write(b"".join(frames))
        self._delivered += len(delivered)
        if frames:
            self._sync()
        if delivered:
            self._deliver(delivered)

    def _take(self) -> tuple[list[Row], list[Progress], list[Row]]:
        """What the queue holds now, less what it makes superfluous itself."""
        live, last, instance = self._live, self._last, self.instance
        popleft = self._queue.popleft
        opened: dict[str, Row] = {}
        progress: dict[str, Progress] = {}
        closed: list[Row] = []
        for _ in range(len(self._queue)):
            item = popleft()
            if type(item) is Row:
                item.instance = instance
                closed.append(item)
                op = item.op
                if op in live:
                    del live[op]
                    opened.pop(op, None)
                    if op in last:
                        del last[op]
                        progress.pop(op, None)
            elif type(item) is not tuple:
                self._waiting.append(item)  # type: ignore[arg-type]
            elif len(item) == 1:
                row = item[0]
                row.instance = instance
                opened[row.op] = live[row.op] = row
            elif item[0] in live:
                progress[item[0]] = last[item[0]] = item
        return list(opened.values()), list(progress.values()), closed

    def _write(self, data: bytes) -> None:
        if self.ended or self._segment is None:
            return
        try:
            if not self.failed and self._segment.written + len(data) > self._segment.size:
                self._rotate(len(data))
            if not self.ended:
                self._segment.write(data)
        except OSError as error:
            reason = f"writing the journal failed: {error}"
            if error.errno in FULL and self._reserve is not None:
                self._use_reserve(reason, self._reserve, data)
            else:
                self._fail(reason)
        self.written_bytes += len(data)

    def _make_reserve(self) -> None:
        """Take the room for it, if there is any. It is read with the other segments, whatever is in it."""
        try:
            self._reserve = Segment(self.directory / RESERVE, self._reserve_bytes, self._disk)
        except OSError as error:
            log.warning("journal: no room can be reserved for the day on which the disk is full: %s", error)

    def _use_reserve(self, reason: str, reserve: Segment, data: bytes) -> None:
        """Go on in the reserve, beginning with what could not be written."""
        full, self._segment, self._reserve = self._segment, reserve, None
        assert full is not None
        try:
            full.cut()  # half a frame: a replay would call it damage, though nothing of it is missing
        except OSError:
            pass
        full.close()
        self._refuse(f"{reason}; new requests are refused, what runs is still recorded", reason)
        try:
            reserve.write(data)
        except OSError as error:
            self._fail(f"writing the journal's reserve failed: {error}")

    def _rotate(self, wanted: int) -> None:
        """Begin the next segment with what is still open, or go on in this one if that cannot be done now.

        Raises OSError when what is open cannot be written.
        """
        old = self._segment
        assert old is not None
        try:
            old.sync()
        except OSError as error:
            self._fail(f"syncing the journal failed: {error}")
            return
        try:
            live, last = list(self._live.values()), list(self._last.values())
            frames = [
                _encode(list(map(to_head, heads)), figures, [])
                for heads, figures, _ in _frames(live, last, [])
            ]
            # At least half of a segment is for what is new, however much is open.
            size = max(self._segment_bytes, 2 * sum(map(len, frames)), wanted)
            number = segment_number(old.path) + 1
            segment = Segment(segment_path(self.directory, number), size, self._disk)
        except (OSError, MemoryError) as error:
            if not self._cramped:
                self._cramped = True
                log.error("journal: no new segment can be begun, %s grows instead: %r", old.path, error)
            return
        self._cramped = False
        self._segment = segment
        old.close()
        self._rotated.append(old.path)
        for data in frames:
            segment.write(data)
        if self._reserve is None:
            self._make_reserve()

    def _sync(self) -> None:
        if self.ended or self._segment is None:
            return
        try:
            self._segment.sync()
        except OSError as error:
            self._fail(f"syncing the journal failed: {error}")
            return
        self.syncs += 1
        if self._rotated and not self.failed:  # what is open may not have been written again
            with self._retired_lock:
                self._retired += [(path, self._delivered) for path in self._rotated]
            self._rotated.clear()

    def _fail(self, reason: str) -> None:
        if not self.ended:
            self.ended = True
            self._refuse(f"{reason}; new requests are refused, what runs is not durable", reason)

    def _refuse(self, words: str, reason: str) -> None:
        """`words` go into the log, and the loop hears the first reason."""
        log.critical("%s", words)
        if not self.failed:
            self.failed = reason
            self._call(self._on_failed, reason)

    def _delete(self, path: Path) -> bool:
        """False: it cannot be deleted now, which is told once."""
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            if not self._kept:
                self._kept = True
                log.error("journal: %s cannot be deleted, it is tried again: %s", path, error)
            return False
        self._kept = False
        return True

    def _answer(self, waiting: list[asyncio.Future[None]]) -> None:
        for future in waiting:
            if future.done():
                continue
            if self.failed:
                future.set_exception(JournalError(self.failed))
            else:
                future.set_result(None)

    def _call(self, function: Callable[[T], None], argument: T) -> None:
        try:
            self._loop.call_soon_threadsafe(function, argument)
        except RuntimeError:
            pass  # the loop is closed: nobody is left to tell


def _lock(directory: Path) -> tuple[int, str]:
    """Keep other processes out for as long as the handle is open; the file holds the instance id."""
    path = directory / "lock"
    handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        instance = os.pread(handle, 64, 0).decode("ascii", "replace").strip()
        if not instance:
            instance = secrets.token_hex(4)
            os.pwrite(handle, f"{instance}\n".encode(), 0)
            os.fsync(handle)
            sync_directory(directory)
    except BlockingIOError:
        os.close(handle)
        raise JournalLockedError(
            f"{directory} is in use by another tidegate; give this one a state directory of its own"
        ) from None
    except OSError:
        os.close(handle)
        raise
    return handle, instance


def _frames(
    opened: list[Row], progress: list[Progress], closed: list[Row]
) -> Iterator[tuple[list[Row], list[Progress], list[Row]]]:
    """The same in order, cut into parts of at most `FRAME_RECORDS`."""
    ends = (len(opened), len(opened) + len(progress), len(opened) + len(progress) + len(closed))
    for start in range(0, ends[2], FRAME_RECORDS):
        stop = start + FRAME_RECORDS
        yield (
            opened[start:stop],
            progress[max(start - ends[0], 0) : max(stop - ends[0], 0)],
            closed[max(start - ends[1], 0) : max(stop - ends[1], 0)],
        )


def _encode(heads: list[Head], figures: list[Progress], closed: list[Values]) -> bytes:
    try:
        return frame(orjson.dumps((heads, figures, closed)))
    except TypeError:
        # A foreign type or broken Unicode in some row must not take the others with it.
        closed[:] = [tuple(plain(values)) for values in closed]
        return frame(orjson.dumps((plain(heads), plain(figures), closed)))
