from __future__ import annotations

from math import inf
from typing import Any

import pytest

from policies.base import Hold, Outcome, Policy, Reject, RequestFacts, Send
from policies.routing import Routing
from policies.rules import Match, Queue, RuleSet, Selector
from policies.state import Fleet
from policies.valve import HEADS_PER_POLL, Valve
from tests.policies.builders import (
    Answers,
    Broken,
    LeastInFlight,
    backend,
    decided,
    fleet,
    local_first,
    one_tier,
    request,
    rule,
)


def ids(routings: list[Routing]) -> list[str]:
    return [routing.request.id for routing in routings]


def release(homes: Fleet, routing: Routing, now: float, outcome: Outcome = Outcome.OK) -> None:
    assert routing.lease is not None
    homes.release(routing.lease, outcome, now)


def full(slots: int = 1, policy: Policy | None = None, **queue: Any) -> tuple[Valve, Fleet, list[Routing]]:
    """A valve over one backend `a` with all its slots taken at time 0."""
    homes = fleet(backend("a", slots=slots))
    valve = Valve(one_tier(policy, **queue), homes)
    running = [valve.submit(request(f"running{number}"), 0.0) for number in range(slots)]
    return valve, homes, running


# --- submit, hold, poll ------------------------------------------------------------------------------------


def test_a_send_carries_a_lease_that_is_already_counted() -> None:
    policy = LeastInFlight()
    homes = fleet(backend("a"), backend("b"))
    valve = Valve(one_tier(policy), homes)
    routings = [valve.submit(request(f"r{number}"), 0.0) for number in range(4)]
    assert [decided(routing) for routing in routings] == ["a", "b", "a", "b"]
    assert [(one.name, one.in_flight) for one in homes] == [("a", 2), ("b", 2)]
    lease = routings[0].lease
    assert lease is not None
    assert (lease.backend.name, lease.decided_by) == ("a", "chooser")
    assert policy.heard == [("dispatched", name) for name in "abab"]
    for routing in routings:
        release(homes, routing, 1.0)
    assert [one.in_flight for one in homes] == [0, 0]


def test_a_held_request_is_answered_when_a_slot_comes_free() -> None:
    valve, homes, running = full()
    assert decided(valve.submit(request("x", arrived=1.0), 1.0)) == "hold"
    assert (valve.queued, valve.oldest_age(3.5), valve.queued_by_tenant()) == (1, 2.5, {"default": 1})
    assert valve.poll(2.0) == []
    release(homes, running[0], 4.0)
    (answer,) = valve.poll(4.0)
    assert (decided(answer), answer.held_s, answer.lease is not None) == ("a", 3.0, True)
    assert (valve.queued, valve.oldest_age(9.0), valve.queued_by_tenant()) == (0, 0.0, {})
    assert valve.poll(4.0) == []


def test_several_answers_of_one_poll_see_each_other() -> None:
    homes = fleet(backend("a", slots=2), backend("b", slots=2))
    valve = Valve(one_tier(), homes)
    running = [valve.submit(request(f"running{number}"), 0.0) for number in range(4)]
    for number in range(5):
        valve.submit(request(f"r{number}"), 0.0)
    for routing in running:
        release(homes, routing, 1.0)
    answers = valve.poll(1.0)
    assert [(routing.request.id, decided(routing)) for routing in answers] == [
        ("r0", "a"),
        ("r1", "b"),
        ("r2", "a"),
        ("r3", "b"),
    ]
    assert valve.queued == 1


def test_nobody_overtakes_those_who_wait_for_the_same() -> None:
    valve, homes, running = full()
    valve.submit(request("first"), 0.0)
    release(homes, running[0], 1.0)
    overtaking = valve.submit(request("second"), 1.0)
    assert (decided(overtaking), overtaking.decided_by) == ("hold", "queue")
    assert ids(valve.poll(1.0)) == ["first"]


