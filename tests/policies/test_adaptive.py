"""The gradient on times to the first token, fed by hand; under load: `tests/sim/test_adaptive.py`."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.adaptive import JITTER, LULL, MEASURE_S, WINDOW, AdaptiveSlots
from policies.base import Outcome
from tests.policies.builders import backend, fleet, request

FULL = 64
FEW = 8


class Fed:
    """One that gets first tokens, a tenth of a second apart."""

    def __init__(self, full_slots: int = FULL) -> None:
        self.adaptive = AdaptiveSlots.of("a")
        self.full = full_slots
        self.now = 100.0

    def feed(self, ttft_s: float, in_flight: int, times: int = WINDOW, age_s: float = 0.0) -> int:
        """-> its slots afterwards."""
        for _ in range(times):
            self.now += 0.1
            self.adaptive.first_token(ttft_s, in_flight, self.now - age_s, self.full, self.now)
        return self.slots

    @property
    def slots(self) -> int:
        return self.adaptive.slots(self.full)


def measured(ttft_s: float = 0.1, full_slots: int = FULL) -> Fed:
    fed = Fed(full_slots)
    fed.feed(ttft_s, 1, LULL)
    return fed


def test_it_begins_with_few_and_measures() -> None:
    fed = Fed()
    assert fed.slots == FEW
    assert fed.feed(0.1, 1, LULL - 1) == FEW
    assert fed.feed(0.1, 1, 1) == FULL
    assert fed.adaptive.minimum_s == 0.1


def test_it_shrinks_where_the_first_token_comes_late_and_grows_back_by_itself() -> None:
    fed = measured()
    assert fed.feed(1.0, 60) == FULL // 2 + FEW  # half, and the root of 64
    assert fed.feed(1.0, 40) < FULL // 2
    grown = [fed.feed(0.1, fed.slots) for _ in range(20)]
    assert grown == sorted(grown)
    assert grown[-1] == FULL


def test_twice_the_minimum_is_no_queueing() -> None:
    fed = measured()
    assert fed.feed(0.2, 60) == FULL
    assert fed.feed(0.4, 60) < FULL


def test_it_rests_where_gradient_and_growth_are_even() -> None:
    fed = measured()
    for _ in range(200):
        # Up to 20 at once without queueing; those beyond wait for their turn.
        fed.feed(0.1 * max(1.0, fed.slots / 20) ** 4, fed.slots)
    seen = [fed.feed(0.1 * max(1.0, fed.slots / 20) ** 4, fed.slots) for _ in range(20)]
    assert 18 <= min(seen) <= max(seen) <= 30


def test_a_limit_that_is_not_used_does_not_grow() -> None:
    fed = measured()
    fed.feed(1.0, 60)
    fed.feed(1.0, 60)
    slots = fed.slots
    assert fed.feed(0.1, slots // 2 - 2, 3 * WINDOW) == slots
    assert fed.feed(0.1, slots, WINDOW) > slots


def test_what_was_sent_under_the_old_limit_does_not_count() -> None:
    fed = measured()
    slots = fed.feed(1.0, 60)
    assert fed.feed(1.0, 60, 5 * WINDOW, age_s=60.0) == slots


def test_the_minimum_is_taken_again_with_few_in_flight_and_the_limit_comes_back() -> None:
    fed = measured()
    fed.feed(0.4, 60)
    slots = fed.slots
    fed.now += MEASURE_S * (1 + JITTER)
    assert fed.feed(0.3, 60) == FEW
    assert fed.feed(9.0, 60, 3 * WINDOW, age_s=50.0) == FEW, "those still come from before"
    assert fed.feed(0.3, 1, LULL) == slots
    assert fed.adaptive.minimum_s == 0.3


def test_a_lull_measures_in_passing() -> None:
    fed = measured()
    first = fed.adaptive.measure_at
    fed.now += 100.0
    fed.feed(0.2, 2, LULL)
    assert fed.adaptive.minimum_s == 0.2
    assert not fed.adaptive.measuring
    assert fed.adaptive.measure_at > first


def test_backends_are_not_measured_in_step() -> None:
    times = set()
    for name in "abcdefgh":
        adaptive = AdaptiveSlots.of(name)
        for _ in range(LULL):
            adaptive.first_token(0.1, 1, 0.0, FULL, 0.0)
        assert abs(adaptive.measure_at - MEASURE_S) <= JITTER * MEASURE_S
        times.add(adaptive.measure_at)
    assert len(times) == 8


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 500), st.floats(0, 500)), max_size=200),
    st.integers(1, 300),
)
def test_it_stays_in_its_bounds_whatever_comes(first: list[tuple[float, int, float]], full: int) -> None:
    adaptive, now = AdaptiveSlots.of("a"), 0.0
    for ttft_s, in_flight, pause in first:
        now += pause
        adaptive.first_token(ttft_s, in_flight, now - ttft_s, full, now)
        assert max(1, full // 8) <= adaptive.slots(full) <= full
        assert adaptive.slots(1) == 1


@pytest.mark.parametrize("adaptive", [None, AdaptiveSlots.of("a")])
def test_the_fleet_goes_by_it_where_it_is_on(adaptive: AdaptiveSlots | None) -> None:
    homes = fleet(backend("a", slots=FULL, adaptive=adaptive))
    homes.refresh(0.0)
    assert homes["a"].slots == (FULL if adaptive is None else FEW)
    version = homes.version
    for number in range(LULL):
        lease = homes.lease(request(f"{number}"), "a", 1.0)
        homes.first_token(lease, 1.5)
        homes.release(lease, Outcome.OK, 2.0)
    assert homes["a"].slots == FULL
    assert (homes.version > version) == (adaptive is not None)


def test_more_slots_by_the_configuration_are_more_room() -> None:
    fed = measured(full_slots=8)
    assert fed.slots == 8
    assert fed.adaptive.limit < inf
    fed.full = 64
    fed.feed(0.1, 8, 20 * WINDOW)
    assert 8 < fed.slots <= 64
