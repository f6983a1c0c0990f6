"""How many requests a backend takes before it queues, found from its time to the first token.

Every `WINDOW` first tokens the limit moves by Envoy's and Netflix's rule (adaptive concurrency, gradient):

    gradient = clamp(TOLERANCE * minimum / median, 0.5, 1)
    limit    = limit * gradient + sqrt(limit)

`median` is that of the window, `minimum` the median of what it takes with few requests in flight. The limit stays
between an eighth of the backend's slots and all of them: that an engine takes more without queueing does not say
that it still is as fast as promised, so only a person raises `slots`.

It goes by the first token alone, never by the whole time, which is the length of the answer. Other traps:

* What was sent before the limit last moved tells of the old limit: it is not counted.
* A limit that is not used says nothing about a higher one, so it grows only while half of it is in use.
* A minimum taken under load is too high, and lets the limit grow, which raises the next one. So it is taken again
  with few in flight: in passing, whenever that happens by itself, or else by giving out an eighth of the slots
  only, for as long as five first tokens take, every five minutes give or take a fifth, so that backends are not
  measured in step. How full it is goes by all its slots meanwhile, so nothing is refused for that.
* Where answers are long, too much still runs for that. So measuring ends after ten seconds, with a result or not:
  then the minimum stays as it was.
* A backend that sends no streams has no first tokens, and nothing is measured: it keeps all its slots.

Time comes in with every call; chance comes by the constructor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf, sqrt
from random import Random
from statistics import median
from typing import Final

WINDOW: Final = 10
"""First tokens between two moves of the limit."""
LULL: Final = 5
"""First tokens of which a minimum is the median."""
TOLERANCE: Final = 2.0
"""So many times the minimum is no queueing yet: prompts differ, and steps are shared."""
MEASURE_S: Final = 300.0
"""At the latest after so long the minimum is taken again."""
MEASURING_S: Final = 10.0
"""Measuring takes so long at most."""
JITTER: Final = 0.2


@dataclass(slots=True)
class AdaptiveSlots:
    """The limit of one backend. With its first stream it begins to measure; before that it has all slots."""

    random: Random
    limit: float = inf
    minimum_s: float = 0.0
    """Seconds to the first token with few requests in flight; 0: not known yet."""
    measure_at: float = -inf
    """When it is to be measured next, monotonic."""
    measured_until: float = -inf
    """While it is measured: when that ends at the latest."""
    moved_at: float = -inf
    """When the limit last moved, or measuring began or had its result."""
    most_in_flight: int = 0
    """Of the present window."""
    window: list[float] = field(default_factory=list)
    lull: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, name: str) -> AdaptiveSlots:
        """That of a backend, with chance of its own; the same at every run."""
        return cls(Random(name))  # noqa: S311 - jitter

    def slots(self, full_slots: int) -> int:
        """Of so many slots, those in force."""
        return max(_few(full_slots), int(min(self.limit, full_slots)))

    def measuring_slots(self, full_slots: int, now: float) -> int:
        """Of so many slots, those that are given out while it is measured; 0: it is not."""
        return _few(full_slots) if now < self.measured_until else 0

    def first_token(self, ttft_s: float, in_flight: int, started: float, full_slots: int, now: float) -> bool:
        """An attempt that began at `started`, as one of `in_flight`, got its first token after `ttft_s`. True:
        `slots` or `measuring_slots` may have changed."""
        if started < self.moved_at:
            return False
        if now >= self.measure_at:
            self.measured_until = now + MEASURING_S
            self._put_off(now)
            self._begin(now)
            return True
        if in_flight <= _few(full_slots):
            self.lull.append(ttft_s)
            if len(self.lull) == LULL:
                self._measured(full_slots, now)
                return True
        if now < self.measured_until or not self.minimum_s:
            return False
        self.window.append(ttft_s)
        self.most_in_flight = max(self.most_in_flight, in_flight)
        if len(self.window) < WINDOW:
            return False
        self._move(full_slots, now)
        return True

    def _measured(self, full_slots: int, now: float) -> None:
        self.minimum_s = median(self.lull)
        self.lull.clear()
        self.limit = min(self.limit, full_slots)
        self._put_off(now)
        if now < self.measured_until:
            self.measured_until = -inf
            self._begin(now)

    def _put_off(self, now: float) -> None:
        self.measure_at = now + MEASURE_S * (1.0 + self.random.uniform(-JITTER, JITTER))

    def _move(self, full_slots: int, now: float) -> None:
        limit = min(self.limit, full_slots)
        gradient = min(max(TOLERANCE * self.minimum_s / max(median(self.window), 1e-9), 0.5), 1.0)
        moved = limit * gradient
        if self.most_in_flight >= limit / 2:
            moved += sqrt(limit)
        self.limit = max(min(moved, full_slots), _few(full_slots))
        if int(self.limit) != int(limit):
            self._begin(now)
        else:
            self.window.clear()
            self.most_in_flight = 0

    def _begin(self, now: float) -> None:
        """What was sent before now tells nothing any more."""
        self.moved_at = now
        self.window.clear()
        self.lull.clear()
        self.most_in_flight = 0


def _few(full_slots: int) -> int:
    """So many requests in flight are few, and so many slots are always left."""
    return max(1, full_slots // 8)
