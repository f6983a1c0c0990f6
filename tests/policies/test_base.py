from __future__ import annotations

from collections.abc import Sequence
from math import nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.base import BackendView, Decision, Finished, Hold, Outcome, Policy, Reject, RequestFacts, Send
from policies.guarded import Guarded


@pytest.mark.parametrize(
    ("facts", "saturation"),
    [
        ({}, 0.0),
        ({"in_flight": 8}, 0.25),
        ({"in_flight": 48}, 1.5),
        ({"kv_use": 0.76, "in_flight": 8}, 0.8),
        ({"kv_use": 0.95}, 1.0),
        ({"kv_use": 0.1, "in_flight": 16}, 0.5),
        ({"waiting": 1, "in_flight": 8}, 0.25),
        ({"waiting": 4}, 0.8),
        ({"waiting": 5}, 1.0),
        ({"waiting": 8, "in_flight": 64, "kv_use": 1.0}, 2.0),
        ({"waiting": 15, "in_flight": 64, "kv_use": 1.0}, 3.0),
        ({"running": 32}, 0.0),
        ({"kv_use": nan, "in_flight": 8}, 0.25),
    ],
)
def test_saturation_is_the_worst_of_what_is_known(facts: dict[str, float], saturation: float) -> None:
    view = BackendView("b", sampled_at=10.0, **facts)  # type: ignore[arg-type]
    assert view.saturation(12.0) == pytest.approx(saturation)
    assert view.has_free_slot(12.0) == (saturation < 1.0)


def test_engine_figures_older_than_two_seconds_are_ignored() -> None:
    view = BackendView("b", in_flight=8, kv_use=0.9, waiting=6, sampled_at=10.0)
    assert view.saturation(12.0) > 1.0
    assert view.saturation(12.001) == 0.25
    assert not view.has_free_slot(12.0)
    assert view.has_free_slot(12.001)
    assert BackendView("never sampled", kv_use=0.9, waiting=5).saturation(0.0) == 0.0


@given(
    st.integers(0, 100),
    st.integers(1, 64),
    st.integers(0, 50),
    st.floats(0, 1),
    st.floats(0, 10),
)
def test_saturation_rises_with_each_of_its_parts(
    in_flight: int, slots: int, waiting: int, kv_use: float, age: float
) -> None:
    view = BackendView(
        "b", slots=slots, in_flight=in_flight, waiting=waiting, kv_use=kv_use, sampled_at=100.0 - age
    )
    before = view.saturation(100.0)
    assert before >= in_flight / slots
    view.in_flight += 1
    view.waiting += 1
    assert view.saturation(100.0) >= before


def test_the_load_of_a_request_is_prompt_and_answer() -> None:
    assert RequestFacts("r", "m", prompt_tokens=300, expected_tokens=200).tokens == 500


def test_a_policy_has_to_write_choose_only() -> None:
    class First(Policy):
        def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
            return Send(backends[0].name)

    policy, facts, view = First(), RequestFacts("r", "m"), BackendView("b")
    policy.dispatched(facts, view, 0.0)
    policy.first_token(facts, view, 0.0)
    policy.finished(Finished(facts, "b", Outcome.OK, 1.0))
    assert policy.needs == frozenset()
    assert policy.choose(facts, [view], 0.0) == Send("b")


def test_a_policy_need_not_inherit() -> None:
    class Own:
        needs: frozenset[str] = frozenset()

        def choose(self, request: object, backends: object, now: float) -> Decision:
            return Hold(now + 1.0)

        def dispatched(self, request: object, backend: object, now: float) -> None: ...

        def first_token(self, request: object, backend: object, now: float) -> None: ...

        def finished(self, finished: object) -> None: ...

    policy: Policy = Own()
    guarded = Guarded(policy, "own")
    assert guarded.decide(RequestFacts("r", "m"), [BackendView("b")], 1.0) == (Hold(2.0), "own")
    assert not guarded.failures


@pytest.mark.parametrize(
    "value",
    [
        RequestFacts("r", "m"),
        BackendView("b"),
        Send("b"),
        Hold(1.0),
        Reject("overloaded"),
        Finished(RequestFacts("r", "m"), "b", Outcome.OK, 0.0),
    ],
)
def test_values_hold_what_is_declared_and_nothing_else(value: object) -> None:
    with pytest.raises(AttributeError):
        value.surprise = 1  # type: ignore[attr-defined]
