from __future__ import annotations

from collections import Counter
from itertools import permutations
from math import inf, sqrt
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.base import BackendView, Hold, Policy, Send
from policies.simple import LeastLoad, PowerOfTwo, RandomChoice, RoundRobin, WeightedQps
from tests.policies.driver import loaded, request, views


def weighted(*weights: float) -> list[BackendView]:
    return [BackendView(f"b{index}", weight=weight) for index, weight in enumerate(weights)]


def ask(policy: Policy, pool: list[BackendView], id: str = "r", now: float = 0.0) -> Send:
    decision = policy.choose(request(id), pool, now)
    assert isinstance(decision, Send)
    return decision


def serve(policy: Policy, pool: list[BackendView], count: int, now: float = 0.0, id: str = "r") -> str:
    """Decide and dispatch `count` requests; the numbers of the backends, in order."""
    chosen = []
    for number in range(count):
        decision = ask(policy, pool, f"{id}{number}", now)
        backend = next(backend for backend in pool if backend.name == decision.backend)
        policy.dispatched(request(f"{id}{number}"), backend, now)
        chosen.append(decision.backend[1:])
    return "".join(chosen)


class TestRoundRobin:
    def test_goes_round_in_configured_order(self) -> None:
        assert serve(RoundRobin(Random(0)), views(3), 7) == "0120120"

    def test_is_fair_when_the_candidates_change(self) -> None:
        policy = RoundRobin(Random(0))
        pool = views(4)
        got: Counter[str] = Counter()
        for number in range(400):
            # Two rules, one for all backends and one for the first two: an index would give these 300.
            got.update(serve(policy, pool if number % 2 else pool[:2], 1))
        assert all(99 <= got[name] <= 101 for name in "0123")

    def test_a_newcomer_is_next_once(self) -> None:
        policy = RoundRobin(Random(0))
        pool = views(3)
        serve(policy, pool[:2], 100)
        assert serve(policy, pool, 6) == "201201"

    def test_a_retry_takes_the_turn_of_its_backend(self) -> None:
        policy = RoundRobin(Random(0))
        pool = views(3)
        assert ask(policy, pool).fallbacks == ("b1", "b2")
        policy.dispatched(request(), pool[0], 0.0)
        policy.dispatched(request(), pool[1], 0.0)
        assert serve(policy, pool, 3) == "201"

    def test_asking_again_gives_the_same(self) -> None:
        policy = RoundRobin(Random(0))
        assert [ask(policy, views(3)).backend for _ in range(5)] == ["b0"] * 5


class TestRandom:
    def test_is_proportional_to_weight(self) -> None:
        policy = RandomChoice(Random(1))
        pool = weighted(1, 2, 5)
        got = Counter(ask(policy, pool).backend for _ in range(8000))
        for backend in pool:
            expected = 1000 * backend.weight
            assert abs(got[backend.name] - expected) < 5 * sqrt(expected)

    def test_weight_zero_gets_nothing_not_even_as_a_fallback(self) -> None:
        policy = RandomChoice(Random(1))
        for _ in range(200):
            decision = ask(policy, weighted(0, 1, 0, 2))
            assert {decision.backend, *decision.fallbacks} == {"b1", "b3"}
        alone = ask(policy, weighted(0, 1))
        assert (alone.backend, alone.fallbacks, alone.propensity) == ("b1", (), 1.0)

    def test_without_any_weight_all_are_alike(self) -> None:
        policy = RandomChoice(Random(1))
        decisions = [ask(policy, weighted(0, 0, 0)) for _ in range(3000)]
        assert {decision.propensity for decision in decisions} == {1 / 3}
        assert set(Counter(decision.backend for decision in decisions)) == {"b0", "b1", "b2"}

    def test_the_last_one_is_taken_when_rounding_leaves_a_rest(self) -> None:
        class AlmostOne(Random):
            def random(self) -> float:
                return 1.0 - 2.0**-53

        for weights in ((0.1,) * 10, (0.1, 0.2, 0.3), (1e-300, 1e300)):
            pool = weighted(*weights)
            assert ask(RandomChoice(AlmostOne(0)), pool).backend == pool[-1].name