def test_one_models_queue_stops_no_other() -> None:
    homes = fleet(
        backend("a", slots=1, models=frozenset({"m"})), backend("b", slots=1, models=frozenset({"n"}))
    )
    valve = Valve(one_tier(), homes)
    valve.submit(request("m0", model="m"), 0.0)
    for number in range(20):
        assert decided(valve.submit(request(f"m{number + 1}", model="m"), 0.0)) == "hold"
    n0 = valve.submit(request("n0", model="n"), 0.0)
    assert decided(n0) == "b"
    assert decided(valve.submit(request("n1", model="n"), 0.0)) == "hold"
    release(homes, n0, 1.0)
    assert ids(valve.poll(1.0)) == ["n1"]


def test_a_poll_asks_eight_heads_and_calls_for_the_next_at_once() -> None:
    valve, homes, running = full(slots=20)
    for number in range(20):
        valve.submit(request(f"r{number}"), 0.0)
    for routing in running:
        release(homes, routing, 1.0)
    polls = []
    while valve.queued:
        polls.append(len(valve.poll(1.0)))
        assert valve.next_wake() == (1.0 if valve.queued else inf)
    assert polls == [HEADS_PER_POLL, HEADS_PER_POLL, 20 - 2 * HEADS_PER_POLL]


def test_queues_take_turns_at_what_they_share() -> None:
    rules = RuleSet([rule("x", match=Match(tenants=frozenset({"x"}))), rule("rest")])
    homes = fleet(backend("a", slots=4))
    valve = Valve(rules, homes)
    running = [valve.submit(request(f"running{number}"), 0.0) for number in range(4)]
    for number in range(4):
        valve.submit(request(f"x{number}", tenant="x"), 0.0)
    for number in range(4):
        valve.submit(request(f"y{number}", tenant="y"), 0.0)
    for routing in running:
        release(homes, routing, 1.0)
    assert sorted(ids(valve.poll(1.0))) == ["x0", "x1", "y0", "y1"]


def test_one_answer_at_a_time_still_gives_every_queue_its_turn() -> None:
    rules = RuleSet([rule("x", match=Match(tenants=frozenset({"x"}))), rule("rest")])
    homes = fleet(backend("a", slots=1))
    valve = Valve(rules, homes)
    routing = valve.submit(request("running"), 0.0)
    for number in range(4):
        valve.submit(request(f"x{number}", tenant="x"), 0.0)
        valve.submit(request(f"y{number}", tenant="y"), 0.0)
    order = []
    for _ in range(4):
        release(homes, routing, 1.0)
        (routing,) = valve.poll(1.0)
        order.append(routing.request.id)
    assert sorted(order) == ["x0", "x1", "y0", "y1"]


def test_a_policys_hold_keeps_nobody_else_waiting() -> None:
    class HoldsBig(LeastInFlight):
        def choose(self, request: RequestFacts, backends: Any, now: float) -> Any:
            if request.expected_tokens > 100 and now < 5.0:
                return Hold(60.0, "not now")
            return super().choose(request, backends, now)

    homes = fleet(backend("a", slots=4))
    valve = Valve(one_tier(HoldsBig()), homes)
    assert decided(valve.submit(request("big", tenant="x", expected_tokens=999), 0.0)) == "hold"
    assert decided(valve.submit(request("behind", tenant="x"), 0.0)) == "hold"
    assert decided(valve.submit(request("other", tenant="y"), 0.0)) == "hold"
    assert valve.next_wake() == 0.0  # there is room, so those behind are asked at once
    assert ids(valve.poll(0.0)) == ["other"]
    valve.poll(0.0)
    assert valve.next_wake() == 10.0  # and not for ever
    assert ids(valve.poll(5.0)) == ["big", "behind"]


def test_a_policy_that_holds_everybody_is_not_asked_in_a_circle() -> None:
    valve = Valve(one_tier(Answers(Hold(5.0))), fleet(backend("a")))
    for number in range(2 * HEADS_PER_POLL):
        valve.submit(request(f"r{number}", tenant=f"t{number}"), 0.0)
    assert valve.poll(1.0) == []
    assert valve.next_wake() == 5.0


