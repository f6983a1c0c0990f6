"""What a backend has cached: the index against a cache that keeps whole prompts, and what fleet and rules make of
it."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from policies.base import BackendView, Decision, Outcome, Policy, RequestFacts, Send
from policies.prefixes import MOST_BLOCKS, Prefixes
from policies.rule import Rule
from policies.rules import RuleSet
from policies.state import Backend, Fleet
from policies.valve import Valve
from tests.policies.driver import request


def prompt(*pieces: int) -> tuple[int, ...]:
    """Chained hashes, as a prompt of these pieces has them."""
    hashes = [0]
    for piece in pieces:
        hashes.append(hash((hashes[-1], piece)))
    return tuple(hashes[1:])


prompts = st.lists(st.integers(0, 2), min_size=1, max_size=8).map(lambda pieces: prompt(*pieces))


@given(st.lists(prompts, max_size=30), prompts, st.integers(1, 12))
def test_law_it_matches_as_an_engine_that_evicts_from_the_tail(
    before: list[tuple[int, ...]], asked: tuple[int, ...], room: int
) -> None:
    prefixes, cache = Prefixes(), list[int]()
    for hashes in before:
        prefixes.note(hashes, room)
        for one in reversed(hashes):
            if one in cache:
                cache.remove(one)
            cache.append(one)
        cache = cache[-room:]
    there = 0
    while there < len(asked) and asked[there] in cache:
        there += 1
    assert prefixes.matching(asked) == there
    assert len(prefixes) <= room


def test_what_does_not_fit_is_forgotten_from_its_end() -> None:
    prefixes = Prefixes()
    prefixes.note(prompt(1, 2, 3, 4), 3)
    assert prefixes.matching(prompt(1, 2, 3, 4)) == 3
    prefixes.note(prompt(*range(MOST_BLOCKS + 10)), 10 * MOST_BLOCKS)
    assert len(prefixes) == MOST_BLOCKS
    prefixes.clear()
    assert prefixes.matching(prompt(1)) == 0
    assert prefixes.matching(()) == 0


class Warmest(Policy):
    """Where most of the prompt is cached; else the first."""

    def __init__(self, rng: Random) -> None:
        self.needs = frozenset({"prefix"})

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        best = min(backends, key=lambda backend: request.new_tokens(backend.name))
        return Send(best.name, reason="warmest")


def facts(id: str, *pieces: int) -> RequestFacts:
    return request(id, prefix=prompt(*pieces), prefix_tokens=100, prompt_tokens=100 * len(pieces) + 50)


def test_a_policy_that_needs_it_sees_where_what_is_cached() -> None:
    models = frozenset({"m"})
    fleet = Fleet([Backend("a", models=models), Backend("b", models=models, kv_tokens=250)])
    valve = Valve(RuleSet([Rule("all", Warmest(Random(1)), "warmest")]), fleet)
    first = valve.submit(facts("1", 1, 2), 1.0)
    assert (first.lease and first.lease.backend.name) == "a"
    assert fleet["a"].prefill_tokens == 250
    again = facts("2", 1, 2, 3)
    fleet.lease(facts("x", 1, 2, 3), "b", 1.0)
    second = valve.submit(again, 1.0)
    assert again.cached == {"a": 200, "b": 200}  # b has room for two of the three
    assert second.lease is not None
    assert second.lease.prefill_tokens == 150
    assert (fleet["a"].prefilling, fleet["a"].prefill_tokens) == (2, 400)
    fleet.first_token(second.lease, 2.0)
    assert (fleet["a"].prefilling, fleet["a"].prefill_tokens) == (1, 250)
    fleet.release(second.lease, Outcome.OK, 3.0)
    assert first.lease is not None
    fleet.release(first.lease, Outcome.FAILED, 3.0)
    assert (fleet["a"].prefilling, fleet["a"].prefill_tokens, fleet["a"].in_flight) == (0, 0, 0)
    whole = facts("3", 1, 2, 3)
    whole.prompt_tokens = 300
    assert fleet["a"].cached_tokens(whole) == 299  # the last token is always computed
    fleet["a"].probed(False, 4.0)
    fleet["a"].probed(True, 5.0)
    assert fleet["a"].cached_tokens(whole) == 0


def test_nothing_is_kept_for_policies_that_need_nothing() -> None:
    fleet = Fleet([Backend("a", models=frozenset({"m"}))])
    valve = Valve(RuleSet([Rule("all", Warmest(Random(1)), "warmest")]), fleet)
    assert fleet["a"].prefixes is not None
    plain = Rule("all", Warmest(Random(1)), "warmest")
    plain.guarded.needs = frozenset()
    valve.swap(RuleSet([plain]), 1.0)
    assert fleet["a"].prefixes is None
    assert fleet["a"].cached_tokens(facts("1", 1)) == 0
