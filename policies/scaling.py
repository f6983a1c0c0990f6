"""When standbys start and stop: demand in tokens against capacity in tokens, one pool for each model.

Demand is what requests hold on backends now, plus what those that wait are expected to hold; capacity is what ready
backends can hold inside their SLA. More is started, the cheapest first,

* at once for a request that only a standby may serve,
* when demand is above `up` of the capacity that is there or on its way,
* when the forecast (`demand.py`) exceeds it with its margin within the time of a cold start,
* when TTFT or TPOT are going to miss their objective by then, or a host raises an alarm,
* when the tokens that it would take over cost more elsewhere than its hours.

The dearest is given back when what is left stays below `up`, and holds what is forecast; without a forecast, below
`down`. The last one goes when nothing was asked for in `settle_s`. A start holds all that back for `settle_s`.

Once it is known what is offered (`offered.py`: what requests would hold if none had to wait or was refused, quarter
of a minute by quarter), a standby is judged by what it would do: it runs as long as `least_use` of it would be in
use above `up` of the capacity without it, in the mean of the last minute or of the last five, with what the
forecast expects on top. This is the newsvendor's rule (Arrow, Harris and Marschak, Econometrica 19(3), 1951): the
last unit is worth its hours if it is needed in a large enough share of the time, and bursts count as they come.

Pure: `decide` takes pools as they stand and says what to do. The same object runs in the proxy and in the
simulator.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from policies.demand import Ahead, Forecast, Trend
from policies.standby import Event, State

PENDING = frozenset({State.PREPARING, State.STARTING})
"""Capacity that is on its way."""
SMOOTH_S = 180.0
"""Over which tokens that are held are averaged, where it is known what is offered."""
SHORT = 4
"""Samples of what is offered in which a rush is seen: a minute."""
DECIDED_S = 60.0
"""Added to a cold start: demand is known by the minute."""
FORGOTTEN_S = 86400.0
"""After which nothing is known any more of a model that no backend serves."""
BACK = 0.8
"""Of its cost by the hour: what a standby does has to cost less than that by the token before it is given back."""

_ON = frozenset(State) - {State.STANDBY, State.FAILED}
"""States that count against the ceiling of a site."""


@dataclass(frozen=True, slots=True)
class ScalingSettings:
    """When to start and stop. Durations are seconds."""

    up: float = 0.8
    """Of the capacity in use: more is started above."""
    down: float = 0.4
    """Below, some is given back."""
    least_use: float = 0.02
    """Of a standby: it runs while so much would be in use, where it is known what is offered."""
    settle_s: float = 300.0
    """Nothing is given back for so long after a start."""
    most_at_once: int = 1
    """Starts, and stops, of one pool in one decision; as many as run already, or half of them, may always."""
    quantile: float = 0.95
    """Of the forecast's errors that its margin covers; 0: nothing is forecast."""
    most: Mapping[str, int] = field(default_factory=dict)
    """Standbys of a site that may run at once."""
    ttft_objective_s: float = inf
    """Means that are to be kept, where a pool has none of its own."""
    tpot_objective_s: float = inf


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
    tokens_in_use: float = 0.0
    """That its requests hold."""
    tokens_per_s: float = 0.0
    """Prompts and answers that it deals with in a second."""
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
    offered: Sequence[float] = ()
    """Tokens that would be in use if nobody had to wait, in each quarter of the last minutes, oldest first; empty:
    unknown."""
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
    def held(self) -> float:
        """Tokens in use, and those that wait."""
        return self.tokens_in_use + self.tokens_waiting

    @property
    def offered_lately(self) -> float:
        """Tokens, the mean of the last minute; 0: nothing was, or it is not known."""
        return _mean(self.offered[-SHORT:]) if self.offered else 0.0

    @property
    def demand(self) -> float:
        """Tokens, as far as the last minute tells."""
        return max(self.held, self.offered_lately)


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
        self._pasts: dict[str, _Past] = {}
        """By model."""

    def decide(self, pools: Sequence[Pool], now: float, wall: float) -> list[Step]:
        """What to do now; each standby is named once at most. `now` is monotonic, `wall` Unix time."""
        steps: dict[str, Step] = {}
        stops: list[Step] = []
        kept: set[str] = set()
        """Standbys that one of their pools has use for."""
        room = _Room(self.settings.most, pools)
        for pool in pools:
            past = self._pasts.setdefault(pool.model, _Past())
            past.note(pool, now, wall)
            view = _View(pool, past, self.settings, now)
            starts = view.starts(room)
            for step in starts:
                steps.setdefault(step.name, step)
            if starts:
                past.started_at = now
                past.on = (past.on or set()) | {step.name for step in starts}
            given_back = [] if starts else view.stops()
            stops += given_back
            kept |= {unit.name for unit in pool.units} - {step.name for step in given_back}
        for step in stops:
            if step.name not in kept:
                steps.setdefault(step.name, step)
        for model in [model for model, past in self._pasts.items() if now - past.noted_at > FORGOTTEN_S]:
            del self._pasts[model]
        return list(steps.values())

    def ahead(self, model: str, horizon_s: float) -> Ahead | None:
        """What is expected of a model; None: too little is known."""
        past = self._pasts.get(model)
        return None if past is None else past.forecast.ahead(horizon_s, self.settings.quantile)


