"""How far a long run is, and how long it will still take."""

from __future__ import annotations

import sys
import time
from typing import Final, TextIO

EVERY_S: Final = 30.0
"""Between two lines in a log; a terminal is told five times a second."""


class Meter:
    """Work is counted in simulated requests, as simulations differ in length."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self._total = total
        self._done = self._skipped = 0
        self._began = self._told = time.monotonic()
        self._stream = sys.stderr if stream is None else stream

    def advance(self, requests: int, what: str, kept: bool = False) -> None:
        """So many are done; `kept`: without being played, so they say nothing of the time left."""
        self._done += requests
        self._skipped += requests if kept else 0
        now = time.monotonic()
        terminal = self._stream.isatty()
        if now - self._told < (0.2 if terminal else EVERY_S):
            return
        self._told = now
        print(f"\r\x1b[K{self.line(what, now)}" if terminal else self.line(what, now), end="" if terminal else "\n",
              file=self._stream, flush=True)  # fmt: skip

    def line(self, what: str, now: float) -> str:
        """The state in words."""
        played = self._done - self._skipped
        share = min(self._done / self._total, 1.0) if self._total else 1.0
        if not played:
            return f"{share:.0%}, {what}"
        left = max(self._total - self._done, 0) * (now - self._began) / played
        return f"{share:.0%}, {_words(left)} left, {what}"

    def close(self) -> None:
        """Leave the terminal's line free."""
        if self._stream.isatty():
            print("\r\x1b[K", end="", file=self._stream, flush=True)


def _words(seconds: float) -> str:
    minutes = round(seconds / 60)
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min"
        if minutes
        else "under a minute"
    )
