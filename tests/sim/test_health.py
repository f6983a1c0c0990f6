"""What goes wrong with backends and heals by itself, in virtual time, through the proxy's own deciding."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from policies.health import Health
from sim.cluster import SECOND, Result
from sim.engine import StepCost
from sim.members import Change, Incident
from sim.router import End
from tests.sim.test_cluster import ENGINE, ends, every, member, simulate

LEAST_LOAD = "rules: [{name: all, pick: least-load, queue: {wait: 5s, depth: 200}}]"


def served(result: Result, first_s: float, last_s: float) -> Counter[str]:
    """By backend: requests that arrived in this time and were answered."""
    return Counter(
        trip.backend for trip in result.trips if first_s <= trip.arrived < last_s and trip.end is End.OK
    )


def test_a_backend_ten_times_slower_gets_a_fifth_of_its_share_at_most_and_stays() -> None:
    cost = ENGINE.cost
    slow = StepCost(10 * cost.alpha, 10 * cost.beta, 10 * cost.gamma, 10 * cost.delta)
    members = [member("a"), member("b"), replace(member("slow"), settings=replace(ENGINE, cost=slow))]
    _, result = simulate(members, every(0.15, 400))
    went = Counter(trip.backend for trip in result.trips if trip.arrived >= 10.0)
    assert 0 < went["slow"] <= went.total() / 3 / 5
    assert result.moves == [], "slow is not sick"


def test_one_that_flaps_is_tried_less_and_less_often_and_costs_nobody_an_answer() -> None:
    flaps = [
        Incident(second * SECOND, "b", Change.FAIL if second % 4 == 2 else Change.MENDED)
        for second in range(2, 120, 2)
    ]
    _, result = simulate(
        [member("a", slots=8), member("b", slots=8)], every(0.05, 2400, output=10), incidents=flaps
    )
    assert ends(result) == {End.OK: 2400}
    outs = [at / SECOND for at, name, available in result.moves if name == "b" and not available]
    assert len(outs) <= 16
    extra = sum(trip.attempts - 1 for trip in result.trips)
    assert extra <= 0.2 * len(result.trips) + 10 * 120
    assert extra < 100


def test_when_all_are_dead_the_answer_is_at_once_and_the_return_is_noticed() -> None:
    incidents = [Incident(10 * SECOND, name, Change.DOWN) for name in "ab"]
    incidents += [Incident(30 * SECOND, name, Change.UP) for name in "ab"]
    cluster, result = simulate([member("a"), member("b")], every(0.25, 200, output=10), incidents=incidents)
    during = [trip for trip in result.trips if 20.0 <= trip.arrived < 30.0]
    assert {(trip.end, trip.reason) for trip in during} == {(End.REJECTED, "no_backend")}
    assert max(trip.total_s for trip in during) == 0.0
    assert cluster.valve.queued == 0
    back = min(trip.first_token for trip in result.trips if trip.arrived >= 20.0 and trip.end is End.OK)
    assert back <= 30.0 + 2 * cluster.timing.interval_s


def test_a_fleet_that_answers_500_everywhere_is_asked_no_more_than_the_budget_allows_and_comes_back() -> None:
    incidents = [Incident(10 * SECOND, name, Change.FAIL) for name in "abc"]
    incidents += [Incident(40 * SECOND, name, Change.MENDED) for name in "abc"]
    members = [member(name) for name in "abc"]
    _, result = simulate(
        members, every(0.05, 1200, output=5), incidents=incidents, retries_per_s=1.0, retry_ratio=0.2
    )
    attempts = sum(trip.attempts for trip in result.trips)
    assert attempts <= 1.2 * len(result.trips) + 1.0 * 70
    after = [trip for trip in result.trips if trip.arrived >= 40.5]
    assert {trip.end for trip in after} == {End.OK}, "nobody waits for a breaker when all are in doubt"


def test_a_fleet_that_is_full_everywhere_is_left_alone_and_comes_back() -> None:
    incidents = [Incident(10 * SECOND, name, Change.FULL, retry_after_s=2.0) for name in "abc"]
    incidents += [Incident(20 * SECOND, name, Change.MENDED) for name in "abc"]
    members = [member(name) for name in "abc"]
    _, result = simulate(members, every(0.05, 800, output=5), incidents=incidents)
    during = [trip for trip in result.trips if 10.0 <= trip.arrived < 20.0]
    assert sum(trip.attempts for trip in during) <= 0.2 * len(during)
    assert {trip.reason for trip in during if trip.end is End.REJECTED} == {"overloaded"}
    assert {trip.end for trip in result.trips if trip.arrived >= 22.5} == {End.OK}


@pytest.mark.parametrize("slow_start_s", [0.0, 10.0])
def test_who_comes_back_gets_its_share_in_steps(slow_start_s: float) -> None:
    incidents = [Incident(5 * SECOND, "b", Change.DOWN), Incident(25 * SECOND, "b", Change.UP)]
    members = [member("a", slots=10), member("b", slots=10)]
    _, result = simulate(
        members,
        every(0.1, 700, output=40),
        incidents=incidents,
        health=Health(slow_start_s=slow_start_s),
    )
    back = next(at for at, name, available in result.moves if name == "b" and available) / SECOND
    early = served(result, back, back + 2.0)
    late = served(result, back + 12.0, back + 22.0)
    assert late["b"] / late.total() > 0.4
    if slow_start_s:
        assert early["b"] / early.total() < 0.35
    else:
        assert early["b"] / early.total() >= 0.45
