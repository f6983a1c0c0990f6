from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan
from random import Random
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.base import BackendView, Decision, Hold, Outcome, Reject, RequestFacts, Send
from policies.constraints import feasible
from policies.match import Match, Selector
from policies.routing import Routing, rebuild
from policies.rules import Queue, RuleSet, Spill, Tier
from policies.simple import WeightedQps
from policies.state import Backend, Fleet
from tests.policies.builders import (
    Answers,
    Broken,
    LeastInFlight,
    WeightedByRoom,
    backend,
    decided,
    fleet,
    local_first,
    one_tier,
    request,
    rule,
)

LOCAL = Selector(sites=frozenset({"local"}))


def send(routing: Routing) -> Send:
    assert isinstance(routing.decision, Send)
    return routing.decision


def load(backend: Backend, in_flight: int) -> None:
    backend.in_flight = in_flight


# --- rules -------------------------------------------------------------------------------------------------


def test_the_first_rule_that_matches_applies() -> None:
    rules = RuleSet(
        [
            rule("acme", match=Match(tenants=frozenset({"acme"})), require=LOCAL),
            rule("restricted", match=Match(data_classes=frozenset({"restricted"}))),
            rule("rest"),
        ]
    )
    homes = fleet(backend("local"), backend("away", in_flight=-1))
    assert rules.route(request(tenant="acme", data_class="restricted"), homes, 0.0).rule == "acme"
    assert rules.route(request(data_class="restricted"), homes, 0.0).rule == "restricted"
    assert rules.route(request(), homes, 0.0).rule == "rest"
    assert decided(rules.route(request(tenant="acme"), homes, 0.0)) == "local"
    assert decided(rules.route(request(), homes, 0.0)) == "away"


def test_a_file_ends_with_a_rule_that_matches_all() -> None:
    with pytest.raises(AssertionError, match="last rule"):
        RuleSet([rule(match=Match(stream=True))])
    with pytest.raises(AssertionError, match="unique"):
        RuleSet([rule("a"), rule("a")])
    with pytest.raises(AssertionError, match="needs a rule"):
        RuleSet([])


def test_what_the_rule_leaves_out_is_removed_with_a_reason() -> None:
    rules = RuleSet([rule("home", require=LOCAL)])
    routing = rules.route(request(), fleet(backend("local"), backend("away")), 0.0)
    assert routing.removed == {"away": "not among the backends of rule 'home'"}
    assert send(routing).fallbacks == ()


def test_a_backend_that_no_tier_selects_is_never_used() -> None:
    rules = RuleSet([rule(tiers=(Tier(LOCAL),))])
    homes = fleet(backend("local", slots=1, in_flight=1), backend("away"))
    assert decided(rules.route(request(), homes, 0.0)) == "hold"
    assert decided(rules.route(request(), fleet(backend("away")), 0.0)) == "model_not_found"


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "code"),
    [
        ({"model": "unknown"}, "model_not_found"),
        ({"data_class": "restricted"}, "data_class"),
        ({"max_tokens": 101}, "context_length"),
    ],
)
def test_what_nothing_may_serve_is_refused(facts: dict[str, Any], code: str) -> None:
    shut = backend("a", data_classes=frozenset({"public"}), context_tokens={"m": 100}, available=False)
    routing = one_tier().route(request(**facts), fleet(shut), 0.0)
    assert decided(routing) == code
    assert routing.decided_by == "constraints"
    assert routing.removed is not None
    assert "a" in routing.removed


def test_what_is_too_long_is_told_its_own_length_not_that_of_the_first_who_was() -> None:
    rules, machines = one_tier(), fleet(backend("a", context_tokens={"m": 100}))
    for prompt, answer in ((10, 101), (20, 102)):
        decision = rules.route(request(prompt_tokens=prompt, max_tokens=answer), machines, 0.0).decision
        assert f"100 tokens; this prompt has about {prompt} and asks for {answer} more" in decision.reason


