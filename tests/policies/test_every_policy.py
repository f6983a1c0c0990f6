"""Laws that every policy of the registry obeys, and choosers that break each of them.

Examples do not find what is wrong with a chooser: admired balancers have shipped a "two choices" that took the
busier one a quarter of the time. So the laws are counted, over the whole registry.
"""

from __future__ import annotations

import gc
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from math import inf, isfinite, nan, sqrt
from random import Random
from typing import Any

import pytest

from policies import POLICIES, load
from policies.base import BackendView, Decision, Finished, Outcome, Policy, Reject, RequestFacts, Send
from tests.policies.driver import Driver, loaded, request, views

Make = Callable[[Random], Policy]

TAKE_THE_IDLER = (
    *("least-load", "power-of-two", "geo", "shortest-path"),
    *("prequal", "peak-ewma", "forecast", "lmetric", "gorgo", "mooncake"),
    *("skylb", "kv-threshold", "weighted-scores"),
)
DRAW = ("random", "power-of-two")
DRAW_IF_TOLD: tuple[tuple[str, dict[str, object]], ...] = (
    ("weighted-scores", {"picker": "weighted-random"}),
    ("weighted-scores", {"picker": "softmax", "temperature": 0.3}),
)
SHARE = ("round-robin", "weighted-qps")
"""Give each its share of the requests whatever the load is."""


@pytest.fixture(params=sorted(POLICIES))
def make(request: pytest.FixtureRequest) -> Make:
    return lambda rng: load(request.param, rng)


def fits(count: int, of: int, backends: int) -> bool:
    """Whether a count out of `of` requests is a fair share among equals, within five standard deviations."""
    return abs(count - of / backends) <= 5 * sqrt(of / backends)


# The laws.


def answers_with_a_member(make: Make) -> None:
    """A backend of the pool, fallbacks that are others of it, a propensity that is one, scores that are numbers.

    While somebody is busy it may hold a request or refuse it; while nobody is, it has no reason to.
    """
    pools: list[list[BackendView]] = []
    for count in (1, 2, 3, 50):
        pools += [
            views(count),
            views(count, weight=0.0),
            views(count, ttft_s=0.2, tpot_s=0.02, rtt_s=0.01, location=(31.2, 121.5)),
            views(count, in_flight=40, waiting=9, kv_use=0.99, sampled_at=9.5),
            views(count, kv_use=nan, sampled_at=9.5),
            loaded(*range(count)),
            [*views(count), BackendView("odd", weight=0.0, slots=1, in_flight=1, location=(90.0, -180.0))],
        ]
    rng = Random(3)
    for pool in pools:
        policy = make(rng)
        names = {backend.name for backend in pool}
        for session in ("", "tenant/a", "tenant/\ud800"):
            labels = {"location": "31.3,120.6", "business": "interactive"} if session else {}
            facts = request(session=session, labels=labels, body_bytes=10**6)
            for decision in (policy.choose(facts, pool, 10.0), policy.choose(facts, tuple(pool), 10.0)):
                if not isinstance(decision, Send):
                    assert any(backend.in_flight for backend in pool)
                    assert isinstance(decision, Reject) or 10.0 < decision.until < inf
                    assert decision.reason
                    continue
                assert decision.backend in names
                assert type(decision.fallbacks) is tuple
                assert set(decision.fallbacks) <= names - {decision.backend}
                assert len(decision.fallbacks) == len(set(decision.fallbacks))
                assert 0.0 < decision.propensity <= 1.0
                assert set(decision.scores) <= names
                assert all(isfinite(score) for score in decision.scores.values())
                assert len(pool) > 1 or (not decision.scores and not decision.fallbacks)
                assert decision.reason
            if isinstance(decision, Send):
                policy.dispatched(facts, next(b for b in pool if b.name == decision.backend), 10.0)


def same_seed_same_answers(make: Make) -> None:
    runs = [Driver(make(Random(11)), 5, every) for every in (0.05, 0.05)]
    for driver in runs:
        driver.run(300)
    assert runs[0].chosen == runs[1].chosen


def starves_nobody(make: Make) -> None:
    """Backends that are alike get alike, when all are busy and when all are idle."""
    for every in (0.05, 3.0):
        shares = Driver(make(Random(5)), 8, every).run(4000)
        assert all(fits(shares[f"b{index}"], 4000, 8) for index in range(8)), shares


def takes_the_idler(make: Make) -> None:
    policy = make(Random(1))
    for loads in ((9, 1), (1, 9), (5, 4)):
        pool = loaded(*loads)
        idler = min(pool, key=lambda backend: backend.in_flight)
        for index in range(200):
            facts = request(f"r{index}")
            decision = policy.choose(facts, pool, 10.0)
            assert isinstance(decision, Send)
            assert decision.backend == idler.name
            policy.dispatched(facts, idler, 10.0)