class TestLeastLoad:
    def test_compares_small_and_large_by_their_slots(self) -> None:
        small, large = (
            BackendView("small", slots=4, in_flight=2),
            BackendView("large", slots=64, in_flight=20),
        )
        decision = ask(LeastLoad(Random(0)), [small, large])
        assert decision.backend == "large"
        assert decision.scores == {"small": 0.5, "large": 20 / 64}
        assert decision.fallbacks == ("small",)

    def test_the_engine_s_own_figures_count_while_fresh(self) -> None:
        pool = loaded(1, 2)
        pool[0].waiting, pool[0].sampled_at = 3, 10.0
        assert ask(LeastLoad(Random(0)), pool, now=11.0).backend == "b1"
        assert ask(LeastLoad(Random(0)), pool, now=13.0).backend == "b0"

    def test_ties_go_by_tokens_over_slots(self) -> None:
        pool = [
            BackendView("b0", slots=8, in_flight=2, in_flight_tokens=4000),
            BackendView("b1", slots=16, in_flight=4, in_flight_tokens=6000),
        ]
        assert ask(LeastLoad(Random(0)), pool).backend == "b1"

    def test_idle_backends_take_turns(self) -> None:
        assert serve(LeastLoad(Random(0)), views(3), 7) == "0120120"

    def test_fallbacks_are_in_order_of_load(self) -> None:
        assert ask(LeastLoad(Random(0)), loaded(5, 1, 3, 4)).fallbacks == ("b2", "b3", "b0")


class TestPowerOfTwo:
    @given(st.lists(st.integers(0, 3), min_size=2, max_size=6), st.integers(0, 2**32))
    def test_its_propensity_is_exact(self, loads: list[int], seed: int) -> None:
        decision = ask(PowerOfTwo(Random(seed)), loaded(*loads))
        pairs = list(permutations(range(len(loads)), 2))
        wins = Counter(first if loads[first] <= loads[second] else second for first, second in pairs)
        assert decision.propensity == pytest.approx(wins[int(decision.backend[1:])] / len(pairs))

    def test_the_busiest_of_many_is_never_taken(self) -> None:
        policy = PowerOfTwo(Random(1))
        assert "b2" not in {ask(policy, loaded(1, 1, 2, 0)).backend for _ in range(1000)}

    def test_records_the_two_it_drew_and_falls_back_on_the_other_first(self) -> None:
        policy = PowerOfTwo(Random(1))
        for _ in range(100):
            decision = ask(policy, loaded(4, 8, 16, 24, 32))
            assert decision.backend < decision.fallbacks[0], "the emptier one stands before the busier"
            saturation = {f"b{index}": load / 32 for index, load in enumerate((4, 8, 16, 24, 32))}
            drawn = (decision.backend, decision.fallbacks[0])
            assert decision.scores == {name: saturation[name] for name in drawn}
            assert list(decision.fallbacks[1:]) == sorted(decision.fallbacks[1:])
            assert {decision.backend, *decision.fallbacks} == {"b0", "b1", "b2", "b3", "b4"}

    def test_ties_go_by_tokens(self) -> None:
        pool = [
            BackendView("b0", slots=8, in_flight=1, in_flight_tokens=900),
            BackendView("b1", slots=16, in_flight=2, in_flight_tokens=1600),
        ]
        assert {ask(PowerOfTwo(Random(seed)), pool).backend for seed in range(20)} == {"b1"}


