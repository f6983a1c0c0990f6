"""Shares against the closed forms, solved here in another way, and learnt from backends of known speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import exp
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies import load
from policies.base import BackendView, Decision, RequestFacts, Send
from policies.game import (
    FORGET_S,
    SOLVED_FOR_S,
    TRY,
    Nash,
    Rate,
    Wardrop,
    Wobble,
    alike,
    bargaining,
    water_filling,
)
from tests.policies.driver import Driver, request, views
from tests.policies.street import Made, Street

KINDS = ("nash", "wardrop", "selfish")


def policy(kind: str) -> Any:
    return load("wardrop", Random(0), selfish=True) if kind == "selfish" else load(kind, Random(0))


def marginal(kind: str, mu: float, rtt: float, x: float) -> float:
    """What is one level on all that are used; for `nash`, of the product's logarithm."""
    if kind == "nash":
        return 1.0 / (mu - x)
    return rtt + (1.0 / (mu - x) if kind == "selfish" else mu / (mu - x) ** 2)


def closed_form(kind: str, mu: Sequence[float], rtt: Sequence[float], phi: float) -> list[float]:
    return bargaining(mu, phi) if kind == "nash" else water_filling(mu, rtt, phi, kind == "selfish")


def by_exchange(kind: str, mu: Sequence[float], rtt: Sequence[float], phi: float) -> list[float]:
    """The same by no formula: move a little from where it costs most to where it costs least, while that helps."""
    x = [phi * one / sum(mu) for one in mu]
    step = phi / 8
    everyone = range(len(mu))
    while step > 1e-7 * phi:
        can_take = [i for i in everyone if x[i] + step < mu[i]]
        can_give = [i for i in everyone if x[i] >= step]
        if can_take and can_give:
            to = min(can_take, key=lambda i: marginal(kind, mu[i], rtt[i], x[i] + step))
            giver = max(can_give, key=lambda i: marginal(kind, mu[i], rtt[i], x[i] - step))
            gain = marginal(kind, mu[giver], rtt[giver], x[giver] - step)
            if to != giver and gain > marginal(kind, mu[to], rtt[to], x[to] + step):
                x[to] += step
                x[giver] -= step
                continue
        step /= 2
    return x


# The closed forms.


def test_a_bargain_by_hand() -> None:
    """18 can be served and 8 come: a third of the 10 left is more than the slowest has, and half of 8 is left."""
    assert bargaining([6.0, 2.0, 10.0], 8.0) == [2.0, 0.0, 6.0]
    assert bargaining([6.0, 2.0, 10.0], 15.0) == [5.0, 1.0, 9.0]
    assert bargaining([5.0, 5.0], 1e-6) == pytest.approx([5e-7, 5e-7], rel=1e-3)
    assert bargaining([5.0], 2.0) == [2.0]


def test_the_social_optimum_by_hand() -> None:
    """4 / (4 - 3)^2 = 1 / (1 - 1/2)^2 = 4; 2 / (2 - 1)^2 = 2 and 2 / (2 - 1/2)^2 = 8/9."""
    assert water_filling([4.0, 1.0], [0.0, 0.0], 3.5) == pytest.approx([3.0, 0.5])
    assert water_filling([2.0, 2.0], [0.0, 10 / 9], 1.5) == pytest.approx([1.0, 0.5])
    assert water_filling([2.0, 2.0], [0.0, 100.0], 1.5) == pytest.approx([1.5, 0.0])


def test_the_selfish_equilibrium_by_hand() -> None:
    """1 / (2 - 1) = 1 and 1/3 + 1 / (2 - 1/2) = 1."""
    assert water_filling([2.0, 2.0], [0.0, 1 / 3], 1.5, selfish=True) == pytest.approx([1.0, 0.5])


