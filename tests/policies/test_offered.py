"""The load that is offered: Little's law over what comes, whether or not it is served."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.base import Outcome, RequestFacts
from policies.offered import BIN_S, LONG, SHORT, Offered
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
    now = steadily(offered, 300, per_second, float(begin) * BIN_S)
    offered.served(per_second, stay_s, now)
    assert offered.tokens(now) == pytest.approx(per_second * stay_s)


def test_nothing_is_known_before_something_has_ended_and_some_time_has_passed() -> None:
    offered = Offered()
    assert offered.tokens(0.0) == 0.0
    now = steadily(offered, 60, 10.0)
    assert offered.tokens(now) == 0.0
    early = Offered()
    early.served(10, 5.0, 0.0)
    assert early.tokens(steadily(early, int(SHORT * BIN_S) - 1, 10.0)) == 0.0
    assert early.tokens(steadily(early, 2, 10.0, SHORT * BIN_S - 1)) > 0.0


def test_a_rush_is_seen_in_half_a_minute_and_chance_is_none() -> None:
    random = Random(1)
    offered = Offered()
    offered.served(1, 20.0, 0.0)
    seen = []
    for second in range(3600):
        offered.arrived(sum(random.random() < 0.1 for _ in range(100)), float(second))
        if second % 10 == 9 and second > 200:
            seen.append(offered.tokens(second + 1.0) / 200.0)
    assert sum(seen) / len(seen) == pytest.approx(1.0, abs=0.05)
    assert max(seen) < 1.35
    now = steadily(offered, 30, 20.0, 3600.0)
    assert offered.tokens(now) == pytest.approx(400.0, rel=0.1)


def test_what_came_long_ago_does_not_count() -> None:
    offered = Offered()
    offered.served(1, 20.0, 0.0)
    now = steadily(offered, 300, 10.0)
    assert offered.tokens(now + LONG * BIN_S + BIN_S) == 0.0
    assert offered.tokens(now + 1e6) == 0.0


def test_how_long_tokens_stay_is_weighed_by_tokens_and_by_age() -> None:
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
        assert offered.tokens(now) >= 0.0


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

    def offered(now: float) -> tuple[float, float]:
        (pool,) = pools(fleet, Nobody(), standbys, {}, now, WALL)
        return pool.tokens_offered, pool.tokens_in_use

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
    assert found == pytest.approx(3 * 100 * 0.9)
    assert in_use == 0.0
    assert set(fleet.offered) == {"m"}
