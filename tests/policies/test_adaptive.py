"""The gradient on times to the first token, fed by hand; under load: `tests/sim/test_adaptive.py`."""

from __future__ import annotations

from heapq import heappop, heappush
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.adaptive import JITTER, LULL, MEASURE_S, MEASURING_S, WINDOW, AdaptiveSlots
from policies.base import Outcome, Reject, Send
from policies.routing import Routing
from policies.valve import Valve
from tests.policies.builders import backend, decided, fleet, local_first, one_tier, release, request

FULL = 64
FEW = 8


class Fed:
    """One that gets first tokens, a tenth of a second apart."""

    def __init__(self, full_slots: int = FULL) -> None:
        self.adaptive = AdaptiveSlots.of("a")
        self.full = full_slots
        self.now = 100.0

    def feed(self, ttft_s: float, in_flight: int, times: int = WINDOW, age_s: float = 0.0) -> int:
        """-> its slots afterwards, those given out."""
        for _ in range(times):
            self.now += 0.1
            self.adaptive.first_token(ttft_s, in_flight, self.now - age_s, self.full, self.now)
        return self.slots

    @property
    def slots(self) -> int:
        return self.adaptive.measuring_slots(self.full, self.now) or self.adaptive.slots(self.full)


def measured(ttft_s: float = 0.1, full_slots: int = FULL) -> Fed:
    fed = Fed(full_slots)
    fed.feed(ttft_s, 1, 1 + LULL)
    return fed


def test_it_begins_with_all_and_measures_with_its_first_stream() -> None:
    fed = Fed()
    assert fed.slots == FULL
    assert fed.feed(9.0, 60, 1) == FEW
    assert fed.feed(9.0, 60, age_s=5.0) == FEW, "sent before, under load"
    assert fed.feed(0.1, 1, LULL - 1) == FEW
    assert fed.feed(0.1, 1, 1) == FULL
    assert fed.adaptive.minimum_s == 0.1


def test_measuring_ends_without_a_result_and_comes_again() -> None:
    fed = measured(0.1)
    fed.feed(0.4, 60)
    slots = fed.slots
    fed.now += MEASURE_S * (1 + JITTER)
    assert fed.feed(0.3, 60, 1) == FEW
    fed.now += MEASURING_S
    assert fed.slots == slots
    assert fed.adaptive.minimum_s == 0.1
    assert fed.feed(0.1, 60) > slots, "the limit moves on"
    fed.now += MEASURE_S * (1 + JITTER)
    assert fed.feed(0.3, 60, 1) == FEW


def test_without_a_minimum_the_limit_stays() -> None:
    fed = Fed()
    fed.feed(9.0, 60, 1)
    fed.now += MEASURING_S
    assert fed.feed(9.0, 60, 5 * WINDOW) == FULL


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
    fed.now += 200.0
    fed.feed(0.2, 2, LULL)
    assert fed.adaptive.minimum_s == 0.2
    assert fed.slots == FULL
    assert fed.adaptive.measure_at > first