class TestWeightedQps:
    @pytest.mark.parametrize(
        ("weights", "order"),
        [
            ((5, 1, 1), "0010200"),
            ((2, 1, 1), "01200120"),
            ((3, 1), "00100010"),
            ((1, 1, 1), "012012"),
            ((0, 0), "0101"),
            ((3, 0, 1), "0020"),
        ],
    )
    def test_spreads_the_light_between_the_heavy(self, weights: tuple[float, ...], order: str) -> None:
        assert serve(WeightedQps(Random(0)), weighted(*weights), len(order)) == order

    @given(st.lists(st.floats(0.05, 50), min_size=2, max_size=8), st.integers(1, 150))
    def test_every_count_is_near_its_share(self, weights: list[float], count: int) -> None:
        got = Counter(serve(WeightedQps(Random(0)), weighted(*weights), count))
        for index, weight in enumerate(weights):
            assert abs(got[str(index)] - count * weight / sum(weights)) <= (len(weights) + 1) / 2

    def test_one_that_returns_makes_up_for_nothing(self) -> None:
        policy = WeightedQps(Random(0))
        pool = weighted(1, 1, 1)
        serve(policy, pool, 30)
        serve(policy, pool[:2], 1000)
        assert serve(policy, pool, 9).count("2") == 3

    def test_a_light_newcomer_waits_for_its_share_and_gets_it(self) -> None:
        policy = WeightedQps(Random(0))
        pool = weighted(10, 10, 0.2)
        serve(policy, pool[:2], 500)
        first_hundred = serve(policy, pool, 101)
        assert first_hundred.count("2") == 1
        assert first_hundred[0] != "2"
        assert serve(policy, pool, 101).count("2") == 1

    def test_a_changed_weight_counts_at_once(self) -> None:
        policy = WeightedQps(Random(0))
        pool = weighted(1, 0.001)
        serve(policy, pool, 501)
        pool[1].weight = 1.0
        assert serve(policy, pool, 20).count("1") in (9, 10, 11)

    def test_a_fallback_counts_where_it_went(self) -> None:
        policy = WeightedQps(Random(0))
        pool = weighted(1, 1, 1)
        serve(policy, pool, 3)
        failed = request("failed")
        assert ask(policy, pool, "failed").fallbacks == ("b1", "b2")
        policy.dispatched(failed, pool[0], 0.0)
        policy.dispatched(failed, pool[1], 0.0)
        assert serve(policy, pool, 4) == "2012"

    def test_a_late_fallback_counts_where_it_went(self) -> None:
        policy = WeightedQps(Random(0))
        pool = weighted(1, 1, 1)
        serve(policy, pool, 3)
        policy.dispatched(request("failed long ago"), pool[1], 0.0)
        assert serve(policy, pool, 6) == "020120"

    def test_each_rule_shares_among_its_own_candidates(self) -> None:
        policy = WeightedQps(Random(0))
        pool = weighted(1, 3, 1)
        got: Counter[str] = Counter()
        for number in range(900):
            # Two of three requests may only go to b0; that must neither starve nor even out the others.
            got.update(serve(policy, pool[:1] if number % 3 else pool, 1, id=f"{number}."))
        assert got == {"0": 600 + 60, "1": 180, "2": 60}

    def test_debts_for_fallbacks_do_not_grow(self) -> None:
        policy = WeightedQps(Random(0))
        pool = weighted(1, 1)
        for _ in range(500):
            policy.dispatched(request("other"), pool[0], 0.0)
        assert serve(policy, pool, 10).count("0") >= 4

    def test_decisions_in_a_batch_are_charged_too(self) -> None:
        policy = WeightedQps(Random(0))
        pool = weighted(3, 1)
        for number in range(0, 400, 2):
            decisions = [ask(policy, pool, f"r{number + step}") for step in range(2)]
            for step, decision in enumerate(decisions):
                backend = next(backend for backend in pool if backend.name == decision.backend)
                policy.dispatched(request(f"r{number + step}"), backend, 0.0)
        assert 0.6 < serve(policy, pool, 100).count("0") / 100 < 0.9


class TestMaxQps:
    def test_full_backends_are_passed_over_then_the_request_is_held(self) -> None:
        policy = WeightedQps(Random(0), max_qps={"b0": 2, "b1": 4})
        pool = weighted(1, 1)
        assert Counter(serve(policy, pool, 6, now=50.0)) == {"0": 2, "1": 4}
        held = policy.choose(request(), pool, 50.0)
        assert held == Hold(50.25, "every backend is at its max_qps")
        decision = policy.choose(request(), pool, held.until)
        assert isinstance(decision, Send)
        assert (decision.backend, decision.fallbacks) == ("b1", ())

    def test_without_a_limit_there_is_always_room(self) -> None:
        policy = WeightedQps(Random(0), max_qps={"b0": 1})
        assert serve(policy, weighted(9, 1), 5) == "01111"

    @given(st.floats(0.2, 40), st.integers(0, 2**32))
    def test_no_window_holds_more_than_promised(self, qps: float, seed: int) -> None:
        rng = Random(seed)
        policy = WeightedQps(rng, max_qps={"b0": qps})
        pool = weighted(1)
        now = 1000.0
        sent: list[float] = []
        while len(sent) < 50:
            decision = policy.choose(request(), pool, now)
            if isinstance(decision, Hold):
                assert now < decision.until <= now + max(1.0, 1.0 / qps) + 1e-6
                now = decision.until
                assert isinstance(policy.choose(request(), pool, now), Send)
                continue
            policy.dispatched(request(), pool[0], now)
            sent.append(now)
            now += rng.expovariate(qps) if rng.random() < 0.1 else 0.0
        for first, start in enumerate(sent):
            for last in range(first, len(sent)):
                assert last - first + 1 <= qps * (sent[last] - start) + max(qps, 1.0) + 1e-6

    def test_a_limit_is_kept_to_in_the_long_run(self) -> None:
        policy = WeightedQps(Random(0), max_qps={"b0": 5})
        pool = weighted(1, 1)
        got: Counter[str] = Counter()
        for step in range(6000):
            got.update(serve(policy, pool, 1, now=step / 100))
        assert 300 <= got["0"] <= 305

    @pytest.mark.parametrize("qps", [0, -1, inf])
    def test_a_limit_must_be_a_positive_number(self, qps: float) -> None:
        with pytest.raises(ValueError, match=r"max_qps of b0 must be above 0"):
            WeightedQps(Random(0), max_qps={"b0": qps})
