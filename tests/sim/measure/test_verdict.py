"""Knee and capacity."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.measure.level import Level
from sim.measure.verdict import Capacity, Sla, capacity, knee
from tests.sim.measure.fake_server import record


def level(users: int, rate: float = 1.0, ttft: float = 0.1, failed: bool = False) -> Level:
    """`rate`: output tokens/s of all; TPOT is a tenth of TTFT."""
    requests = [record(0.0, ttft, ttft + 0.1 * ttft * 99, 100)]
    if failed:
        requests.append(record(error="timeout"))
    return Level.of(users, requests, duration_s=100 / rate)


def test_the_knee_is_where_throughput_stops_growing() -> None:
    rates = {1: 10.0, 2: 19.0, 4: 36.0, 8: 57.5, 16: 60.0, 32: 59.0}
    assert knee([level(users, rate) for users, rate in rates.items()]) == 8


def test_throughput_that_falls_again_moves_no_knee() -> None:
    assert knee([level(1, 10.0), level(2, 20.0), level(4, 12.0)]) == 2


@pytest.mark.parametrize("rates", [{}, {1: 5.0}, {1: 10.0, 2: 18.0, 4: 30.0}])
def test_no_knee_while_throughput_grows(rates: dict[int, float]) -> None:
    assert knee([level(users, rate) for users, rate in rates.items()]) is None


@pytest.mark.parametrize(
    ("sla", "met"),
    [
        (Sla(ttft_s=0.2), True),
        (Sla(ttft_s=0.19), False),
        (Sla(tpot_s=0.0201), True),
        (Sla(tpot_s=0.0199), False),
        (Sla(tokens_per_s=15.0), True),
        (Sla(tokens_per_s=15.1), False),
        (Sla(ttft_s=1.0, tpot_s=1.0, tokens_per_s=15.1), False),
    ],
)
def test_each_promise_counts(sla: Sla, met: bool) -> None:
    assert sla.met_by(level(4, rate=60.0, ttft=0.2)) is met
    assert not sla.met_by(level(4, rate=60.0, ttft=0.2, failed=True))


def test_an_answer_of_one_token_keeps_no_promise_of_tpot() -> None:
    assert not Sla(tpot_s=1.0).met_by(Level.of(1, [record(tokens=1)], 1.0))


def test_a_promise_of_nothing_is_none() -> None:
    with pytest.raises(ValueError, match="promises something"):
        Sla()


def test_capacity_ends_below_the_first_level_that_is_too_much() -> None:
    sla = Sla(tokens_per_s=15.0)
    rates = {1: 50.0, 4: 100.0, 8: 110.0, 16: 300.0}  # 8 get 13.75 each, 16 would get more
    assert capacity([level(users, rate) for users, rate in rates.items()], sla) == Capacity(4, 8)
    assert capacity([level(1, 50.0)], sla) == Capacity(1, None)
    assert capacity([level(1, 14.0)], sla) == Capacity(0, 1)


@pytest.mark.parametrize(
    ("found", "following"),
    [
        (Capacity(4, 8), 6),
        (Capacity(4, 5), None),
        (Capacity(100, 105), None),
        (Capacity(100, 107), 103),
        (Capacity(8, None), None),
        (Capacity(0, 1), None),
        (Capacity(0, 8), 4),
    ],
)
def test_a_search_halves_what_is_left(found: Capacity, following: int | None) -> None:
    assert found.next_to_try == following


@given(st.integers(0, 1000), st.lists(st.integers(1, 1000), min_size=1))
def test_a_search_finds_the_limit(limit: int, first: list[int]) -> None:
    measured = {users: level(users, rate=15.0 * users if users <= limit else 14.0 * users) for users in first}
    sla = Sla(tokens_per_s=14.9)
    while (following := capacity(list(measured.values()), sla).next_to_try) is not None:
        assert following not in measured
        measured[following] = level(
            following, rate=15.0 * following if following <= limit else 14.0 * following
        )
    found = capacity(list(measured.values()), sla)
    assert found.users <= limit
    if found.first_above is None:
        assert found.users == max(first)
    else:
        assert limit < found.first_above
        assert found.first_above - found.users <= max(1, 0.05 * found.users)
