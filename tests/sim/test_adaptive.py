"""Adaptive slots under load: they find what an engine can do, and more load costs no goodput."""

from __future__ import annotations

from statistics import median

import pytest

from policies.adaptive import AdaptiveSlots
from policies.state import Backend
from sim.cluster import SECOND, Cluster, Result
from sim.members import Change, Incident, Member
from sim.router import End
from sim.workload import Arrival, Workload
from tests.sim.test_cluster import ENGINE, every, rules

POLICY = "rules: [{name: all, pick: least-load, queue: {wait: 10s, depth: 50}}]"
SLOTS = 64
"""Eight times what the engine takes at once."""
CAPACITY = 7.0
"""Requests a second of 200 and 50 tokens that one engine answers."""


def play(load: float, *, adaptive: bool, seconds: int = 60, **options: object) -> tuple[Cluster, Result]:
    """One backend whose `slots` are far too many, under so many times what it can do."""
    slots = AdaptiveSlots.of("a") if adaptive else None
    members = [Member(Backend("a", slots=SLOTS, models=frozenset({"m"}), adaptive=slots), ENGINE)]
    arrivals = every(1.0 / (CAPACITY * load), round(CAPACITY * load * seconds))
    cluster = Cluster(members, rules(members, POLICY), **options)  # type: ignore[arg-type]
    return cluster, cluster.run(Workload("test", arrivals))


def goodput(result: Result, first_s: float = 10.0, last_s: float = 60.0) -> float:
    """Complete answers a second."""
    return sum(trip.end is End.OK and first_s <= trip.ended < last_s for trip in result.trips) / (
        last_s - first_s
    )


def time_in_engine(result: Result, after_s: float) -> float:
    """From dispatch to first token, the median in seconds."""
    return median(
        trip.first_token - trip.arrived - trip.held_s
        for trip in result.trips
        if trip.end is End.OK and trip.arrived >= after_s
    )


@pytest.mark.parametrize("load", [2.0, 5.0])
def test_goodput_does_not_collapse_under_overload(load: float) -> None:
    _, peak = play(1.0, adaptive=True)
    _, over = play(load, adaptive=True)
    assert goodput(over) >= 0.9 * goodput(peak)
    assert goodput(over) >= 0.9 * goodput(play(load, adaptive=False)[1])


def test_it_finds_what_the_engine_takes_and_keeps_its_queue_short() -> None:
    cluster, result = play(3.0, adaptive=True, seconds=120)
    adaptive = cluster.fleet["a"].adaptive
    assert adaptive is not None
    assert ENGINE.max_num_seqs <= adaptive.slots(SLOTS) <= 2 * ENGINE.max_num_seqs
    _, without = play(3.0, adaptive=False, seconds=120)
    assert time_in_engine(result, 30.0) < 0.5 * time_in_engine(without, 30.0)


def test_a_step_of_the_load_and_its_end_heal_by_themselves() -> None:
    slots = AdaptiveSlots.of("a")
    members = [Member(Backend("a", slots=SLOTS, models=frozenset({"m"}), adaptive=slots), ENGINE)]
    times = [n / CAPACITY / 0.5 for n in range(105)]
    times += [30.0 + n / CAPACITY / 5 for n in range(1050)]
    times += [60.0 + n / CAPACITY / 0.5 for n in range(210)]
    arrivals = [Arrival(round(at * SECOND), 200, 50) for at in times]
    result = Cluster(members, rules(members, POLICY)).run(Workload("step", arrivals))
    late = [trip for trip in result.trips if trip.arrived >= 80.0]
    assert {trip.end for trip in late} == {End.OK}
    assert max(trip.held_s for trip in late) == 0.0
    assert goodput(result, 35.0, 60.0) >= 0.9 * CAPACITY


def test_it_goes_on_behind_an_outage() -> None:
    incidents = [Incident(20 * SECOND, "a", Change.DOWN), Incident(30 * SECOND, "a", Change.UP)]
    _, result = play(1.0, adaptive=True, incidents=incidents)
    assert goodput(result, 40.0, 60.0) >= 0.9 * CAPACITY
