"""When standbys start and stop: demand in tokens against capacity in tokens, one pool for each model.

Demand is what requests hold on backends now, plus what those that wait are expected to hold; capacity is what ready
backends can hold inside their SLA. Above `up` of the capacity that is there or on its way more is started, the
cheapest first; below `down` the dearest is given back, if what is left then stays below `up`. A request that only a
standby may serve starts one at once.

Pure: `decide` takes pools as they stand and says what to do. The same object runs in the proxy and in the
simulator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from policies.standby import Event, State

PENDING = frozenset({State.PREPARING, State.STARTING})
"""Capacity that is on its way."""


@dataclass(frozen=True, slots=True)
class ScalingSettings:
    """When to start and stop. Durations are seconds."""

    up: float = 0.8
    """Of the capacity in use: more is started above."""
    down: float = 0.4
    """Below, some is given back."""
    settle_s: float = 300.0
    """Nothing is given back for so long after a start."""
    most_at_once: int = 1
    """Starts, and stops, of one pool in one decision, unless requests wait that nothing else may serve."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A backend as scaling sees it."""

    name: str
    site: str = "local"
    tokens: float = 0.0
    """That it holds at once inside its SLA."""
    state: State | None = None
    """None: no standby; it is always there."""
    in_state_s: float = inf
    """Seconds since it came into that state."""
    available: bool = True
    """Whether it takes requests now."""
    in_flight: int = 0
    cost_per_hour: float | None = None
    """In the ledger's currency; None: unknown, which ranks behind every known one."""
    price_per_token: float | None = None
    """What a token of its pool costs there, prompt and answer as they are mixed; None: nothing or unknown."""
    cold_start_s: float = 0.0
    """From start to ready, as configured or as it was measured."""
    least_on_s: float = 0.0
    """It is not stopped sooner after it became ready."""
    least_off_s: float = 0.0
    """It is not started sooner after it was stopped."""
    pause_s: float = 0.0
    """Left of the back-off after a failure."""
    allowed: bool = True
    """False: a ceiling, a budget, or a plan that nobody has approved."""


@dataclass(frozen=True, slots=True)
class Pool:
    """All backends of one model, and what is asked of them."""

    model: str
    units: Sequence[Unit]
    tokens_in_use: float = 0.0
    tokens_waiting: float = 0.0
    """Of those that are held, their answers as they are expected."""
    waiting: int = 0
    only: Sequence[frozenset[str]] = ()
    """For every group of held requests that nothing but standbys may serve: which."""
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    """As they are measured now; 0: not."""
    ttft_objective_s: float = inf
    tpot_objective_s: float = inf
    alarm: str = ""
    """What a host probe says that makes its capacity worth less; empty: nothing."""

    @property
    def demand(self) -> float:
        """Tokens."""
        return self.tokens_in_use + self.tokens_waiting


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do: `event` is `Event.START` or `Event.STOP`."""

    name: str
    event: Event
    reason: str
    figures: Mapping[str, float] = field(default_factory=dict)
    """Those that the reason is made of."""


class Controller:
    """Decides over the standbys of one proxy, or of one simulated cluster."""

    def __init__(self, settings: ScalingSettings | None = None) -> None:
        self.settings = settings or ScalingSettings()
        self._started_at: dict[str, float] = {}
        """By model, when something of its pool was last started."""

    def decide(self, pools: Sequence[Pool], now: float, wall: float) -> list[Step]:
        """What to do now; each standby is named once at most. `now` is monotonic, `wall` Unix time."""
        steps: dict[str, Step] = {}
        for pool in pools:
            for step in self._of_pool(pool, now):
                steps.setdefault(step.name, step)
        return list(steps.values())

    def _of_pool(self, pool: Pool, now: float) -> list[Step]:
        settings = self.settings
        coming = sum(unit.tokens for unit in pool.units if unit.state in PENDING)
        there = sum(unit.tokens for unit in pool.units if _serves(unit))
        demand = pool.demand
        figures = {"demand": demand, "capacity": there, "coming": coming}
        starts: list[Step] = []
        idle = sorted((unit for unit in pool.units if _may_start(unit)), key=_cost)
        for only in pool.only:
            if any(unit.name in only and (unit.state in PENDING or _serves(unit)) for unit in pool.units):
                continue
            for unit in idle:
                if unit.name in only:
                    starts.append(
                        Step(unit.name, Event.START, "requests wait that only it may serve", figures)
                    )
                    idle.remove(unit)
                    coming += unit.tokens
                    break
        while idle and len(starts) < settings.most_at_once and demand > settings.up * (there + coming):
            unit = idle.pop(0)
            reason = f"demand of {demand:.0f} tokens is above {settings.up:.0%} of {there + coming:.0f}"
            starts.append(Step(unit.name, Event.START, reason, figures))
            coming += unit.tokens
        if starts:
            self._started_at[pool.model] = now
            return starts
        if (
            now - self._started_at.get(pool.model, -inf) < settings.settle_s
            or demand >= settings.down * there
        ):
            return []
        stops: list[Step] = []
        for unit in sorted((unit for unit in pool.units if _may_stop(unit)), key=_cost, reverse=True):
            left = there - unit.tokens
            if len(stops) == settings.most_at_once or demand > settings.up * left:
                break
            reason = f"demand of {demand:.0f} tokens is below {settings.down:.0%} of {there:.0f}"
            stops.append(Step(unit.name, Event.STOP, reason, figures))
            there = left
        return stops


def _serves(unit: Unit) -> bool:
    return unit.available and unit.state in (None, State.READY)


def _may_start(unit: Unit) -> bool:
    if not unit.allowed:
        return False
    if unit.state is State.DRAINING:
        return True
    return unit.state is State.STANDBY and unit.in_state_s >= unit.least_off_s and unit.pause_s <= 0.0


def _may_stop(unit: Unit) -> bool:
    return unit.state is State.READY and unit.in_state_s >= unit.least_on_s


def _cost(unit: Unit) -> tuple[float, float, str]:
    """Cheapest capacity first; what drains is there already."""
    if unit.state is State.DRAINING:
        return (-inf, 0.0, unit.name)
    cost = inf if unit.cost_per_hour is None else unit.cost_per_hour / max(unit.tokens, 1.0)
    return (cost, unit.cold_start_s, unit.name)
