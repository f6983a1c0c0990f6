from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from policies.base import BackendView, RequestFacts
from policies.match import Between, Match, Selector
from policies.overlap import disjoint, match_covers, selector_covers
from tests.policies.builders import backend, request

figures = st.sampled_from([0.5, 1.0, 2.0, 3.0])
bounds = st.none() | st.tuples(figures, figures).map(lambda pair: Between(min(pair), max(pair)))
labels = st.dictionaries(st.sampled_from(["sla", "task", "card"]), st.sampled_from("xy"), max_size=2)


def some(*values: str) -> st.SearchStrategy[frozenset[str]]:
    return st.frozensets(st.sampled_from(values), max_size=2)


selectors = st.builds(
    Selector,
    sites=some("local", "east", "west", "remote", "*"),
    backends=some("a", "b"),
    labels=labels,
    operators=some("x", "y"),
    price=bounds,
    price_input=bounds,
    price_output=bounds,
    carbon=bounds,
    rtt=bounds,
)
backends = st.builds(
    backend,
    name=st.sampled_from("abc"),
    site=st.sampled_from(["local", "east", "west", "north"]),
    labels=labels,
    operator=st.sampled_from(["", "x", "y"]),
    price_input=st.none() | figures,
    price_output=st.none() | figures,
    carbon_gco2_kwh=st.none() | figures,
    rtt_s=st.just(0.0) | figures,
)


@given(selectors, selectors, st.lists(backends, min_size=20, max_size=20))
def test_what_covers_a_set_has_all_of_it_and_disjoint_sets_nothing_in_common(
    one: Selector, other: Selector, views: list[BackendView]
) -> None:
    assert selector_covers(one, one)
    assert selector_covers(Selector(), one)
    assert disjoint(one, other) == disjoint(other, one)
    for view in views:
        if selector_covers(one, other):
            assert one.accepts(view) or not other.accepts(view)
        if disjoint(one, other):
            assert not (one.accepts(view) and other.accepts(view))


matches = st.builds(
    Match,
    tenants=some("t", "u"),
    data_classes=some("public", "internal"),
    min_priority=st.none() | st.integers(0, 2),
    labels=labels,
    sla=some("x", "y"),
    task=some("x", "y"),
    stream=st.none() | st.booleans(),
)
requests = st.builds(
    request,
    tenant=st.sampled_from("tu"),
    data_class=st.sampled_from(["public", "internal"]),
    priority=st.integers(0, 2),
    labels=labels,
    stream=st.booleans(),
)


@given(matches, matches, st.lists(requests, min_size=20, max_size=20))
def test_what_covers_a_condition_takes_all_of_its_requests(
    wide: Match, narrow: Match, asked: list[RequestFacts]
) -> None:
    assert match_covers(wide, wide)
    assert match_covers(Match(), wide)
    if match_covers(wide, narrow):
        assert all(wide.accepts(facts) or not narrow.accepts(facts) for facts in asked)


def test_what_keeps_sets_apart_is_named() -> None:
    pairs: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"sites": frozenset({"local"})}, {"sites": frozenset({"remote"})}, "site"),
        ({"sites": frozenset({"east"})}, {"sites": frozenset({"remote"})}, ""),
        ({"backends": frozenset("a")}, {"backends": frozenset("b")}, "backend"),
        ({"operators": frozenset("a")}, {"operators": frozenset("b")}, "operator"),
        ({"labels": {"card": "x"}}, {"labels": {"card": "y"}}, "labels"),
        ({"labels": {"card": "x"}}, {"labels": {"trust": "y"}}, ""),
        ({"price": Between(high=1.0)}, {"price": Between(low=1.5)}, "price"),
        ({"price_output": Between(high=1.0)}, {"price_output": Between(low=1.5)}, "price"),
        ({"price": Between(high=1.0)}, {"price_input": Between(low=1.5)}, ""),
        ({"carbon": Between(high=1.0)}, {"carbon": Between(low=1.0)}, ""),
        ({"rtt": Between(high=0.1)}, {"rtt": Between(low=0.2)}, "rtt"),
    ]
    for one, other, key in pairs:
        assert disjoint(Selector(**one), Selector(**other)) == key