@given(
    st.lists(st.tuples(st.floats(0.05, 100.0), st.floats(0.0, 0.5)), min_size=1, max_size=12),
    st.floats(0.001, 0.998),
    st.sampled_from(KINDS),
)
def test_what_is_used_is_at_one_level_and_nothing_else_below_it(
    fleet: list[tuple[float, float]], full: float, kind: str
) -> None:
    mu, rtt = [one for one, _ in fleet], [way for _, way in fleet]
    phi = full * sum(mu)
    x = closed_form(kind, mu, rtt, phi)
    assert sum(x) == pytest.approx(phi, rel=1e-6)
    assert all(0.0 <= rate < one for rate, one in zip(x, mu, strict=True))
    costs = [marginal(kind, *one) for one in zip(mu, rtt, x, strict=True)]
    used = [cost for cost, rate in zip(costs, x, strict=True) if rate > 1e-6 * phi]
    assert max(used) == pytest.approx(min(used), rel=1e-4)
    assert all(cost >= min(used) * (1.0 - 1e-4) for cost in costs)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_exchange_finds(kind: str) -> None:
    rng = Random(7)
    for _ in range(10):
        mu = [rng.uniform(1.0, 20.0) for _ in range(rng.randint(2, 8))]
        rtt = [rng.uniform(0.0, 0.3) for _ in mu]
        phi = rng.uniform(0.2, 0.95) * sum(mu)
        assert closed_form(kind, mu, rtt, phi) == pytest.approx(
            by_exchange(kind, mu, rtt, phi), abs=2e-3 * phi
        )


def test_the_toll_makes_the_mean_delay_less() -> None:
    mu, rtt, phi = [100.0, 2.0], [1.0, 0.0], 2.0

    def delay(x: Sequence[float]) -> float:
        return sum(one * (way + 1 / (most - one)) for one, way, most in zip(x, rtt, mu, strict=True)) / phi

    assert delay(water_filling(mu, rtt, phi)) < 0.97 * delay(water_filling(mu, rtt, phi, selfish=True))


def test_without_rtt_the_selfish_are_the_bargainers() -> None:
    mu = [3.0, 9.0, 7.0, 0.4]
    assert water_filling(mu, [0.0] * 4, 11.0, selfish=True) == pytest.approx(bargaining(mu, 11.0))


# Learnt online.


STREETS = (0, 1, *(pytest.param(number, marks=pytest.mark.slow) for number in (2, 3, 4)))


@lru_cache
def street(number: int) -> tuple[dict[str, Made], list[float], list[float], float]:
    """Backends by chance, with mu, RTT and Phi."""
    rng = Random(number)
    made = {
        f"b{index}": Made(
            slots=rng.choice((8, 16, 24, 32, 48)),
            first=rng.uniform(0.02, 0.1),
            prompt=rng.uniform(5e-6, 5e-5),
            token=rng.uniform(0.01, 0.05),
            rtt=rng.choice((0.0, 0.005, 0.02, 0.06)),
        )
        for index in range(rng.randint(3, 6))
    }
    mu = [one.mu(Street.PROMPT, Street.ANSWER) for one in made.values()]
    return made, mu, [one.rtt for one in made.values()], rng.uniform(0.4, 0.75) * sum(mu)


@lru_cache
def furthest_off(number: int, kind: str, by: str) -> float:
    """Largest difference to the shares that exchange finds, of all requests, under policy `by`."""
    made, mu, rtt, phi = street(number)
    driven = Street(policy(by), made, number)
    driven.run(4000, phi)
    got = driven.run(4000, phi)
    want = by_exchange(kind, mu, rtt, phi)
    return max(abs(got[name] / 4000 - x / phi) for name, x in zip(made, want, strict=True))


@pytest.mark.parametrize("number", STREETS)
@pytest.mark.parametrize("kind", KINDS)
def test_shares_are_those_of_the_closed_form(kind: str, number: int) -> None:
    assert furthest_off(number, kind, kind) < 0.02


@pytest.mark.parametrize("number", STREETS)
@pytest.mark.parametrize("kind", KINDS)
def test_those_of_least_load_are_not(kind: str, number: int) -> None:
    assert furthest_off(number, kind, "least-load") > 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_more_than_can_be_served_is_shared_in_proportion(kind: str) -> None:
    made = {"a": Made(4, 0.02, 1e-6, 0.01), "b": Made(12, 0.02, 1e-6, 0.01, 0.5)}
    driven = Street(policy(kind), made)
    driven.run(1000, 40.0)
    assert driven.run(400, 40.0)["b"] == pytest.approx(300, abs=8)