@pytest.mark.parametrize("lengths", [(101, 100), (100, 101)])
def test_what_is_remembered_of_one_length_is_not_taken_for_another(lengths: tuple[int, int]) -> None:
    rules, homes = one_tier(), fleet(backend("a", context_tokens={"m": 100}))
    for length in lengths:
        answer = decided(rules.route(request(max_tokens=length), homes, 0.0))
        assert answer == ("a" if length == 100 else "context_length")


def test_what_is_served_but_down_is_refused_as_down() -> None:
    routing = one_tier().route(request(), fleet(backend("a", available=False)), 0.0)
    assert isinstance(routing.decision, Reject)
    assert routing.decision.code == "no_backend"
    assert routing.decision.retry_after_s
    assert routing.removed == {}


def test_availability_is_noticed_when_the_fleet_says_so() -> None:
    rules, homes = one_tier(), fleet(backend("a"), backend("b", in_flight=1))
    assert decided(rules.route(request(), homes, 0.0)) == "a"
    homes["a"].probed_up = False
    homes.refresh(1.0)
    assert decided(rules.route(request(), homes, 1.0)) == "b"
    homes.replace([backend("c")])
    assert decided(rules.route(request(), homes, 2.0)) == "c"
    assert decided(rules.route(request(), fleet(backend("d")), 2.0)) == "d"


def test_invented_models_take_no_memory() -> None:
    rules, homes = one_tier(), fleet(backend("a"))
    for number in range(100):
        rules.route(request(model=f"invented {number}"), homes, 0.0)
    rules.route(request(), homes, 0.0)
    assert len(rules._sets._found) == 1


# --- tiers and spill ---------------------------------------------------------------------------------------


def test_local_takes_every_request_while_it_has_a_free_slot_open_or_not() -> None:
    rules = local_first(enter=0.5, leave=0.25)
    homes = fleet(backend("local", slots=4), backend("away", slots=1))
    seen = []
    for in_flight in range(5):
        load(homes["local"], in_flight)
        routing = rules.route(request(), homes, 0.0)
        seen.append((decided(routing), routing.spilling))
    assert seen == [
        ("local", False),
        ("local", False),
        ("local", True),
        ("local", True),
        ("away", True),
    ]


def test_spill_comes_before_waiting() -> None:
    rules = local_first(wait_s=7.0)
    homes = fleet(backend("local", slots=1, in_flight=1), backend("away", slots=1))
    assert decided(rules.route(request(), homes, 0.0)) == "away"
    load(homes["away"], 1)
    routing = rules.route(request(arrived=3.0), homes, 3.5)
    assert isinstance(routing.decision, Hold)
    assert routing.decision.until == 10.0
    assert (routing.decided_by, routing.tier, routing.passed) == ("tiers", -1, (1.0, 1.0))


def test_a_hold_never_outlasts_the_deadline() -> None:
    routing = one_tier(wait_s=7.0).route(
        request(arrived=3.0, deadline=4.0), fleet(backend("a", in_flight=2)), 3.5
    )
    assert isinstance(routing.decision, Hold)
    assert routing.decision.until == 4.0


def test_enter_above_one_lets_the_engine_queue_but_prefers_a_free_slot() -> None:
    rules = local_first(enter=1.5, leave=0.9)
    homes = fleet(
        backend("x", site="local", slots=2, in_flight=2),
        backend("y", site="local", slots=2, in_flight=1),
        backend("away"),
    )
    chosen = []
    (only,) = rules.route(request(), homes, 0.0).candidates
    assert only.name == "y"
    for _ in range(5):
        name = decided(rules.route(request(), homes, 0.0))
        chosen.append(name)
        homes[name].in_flight += 1
    # The free slot first, though x is named first; then both queue up to 6 in flight on 4 slots; then away.
    assert chosen == ["y", "x", "y", "away", "away"]
    assert rules.spills[0].open
    load(homes["x"], 1)  # open, at (1 + 3) / 4, and still a free slot is taken
    assert decided(rules.route(request(), homes, 0.0)) == "x"
    load(homes["x"], 2)
    load(homes["y"], 2)
    assert decided(rules.route(request(), homes, 0.0)) == "hold"  # full, and not below `leave`: no queueing


