"""Prompt tokens before a first token: formulas by hand, and two unequal backends."""

from __future__ import annotations

from math import exp
from random import Random
from typing import Any

import pytest

from policies import load
from policies.base import BackendView, Policy, Reject, Send
from policies.prefill import Gorgo, Lmetric, Mooncake
from policies.speeds import TTFT
from tests.policies.driver import request
from tests.policies.two_backends import p95_ttft, simulate

NOW = 100.0


def view(name: str, in_flight: int = 1, prefilling: int = 0, tokens: int = 0, **facts: Any) -> BackendView:
    """`tokens`: of prompts still to compute."""
    return BackendView(
        name,
        in_flight=in_flight,
        prefilling=prefilling,
        prefill_tokens=tokens,
        **{"slots": 10, **facts},
    )


def chosen(policy: Policy, backends: list[BackendView], **facts: Any) -> Send:
    decision = policy.choose(request(**{"arrived": NOW, **facts}), backends, NOW)
    assert isinstance(decision, Send)
    return decision


class TestLmetric:
    @pytest.mark.parametrize(
        ("a", "b", "cached", "scores"),
        [
            # 1100 * 2 and 1000 * 3: not the fewer tokens
            (view("a", 1, 1, 100), view("b", 2), {}, (2200, 3000)),
            # 1900 * 2 and 1000 * 3: not the fewer requests
            (view("a", 1, 1, 900), view("b", 2), {}, (3800, 3000)),
            # idle ones differ by what they have cached
            (view("a", 0), view("b", 0), {"b": 600}, (1000, 400)),
            # a cached prompt does not outweigh a long batch: 100 * 10 and 1000 * 1
            (view("a", 9), view("b", 0), {"a": 950}, (500, 1000)),
            (view("a", 9), view("b", 0), {"a": 850}, (1500, 1000)),
            # of a prompt that is cached whole, one token is computed
            (view("a", 3), view("b", 0), {"a": 1000}, (4, 1000)),
        ],
    )
    def test_the_product(
        self, a: BackendView, b: BackendView, cached: dict[str, int], scores: tuple[int, int]
    ) -> None:
        send = chosen(Lmetric(Random(1)), [a, b], prompt_tokens=1000, cached=cached)
        assert send.scores == dict(zip("ab", scores, strict=True))
        assert send.backend == ("a" if scores[0] < scores[1] else "b")

    def test_ties_go_by_load_and_then_by_turn(self) -> None:
        policy = Lmetric(Random(1))
        large, small = view("large", slots=20), view("small")
        assert chosen(policy, [small, large]).backend == "large"
        one, two = view("one"), view("two")
        assert chosen(policy, [one, two]).backend == "one"
        policy.dispatched(request(), one, NOW)
        assert chosen(policy, [one, two]).backend == "two"


