from __future__ import annotations

from math import ceil, inf

from hypothesis import given
from hypothesis import strategies as st

from policies.hedging import (
    FRESH_S,
    LEAST_SAMPLES,
    MOST_CLASSES,
    MOST_SAMPLES,
    WINDOW_S,
    FirstTokenTimes,
    Hedging,
    length_class,
)


def times_of(*seconds: float, at: float = 0.0) -> FirstTokenTimes:
    times = FirstTokenTimes()
    for value in seconds:
        times.add(value, at)
    return times


def test_nothing_is_late_before_enough_is_known() -> None:
    times = times_of(*[1.0] * (LEAST_SAMPLES - 1))
    assert times.late_after(0.0) == inf
    times.add(1.0, 1.0)
    assert times.late_after(FRESH_S) == 1.0


@given(st.lists(st.floats(0.001, 100.0), min_size=LEAST_SAMPLES, max_size=MOST_SAMPLES))
def test_late_is_what_one_in_twenty_is(seconds: list[float]) -> None:
    late = times_of(*seconds).late_after(0.0)
    assert late in seconds
    assert sum(value > late for value in seconds) <= 0.05 * len(seconds)
    assert sum(value >= late for value in seconds) > 0.05 * len(seconds) - 1


def test_old_times_are_forgotten() -> None:
    times = times_of(*[9.0] * 50)
    for _ in range(30):
        times.add(1.0, WINDOW_S / 2)
    assert times.late_after(WINDOW_S / 2) == 9.0
    assert times.late_after(WINDOW_S + 1.0) == 1.0
    assert times.late_after(2 * WINDOW_S) == inf


@given(st.lists(st.floats(0.1, 1.0), min_size=100, max_size=MOST_SAMPLES), st.floats(0.0, 3.0))
def test_hedging_does_not_make_more_requests_late(seconds: list[float], more: float) -> None:
    """What is known of an attempt that was given up is that it took longer than the quantile: to count it so
    leaves the quantile where it was."""
    whole, given_up = times_of(*seconds), times_of(*seconds)
    late = whole.late_after(0.0)
    cut = [late if value > late else value for value in seconds]
    assert times_of(*cut).late_after(0.0) == late
    given_up.add(late + more, 0.0)
    assert given_up.late_after(FRESH_S) >= sorted(seconds)[ceil(0.95 * len(seconds)) - 1]


def test_models_and_lengths_of_prompts_are_told_apart() -> None:
    hedging = Hedging()
    for _ in range(LEAST_SAMPLES):
        hedging.observe("m", 100, 0.1, 0.0)
        hedging.observe("m", 100_000, 8.0, 0.0)
        hedging.observe("large", 100, 2.0, 0.0)
    assert hedging.late_after("m", 200, 0.0) == 0.1
    assert hedging.late_after("m", 90_000, 0.0) == 8.0
    assert hedging.late_after("large", 0, 0.0) == 2.0
    assert hedging.late_after("m", 5_000, 0.0) == hedging.late_after("other", 100, 0.0) == inf


@given(st.integers(256, 10**7), st.integers(256, 10**7))
def test_prompts_of_a_class_differ_by_less_than_a_factor_of_two(first: int, second: int) -> None:
    if length_class(first) == length_class(second):
        assert max(first, second) < 2 * min(first, second) + 256
    assert (length_class(first) > length_class(second)) <= (first > second)


def test_a_given_time_needs_no_samples_and_keeps_none() -> None:
    hedging = Hedging(after_s=0.7)
    hedging.observe("m", 1, 0.1, 0.0)
    assert hedging.late_after("m", 1, 0.0) == 0.7
    assert not hedging._classes


def test_classes_are_bounded() -> None:
    hedging = Hedging()
    for number in range(2 * MOST_CLASSES):
        hedging.observe(f"m{number}", 1, 0.1, 0.0)
    assert len(hedging._classes) == MOST_CLASSES


@given(st.lists(st.tuples(st.floats(0.0, 5.0), st.integers(0, 30)), max_size=60))
def test_second_attempts_are_a_share_of_the_requests(steps: list[tuple[float, int]]) -> None:
    hedging = Hedging(after_s=0.1, ratio=0.05)
    now, requests, hedges = 0.0, 0, 0
    for pause, arrivals in steps:
        now += pause
        for _ in range(arrivals):
            hedging.sent(now)
            requests += 1
            if hedging.affords(now):
                hedging.spend(now)
                hedges += 1
    assert hedges <= 0.05 * requests
    assert hedges + hedging.refused == requests