def test_a_spill_opens_at_enter_and_closes_below_leave() -> None:
    rules = local_first(enter=0.8, leave=0.4)
    homes = fleet(backend("local", slots=10), backend("away"))
    flags = []
    for now, in_flight in enumerate([7, 8, 5, 4, 3, 7, 8]):
        load(homes["local"], in_flight)
        rules.route(request(), homes, float(now))
        flags.append(rules.spills[0].open)
    assert flags == [False, True, True, True, False, False, True]
    state = rules.spills[0]
    assert (state.openings, state.moved_at, state.saturation) == (2, 6.0, 0.8)
    assert (state.rule, state.tier, state.backends) == ("all", 0, frozenset({"local"}))


def test_saturation_of_a_tier_is_weighted_by_capacity() -> None:
    rules = local_first(enter=0.5, leave=0.3)
    homes = fleet(
        backend("big", site="local", slots=9),
        backend("small", site="local", slots=1, in_flight=1),
        backend("away"),
    )
    rules.route(request(), homes, 0.0)
    assert rules.spills[0].saturation == pytest.approx(0.1)


def test_a_tier_without_an_available_backend_counts_as_open() -> None:
    rules, homes = local_first(), fleet(backend("local"), backend("away"))
    homes["local"].probed_up = False
    homes.refresh(0.0)
    routing = rules.route(request(), homes, 1.0)
    assert (decided(routing), routing.tier, routing.passed, routing.spilling) == ("away", 1, (inf,), True)
    assert rules.spills[0].open
    homes["local"].probed_up = True
    homes.refresh(2.0)
    assert not rules.route(request(), homes, 2.0).spilling


def test_a_tier_without_spill_takes_a_request_with_a_free_slot_only() -> None:
    rules = RuleSet([rule(tiers=(Tier(LOCAL), Tier()))])
    homes = fleet(backend("local", slots=1), backend("away", slots=1))
    assert decided(rules.route(request(), homes, 0.0)) == "local"
    load(homes["local"], 1)
    assert decided(rules.route(request(), homes, 0.0)) == "away"
    assert rules.spills == ()


def test_what_the_engine_reports_counts_as_saturation() -> None:
    rules = local_first()
    homes = fleet(backend("local", slots=4, waiting=5, sampled_at=10.0), backend("away"))
    assert decided(rules.route(request(), homes, 11.0)) == "away"
    assert decided(rules.route(request(), homes, 13.0)) == "local"  # too old to be believed


def test_one_models_saturation_says_nothing_about_another() -> None:
    rules = local_first()
    homes = fleet(
        backend("x", site="local", models=frozenset({"m"}), in_flight=2),
        backend("y", site="local", models=frozenset({"n"})),
        backend("away", models=frozenset({"m", "n"})),
    )
    assert decided(rules.route(request(model="m"), homes, 0.0)) == "away"
    assert decided(rules.route(request(model="n"), homes, 0.0)) == "y"
    assert {state.backends: state.open for state in rules.spills} == {
        frozenset({"x"}): True,
        frozenset({"y"}): False,
    }


def test_a_flag_closes_in_silence_and_goes_with_its_backend() -> None:
    rules, homes = local_first(), fleet(backend("local", in_flight=2), backend("away"))
    rules.route(request(), homes, 0.0)
    assert rules.spills[0].open
    load(homes["local"], 0)
    rules.observe(homes, 5.0)
    assert (rules.spills[0].open, rules.spills[0].moved_at) == (False, 5.0)
    load(homes["local"], 2)
    rules.route(request(), homes, 6.0)
    homes.replace([homes["away"]])
    rules.route(request(), homes, 7.0)
    assert rules.spills == ()
    rules.observe(homes, 8.0)


# --- the policy's say --------------------------------------------------------------------------------------