class _Room:
    """How many more may run at each site."""

    def __init__(self, most: Mapping[str, int], pools: Sequence[Pool]) -> None:
        on = {unit.name: unit.site for pool in pools for unit in pool.units if unit.state in _ON}
        self._left = {site: limit - sum(at == site for at in on.values()) for site, limit in most.items()}

    def take(self, unit: Unit) -> bool:
        """Whether there is room for it, which it then has; what drains is there already."""
        if unit.state is State.DRAINING or unit.site not in self._left:
            return True
        self._left[unit.site] -= 1
        if self._left[unit.site] >= 0:
            return True
        self._left[unit.site] = 0
        return False


class _Past:
    """What is remembered of a pool."""

    __slots__ = (
        "alarmed",
        "demand",
        "forecast",
        "held",
        "held_sum",
        "noted_at",
        "on",
        "peaks",
        "started_at",
        "tpot",
        "ttft",
    )

    def __init__(self) -> None:
        self.forecast = Forecast()
        self.ttft, self.tpot = Trend(), Trend()
        self.started_at = -inf
        """When something of it was last started."""
        self.alarmed = False
        """Something was started for the alarm that goes on."""
        self.noted_at = -inf
        self.on: set[str] | None = None
        """Standbys that ran, or were to, when that was looked at last."""
        self.demand = 0.0
        self.held: deque[tuple[float, float]] = deque()
        """When, and how many tokens were held, of the last `SMOOTH_S`."""
        self.held_sum = 0.0
        self.peaks: deque[tuple[float, float]] = deque()
        """When something was held, and how much; only those that no later one exceeds."""

    def note(self, pool: Pool, now: float, wall: float) -> None:
        self.noted_at = now
        on = {unit.name for unit in pool.units if unit.state in PENDING or unit.state is State.READY}
        if self.on is not None and not on <= self.on:
            self.started_at = now  # by somebody else
        self.on = on
        self.demand = demand = self._demand(pool, now)
        self.forecast.note(demand, wall)
        while self.peaks and self.peaks[-1][1] <= pool.held:
            self.peaks.pop()
        self.peaks.append((now, pool.held))
        for trend, value in ((self.ttft, pool.ttft_s), (self.tpot, pool.tpot_s)):
            if value > 0.0:
                trend.note(value, now)
        self.alarmed = self.alarmed and bool(pool.alarm)

    def _demand(self, pool: Pool, now: float) -> float:
        self.held.append((now, pool.held))
        self.held_sum += pool.held
        while self.held[0][0] <= now - SMOOTH_S:
            self.held_sum -= self.held.popleft()[1]
        if not pool.offered:
            return pool.held
        # What is held at a moment is a matter of chance.
        return max(self.held_sum / len(self.held), pool.offered_lately)

    def peak(self, since: float) -> float:
        """The most that was held since a time."""
        while len(self.peaks) > 1 and self.peaks[0][0] < since:
            self.peaks.popleft()
        return self.peaks[0][1]


