"""What a fleet does with a backend that comes back, and how many it does without at most."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Final

STEPS: Final = 10
"""Of a slow start."""


@dataclass(frozen=True, slots=True)
class Health:
    """How careful a fleet is. ValueError for what cannot be."""

    slow_start_s: float = 10.0
    """Seconds in which a backend that was out gets its slots back, in `STEPS` steps; 0: all at once."""
    panic: float = 0.01
    """When less than this share of the backends that may serve a request is left, doubtful ones are used too
    (`policies/panic.py`); 0: never, 0.01: when none is."""
    most_ejected: float = 0.5
    """Breakers take out at most this share of the backends that may serve a request, and one in any case."""

    def __post_init__(self) -> None:
        if not 0 <= self.slow_start_s < float("inf"):
            raise ValueError("a slow start takes zero or more seconds")
        if not (0 <= self.panic <= 1 and 0 <= self.most_ejected <= 1):
            raise ValueError("shares of backends lie between 0 and 1")


def slots_in_slow_start(slots: int, age_s: float, slow_start_s: float) -> int:
    """Of so many slots, those of a backend that has been back for `age_s`; at least 1."""
    if age_s >= slow_start_s:
        return slots
    step = int(STEPS * max(age_s, 0.0) / slow_start_s) + 1
    return ceil(slots * min(step, STEPS) / STEPS)
