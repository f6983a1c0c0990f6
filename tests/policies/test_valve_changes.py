"""The valve when clients leave, policy files and fleets change, and attempts fail."""

from __future__ import annotations

from math import inf
from random import Random

import pytest

from policies.base import Outcome, RequestFacts, Send
from policies.rules import Queue, RuleSet, Selector
from policies.simple import WeightedQps
from policies.state import Fleet
from policies.valve import Valve
from tests.policies.builders import (
    Answers,
    Broken,
    LeastInFlight,
    backend,
    decided,
    fleet,
    full,
    ids,
    local_first,
    one_tier,
    release,
    request,
    rule,
)

# --- cancel, swap, changes of the fleet --------------------------------------------------------------------


def test_a_cancelled_request_is_never_answered() -> None:
    valve, homes, running = full(depth=2)
    for name in ("x", "y"):
        valve.submit(request(name), 0.0)
    assert valve.cancel("x")
    assert not valve.cancel("x")
    assert not valve.cancel("running0")
    release(homes, running[0], 1.0)
    assert ids(valve.poll(1.0)) == ["y"]
    assert valve.poll(99.0) == []


def test_a_cancelled_request_ends_no_wait() -> None:
    valve, _, _ = full()
    for number in range(3):
        valve.submit(request(f"r{number}"), 0.0)
    valve.cancel("r1")
    assert ids(valve.poll(10.0)) == ["r0", "r2"]


def test_a_request_that_was_refused_between_polls_can_be_cancelled() -> None:
    valve, _, _ = full(depth=2)
    for number in range(2):
        valve.submit(request(f"f{number}", tenant="flood"), 0.0)
    valve.submit(request("light", tenant="light"), 0.0)
    assert valve.cancel("f1")
    assert valve.poll(0.0) == []


def test_ids_are_unique() -> None:
    valve, _, _ = full()
    valve.submit(request("x"), 0.0)
    with pytest.raises(AssertionError, match="unique"):
        valve.submit(request("x"), 0.0)


def test_a_new_policy_file_takes_over_those_who_wait() -> None:
    homes = fleet(backend("a", slots=1), backend("b", slots=1, models=frozenset({"m", "n"})))
    valve = Valve(RuleSet([rule(require=Selector(backends=frozenset({"a"})), queue=Queue(10.0, 5))]), homes)
    for number in range(4):
        valve.submit(request(f"r{number}"), 0.0)
    assert valve.queued == 3
    valve.swap(RuleSet([rule("new", queue=Queue(2.0, 1))]), 1.0)
    assert valve.next_wake() == 1.0
    (answer,) = valve.poll(1.0)
    assert (answer.request.id, decided(answer), answer.rule) == ("r1", "b", "new")
    assert valve.next_wake() == 2.0  # arrived at 0, and the new rule waits 2 s
    assert valve.queued == 2  # though the new queue is shorter: they were promised a place
    assert ids(valve.poll(2.0)) == ["r2", "r3"]


def test_a_new_policy_file_may_leave_a_request_without_a_place_to_go() -> None:
    valve, _, _ = full()
    valve.submit(request("x"), 0.0)
    valve.swap(RuleSet([rule(require=Selector(backends=frozenset({"b"})))]), 1.0)
    assert valve.next_wake() == 1.0
    (answer,) = valve.poll(1.0)
    assert (decided(answer), answer.held_s) == ("model_not_found", 1.0)


def test_a_backend_that_joins_is_used_by_those_who_wait() -> None:
    valve, homes, _ = full()
    for number in range(3):
        valve.submit(request(f"r{number}"), 0.0)
    homes.replace([homes["a"], backend("b", slots=2)])
    assert [(routing.request.id, decided(routing)) for routing in valve.poll(1.0)] == [
        ("r0", "b"),
        ("r1", "b"),
    ]


def test_those_who_can_go_elsewhere_since_the_fleet_changed_leave_the_others_behind() -> None:
    homes = fleet(backend("a", slots=1, models=frozenset("mn")))
    valve = Valve(one_tier(), homes)
    valve.submit(request("running"), 0.0)
    valve.submit(request("stuck", model="m"), 0.0)
    valve.submit(request("lucky", model="n"), 0.0)
    homes.replace([homes["a"], backend("b", models=frozenset("n"))])
    assert ids(valve.poll(1.0)) == ["lucky"]
    assert valve.queued == 1


def test_a_model_that_goes_leaves_a_refusal() -> None:
    valve, homes, _ = full()
    valve.submit(request("x"), 0.0)
    homes.replace([])
    assert [decided(routing) for routing in valve.poll(1.0)] == ["model_not_found"]
    assert (valve.queued, valve.next_wake()) == (0, inf)


def test_those_who_wait_go_to_weight_zero_when_all_others_are_down() -> None:
    homes = fleet(backend("a", slots=1), backend("zero", weight=0.0))
    valve = Valve(one_tier(WeightedQps(Random(0))), homes)
    assert [decided(valve.submit(request(name), 0.0)) for name in "xy"] == ["a", "hold"]
    homes["a"].probed(False, 1.0)
    homes.refresh(1.0)
    assert [decided(answer) for answer in valve.poll(1.0)] == ["zero"]


def test_time_alone_brings_a_backend_back() -> None:
    homes = fleet(backend("a", slots=5))
    valve = Valve(one_tier(), homes)
    for number in range(5):
        release(homes, valve.submit(request(f"r{number}"), 0.0), 0.0, Outcome.FAILED)
    assert decided(valve.submit(request("x"), 1.0)) == "no_backend"
    assert valve.next_wake() == 10.0
    valve.poll(10.0)
    trial = valve.submit(request("trial"), 10.0)
    assert decided(trial) == "a"
    assert decided(valve.submit(request("not yet"), 10.0)) == "no_backend"  # one trial at a time
    release(homes, trial, 11.0, Outcome.FAILED)
    valve.poll(11.0)
    assert valve.next_wake() == 31.0  # twice as long
    assert decided(valve.submit(request("y"), 31.0)) == "a"  # even if the driver has not polled


