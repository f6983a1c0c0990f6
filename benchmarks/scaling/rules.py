"""What the controller is compared with: the rule of Kubernetes' autoscaler, and capacity that stays."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import ceil

from policies.scaling import PENDING, Pool, Step
from policies.standby import Event, State


class HorizontalPodAutoscaler:
    """`ceil(n * metric / target)` of the tokens in use and waiting, within a tolerance of 10 %; the highest of the
    last 300 s when it goes down (Kubernetes' defaults). Units that start count as there, as its `n` does.

    The metric is what its units say of themselves, as a mean of some time. With `by_rate` it is instead what is
    offered: the requests that come, times the time that they take. One that is full says nothing of that.
    """

    TOLERANCE = 0.1
    WINDOW_S = 300.0

    def __init__(self, target: float, samples: int = 1, by_rate: bool = False) -> None:
        """`target`: of capacity in use. `samples`: of the metric, whose mean is taken."""
        self.target = target
        self.by_rate = by_rate
        self._metric: deque[float] = deque(maxlen=samples)
        self._wanted: deque[tuple[float, int]] = deque()

    def decide(self, pools: Sequence[Pool], now: float, wall: float) -> list[Step]:
        (pool,) = pools
        on = [unit for unit in pool.units if unit.state in PENDING or unit.state is State.READY]
        size = max(unit.tokens for unit in pool.units)
        self._metric.append(pool.offered[-1] if self.by_rate and pool.offered else pool.held)
        load = sum(self._metric) / len(self._metric)
        if not on:
            wanted = ceil(load / size)
        else:
            ratio = load / (len(on) * size) / self.target
            wanted = len(on) if abs(ratio - 1.0) <= self.TOLERANCE + 1e-9 else ceil(len(on) * ratio - 1e-9)
        wanted = max(wanted, 1)
        self._wanted.append((now, wanted))
        while self._wanted[0][0] <= now - self.WINDOW_S:
            self._wanted.popleft()
        highest = max(count for _, count in self._wanted)
        return resize(pool, wanted if wanted > len(on) else min(len(on), highest))


class Static:
    """So many, always."""

    def __init__(self, units: int) -> None:
        self.units = units

    def decide(self, pools: Sequence[Pool], now: float, wall: float) -> list[Step]:
        (pool,) = pools
        return resize(pool, self.units)


def resize(pool: Pool, units: int) -> list[Step]:
    """Steps to so many units."""
    on = [unit for unit in pool.units if unit.state in PENDING or unit.state is State.READY]
    off = [unit for unit in pool.units if unit.state in (State.DRAINING, State.STANDBY)]
    if units >= len(on):
        first = sorted(off, key=lambda unit: unit.state is not State.DRAINING)
        return [Step(unit.name, Event.START, "by the rule") for unit in first[: units - len(on)]]
    last = sorted(on, key=lambda unit: unit.state is State.READY)  # those that have not started yet
    return [Step(unit.name, Event.STOP, "by the rule") for unit in last[: len(on) - units]]