def test_fallbacks_are_the_policys_then_this_tier_and_later_ones() -> None:
    homes = fleet(
        backend("l1", site="local", slots=1, in_flight=1),
        backend("r1"),
        backend("r2"),
        backend("r3"),
        backend("down", available=False),
    )
    policy = Answers(Send("r2", ("r3", "l1", "unknown", "r3", "r2", "down")))
    decision = send(local_first(policy=policy).route(request(), homes, 0.0))
    assert decision.fallbacks == ("r3", "l1", "r1")
    decision = send(local_first().route(request(), homes, 0.0))
    assert (decision.backend, decision.fallbacks) == ("r1", ("r2", "r3"))
    load(homes["l1"], 0)
    decision = send(local_first().route(request(), homes, 0.0))
    assert (decision.backend, decision.fallbacks) == ("l1", ("r1", "r2", "r3"))


def test_the_policys_decision_object_is_left_as_it_was() -> None:
    mine = Send("a", scores={"a": 1.0}, propensity=0.5, reason="mine")
    decision = send(one_tier(Answers(mine)).route(request(), fleet(backend("a"), backend("b")), 0.0))
    assert mine.fallbacks == ()
    assert decision == Send("a", ("b",), "mine", {"a": 1.0}, 0.5)


def test_a_policy_may_hold_within_the_rules_wait_and_may_reject() -> None:
    homes = fleet(backend("a"))
    routing = one_tier(Answers(Hold(2.0), Hold(99.0)), wait_s=5.0).route(request(), homes, 0.0)
    assert (routing.decision, routing.decided_by, routing.tier) == (Hold(2.0), "chooser", -1)
    assert one_tier(Answers(Hold(99.0)), wait_s=5.0).route(request(), homes, 0.0).decision == Hold(5.0)
    assert one_tier(Answers(Reject("overloaded"))).route(request(), homes, 0.0).decision == Reject(
        "overloaded"
    )


def test_a_tier_may_have_a_policy_of_its_own() -> None:
    tiers = (Tier(LOCAL), Tier(policy=Answers(Send("r2")), policy_name="special"))
    rules = RuleSet([rule(tiers=tiers)])
    homes = fleet(backend("local", slots=1), backend("r1"), backend("r2"))
    assert rules.route(request(), homes, 0.0).decided_by == "chooser"
    load(homes["local"], 1)
    routing = rules.route(request(), homes, 0.0)
    assert (decided(routing), routing.decided_by) == ("r2", "special")


def waiting_tiers(*holds: Any) -> RuleSet:
    """Tiers with a policy each: `local`, `east`, then the rest."""
    sites = [Selector(sites=frozenset({site})) for site in ("local", "east", "*")]
    tiers = [
        Tier(site, policy=Answers(hold) if hold else None, policy_name=f"p{number}")
        for number, (site, hold) in enumerate(zip(sites, holds, strict=False))
    ]
    return RuleSet([rule(tiers=tuple(tiers), queue=Queue(10.0, 5))])


def test_a_policy_that_asks_to_wait_is_passed_over_like_a_full_tier() -> None:
    homes = fleet(backend("local", slots=4, in_flight=1), backend("east"), backend("west"))
    routing = waiting_tiers(Hold(2.0, "rest"), None, None).route(request(), homes, 0.0)
    assert (decided(routing), routing.tier, routing.passed, routing.waits) == (
        "east",
        1,
        (0.25,),
        {0: "rest"},
    )
    refused = waiting_tiers(Hold(2.0), Reject("overloaded"), None).route(request(), homes, 0.0)
    assert (decided(refused), refused.tier) == ("overloaded", 1)


def test_when_no_tier_sends_the_hold_is_that_of_the_policy_to_be_asked_first() -> None:
    homes = fleet(backend("local", slots=4), backend("east"), backend("west", slots=2, in_flight=2))
    routing = waiting_tiers(Hold(4.0, "slow"), Hold(3.0, "fast"), None).route(request(), homes, 0.0)
    assert (routing.decision, routing.decided_by, routing.tier) == (Hold(3.0, "fast"), "p1", -1)
    assert (routing.passed, routing.waits) == ((0.0, 0.0, 1.0), {0: "slow", 1: "fast"})
    assert [candidate.name for candidate in routing.candidates] == ["east"]
    load(homes["local"], 4)
    load(homes["east"], 2)
    full = waiting_tiers(Hold(4.0), Hold(3.0), None).route(request(), homes, 0.0)
    assert (full.decision, full.decided_by, full.waits) == (Hold(10.0, "no free slot"), "tiers", None)


