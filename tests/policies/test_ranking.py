from __future__ import annotations

from policies.base import BackendView, Send
from policies.ranking import REMEMBERED, Rank, Recent, Turns, best_first, least_first, only, with_weight


def test_the_one_noted_longest_ago_is_forgotten_first() -> None:
    recent: Recent[int] = Recent()
    for number in range(REMEMBERED):
        recent.note(f"b{number}", number)
    recent.note("b0", -1)
    recent.note("new", 7)
    assert len(recent) == REMEMBERED
    assert (recent.get("b0", 0), recent.get("new", 0)) == (-1, 7)
    assert recent.get("b1", -2) == -2


def test_who_never_had_a_turn_comes_before_all_others() -> None:
    turns = Turns()
    for name in ("a", "b", "a"):
        turns.took(name)
    assert sorted(["a", "b", "c"], key=turns.__getitem__) == ["c", "b", "a"]
    assert len(turns) == 2, "asking is not remembered"
    assert Turns()["a"] == 0, "turns are not shared"


def test_without_any_weight_all_count() -> None:
    heavy, light, none = (
        BackendView(name, weight=weight) for name, weight in (("h", 3.0), ("l", 0.1), ("n", 0.0))
    )
    assert with_weight([heavy, none, light]) == [heavy, light]
    assert with_weight([none]) == [none]


def test_a_ranking_becomes_an_answer() -> None:
    ranking: list[Rank] = [(2.0, 0.0, 0.0, 0, "c"), (1.0, 5.0, 0.0, 1, "b"), (1.0, 4.0, 9.0, 2, "a")]
    assert best_first(ranking, "why", {"a": 1.0}) == Send("a", ("b", "c"), "why", {"a": 1.0})
    assert only(BackendView("a")) == Send("a", (), "only candidate")


def test_costs_that_are_alike_go_by_saturation_and_then_by_turn() -> None:
    loads = {"a": 3, "b": 2, "c": 2, "d": 0, "e": 0, "f": 1}
    backends = [BackendView(name, in_flight=load) for name, load in loads.items()]
    costs = [1.0, 1.05, 1.1, 1.2, 1.3, 1.25]
    turns = Turns()
    turns.took("b")
    # 1 to 1.101 are alike, and so are 1.2 to 1.321, idle or not.
    send = least_first(backends, costs, turns, 0.0, "why")
    assert send == Send("c", ("b", "a", "d", "e", "f"), "why", dict(zip(loads, costs, strict=True)))
    last = [False, True, True, False, True, False]
    assert least_first(backends, costs, turns, 0.0, "why", last).fallbacks == ("d", "f", "c", "b", "e")
    assert least_first(backends, costs, turns, 0.0, "why", [True] * 6) == send