class TestGorgo:
    def test_the_cost_as_in_the_paper(self) -> None:
        """RTT + 0.2 ms * (300 queued + 0.5 * 900 running + 400 new), of 1200 tokens in flight and 3 of 4 running"""
        policy = Gorgo(Random(1), ms_per_token=0.2)
        near = view("near", 4, 1, 300, in_flight_tokens=1200)
        far = view("far", 0, rtt_s=0.3)
        send = chosen(policy, [near, far], prompt_tokens=1000, cached={"near": 600})
        assert send.scores == {"near": pytest.approx(0.23), "far": pytest.approx(0.3 + 0.2)}
        assert policy.needs == {"prefix"}

    @pytest.mark.parametrize(
        ("rtt", "cached", "best"),
        [(0.3, {}, "near"), (0.3, {"far": 1900}, "far"), (0.05, {}, "far"), (0.3, {"far": 500}, "near")],
    )
    def test_a_round_trip_against_a_queue(self, rtt: float, cached: dict[str, int], best: str) -> None:
        """The near one costs 0.2 ms * (600 + 2000) = 0.52 s, the far one RTT + 0.2 ms * what is not cached."""
        backends = [view("near", 1, 1, 600, in_flight_tokens=800), view("far", rtt_s=rtt)]
        policy = Gorgo(Random(1), ms_per_token=0.2)
        assert chosen(policy, backends, prompt_tokens=2000, cached=cached).backend == best

    def test_the_weight_of_running_tokens(self) -> None:
        backends = [view("running", 2, 0, in_flight_tokens=1000), view("queued", 1, 1, 300)]
        assert chosen(Gorgo(Random(1), ms_per_token=1.0), backends).backend == "queued"  # 500 and 300
        light = Gorgo(Random(1), ms_per_token=1.0, running_weight=0.1)
        assert chosen(light, backends).backend == "running"  # 100 and 300
        assert chosen(light, backends, prompt_tokens=50).scores["running"] == pytest.approx(0.15)

    def test_a_token_costs_what_was_learnt_of_each_backend(self) -> None:
        """(0.2 - 0.1) / 1000 + 0.0002 and 0.1 / 1000 + 0.0004: three and five tenths of a millisecond"""
        fast = view("fast", 1, 1, 2000, rtt_s=0.1, ttft_fit=(0.2, 0.0002, 9.0))
        slow = view("slow", 1, 1, 1000, ttft_fit=(0.1, 0.0004, 0.0))
        policy = Gorgo(Random(1))
        send = chosen(policy, [slow, fast], prompt_tokens=1000)
        assert send.scores == {"fast": pytest.approx(0.1 + 0.0003 * 3000), "slow": pytest.approx(1.0)}
        assert policy.needs == {"prefix", "speed"}
        short = chosen(policy, [slow, fast], prompt_tokens=10)  # as if of 512
        assert short.scores["slow"] == pytest.approx((0.1 / 512 + 0.0004) * 1010)

    def test_a_token_is_never_free(self) -> None:
        backends = [view(name, 1, 1, 99_000, ttft_fit=(0.0, 0.0, 0.0), rtt_s=0.1) for name in "ab"]
        assert chosen(Gorgo(Random(1)), backends, prompt_tokens=1000).scores["a"] == pytest.approx(0.2)

    def test_what_was_learnt_of_an_idle_one_fades_and_what_was_given_does_not(self) -> None:
        backends = [view(name, 0, rtt_s=0.1, ttft_fit=(0.1, 0.001, 0.0)) for name in "ab"]
        policy = Gorgo(Random(1))
        policy.dispatched(request(), backends[0], NOW - 60.0)
        scores = chosen(policy, backends, prompt_tokens=1000).scores
        assert scores == {"a": pytest.approx(0.1 + exp(-1)), "b": pytest.approx(0.1)}
        given = Gorgo(Random(1), ms_per_token=1.0)
        assert chosen(given, backends, prompt_tokens=1000).scores["b"] == pytest.approx(1.1)

    @pytest.mark.parametrize(
        "wrong", [{"ms_per_token": 0.0}, {"ms_per_token": -1.0}, {"running_weight": -0.5}]
    )
    def test_bad_parameters(self, wrong: dict[str, float]) -> None:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Gorgo(Random(1), **wrong)


def fitted(name: str, in_flight: int = 1, prefilling: int = 0, tokens: int = 0, **facts: Any) -> BackendView:
    fits = {"ttft_fit": (0.1, 0.001, 0.02), "tpot_fit": (0.03, 0.002)}
    return view(name, in_flight, prefilling, tokens, **{**fits, **facts})


