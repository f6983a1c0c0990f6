"""Slow start, on a clock of the tests' own."""

from __future__ import annotations

from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.base import Outcome
from policies.health import STEPS, Health, slots_in_slow_start
from policies.state import Fleet
from policies.valve import Valve
from tests.policies.builders import backend, decided, fleet, one_tier, request

OK, FAILED = Outcome.OK, Outcome.FAILED


def fail(homes: Fleet, name: str, now: float, times: int = 5, *, silent: bool = False) -> None:
    """So many attempts that fail."""
    for number in range(times):
        lease = homes.lease(request(f"{name}{number}"), name, now)
        lease.silent = silent
        homes.release(lease, FAILED, now)


@pytest.mark.parametrize(
    "settings",
    [{"slow_start_s": -1.0}, {"slow_start_s": float("inf")}, {"panic": 1.1}, {"most_ejected": -0.1}],
)
def test_what_cannot_be_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        Health(**settings)


class TestSlowStart:
    @given(st.integers(1, 10_000), st.floats(0, 100), st.floats(0.01, 100))
    def test_slots_grow_in_equal_steps_from_one_to_all(self, slots: int, age: float, time: float) -> None:
        found = slots_in_slow_start(slots, age, time)
        assert 1 <= found <= slots
        assert found <= slots_in_slow_start(slots, age + time / 3, time)
        assert slots_in_slow_start(slots, 0.0, time) == ceil(slots / STEPS)
        assert slots_in_slow_start(slots, time, time) == slots

    def test_a_backend_that_was_down_gets_its_share_in_steps(self) -> None:
        homes = fleet(backend("a", slots=20), backend("b", slots=20), health=Health(slow_start_s=10.0))
        homes["a"].probed(False, 100.0)
        homes.refresh(100.0)
        homes["a"].probed(True, 110.0)
        seen = []
        for second in range(11):
            homes.refresh(110.0 + second)
            seen.append(homes["a"].slots)
        assert seen == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 20]
        assert homes["b"].slots == 20

    def test_each_step_is_news_and_nothing_else_is(self) -> None:
        homes = fleet(backend("a", slots=20), backend("b", slots=20), health=Health(slow_start_s=10.0))
        homes["a"].probed(False, 100.0)
        homes.refresh(100.0)
        homes["a"].probed(True, 110.0)
        moves = [now / 4 for now in range(440, 500) if homes.refresh(now / 4)]
        # The last one: it is not starting any more.
        assert moves == [110.0, 111.0, 112.0, 113.0, 114.0, 115.0, 116.0, 117.0, 118.0, 119.0, 120.0]

    def test_a_breaker_that_closes_begins_one_and_the_trial_does_not(self) -> None:
        homes = fleet(backend("a", slots=20), backend("b", slots=20), health=Health())
        fail(homes, "a", 100.0)
        assert not homes["a"].available
        homes.refresh(110.0)
        assert homes["a"].available
        lease = homes.lease(request(), "a", 110.0)
        assert homes["a"].slots == 20
        homes.first_token(lease, 111.0)
        assert (homes["a"].available, homes["a"].slots) == (True, 2)

    def test_a_backend_that_a_reload_adds_starts_slowly_and_those_of_the_start_do_not(self) -> None:
        homes = fleet(backend("a", slots=20), health=Health())
        homes.refresh(0.0)
        assert homes["a"].slots == 20
        homes.replace([homes["a"], backend("b", slots=20)])
        homes.refresh(50.0)
        assert (homes["a"].slots, homes["b"].slots) == (20, 2)
        homes.refresh(60.0)
        assert homes["b"].slots == 20

    @pytest.mark.parametrize("other", ["down", "other model", "starting too"])
    def test_there_is_none_where_nobody_could_take_the_rest(self, other: str) -> None:
        second = backend("b", slots=20, models=frozenset({"n" if other == "other model" else "m"}))
        homes = fleet(backend("a", slots=20), second, health=Health())
        for name in ("a", "b"):
            homes[name].probed(False, 100.0)
        homes.refresh(100.0)
        homes["a"].probed(True, 110.0)
        if other != "down":
            homes["b"].probed(True, 110.0)
        homes.refresh(110.0)
        assert homes["a"].slots == 20

    def test_zero_is_none(self) -> None:
        homes = fleet(backend("a", slots=20), backend("b"), health=Health(slow_start_s=0.0))
        homes["a"].probed(False, 100.0)
        homes.refresh(100.0)
        homes["a"].probed(True, 110.0)
        homes.refresh(110.0)
        assert homes["a"].slots == 20

    def test_what_is_over_its_slots_goes_elsewhere(self) -> None:
        homes = fleet(backend("a", slots=20), backend("b", slots=2), health=Health())
        homes["a"].probed(False, 100.0)
        homes.refresh(100.0)
        homes["a"].probed(True, 110.0)
        valve = Valve(one_tier(), homes)
        went = [decided(valve.submit(request(f"r{number}"), 110.0)) for number in range(5)]
        assert went == ["a", "b", "a", "b", "hold"]
        assert [decided(routing) for routing in valve.poll(111.0)] == ["a"]
