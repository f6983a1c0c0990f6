"""A coarse simulation of units that are all alike: what comes in fifteen seconds is added up and flows through.

Weeks take seconds, where `sim/autoscale.py` takes an hour. Standbys, their moves and whoever decides are the same
objects. What it leaves out is chance within a bin, and how the units share the load; `__main__.py` plays a day in
both and shows how far they are apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Final

from benchmarks.scaling.load import BIN_S, DAY_S, Demand
from policies.offered import Offered
from policies.scaling import PENDING, Pool, Unit
from policies.standby import PAID, Event, Standby, State
from sim.autoscale import Sample, Scaler, StandbyTerms

if TYPE_CHECKING:
    import numpy as np

EPOCH: Final = 1_764_028_800.0
"""Unix time of the first day's midnight."""


@dataclass(slots=True)
class Outcome:
    """What a run came to."""

    hours_by_day: list[float]
    """Of units."""
    requests_by_day: list[float]
    met_by_day: list[float]
    samples: list[Sample] = field(default_factory=list)

    @property
    def hours(self) -> float:
        return sum(self.hours_by_day)

    @property
    def attainment(self) -> float:
        return sum(self.met_by_day) / sum(self.requests_by_day)

    def part(self, first_day: int, days: int) -> Outcome:
        """Days, counted from 0."""
        whole, size = slice(first_day, first_day + days), DAY_S // BIN_S
        return Outcome(
            self.hours_by_day[whole],
            self.requests_by_day[whole],
            self.met_by_day[whole],
            self.samples[first_day * size : (first_day + days) * size],
        )


class Coarse:
    """One run."""

    def __init__(
        self,
        demand: Demand,
        units: int,
        slots: int,
        terms: StandbyTerms,
        scaler: Scaler,
        *,
        ttft_s: float,
        wait_s: float,
        ready: int = 1,
    ) -> None:
        """`ttft_s`: what may be waited at most within the SLA. `wait_s`: what the valve has wait at most. `ready`:
        that run at first."""
        self.demand, self.slots, self.terms, self.scaler = demand, slots, terms, scaler
        self.ttft_s, self.wait_s = ttft_s, wait_s
        self.standbys = [Standby(f"unit-{at:03d}", since=EPOCH) for at in range(units)]
        for standby in self.standbys[:ready]:
            for event in (Event.START, Event.PREPARED, Event.STARTED):
                standby.move(event, "at first", EPOCH - 1e6)
        self._by_name = {standby.name: at for at, standby in enumerate(self.standbys)}
        self._due: list[tuple[float, int, State, Event]] = []
        """When, which, the state in which it counts, and what happens."""
        self._units = [self._unit(standby, EPOCH) for standby in self.standbys]

    def run(self) -> Outcome:
        requests, slot_s = self.demand.requests.tolist(), self.demand.slot_s.tolist()
        mean_s = self.demand.mean_s
        offered = Offered()
        queue = 0.0
        hours, met = [], []
        samples: list[Sample] = []
        for at, (came, work) in enumerate(zip(requests, slot_s, strict=True)):
            now = float(at * BIN_S)
            wall = EPOCH + now
            self._happen(wall)
            room = self.slots * sum(one.state is State.READY for one in self.standbys)
            before = queue
            served = min(queue + work, float(room * BIN_S))
            queue += work - served
            wait_s = self.wait_s if room else inf
            lost = max(queue - room * wait_s, 0.0) if room else 0.0
            queue -= lost
            good = max(came - lost / mean_s, 0.0)
            if queue and (not room or (before + queue) / (2 * room) > self.ttft_s):
                good = 0.0
            met.append(good)
            paid = sum(one.state in PAID for one in self.standbys)
            hours.append(paid * BIN_S / 3600)
            offered.arrived(came, now)  # how long each of them takes nobody knows before
            pool = self._pool(served / BIN_S, queue / mean_s, offered.samples(now + BIN_S), wall)
            if came:
                offered.served(came, work / came, now)
            for step in self.scaler.decide([pool], now, wall):
                self._move(self._by_name[step.name], step.event, wall)
            coming = self.slots * sum(one.state in PENDING for one in self.standbys)
            samples.append(Sample(now, pool.demand, float(room), float(coming), paid))
        return Outcome(_by_day(hours), _by_day(requests), _by_day(met), samples)

    def _pool(self, in_use: float, waiting: float, offered: Sequence[float], wall: float) -> Pool:
        for at, standby in enumerate(self.standbys):
            if self._units[at].state is not standby.state or self._units[at].in_state_s < inf:
                self._units[at] = self._unit(standby, wall)
        cold = waiting > 0.0 and not any(one.state is State.READY for one in self.standbys)
        return Pool(
            "m",
            self._units,
            tokens_in_use=in_use,
            tokens_waiting=waiting,
            offered=offered,
            waiting=round(waiting),
            only=[frozenset(self._by_name)] if cold else [],
        )

    def _unit(self, standby: Standby, wall: float) -> Unit:
        """Tokens are slots here: all requests are alike."""
        terms = self.terms
        in_state_s = wall - standby.since
        settled = in_state_s > max(terms.min_on_s, terms.min_off_s)
        return Unit(
            standby.name,
            "remote",
            float(self.slots),
            standby.state,
            inf if settled else in_state_s,
            standby.state is State.READY,
            cost_per_hour=terms.cost_per_hour,
            cold_start_s=terms.prepare_s + terms.cold_start_s,
            least_on_s=terms.min_on_s,
            least_off_s=terms.min_off_s if standby.runs else 0.0,
        )

    def _move(self, at: int, event: Event, wall: float) -> None:
        standby, terms = self.standbys[at], self.terms
        if standby.move(event, "", wall) is None:
            return
        after = {
            State.PREPARING: (terms.prepare_s, Event.PREPARED),
            State.STARTING: (terms.cold_start_s, Event.STARTED),
            State.DRAINING: (self.demand.mean_s, Event.DRAINED),
            State.STOPPING: (terms.stop_s, Event.STOPPED),
        }.get(standby.state)
        if after is not None:
            seconds, happens = after
            self._due.append((wall + seconds, at, standby.state, happens))
            if not seconds:
                self._happen(wall)

    def _happen(self, wall: float) -> None:
        while due := [one for one in self._due if one[0] <= wall]:
            self._due = [one for one in self._due if one[0] > wall]
            for when, at, state, event in due:
                if self.standbys[at].state is state and self.standbys[at].since <= when:
                    self._move(at, event, when)


def _by_day(values: list[float]) -> list[float]:
    size = DAY_S // BIN_S
    return [sum(values[at : at + size]) for at in range(0, len(values), size)]


def most_slots(demand: Demand) -> float:
    """The most that are held in any minute."""
    minute = 60 // BIN_S
    slots: np.ndarray = demand.slots
    return float(slots[: len(slots) // minute * minute].reshape(-1, minute).mean(axis=1).max())
