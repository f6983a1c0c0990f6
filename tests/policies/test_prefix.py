from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import sqrt
from random import Random
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.base import BackendView, Decision, Finished, Outcome, Policy, RequestFacts, Send
from policies.prefix import SessionAffinity
from tests.policies.driver import Driver, loaded, request, views


class Hears(Policy):
    needs = frozenset({"prefix"})
    heard: ClassVar[list[str]] = []

    def __init__(self, rng: Random) -> None:
        self.heard.clear()

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        return Send(backends[0].name)

    def first_token(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        self.heard.append(f"first_token {request.id}")

    def finished(self, finished: Finished) -> None:
        self.heard.append(f"finished {finished.request.id}")


SESSIONS = [f"tenant/conversation-{number}" for number in range(6000)]


def home(policy: SessionAffinity, pool: list[BackendView], session: str) -> Send:
    decision = policy.choose(request(session=session), pool, 0.0)
    assert isinstance(decision, Send)
    return decision


def homes(pool: list[BackendView]) -> dict[str, str]:
    policy = SessionAffinity(Random(0))
    return {session: home(policy, pool, session).backend for session in SESSIONS}


def test_a_session_stays() -> None:
    pool = views(5)
    assert homes(pool) == homes(pool) == homes(pool[::-1])


def test_every_process_agrees() -> None:
    """Golden: a change of the hash moves every session of every user at once."""
    found = homes(views(5))
    got = "".join(found[session][1:] for session in SESSIONS[:40])
    assert got == "0011000114032002443342332200203321041444"


def test_sessions_spread_evenly() -> None:
    got = Counter(homes(views(6)).values())
    assert all(abs(got[f"b{index}"] - 1000) < 5 * sqrt(1000) for index in range(6))


def test_sessions_spread_by_weight_and_slots() -> None:
    pool = views(4)
    pool[1].weight, pool[2].slots, pool[3].weight = 3.0, 64, 0.0
    got = Counter(homes(pool).values())
    for index, share in enumerate((1 / 6, 3 / 6, 2 / 6, 0.0)):
        assert abs(got[f"b{index}"] - 6000 * share) <= 5 * sqrt(6000 * share)


def test_without_any_weight_all_are_alike() -> None:
    pool = views(3, weight=0.0)
    assert homes(pool) == homes(views(3))


@pytest.mark.parametrize("count", [2, 5, 12])
def test_only_the_sessions_of_the_one_that_goes_move(count: int) -> None:
    pool = views(count)
    before = homes(pool)
    after = homes(pool[1:])
    moved = [session for session in SESSIONS if before[session] != after[session]]
    assert {before[session] for session in moved} == {"b0"}
    assert abs(len(moved) - 6000 / count) < 5 * sqrt(6000 / count)
    spread = Counter(after[session] for session in moved)
    expected = len(moved) / (count - 1)
    assert all(abs(spread[backend.name] - expected) <= 5 * sqrt(expected) for backend in pool[1:])


def test_the_first_fallback_is_where_a_session_goes_when_its_backend_is_gone() -> None:
    policy = SessionAffinity(Random(0))
    for session in SESSIONS[:100]:
        pool = views(4)
        decision = home(policy, pool, session)
        rest = [backend for backend in pool if backend.name != decision.backend]
        assert home(policy, rest, session).backend == decision.fallbacks[0]


def test_a_backend_above_its_bound_is_passed_over() -> None:
    session = next(session for session, name in homes(views(3)).items() if name == "b0")
    # Mean of 20 + 1/3 with this request; 1.25 times that is 25.4.
    at_bound, above = loaded(25, 18, 17), loaded(26, 18, 16)
    policy = SessionAffinity(Random(0))
    stays = home(policy, at_bound, session)
    assert (stays.backend, stays.reason) == ("b0", "the session's of 3")
    moves = home(policy, above, session)
    assert moves.backend == stays.fallbacks[0]
    assert moves.fallbacks[-1] == "b0"
    assert moves.reason == "the session's next: b0 is above 1.25 times the mean load"


def test_a_backend_with_little_to_do_keeps_its_sessions() -> None:
    session = next(session for session, name in homes(views(3)).items() if name == "b0")
    assert home(SessionAffinity(Random(0)), loaded(15, 0, 0), session).backend == "b0"
    assert home(SessionAffinity(Random(0)), loaded(16, 0, 0), session).backend != "b0"
    strict = SessionAffinity(Random(0), bound_from=0.0)
    assert home(strict, loaded(1, 0, 0), session).backend != "b0"


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 40)), min_size=2, max_size=6),
    st.floats(1.0, 3.0),
    st.integers(0, 999),
)
def test_there_is_always_one_below_the_bound(fleet: list[tuple[int, int]], bound: float, number: int) -> None:
    pool = [BackendView(f"b{i}", in_flight=load, slots=slots) for i, (load, slots) in enumerate(fleet)]
    chosen = home(SessionAffinity(Random(0), bound=bound, bound_from=0.0), pool, SESSIONS[number]).backend
    backend = next(backend for backend in pool if backend.name == chosen)
    mean = (sum(load for load, _ in fleet) + 1) / sum(slots for _, slots in fleet)
    assert backend.in_flight / backend.slots < bound * mean * (1 + 1e-12)


