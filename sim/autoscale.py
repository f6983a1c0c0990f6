"""Standbys in a simulated cluster: started and stopped by the controller that the proxy runs.

Each standby has its `policies.standby.Standby`, and takes the moves that the proxy's would. What a provider would
do takes a fixed time here. Requests that only a standby may serve are held by the valve, and have the controller
decide at once, as in the proxy; otherwise it decides every few seconds.

Of requests that have ended only sums are kept (`Tally`), so that weeks fit into memory.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Any, Final, NamedTuple, Protocol

from policies.pools import MeanTokens, Terms, pools
from policies.routing import STANDBY
from policies.rules import RuleSet
from policies.scaling import PENDING, Pool, Step
from policies.standby import PAID, Event, Move, Standby, State
from probes.base import Hysteresis
from sim.cluster import CALL, CHECK, SECOND, Cluster
from sim.members import Change, Incident, Member, Node
from sim.router import End, Request
from sim.trips import Trip

DAY_S: Final = 86400.0
HOUR_S: Final = 3600.0
DRAIN_CHECK: Final = SECOND
"""How often is looked whether a draining one is empty."""


@dataclass(frozen=True, slots=True)
class StandbyTerms:
    """How a standby starts and stops, and what it costs. Durations are seconds."""

    prepare_s: float = 0.0
    cold_start_s: float = 180.0
    stop_s: float = 10.0
    drain_s: float = 300.0
    min_on_s: float = 300.0
    min_off_s: float = 60.0
    cost_per_hour: float | None = None


class Scaler(Protocol):
    """What decides: `policies.scaling.Controller`, or a rule that it is compared with."""

    def decide(self, pools: Sequence[Pool], now: float, wall: float) -> list[Step]: ...


class Sample(NamedTuple):
    """A pool at a moment."""

    at_s: float
    demand: float
    """Tokens."""
    capacity: float
    coming: float
    paid: int
    """Standbys that are paid for."""


@dataclass(slots=True)
class Tally:
    """What became of the requests of a day."""

    requests: int = 0
    met: int = 0
    """Answered whole and within the service level."""
    rejected: int = 0
    failed: int = 0
    """Without a whole answer, for another reason; clients that left are not counted at all."""
    token_cost: float = 0.0
    unpriced: int = 0
    """Complete answers of backends that are paid neither by token nor by hour."""
    ttft_s: array[float] = field(default_factory=lambda: array("f"))
    """Of all requests, infinite for those without a whole answer."""

    @property
    def attainment(self) -> float:
        return self.met / self.requests if self.requests else 1.0


class Autoscaled(Cluster):
    """A simulation in which some members run only when they are started."""

    def __init__(
        self,
        members: Iterable[Member],
        rules: RuleSet,
        standbys: Mapping[str, StandbyTerms],
        scaler: Scaler,
        *,
        sla: tuple[float, float] = (inf, inf),
        cost: Callable[[str, int, int, int], float | None] | None = None,
        every_s: float = 5.0,
        epoch: float = 0.0,
        **options: Any,
    ) -> None:
        """`standbys`: those among the members, which sleep at first. `sla`: TTFT and TPOT of each request,
        seconds. `cost`: of a backend, and tokens of a prompt, of it cached, and of an answer. `every_s`: how
        often it decides. Raises ValueError."""
        super().__init__(members, rules, epoch=epoch, **options)
        if unknown := [name for name in standbys if name not in self.nodes]:
            raise ValueError(f"a standby is named {unknown[0]!r}, the members are {', '.join(self.nodes)}")
        self.standbys = {name: Standby(name, since=epoch) for name in standbys}
        self.moves: list[Move] = []
        self.samples: list[Sample] = []
        self.days: dict[int, Tally] = {}
        """By day since the beginning."""
        self.paid: dict[str, list[tuple[float, float]]] = {name: [] for name in standbys}
        """Spans in which each was paid for, seconds since the beginning."""
        self._terms = dict(standbys)
        self._scaler = scaler
        self._sla, self._cost = sla, cost
        self._every = round(every_s * SECOND)
        self._means = MeanTokens()
        self._asked = False
        """A decision is due at once."""
        for name in standbys:
            self.nodes[name].up = False
            self.nodes[name].backend.standby = True
            self.fleet.put(name, 0.0, asleep=True)
        self._note_moves()
        self._call(0, self._tick)

    @property
    def began(self) -> float:
        """Unix time of the beginning."""
        return self._epoch

    @property
    def wall(self) -> float:
        """Unix time."""
        return self._epoch + self.now / SECOND

    def hours(self, name: str, first_s: float = 0.0, end_s: float = inf) -> float:
        """For which a standby was paid in a span."""
        spans = self.paid[name]
        return sum(max(min(end, end_s) - max(begin, first_s), 0.0) for begin, end in spans) / HOUR_S

    def _call(self, at: int, what: Callable[[], object]) -> None:
        self._at(at, CALL, what)

    # Deciding

    def submit(self, request: Request, now: float) -> None:
        super().submit(request, now)
        held = request.routing
        if held is not None and held.decided_by == STANDBY and not self._asked:
            self._asked = True
            self._call(self.now, self._decide)

    def _tick(self) -> None:
        self._digest(self.result.trips)
        pool = self._decide()
        if pool is not None:
            paid = sum(one.state in PAID for one in self.standbys.values())
            there = sum(unit.tokens for unit in pool.units if unit.available)
            coming = sum(unit.tokens for unit in pool.units if unit.state in PENDING)
            self.samples.append(Sample(self.now / SECOND, pool.demand, there, coming, paid))
        if self._open:
            self._call(self.now + self._every, self._tick)

    def _decide(self) -> Pool | None:
        self._asked = False
        now = self.now / SECOND
        terms = {name: self._terms_of(name) for name in self.standbys}
        found = pools(self.fleet, self.valve, self.standbys, terms, now, self.wall, self._means)
        for step in self._scaler.decide(found, now, self.wall):
            self._move(step.name, step.event, step.reason)
        return found[0] if found else None

    def _terms_of(self, name: str) -> Terms:
        terms, standby = self._terms[name], self.standbys[name]
        return Terms(
            terms.cost_per_hour,
            terms.prepare_s + terms.cold_start_s,
            terms.min_on_s,
            terms.min_off_s if standby.runs else 0.0,
        )

    # Acting

    def _move(self, name: str, event: Event, reason: str) -> None:
        standby, terms, node = self.standbys[name], self._terms[name], self.nodes[name]
        was_paid = standby.state in PAID
        move = standby.move(event, reason, self.wall)
        if move is None:
            return
        self.moves.append(move)
        now = self.now / SECOND
        if standby.state in PAID and not was_paid:
            self.paid[name].append((now, inf))
        elif was_paid and standby.state not in PAID:
            self.paid[name][-1] = (self.paid[name][-1][0], now)
        state, run = standby.state, standby.run
        if state is State.PREPARING:
            self._later(terms.prepare_s, name, run, state, Event.PREPARED, "prepared")
        elif state is State.STARTING:
            self._later(terms.cold_start_s, name, run, state, Event.STARTED, "it answers")
        elif state is State.READY:
            if move.before is State.STARTING:
                self._answers(node)
            self._put(name, asleep=False)
        elif state is State.DRAINING:
            self._put(name, asleep=True, draining=True)
            self._drain(name, run, self.now + round(terms.drain_s * SECOND))
        elif state is State.STOPPING:
            self._change(Incident(self.now, name, Change.DOWN))
            self._put(name, asleep=True)
            self._later(terms.stop_s, name, run, state, Event.STOPPED, "stopped")

    def _later(self, seconds: float, name: str, run: str, state: State, event: Event, reason: str) -> None:
        def happens() -> None:
            standby = self.standbys[name]
            if standby.run == run and standby.state is state:
                self._move(name, event, reason)

        self._call(self.now + round(seconds * SECOND), happens)

    def _drain(self, name: str, run: str, until: int) -> None:
        standby = self.standbys[name]
        if standby.run != run or standby.state is not State.DRAINING:
            return
        running = self.fleet[name].in_flight
        if not running:
            self._move(name, Event.DRAINED, "nothing runs on it")
        elif self.now >= until:
            self._move(name, Event.DRAINED, f"{running} requests took too long to end")
        else:
            self._call(self.now + DRAIN_CHECK, partial(self._drain, name, run, until))

    def _answers(self, node: Node) -> None:
        """It answers: its probes have said so."""
        node.up = True
        node.health = Hysteresis(self.timing.up, self.timing.down)
        node.backend.connects = True
        node.backend.probed(True, self.now / SECOND)

    def _put(self, name: str, *, asleep: bool, draining: bool = False) -> None:
        now = self.now / SECOND
        self.fleet.put(name, now, asleep=asleep, draining=draining)
        self._note_moves()
        self.poll(now)

    def _check(self, node: Node) -> None:
        """A standby that does not run is not asked."""
        if node.backend.asleep and not node.up:
            self._at(self.now + self._pause(self.timing.interval_s), CHECK, node)
        else:
            super()._check(node)

    # Counting

    def finish(self) -> None:
        """Count what is left. Call it after `run`."""
        self._digest(self.result.trips)
        end = self.now / SECOND
        for spans in self.paid.values():
            if spans and spans[-1][1] == inf:
                spans[-1] = (spans[-1][0], end)

    def _digest(self, trips: list[Trip]) -> None:
        kept = []
        for trip in trips:
            if trip.end is None:
                kept.append(trip)
            else:
                self.count(trip)
        trips[:] = kept

    def count(self, trip: Trip) -> None:
        """A request has ended, a few seconds ago at most."""
        if trip.end is End.GONE:
            return
        day = self.days.setdefault(int(trip.arrived // DAY_S), Tally())
        day.requests += 1
        ttft, tpot = trip.ttft_s, trip.tpot_s
        if trip.end is not End.OK or ttft is None:
            day.ttft_s.append(inf)
            if trip.end is End.REJECTED:
                day.rejected += 1
            else:
                day.failed += 1
            return
        day.ttft_s.append(ttft)
        day.met += ttft <= self._sla[0] and (tpot is None or tpot <= self._sla[1])
        arrival = trip.arrival
        tokens = arrival.prompt_tokens, trip.cached_tokens, arrival.output_tokens
        price = self._cost(trip.backend, *tokens) if self._cost is not None else None
        if price is not None:
            day.token_cost += price
        elif trip.backend not in self.standbys or self._terms[trip.backend].cost_per_hour is None:
            day.unpriced += 1


def totals(days: Collection[Tally]) -> Tally:
    """All days together."""
    total = Tally()
    for day in days:
        for name in ("requests", "met", "rejected", "failed", "token_cost", "unpriced"):
            setattr(total, name, getattr(total, name) + getattr(day, name))
        total.ttft_s.extend(day.ttft_s)
    return total