def test_backends_are_not_measured_in_step() -> None:
    times = set()
    for name in "abcdefgh":
        adaptive = AdaptiveSlots.of(name)
        for _ in range(1 + LULL):
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
        assert adaptive.measuring_slots(full, now) in (0, max(1, full // 8))


@pytest.mark.parametrize("adaptive", [None, AdaptiveSlots.of("a")])
def test_the_fleet_goes_by_it_where_it_is_on(adaptive: AdaptiveSlots | None) -> None:
    homes = fleet(backend("a", slots=FULL, adaptive=adaptive))
    seen = []
    for number in range(1 + LULL):
        lease = homes.lease(request(f"{number}"), "a", 1.0 + number)
        homes.first_token(lease, 1.5 + number)
        seen.append(homes["a"].measuring_slots)
        homes.release(lease, Outcome.OK, 1.5 + number)
    assert homes["a"].slots == FULL
    assert seen == ([0] * (1 + LULL) if adaptive is None else [FEW] * LULL + [0])
    assert homes.version == (0 if adaptive is None else 2)


def test_a_backend_without_streams_keeps_all_its_slots() -> None:
    homes = fleet(backend("a", slots=FULL, adaptive=AdaptiveSlots.of("a")))
    valve = Valve(one_tier(), homes)
    for _ in range(3):
        running = [valve.submit(request(f"{number}"), 0.0) for number in range(FULL)]
        assert {decided(routing) for routing in running} == {"a"}
        for routing in running:
            release(homes, routing, 1.0)


def test_more_slots_by_the_configuration_are_more_room() -> None:
    fed = measured(full_slots=8)
    assert fed.slots == 8
    assert fed.adaptive.limit < inf
    fed.full = 64
    fed.feed(0.1, 8, 20 * WINDOW)
    assert 8 < fed.slots <= 64


# In the valve


def while_measured(valve: Valve, in_flight: int) -> None:
    """Of backend `local`, with so many in flight."""
    for number in range(in_flight):
        routing = valve.submit(request(f"before {number}"), 0.0)
        assert decided(routing) == "local"
    assert routing.lease is not None
    valve.fleet.first_token(routing.lease, 0.2)
    assert valve.fleet["local"].measuring_slots == FEW


def test_while_it_is_measured_few_are_sent_and_its_end_lets_them_all_go() -> None:
    homes = fleet(backend("local", slots=FULL, adaptive=AdaptiveSlots.of("a")))
    valve = Valve(one_tier(wait_s=60.0), homes)
    while_measured(valve, FEW - 2)
    names = [decided(valve.submit(request(f"{number}", arrived=1.0), 1.0)) for number in range(20)]
    assert names == ["local"] * 2 + ["hold"] * 18
    assert valve.poll(1.0) == []
    assert valve.next_wake() == 0.2 + MEASURING_S
    answers = valve.poll(0.2 + MEASURING_S)
    answers += valve.poll(0.2 + MEASURING_S)
    answers += valve.poll(0.2 + MEASURING_S)
    assert [decided(answer) for answer in answers] == ["local"] * 18


def test_nothing_goes_beyond_while_it_is_measured_but_what_has_waited_long_enough() -> None:
    homes = fleet(
        backend("local", slots=FULL, adaptive=AdaptiveSlots.of("a")), backend("away", slots=1, site="away")
    )
    valve = Valve(local_first(enter=3.0, leave=0.9, wait_s=5.0), homes)
    while_measured(valve, FULL)
    assert decided(valve.submit(request("a", arrived=1.0), 1.0)) == "away", "for all that `enter` says"
    assert decided(valve.submit(request("b", arrived=1.0, tenant="light"), 1.0)) == "hold", "owed or not"
    assert [decided(routing) for routing in valve.poll(6.0)] == ["local"]


def test_what_a_backend_that_is_measured_does_not_take_does_not_go_to_one_that_is_full() -> None:
    homes = fleet(
        backend("local", slots=FULL, adaptive=AdaptiveSlots.of("a")),
        backend("small", site="local", slots=1, in_flight=1),
        backend("away", slots=1, site="away"),
    )
    valve = Valve(local_first(), homes)
    while_measured(valve, FEW)
    assert [decided(valve.submit(request(name), 1.0)) for name in "ab"] == ["away", "hold"]


def test_long_answers_are_all_served_and_measuring_takes_little_of_the_time() -> None:
    """48 running on 64 slots, each for a minute: never are few in flight."""
    homes = fleet(backend("a", slots=FULL, adaptive=AdaptiveSlots.of("a")))
    valve = Valve(one_tier(), homes)
    events: list[tuple[float, int, str, Routing | None]] = []
    order = served = 0
    measuring_s, before = 0.0, 0.0

    def happens(at: float, what: str, routing: Routing | None = None) -> None:
        nonlocal order
        order += 1
        heappush(events, (at, order, what, routing))

    def begun(routing: Routing, now: float) -> None:
        nonlocal served
        assert not isinstance(routing.decision, Reject)
        if isinstance(routing.decision, Send):
            served += 1
            happens(now + 0.2, "first token", routing)
            happens(now + 60.0, "end", routing)

    count = 2000
    for number in range(count):
        happens(number * 1.25, "arrival")
    while events:
        now, number, what, routing = heappop(events)
        if homes["a"].measuring_slots:
            measuring_s += now - before
        before = now
        if what == "arrival":
            begun(valve.submit(request(f"{number}", arrived=now), now), now)
        elif what == "first token":
            assert routing is not None
            assert routing.lease is not None
            homes.first_token(routing.lease, now)
        elif what == "end":
            assert routing is not None
            release(homes, routing, now)
        for answer in valve.poll(now):
            begun(answer, now)
        if valve.next_wake() < inf:
            happens(max(valve.next_wake(), now), "wake")
    assert served == count
    assert measuring_s < 0.05 * count * 1.25