class TestMooncake:
    def test_the_estimate(self) -> None:
        """0.1 + 0.001 * (300 + 400) + 0.02 * 3 and 0.1 + 0.001 * 1000 + 0.02 * 1; the round trip is in the 0.1"""
        busy, other = fitted("busy", 5, 2, 300, rtt_s=0.05), fitted("other")
        send = chosen(Mooncake(Random(1)), [other, busy], prompt_tokens=1000, cached={"busy": 600})
        assert send.scores == {"busy": pytest.approx(0.86), "other": pytest.approx(1.12)}
        assert send.backend == "busy"

    def test_a_backend_that_nobody_has_learnt_of_is_usual(self) -> None:
        backends = [view("a"), fitted("b")]
        scores = chosen(Mooncake(Random(1)), backends, prompt_tokens=1000).scores
        assert scores["a"] == pytest.approx(TTFT[0] + 1000 * TTFT[1] + TTFT[2])

    def test_the_estimate_of_an_idle_one_fades_down_to_its_round_trip(self) -> None:
        backends = [fitted(name, 0, rtt_s=0.1, ttft_fit=(0.5, 0.0, 0.0)) for name in "ab"]
        policy = Mooncake(Random(1))
        policy.dispatched(request(), backends[0], NOW - 60.0)
        scores = chosen(policy, backends).scores
        assert scores == {"a": pytest.approx(0.1 + 0.4 * exp(-1)), "b": pytest.approx(0.1)}

    def test_without_promises_nothing_is_refused(self) -> None:
        assert chosen(Mooncake(Random(1)), [fitted("a", 9, 9, 10**6)]).backend == "a"

    @pytest.mark.parametrize(
        ("ttft", "in_flight", "tokens", "waited", "refused_s"),
        [
            (2.0, 1, 800, 0.0, None),  # 0.1 + 0.001 * (800 + 1000)
            (2.0, 1, 4000, 0.0, 3.1),  # 5.1 s: the queue is short enough in 3.1 s
            (2.0, 1, 1200, 0.0, 1.0),  # 2.3 s: in 0.3 s, but nobody is told to come back so soon
            (2.0, 1, 800, 0.2, 1.0),  # 1.9 s, and 0.2 s are gone
            (2.0, 1, 10**6, 0.0, 60.0),
            (1.0, 1, 4000, 0.0, None),  # it would be late on an idle backend
            (2.0, 0, 0, 5.0, None),  # nobody is busy
        ],
    )
    def test_a_first_token_that_would_be_late_is_refused_at_once(
        self, ttft: float, in_flight: int, tokens: int, waited: float, refused_s: float | None
    ) -> None:
        backend = fitted("a", in_flight, in_flight, tokens)
        policy = load("mooncake", Random(1), ttft=ttft)
        for backends in ([backend], [backend, fitted("b", in_flight, in_flight, tokens)]):
            decision = policy.choose(request(prompt_tokens=1000, arrived=NOW - waited), backends, NOW)
            if refused_s is None:
                assert isinstance(decision, Send)
            else:
                assert isinstance(decision, Reject)
                assert decision.code == "overloaded"
                assert decision.retry_after_s == pytest.approx(refused_s)

    def test_answers_that_would_be_slow_are_refused_at_once(self) -> None:
        """With 8 in flight 0.046 s each; 5 may be: 3 of 8 leave in 3/8 of the time of an answer of 200 tokens."""
        decision = Mooncake(Random(1), tpot=0.04).choose(
            request(expected_tokens=200, arrived=NOW), [fitted("a", 8)], NOW
        )
        assert isinstance(decision, Reject)
        assert decision.retry_after_s == pytest.approx(3 / 8 * 0.046 * 200)
        assert chosen(Mooncake(Random(1), tpot=0.04), [fitted("a", 5)]).backend == "a"
        assert (
            chosen(Mooncake(Random(1), tpot=0.02), [fitted("a", 8)]).backend == "a"
        )  # no idle one would keep it

    def test_who_would_miss_one_is_passed_over_while_another_keeps_both(self) -> None:
        soon_but_slow, late_but_quick = fitted("slow", 8), fitted("quick", 1, 1, 500)
        backends = [soon_but_slow, late_but_quick]
        assert chosen(Mooncake(Random(1)), backends).backend == "slow"  # 0.36 s, 0.7 s
        send = chosen(Mooncake(Random(1), tpot=0.04), backends)
        assert (send.backend, send.fallbacks) == ("quick", ("slow",))

    @pytest.mark.parametrize("wrong", [{"ttft": 0.0}, {"tpot": -1.0}])
    def test_bad_parameters(self, wrong: dict[str, float]) -> None:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Mooncake(Random(1), **wrong)


@pytest.mark.parametrize(
    ("pick", "most"),
    [
        ("lmetric", 0.5),  # 0.42 was seen
        ("gorgo", 0.6),  # 0.52
        ("{policy: gorgo, ms_per_token: 0.2}", 0.8),  # 0.69: a token does not cost the same everywhere
        ("mooncake", 0.5),  # 0.38
    ],
)
def test_the_95th_percentile_is_below_that_of_round_robin(pick: str, most: float) -> None:
    assert p95_ttft(pick) <= most * p95_ttft("round-robin")


def test_early_rejection_keeps_promises_that_waiting_would_break() -> None:
    rate = 8.0
    patient = simulate("mooncake", rate)
    rejecting = simulate("{policy: mooncake, ttft: 2.0, tpot: 0.1}", rate)
    assert patient.refused == 0.0
    assert rejecting.kept >= patient.kept + 0.2
    assert rejecting.kept >= 1.0 - rejecting.refused - 0.1
