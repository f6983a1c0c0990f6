from __future__ import annotations

from collections.abc import Sequence
from math import exp

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.base import BackendView, Decision, Finished, Outcome, Policy, RequestFacts, Send
from policies.health import Health
from policies.state import AVERAGE_TAU_S, Backend, Fleet, Lease
from tests.policies.driver import request

OK, FAILED, IGNORED = Outcome.OK, Outcome.FAILED, Outcome.IGNORED


class Hears(Policy):
    """Notes what it is told, with the load it sees at that moment."""

    def __init__(self) -> None:
        self.heard: list[tuple[object, ...]] = []
        self.finishes: list[Finished] = []

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        return Send(backends[0].name)

    def dispatched(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        self.heard.append(("dispatched", request.id, backend.name, backend.in_flight, now))

    def first_token(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        self.heard.append(("first_token", request.id, backend.name, round(backend.ttft_s, 6), now))

    def finished(self, finished: Finished) -> None:
        self.finishes.append(finished)


def fleet(*names: str) -> Fleet:
    return Fleet([Backend(name, models=frozenset("m")) for name in names or ("a", "b")])


def load(fleet: Fleet) -> dict[str, tuple[int, int]]:
    return {backend.name: (backend.in_flight, backend.in_flight_tokens) for backend in fleet}


class TestAverages:
    def test_the_first_sample_is_the_average(self) -> None:
        backend = Backend("a")
        backend.observe_ttft(0.4, 100.0)
        backend.observe_tpot(0.02, 100.0)
        backend.observe_rtt(0.003, 100.0)
        assert (backend.ttft_s, backend.tpot_s, backend.rtt_s) == (0.4, 0.02, 0.003)

    @pytest.mark.parametrize("which", ["ttft", "tpot", "rtt"])
    def test_weighs_by_time_since_the_last_sample(self, which: str) -> None:
        backend = Backend("a")
        observe = getattr(backend, f"observe_{which}")
        observe(1.0, 100.0)
        observe(2.0, 102.0)
        assert getattr(backend, f"{which}_s") == pytest.approx(2.0 - exp(-2.0 / AVERAGE_TAU_S))

    def test_after_a_long_pause_the_new_sample_is_the_average(self) -> None:
        backend = Backend("a")
        backend.observe_ttft(9.0, 100.0)
        backend.observe_ttft(0.2, 100.0 + 20 * AVERAGE_TAU_S)
        assert backend.ttft_s == pytest.approx(0.2, abs=1e-6)

    def test_samples_of_one_moment_count_as_if_fifty_milliseconds_apart(self) -> None:
        backend = Backend("a")
        for _ in range(3):
            backend.observe_ttft(1.0, 100.0)
        backend.observe_ttft(2.0, 100.0)
        assert backend.ttft_s == pytest.approx(2.0 - exp(-0.05 / AVERAGE_TAU_S))

    def test_a_sample_that_comes_late_moves_it_little(self) -> None:
        backend = Backend("a")
        backend.observe_ttft(1.0, 100.0)
        backend.observe_ttft(2.0, 90.0)
        assert backend.ttft_s == pytest.approx(2.0 - exp(-0.05 / AVERAGE_TAU_S))

    @given(st.lists(st.tuples(st.floats(0.001, 50), st.floats(0, 1000)), min_size=1, max_size=50))
    def test_stays_between_the_least_and_the_most(self, samples: list[tuple[float, float]]) -> None:
        backend, now = Backend("a"), 0.0
        for seconds, pause in samples:
            now += pause
            backend.observe_ttft(seconds, now)
        seen = [seconds for seconds, _ in samples]
        assert min(seen) * (1 - 1e-9) <= backend.ttft_s <= max(seen) * (1 + 1e-9)


class TestLeases:
    def test_count_requests_and_tokens_until_released(self) -> None:
        backends = fleet()
        one = backends.lease(request("1", prompt_tokens=30, expected_tokens=70), "a", 0.0)
        two = backends.lease(request("2", prompt_tokens=5, expected_tokens=0), "a", 0.0)
        assert load(backends) == {"a": (2, 105), "b": (0, 0)}
        backends.release(one, OK, 1.0)
        assert load(backends) == {"a": (1, 5), "b": (0, 0)}
        backends.release(two, FAILED, 1.0)
        assert load(backends) == {"a": (0, 0), "b": (0, 0)}

    def test_are_released_once(self) -> None:
        backends = fleet()
        policy = Hears()
        lease = backends.lease(request(), "a", 0.0, policy)
        assert backends.release(lease, OK, 1.0) is not None
        assert backends.release(lease, FAILED, 2.0) is None
        assert load(backends)["a"] == (0, 0)
        assert (backends["a"].ok, backends["a"].failed) == (1, 0)
        assert len(policy.finishes) == 1

    def test_give_back_what_they_took_even_if_the_forecast_changed(self) -> None:
        backends = fleet()
        facts = request(prompt_tokens=10, expected_tokens=10)
        lease = backends.lease(facts, "a", 0.0)
        facts.expected_tokens = 500
        backends.release(lease, OK, 1.0)
        assert load(backends)["a"] == (0, 0)

    def test_outlive_their_backend(self) -> None:
        backends = fleet("a", "b")
        gone = backends["a"]
        lease = backends.lease(request(), "a", 0.0)
        backends.replace([backends["b"]])
        finished = backends.release(lease, OK, 1.0)
        assert finished is not None
        assert finished.backend == "a"
        assert (gone.in_flight, len(backends)) == (0, 1)

    def test_an_unknown_backend_cannot_be_leased(self) -> None:
        with pytest.raises(KeyError):
            fleet().lease(request(), "nowhere", 0.0)

    def test_outcomes_are_counted_apart(self) -> None:
        backends = fleet()
        for outcome, times in ((OK, 3), (FAILED, 2), (IGNORED, 1)):
            for _ in range(times):
                backends.release(backends.lease(request(), "a", 0.0), outcome, 1.0)
        backend = backends["a"]
        assert (backend.ok, backend.failed, backend.ignored) == (3, 2, 1)

    @given(
        st.lists(
            st.tuples(st.sampled_from("ab"), st.integers(0, 500), st.sampled_from(Outcome), st.booleans()),
            max_size=60,
        ),
        st.randoms(use_true_random=False),
    )
    def test_every_count_is_what_is_leased(
        self, attempts: list[tuple[str, int, Outcome, bool]], rng: object
    ) -> None:
        backends = fleet()
        open_leases: list[tuple[Lease, Outcome]] = []
        for step, (name, tokens, outcome, finish_one) in enumerate(attempts):
            lease = backends.lease(request(prompt_tokens=tokens, expected_tokens=0), name, float(step))
            open_leases.append((lease, outcome))
            if finish_one:
                done, how = open_leases.pop(step % len(open_leases))
                backends.first_token(done, step + 0.5)
                backends.release(done, how, step + 0.6, (tokens, 0, 9))
                backends.release(done, OK, step + 0.7)
            for backend in backends:
                held = [lease for lease, _ in open_leases if lease.backend is backend]
                assert backend.in_flight == len(held)
                assert backend.in_flight_tokens == sum(lease.tokens for lease in held)


class TestEvents:
    def test_the_policy_that_chose_hears_of_each_step(self) -> None:
        backends, policy = fleet(), Hears()
        lease = backends.lease(request("r1"), "a", 10.0, policy, "least-load")
        backends.first_token(lease, 10.4)
        backends.first_token(lease, 10.9)
        finished = backends.release(lease, OK, 12.4, (100, 60, 41))
        assert policy.heard == [("dispatched", "r1", "a", 1, 10.0), ("first_token", "r1", "a", 0.4, 10.4)]
        assert policy.finishes == [finished]
        assert finished == Finished(
            request=lease.request,
            backend="a",
            outcome=OK,
            ended=12.4,
            started=10.0,
            ttft_s=pytest.approx(0.4),
            prompt_tokens=100,
            cached_tokens=60,
            completion_tokens=41,
            decided_by="least-load",
        )
        assert backends["a"].ttft_s == pytest.approx(0.4)
        assert backends["a"].tpot_s == pytest.approx(2.0 / 40)

    def test_without_a_token_there_is_nothing_to_measure(self) -> None:
        backends = fleet()
        finished = backends.release(backends.lease(request(), "a", 0.0), FAILED, 30.0)
        assert finished is not None
        assert finished.ttft_s is None
        assert (finished.prompt_tokens, finished.cached_tokens, finished.completion_tokens) == (0, 0, 0)
        assert (backends["a"].ttft_s, backends["a"].tpot_s) == (0.0, 0.0)

    @pytest.mark.parametrize(("outcome", "tokens"), [(OK, 0), (OK, 1), (FAILED, 50)])
    def test_time_per_token_needs_two_tokens_of_a_stream_that_held(
        self, outcome: Outcome, tokens: int
    ) -> None:
        backends = fleet()
        lease = backends.lease(request(), "a", 0.0)
        backends.first_token(lease, 1.0)
        backends.release(lease, outcome, 61.0, (10, 0, tokens))
        assert backends["a"].tpot_s == 0.0

    def test_a_client_that_left_still_measured_something(self) -> None:
        backends = fleet()
        lease = backends.lease(request(), "a", 0.0)
        backends.first_token(lease, 1.0)
        backends.release(lease, IGNORED, 3.0, (10, 0, 2))
        assert backends["a"].tpot_s == pytest.approx(2.0)


def fail(backends: Fleet, name: str, now: float, times: int = 5) -> None:
    for _ in range(times):
        backends.release(backends.lease(request(), name, now), FAILED, now)


class TestAvailability:
    def test_a_backend_without_models_is_not_available(self) -> None:
        backends = fleet()
        backends["a"].models = frozenset()
        assert backends.refresh(0.0)
        assert [backend.available for backend in backends] == [False, True]
        backends["a"].models = frozenset("n")
        assert backends.refresh(0.0)
        assert backends["a"].available

    def test_five_failures_take_a_backend_out_and_a_trial_brings_it_back(self) -> None:
        backends = fleet()
        before = backends.version
        fail(backends, "a", 100.0)
        assert not backends["a"].available
        assert backends["b"].available
        assert backends.version > before
        assert not backends.refresh(109.0)
        assert backends.refresh(110.0)
        assert backends["a"].available
        trial = backends.lease(request(), "a", 110.0)
        assert not backends["a"].available
        backends.first_token(trial, 110.5)
        assert backends["a"].available
        version = backends.version
        backends.release(trial, OK, 300.0, (1, 0, 9))
        assert backends["a"].available
        assert backends.version == version

    def test_a_trial_whose_client_left_lets_the_next_one_try(self) -> None:
        backends = fleet()
        fail(backends, "a", 100.0)
        backends.refresh(110.0)
        trial = backends.lease(request(), "a", 110.0)
        backends.release(trial, IGNORED, 111.0)
        assert backends["a"].available
        assert backends["a"].breaker.state(111.0) == "half-open"

    def test_streams_from_before_neither_close_nor_reopen(self) -> None:
        backends = fleet()
        good, bad, later = (backends.lease(request(), "a", 90.0) for _ in range(3))
        fail(backends, "a", 100.0)
        backends.release(good, OK, 101.0)
        assert not backends["a"].available
        backends.refresh(110.0)
        trial = backends.lease(request(), "a", 110.0)
        backends.release(bad, FAILED, 111.0)
        assert backends["a"].breaker.trial_running
        backends.release(trial, OK, 112.0)
        backends.release(later, FAILED, 113.0)
        assert backends["a"].breaker.failures == 0
        assert backends["a"].available

    def test_a_probe_that_says_up_again_ends_the_wait(self) -> None:
        backends = fleet()
        backend = backends["a"]
        fail(backends, "a", 100.0)
        backend.probed(False, 101.0)
        backends.refresh(101.0)
        backend.probed(True, 103.0)
        assert backends.refresh(103.0)
        assert backend.available
        assert backend.breaker.state(103.0) == "half-open"

    def test_a_probe_that_goes_on_saying_up_does_not(self) -> None:
        backends = fleet()
        fail(backends, "a", 100.0)
        backends["a"].probed(True, 101.0)
        assert not backends.refresh(101.0)
        assert not backends["a"].available

    def test_needs_probes_breaker_and_no_drain(self) -> None:
        backends = fleet()
        backends.health = Health(slow_start_s=0.0)
        backend = backends["a"]
        backend.probed(False, 1.0)
        backend.connects = False
        assert backends.refresh(1.0)
        backend.draining = True
        backend.probed(True, 2.0)
        assert not backends.refresh(2.0)
        assert not backend.available
        backend.draining = False
        assert backends.refresh(3.0)
        assert backend.available

    def test_one_that_said_it_is_full_gets_nothing_for_a_while(self) -> None:
        backends = fleet()
        assert backends.back_off("a", 5.0, 100.0)
        assert not backends.back_off("a", 1.0, 101.0)
        assert not backends.refresh(104.9)
        assert backends.refresh(105.0)
        assert backends["a"].available

    def test_nothing_new_leaves_the_version_alone(self) -> None:
        backends = fleet()
        version = backends.version
        backends.release(backends.lease(request(), "a", 0.0), OK, 1.0)
        assert not backends.refresh(2.0)
        assert backends.version == version


class TestFleet:
    def test_keeps_the_configured_order(self) -> None:
        assert [backend.name for backend in fleet("z", "a", "m")] == ["z", "a", "m"]

    def test_a_backend_that_stays_keeps_its_counts(self) -> None:
        backends = fleet("a", "b")
        backends.lease(request(), "a", 0.0)
        version = backends.version
        backends.replace([Backend("c"), backends["a"]])
        assert [(backend.name, backend.in_flight) for backend in backends] == [("c", 0), ("a", 1)]
        assert backends.version == version + 1
