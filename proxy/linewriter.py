"""Lines that a thread of their own writes: a slow disk or pipe never stops the loop."""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import Generic, TypeVar

BLOCK_LINES = 128
"""Lines written at once: putting them into words holds the interpreter for about 0.1 ms."""
INTERVAL_S = 0.1
"""Between two writes: what a killed process has not written is younger."""
PATIENCE_S = 2.0
"""How long `close` waits for what is left to be written."""

Line = TypeVar("Line")


class LineWriter(Generic[Line]):
    """Takes lines, and writes them in order, a fraction of a second later.

    Whoever inherits says what a line's bytes are, and what follows if too many wait or they cannot be written.
    """

    def __init__(self, name: str, descriptor: int, most_pending: int, interval_s: float = INTERVAL_S) -> None:
        """`name`: of the thread. `most_pending`: lines that wait at most. `interval_s`: between two writes."""
        self._descriptor = descriptor
        self._most_pending = most_pending
        self._interval_s = interval_s
        self._lines: deque[Line] = deque()
        self._stop = threading.Event()
        self._bell = threading.Event()
        """Wakes the thread when there is something to do for it."""
        self._idle = False
        self._worker = threading.Thread(target=self._run, name=name, daemon=True)
        self._worker.start()

    def write(self, line: Line) -> None:
        """Never waits."""
        if len(self._lines) >= self._most_pending:
            self._overflow()
        else:
            self._lines.append(line)
            if self._idle:
                self._idle = False
                self._bell.set()

    def finish(self) -> None:
        """Write what is left and end, without waiting for it. Nothing may be written from now on."""
        self._stop.set()
        self._bell.set()

    def close(self) -> bool:
        """As `finish`, and wait for it. False: it takes longer than `PATIENCE_S`."""
        self.finish()
        self._worker.join(timeout=PATIENCE_S)
        return not self._worker.is_alive()

    # What whoever inherits says

    def _overflow(self) -> None:
        """A line was not taken, because too many wait. Called where `write` is."""
        raise NotImplementedError

    def _encode(self, line: Line) -> bytes:
        """The bytes of a line, its end included. Called in the thread, as what follows."""
        raise NotImplementedError

    def _unwritten(self, lines: int, error: OSError) -> None:
        """So many lines could not be written, or only a part of them."""
        raise NotImplementedError

    def _finished(self) -> None:
        """The last line is written."""

    # The thread

    def _run(self) -> None:
        while not self._stop.is_set():
            # The loop appends first and looks at `_idle` then; here it is the other way round.
            self._idle = True
            if not self._lines:
                self._bell.wait()
            self._idle = False
            self._bell.clear()
            self._stop.wait(self._interval_s)
            self._flush()
        self._flush()
        self._finished()

    def _flush(self) -> None:
        lines = self._lines
        while lines:
            block = [self._encode(lines.popleft()) for _ in range(min(len(lines), BLOCK_LINES))]
            data = memoryview(b"".join(block))
            try:
                while data:
                    written = os.write(self._descriptor, data)
                    data = data[written:]
            except OSError as error:
                self._unwritten(len(block), error)
                return