def test_a_spill_moves_behind_a_policy_that_asks_to_wait() -> None:
    tiers = (
        Tier(LOCAL, Spill(0.5, 0.25), Answers(Hold(2.0)), "waits"),
        Tier(Selector(sites=frozenset({"east"})), Spill(0.5, 0.25)),
        Tier(),
    )
    homes = fleet(backend("local", slots=2, in_flight=1), backend("east", in_flight=2), backend("west"))
    rules = RuleSet([rule(tiers=tiers)])
    routing = rules.route(request(), homes, 0.0)
    assert (decided(routing), routing.passed, routing.spilling) == ("west", (0.5, 1.0), True)
    assert [state.open for state in rules.spills] == [True, True]


@pytest.mark.parametrize(
    "answer",
    [
        KeyError("x"),
        Send("unknown"),
        Send("busy"),
        Send("b", None),  # type: ignore[arg-type]
        Send("b", ("a", ["busy"])),  # type: ignore[arg-type]
        Send("b", (1,)),  # type: ignore[arg-type]
        Send(["b"]),  # type: ignore[arg-type]
        Send("b", (), None),  # type: ignore[arg-type]
        Send("b", (), "", None),  # type: ignore[arg-type]
        Send("b", (), "", {}, None),  # type: ignore[arg-type]
        Send("b", (), "", {}, "0.5"),  # type: ignore[arg-type]
        Send("b", (), "", {}, nan),
        None,
        "b",
        Hold(nan),
        Hold(None),  # type: ignore[arg-type]
        Hold(1.0, None),  # type: ignore[arg-type]
        Reject("no_such_code"),
        Reject(["overloaded"]),  # type: ignore[arg-type]
        Reject("overloaded", None),  # type: ignore[arg-type]
        Reject("overloaded", "", "5"),  # type: ignore[arg-type]
        Reject("overloaded", "", nan),
        Reject("overloaded", "", -1.0),
    ],
)
def test_a_bad_answer_costs_the_policy_its_say(answer: Any) -> None:
    rules = one_tier(Answers(answer))
    homes = fleet(
        backend("a", slots=4, in_flight=2), backend("b", slots=8, in_flight=3), backend("busy", in_flight=2)
    )
    routing = rules.route(request(), homes, 0.0)
    decision = send(routing)
    assert (decision.backend, decision.fallbacks) == ("b", ("a", "busy"))
    assert decision.reason.startswith("policy failed: ")
    assert routing.decided_by == "policy failed"
    assert rules.rules[0].guarded.failures == 1


def test_a_policy_that_raises_when_told_leaks_no_load() -> None:
    rules, homes = one_tier(Broken()), fleet(backend("a"))
    routing = rules.route(request(), homes, 0.0)
    lease = homes.lease(routing.request, "a", 0.0, routing.policy, routing.decided_by)
    homes.first_token(lease, 1.0)
    assert homes["a"].in_flight == 1
    homes.release(lease, Outcome.OK, 2.0)
    assert homes["a"].in_flight == 0
    assert rules.rules[0].guarded.choose(routing.request, list(homes), 3.0) == Send(
        "a", reason="policy failed: ZeroDivisionError: choose"
    )
    assert rules.rules[0].guarded.failures == 5
    assert rules.rules[0].guarded.last_failure == "ZeroDivisionError: choose"


def test_a_policy_that_empties_what_it_is_offered_loses_no_request() -> None:
    class Takes(Broken):
        def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
            cast("list[BackendView]", backends).clear()
            return Send("a")

    rules, homes = one_tier(Takes()), fleet(backend("a"), backend("b"))
    assert send(rules.route(request(), homes, 0.0)) == Send("a", ("b",))
    assert send(rules.route(request(), homes, 0.0)) == Send("a", ("b",))


