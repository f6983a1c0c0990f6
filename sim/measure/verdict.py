"""What a sweep over concurrencies says: where throughput stops growing, and how many users an SLA allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sim.measure.level import Level

PLATEAU: Final = 0.95
"""A level whose throughput reaches this share of the highest one has nothing to gain from more users."""
KNEE_RULE: Final = (
    f"the lowest concurrency that reaches {PLATEAU:.0%} of the highest output throughput measured; "
    "none while the highest concurrency is the only one that does"
)
CLOSE: Final = 0.05
"""A search ends when its bounds are one user, or this share, apart."""


@dataclass(frozen=True, slots=True)
class Sla:
    """What users are promised, on average. None: nothing. Raises ValueError: nothing at all."""

    ttft_s: float | None = None
    """Mean TTFT at most."""
    tpot_s: float | None = None
    """Mean TPOT at most."""
    tokens_per_s: float | None = None
    """Output throughput / concurrency at least (white paper, table 3-2: 15)."""

    def __post_init__(self) -> None:
        if self.ttft_s is None and self.tpot_s is None and self.tokens_per_s is None:
            raise ValueError("an SLA promises something")

    def __str__(self) -> str:
        parts = (
            (self.ttft_s, "mean TTFT at most {:g} s"),
            (self.tpot_s, "mean TPOT at most {:g} s"),
            (self.tokens_per_s, "at least {:g} tokens/s for each user"),
        )
        return ", ".join(text.format(value) for value, text in parts if value is not None)

    def met_by(self, level: Level) -> bool:
        """A level with a failed request, or without what is promised, does not meet it."""
        if level.failed or not level.completed:
            return False
        if self.tokens_per_s is not None and level.output_tokens_per_s_per_user < self.tokens_per_s:
            return False
        for most, measured in ((self.ttft_s, level.ttft_s), (self.tpot_s, level.tpot_s)):
            if most is not None and (measured is None or measured.mean > most):
                return False
        return True


@dataclass(frozen=True, slots=True)
class Capacity:
    """How many users an SLA allows."""

    users: int
    """The most that were measured and met it, below the first level that did not; 0: none did."""
    first_above: int | None
    """The first level that did not meet it; None: all did, so there may be room for more."""

    @property
    def next_to_try(self) -> int | None:
        """Half way between both; None: they are close enough, or no level was too much."""
        if self.first_above is None or self.first_above - self.users <= max(1.0, CLOSE * self.users):
            return None
        return (self.users + self.first_above) // 2


def capacity(levels: Sequence[Level], sla: Sla) -> Capacity:
    """From levels in any order, all complete: more users are never served better."""
    users = 0
    for level in sorted(levels, key=lambda level: level.concurrency):
        if not sla.met_by(level):
            return Capacity(users, level.concurrency)
        users = level.concurrency
    return Capacity(users, None)


def knee(levels: Sequence[Level]) -> int | None:
    """By `KNEE_RULE`, from complete levels in any order."""
    rates = {level.concurrency: level.output_tokens_per_s for level in levels}
    if not rates or max(rates.values()) <= 0:
        return None
    first = min(users for users, rate in rates.items() if rate >= PLATEAU * max(rates.values()))
    return first if first < max(rates) else None
