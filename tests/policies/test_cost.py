"""Seconds, money and carbon: by hand, and a stream of requests against the budget that it has."""

from __future__ import annotations

from math import sqrt
from random import Random
from typing import Any

import pytest

from policies.base import BackendView, Finished, Outcome, Send
from policies.cost import MOST, Cost, Multiplier
from tests.policies.driver import request
from tests.policies.street import Made, Street

FACTS = request(prompt_tokens=1000, expected_tokens=101)
PRICE = {"price_input": 1.0, "price_output": 2.0}


def backend(name: str, tpot: float = 0.02, **facts: Any) -> BackendView:
    """Takes 0.1 s + 0.1 ms a prompt token to the first token: 0.2 s for 1000, and 100 times `tpot` after it."""
    facts = {"ttft_fit": (0.1, 1e-4, 0.05), "tpot_fit": (tpot, 1e-3), **facts}
    return BackendView(name, **facts)


def used(policy: Cost, *pool: BackendView, now: float = 10.0) -> Cost:
    """As if each had just been dispatched to."""
    for one in pool:
        policy.dispatched(FACTS, one, now)
    return policy


def decide(policy: Cost, *pool: BackendView, now: float = 10.0, **facts: Any) -> Send:
    facts = {"prompt_tokens": 1000, "expected_tokens": 101, **facts}
    decision = policy.choose(request(**facts), pool, now)
    assert isinstance(decision, Send)
    return decision


def scores(policy: Cost, *pool: BackendView, **facts: Any) -> dict[str, float]:
    return dict(decide(used(policy, *pool), *pool, **facts).scores)


def test_seconds_by_hand() -> None:
    """Alone 0.2 + 100 * 0.02; beside 3, one without a first token and 500 tokens to compute, 0.35 + 100 * 0.023."""
    busy = backend("busy", in_flight=3, prefilling=1, prefill_tokens=500)
    found = scores(Cost(Random(0), money=0.0, carbon=0.0), backend("idle"), busy)
    assert found == pytest.approx({"idle": 2.2, "busy": 0.25 + 0.1 + 2.3})


def test_money_by_hand() -> None:
    """1000 prompt tokens at 1 and 101 at 2 for a million are 1202 millionths; 1.202 s at 1000 s for one."""
    found = scores(
        Cost(Random(0), carbon=0.0), backend("a", **PRICE), backend("b", price_input=0.0, price_output=0.0)
    )
    assert found == pytest.approx({"a": 2.2 + 1.202, "b": 2.2})


def test_what_is_cached_is_computed_no_more_and_costs_its_share() -> None:
    pool = backend("a", **PRICE), backend("b", **PRICE)
    found = scores(Cost(Random(0), carbon=0.0, cached_share=0.25), *pool, cached={"a": 800})
    assert found == pytest.approx({"a": 0.12 + 2.0 + 0.2 + 0.2 + 0.202, "b": 2.2 + 1.202})
    full = scores(Cost(Random(0), carbon=0.0), *pool, cached={"a": 800})
    assert full == pytest.approx({"a": 0.12 + 2.0 + 1.202, "b": 2.2 + 1.202})


def test_carbon_by_hand() -> None:
    """1101 tokens at 2 J are 2202 J; at 600 g for 3.6 MJ that is 0.367 g, 3.67 s at 10 s a gram."""
    pool = backend("a", carbon_gco2_kwh=600.0), backend("b", carbon_gco2_kwh=0.0), backend("unknown")
    found = scores(Cost(Random(0), money=0.0, carbon=10.0, joules_per_token=2.0), *pool)
    assert found == pytest.approx({"a": 2.2 + 3.67, "b": 2.2, "unknown": 2.2 + 3.67})


def test_a_backend_without_a_price_is_not_free() -> None:
    dear, unknown = backend("dear", tpot=0.08, **PRICE), backend("unknown")
    assert decide(used(Cost(Random(0)), dear, unknown), dear, unknown).backend == "dear"
    half = backend("half", price_input=0.0)
    assert decide(used(Cost(Random(0)), dear, half), dear, half).backend == "dear"
    assumed = used(Cost(Random(0), unknown_price=1.0), dear, unknown)
    found = decide(assumed, dear, unknown)
    assert found.backend == "unknown"
    assert found.scores["unknown"] == pytest.approx(2.2 + 1.101)
    assert decide(used(Cost(Random(0), money=0.0), dear, unknown), dear, unknown).backend == "unknown"


