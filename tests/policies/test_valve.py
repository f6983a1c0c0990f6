from __future__ import annotations

from math import inf
from random import Random
from typing import Any

import pytest

from policies.base import Hold, Outcome, Reject, RequestFacts, Send
from policies.rules import Match, Queue, RuleSet
from policies.simple import WeightedQps
from policies.valve import HEADS_PER_POLL, Valve
from tests.policies.builders import (
    Answers,
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
    strict = Queue(overflow=1.0)  # no tenant is sent beyond the slots, whatever its share
    rules = RuleSet(
        [rule("x", match=Match(tenants=frozenset({"x"})), queue=strict), rule("rest", queue=strict)]
    )
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


def test_after_its_wait_a_request_still_goes_to_none_of_weight_zero() -> None:
    homes = fleet(backend("a", slots=1), backend("zero", slots=4, weight=0.0))
    valve = Valve(one_tier(WeightedQps(Random(0)), wait_s=5.0), homes)
    assert [decided(valve.submit(request(f"r{number}"), 0.0)) for number in range(2)] == ["a", "hold"]
    (answer,) = valve.poll(5.0)
    assert isinstance(answer.decision, Send)
    assert (answer.decision.backend, answer.decision.fallbacks) == ("a", ())


def test_all_whose_wait_is_over_are_answered_and_spread() -> None:
    homes = fleet(backend("a", slots=1), backend("b", slots=1))
    valve = Valve(one_tier(wait_s=5.0, overflow=100.0), homes)
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


def test_a_policy_is_asked_again_when_it_said_and_only_the_rules_wait_ends_its_hold() -> None:
    homes = fleet(backend("a"))
    valve = Valve(one_tier(Answers(Hold(2.0), Hold(9.0))), homes)
    assert decided(valve.submit(request("x"), 0.0)) == "hold"
    assert valve.next_wake() == 2.0
    assert valve.poll(2.0) == []
    assert valve.next_wake() == 9.0
    assert valve.poll(9.0) == []  # a time that has passed is no reason to ask in a circle
    assert valve.next_wake() == 10.0
    (answer,) = valve.poll(10.0)
    assert (decided(answer), answer.decided_by) == ("a", "wait over")


def test_one_who_leaves_while_its_policy_holds_it_leaves_no_timer() -> None:
    valve = Valve(one_tier(Answers(Hold(2.0))), fleet(backend("a")))
    valve.submit(request("x"), 0.0)
    valve.cancel("x")
    assert valve.next_wake() == inf
    assert valve.poll(3.0) == []
    assert valve.next_wake() == inf


@pytest.mark.parametrize("waiting", [1, 4])
def test_max_qps_is_kept_to_the_second_by_next_wake_alone(waiting: int) -> None:
    policy = WeightedQps(Random(0), max_qps={"a": 2})
    valve = Valve(one_tier(policy), fleet(backend("a", slots=100)))
    tenants = [f"t{number % 2}" for number in range(2 + waiting)]
    sent = [valve.submit(request(f"r{n}", tenant=tenant), 0.0) for n, tenant in enumerate(tenants)]
    assert [decided(routing) for routing in sent] == ["a", "a"] + ["hold"] * waiting
    assert valve.poll(0.0) == []
    answers = []
    for _ in range(waiting):
        now = valve.next_wake()
        answers += [(now, answer.request.id, answer.decided_by) for answer in valve.poll(now)]
    assert answers == [(0.5 * (n + 1), f"r{n + 2}", "chooser") for n in range(waiting)]
    assert (valve.queued, valve.next_wake()) == (0, inf)


def test_queues_that_share_a_limited_backend_are_all_asked_when_it_has_room() -> None:
    policy = WeightedQps(Random(0), max_qps={"a": 1, "c": 0.1})
    homes = fleet(
        backend("a", slots=100, models=frozenset("mn")), backend("c", slots=100, models=frozenset("n"))
    )
    valve = Valve(one_tier(policy), homes)
    asked = [valve.submit(request(f"r{n}", model=model), 0.0) for n, model in enumerate("nnmn")]
    assert [decided(routing) for routing in asked] == ["a", "c", "hold", "hold"]
    assert valve.poll(0.0) == []
    answers = []
    for now in (1.0, 2.0):
        assert valve.next_wake() == now
        answers += ids(valve.poll(now))
    assert sorted(answers) == ["r2", "r3"]


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
