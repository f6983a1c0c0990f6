"""What is compared: settings of the rule and of the controller, on units that are all alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Final

from benchmarks.scaling.coarse import Coarse, Outcome
from benchmarks.scaling.load import BIN_S, Demand
from benchmarks.scaling.rules import HorizontalPodAutoscaler
from policies.scaling import Controller, ScalingSettings
from sim.autoscale import Scaler, StandbyTerms

PROFILE: Final = "l40-4-32b"
SLOTS: Final = 15
COST_PER_HOUR: Final = 4 * 0.8
"""An assumption: four L40 at 0.80 USD an hour. It is in all that is compared."""
TTFT_S: Final = 5.0
TPOT_S: Final = 0.1
WAIT_S: Final = 4.0
"""That the valve has requests wait: less than their SLA, so that who would be late is refused and makes nobody else
late. It is so for all that is compared."""
TERMS: Final = StandbyTerms(
    prepare_s=0.0,
    cold_start_s=180.0,
    stop_s=10.0,
    min_on_s=300.0,
    min_off_s=60.0,
    cost_per_hour=COST_PER_HOUR,
)
TARGETS: Final = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 1.0)
"""Of the rule."""
WINDOWS: Final = (1, 4, 12, 20, 40)
"""Bins over which its metric is a mean: from a quarter of a minute to ten minutes."""
SETTINGS: Final = tuple(
    ScalingSettings(up=up, least_use=least_use, quantile=quantile)
    for up in (0.7, 0.75, 0.8, 0.85, 0.9)
    for least_use in (0.02, 0.05)
    for quantile in (0.0, 0.9)
)
RULE, RATED, OURS, STATIC = "rule", "rule, told what is offered", "ours", "static"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to decide."""

    kind: str
    name: str
    make: Callable[[], Scaler]


def candidates(quick: bool = False) -> list[Candidate]:
    """All settings of both; a few of each for a quick run."""
    rules = [
        Candidate(
            RATED if by_rate else RULE,
            f"rule, {'told what is offered, ' * by_rate}target {target:.0%}, mean of {samples * BIN_S} s",
            partial(HorizontalPodAutoscaler, target, samples, by_rate),
        )
        for samples in WINDOWS
        for target in TARGETS
        for by_rate in (False, True)
    ]
    ours = [
        Candidate(
            OURS,
            f"up {one.up:.0%}, least use {one.least_use:.0%}, forecast {one.quantile:.0%}",
            partial(Controller, one),
        )
        for one in SETTINGS
    ]
    return rules[::19] + ours[1::8] if quick else rules + ours


@dataclass(frozen=True, slots=True)
class Trial:
    """So many units, and what is asked of them."""

    demand: Demand
    units: int
    alone_s: float
    """To a first token, if nobody waits."""

    def tried(self, candidate: Candidate, ready: int | None = None) -> Outcome:
        """`ready`: units that run at first; None: enough."""
        if ready is None:
            first = float(self.demand.slots[:40].mean())
            ready = min(max(ceil(first / SLOTS / 0.6), 1), self.units)
        return Coarse(
            self.demand,
            self.units,
            SLOTS,
            TERMS,
            candidate.make(),
            ttft_s=TTFT_S - self.alone_s,
            wait_s=WAIT_S,
            ready=ready,
        ).run()
