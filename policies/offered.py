"""What clients ask for, whether or not it is served: by it capacity is known to be short before it is full.

Tokens in use say little of a rush: backends that are full hold no more, and what is refused leaves no trace. So
the tokens are counted that requests bring, prompt and expected answer, at the moment when they come. Times the
seconds for which tokens stay on a backend, they are the tokens that would be in use if nobody had to wait (Little's
law, Operations Research 9(3), 1961). A rush of twice the load asks for twice the capacity within seconds, in one
step, where a rule on what is in use climbs by one cold start after the other.

The load is the mean of three minutes; that of half a minute where it is above what chance explains.

Pure: times are handed in, monotonic seconds.
"""

from __future__ import annotations

from math import exp, sqrt
from typing import Final

BIN_S: Final = 10.0
LONG: Final = 18
"""Bins of the mean."""
SHORT: Final = 3
"""Bins in which a rush is seen."""
KEPT: Final = LONG + 1
CHANCE: Final = 3.0
"""Standard errors of the short mean that chance explains."""
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

    def tokens(self, now: float) -> float:
        """That would be in use now if nobody had to wait; 0: nothing is known."""
        self._go_to(now)
        last = self._bin - 1
        count = min(last - self._first + 1, LONG)
        if count < SHORT:
            return 0.0
        bins = [self._sums[number % KEPT] for number in range(last + 1 - count, last + 1)]
        mean = sum(bins) / count
        rush = sum(bins[-SHORT:]) / SHORT
        before = bins[:-SHORT]
        if len(before) >= 2:
            level = sum(before) / len(before)
            spread = sqrt(sum((one - level) ** 2 for one in before) / (len(before) - 1))
            if rush <= level + CHANCE * spread / sqrt(SHORT):
                rush = mean
        return max(mean, rush) / BIN_S * self.stay_s

    def _go_to(self, now: float) -> None:
        number = int(now // BIN_S)
        if number <= self._bin:
            return
        if self._bin < 0:
            self._first = number
        for passed in range(max(self._bin + 1, number - KEPT + 1), number + 1):
            self._sums[passed % KEPT] = 0.0
        self._bin = number
