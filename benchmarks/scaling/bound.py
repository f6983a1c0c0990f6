"""What nobody could do better: unit-hours of one who knows all that will come, but pays for cold starts.

In the coarse model the k-th unit costs its time in each bin in which it runs, each start costs the cold start and
the stop, and a bin without it loses the requests that only it had room for. With a price on each lost request the
units do not depend on each other, and for each the cheapest way is found by dynamic programming. For any price, the
cost found less the price of what may be lost is a lower bound (weak Lagrangian duality); the highest of several is
taken.
"""

from __future__ import annotations

from math import ceil

from benchmarks.scaling.load import BIN_S, Demand
from sim.autoscale import StandbyTerms

PRICES = tuple(10.0 ** (step / 4) for step in range(-18, -3))
"""Unit-hours for a lost request."""


def lower_bound(demand: Demand, slots: int, terms: StandbyTerms, attainment: float) -> float:
    """Unit-hours at least for this share of requests within the SLA."""
    import numpy as np

    held = demand.slots
    came = demand.requests
    levels = ceil(float(held.max()) / slots)
    start = (terms.cold_start_s + terms.stop_s) / 3600
    width = BIN_S / 3600
    lost = [
        np.where(held > 0, came * np.clip(held - level * slots, 0, slots) / np.maximum(held, 1e-9), 0.0)
        for level in range(levels)
    ]
    allowed = (1.0 - attainment) * float(came.sum())
    best = 0.0
    for price in PRICES:
        cost = sum(_cheapest((price * one).tolist(), width, start) for one in lost)
        best = max(best, cost - price * allowed)
    return best


def _cheapest(losses: list[float], width: float, start: float) -> float:
    """Of all ways for a unit to be on or off in each bin."""
    on, off = start, 0.0
    for loss in losses:
        on, off = min(on, off + start) + width, min(off, on) + loss
    return min(on, off)