def test_tried_backends_are_left_out_and_move_no_flag() -> None:
    rules, homes = local_first(), fleet(backend("local"), backend("r1"), backend("r2"))
    routing = rules.route(request(), homes, 0.0, frozenset({"local"}))
    assert (decided(routing), send(routing).fallbacks) == ("r1", ("r2",))
    assert not any(state.open for state in rules.spills)
    everything = frozenset({"local", "r1", "r2"})
    assert decided(rules.route(request(), homes, 0.0, everything)) == "no_backend"


# --- weight 0 ----------------------------------------------------------------------------------------------


def weighing(*tiers: Tier, **facts: Any) -> RuleSet:
    return RuleSet([rule(policy=WeightedQps(Random(0)), tiers=tiers or (Tier(),), **facts)])


def test_weight_zero_takes_nothing_even_where_all_others_are_full() -> None:
    homes = fleet(backend("a"), backend("zero", weight=0.0), backend("b", slots=1, in_flight=1))
    rules = weighing()
    routing = rules.route(request(), homes, 0.0)
    assert (decided(routing), send(routing).fallbacks) == ("a", ("b",))
    assert routing.removed == {"zero": "weight 0, and another backend is available"}
    load(homes["a"], 2)
    assert decided(rules.route(request(), homes, 0.0)) == "hold"
    assert decided(rules.route(request(), homes, 0.0, frozenset({"a", "b"}))) == "no_backend"


def test_weight_zero_is_passed_over_for_a_later_tier_and_its_tier_is_not_asked() -> None:
    rules = weighing(Tier(LOCAL, Spill(0.8, 0.5)), Tier())
    homes = fleet(backend("local", weight=0.0), backend("away"))
    routing = rules.route(request(), homes, 0.0)
    assert (decided(routing), routing.tier, routing.passed, routing.spilling) == ("away", 1, (), False)
    assert send(routing).fallbacks == ()


def test_weight_zero_serves_when_nothing_else_is_available() -> None:
    rules, homes = weighing(), fleet(backend("a"), backend("zero", weight=0.0), backend("none", weight=0.0))
    homes["a"].probed_up = False
    homes.refresh(1.0)
    assert {decided(rules.route(request(), homes, 1.0)) for _ in range(3)} == {"zero"}
    homes["a"].probed_up = True
    homes.refresh(2.0)
    assert decided(rules.route(request(), homes, 2.0)) == "a"


def test_weights_of_the_rule_count_and_not_those_of_the_configuration() -> None:
    homes = fleet(backend("a"), backend("zero", weight=0.0, slots=1))
    routing = weighing(weights={"a": 0.0, "zero": 2.0}).route(request(), homes, 0.0)
    assert (decided(routing), list(routing.removed or ())) == ("zero", ["a"])


def test_where_nobody_goes_by_weight_zero_means_nothing() -> None:
    homes = fleet(backend("a", in_flight=1), backend("zero", weight=0.0))
    assert decided(one_tier().route(request(), homes, 0.0)) == "zero"
    # Nor in one tier of several: its backends are others to those that are to be empty.
    homes = fleet(backend("local", weight=0.0), backend("zero", weight=0.0))
    tiers = (Tier(LOCAL), Tier(policy=LeastInFlight(), policy_name="by load"))
    assert decided(weighing(*tiers).route(request(), homes, 0.0)) == "zero"


# --- laws --------------------------------------------------------------------------------------------------

data_classes = st.sampled_from(["public", "internal", "restricted"])


