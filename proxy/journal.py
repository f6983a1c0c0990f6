"""What a crash must not lose: an append-only log of requests in flight and of finished rows.

The event loop only appends to a queue in memory: `open` before a request is dispatched, `progress` every half
second of a stream, `close` with the finished row. One thread takes what has gathered for 20 ms, writes it to
the current segment (`segments.py`) and syncs it; then the closed rows go on to the ledger. Nothing is written
on the loop: a write beside a sync of the same file waits for as long as the sync.

What is settled within one such moment leaves less behind: a request that opened and closed in it is written
once, and of several figures of a stream the last one.

A segment is deleted when every row closed in it is in the ledger. Requests that are still open when the next
one begins are written into that one again, so no segment is kept for the sake of a long stream.

A write or sync that fails is final. The kernel may have dropped the pages it could not write, and would call
the next sync a success (https://lwn.net/Articles/752063/), so it is never tried again: `failed` says why, new
requests are to be refused, rows still go to the ledger, and nothing is called durable any more.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import orjson

from proxy.prices import Prices
from proxy.records import LOST, Row, Values, from_values, plain, to_values
from proxy.segments import (
    Damage,
    Disk,
    JournalError,
    Segment,
    frame,
    list_segments,
    read_segment,
    segment_number,
    sync_directory,
)

__all__ = ["Journal", "JournalError", "JournalLockedError", "Replayed"]

log = logging.getLogger("tidegate")

FRAME_RECORDS = 64
"""Records to a frame: encoding them holds the interpreter for about 0.1 ms, writing them lets the loop run."""
REPLAY_ROWS = 1024
"""Rows handed over at once in a replay."""

_OPEN, _PROGRESS, _CLOSE, _SYNC = range(4)

Progress: TypeAlias = tuple[str, str, int, int, int, str]
"""Operation id, backend, prompt, cached and completion tokens, source."""

T = TypeVar("T")


class JournalLockedError(JournalError):
    """Another process writes this journal."""


@dataclass(slots=True)
class Replayed:
    """What earlier runs had left in the journal."""

    rows: int = 0
    """Finished rows, those included that the ledger already had."""
    lost: int = 0
    """Requests that were open when the process died."""
    damages: list[Damage] = field(default_factory=list)


class Journal:
    """Appended to by the event loop (`open`, `progress`, `close`: well under 0.5 µs a call)."""

    def __init__(
        self,
        directory: Path,
        *,
        sync_interval_s: float = 0.02,
        segment_bytes: int = 16 * 1024 * 1024,
        disk: Disk | None = None,
    ) -> None:
        """Lock `directory`, made if missing. Raises JournalLockedError, OSError."""
        self.directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock_handle, self.instance = _lock(directory)
        self.failed = ""
        """Why nothing is durable any more; empty while all is well. Refuse new requests when set."""
        self.syncs = 0
        self.written_bytes = 0
        self._sync_interval_s = sync_interval_s
        self._segment_bytes = segment_bytes
        self._disk = disk or Disk()
        self._segment: Segment | None = None
        self._live: dict[str, Row] = {}
        self._last: dict[str, Progress] = {}
        self._delivered = 0
        self._rotated: list[Path] = []
        """Full segments, until what is still open has been written again and synced."""
        self._retired: deque[tuple[Path, int]] = deque()
        """Full segments that may be deleted once so many delivered rows are in the ledger."""
        self._retired_lock = threading.Lock()
        self._settled = 0

        self._queue: deque[tuple[int, Any]] = deque()
        self._append = self._queue.append
        self._bell = threading.Event()
        self._idle = False
        self._urgent = False
        self._stopping = False
        self._thread: threading.Thread | None = None

    # On the event loop

    def open(self, row: Row) -> None:
        """A request is about to be dispatched to `row.backend`; call again when it moves to another one.

        The same object is closed later. It is read within 20 ms by another thread: what it says by then is
        what a crash would leave of it.
        """
        self._append((_OPEN, row))
        if self._idle:
            self._bell.set()

    def progress(
        self, op: str, backend: str, prompt: int, cached: int, completion: int, source: str = "reported"
    ) -> None:
        """Tokens so far (totals, not increments) of an open request on the backend it is on now."""
        self._append((_PROGRESS, (op, backend, prompt, cached, completion, source)))
        if self._idle:
            self._bell.set()

    def close(self, row: Row) -> None:
        """A request has ended, or was refused without being opened. The row must not change any more."""
        self._append((_CLOSE, row))
        if self._idle:
            self._bell.set()

    async def synced(self) -> None:
        """Return when everything appended so far is durable (`durability: strict`). Raises JournalError."""
        if self.failed or self._stopping or self._thread is None:
            raise JournalError(self.failed or "the journal is not running")
        future = asyncio.get_running_loop().create_future()
        self._append((_SYNC, future))
        self._urgent = True
        self._bell.set()
        await future

    # Beginning and end, from any thread

    def replay(self, take: Callable[[list[Values]], None], prices: Prices) -> Replayed:
        """Hand over what earlier runs left, then delete it. Before `start`.

        `take` gets finished rows in order, at most about a thousand at a time, and at last those that were
        lost: opened and never closed, with the tokens last heard of, at today's prices. A row may have been
        taken before. `take` returns when they are durable. Raises JournalError, OSError, whatever `take`
        raises: nothing is deleted then.
        """
        replayed = Replayed()
        live: dict[str, Row] = {}
        rows: list[Values] = []

        def flush() -> None:
            if rows:
                replayed.rows += len(rows)
                take(rows)
                rows.clear()

        segments = list_segments(self.directory)
        for path in segments:
            for payload in read_segment(path):
                if isinstance(payload, Damage):
                    replayed.damages.append(payload)
                    continue
                opened, progress, closed = orjson.loads(payload)
                for values in opened:
                    live[values[0]] = _opened(values)
                for op, *figures in progress:
                    if op in live:
                        _advance(live[op], *figures)
                for values in closed:
                    live.pop(values[0], None)
                    rows.append(tuple(values))
                if len(rows) >= REPLAY_ROWS:
                    flush()
        for row in live.values():
            row.cost_nano, row.currency = prices.cost(
                row.backend, row.served_model, row.prompt_tokens, row.cached_tokens, row.completion_tokens
            )
            rows.append(to_values(row))
        replayed.lost = len(live)
        flush()
        replayed.rows -= replayed.lost
        for path in segments:
            path.unlink()
        sync_directory(self.directory)
        return replayed

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
        self._segment = Segment(self.directory, last + 1, self._segment_bytes, self._disk)
        self._loop = loop
        self._deliver = deliver
        self._on_failed = on_failed
        self._thread = threading.Thread(target=self._run, name="tidegate-journal", daemon=True)
        self._thread.start()

    def settled(self, count: int) -> None:
        """The first `count` rows delivered since start are in the ledger: what only held them is deleted."""
        with self._retired_lock:
            self._settled = count
            while self._retired and self._retired[0][1] <= count:
                path, _ = self._retired.popleft()
                path.unlink(missing_ok=True)

    def stop(self, timeout_s: float = 10.0) -> None:
        """Write, sync and deliver what was appended, end the thread. Blocks for a sync or two.

        `timeout_s` is for a disk that hangs: the thread is then left to it, and the journal has failed.
        """
        if self._thread is not None:
            self._stopping = True
            self._bell.set()
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                self._fail(f"the journal's disk did not answer for {timeout_s:g} s")

    def release(self) -> None:
        """After `stop`: delete what the ledger has, and let other processes in."""
        if self._segment is not None:
            self._segment.close()
            if self._settled == self._delivered and not self._live and not self.failed:
                self._segment.path.unlink(missing_ok=True)
            self._segment = None
        if self._lock_handle >= 0:
            os.close(self._lock_handle)
            self._lock_handle = -1

    # In the thread

    def _run(self) -> None:
        while self._wait():
            self._urgent = False
            try:
                self._commit()
            except Exception as error:
                log.exception("journal")
                self._fail(f"journal: {error!r}")

    def _wait(self) -> bool:
        """Block until something was appended and the interval is over. False: stopped, and nothing is left."""
        if not self._queue:
            if self._stopping:
                return False
            # The loop appends first and looks at `_idle` then; here it is the other way round.
            self._idle = True
            if not self._queue and not self._stopping:
                self._bell.wait()
            self._idle = False
        self._bell.clear()
        if not self._urgent and not self._stopping:
            self._bell.wait(self._sync_interval_s)
        return True

    def _commit(self) -> None:
        opened, progress, closed, waiting = self._take()
        delivered: list[Values] = []
        for rows in _chunks(list(opened.values())):
            self._write([self._values(row) for row in rows], [], [])
        for figures in _chunks(list(progress.values())):
            self._write([], figures, [])
        for rows in _chunks(closed):
            values = [self._values(row) for row in rows]
            self._write([], [], values)
            delivered += values
        self._delivered += len(delivered)
        if opened or progress or closed:
            self._sync()
        if delivered:
            self._deliver(delivered)
        if waiting:
            self._call(self._answer, waiting)

    def _take(self) -> tuple[dict[str, Row], dict[str, Progress], list[Row], list[asyncio.Future[None]]]:
        """What the queue holds now, less what it makes superfluous itself."""
        opened: dict[str, Row] = {}
        progress: dict[str, Progress] = {}
        closed: list[Row] = []
        waiting: list[asyncio.Future[None]] = []
        for _ in range(len(self._queue)):
            kind, item = self._queue.popleft()
            if kind == _PROGRESS:
                if item[0] in self._live:
                    progress[item[0]] = self._last[item[0]] = item
            elif kind == _OPEN:
                opened[item.op] = self._live[item.op] = item
            elif kind == _CLOSE:
                if self._live.pop(item.op, None) is not None:
                    self._last.pop(item.op, None)
                    opened.pop(item.op, None)
                    progress.pop(item.op, None)
                closed.append(item)
            else:
                waiting.append(item)
        return opened, progress, closed, waiting

    def _values(self, row: Row) -> Values:
        row.instance = self.instance
        return to_values(row)

    def _write(self, opened: list[Values], progress: Sequence[Progress], closed: list[Values]) -> None:
        if self.failed or self._segment is None:
            return
        data = _encode(opened, progress, closed)
        try:
            if self._segment.written + len(data) > self._segment.size:
                self._rotate(len(data))
            self._segment.write(data)
        except OSError as error:
            self._fail(f"writing the journal failed: {error}")
        self.written_bytes += len(data)

    def _rotate(self, wanted: int) -> None:
        """Begin the next segment with what is still open. Raises OSError."""
        assert self._segment is not None
        frames = [
            _encode([self._values(row) for row in rows], [], [])
            for rows in _chunks(list(self._live.values()))
        ]
        frames += [_encode([], figures, []) for figures in _chunks(list(self._last.values()))]
        # At least half of a segment is for what is new, however much is open.
        size = max(self._segment_bytes, 2 * sum(map(len, frames)), wanted)
        old = self._segment
        old.sync()
        self._segment = Segment(self.directory, old.number + 1, size, self._disk)
        old.close()
        self._rotated.append(old.path)
        for data in frames:
            self._segment.write(data)

    def _sync(self) -> None:
        if self.failed or self._segment is None:
            return
        try:
            self._segment.sync()
        except OSError as error:
            self._fail(f"syncing the journal failed: {error}")
            return
        self.syncs += 1
        if self._rotated:
            with self._retired_lock:
                self._retired += [(path, self._delivered) for path in self._rotated]
            self._rotated.clear()

    def _fail(self, reason: str) -> None:
        if not self.failed:
            self.failed = reason
            log.critical("%s; new requests are refused, what runs is not durable", reason)
            self._call(self._on_failed, reason)

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


def _encode(opened: list[Values], progress: Sequence[Progress], closed: list[Values]) -> bytes:
    try:
        return frame(orjson.dumps((opened, progress, closed)))
    except TypeError:
        # A foreign type or broken Unicode in some row must not take the others with it.
        for values in (opened, closed):
            values[:] = [tuple(plain(row)) for row in values]
        return frame(orjson.dumps((opened, plain(list(progress)), closed)))


def _chunks(items: list[T]) -> Iterator[list[T]]:
    for start in range(0, len(items), FRAME_RECORDS):
        yield items[start : start + FRAME_RECORDS]


def _opened(values: list[Any]) -> Row:
    """What is known of a request of which only the beginning was written."""
    row = from_values(values)
    row.outcome = LOST
    row.prompt_tokens = row.cached_tokens = row.completion_tokens = 0
    row.usage_source = "estimated"
    return row


def _advance(row: Row, backend: str, prompt: int, cached: int, completion: int, source: str) -> None:
    if backend != row.backend:
        row.backend, row.site = backend, ""
    row.prompt_tokens, row.cached_tokens, row.completion_tokens = prompt, cached, completion
    row.usage_source = source
