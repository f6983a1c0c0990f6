"""The traffic: ServeGen's m-small, scaled down, a day at a time; and what it asks of units of capacity.

Scaled by drawing a share of the requests: each client keeps its rate, less by that factor, and the distribution of
its gaps. Five of its clients, with 57 % of the requests, have no lengths in the copy that we have. Their requests
take those of requests of the other clients in the same ten minutes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from policies.profile import Profile
from sim.traces.servegen import Columns, Span, read_columns, read_servegen
from sim.workload import Workload

if TYPE_CHECKING:
    import numpy as np

TRACE: Final = (
    Path(os.environ.get("TIDEGATE_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
    / "servegen"
    / "m-small_rates.csv.gz"
)
DAY_S: Final = 86400
DAYS: Final = 14
BIN_S: Final = 15
"""Seconds for which the coarse simulation adds up what comes."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What comes in each bin."""

    requests: np.ndarray
    slot_s: np.ndarray
    """Seconds for which they hold a slot, all together."""

    @property
    def mean_s(self) -> float:
        """For which a request holds its slot."""
        return float(self.slot_s.sum() / max(self.requests.sum(), 1.0))

    @property
    def slots(self) -> np.ndarray:
        """That are held if nobody waits."""
        found: np.ndarray = self.slot_s / BIN_S
        return found

    def part(self, first_day: int, days: int) -> Demand:
        """Days, counted from 0."""
        size = DAY_S // BIN_S
        piece = slice(first_day * size, (first_day + days) * size)
        return Demand(self.requests[piece], self.slot_s[piece])


def draw(day: int, share: float, seed: int = 0, seconds: float = DAY_S) -> Workload:
    """The requests of a day, counted from 0."""
    return read_servegen(TRACE, _span(day, share, seed, seconds))


def _span(day: int, share: float, seed: int, seconds: float) -> Span:
    return Span(day * DAY_S, seconds, seed, pool_lengths=True, share=share)


def times(profile: Profile, slots: int, prompt: float, output: float) -> tuple[float, float]:
    """Seconds to the first token and for each further one, on a unit whose slots are all taken by requests of
    these mean lengths."""
    step = profile.step
    context = prompt + output / 2
    alone = step.alpha_us + slots * (step.beta_us + step.gamma_us * context)
    tpot = alone
    for _ in range(50):  # prompts take a share of the time, which makes all slower, so that fewer come
        rate = slots / (output * tpot)  # in a microsecond
        tpot = alone / max(1.0 - rate * prompt * step.delta_us, 0.05)
    return (alone + prompt * step.delta_us) / 1e6, tpot / 1e6


def demand_of(columns: Iterable[Columns], ttft_s: float, tpot_s: float, bins: int) -> Demand:
    """What requests ask for, in so many bins."""
    import numpy as np

    requests, slot_s = np.zeros(bins), np.zeros(bins)
    for found in columns:
        at = found.at // (BIN_S * 10**6)
        requests += np.bincount(at, minlength=bins)
        slot_s += np.bincount(at, weights=ttft_s + (found.output - 1) * tpot_s, minlength=bins)
    return Demand(requests, slot_s)


def demand_of_day(day: int, share: float, seed: int, ttft_s: float, tpot_s: float) -> Demand:
    """Of a day, counted from 0."""
    return demand_of(read_columns(TRACE, _span(day, share, seed, DAY_S)), ttft_s, tpot_s, DAY_S // BIN_S)


def joined(days: Iterable[Demand]) -> Demand:
    """Days, one after the other."""
    import numpy as np

    each = list(days)
    return Demand(
        np.concatenate([one.requests for one in each]), np.concatenate([one.slot_s for one in each])
    )