def choosing_leaves_no_trace(make: Make) -> None:
    """Decisions that are held or never carried out change nothing for the requests that follow."""
    rngs = Random(2), Random(2)
    plain, disturbed = (Driver(make(rng), 4) for rng in rngs)
    everyone = [disturbed.fleet[name] for name in disturbed.names]
    for step in range(100):
        for number in range(5):
            position = rngs[1].getstate()
            held = request(f"held{step}.{number}", session=f"tenant/held{number}")
            disturbed.policy.choose(held, everyone[number % 3 :], disturbed.now)
            rngs[1].setstate(position)
        plain.run(1)
        disturbed.run(1)
    assert plain.chosen == disturbed.chosen


def fallbacks_do_no_harm(make: Make) -> None:
    """A backend that refuses its first attempts is no reason to starve or flood another."""
    driver = Driver(make(Random(4)), 4)
    pool = [driver.fleet[name] for name in driver.names]
    got: Counter[str] = Counter()
    for _ in range(2000):
        facts = driver.next_request()
        send = driver.decide(facts, pool)
        for name in (send.backend, *send.fallbacks):
            if name != "b0":
                driver.lease(facts, name)
                got[name] += 1
                break
            refused = driver.fleet.lease(facts, name, driver.now, driver.policy)
            driver.fleet.release(refused, Outcome.FAILED, driver.now)
    assert sum(got.values()) == 2000
    assert all(300 <= got[f"b{index}"] <= 1100 for index in (1, 2, 3)), got


def a_backend_may_go_and_return(make: Make) -> None:
    driver = Driver(make(Random(6)), 4)
    driver.run(500)
    others = ["b0", "b2", "b3"]
    without = driver.run(1000, others)
    assert all(fits(without[name], 1000, 3) for name in others), without
    back = driver.run(1000)
    assert all(fits(back[name], 1000, 4) for name in driver.names), back
    changed = driver.run(1000, ["b3", "b1", "b2", "b0"])
    assert all(fits(changed[name], 1000, 4) for name in driver.names), changed


def propensities_are_frequencies(make: Make) -> None:
    """Over many draws from one situation each backend comes as often as it was said to."""
    policy = make(Random(8))
    pool = loaded(3, 1, 1, 4, 0)
    for backend, weight in zip(pool, (1.0, 2.0, 0.0, 4.0, 0.5), strict=True):
        backend.weight = weight
    count = 20_000
    times: Counter[str] = Counter()
    said: dict[str, set[float]] = {}
    for _ in range(count):
        decision = policy.choose(request(), pool, 10.0)
        assert isinstance(decision, Send)
        times[decision.backend] += 1
        said.setdefault(decision.backend, set()).add(decision.propensity)
    for name, propensities in said.items():
        (propensity,) = propensities
        assert abs(times[name] - count * propensity) <= 5 * sqrt(count * propensity), (name, propensity)
    assert sum(propensity for (propensity,) in said.values()) == pytest.approx(1.0)


def memory_is_bounded(make: Make) -> None:
    """24,000 sessions and twice as many backends come and go; the second half leaves nothing behind.

    Every other decision is never carried out.
    """
    policy = make(Random(9))
    pool = views(2, ttft_s=0.1, location=(31.2, 121.5))
    blocks = 0
    for number in range(24_000):
        pool[0].name, pool[1].name = f"new{number}", f"newer{number}"
        labels = {"location": f"{number % 90},{number % 179}"}
        facts = request(f"r{number}", session=f"tenant/s{number}", labels=labels)
        decision = policy.choose(facts, pool, float(number))
        assert isinstance(decision, Send)
        chosen = pool[0] if pool[0].name == decision.backend else pool[1]
        if number % 2:
            policy.dispatched(facts, chosen, float(number))
            policy.first_token(facts, chosen, float(number))
            policy.finished(Finished(facts, chosen.name, Outcome.OK, float(number)))
        if number == 12_000:
            gc.collect()
            blocks = sys.getallocatedblocks()
    gc.collect()
    assert sys.getallocatedblocks() - blocks < 5000


# Every policy under every law.


@pytest.mark.parametrize(
    "law",
    [
        answers_with_a_member,
        same_seed_same_answers,
        starves_nobody,
        choosing_leaves_no_trace,
        fallbacks_do_no_harm,
        a_backend_may_go_and_return,
        memory_is_bounded,
    ],
)
def test_law(law: Callable[[Make], None], make: Make) -> None:
    law(make)


@pytest.mark.parametrize("name", TAKE_THE_IDLER)
def test_of_two_always_the_idler(name: str) -> None:
    takes_the_idler(lambda rng: load(name, rng))


