"""A retry budget: retries are a share of recent requests, so that they cannot multiply an outage.

A limit per request does not do it: when everything fails, three attempts each are three times the load. The
budget is the one of Finagle and Linkerd: every request deposits `ratio` of a retry, a floor keeps a quiet
proxy able to retry, and what is not used expires after `ttl_s`.
"""

from __future__ import annotations

WINDOWS = 10
"""The time to live is kept in this many windows: a deposit expires within a tenth of it."""


class RetryBudget:
    """`deposit` for every request, `withdraw` before every retry; False: the retry must not happen.

    Over any nine tenths of `ttl_s` it grants at most `floor_per_s * ttl_s`, plus `ratio` times the requests
    of the `ttl_s` before.
    """

    def __init__(self, ratio: float = 0.2, floor_per_s: float = 10.0, ttl_s: float = 10.0) -> None:
        self.ratio = ratio
        self.refused = 0
        """Retries that were refused since start."""
        self._floor = floor_per_s * ttl_s
        self._window_s = ttl_s / WINDOWS
        self._window = 0
        self._deposits = [0] * WINDOWS
        self._withdrawals = [0] * WINDOWS

    def deposit(self, now: float) -> None:
        """A request came in."""
        self._deposits[self._advance(now)] += 1

    def withdraw(self, now: float) -> bool:
        """Take one retry out of the budget, if it holds one."""
        index = self._advance(now)
        if self.balance(now) < 1.0:
            self.refused += 1
            return False
        self._withdrawals[index] += 1
        return True

    def balance(self, now: float) -> float:
        """Retries that could be granted now."""
        self._advance(now)
        return self._floor + self.ratio * sum(self._deposits) - sum(self._withdrawals)

    def _advance(self, now: float) -> int:
        """Empty the windows that have expired; the index of the current one."""
        window = int(now // self._window_s)
        if window > self._window:
            for stale in range(max(self._window, window - WINDOWS) + 1, window + 1):
                self._deposits[stale % WINDOWS] = 0
                self._withdrawals[stale % WINDOWS] = 0
            self._window = window
        return self._window % WINDOWS