def test_the_sla_comes_first_while_somebody_keeps_to_it() -> None:
    slow = backend("slow", tpot=0.05, price_input=0.0, price_output=0.0)
    fast = backend("fast", price_input=9.0, price_output=9.0)
    unpriced = backend("unpriced")
    pool = slow, fast, unpriced
    assert decide(used(Cost(Random(0)), *pool), *pool).backend == "slow"
    assert decide(used(Cost(Random(0), tpot=0.03), *pool), *pool).backend == "fast"
    assert decide(used(Cost(Random(0), tpot=0.03), *pool), *pool).fallbacks == ("unpriced", "slow")
    assert decide(used(Cost(Random(0), tpot=0.01), *pool), *pool).backend == "slow"
    late = backend("late", ttft_fit=(3.0, 0.0, 0.0), price_input=0.0, price_output=0.0)
    assert decide(used(Cost(Random(0)), late, fast), late, fast).backend == "late"
    assert decide(used(Cost(Random(0), ttft=1.0), late, fast), late, fast).backend == "fast"


def test_one_that_was_slow_is_tried_again_after_a_while_by_one() -> None:
    fast, slow = backend("fast", in_flight=1), backend("slow", tpot=0.1)
    policy = used(Cost(Random(0), carbon=0.0), fast, slow)
    assert decide(policy, fast, slow).backend == "fast"
    assert decide(policy, fast, slow, now=100.0).backend == "slow"
    policy.dispatched(FACTS, slow, 100.0)
    slow.in_flight = 1
    assert decide(policy, fast, slow, now=200.0).backend == "fast"


# Multipliers.


def test_a_multiplier_by_hand() -> None:
    """A cap of 2 an hour, a weight of 100, a step of 5: an hour's cap overspent adds 500."""
    multiplier = Multiplier(100.0, 2.0, 5.0)
    multiplier.spent(0.1, 0.0)
    assert multiplier.at(0.0) == pytest.approx(100 + 500 * 0.05)
    multiplier.spent(0.2, 360.0)  # a tenth of the cap in a tenth of an hour: as it should be
    assert multiplier.at(360.0) == pytest.approx(125.0)
    assert multiplier.at(360.0 + 36.0) == pytest.approx(120.0)
    assert multiplier.at(360.0 + 36.0) == pytest.approx(120.0), "asking moves nothing"
    assert multiplier.at(5000.0) == 0.0
    multiplier.spent(0.4, 360.0 + 3600.0)
    assert multiplier.at(3960.0) == 0.0, "an idle hour saves nothing up"
    multiplier.spent(1e9, 3960.0)
    assert multiplier.at(3960.0) == MOST * 100.0


def test_idle_hours_save_nothing_up() -> None:
    multiplier = Multiplier(100.0, 2.0, 5.0)
    multiplier.spent(0.0, 0.0)
    multiplier.spent(0.0, 36_000.0)
    multiplier.spent(0.2, 36_000.0)
    assert multiplier.at(36_000.0) == pytest.approx(50.0)


def test_without_a_cap_it_is_a_weight() -> None:
    multiplier = Multiplier(7.0, None, 20.0)
    multiplier.spent(1e9, 5.0)
    assert multiplier.at(1e6) == 7.0


def test_what_is_reported_is_what_was_spent() -> None:
    """The forecast said 101 tokens, the backend 501: 1000 at 1 and 501 at 2, for a cap of 0.002002 an hour."""
    policy = Cost(Random(0), money_per_hour=0.002002, carbon=0.0, step=1.0)
    pool = backend("a", **PRICE), backend("b", price_input=0.0, price_output=0.0)
    used(policy, *pool)
    policy.finished(Finished(FACTS, "a", Outcome.OK, 10.0, prompt_tokens=1000, completion_tokens=501))
    after = decide(policy, *pool).scores
    assert after["a"] - after["b"] == pytest.approx(2 * 1.202)


# A stream of requests, and the least seconds that its budget buys.

MADE = {"dear": Made(48, 0.02, 1e-6, 0.01), "cheap": Made(48, 0.02, 1e-6, 0.03)}
PRICES = {"dear": (1.0, 2.0), "cheap": (0.1, 0.2)}
GRAMS = {"dear": 500.0, "cheap": 50.0}
RATE = 4.0


