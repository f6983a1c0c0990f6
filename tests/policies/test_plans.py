"""The life of a plan, and what it promises."""

from __future__ import annotations

import json
from math import isclose

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.plans import (
    ENDED,
    MOVES,
    OPEN,
    Forecast,
    Plan,
    PlanEvent,
    PlanState,
    Resources,
    Trigger,
    forecast_of,
    plan_from,
)
from policies.profile import Capacity, Limits, Origin, Profile, Source, Step
from policies.standby import Event, Standby, State

SOURCE = Source(origin=Origin.GIVEN, text="made up")
events = st.lists(st.sampled_from(PlanEvent), max_size=12)


def a_plan(*standbys: str, **changes: object) -> Plan:
    given_: dict[str, object] = {
        "id": "a1b2c3d4",
        "standbys": standbys or ("nj",),
        "trigger": Trigger.CONTROLLER,
        "reason": "demand of 900 tokens is above 80% of 1000",
        "mode": "confirm",
        "created": 1000.0,
        "expires": 1900.0,
        **changes,
    }
    return Plan(**given_)  # type: ignore[arg-type]


def profile(users: int = 24, **step: float) -> Profile:
    law = {"alpha_us": 20_000.0, "beta_us": 100.0, "gamma_us": 0.1, "delta_us": 50.0, **step}
    return Profile(
        name="h20-1",
        card="H20",
        model="qwen3-32b",
        step=Step(**law, source=SOURCE),
        limits=Limits(source=SOURCE),
        capacity=Capacity(users=users, prompt_tokens=1024, output_tokens=1024, source=SOURCE),
    )


# The table


def test_every_state_is_reached_and_every_open_one_can_end() -> None:
    reached = {PlanState.PROPOSED} | set(MOVES.values())
    assert reached == set(PlanState)
    ways = {before: {after for (state, _), after in MOVES.items() if state is before} for before in PlanState}
    assert all(ways[state] & ENDED for state in OPEN)


def test_nothing_leaves_an_end() -> None:
    assert not {state for state, _ in MOVES} & ENDED


@given(events)
def test_no_plan_is_executed_that_nobody_has_approved(events: list[PlanEvent]) -> None:
    plan = a_plan()
    for event in events:
        plan = plan.moved(event, "somebody", "", 1001.0) or plan
    made = [decision.event for decision in plan.decisions]
    if plan.state in (PlanState.EXECUTING, PlanState.DONE, PlanState.FAILED):
        assert made[0] is PlanEvent.APPROVE
        assert plan.approved_by == "somebody"
    assert made.count(PlanEvent.APPROVE) <= 1
    assert plan.open == (plan.state in OPEN)


@given(events)
def test_what_is_not_in_the_table_changes_nothing(events: list[PlanEvent]) -> None:
    plan = a_plan()
    for event in events:
        after = plan.moved(event, "somebody", "", 1001.0)
        assert (after is not None) == plan.may(event)
        plan = after or plan


@given(
    events,
    st.floats(0, 1e9),
    st.none() | st.floats(0, 1e6),
    st.builds(Forecast, ttft_s=st.none() | st.floats(0, 10), concurrency=st.none() | st.integers(0, 999)),
)
def test_a_plan_is_what_was_written_of_it(
    events: list[PlanEvent], wall: float, cost: float | None, forecast: Forecast
) -> None:
    plan = a_plan("a", "b", cost_per_hour=cost, forecast=forecast, resources=Resources(card="H20", count=2))
    for event in events:
        plan = plan.moved(event, "Ada", "since it is late", wall) or plan
    assert plan_from(json.loads(json.dumps(plan.as_dict()))) == plan


@pytest.mark.parametrize("missing", ["id", "state", "standbys", "decisions", "resources"])
def test_half_a_plan_is_none(missing: str) -> None:
    written = a_plan().as_dict()
    del written[missing]
    with pytest.raises((KeyError, ValueError, TypeError)):
        plan_from(written)


def test_a_plan_is_done_with_the_last_of_its_standbys() -> None:
    plan = a_plan("a", "b").moved(PlanEvent.APPROVE, "Ada", "", 1.0)
    assert plan is not None
    assert plan.ready_with("a", 2.0) is None, "it has not begun"
    plan = plan.began_with("a", 2.0, "")
    assert plan is not None
    assert plan.began_with("a", 3.0, "") is None
    assert plan.began_with("c", 3.0, "") is None
    plan = plan.began_with("b", 3.0, "")
    assert plan is not None
    assert (plan.started, plan.state, len(plan.decisions)) == (("a", "b"), PlanState.EXECUTING, 2)
    one = plan.ready_with("a", 4.0)
    assert one is not None
    assert one.state is PlanState.EXECUTING
    assert one.ready_with("a", 5.0) is None, "twice the same is not both"
    assert one.ready_with("c", 5.0) is None
    both = one.ready_with("b", 6.0)
    assert both is not None
    assert both.state is PlanState.DONE


