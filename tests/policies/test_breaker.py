from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.base import Outcome
from policies.breaker import Breaker

OK, FAILED, IGNORED = Outcome.OK, Outcome.FAILED, Outcome.IGNORED


def fail(breaker: Breaker, times: int, now: float) -> bool:
    """So many attempts of no length; whether one of them moved the breaker."""
    moved = False
    for _ in range(times):
        breaker.dispatched(now)
        moved |= breaker.record(FAILED, now, now)
    return moved


def opened(now: float = 100.0) -> Breaker:
    breaker = Breaker()
    assert fail(breaker, 5, now)
    assert breaker.state(now) == "open"
    return breaker


def test_opens_at_the_fifth_failure_in_a_row() -> None:
    breaker = Breaker()
    assert breaker.state(0.0) == "closed"
    assert not fail(breaker, 4, 100.0)
    assert breaker.allows(100.0)
    assert fail(breaker, 1, 100.0)
    assert not breaker.allows(100.0)
    assert breaker.state(109.9) == "open"
    assert not breaker.allows(109.9)


def test_a_success_begins_the_row_anew() -> None:
    breaker = Breaker()
    fail(breaker, 4, 100.0)
    assert not breaker.record(OK, 99.0, 101.0)
    assert not fail(breaker, 4, 102.0)
    assert breaker.state(102.0) == "closed"


def test_ignored_outcomes_neither_open_nor_begin_anew() -> None:
    breaker = Breaker()
    fail(breaker, 4, 100.0)
    for _ in range(50):
        assert not breaker.record(IGNORED, 100.0, 101.0)
    assert breaker.state(101.0) == "closed"
    assert fail(breaker, 1, 102.0)


def test_its_threshold_can_be_set() -> None:
    breaker = Breaker(threshold=1, base_s=3.0)
    assert fail(breaker, 1, 0.0)
    assert breaker.opened_until == 3.0


class TestHalfOpen:
    def test_one_trial_and_no_other(self) -> None:
        breaker = opened()
        assert breaker.state(110.0) == "half-open"
        assert breaker.allows(110.0)
        assert breaker.dispatched(110.0)
        assert not breaker.allows(110.0)
        assert not breaker.dispatched(111.0)

    def test_a_good_trial_closes(self) -> None:
        breaker = opened()
        breaker.dispatched(110.0)
        assert breaker.record(OK, 110.0, 111.0)
        assert breaker.state(111.0) == "closed"
        assert breaker.allows(111.0)
        assert not fail(breaker, 4, 112.0)

    def test_the_first_token_of_the_trial_closes_before_its_stream_ends(self) -> None:
        breaker = opened()
        breaker.dispatched(110.0)
        assert breaker.first_token(110.0, 110.4)
        assert breaker.allows(110.4)
        assert not fail(breaker, 4, 112.0)
        assert not breaker.record(FAILED, 110.0, 500.0), "it has had its say"
        assert breaker.state(500.0) == "closed"

    def test_other_first_tokens_move_nothing(self) -> None:
        breaker = Breaker()
        fail(breaker, 4, 99.0)
        assert not breaker.first_token(99.0, 100.0)
        assert fail(breaker, 1, 100.0), "a stream that began is no success yet"
        assert not breaker.first_token(99.0, 101.0)
        breaker.dispatched(110.0)
        assert not breaker.first_token(99.0, 111.0)
        assert not breaker.allows(111.0)

    def test_a_failed_trial_opens_for_twice_as_long_up_to_five_minutes(self) -> None:
        breaker, now, waits = opened(0.0), 0.0, []
        for _ in range(7):
            waits.append(breaker.opened_until - now)
            now = breaker.opened_until
            assert breaker.dispatched(now)
            assert breaker.record(FAILED, now, now)
        assert waits == [10, 20, 40, 80, 160, 300, 300]

    def test_weeks_of_failed_trials_do_not_overflow(self) -> None:
        breaker = opened(0.0)
        for _ in range(5000):
            fail(breaker, 1, breaker.opened_until)
        assert breaker.backoff_s == 300.0

    def test_an_ignored_trial_makes_room_for_another(self) -> None:
        breaker = opened()
        breaker.dispatched(110.0)
        assert breaker.record(IGNORED, 110.0, 112.0)
        assert breaker.state(112.0) == "half-open"
        assert breaker.allows(112.0)
        assert breaker.dispatched(112.0)