def spend(driven: Street) -> float:
    return sum(
        (PRICES[name][0] * driven.prompt_tokens[name] + PRICES[name][1] * driven.answer_tokens[name]) / 1e6
        for name in MADE
    )


def emitted(driven: Street) -> float:
    return sum(
        GRAMS[name] * (driven.prompt_tokens[name] + driven.answer_tokens[name]) / 3.6e6 for name in MADE
    )


def stream(count: int = 12_000, **parameters: Any) -> tuple[float, float, float]:
    """Money and grams an hour, and mean seconds, of so many requests after half as many others."""
    driven = Street(Cost(Random(0), **parameters), MADE)
    for name, one in driven.fleet.backends.items():
        one.price_input, one.price_output = PRICES[name]
        one.carbon_gco2_kwh = GRAMS[name]
    driven.run(count // 2, RATE)
    began, money, grams, waited = driven.now, spend(driven), emitted(driven), driven.wait_s
    driven.run(count, RATE)
    hours = (driven.now - began) / 3600.0
    return (
        (spend(driven) - money) / hours,
        (emitted(driven) - grams) / hours,
        (driven.wait_s - waited) / count,
    )


DEAR_S, CHEAP_S = 0.02 + 99 * 0.01, 0.02 + 99 * 0.03
DEAR, CHEAP = (
    RATE * 3600 * (500 * PRICES[name][0] + 100 * PRICES[name][1]) / 1e6 for name in ("dear", "cheap")
)
"""Money an hour if all went there: 10.08 and 1.008."""


def least_seconds(cap: float) -> float:
    """The best that money can buy: the dear one for all prompts up to a length, where it saves most for its price.

    Prompts are 100 to 900 tokens, all as likely. A share f goes to the dear one, those of up to 100 + 800 f
    tokens; each costs 0.9 millionths a prompt token and 180 more than on the cheap one. So by the hour
    cap = CHEAP + 3600 RATE f (0.9 (100 + 400 f) + 180) / 10^6, of which f is the root.
    """
    spare = (cap - CHEAP) * 1e6 / (3600 * RATE)
    share = (sqrt(270.0**2 + 4 * 360.0 * spare) - 270.0) / (2 * 360.0)
    return share * DEAR_S + (1 - share) * CHEAP_S


@pytest.mark.parametrize("money", [1000.0, 20_000.0])
def test_the_cap_is_spent_and_buys_the_least_seconds(money: float) -> None:
    """Whether the multiplier begins too low or too high."""
    cap = 4.0
    spent, _, seconds = stream(money_per_hour=cap, money=money, carbon=0.0)
    assert spent == pytest.approx(cap, rel=0.03)
    assert seconds == pytest.approx(least_seconds(cap), rel=0.03)


@pytest.mark.parametrize("money", [1000.0, 20_000.0])
def test_without_the_dual_step_it_is_not(money: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Multiplier, "spent", lambda *_: None)
    monkeypatch.setattr(Multiplier, "at", lambda self, now: self._value)
    spent, _, _ = stream(3000, money_per_hour=4.0, money=money, carbon=0.0)
    assert not 0.8 < spent / 4.0 < 1.2


def test_a_cap_that_nothing_reaches_costs_no_seconds() -> None:
    spent, _, seconds = stream(3000, money_per_hour=20.0, carbon=0.0)
    assert spent == pytest.approx(DEAR, rel=0.05)
    assert seconds == pytest.approx(DEAR_S, rel=0.05)


def test_carbon_is_kept_under_its_cap_alike() -> None:
    """All of it on the dear one would be 1200 g an hour."""
    _, grams, _ = stream(carbon_per_hour=600.0, money=0.0)
    assert grams == pytest.approx(600.0, rel=0.03)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"money": -1.0}, "money must be 0 or more, not -1"),
        ({"unknown_price": -1.0}, "unknown_price must be 0 or more"),
        ({"joules_per_token": float("inf")}, "joules_per_token must be 0 or more, not inf"),
        ({"money_per_hour": 0.0}, "money_per_hour must be above 0, not 0"),
        ({"ttft": -2.0}, "ttft must be above 0, not -2"),
        ({"step": 0.0}, "step must be above 0"),
        ({"carbon": 0.0, "carbon_per_hour": 1.0}, "carbon must be above 0 where carbon_per_hour is given"),
        ({"cached_share": 1.5}, r"cached_share must be from 0 to 1, not 1\.5"),
    ],
)
def test_parameters_are_checked(given: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cost(Random(0), **given)