class _View:
    """One pool at one moment."""

    def __init__(self, pool: Pool, past: _Past, settings: ScalingSettings, now: float) -> None:
        self.pool, self.past, self.settings, self.now = pool, past, settings, now
        self.demand = past.demand
        self.coming = sum(unit.tokens for unit in pool.units if unit.state in PENDING)
        self.there = sum(unit.tokens for unit in pool.units if _serves(unit))
        self.on = sum(unit.state in PENDING or _serves(unit) for unit in pool.units)
        self.horizon_s = max(
            (unit.cold_start_s for unit in pool.units if unit.state is not None), default=0.0
        )
        self.ahead = (
            past.forecast.ahead(self.horizon_s + DECIDED_S, settings.quantile) if settings.quantile else None
        )
        self.figures = {"demand": self.demand, "capacity": self.there, "coming": self.coming}
        self.offered: list[float] = []
        """Samples over `up`, with what is expected on top."""
        if self.ahead is not None:
            self.figures |= {"expected": self.ahead.expected, "high": self.ahead.high}
        if pool.offered:
            more = max(self.ahead.more, 0.0) if self.ahead is not None else 0.0
            self.offered = [(sample + more) / settings.up for sample in pool.offered]
            self.figures["offered"] = _mean(pool.offered)

    def _use(self, tokens: float, beyond: float) -> float:
        """The share of a unit that would be in use beyond so many tokens: the higher mean, of the last minute or of
        all samples."""
        if tokens <= 0.0:
            return 0.0
        use = [min(max(sample - beyond, 0.0), tokens) / tokens for sample in self.offered]
        return max(_mean(use[-SHORT:]), _mean(use))

    def starts(self, room: _Room) -> list[Step]:
        found: list[Step] = []
        idle = sorted((unit for unit in self.pool.units if _may_start(unit)), key=_cost)
        for only in self.pool.only:
            if any(
                unit.name in only and (unit.state in PENDING or _serves(unit)) for unit in self.pool.units
            ):
                continue
            for unit in idle:
                if unit.name in only and room.take(unit):
                    found.append(self._start(unit, "requests wait that nothing else may serve"))
                    idle.remove(unit)
                    break
        most = max(self.settings.most_at_once, self.on)
        for unit in idle:
            if len(found) >= most:
                break
            why = self._why_start(unit)
            if why and room.take(unit):
                self.past.alarmed = bool(self.pool.alarm)
                found.append(self._start(unit, why))
        return found

    def _start(self, unit: Unit, why: str) -> Step:
        self.coming += unit.tokens
        return Step(unit.name, Event.START, why, self.figures)

    def _why_start(self, unit: Unit) -> str:
        """Empty: there is no need."""
        pool, up, have, demand, ahead = (
            self.pool, self.settings.up, self.there + self.coming, self.demand, self.ahead,
        )  # fmt: skip
        if have <= 0.0 and pool.held > 0.0:
            return f"{pool.held:.0f} tokens are asked for, and nothing serves them"
        if self.offered and have > 0.0:
            if (use := self._use(unit.tokens, have)) > self.settings.least_use:
                return f"{use:.0%} of it would be in use above {up:.0%} of {have:.0f} tokens"
            if demand > have:
                return f"demand of {demand:.0f} tokens is above {have:.0f}"
        elif have > 0.0 and demand > up * have:
            return f"demand of {demand:.0f} tokens is above {up:.0%} of {have:.0f}"
        elif ahead is not None and ahead.high > (have or self.settings.down * unit.tokens):
            return (
                f"within {self.horizon_s:.0f} s {ahead.expected:.0f} tokens are expected, {ahead.high:.0f} with a "
                f"margin of {ahead.margin:.0%}, and there is room for {have:.0f}"
            )
        if self.coming > 0.0 or demand <= 0.0 or have <= 0.0:
            return ""  # what follows has been answered, nobody asks, or from zero only a request starts one
        for name, value, objective in self._objectives(unit.cold_start_s):
            if value > objective:
                return (
                    f"{name} will be {value:.3g} s in {unit.cold_start_s:.0f} s if it goes on like this, above the "
                    f"objective of {objective:.3g} s"
                )
        if pool.alarm and not self.past.alarmed:
            return f"the host says {pool.alarm}, so its capacity is worth less"
        return self._cheaper_by_the_hour(unit)

    def _objectives(self, ahead_s: float) -> list[tuple[str, float, float]]:
        """Name, forecast and objective of the times that are to be kept."""
        pool, past, settings, when = self.pool, self.past, self.settings, self.now + ahead_s
        return [
            (name, max(trend.at(when), measured), objective)
            for name, trend, measured, objective in (
                ("TTFT", past.ttft, pool.ttft_s, min(pool.ttft_objective_s, settings.ttft_objective_s)),
                ("TPOT", past.tpot, pool.tpot_s, min(pool.tpot_objective_s, settings.tpot_objective_s)),
            )
            if objective < inf and measured > 0.0
        ]

    def _cheaper_by_the_hour(self, unit: Unit) -> str:
        """Why an hour of it costs less than the tokens that it would take over."""
        if unit.cost_per_hour is None or unit.price_per_token or unit.tokens <= 0.0:
            return ""
        spent = sum(_spent(other) for other in self.pool.units if _serves(other))
        held = sum(other.tokens_in_use for other in self.pool.units if _serves(other) and _spent(other) > 0.0)
        saved = spent * min(unit.tokens * self.settings.up / held, 1.0) if held > 0.0 else 0.0
        if saved <= unit.cost_per_hour:
            return ""
        return (
            f"tokens that it would take over cost {saved:.4g} an hour elsewhere, and it costs "
            f"{unit.cost_per_hour:.4g}"
        )

    def stops(self) -> list[Step]:
        pool, settings, past, ahead = self.pool, self.settings, self.past, self.ahead
        if self.now - past.started_at < settings.settle_s or self.coming > 0.0 or pool.waiting or pool.alarm:
            return []
        if any(value > objective for _, value, objective in self._objectives(self.horizon_s)):
            return []
        peak = past.peak(self.now - settings.settle_s)
        found: list[Step] = []
        there = self.there
        most = max(settings.most_at_once, self.on // 2)
        for unit in sorted((one for one in pool.units if _may_stop(one)), key=_cost, reverse=True):
            if len(found) == most:
                break
            left = there - unit.tokens
            why = ""
            if left <= 0.0:
                if peak <= 0.0 and (ahead is None or ahead.high <= settings.down * unit.tokens):
                    why = f"nothing was asked for in {settings.settle_s:.0f} s"
            elif self.offered:
                use = self._use(unit.tokens, left)
                if use <= settings.least_use and self.demand <= left:
                    why = f"{use:.1%} of it would be in use above {settings.up:.0%} of the {left:.0f} tokens left"
            elif ahead is None:
                if peak < settings.down * there and peak <= settings.up * left:
                    why = f"demand of {peak:.0f} tokens is below {settings.down:.0%} of {there:.0f}"
            elif self.demand <= settings.up * left and ahead.high <= left:
                why = (
                    f"within {self.horizon_s:.0f} s no more than {ahead.high:.0f} tokens are expected, and "
                    f"{left:.0f} are left without it"
                )
            if why and not self._cheaper_than_tokens(unit):
                found.append(Step(unit.name, Event.STOP, why, self.figures))
                there = left
        return found

    def _cheaper_than_tokens(self, unit: Unit) -> bool:
        """Whether what it does would cost more by the token elsewhere."""
        if unit.cost_per_hour is None or unit.price_per_token:
            return False
        prices = [other.price_per_token for other in self.pool.units if _serves(other) and other is not unit]
        paid = [price for price in prices if price]
        if not paid or len(paid) < len(prices):
            return False  # somebody else would do it for nothing more
        return unit.tokens_per_s * 3600.0 * min(paid) > BACK * unit.cost_per_hour


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _spent(unit: Unit) -> float:
    """What its tokens cost in an hour, at the pace of now."""
    return unit.tokens_per_s * 3600.0 * (unit.price_per_token or 0.0)


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
