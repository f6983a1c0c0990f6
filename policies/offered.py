"""What clients ask for, whether or not it is served: by it capacity is known to be short before it is full.

Tokens in use say little of a rush: backends that are full hold no more, and what is refused leaves no trace. So
the tokens are counted that requests bring, prompt and expected answer, at the moment when they come. Their rate
times the seconds for which tokens stay on a backend are the tokens that would be in use if nobody had to wait
(Little's law, Operations Research 9(3), 1961). A rush of twice the load asks for twice the capacity within seconds,
in one step, where a rule on what is in use climbs by one cold start after the other.

The load is told as it was in each quarter of a minute, not as a mean: what bursts need is capacity too.

Pure: times are handed in, monotonic seconds.
"""

from __future__ import annotations

from math import exp
from typing import Final

BIN_S: Final = 15.0
SAMPLES: Final = 20
"""The last five minutes."""
LEAST: Final = 4
"""Fewer tell nothing."""
LONGEST: Final = 20
"""Bins over which a sample is a mean."""
KEPT: Final = SAMPLES + LONGEST
STAY_TAU_S: Final = 600.0
"""Time constant of how long tokens stay."""


class Offered:
    """The load that is offered to one model."""

    __slots__ = ("_bin", "_first", "_stayed", "_stayed_at", "_sums", "_weight")

    def __init__(self) -> None:
        self._sums = [0.0] * KEPT
        """Tokens by the number of their bin, modulo `KEPT`."""
        self._bin = self._first = -1
        """The present one, and the first that was seen; below zero: none."""
        self._stayed = self._weight = 0.0
        """Token-seconds and tokens of what has ended, weighed by age."""
        self._stayed_at = 0.0

    def arrived(self, tokens: float, now: float) -> None:
        """A request has come, and counts so many tokens."""
        self._go_to(now)
        self._sums[self._bin % KEPT] += tokens

    def served(self, tokens: float, seconds: float, now: float) -> None:
        """One has ended well, which held so many tokens on a backend for so long."""
        share = exp(-max(now - self._stayed_at, 0.0) / STAY_TAU_S)
        self._stayed = self._stayed * share + tokens * seconds
        self._weight = self._weight * share + tokens
        self._stayed_at = now

    @property
    def stay_s(self) -> float:
        """For how long a token stays; 0: nothing has ended yet."""
        return self._stayed / self._weight if self._weight > 0.0 else 0.0

    def samples(self, now: float) -> tuple[float, ...]:
        """Tokens that would have been in use if nobody had to wait, in each quarter of a minute, oldest first, of
        the last five minutes at most; empty: too little is known.
        """
        self._go_to(now)
        stay_s, end = self.stay_s, self._bin
        count = min(end - self._first, SAMPLES)
        if count < LEAST or not stay_s:
            return ()
        # What is in use at a moment has come within the stay before it.
        width = min(max(round(stay_s / BIN_S), 1), LONGEST, end - self._first)
        first = max(end - count, self._first + width - 1)
        sums, found = self._sums, []
        for last in range(first, end):
            came = sum(sums[number % KEPT] for number in range(last + 1 - width, last + 1))
            found.append(came / (width * BIN_S) * stay_s)
        return tuple(found)

    def _go_to(self, now: float) -> None:
        number = int(now // BIN_S)
        if number <= self._bin:
            return
        if self._bin < 0:
            self._first = number
        for passed in range(max(self._bin + 1, number - KEPT + 1), number + 1):
            self._sums[passed % KEPT] = 0.0
        self._bin = number
