"""`STATE/standbys.jsonl`: every move of every standby, on the disk before what it leads to is done.

A line holds the standby as it stands after the move, so that the last line of each is all that a start needs; the
moves before it are history. A line that was being written when the machine failed is dropped: what it would have
led to was not begun. After a failed write the file is written anew, since nobody knows what of the old one reached
the disk.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import orjson

from policies.standby import Event, Move, Standby, State

log = logging.getLogger("tidegate")

JOURNAL_FILE: Final = "standbys.jsonl"
KEPT_MOVES: Final = 1000
"""Of all standbys together, for `tidegate standby history`."""
MOST_LINES: Final = 5 * KEPT_MOVES
"""The file is written anew when it has more."""
UNTIL_STOPPED: Final = -1.0
"""A pin without an end."""


@dataclass(slots=True)
class Kept:
    """What is kept of one standby."""

    standby: Standby
    backend: dict[str, Any] = field(default_factory=dict)
    """The backend's section of the configuration by which the run was started; empty: nothing runs."""
    pin: float = 0.0
    """Unix time until which it was started by hand; `UNTIL_STOPPED`; 0: it was not."""
    paid_since: float = 0.0
    """Unix time at which the run began to cost; 0: it does not."""
    cold_start_s: float = 0.0
    """From start to ready, averaged over its starts; 0: it has had none."""


class StandbyJournal:
    """The file. `open` it, then `append`; one process at a time."""

    def __init__(self, path: Path, executor: Executor | None = None) -> None:
        """`executor`: what writes, one after the other; None: a thread."""
        self.path = path
        self.kept: dict[str, Kept] = {}
        self.moves: deque[Move] = deque(maxlen=KEPT_MOVES)
        self._executor = executor or ThreadPoolExecutor(1, "standbys")
        self._handle = -1
        self._lines = 0

    def read(self) -> None:
        """Learn what the file says, without changing it. Raises OSError."""
        self.kept, self._lines = {}, 0
        self.moves.clear()
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return
        lines = data.split(b"\n")
        if lines.pop():
            log.warning("%s: its last line was not written to the end, and is dropped", self.path)
        self.learn(lines)

    def learn(self, lines: Iterable[bytes]) -> None:
        """Take lines of the file, in their order."""
        for number, line in enumerate(lines, 1):
            try:
                kept, move = _read(line)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                log.error("%s:%d cannot be read, and is passed over: %r", self.path, number, error)
                continue
            self.kept[kept.standby.name] = kept
            if move is not None:
                self.moves.append(move)

    def open(self) -> None:
        """Read the file and write it anew with what is still needed. Raises OSError."""
        self.read()
        self._write_anew()

    async def append(self, kept: Kept, move: Move | None = None) -> None:
        """Write a standby as it stands now, and the move that has led to it; return when that is on the disk.

        Raises OSError: it is not, and what is known is as before.
        """
        line = _line(kept, move)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._executor, self._write, kept, move, line)

    def forget(self, name: str) -> None:
        """Leave out a standby that nothing runs of when the file is next written anew."""
        self.kept.pop(name, None)

    def close(self) -> None:
        """Wait for what is being written."""
        self._executor.shutdown(wait=True)
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _write(self, kept: Kept, move: Move | None, line: bytes) -> None:
        name = kept.standby.name
        before = self.kept.get(name)
        self.kept[name] = kept
        if move is not None:
            self.moves.append(move)
        try:
            if self._handle < 0 or self._lines >= MOST_LINES:
                self._write_anew()
            else:
                _write_all(self._handle, line)
                os.fdatasync(self._handle)
                self._lines += 1
        except OSError:
            if self._handle >= 0:
                os.close(self._handle)
                self._handle = -1
            if move is not None:
                self.moves.pop()
            if before is None:
                del self.kept[name]
            else:
                self.kept[name] = before
            raise

    def _write_anew(self) -> None:
        """Whole or not at all."""
        latest = {move.name: number for number, move in enumerate(self.moves)}
        lines = [_line(kept) for name, kept in list(self.kept.items()) if name not in latest]
        for number, move in enumerate(self.moves):
            is_latest = latest[move.name] == number and move.name in self.kept
            lines.append(_line(self.kept[move.name] if is_latest else _as_after(move), move))
        new = self.path.with_suffix(".new")
        handle = os.open(new, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC | os.O_APPEND, 0o600)
        try:
            _write_all(handle, b"".join(lines))
            os.fsync(handle)
            os.replace(new, self.path)
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except BaseException:
            os.close(handle)
            raise
        if self._handle >= 0:
            os.close(self._handle)
        self._handle, self._lines = handle, len(lines)


def _write_all(handle: int, data: bytes) -> None:
    while data:
        data = data[os.write(handle, data) :]


def _as_after(move: Move) -> Kept:
    """A standby as far as an old move tells; a later line says the rest."""
    return Kept(Standby(move.name, move.after, move.run, move.wall, move.reason, plan=move.plan))


def _line(kept: Kept, move: Move | None = None) -> bytes:
    written: dict[str, Any] = asdict(kept)
    if move is not None:
        written["move"] = asdict(move)
    return orjson.dumps(written, option=orjson.OPT_APPEND_NEWLINE)


def _read(line: bytes) -> tuple[Kept, Move | None]:
    """Raises ValueError, TypeError, KeyError, AttributeError: it is none of ours."""
    written = orjson.loads(line)
    said, move = written.pop("standby"), written.pop("move", None)
    standby = Standby(**said | {"state": State(said["state"])})
    if move is not None:
        states = {"before": State(move["before"]), "after": State(move["after"])}
        move = Move(**move | states | {"event": Event(move["event"])})
    return Kept(standby, **written), move