def test_what_is_stopped_before_it_is_done_comes_to_nothing() -> None:
    plan = a_plan("a", "b").moved(PlanEvent.APPROVE, "Ada", "", 1.0)
    assert plan is not None
    assert plan.stopped_with("a", 2.0, "") is None, "it has not begun"
    plan = plan.began_with("a", 2.0, "")
    assert plan is not None
    assert plan.began == 2.0
    gone = plan.stopped_with("a", 5.0, "nobody wants it")
    assert gone is not None
    assert (gone.state, gone.stopped) == (PlanState.EXPIRED, (("a", 5.0),))
    done = plan.ready_with("a", 3.0)
    assert done is not None
    done = done.ready_with("b", 4.0)
    assert done is not None
    later = done.stopped_with("b", 9.0, "")
    assert later is not None
    assert (later.state, later.stopped) == (PlanState.DONE, (("b", 9.0),))
    assert later.stopped_with("b", 10.0, "") is None
    assert plan_from(later.as_dict()) == later


def test_it_waits_for_approval_and_as_long_again_for_what_is_to_begin() -> None:
    plan = a_plan("a", "b")
    assert not plan.is_due(1899.9)
    assert plan.is_due(1900.0)
    assert not plan.is_due(100.0), "a clock that was put right"
    assert plan.is_due(99.0), "or set back for years"
    late = plan.moved(PlanEvent.APPROVE, "Ada", "", 1899.0)
    assert late is not None
    assert (late.due, late.waiting) == (2799.0, "a and b to begin")
    assert not late.is_due(1900.0), "nobody approves for a second"
    assert late.is_due(2799.0)
    half = late.began_with("a", 2000.0, "")
    assert half is not None
    assert half.waiting == "b to begin"
    assert not half.is_due(2899.0)
    assert half.is_due(2900.0), "b is not started hours later"
    begun = half.began_with("b", 2500.0, "")
    assert begun is not None
    assert (begun.waiting, begun.is_due(1e12)) == ("", False)


moves = st.lists(
    st.tuples(st.sampled_from("ab"), st.sampled_from([event for event in Event if event is not Event.FOUND])),
    max_size=14,
)


@given(moves, st.integers(0, 14))
def test_what_a_crash_has_swallowed_is_seen_from_where_the_standbys_are(
    steps: list[tuple[str, Event]], told: int
) -> None:
    """Moves behind the first `told` never reached the plan: it ends up where the standbys are all the same."""
    standbys = {name: Standby(name) for name in "ab"}
    plan = a_plan("a", "b").moved(PlanEvent.APPROVE, "Ada", "", 1.0)
    assert plan is not None
    for number, (name, event) in enumerate(steps):
        one = standbys[name]
        if one.runs and event is Event.START and number >= told:
            continue  # nothing is started twice on a plan that is open
        move = one.move(event, "", 2.0 + number, "later" if one.runs else plan.id)
        if move is not None and number < told and move.plan == plan.id:
            plan = plan.after(move) or plan
    for standby in standbys.values():
        plan = plan.as_seen(standby, 99.0) or plan
    on = {name for name, one in standbys.items() if one.plan == plan.id and one.state is not State.STANDBY}
    assert on <= set(plan.started) or not plan.open
    assert {name for name in plan.started if name not in dict(plan.stopped)} <= on
    if any(one.runs for one in standbys.values()):
        assert plan.state is not PlanState.APPROVED
    assert all(plan.as_seen(standby, 99.0) is None for standby in standbys.values()), "and stays there"


# The forecast


def test_without_a_profile_nothing_is_promised_but_slots() -> None:
    assert forecast_of(None) == Forecast()
    assert forecast_of(None, 8) == Forecast(concurrency=8)
    assert not forecast_of(None, 8).known
    assert forecast_of(profile(users=0), 3) == Forecast(concurrency=3)


def test_a_forecast_by_hand() -> None:
    found = forecast_of(profile(users=10))
    decode_us = 20_000 + 10 * (100 + 0.1 * 1536)
    assert found.tpot_s is not None
    assert found.ttft_s is not None
    assert isclose(found.tpot_s, (decode_us + 10 * 50) / 1e6)
    assert isclose(found.ttft_s, (decode_us + 50 * 1024) / 1e6)
    assert found.tokens_per_s == pytest.approx(10 / found.tpot_s)
    assert found.concurrency == 10


@given(st.integers(1, 200), st.integers(1, 200))
def test_more_at_once_are_never_faster_and_never_do_less(few: int, more: int) -> None:
    few, more = sorted((few, more))
    left, right = forecast_of(profile(few)), forecast_of(profile(more))
    assert left.ttft_s is not None
    assert right.ttft_s is not None
    assert left.tpot_s is not None
    assert right.tpot_s is not None
    assert left.ttft_s <= right.ttft_s
    assert left.tpot_s <= right.tpot_s
    assert (left.tokens_per_s or 0) <= (right.tokens_per_s or 0) * (1 + 1e-12)


def test_two_side_by_side() -> None:
    one, two = Forecast(0.5, 0.02, 100.0, 8), Forecast(0.4, 0.03, 50.0, 4)
    assert one.and_then(two) == two.and_then(one) == Forecast(0.5, 0.03, 150.0, 12)
    assert one.and_then(Forecast(concurrency=4)) == Forecast(None, None, None, 12)