def test_fairness_under_a_flood() -> None:
    """Ten times the requests get a tenant no more tokens than its neighbour asks for, nor the neighbour's wait."""
    valve, homes, (routing,) = full(depth=40, wait_s=1e6)
    served = {"flood": 0, "light": 0, "default": 0}
    waits = []
    lost = 0
    for step in range(400):
        now = float(step)
        for number in range(10):
            valve.submit(request(f"f{step}.{number}", tenant="flood", arrived=now), now)
        if step % 4 == 0:  # a quarter of what is served: less than its share
            lost += decided(valve.submit(request(f"l{step}", tenant="light", arrived=now), now)) != "hold"
        release(homes, routing, now)
        for answer in valve.poll(now):
            if answer.lease is None:
                lost += answer.request.tenant == "light"
                continue
            routing = answer
            served[answer.request.tenant] += 1
            if answer.request.tenant == "light":
                waits.append(answer.held_s)
    assert lost == 0
    assert served["light"] == 100
    assert max(waits) <= 1.0
    assert served["flood"] == 300


def test_tokens_are_shared_between_tenants_that_both_flood() -> None:
    valve, homes, (routing,) = full(depth=100, wait_s=1e6)
    served = {"long": 0, "short": 0, "default": 0}
    for step in range(400):
        now = float(step)
        valve.submit(request(f"s{step}", tenant="short", prompt_tokens=100, arrived=now), now)
        valve.submit(request(f"l{step}", tenant="long", prompt_tokens=400, arrived=now), now)
        release(homes, routing, now)
        for answer in valve.poll(now):
            if answer.lease is not None:
                routing = answer
                served[answer.request.tenant] += answer.request.tokens
    assert abs(served["long"] - served["short"]) <= 500


# --- the end of a hold -------------------------------------------------------------------------------------


def test_after_its_wait_a_request_goes_to_the_least_saturated_backend_of_any_tier() -> None:
    homes = fleet(backend("local", slots=2), backend("away", slots=4))
    valve = Valve(local_first(wait_s=5.0), homes)
    for number in range(6):
        valve.submit(request(f"running{number}"), 0.0)
    homes["away"].in_flight += 1  # 5 of 4
    assert decided(valve.submit(request("x", arrived=1.0), 1.0)) == "hold"
    assert valve.next_wake() == 6.0
    assert valve.poll(5.9) == []
    (answer,) = valve.poll(6.0)
    assert isinstance(answer.decision, Send)
    assert (answer.decision.backend, answer.decision.fallbacks) == ("local", ("away",))
    assert (answer.decided_by, answer.tier, answer.held_s) == ("wait over", 0, 5.0)
    assert [figure.name for figure in answer.candidates] == ["local", "away"]
    assert homes["local"].in_flight == 3
    assert valve.next_wake() == inf


def test_all_whose_wait_is_over_are_answered_and_spread() -> None:
    homes = fleet(backend("a", slots=1), backend("b", slots=1))
    valve = Valve(one_tier(wait_s=5.0), homes)
    for number in range(22):
        valve.submit(request(f"r{number}"), 0.0)
    assert len(valve.poll(5.0)) == 20
    assert [one.in_flight for one in homes] == [11, 11]


def test_the_policy_is_asked_first_when_room_and_the_end_of_a_wait_coincide() -> None:
    valve, homes, running = full(wait_s=5.0)
    valve.submit(request("x"), 0.0)
    release(homes, running[0], 5.0)
    (answer,) = valve.poll(5.0)
    assert answer.decided_by == "chooser"


def test_a_deadline_ends_a_hold_with_a_refusal() -> None:
    valve, homes, _ = full(wait_s=5.0)
    valve.submit(request("x", deadline=2.0), 0.0)
    assert valve.next_wake() == 2.0
    (answer,) = valve.poll(2.0)
    assert isinstance(answer.decision, Reject)
    assert (answer.decision.code, answer.held_s) == ("queue_timeout", 2.0)
    assert homes["a"].in_flight == 1


