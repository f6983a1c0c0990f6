"""Hedging: when a request whose first token is late is worth a second attempt, and how many may have one.

A request is late once it has waited longer than 95 % of those like it did: of the same model, and with prompts
of the same length within a factor of two. A second attempt then costs a twentieth of the load and takes away
most of the tail (Dean and Barroso, "The Tail at Scale", 2013). The budget holds that share also while everything
is slow, when a second attempt would be more of what is wrong.
"""

from __future__ import annotations

from collections import deque
from math import ceil, inf
from typing import Final

from policies.retries import RetryBudget

QUANTILE: Final = 0.95
WINDOW_S: Final = 300.0
"""First-token times older than this count no more."""
MOST_SAMPLES: Final = 256
LEAST_SAMPLES: Final = 20
"""Fewer say nothing about one in twenty."""
FRESH_SAMPLES: Final = 8
FRESH_S: Final = 5.0
"""A quantile is worked out again after so many samples, or so many seconds."""
MOST_CLASSES: Final = 1000
SHORT_PROMPT_TOKENS: Final = 256
"""All prompts below this are one class; above, each doubling is another."""
BUDGET_S: Final = 60.0
"""The budget is a share of the requests of so long: a quiet proxy gets one hedge in a while too."""


class FirstTokenTimes:
    """The latest first-token times of one class of requests, seconds."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque(maxlen=MOST_SAMPLES)
        self._late = inf
        self._worked_out_at = -inf
        self._since = 0
        """Samples since then."""

    def add(self, seconds: float, now: float) -> None:
        self._samples.append((now, seconds))
        self._since += 1

    def late_after(self, now: float) -> float:
        """The 95th percentile of the window (the smallest sample that 95 % do not exceed); inf: too few samples."""
        if self._since >= FRESH_SAMPLES or now - self._worked_out_at >= FRESH_S:
            samples = self._samples
            while samples and now - samples[0][0] > WINDOW_S:
                samples.popleft()
            self._since = 0
            self._worked_out_at = now
            self._late = inf
            if len(samples) >= LEAST_SAMPLES:
                seconds = sorted([sample[1] for sample in samples])
                self._late = seconds[ceil(QUANTILE * len(seconds)) - 1]
        return self._late


class Hedging:
    """What is late, and who may have a second attempt. One per proxy; nothing here knows a backend."""

    def __init__(self, after_s: float | None = None, ratio: float = 0.05) -> None:
        """`after_s`: when a first token is late, seconds; None: after the 95th percentile. `ratio`: second attempts
        per request of the last minute, at most."""
        self.after_s = after_s
        self._budget = RetryBudget(ratio, 0.0, BUDGET_S)
        self._classes: dict[tuple[str, int], FirstTokenTimes] = {}

    @property
    def refused(self) -> int:
        """Second attempts over the budget, since start."""
        return self._budget.refused

    def sent(self, now: float) -> None:
        """A request that might be hedged was sent to a backend for the first time."""
        self._budget.deposit(now)

    def observe(self, model: str, prompt_tokens: int, seconds: float, now: float) -> None:
        """A first token came after `seconds`. Of an attempt that was given up for its second one, say how long it
        was waited for: it would have taken longer, so it is late in any case, and without it the quantile would
        sink with every hedge."""
        if self.after_s is None:
            name = (model, length_class(prompt_tokens))
            times = self._classes.get(name)
            if times is None:
                if len(self._classes) >= MOST_CLASSES:
                    del self._classes[next(iter(self._classes))]
                times = self._classes[name] = FirstTokenTimes()
            times.add(seconds, now)

    def late_after(self, model: str, prompt_tokens: int, now: float) -> float:
        """Seconds after which a first token is late; inf: not known yet."""
        if self.after_s is not None:
            return self.after_s
        times = self._classes.get((model, length_class(prompt_tokens)))
        return inf if times is None else times.late_after(now)

    def affords(self, now: float) -> bool:
        """Whether the budget holds a second attempt; `spend` takes it out."""
        if self._budget.balance(now) >= 1.0:
            return True
        self._budget.refused += 1
        return False

    def spend(self, now: float) -> None:
        """A second attempt was made."""
        self._budget.withdraw(now)


def length_class(prompt_tokens: int) -> int:
    """Prompts of a class differ by less than a factor of two, from 256 tokens on."""
    return (max(prompt_tokens, 0) // SHORT_PROMPT_TOKENS).bit_length()