class BestResponse(Wardrop):
    """To the least marginal cost at the rates of the last 20 s, each made of what was dispatched."""

    memory_s = 20.0

    def __init__(self, rng: Random, mu: dict[str, float]) -> None:
        super().__init__(rng)
        self.mu = mu
        self.sent: dict[str, tuple[float, float]] = {}

    def rate(self, name: str, now: float) -> float:
        value, at = self.sent.get(name, (0.0, now))
        return value * exp((at - now) / self.memory_s)

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        costs = {}
        for backend in backends:
            mu, x = self.mu[backend.name], self.rate(backend.name, now)
            costs[backend.name] = marginal("wardrop", mu, backend.rtt_s, x) if x < mu else 1e9 * x / mu
        return Send(min(costs, key=costs.__getitem__), reason="least marginal cost")

    def dispatched(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        self.sent[backend.name] = (self.rate(backend.name, now) + 1 / self.memory_s, now)


@pytest.mark.parametrize("number", STREETS)
def test_best_responses_lead_to_the_social_optimum(number: int) -> None:
    made, mu, rtt, phi = street(number)
    driven = Street(BestResponse(Random(0), dict(zip(made, mu, strict=True))), made, number)
    driven.run(1000, phi)
    got = driven.run(6000, phi)
    for name, x in zip(made, water_filling(mu, rtt, phi), strict=True):
        assert got[name] / 6000 == pytest.approx(x / phi, abs=0.02)


def test_shares_are_steadier_and_best_responses_follow_a_change_sooner() -> None:
    """How many of a hundred requests are where they should not be, before and after the load doubles."""
    off = {"shares": [0.0, 0.0], "best responses": [0.0, 0.0]}
    for number in (0, 6):
        made, mu, rtt, _ = street(number)
        best = BestResponse(Random(0), dict(zip(made, mu, strict=True)))
        for name, one in (("shares", policy("wardrop")), ("best responses", best)):
            driven = Street(one, made, number)
            driven.run(4000, 0.4 * sum(mu))
            for when, phi in enumerate((0.4 * sum(mu), 0.8 * sum(mu))):
                want = dict(zip(made, water_filling(mu, rtt, phi), strict=True))
                for _ in range(20):
                    got = driven.run(100, phi)
                    off[name][when] += sum(abs(got[b] - 100 * want[b] / phi) for b in made) / 2 / 40
    assert off["shares"][0] < off["best responses"][0] < 3.0
    assert off["best responses"][1] < off["shares"][1] < 5.0


def test_best_responses_flood_a_backend_that_returns_and_shares_do_not() -> None:
    made = {f"b{index}": Made(16, 0.02, 1e-6, 0.01) for index in range(4)}
    mu = [one.mu(Street.PROMPT, Street.ANSWER) for one in made.values()]
    phi = 0.6 * sum(mu)
    got = []
    for one in (policy("wardrop"), BestResponse(Random(0), dict(zip(made, mu, strict=True)))):
        driven = Street(one, made)
        driven.run(3000, phi)
        driven.run(3000, phi, without="b2")
        got.append(driven.run(200, phi)["b2"])
    assert got[0] == pytest.approx(50, abs=3)
    assert got[1] > 150


# How requests follow the shares.


def follow(
    one: Any, rates: dict[str, float], count: int, pool: list[BackendView], now: float = 10.0
) -> list[str]:
    """Fixes the rates; decisions of one moment."""
    one._rates, one._solved_at = rates, now
    chosen = []
    for number in range(count):
        facts = request(f"r{now}.{number}")
        decision = one.choose(facts, pool, now)
        chosen.append(decision.backend)
        one.dispatched(facts, next(b for b in pool if b.name == decision.backend), now)
    return chosen


def test_requests_follow_shares_as_evenly_as_can_be() -> None:
    chosen = follow(policy("nash"), {"b0": 5.0, "b1": 1.0, "b2": 1.0}, 14, views(3))
    for end in range(1, 15):
        part = chosen[:end]
        assert all(
            abs(part.count(name) - share * end) < 1.0
            for name, share in (("b0", 5 / 7), ("b1", 1 / 7), ("b2", 1 / 7))
        )


def test_who_is_not_there_keeps_its_place_and_makes_up_for_nothing() -> None:
    one = policy("nash")
    pool = views(3)
    rates = {"b0": 2.0, "b1": 1.0, "b2": 1.0}
    follow(one, rates, 40, pool)
    assert follow(one, rates, 40, pool[1:]).count("b1") == 20
    assert follow(one, rates, 40, pool).count("b0") == 20


def test_what_failed_elsewhere_is_charged_where_it_went() -> None:
    one = policy("nash")
    pool = views(2)
    one._rates, one._solved_at = {"b0": 1.0, "b1": 1.0}, 10.0
    one._tried.note("b0", 0)
    one._tried.note("b1", 0)
    facts = request("r1")
    first = one.choose(facts, pool, 10.0)
    for backend in pool:  # the first refuses it
        one.dispatched(facts, backend, 10.0)
    assert one._credits == {"b0": 0.0, "b1": 0.0}
    assert first.backend == "b0"


def test_one_without_a_share_is_tried_by_one_request_in_a_hundred() -> None:
    pool = views(3)
    one = policy("nash")
    chosen = follow(one, {"b0": 1.0, "b1": 1.0, "b2": 0.0}, 10 * TRY, pool)
    assert chosen[0] == "b2"
    assert 9 <= chosen.count("b2") <= 10
    decision = one.choose(request(), pool, 10.0)
    assert decision.reason in ("tried, since it had nothing for long", "furthest behind its share, of 3")
    assert decision.reason.startswith("tried") == (decision.backend == "b2")


def test_it_forgets_who_is_behind() -> None:
    one = policy("nash")
    driver = Driver(one, 2)
    driver.run(100)
    one._credits = {"b0": 8.0, "b1": -8.0}
    driver.now += FORGET_S
    driver.run(1)
    assert 0.0 < one._credits["b0"] < 8.0 * exp(-1) + 1.0


def test_shares_are_computed_once_a_second_and_not_by_choosing() -> None:
    one = policy("wardrop")
    solved = []
    rates = one.rates
    one.rates = lambda *given: solved.append(given) or rates(*given)
    driver = Driver(one, 3, every=0.1)
    driver.run(100)
    assert 9 <= len(solved) * SOLVED_FOR_S <= 13
    for _ in range(50):
        one.choose(request("held"), [driver.fleet[name] for name in driver.names], driver.now + 100.0)
    assert len(solved) <= 13


# What they go by.


@pytest.mark.parametrize("rate", [0.2, 3.0, 40.0])
def test_the_arrival_rate_is_right_from_the_beginning(rate: float) -> None:
    rng = Random(3)
    found = []
    for _ in range(400):
        arrivals, now, last = Rate(20.0), 50.0, 0.0
        for _ in range(12):
            now += rng.expovariate(rate)
            last = arrivals.note(now)
        found.append(last)
    # 11 gaps: the mean of 11 / (their sum) is a tenth above the rate.
    assert sum(found) / len(found) == pytest.approx(rate * 1.1, rel=0.08)
    assert Rate(20.0).note(1.0) == 0.0


def test_an_estimate_is_as_uncertain_as_it_moves() -> None:
    rng = Random(3)
    wobble = Wobble()
    assert wobble.variance == 1.0
    for _ in range(3000):
        wobble.note(rng.gauss(5.0, 0.2))
    assert wobble.variance == pytest.approx(0.04, rel=0.3)


def test_estimates_that_are_not_surely_different_are_one() -> None:
    apart = [(0.0, 1e-4), (0.2, 1e-4)]
    assert alike(apart) == [0.0, 0.2]
    assert alike([(0.0, 1e-2), (0.2, 1e-2)]) == pytest.approx([0.1, 0.1])
    # One that nobody knows is taken for those that it is near to, and brings nobody else together.
    assert alike([(0.0, 1.0), *apart]) == pytest.approx([0.0, 0.0, 0.2], abs=1e-3)
    assert alike([*apart, (-1.0, 1.0)]) == pytest.approx([0.0, 0.2, 0.0], abs=1e-3)
    assert alike([]) == []


def test_equals_whose_estimates_differ_by_noise_get_alike() -> None:
    made = {f"b{index}": Made(16, 0.05, 1e-5, 0.02) for index in range(6)}
    phi = 0.05 * sum(one.mu(Street.PROMPT, Street.ANSWER) for one in made.values())
    driven = Street(policy("nash"), made, noise=0.3)
    driven.run(3000, phi)
    assert all(count == pytest.approx(500, abs=60) for count in driven.run(3000, phi).values())


@pytest.mark.parametrize("make", [Nash, Wardrop])
def test_a_time_constant_is_above_zero(make: Callable[..., Nash]) -> None:
    with pytest.raises(ValueError, match="arrivals_s must be above 0, not 0"):
        make(Random(0), arrivals_s=0.0)
