from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.base import BackendView, RequestFacts
from policies.constraints import feasible, least_context
from tests.policies.builders import backend, request

PUBLIC = frozenset({"public"})


def code(facts: RequestFacts, *backends: BackendView) -> str:
    refusal = feasible(facts, backends).refusal
    return refusal.code if refusal else ""


def test_a_model_is_served_under_its_exact_name_only() -> None:
    named = [backend("a"), backend("b", models=frozenset({"M"})), backend("c", models=frozenset({"m2"}))]
    found = feasible(request(), named)
    assert [view.name for view in found.backends] == ["a"]
    assert found.removed == {"b": "does not serve m", "c": "does not serve m"}


def test_a_backend_whose_models_are_unknown_is_out_for_that_and_keeps_the_door_open_if_they_may_come() -> (
    None
):
    facts = {"models": frozenset(), "models_unknown": "GET /v1/models: 401"}
    refusing, asked, other = backend("x", **facts), backend("y", **facts, models_awaited=True), backend("z")
    found = feasible(request(), [refusing, other])
    assert found.removed == {"x": "models unknown: GET /v1/models: 401"}
    assert code(request(model="n"), refusing, other) == "model_not_found"
    assert code(request(model="n"), refusing, asked, other) == "no_backend"
    shut = backend("shut", data_classes=PUBLIC)  # it has the model: no news can make that one fit
    assert code(request(data_class="restricted"), asked, shut) == "data_class"


def test_a_data_class_nobody_named_stays_out() -> None:
    sites = [
        backend("local"),
        backend("open", data_classes=PUBLIC),
        backend("shut", data_classes=frozenset()),
    ]
    found = feasible(request(data_class="invented yesterday"), sites)
    assert [view.name for view in found.backends] == ["local"]
    assert found.removed["open"] == "open does not accept data class invented yesterday"


@pytest.mark.parametrize(
    ("prompt_tokens", "max_tokens", "fits"),
    [(0, 100, True), (0, 101, False), (200, 0, True), (201, 0, True), (202, 0, False), (100, 51, False)],
)
def test_only_what_is_clearly_too_long_is_removed(prompt_tokens: int, max_tokens: int, fits: bool) -> None:
    facts = request(prompt_tokens=prompt_tokens, max_tokens=max_tokens)
    found = feasible(facts, [backend("a", context_tokens={"m": 100})])
    assert fits == bool(found.backends)


def test_a_context_limit_holds_for_its_model_only() -> None:
    assert feasible(request(max_tokens=10**9), [backend("a", context_tokens={"other": 10})]).backends


def test_the_refusal_is_named_after_the_check_that_the_best_of_them_failed() -> None:
    absent = backend("absent", models=frozenset())
    shut = backend("shut", data_classes=PUBLIC)
    short = backend("short", context_tokens={"m": 8})
    restricted = request(data_class="restricted", max_tokens=9)
    assert code(request()) == "model_not_found"
    assert code(restricted, absent) == "model_not_found"
    assert code(restricted, shut, absent) == "data_class"
    refusal = feasible(restricted, [shut, absent]).refusal
    assert refusal is not None
    assert refusal.reason == (
        "no site with the model 'm' accepts data class 'restricted', "
        "which this request has by its API key ('public' without one)"
    )
    assert code(restricted, absent, short, shut) == "context_length"
    assert code(restricted, short, backend("good"), shut) == ""


def test_a_request_that_is_too_long_is_told_the_longest_context() -> None:
    views = [
        backend("a", context_tokens={"m": 100}),
        backend("b", context_tokens={"m": 400}),
        backend("c", context_tokens={"m": 900}, data_classes=frozenset()),
    ]
    found = feasible(request(max_tokens=500), views)
    assert found.removed["b"] == "too long for its context of 400 tokens"
    assert found.refusal is not None
    assert found.refusal.reason == "prompt and answer do not fit the longest context of 'm', 400 tokens"
    # Requests of one length bucket share one answer.
    assert feasible(request(max_tokens=800), views)[1:] == found[1:]


def test_a_rule_that_allows_none_of_them_hides_the_model() -> None:
    found = feasible(request(), [backend("a")], lambda view: False, "home")
    assert found.removed == {"a": "not among the backends of rule 'home'"}
    assert found.refusal is not None
    assert found.refusal.code == "model_not_found"


names = st.sampled_from(["public", "internal", "restricted"])
backends = st.lists(
    st.builds(
        backend,
        name=st.uuids().map(str),
        models=st.frozensets(st.sampled_from(["m", "n"])),
        data_classes=st.none() | st.frozensets(names),
        context_tokens=st.dictionaries(st.sampled_from(["m", "n"]), st.integers(1, 50)),
        available=st.booleans(),
    ),
    max_size=6,
)
requests = st.builds(
    request, data_class=names, prompt_tokens=st.integers(0, 100), max_tokens=st.integers(0, 60)
)


@given(requests, backends)
def test_every_backend_is_kept_or_removed_with_a_reason(
    facts: RequestFacts, views: list[BackendView]
) -> None:
    found = feasible(facts, views)
    kept = [view.name for view in found.backends]
    assert [view.name for view in views if view.name not in found.removed] == kept
    assert all(found.removed.values())
    assert (found.refusal is None) == bool(kept)
    for view in found.backends:
        assert facts.model in view.models
        assert view.data_classes is None or facts.data_class in view.data_classes
        assert least_context(facts) <= view.context_tokens.get("m", 10**9)
