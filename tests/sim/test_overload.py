"""Laws of a cluster that is offered more than it can serve: goodput, bounded queues, fairness, ageing."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from random import Random
from statistics import median

import pytest

from policies.files import KnownNames, read_policy
from policies.state import Backend
from sim.cluster import SECOND, Cluster
from sim.engine import EngineSettings, StepCost
from sim.members import Member
from sim.router import End
from sim.workload import Arrival, Workload, in_order

ENGINE = EngineSettings(StepCost(20_000.0, 100.0, 0.005, 50.0), max_num_seqs=64, kv_tokens=200_000)
SLOTS = 16
BACKENDS = 2
CAPACITY = 6.0
"""Requests a second that two of them serve with all their slots taken."""
POLICY = "rules: [{name: all, pick: least-load, queue: {wait: 10s, depth: 200}}]"
SECONDS, WARM_UP = 120, 30
SEEDS = (1, 2, 3)


def arrivals(tenant: str, rate: float, seed: int, priority: int = 0) -> Iterator[Arrival]:
    rng = Random(f"{seed} {tenant}")
    at = rng.expovariate(rate)
    while at < SECONDS:
        prompt, output = (max(round(rng.lognormvariate(0.0, 0.5) * mean), 2) for mean in (500, 200))
        yield Arrival(round(at * SECOND), prompt, output, tenant=tenant, priority=priority)
        at += rng.expovariate(rate)


class Scene:
    """Tenants with their rates before equal backends."""

    def __init__(self, seed: int, rates: dict[str, float], priorities: dict[str, int] | None = None) -> None:
        members = [
            Member(Backend(f"b{number}", slots=SLOTS, models=frozenset("m")), ENGINE)
            for number in range(BACKENDS)
        ]
        rules = read_policy(
            POLICY, "test", KnownNames([member.backend for member in members], frozenset({"local"})), 1
        ).rules
        self.cluster = Cluster(members, rules, seed=seed)
        self.most_held = self.most_in_flight = 0
        flows = [arrivals(name, rate, seed, (priorities or {}).get(name, 0)) for name, rate in rates.items()]
        load = Workload("overload", in_order(arrival for flow in flows for arrival in flow))
        decided = self.cluster.decided

        def watch(*seen: object) -> None:
            self.most_held = max(self.most_held, self.cluster.valve.queued)
            self.most_in_flight = max(self.most_in_flight, *(b.in_flight for b in self.cluster.fleet))
            decided(*seen)  # type: ignore[arg-type]

        self.cluster.decided = watch  # type: ignore[method-assign, assignment]
        self.trips = [trip for trip in self.cluster.run(load).trips if trip.arrived >= WARM_UP]

    def of(self, tenant: str, end: End) -> list[float]:
        """Times to the first token of those that were served, or until the others were refused, in order."""
        trips = [trip for trip in self.trips if trip.facts.tenant == tenant and trip.end is end]
        return sorted((trip.ttft_s or 0.0) if end is End.OK else trip.total_s for trip in trips)

    @property
    def goodput(self) -> float:
        """Complete answers a second that began within the hold and a second."""
        good = [trip for trip in self.trips if trip.end is End.OK and (trip.ttft_s or 0.0) < 11.0]
        return len(good) / (SECONDS - WARM_UP)


@cache
def flood(times: float, seed: int) -> Scene:
    return Scene(seed, {"a": CAPACITY * times})


@pytest.mark.parametrize("seed", SEEDS)
def test_goodput_does_not_fall_when_the_load_doubles(seed: int) -> None:
    peak = max(flood(times, seed).goodput for times in (1, 2, 5, 10))
    assert peak > 0.9 * CAPACITY
    for times in (2, 5, 10):
        assert flood(times, seed).goodput >= 0.9 * peak


@pytest.mark.parametrize("seed", SEEDS)
def test_who_is_turned_away_is_told_at_once(seed: int) -> None:
    for times in (2, 5, 10):
        refused = flood(times, seed).of("a", End.REJECTED)
        assert len(refused) > 100
        assert refused[int(0.99 * len(refused))] < 0.05


@pytest.mark.parametrize("seed", SEEDS)
def test_what_waits_and_what_runs_is_bounded_at_ten_times_capacity(seed: int) -> None:
    scene = flood(10, seed)
    assert 0 < scene.most_held <= 200
    assert scene.most_in_flight <= 1.5 * SLOTS


def test_a_light_tenant_hardly_notices_a_flood() -> None:
    """One at ten times the capacity; the other, at 0.3 of its share, waits at most 1.2 times as long for its first
    tokens as alone (p95), keeps all its requests, and costs no more than a quarter of what is served."""
    share = CAPACITY / 2
    ratios = []
    for seed in range(5):
        alone = Scene(seed, {"b": 0.3 * share}).of("b", End.OK)
        both = Scene(seed, {"a": 10 * CAPACITY, "b": 0.3 * share})
        waited = both.of("b", End.OK)
        assert not both.of("b", End.REJECTED)
        assert len(waited) == len(alone)
        ratios.append(waited[int(0.95 * len(waited))] / alone[int(0.95 * len(alone))])
        assert both.goodput >= 0.75 * CAPACITY
    assert median(ratios) <= 1.2


def test_low_priority_is_served_in_the_end() -> None:
    """Under a flood of more urgent requests, whatever its tenant: late, and less often, but served."""
    rates = {"urgent": 5 * CAPACITY, "patient": 0.2}
    scene = Scene(1, rates, {"urgent": 1})
    late = scene.of("patient", End.OK)
    assert len(late) >= 0.9 * len([trip for trip in scene.trips if trip.facts.tenant == "patient"])
    assert median(late) < 11.0
