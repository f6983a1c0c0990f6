"""From a fleet, a valve and standbys to pools: nothing counted twice, and capacity in the tokens of demand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from policies.base import RequestFacts
from policies.pools import KV_SHARE, REQUEST_TOKENS, MeanTokens, Terms, pools
from policies.scaling import Pool
from policies.standby import Event, Standby, State
from policies.state import Backend, Fleet

WALL = 1_764_000_000.0


class Nobody:
    """A valve in which nobody waits."""

    def waiting_by_model(self) -> Mapping[str, tuple[int, int]]:
        return {}

    def waiting_for_standbys(self) -> list[tuple[frozenset[str], int, float]]:
        return []


class Somebody(Nobody):
    def waiting_by_model(self) -> Mapping[str, tuple[int, int]]:
        return {"m": (3, 900), "other": (1, 50)}

    def waiting_for_standbys(self) -> list[tuple[frozenset[str], int, float]]:
        return [(frozenset({"far"}), 2, 600.0), (frozenset({"elsewhere"}), 1, 50.0)]


def fleet(**changes: Any) -> Fleet:
    return Fleet(
        [
            Backend("near", slots=4, models=frozenset({"m"}), **changes),
            Backend("far", site="far", slots=8, models=frozenset({"m"}), price_input=1.0, price_output=3.0),
            Backend("alone", slots=1, models=frozenset({"without standbys"})),
        ]
    )


def facts(name: str, prompt: int) -> RequestFacts:
    return RequestFacts(name, "m", prompt_tokens=prompt, expected_tokens=100, deadline=1e9)


def pool(of: Fleet, valve: Nobody | None = None, **changes: Any) -> Pool:
    standbys = changes.pop("standbys", {"far": Standby("far", since=WALL - 50.0)})
    terms = changes.pop("terms", {"far": Terms(3.0, 180.0, 300.0, 60.0)})
    (found,) = pools(of, valve or Nobody(), standbys, terms, 100.0, WALL, **changes)
    return found


def test_there_is_a_pool_for_each_model_that_a_standby_serves() -> None:
    found = pool(fleet())
    assert found.model == "m"
    assert [unit.name for unit in found.units] == ["near", "far"]
    near, far = found.units
    assert (near.state, far.state) == (None, State.STANDBY)
    assert (far.cost_per_hour, far.cold_start_s, far.least_on_s, far.least_off_s) == (3.0, 180.0, 300.0, 60.0)
    assert (far.in_state_s, far.available) == (50.0, False)


def test_a_backend_is_full_when_its_slots_are() -> None:
    """Whatever the requests are like: demand and capacity are counted in the same tokens."""
    one = fleet()
    for number in range(4):
        one.lease(facts(f"{number}", 50 + 100 * number), "near", 0.0)
    found = pool(one)
    near, far = found.units
    assert found.demand == near.tokens == 4 * 300
    assert far.tokens == 2 * near.tokens


def test_capacity_is_bounded_by_the_kv_cache() -> None:
    (near, _) = pool(fleet(kv_tokens=1000)).units
    assert near.tokens == KV_SHARE * 1000
    (near, _) = pool(fleet(kv_tokens=10**9)).units
    assert near.tokens == 4 * REQUEST_TOKENS


def test_those_that_wait_are_demand_of_their_model() -> None:
    found = pool(fleet(), Somebody())
    assert (found.waiting, found.tokens_waiting, found.only) == (3, 900.0, [frozenset({"far"})])
    assert found.units[0].tokens == 4 * 300


def test_the_mean_of_a_request_ages_with_time_and_stays_while_nobody_asks() -> None:
    means = MeanTokens()
    assert means.of("m") == REQUEST_TOKENS
    means.note("m", 2, 600.0, 0.0)
    means.note("m", 0, 0.0, 10.0)
    assert means.of("m") == 300.0
    means.note("m", 1, 900.0, 1.0)
    assert 300.0 < means.of("m") < 310.0
    means.note("m", 1, 900.0, 1e5)
    assert means.of("m") == pytest.approx(900.0)


def test_what_is_paid_by_the_hour_has_no_price_by_the_token() -> None:
    assert pool(fleet()).units[1].price_per_token is None
    assert pool(fleet(), terms={"far": Terms()}).units[1].price_per_token == pytest.approx(2e-6)


def test_pace_is_what_littles_law_says() -> None:
    one = fleet()
    one.lease(facts("1", 300), "near", 0.0)
    one["near"].observe_ttft(0.44, 0.0)
    one["near"].observe_tpot(0.01, 0.0)
    near = pool(one).units[0]
    assert (near.tokens_in_use, near.in_flight) == (400.0, 1)
    assert near.tokens_per_s == pytest.approx(400 / (0.44 + 0.01 * 256))


def test_a_ready_standby_that_is_down_serves_nobody() -> None:
    standby = Standby("far")
    for event in (Event.START, Event.PREPARED, Event.STARTED):
        standby.move(event, "", WALL)
    one = fleet()
    assert pool(one, standbys={"far": standby}).units[1].available
    one["far"].probed(False, 1.0)
    one.refresh(1.0)
    assert not pool(one, standbys={"far": standby}).units[1].available


@pytest.mark.parametrize(
    ("figures", "at", "alarm"),
    [
        ({"gpu_temperature": 91.0}, 99.0, "gpu_temperature of 91 at near"),
        ({"gpu_temperature": 89.0}, 99.0, ""),
        ({"gpu_temperature": 91.0}, 80.0, ""),
        ({}, 99.0, ""),
    ],
)
def test_a_hot_gpu_alarms_while_its_figures_are_fresh(
    figures: dict[str, float], at: float, alarm: str
) -> None:
    one = fleet()
    one["near"].host, one["near"].host_at = figures, at
    assert pool(one).alarm == alarm
