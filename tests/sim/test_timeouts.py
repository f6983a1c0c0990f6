"""A simulated router gives up on a request when the proxy would, and does with it what the proxy would."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from math import ceil

import pytest

from policies.base import RequestFacts
from policies.state import Fleet
from proxy.config_sections import Timeouts as Configured
from sim.cluster import SECOND, SWEEP, Cluster
from sim.members import Change, Incident, Member
from sim.router import End, Request
from sim.timeouts import Timeouts
from sim.trips import Trip
from sim.workload import Arrival, Workload
from tests.sim.test_cluster import ENGINE, ends, every, member, rules, simulate

ONE_AT_A_TIME = replace(ENGINE, max_num_seqs=1)


def slow(name: str = "local", site: str = "local", **values: object) -> Member:
    """One that computes one request after the other, whatever it is sent."""
    return member(name, site, slots=50, settings=ONE_AT_A_TIME, **values)


def look_after(seconds: float) -> float:
    """When the sweep sees that so much time is over."""
    return (ceil(seconds * SECOND) // SWEEP + 1) * SWEEP / SECOND


def test_the_defaults_are_the_proxys() -> None:
    configured, parameters = Configured(), signature(Cluster).parameters
    for name in ("first_token", "between_tokens", "total"):
        assert parameters[f"{name}_s"].default == getattr(configured, name)


@pytest.mark.parametrize("rtt", [0, 20_000])
def test_an_attempt_without_a_first_token_is_tried_elsewhere(rtt: int) -> None:
    members = [slow(rtt=rtt), member("away", site="away", rtt=rtt)]
    arrivals = [Arrival(0, 100, 400), Arrival(1000, 100, 10)]  # the first one takes eight seconds
    cluster, result = simulate(members, arrivals, first_token_s=2.0)
    first, second = result.trips
    assert (first.end, first.backend, first.attempts) == (End.OK, "local", 1)
    assert (second.end, second.backend, second.attempts) == (End.OK, "away", 2)
    assert second.first_token == pytest.approx(look_after(2.001), abs=0.1)
    local = cluster.fleet["local"]
    assert (local.ok, local.failed, local.ignored) == (1, 1, 0)
    assert local.breaker.failures == 0  # the first one ended well after that


def test_its_sequence_is_cancelled() -> None:
    cluster, result = simulate([slow()], [Arrival(0, 100, 400), Arrival(1000, 100, 10)], first_token_s=2.0)
    assert [trip.end for trip in result.trips] == [End.OK, End.FAILED]
    assert (result.trips[1].ended, result.trips[1].reason) == (look_after(2.001), "first_token_timeout")
    engine = cluster.nodes["local"].engine
    assert (engine.running, engine.waiting, engine.prefill_tokens) == (0, 0, 100)


def test_attempts_without_a_first_token_open_the_breaker() -> None:
    members = [slow(), member("away", site="away", slots=50)]
    arrivals = [Arrival(0, 100, 1000), *every(0.1, 40, prompt=10, output=2)]
    cluster, result = simulate(members, arrivals, first_token_s=2.0)
    assert ends(result) == {End.OK: 41}
    assert ("local", False) in [(name, available) for _, name, available in result.moves]
    assert cluster.fleet["local"].failed >= cluster.fleet["local"].breaker.threshold


def test_a_first_token_on_its_way_is_one_that_has_not_come() -> None:
    arrivals = [Arrival(0, 100, 10)]
    _, result = simulate([member("local", rtt=2 * SECOND)], arrivals, first_token_s=1.0)
    assert ends(result) == {End.FAILED: 1}
    _, result = simulate([member("local", rtt=2 * SECOND)], arrivals, first_token_s=3.0)
    assert ends(result) == {End.OK: 1}


@pytest.mark.parametrize("rtt", [0, 20_000])
def test_an_answer_that_takes_too_long_is_cut_and_nobody_is_to_blame(rtt: int) -> None:
    told: list[tuple[int, int, int]] = []

    class Watched(Cluster):
        def overdue(self, request: Request, now: float, usage: tuple[int, int, int] = (0, 0, 0)) -> None:
            told.append(usage)
            super().overdue(request, now, usage)

    members = [member("local", rtt=rtt), member("away", site="away")]
    result = Watched(members, rules(members), total_s=5.0).run(Workload("test", [Arrival(1000, 100, 1000)]))
    (trip,) = result.trips
    assert (trip.end, trip.ended, trip.reason) == (End.CUT, look_after(5.001), "deadline")
    assert (trip.attempts, members[0].backend.ignored, members[0].backend.failed) == (1, 1, 0)
    ((prompt, cached, tokens),) = told
    assert (prompt, cached) == (100, 0)
    assert 250 < tokens < 263  # a step takes 20 ms


def test_what_died_with_its_engine_is_not_counted_by_the_next_one() -> None:
    """Its time is over while the router does not know yet that the connection is closed."""
    told = []

    class Watched(Cluster):
        def overdue(self, request: Request, now: float, usage: tuple[int, int, int] = (0, 0, 0)) -> None:
            told.append(usage)
            super().overdue(request, now, usage)

    members = [member("local", rtt=400_000)]
    down = [Incident(5_200_000, "local", Change.DOWN)]
    cluster = Watched(members, rules(members), total_s=5.0, incidents=down)
    (trip,) = cluster.run(Workload("test", [Arrival(1000, 100, 1000)])).trips
    assert (trip.end, trip.ended, told) == (End.CUT, look_after(5.001), [(0, 0, 0)])


def test_a_request_without_an_answer_in_all_its_time_is_not_tried_again() -> None:
    members = [slow(), member("away", site="away")]
    arrivals = [Arrival(0, 100, 400), Arrival(1000, 100, 10)]
    cluster, result = simulate(members, arrivals, total_s=3.0)
    second = result.trips[1]
    assert (second.end, second.ended, second.attempts) == (End.FAILED, look_after(3.001), 1)
    assert second.reason == "deadline"
    assert cluster.fleet["local"].failed == cluster.fleet["away"].ok == 0


def test_the_time_of_one_that_is_held_ends_in_the_valve() -> None:
    arrivals = [Arrival(0, 100, 400), Arrival(1000, 100, 10)]
    _, result = simulate([member("local", slots=1)], arrivals, total_s=3.0)
    first, second = result.trips
    assert (first.end, first.ended) == (End.CUT, look_after(3.0))
    assert (second.end, second.reason, second.attempts) == (End.REJECTED, "queue_timeout", 0)
    assert second.ended == pytest.approx(3.001, abs=0.002)


def test_an_answer_that_stands_still_is_cut() -> None:
    """The KV cache is too small for two: the second one waits amid its answer until the first one has ended."""
    small = replace(ENGINE, kv_tokens=1_200)
    arrivals = [Arrival(0, 500, 600), Arrival(1000, 500, 600)]
    _, result = simulate([member("local", settings=small)], arrivals)
    assert ends(result) == {End.OK: 2}
    assert result.trips[1].preemptions == 1
    gap = result.trips[1].ended - result.trips[0].ended
    assert gap > 8.0  # it was preempted after a hundred of its six hundred tokens
    cluster, result = simulate([member("local", settings=small)], arrivals, between_tokens_s=4.0)
    first, second = result.trips
    assert (first.end, second.end, second.reason) == (End.OK, End.CUT, "stalled")
    assert first.ended > second.ended > second.first_token + 4.0
    local = cluster.fleet["local"]
    assert (local.ok, local.failed, local.ignored) == (1, 1, 0)
    assert cluster.nodes["local"].engine.kv_use(1e18) == 0.0


def test_each_is_looked_at_in_its_turn() -> None:
    timeouts, fleet = Timeouts(10.0, 30.0, 20.0), Fleet([member("a").backend])
    trips = [Trip(at, Arrival(at, 1, 1), RequestFacts(str(at), "m", arrived=float(at))) for at in range(4)]
    for trip in trips:
        timeouts.arrived(trip)
    for trip in trips[:3]:  # the last one is held
        trip.lease = fleet.lease(trip.facts, "a", trip.facts.arrived)
        timeouts.sent(trip)
    trips[1].first_token = 5.0
    assert timeouts.silent(10.0) is None
    assert timeouts.silent(12.5) is trips[0]
    assert timeouts.silent(12.5) is trips[2]
    assert timeouts.silent(99.0) is None
    assert timeouts.overdue(20.0) is None
    for trip in trips[:3]:
        assert timeouts.overdue(23.5) is trip
        trip.end = End.CUT
    assert timeouts.overdue(99.0) is None