@st.composite
def backends(draw: st.DrawFn, name: str) -> Backend:
    slots = draw(st.integers(1, 3))
    return backend(
        name,
        site=draw(st.sampled_from(["local", "east", "west"])),
        slots=slots,
        in_flight=draw(st.integers(0, slots + 1)),
        in_flight_tokens=draw(st.integers(0, 1000)),
        weight=draw(st.floats(0.1, 5.0)),
        models=draw(st.sampled_from([frozenset("m"), frozenset("mn"), frozenset("n")])),
        data_classes=draw(st.none() | st.frozensets(data_classes)),
        context_tokens=draw(st.dictionaries(st.sampled_from(["m", "n"]), st.integers(1, 60), max_size=2)),
        ttft_s=draw(st.floats(0.0, 2.0)),
        rtt_s=draw(st.floats(0.0, 0.5)),
        waiting=draw(st.integers(0, 2)),
        kv_use=draw(st.floats(0.0, 1.0)),
        sampled_at=draw(st.sampled_from([0.0, 9.0])),
        available=draw(st.booleans()),
    )


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
    return fleet(*(draw(backends(f"b{number}")) for number in range(draw(st.integers(0, 5)))))


requests = st.builds(
    request,
    model=st.sampled_from(["m", "n", "o"]),
    data_class=data_classes,
    prompt_tokens=st.integers(0, 100),
    max_tokens=st.integers(0, 60),
)


def policy_file(rng: Random) -> RuleSet:
    spilling = (Tier(LOCAL, Spill(1.2, 0.6)), Tier(Selector(sites=frozenset({"east"}))), Tier())
    return RuleSet(
        [
            rule(
                "n",
                WeightedByRoom(rng),
                match=Match(models=("n",)),
                require=Selector(sites=frozenset({"east"})),
            ),
            rule("rest", WeightedByRoom(rng), tiers=spilling, queue=Queue(5.0, 10)),
        ]
    )


@given(fleets(), st.lists(requests, max_size=8))
def test_nothing_is_sent_where_constraints_forbid(homes: Fleet, asked: list[Any]) -> None:
    rules = policy_file(Random(1))
    for facts in asked:  # several, so that what is remembered of one cannot serve another
        routing = rules.route(facts, homes, 10.0)
        found = feasible(facts, homes, rules.rule_for(facts).allows)
        allowed = {view.name for view in found.backends if view.available}
        if isinstance(routing.decision, Send):
            named = [routing.decision.backend, *routing.decision.fallbacks]
            assert allowed.issuperset(named)
            assert len(named) == len(set(named))
        elif isinstance(routing.decision, Reject):
            assert not allowed
            assert routing.decision.code == (found.refusal.code if found.refusal else "no_backend")
        else:
            assert allowed
        assert set(routing.removed or ()) == set(found.removed)


@given(fleets(), requests, st.integers(0, 5))
def test_a_decision_can_be_replayed_from_its_record(homes: Fleet, facts: Any, seed: int) -> None:
    routing = policy_file(Random(seed)).route(facts, homes, 10.0)
    views = rebuild(routing.candidates, homes.backends)
    for view, candidate in zip(views, routing.candidates, strict=True):
        assert view.saturation(10.0) == candidate.saturation
    for one in homes:  # the record holds copies
        one.in_flight = one.in_flight_tokens = 77
        one.ttft_s = 9.0
    if not routing.candidates:
        assert not isinstance(routing.decision, Send)
        return
    again = WeightedByRoom(Random(seed)).choose(facts, views, routing.at)
    assert isinstance(again, Send)
    first = send(routing)
    assert (again.backend, again.scores, again.propensity) == (first.backend, first.scores, first.propensity)
    assert first.fallbacks[: len(again.fallbacks)] == again.fallbacks


def test_a_replay_needs_the_backend_in_the_configuration() -> None:
    routing = one_tier().route(request(), fleet(backend("a")), 0.0)
    with pytest.raises(KeyError):
        rebuild(routing.candidates, {})


def test_each_rule_keeps_its_own_policy() -> None:
    first, second = LeastInFlight(), LeastInFlight()
    rules = RuleSet([rule("a", first, match=Match(tenants=frozenset({"x"}))), rule("b", second)])
    homes = fleet(backend("a"))
    routing = rules.route(request(), homes, 0.0)
    homes.lease(routing.request, "a", 0.0, routing.policy, routing.decided_by)
    assert (first.heard, second.heard) == ([], [("dispatched", "a")])