class TestStragglers:
    """Attempts that began before the breaker moved end whenever they like."""

    @pytest.mark.parametrize("outcome", [OK, FAILED, IGNORED])
    def test_do_not_move_an_open_breaker(self, outcome: Outcome) -> None:
        breaker = opened()
        assert not breaker.record(outcome, 90.0, 105.0)
        assert not breaker.allows(105.0)
        assert breaker.opened_until == 110.0

    @pytest.mark.parametrize("outcome", [OK, FAILED, IGNORED])
    def test_of_the_very_moment_do_not_either(self, outcome: Outcome) -> None:
        breaker = opened()
        assert not breaker.record(outcome, 100.0, 100.0)
        assert breaker.opened_until == 110.0

    @pytest.mark.parametrize("started", [90.0, 100.0])
    @pytest.mark.parametrize("outcome", [OK, FAILED, IGNORED])
    def test_do_not_decide_for_the_trial(self, outcome: Outcome, started: float) -> None:
        breaker = opened()
        breaker.dispatched(110.0)
        assert not breaker.first_token(started, 111.0)
        assert not breaker.record(outcome, started, 111.0)
        assert not breaker.allows(111.0)
        assert breaker.record(OK, 110.0, 112.0)
        assert breaker.allows(112.0)

    def test_do_not_open_it_again_after_it_has_closed(self) -> None:
        breaker = opened()
        breaker.dispatched(110.0)
        breaker.record(OK, 110.0, 111.0)
        for _ in range(20):
            assert not breaker.record(FAILED, 95.0, 130.0)
        assert breaker.allows(130.0)


class TestFlapping:
    def test_opens_longer_when_it_breaks_again_soon(self) -> None:
        breaker, now, waits = opened(0.0), 0.0, []
        for _ in range(4):
            waits.append(breaker.opened_until - now)
            now = breaker.opened_until
            breaker.dispatched(now)
            breaker.record(OK, now, now + 1.0)
            now += 3.0
            fail(breaker, 5, now)
        assert waits == [10, 20, 40, 80]

    def test_is_forgotten_after_as_long_as_it_was_open(self) -> None:
        breaker = opened(0.0)
        breaker.dispatched(10.0)
        breaker.record(OK, 10.0, 11.0)
        sooner = replace(breaker)
        fail(breaker, 5, 21.0)
        assert breaker.opened_until == 31.0
        fail(sooner, 5, 20.9)
        assert sooner.opened_until == 40.9


class TestUpAgain:
    def test_an_open_breaker_tries_at_once(self) -> None:
        breaker = opened()
        breaker.up_again(101.0)
        assert breaker.state(101.0) == "half-open"
        assert breaker.dispatched(101.0)
        assert breaker.record(FAILED, 101.0, 101.5)
        assert breaker.opened_until == 121.5

    def test_a_half_open_one_stays_so(self) -> None:
        breaker = opened()
        breaker.up_again(150.0)
        assert breaker.opened_until == 110.0
        assert breaker.allows(150.0)

    def test_a_trial_of_before_no_longer_decides(self) -> None:
        breaker = opened()
        breaker.dispatched(110.0)
        breaker.up_again(111.0)
        assert breaker.dispatched(111.0)
        assert not breaker.record(FAILED, 110.0, 112.0)
        assert breaker.record(OK, 111.0, 113.0)
        assert breaker.state(113.0) == "closed"

    def test_failures_of_before_no_longer_count(self) -> None:
        breaker = Breaker()
        fail(breaker, 4, 100.0)
        breaker.up_again(101.0)
        for _ in range(20):
            breaker.record(FAILED, 100.5, 102.0)
        assert not fail(breaker, 4, 103.0)
        assert breaker.allows(103.0)

    def test_time_zero_is_a_time_like_any_other(self) -> None:
        breaker = opened(-5.0)
        breaker.up_again(0.0)
        assert breaker.state(0.0) == "half-open"


@given(
    st.lists(
        st.tuples(st.sampled_from(["dispatch", "ok", "failed", "ignored", "token", "up"]), st.floats(0, 30)),
        max_size=120,
    )
)
def test_never_two_trials_and_never_shut_for_good(events: list[tuple[str, float]]) -> None:
    breaker, now = Breaker(threshold=2), 0.0
    running: list[float] = []
    trials: set[float] = set()
    for kind, pause in events:
        now += pause
        allowed = breaker.allows(now)
        assert allowed == (breaker.state(now) == "closed" or (breaker.state(now) != "open" and not trials))
        if kind == "dispatch":
            if allowed:
                now += 0.001
                running.append(now)
                if breaker.dispatched(now):
                    trials = {now}
        elif kind == "up":
            breaker.up_again(now)
            trials.clear()
        elif running:
            started = running[len(running) // 2]
            if kind == "token":
                moved = breaker.first_token(started, now)
            else:
                running.remove(started)
                moved = breaker.record(Outcome(kind), started, now)
            if started in trials:
                assert moved
                trials.clear()
    for started in running:
        breaker.record(IGNORED, started, now)
    assert breaker.allows(now + breaker.max_s)