def test_a_back_off_ends_by_itself() -> None:
    homes = fleet(backend("a"))
    valve = Valve(one_tier(), homes)
    valve.submit(request("r0"), 0.0)
    homes.back_off("a", 3.0, 0.0)
    assert decided(valve.submit(request("r1"), 1.0)) == "overloaded"
    assert valve.next_wake() == 3.0
    assert decided(valve.submit(request("r2"), 3.0)) == "a"


def test_a_spill_flag_closes_when_requests_end_not_when_the_next_begins() -> None:
    homes = fleet(backend("local", slots=1), backend("away"))
    valve = Valve(local_first(), homes)
    first = valve.submit(request("r0"), 0.0)
    valve.submit(request("r1"), 0.0)
    assert valve.rules.spills[0].open
    release(homes, first, 1.0)
    valve.poll(1.0)
    assert not valve.rules.spills[0].open


def test_a_spill_flag_opens_when_its_tier_is_full_not_when_the_next_request_comes() -> None:
    homes = fleet(backend("local", slots=1), backend("away"))
    valve = Valve(local_first(), homes)
    first = valve.submit(request("r0"), 0.0)
    flag = valve.rules.spills[0]
    assert not flag.open
    valve.poll(1.0)
    assert (flag.open, flag.openings, flag.moved_at, flag.saturation) == (True, 1, 1.0, 1.0)
    valve.poll(2.0)
    assert (flag.openings, flag.moved_at) == (1, 1.0)
    assert decided(valve.submit(request("r1"), 3.0)) == "away"
    release(homes, first, 4.0)
    valve.poll(4.0)
    assert not flag.open


# --- retries -----------------------------------------------------------------------------------------------


def failing(valve: Valve, homes: Fleet, facts: RequestFacts, now: float = 0.0) -> list[str]:
    """Where a request goes when every attempt fails, and how it ends."""
    routing = valve.submit(facts, now)
    went = [decided(routing)]
    tried: list[str] = []
    while routing.lease is not None:
        tried.append(decided(routing))
        release(homes, routing, now, Outcome.FAILED)
        routing = valve.retry(facts, routing, tried, now)
        went.append(decided(routing))
    return went


def test_retries_walk_the_fallbacks_then_give_up() -> None:
    policy = Answers(Send("b", ("c",)))
    homes = fleet(backend("a"), backend("b"), backend("c"))
    assert failing(Valve(one_tier(policy), homes), homes, request()) == ["b", "c", "a", "no_backend"]
    assert [one.in_flight for one in homes] == [0, 0, 0]


def test_a_retry_checks_constraints_and_availability_again() -> None:
    homes = fleet(backend("a"), backend("b"), backend("c"), backend("d"))
    valve = Valve(one_tier(), homes)
    routing = valve.submit(request(data_class="restricted"), 0.0)
    homes["b"].probed_up = False
    homes["c"].data_classes = frozenset({"public"})
    homes.version += 1
    homes.refresh(1.0)
    again = valve.retry(routing.request, routing, ["a"], 1.0)
    assert isinstance(again.decision, Send)
    assert (again.decision.backend, again.decision.fallbacks) == ("d", ())
    assert (again.decided_by, again.tier) == ("fallback", 0)
    assert again.removed == {"c": "c does not accept data class restricted"}


def test_a_retry_with_no_fallback_left_is_decided_afresh() -> None:
    homes = fleet(backend("local", slots=1), backend("away"))
    valve = Valve(local_first(), homes)
    local = valve.submit(request("r0"), 0.0)
    spilled = valve.submit(request("r1"), 0.0)
    assert decided(spilled) == "away"
    release(homes, local, 1.0)
    again = valve.retry(spilled.request, spilled, {"away"}, 1.0)
    assert (decided(again), again.decided_by, again.tier) == ("local", "chooser", 0)


def test_a_retry_never_queues() -> None:
    homes = fleet(backend("local", slots=1), backend("away"))
    valve = Valve(local_first(), homes)
    valve.submit(request("r0"), 0.0)
    spilled = valve.submit(request("r1"), 0.0)
    again = valve.retry(spilled.request, spilled, {"away"}, 1.0)
    assert (decided(again), again.decided_by, homes["local"].in_flight) == ("local", "fallback", 2)
    assert valve.queued == 0


def test_the_policy_of_the_tier_hears_of_a_fallback() -> None:
    policy = LeastInFlight()
    homes = fleet(backend("local"), backend("away"))
    assert failing(Valve(local_first(policy=policy), homes), homes, request()) == [
        "local",
        "away",
        "no_backend",
    ]
    assert policy.heard == [
        ("dispatched", "local"),
        ("finished", "local"),
        ("dispatched", "away"),
        ("finished", "away"),
    ]


def test_a_broken_policy_kills_no_request() -> None:
    homes = fleet(backend("a", slots=1), backend("b", slots=1))
    valve = Valve(one_tier(Broken()), homes)
    running = [valve.submit(request(f"r{number}"), 0.0) for number in range(3)]
    assert [decided(routing) for routing in running] == ["a", "b", "hold"]
    release(homes, running[0], 1.0)
    (answer,) = valve.poll(1.0)
    release(homes, answer, 2.0)
    release(homes, running[1], 2.0)
    assert [one.in_flight for one in homes] == [0, 0]