def test_a_request_held_through_an_outage_waits_for_its_end() -> None:
    valve, homes, running = full(wait_s=5.0)
    valve.submit(request("saved"), 0.0)
    valve.submit(request("lost", tenant="other", deadline=inf, arrived=-3.0), 0.0)
    homes["a"].probed_up = False
    homes.refresh(1.0)
    release(homes, running[0], 1.0, Outcome.FAILED)
    assert valve.poll(1.0) == []
    assert decided(valve.submit(request("late"), 1.0)) == "no_backend"  # nobody queues for nothing
    (answer,) = valve.poll(2.0)
    assert (answer.request.id, decided(answer)) == ("lost", "no_backend")
    homes["a"].probed_up = True
    homes.refresh(3.0)
    (answer,) = valve.poll(3.0)
    assert (answer.request.id, decided(answer)) == ("saved", "a")


def test_a_wait_of_nothing_is_no_wait() -> None:
    valve, _, _ = full(wait_s=0.0)
    assert decided(valve.submit(request("x", arrived=1.0), 1.0)) == "hold"
    assert valve.next_wake() == 1.0
    assert ids(valve.poll(1.0)) == ["x"]


def test_a_policys_hold_ends_when_it_said() -> None:
    homes = fleet(backend("a"))
    valve = Valve(one_tier(Answers(Hold(2.0), Hold(9.0))), homes)
    assert decided(valve.submit(request("x"), 0.0)) == "hold"
    assert valve.next_wake() == 2.0
    (answer,) = valve.poll(2.0)
    assert (decided(answer), answer.decided_by) == ("a", "wait over")


def test_a_policy_may_refuse_what_it_held() -> None:
    homes = fleet(backend("a"))
    valve = Valve(one_tier(Answers(Hold(2.0), Reject("overloaded"))), homes)
    valve.submit(request("x"), 0.0)
    assert [decided(answer) for answer in valve.poll(1.0)] == ["overloaded"]
    assert valve.queued == 0


# --- limits ------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses() -> None:
    valve, _, _ = full(depth=2, wait_s=7.0)
    assert [decided(valve.submit(request(f"r{number}"), 0.0)) for number in range(3)] == [
        "hold",
        "hold",
        "queue_full",
    ]
    refused = valve.submit(request("x"), 0.0).decision
    assert isinstance(refused, Reject)
    assert refused.retry_after_s == 7.0
    assert valve.queued == 2


def test_a_rule_without_a_queue_refuses_at_once() -> None:
    valve, _, _ = full(depth=0)
    assert decided(valve.submit(request("x"), 0.0)) == "queue_full"
    assert repr(valve) == "<Valve: 0 held in 0 queues>"


def test_a_tenant_that_fills_the_queue_makes_room_for_another() -> None:
    valve, _, _ = full(depth=3)
    for number in range(3):
        valve.submit(request(f"f{number}", tenant="flood"), 0.0)
    assert decided(valve.submit(request("light", tenant="light"), 1.0)) == "hold"
    assert valve.queued_by_tenant() == {"flood": 2, "light": 1}
    assert valve.next_wake() == 1.0
    (answer,) = valve.poll(1.0)
    assert (answer.request.id, decided(answer), answer.held_s) == ("f2", "queue_full", 1.0)


def test_memory_is_bounded_by_what_waits() -> None:
    valve, homes, (routing,) = full(wait_s=1e6)
    for number in range(5000):
        valve.submit(request(f"r{number}"), 0.0)
        valve.submit(request(f"c{number}", tenant=f"t{number % 7}"), 0.0)
        valve.cancel(f"c{number}")
        release(homes, routing, 0.0)
        (routing,) = valve.poll(0.0)
    assert len(valve._ends) <= 64 + 2
    assert (valve.queued, len(valve._queues)) == (0, 0)


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
    assert decided(valve.submit(request("r1"), 1.0)) == "no_backend"
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
