"""The load that is offered: Little's law over what comes, whether or not it is served."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.base import Outcome, RequestFacts
from policies.offered import BIN_S, KEPT, LEAST, LONGEST, SAMPLES, Offered
from policies.pools import pools
from policies.rules import Queue, Rule, RuleSet
from policies.simple import LeastLoad
from policies.standby import Standby
from policies.state import Backend, Fleet
from policies.valve import Valve
from tests.policies.test_pools import WALL, Nobody


def steadily(offered: Offered, seconds: int, per_second: float, begin: float = 0.0) -> float:
    """So many tokens come in each second; when that ends."""
    for second in range(seconds):
        offered.arrived(per_second, begin + second)
    return begin + seconds


@given(st.floats(1.0, 1e5), st.floats(0.1, 1e3), st.integers(0, 10**6))
def test_it_is_what_littles_law_says(per_second: float, stay_s: float, begin: int) -> None:
    offered = Offered()
    now = steadily(offered, 300, per_second, begin * BIN_S)
    offered.served(per_second, stay_s, now)
    found = offered.samples(now)
    assert found == pytest.approx([per_second * stay_s] * len(found))
    assert len(found) == SAMPLES + 1 - min(max(round(stay_s / BIN_S), 1), LONGEST)


def test_nothing_is_known_before_something_has_ended_and_a_minute_has_passed() -> None:
    offered = Offered()
    assert offered.samples(0.0) == ()
    now = steadily(offered, 90, 10.0)
    assert offered.samples(now) == ()
    early = Offered()
    early.served(10, 5.0, 0.0)
    assert early.samples(steadily(early, int(LEAST * BIN_S) - 1, 10.0)) == ()
    assert early.samples(steadily(early, 2, 10.0, LEAST * BIN_S - 1)) == pytest.approx([50.0] * LEAST)


def test_a_burst_is_told_as_it_was_when_tokens_stay_for_a_moment() -> None:
    offered = Offered()
    offered.served(1, 3.0, 0.0)
    steadily(offered, 60, 10.0)
    steadily(offered, 15, 100.0, 60.0)
    now = steadily(offered, 60, 10.0, 75.0)
    assert offered.samples(now) == pytest.approx([30.0] * 4 + [300.0] + [30.0] * 4)


def test_a_burst_is_told_as_it_lasts_when_tokens_stay_for_long() -> None:
    """A thousand tokens that come at once and stay for a minute are a thousand in use for a minute."""
    offered = Offered()
    offered.served(1, 60.0, 0.0)
    offered.arrived(0.0, 0.0)
    offered.arrived(1000.0, 61.0)
    found = offered.samples(181.0)
    assert found == pytest.approx([0.0] + [1000.0] * 4 + [0.0] * 4)


def test_what_is_long_past_is_forgotten() -> None:
    offered = Offered()
    offered.served(1, 20.0, 0.0)
    now = steadily(offered, 300, 10.0)
    for later in (KEPT * BIN_S, 1e6):
        assert set(offered.samples(now + later)) == {0.0}


def test_how_long_tokens_stay_is_a_mean_that_ages() -> None:
    offered = Offered()
    offered.served(900, 10.0, 0.0)
    offered.served(100, 20.0, 0.0)
    assert offered.stay_s == pytest.approx(11.0)
    offered.served(1000, 30.0, 6000.0)
    assert offered.stay_s == pytest.approx(30.0, abs=0.01)


@given(st.lists(st.tuples(st.floats(0.0, 1e6), st.floats(0.0, 1e4), st.floats(0.0, 1e3)), max_size=50))
def test_it_is_never_negative_whatever_comes(events: list[tuple[float, float, float]]) -> None:
    offered = Offered()
    for now, tokens, seconds in events:
        offered.arrived(tokens, now)
        offered.served(tokens, seconds, now)
        assert min(offered.samples(now), default=0.0) >= 0.0


def test_requests_that_find_no_room_are_offered_all_the_same_and_those_of_strangers_are_not() -> None:
    fleet = Fleet(
        [
            Backend("near", slots=1, models=frozenset({"m"})),
            Backend("far", site="far", slots=1, models=frozenset({"m"})),
        ]
    )
    fleet.put("far", 0.0, asleep=True)
    fleet.refresh(0.0)
    rule = Rule("all", LeastLoad(Random(1)), "least-load", queue=Queue(depth=0))
    valve = Valve(RuleSet([rule]), fleet)
    standbys = {"far": Standby("far")}

    def offered(now: float) -> tuple[Sequence[float], float]:
        (pool,) = pools(fleet, Nobody(), standbys, {}, now, WALL)
        return pool.offered, pool.tokens_in_use

    offered(0.0)
    refused = 0
    for second in range(240):
        now = float(second)
        for number in range(3):
            routing = valve.submit(RequestFacts(f"{second}-{number}", "m", prompt_tokens=100), now)
            if routing.lease is None:
                refused += 1
            else:
                lease = routing.lease
        valve.submit(RequestFacts(f"x{second}", f"invented-{second}"), now)
        fleet.release(lease, Outcome.OK, now + 0.9)
    assert refused == 2 * 240
    found, in_use = offered(240.0)
    assert found == pytest.approx([3 * 100 * 0.9] * 16)
    assert in_use == 0.0
    assert set(fleet.offered) == {"m"}