@pytest.mark.parametrize("name", ["session-affinity", "prefix-affinity"])
def test_without_anything_to_hash_affinity_takes_the_idler_too(name: str) -> None:
    takes_the_idler(lambda rng: load(name, rng))


@pytest.mark.parametrize(("name", "parameters"), [*((name, {}) for name in DRAW), *DRAW_IF_TOLD])
def test_propensities_are_frequencies(name: str, parameters: dict[str, object]) -> None:
    propensities_are_frequencies(lambda rng: load(name, rng, **parameters))


@pytest.mark.parametrize("name", sorted(set(POLICIES) - set(DRAW)))
def test_who_does_not_draw_is_certain(name: str) -> None:
    policy = load(name, Random(1))
    for _ in range(50):
        decision = policy.choose(request(session="tenant/a"), loaded(3, 1, 2), 10.0)
        assert isinstance(decision, Send)
        assert decision.propensity == 1.0


@pytest.mark.parametrize("name", SHARE)
def test_a_share_holds_whatever_the_load_is(name: str) -> None:
    driver = Driver(load(name, Random(1)), 3)
    driver.fleet["b1"].in_flight = 30
    assert driver.run(300) == {"b0": 100, "b1": 100, "b2": 100}


# Choosers with faults that others have shipped: the laws find them.


class FirstOfTheIdlest(Policy):
    """Ties go to the first in the list: all that arrives while nothing runs goes to one backend."""

    def __init__(self, rng: Random) -> None: ...

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        return Send(min(backends, key=lambda backend: backend.in_flight).name, reason="first")


class KeepsTheWorse(Policy):
    """Caddy's power of two (until 2026): a better candidate joins the list of the best but does not empty it."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        best: list[BackendView] = []
        for backend in self.rng.sample(list(backends), min(2, len(backends))):
            if not best or backend.in_flight <= best[-1].in_flight:
                best.append(backend)
        return Send(self.rng.choice(best).name, reason="one of two")


class CountsInChoose(Policy):
    """Round robin by an index that every question moves on."""

    def __init__(self, rng: Random) -> None:
        self.index = 0

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        self.index += 1
        return Send(backends[self.index % len(backends)].name, reason="next")


class CatchesUp(Policy):
    """Fewest requests since the start: who was away gets everything until it has as many as the others."""

    def __init__(self, rng: Random) -> None:
        self.counts: Counter[str] = Counter()

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        return Send(min(backends, key=lambda backend: self.counts[backend.name]).name, reason="fewest")

    def dispatched(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        self.counts[backend.name] += 1


class RemembersEverySession(Policy):
    def __init__(self, rng: Random) -> None:
        self.homes: dict[str, str] = {}

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        return Send(self.homes.get(request.session, backends[0].name), reason="home")

    def dispatched(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        self.homes[request.session] = backend.name


class ForgetsTheTies(Policy):
    """Power of two that claims to be certain of the emptier, though a tie is a draw."""

    def __init__(self, rng: Random) -> None:
        self.inner = load("power-of-two", rng)

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        decision = self.inner.choose(request, backends, now)
        assert isinstance(decision, Send)
        decision.propensity = 2 / len(backends)
        return decision


class Unseeded(Policy):
    def __init__(self, rng: Random) -> None: ...

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        return Send(random.choice(backends).name, reason="any")


class Stranger(Policy):
    def __init__(self, rng: Random) -> None: ...

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        return Send("elsewhere", reason="by heart")


class FallsBackOnOne(Policy):
    """Its fallback is always the same: when a backend fails, that one gets all its requests."""

    def __init__(self, rng: Random) -> None:
        self.inner = load("round-robin", rng)
        self.dispatched = self.inner.dispatched  # type: ignore[method-assign]

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        return Send(backends[0].name, (backends[-1].name,), reason="first")


class ScoresAreInfinite(Policy):
    def __init__(self, rng: Random) -> None: ...

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        return Send(backends[0].name, reason="first", scores={backends[0].name: inf})


@pytest.mark.parametrize(
    ("law", "broken"),
    [
        (answers_with_a_member, Stranger),
        (answers_with_a_member, ScoresAreInfinite),
        (same_seed_same_answers, Unseeded),
        (starves_nobody, FirstOfTheIdlest),
        (takes_the_idler, KeepsTheWorse),
        (choosing_leaves_no_trace, CountsInChoose),
        (fallbacks_do_no_harm, FallsBackOnOne),
        (a_backend_may_go_and_return, CatchesUp),
        (propensities_are_frequencies, ForgetsTheTies),
        (memory_is_bounded, RemembersEverySession),
    ],
)
def test_the_law_bites(law: Callable[[Make], None], broken: Any) -> None:
    with pytest.raises(AssertionError):
        law(broken)