def test_one_session_cannot_pile_up_on_its_backend() -> None:
    policy = SessionAffinity(Random(0), bound_from=0.0)
    driver = Driver(policy, 4, every=0.01)
    pool = [driver.fleet[name] for name in driver.names]
    for number in range(400):
        driver.next_request()
        facts = request(f"same{number}", session="tenant/same")
        chosen = driver.decide(facts, pool).backend
        total = sum(backend.in_flight for backend in pool)
        assert driver.fleet[chosen].in_flight < 1.25 * (total + 1) / 4
        driver.lease(facts, chosen)


def test_without_a_session_the_fallback_decides_and_hears_everything() -> None:
    policy = SessionAffinity(Random(0), fallback="round-robin")
    pool = views(3)
    chosen = []
    for number in range(4):
        decision = home(policy, pool, "")
        chosen.append(decision.backend)
        policy.dispatched(request(f"r{number}"), next(b for b in pool if b.name == decision.backend), 0.0)
    assert chosen == ["b0", "b1", "b2", "b0"]
    assert decision.reason == "next in turn of 3"
    policy.dispatched(request(session="tenant/a"), pool[1], 0.0)
    assert home(policy, pool, "").backend == "b2"


def test_the_fallback_says_what_it_needs_and_hears_what_happens() -> None:
    policy = SessionAffinity(Random(0), fallback=f"{__name__}:Hears")
    assert policy.needs == {"prefix", "weight"}
    policy.first_token(request("r1"), BackendView("b"), 0.0)
    policy.finished(Finished(request("r2"), "b", Outcome.OK, 0.0))
    assert Hears.heard == ["first_token r1", "finished r2"]


def test_least_load_is_the_default_fallback() -> None:
    assert home(SessionAffinity(Random(0)), loaded(2, 1, 4), "").reason == "least saturation of 3"


@pytest.mark.parametrize("fallback", ["session-affinity", "policies.prefix:SessionAffinity"])
def test_it_cannot_fall_back_on_itself(fallback: str) -> None:
    with pytest.raises(ValueError, match="fallback must be another policy"):
        SessionAffinity(Random(0), fallback=fallback)


def test_bounds_are_checked() -> None:
    with pytest.raises(ValueError, match=r"bound must be at least 1, not 0\.9"):
        SessionAffinity(Random(0), bound=0.9)
    with pytest.raises(ValueError, match="bound_from must be at least 0, not -1"):
        SessionAffinity(Random(0), bound_from=-1)


@given(st.text(max_size=50), st.text(alphabet=st.characters(), min_size=1, max_size=20))
def test_any_text_is_a_session_and_any_name_a_backend(session: str, name: str) -> None:
    name = name.encode("utf-8", "replace").decode()
    decision = home(SessionAffinity(Random(0)), [BackendView(name), BackendView(name + "'")], session)
    assert all(score >= 0.0 for score in decision.scores.values())
