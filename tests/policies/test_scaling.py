"""When standbys start and stop: the laws that the controller keeps, and what each of its reasons is for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import ceil, inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.scaling import PENDING, Controller, Pool, ScalingSettings, Step, Unit
from policies.standby import Event, State

WALL = 1_764_000_000.0
TOKENS = 1000.0
REACTIVE = ScalingSettings(quantile=0.0)


def unit(name: str = "a", state: State | None = State.STANDBY, **changes: Any) -> Unit:
    fields: dict[str, Any] = {
        "tokens": TOKENS,
        "cost_per_hour": 1.0,
        "cold_start_s": 180.0,
        "in_state_s": 1e6,
    }
    return Unit(name, "far", state=state, **{**fields, **changes})


def units(count: int, ready: int = 0, **changes: Any) -> list[Unit]:
    return [
        unit(f"u{at:02d}", State.READY if at < ready else State.STANDBY, **changes) for at in range(count)
    ]


def pool(units: Sequence[Unit], demand: float = 0.0, **changes: Any) -> Pool:
    return Pool("m", units, tokens_in_use=demand, **changes)


def decide(
    one: Pool, settings: ScalingSettings = REACTIVE, now: float = 0.0, controller: Controller | None = None
) -> list[Step]:
    return (controller or Controller(settings)).decide([one], now, WALL + now)


def names(steps: Iterable[Step], event: Event) -> list[str]:
    return [step.name for step in steps if step.event is event]


def started(*args: Any, **kwargs: Any) -> list[str]:
    return names(decide(*args, **kwargs), Event.START)


def stopped(*args: Any, **kwargs: Any) -> list[str]:
    return names(decide(*args, **kwargs), Event.STOP)


# Demand against capacity


def test_more_is_started_above_the_upper_threshold_and_not_at_it() -> None:
    assert started(pool(units(2, ready=1), 800.0)) == []
    assert started(pool(units(2, ready=1), 801.0)) == ["u01"]


def test_capacity_that_is_on_its_way_counts() -> None:
    for state in PENDING:
        assert started(pool([unit("a", State.READY), unit("b", state), unit("c")], 1500.0)) == []


def test_capacity_that_is_down_does_not_count() -> None:
    down = unit("a", State.READY, available=False)
    assert started(pool([down, unit("b")], 10.0)) == ["b"]


def test_waiting_tokens_are_demand() -> None:
    assert started(pool(units(2, ready=1), 500.0, tokens_waiting=400.0, waiting=3)) == ["u01"]


def test_the_cheapest_is_started_and_what_drains_is_taken_back_before_it() -> None:
    dear, cheap, unknown = (
        unit(name, cost_per_hour=cost) for name, cost in zip("abc", (2.0, 1.0, None), strict=True)
    )
    assert started(pool([unknown, dear, cheap], 10.0)) == ["b"]
    assert started(pool([unknown, dear, unit("d", State.DRAINING, cost_per_hour=9.0), cheap], 10.0)) == ["d"]


def test_as_many_are_started_at_once_as_run_already() -> None:
    """From one to thirty-two in six decisions, not in thirty-one (kubeai#229)."""
    everything = units(32)
    controller = Controller(ScalingSettings(quantile=0.0))
    rounds = 0
    while not all(one.state is State.STARTING for one in everything):
        for name in started(pool(everything, 1e9), controller=controller, now=float(rounds)):
            place = int(name[1:])
            everything[place] = replace(everything[place], state=State.STARTING)
        rounds += 1
    assert rounds == 6


def test_every_step_says_why_with_its_figures() -> None:
    (start,) = decide(pool(units(2, ready=1), 900.0))
    assert start.reason == "demand of 900 tokens is above 80% of 1000"
    assert start.figures == {"demand": 900.0, "capacity": 1000.0, "coming": 0.0}
    (stop,) = decide(pool(units(2, ready=2), 300.0))
    assert stop.reason == "demand of 300 tokens is below 40% of 2000"


def test_the_dearest_is_given_back_below_the_lower_threshold() -> None:
    dear = unit("a", State.READY, cost_per_hour=5.0)
    cheap = unit("b", State.READY)
    assert stopped(pool([dear, cheap], 799.0)) == ["a"]
    assert stopped(pool([dear, cheap], 800.0)) == []


def test_nothing_is_given_back_that_what_is_left_would_miss() -> None:
    small, large = (
        unit("a", State.READY, tokens=100.0),
        unit("b", State.READY, tokens=1000.0, cost_per_hour=99.0),
    )
    assert stopped(pool([small, large], 90.0)) == ["a"], (
        "without the dear one, 90 tokens would be above 80 % of 100"
    )


def test_nothing_is_given_back_within_five_minutes_of_a_start() -> None:
    controller = Controller(REACTIVE)
    assert started(pool(units(3, ready=2), 1700.0), controller=controller) == ["u02"]
    for now in (1.0, 150.0, 299.0):
        assert decide(pool(units(3, ready=3), 10.0), controller=controller, now=now) == []
    assert stopped(pool(units(3, ready=3), 10.0), controller=controller, now=700.0) != []


def test_nothing_is_given_back_while_something_starts_or_requests_wait() -> None:
    ready = [unit("a", State.READY), unit("b", State.READY)]
    assert stopped(pool(ready, 10.0)) != []
    assert stopped(pool([*ready, unit("c", State.STARTING)], 10.0)) == []
    assert stopped(pool(ready, 10.0, waiting=1)) == []


def test_the_last_one_goes_when_nothing_was_asked_for_in_five_minutes() -> None:
    controller = Controller(REACTIVE)
    last = [unit("a", State.READY)]
    assert stopped(pool(last, 1.0), controller=controller, now=0.0) == []
    assert stopped(pool(last, 0.0), controller=controller, now=299.0) == []
    assert stopped(pool(last, 0.0), controller=controller, now=301.0) == ["a"]


def test_a_burst_within_five_minutes_keeps_what_it_needed() -> None:
    controller = Controller(REACTIVE)
    assert stopped(pool(units(2, ready=2), 1500.0), controller=controller, now=0.0) == []
    assert stopped(pool(units(2, ready=2), 100.0), controller=controller, now=200.0) == []
    assert stopped(pool(units(2, ready=2), 100.0), controller=controller, now=301.0) == ["u01"]


# What may not be done


@pytest.mark.parametrize(
    "changes",
    [
        {"allowed": False},
        {"pause_s": 1.0},
        {"in_state_s": 59.0, "least_off_s": 60.0},
        {"state": State.FAILED},
        {"state": State.STOPPING},
    ],
)
def test_what_may_not_start_is_not_started(changes: dict[str, Any]) -> None:
    one = replace(unit("a"), **changes)
    only = [frozenset({"a"})]
    assert started(pool([one], 1e6, tokens_waiting=1e6, waiting=9, only=only, alarm="hot")) == []


def test_what_has_not_been_on_for_long_enough_is_not_stopped() -> None:
    young = unit("a", State.READY, in_state_s=299.0, least_on_s=300.0)
    assert stopped(pool([young, unit("b", State.READY)], 10.0)) == ["b"]
    assert stopped(pool([young], 0.0), now=1e4) == []


def test_the_ceiling_of_a_site_holds_over_all_models() -> None:
    settings = replace(REACTIVE, most={"far": 2})
    first = Pool("m", [unit("a", State.STOPPING), unit("b"), unit("c")], tokens_in_use=1e6)
    second = Pool("n", [unit("d")], tokens_in_use=1e6)
    near = Pool("o", [replace(unit("e"), site="near")], tokens_in_use=1e6)
    steps = Controller(settings).decide([first, second, near], 0.0, WALL)
    assert names(steps, Event.START) == ["b", "e"], "what stops is still paid for"


def test_what_drains_is_taken_back_at_the_ceiling_of_its_site() -> None:
    settings = replace(REACTIVE, most={"far": 1})
    assert started(pool([unit("a", State.DRAINING), unit("b")], 1e6), settings) == ["a"]


def test_a_standby_of_two_models_is_stopped_only_when_both_can_do_without_it() -> None:
    shared = unit("a", State.READY, cost_per_hour=9.0)
    others = unit("b", State.READY), unit("c", State.READY)
    busy = Pool("n", [shared, others[1]], tokens_in_use=1500.0)
    calm = Pool("m", [shared, others[0]], tokens_in_use=10.0)
    assert Controller(REACTIVE).decide([calm, busy], 0.0, WALL) == []
    both = Controller(REACTIVE).decide([calm, replace(busy, tokens_in_use=10.0)], 0.0, WALL)
    assert names(both, Event.STOP) == ["a"]


# Requests that only a standby may serve


def test_requests_that_only_a_standby_may_serve_start_one_at_once() -> None:
    plenty = Unit("local", tokens=1e6)
    only = [frozenset({"a", "b"}), frozenset({"c"})]
    one = pool([plenty, unit("a", cost_per_hour=2.0), unit("b"), unit("c")], 1.0, only=only, waiting=2)
    steps = decide(one)
    assert names(steps, Event.START) == ["b", "c"]
    assert steps[0].reason == "requests wait that nothing else may serve"


def test_and_no_second_one_while_that_starts() -> None:
    only = [frozenset({"a", "b"})]
    for state in PENDING:
        assert started(pool([unit("a", state), unit("b")], 1.0, only=only, waiting=1)) == []


# Objectives and alarms


def missed(
    controller: Controller, until: float, ttft: float, slope: float, state: State = State.STANDBY
) -> Pool:
    """A TTFT that rises by so much a second; -> the pool at the end of that."""
    one = pool([Unit("local", tokens=1e6), unit("a", state)], 10.0)
    now = 0.0
    while now <= until:
        one = replace(one, ttft_s=ttft + slope * now, ttft_objective_s=2.0)
        if now < until:
            assert controller.decide([one], now, WALL + now) == [] or state is not State.STANDBY
        now += 5.0
    return one


def test_an_objective_that_will_be_missed_by_the_time_of_a_cold_start_starts_one_before() -> None:
    controller = Controller(REACTIVE)
    one = missed(controller, 60.0, 0.5, 0.006)  # 2 s are reached in 250 s; a cold start takes 180 s
    assert controller.decide([one], 60.0, WALL) == []
    controller = Controller(REACTIVE)
    one = missed(controller, 60.0, 0.5, 0.0063)
    (step,) = controller.decide([one], 60.0, WALL)
    assert step.name == "a"
    assert step.reason.startswith("TTFT will be 2.01 s in 180 s if it goes on like this")


def test_an_objective_that_is_missed_already_starts_one_and_no_second() -> None:
    slow = {"tpot_s": 0.2, "tpot_objective_s": 0.1}
    assert started(pool([Unit("local", tokens=1e6), unit("a"), unit("b")], 10.0, **slow)) == ["a"]
    coming = [Unit("local", tokens=1e6), unit("a", State.STARTING), unit("b")]
    assert started(pool(coming, 10.0, **slow)) == []


def test_nothing_is_given_back_while_an_objective_is_missed() -> None:
    ready = units(2, ready=2)
    assert stopped(pool(ready, 10.0, tpot_s=0.2, tpot_objective_s=0.1)) == []
    assert stopped(pool(ready, 10.0, tpot_s=0.05, tpot_objective_s=0.1)) != []


def test_an_alarm_of_a_host_starts_one_once_and_keeps_all_while_it_lasts() -> None:
    controller = Controller(REACTIVE)
    hot = pool([unit("a", State.READY), unit("b"), unit("c")], 10.0, alarm="gpu_temperature of 91")
    (step,) = decide(hot, controller=controller)
    assert (step.name, step.reason) == (
        "b",
        "the host says gpu_temperature of 91, so its capacity is worth less",
    )
    both = [unit("a", State.READY), unit("b", State.READY), unit("c")]
    assert decide(replace(hot, units=both), controller=controller, now=1000.0) == []
    assert stopped(replace(hot, units=both, alarm=""), controller=controller, now=2000.0) == ["b"]
    assert started(replace(hot, units=[both[0], unit("b")]), controller=controller, now=3000.0) == ["b"]


# By the token or by the hour


def by_token(rate: float, in_use: float = 500.0) -> Unit:
    """Spends a unit of money for each thousand tokens."""
    return Unit("api", "api", 1e6, tokens_per_s=rate, tokens_in_use=in_use, price_per_token=0.001)


def test_an_hour_is_bought_when_the_tokens_that_it_takes_over_cost_more() -> None:
    hourly = unit("a", cost_per_hour=36.0)
    assert started(pool([by_token(9.9), hourly], 500.0)) == []
    (step,) = decide(pool([by_token(10.1), hourly], 500.0))
    assert step.reason == "tokens that it would take over cost 36.36 an hour elsewhere, and it costs 36"


def test_only_what_fits_on_it_is_taken_over() -> None:
    hourly = unit("a", cost_per_hour=36.0)
    assert started(pool([by_token(19.0, in_use=1600.0), hourly], 1600.0)) == []
    assert started(pool([by_token(21.0, in_use=1600.0), hourly], 1600.0)) == ["a"]


def test_an_hour_is_given_back_when_its_tokens_would_cost_less_and_not_before() -> None:
    for rate, expected in ((7.9, ["a"]), (8.1, [])):
        hourly = unit("a", State.READY, cost_per_hour=36.0, tokens_per_s=rate)
        assert stopped(pool([by_token(0.0, 0.0), hourly], 300.0)) == expected


@given(rate=st.floats(0.0, 100.0), cost=st.floats(0.1, 100.0))
def test_what_was_bought_is_not_given_back_at_the_same_pace(rate: float, cost: float) -> None:
    idle, running = (
        unit("a", cost_per_hour=cost),
        unit("a", State.READY, cost_per_hour=cost, tokens_per_s=rate),
    )
    if started(pool([by_token(rate), idle], 500.0)):
        assert stopped(pool([by_token(0.0, 0.0), running], 500.0), now=1e5) == []


# The forecast


def after_days(
    curve: Any, minutes: int, one: list[Unit], settings: ScalingSettings | None = None
) -> Controller:
    """A controller that has seen a demand, minute by minute."""
    controller = Controller(settings)
    for minute in range(minutes):
        controller.decide([pool(one, curve(minute))], minute * 60.0, WALL + minute * 60.0)
    return controller


def test_capacity_starts_ahead_of_the_rush_that_yesterday_had() -> None:
    def rush(minute: int) -> float:
        return 500.0 if minute % 1440 < 480 else 1500.0

    ready, more = [unit("a", State.READY), unit("b", State.READY)], unit("c")
    quick = ScalingSettings(up=1.0)
    controller = after_days(rush, 1440 + 475, [*ready, more], quick)
    now = (1440 + 475) * 60.0
    late = replace(pool([ready[0], unit("b")], 500.0))
    steps = controller.decide([late], now, WALL + now)
    assert names(steps, Event.START) == ["b"]
    assert "tokens are expected" in steps[0].reason
    assert steps[0].figures["high"] > 1000.0
    reactive = after_days(rush, 1440 + 475, [*ready, more], replace(quick, quantile=0.0))
    assert reactive.decide([late], now, WALL + now) == []


def test_what_is_forecast_not_to_be_needed_is_given_back_above_the_lower_threshold() -> None:
    three = units(3, ready=3)
    controller = after_days(lambda _: 1500.0, 100, three)
    steps = controller.decide([pool(three, 1500.0)], 6060.0, WALL + 6060.0)
    assert names(steps, Event.STOP) == ["u02"]
    assert "no more than 1500 tokens are expected, and 2000 are left" in steps[0].reason
    assert stopped(pool(three, 1500.0), now=6060.0) == [], (
        "which the threshold alone would keep: it is above 40 %"
    )


# Laws

some_units = st.lists(
    st.builds(
        unit,
        st.sampled_from(tuple("abcdefgh")),
        st.sampled_from([None, *State]),
        tokens=st.sampled_from([0.0, 500.0, 1000.0, 4000.0]),
        cost_per_hour=st.sampled_from([None, 0.0, 1.0, 3.0]),
        in_state_s=st.sampled_from([0.0, 100.0, 1e6]),
        least_on_s=st.sampled_from([0.0, 300.0]),
        least_off_s=st.sampled_from([0.0, 60.0]),
        pause_s=st.sampled_from([0.0, 0.0, 5.0]),
        allowed=st.booleans(),
        available=st.booleans(),
    ),
    max_size=8,
    unique_by=lambda one: one.name,
)
some_pools = st.builds(
    pool,
    some_units,
    st.floats(0.0, 1e5),
    tokens_waiting=st.sampled_from([0.0, 500.0]),
    waiting=st.sampled_from([0, 0, 2]),
    only=st.lists(st.frozensets(st.sampled_from(tuple("abcdefgh")), min_size=1), max_size=2),
    ttft_s=st.sampled_from([0.0, 3.0]),
    ttft_objective_s=st.sampled_from([inf, 2.0]),
    alarm=st.sampled_from(["", "hot"]),
)


@given(st.lists(some_pools, min_size=1, max_size=6))
def test_no_step_is_one_that_may_not_be(pools: list[Pool]) -> None:
    controller = Controller(ScalingSettings(most={"far": 3}))
    for turn, one in enumerate(pools):
        steps = controller.decide([one], turn * 400.0, WALL + turn * 400.0)
        by_name = {each.name: each for each in one.units}
        assert len({step.name for step in steps}) == len(steps)
        for step in steps:
            each = by_name[step.name]
            assert step.reason
            if step.event is Event.START:
                assert each.allowed
                assert each.state is State.DRAINING or (
                    each.state is State.STANDBY
                    and each.pause_s == 0.0
                    and each.in_state_s >= each.least_off_s
                )
            else:
                assert each.state is State.READY
                assert each.in_state_s >= each.least_on_s
        on = sum(each.state not in (None, State.STANDBY, State.FAILED) for each in one.units)
        new = sum(by_name[name].state is State.STANDBY for name in names(steps, Event.START))
        assert new == 0 or on + new <= 3


@given(one=some_pools, more=st.floats(0.0, 1e5))
def test_more_demand_never_asks_for_less(one: Pool, more: float) -> None:
    less, much = (decide(each) for each in (one, replace(one, tokens_in_use=one.tokens_in_use + more)))
    assert set(names(less, Event.START)) <= set(names(much, Event.START))
    assert set(names(much, Event.STOP)) <= set(names(less, Event.STOP))


@given(
    demand=st.floats(0.0, 2e4),
    sizes=st.lists(st.sampled_from([300.0, 1000.0, 2500.0]), min_size=1, max_size=8),
    ready=st.sets(st.integers(0, 7)),
    quantile=st.sampled_from([0.0, 0.95]),
)
def test_under_constant_demand_it_settles_and_stays(
    demand: float, sizes: list[float], ready: set[int], quantile: float
) -> None:
    """Whatever runs at first, each standby moves at most once, and what is left is enough, if anything is."""
    controller = Controller(ScalingSettings(quantile=quantile))
    states = [State.READY if at in ready else State.STANDBY for at in range(len(sizes))]
    moves = [0] * len(sizes)
    for turn in range(60):
        now = turn * 60.0
        at_hand = [unit(str(at), state, tokens=sizes[at]) for at, state in enumerate(states)]
        for step in controller.decide([pool(at_hand, demand)], now, WALL + now):
            moves[int(step.name)] += 1
            states[int(step.name)] = State.READY if step.event is Event.START else State.STANDBY
            last = turn
            assert last < 50
    assert max(moves) <= 1
    there = sum(size for size, state in zip(sizes, states, strict=True) if state is State.READY)
    assert demand <= 0.8 * there or there == sum(sizes)
    assert demand == 0.0 or there > 0.0


@given(demand=st.floats(1.0, 4e4))
def test_from_nothing_as_much_is_started_as_the_upper_threshold_asks_for(demand: float) -> None:
    everything = units(40)
    controller = Controller(REACTIVE)
    for turn in range(8):
        for name in started(pool(everything, demand), controller=controller, now=float(turn)):
            everything[int(name[1:])] = replace(everything[int(name[1:])], state=State.READY)
    on = sum(one.state is State.READY for one in everything)
    assert on == min(ceil(demand / (0.8 * TOKENS) * (1 - 1e-12)), 40)


@given(
    values=st.lists(st.floats(0.0, 8000.0), min_size=80, max_size=120), quantile=st.sampled_from([0.0, 0.9])
)
def test_whatever_demand_does_nothing_is_given_back_within_five_minutes_of_a_start(
    values: list[float], quantile: float
) -> None:
    controller = Controller(ScalingSettings(quantile=quantile))
    states = {f"u{at}": State.STANDBY for at in range(10)}
    last_start = -inf
    for turn, value in enumerate(values):
        now = turn * 60.0
        at_hand = [unit(name, state) for name, state in states.items()]
        for step in controller.decide([pool(at_hand, value)], now, WALL + now):
            states[step.name] = State.READY if step.event is Event.START else State.STANDBY
            if step.event is Event.START:
                last_start = now
            else:
                assert now - last_start >= 300.0


# What is offered


def test_what_is_offered_counts_though_what_is_held_is_bounded_by_what_there_is() -> None:
    """A rush of four times the load needs one decision, not one cold start after the other."""
    full = units(8, ready=2)
    controller = Controller(ScalingSettings(quantile=0.0, up=1.0))
    rounds = 0
    while found := started(pool(full, 2000.0, offered=[8000.0] * 4), controller=controller):
        for name in found:
            full[int(name[1:])] = replace(full[int(name[1:])], state=State.STARTING)
        rounds += 1
    assert sum(one.state is State.STARTING for one in full) == 6
    assert rounds == 2


def test_where_it_is_known_what_is_offered_a_moment_of_chance_starts_nothing() -> None:
    controller = Controller(REACTIVE)
    for second in range(100):
        one = pool(units(2, ready=1), 900.0 if second == 50 else 500.0, offered=[500.0] * 20)
        assert not decide(one, now=float(second), controller=controller)


def test_what_is_held_counts_though_nothing_comes_any_more() -> None:
    controller = Controller(REACTIVE)
    for second in range(1000):
        one = pool(units(4, ready=2), 1500.0, offered=[1.0] * 20)
        assert not names(decide(one, now=float(second), controller=controller), Event.STOP)


def test_a_standby_runs_while_enough_of_it_would_be_in_use() -> None:
    """Bursts that take half of a second unit, in one quarter of a minute of twenty: 2.5 % of it."""
    calm, bursts = [500.0] * 20, [500.0] * 15 + [1500.0] + [500.0] * 4
    for offered, least, runs in (
        (calm, 0.02, False), (bursts, 0.02, True), (bursts, 0.024, True), (bursts, 0.026, False),
    ):  # fmt: skip
        settings = ScalingSettings(up=1.0, quantile=0.0, least_use=least)
        begins = started(pool(units(2, ready=1), 500.0, offered=offered), controller=Controller(settings))
        assert bool(begins) is runs
        ends = stopped(pool(units(2, ready=2), 500.0, offered=offered), controller=Controller(settings))
        assert bool(ends) is not runs


def test_a_rush_of_a_minute_is_not_thinned_by_the_calm_before_it() -> None:
    settings = ScalingSettings(up=1.0, quantile=0.0, least_use=0.5)
    rush = [500.0] * 16 + [1600.0] * 4
    assert started(pool(units(2, ready=1), 500.0, offered=rush), controller=Controller(settings))
    over = [1600.0] * 4 + [500.0] * 16
    assert not started(pool(units(2, ready=1), 500.0, offered=over), controller=Controller(settings))


@given(
    st.lists(st.floats(0.0, 5000.0), min_size=4, max_size=20),
    st.integers(1, 5),
    st.floats(0.0, 0.5),
    st.floats(0.5, 1.0),
)
def test_what_was_started_for_what_is_offered_is_not_given_back_for_the_same(
    offered: list[float], ready: int, least_use: float, up: float
) -> None:
    settings = ScalingSettings(up=up, down=0.4, quantile=0.0, least_use=least_use, most_at_once=9)
    one = pool(units(6, ready=ready), 0.0, offered=offered)
    on = ready + len(started(one, controller=Controller(settings)))
    again = pool(units(6, ready=on), 0.0, offered=offered)
    assert not started(again, controller=Controller(settings))
    if on > ready:
        assert not stopped(again, controller=Controller(settings))


def test_a_model_that_nobody_serves_any_more_is_forgotten_after_a_day() -> None:
    controller = Controller(REACTIVE)
    for minute in range(60):
        controller.decide([pool(units(1, ready=1), 10.0)], minute * 60.0, WALL + minute * 60.0)
    other = Pool("other", units(1, ready=1))
    controller.decide([other], 3600.0 + 40_000.0, WALL + 43_600.0)
    assert controller.ahead("m", 60.0) is not None
    controller.decide([other], 3600.0 + 90_000.0, WALL + 93_600.0)
    assert controller.ahead("m", 60.0) is None
    assert controller.ahead("other", 60.0) is None


def test_what_was_asked_for_a_minute_ago_starts_nothing_from_zero() -> None:
    controller = Controller(REACTIVE)
    asked = replace(pool(units(2, ready=1), 10.0, offered=[10.0] * 20), ttft_s=9.0, ttft_objective_s=1.0)
    for second in range(60):
        decide(asked, now=float(second), controller=controller)
    nobody = replace(asked, units=units(2), tokens_in_use=0.0)
    for second in range(60, 300):
        assert not decide(nobody, now=float(second), controller=controller)
    assert started(replace(nobody, tokens_waiting=5.0, waiting=1), now=300.0, controller=controller) == [
        "u00"
    ]


def test_the_last_one_goes_as_soon_as_nothing_was_held_for_long_enough() -> None:
    controller = Controller(replace(REACTIVE, settle_s=10.0))
    for second in range(30):
        decide(pool(units(1, ready=1), 10.0, offered=[10.0] * 20), now=float(second), controller=controller)
    gone = [
        second
        for second in range(30, 60)
        if stopped(
            pool(units(1, ready=1), 0.0, offered=[10.0] * 20), now=float(second), controller=controller
        )
    ]
    assert gone[0] == 40


def test_what_somebody_else_has_started_is_not_given_back_at_once() -> None:
    controller = Controller(replace(REACTIVE, settle_s=30.0))
    decide(pool(units(2, ready=1), 10.0), now=0.0, controller=controller)
    gone = [
        second
        for second in range(100, 200)
        if stopped(pool(units(2, ready=2), 10.0), now=float(second), controller=controller)
    ]
    assert gone[0] == 130
