from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random

import pytest

from policies.base import BackendView, Send
from policies.cache import CacheAware
from tests.policies.driver import request, views
from tests.policies.shared_prefixes import Run, members, shared_prefixes


def pool(*loads: tuple[int, int]) -> list[BackendView]:
    """One for each pair of requests in flight and slots."""
    return [BackendView(f"b{i}", in_flight=load, slots=slots) for i, (load, slots) in enumerate(loads)]


def decide(policy: CacheAware, backends: Sequence[BackendView], id: str = "r", **cached: int) -> Send:
    decision = policy.choose(request(id, prompt_tokens=1000, cached=cached), backends, 0.0)
    assert isinstance(decision, Send)
    return decision


def test_it_needs_prefixes() -> None:
    assert CacheAware(Random(0)).needs == {"prefix"}


@pytest.mark.parametrize(
    ("loads", "balanced"),
    [
        # As published, with 256 slots each: most - least > 64 and most > 1.5 * least.
        (((69, 256), (5, 256), (20, 256)), True),
        (((70, 256), (5, 256), (20, 256)), False),
        (((200, 256), (135, 256)), True),  # 65 more, but 1.48 times as many
        (((202, 256), (135, 256)), True),
        (((203, 256), (135, 256)), False),
        # Ours: the same difference of load with other slots.
        (((8, 32), (0, 32)), True),
        (((9, 32), (0, 32)), False),
        (((20, 32), (128, 256)), True),  # 108 less in flight, and more load
        (((8, 8), (128, 256)), False),
        (((64, 512), (0, 512)), True),
    ],
)
def test_load_counts_alone_when_it_is_imbalanced(loads: tuple[tuple[int, int], ...], balanced: bool) -> None:
    """`b0`, the busiest, has all of the prompt."""
    send = decide(CacheAware(Random(0)), pool(*loads), b0=999)
    assert send.backend == ("b0" if balanced else "b1")
    reason = "has 100% of the prompt cached" if balanced else f"imbalanced: shortest queue of {len(loads)}"
    assert send.reason == reason


def test_the_shortest_queue_is_over_slots() -> None:
    send = decide(CacheAware(Random(0)), pool((20, 32), (40, 256), (10, 32)), b0=900)
    assert (send.backend, send.fallbacks) == ("b1", ("b2", "b0"))
    assert send.scores == {"b0": 0.625, "b1": 0.15625, "b2": 0.3125}


def test_thresholds_are_parameters() -> None:
    loads = pool((4, 32), (1, 32))
    assert decide(CacheAware(Random(0)), loads, b0=900).backend == "b0"
    assert decide(CacheAware(Random(0), balance_abs_threshold=23.0), loads, b0=900).backend == "b1"
    assert decide(CacheAware(Random(0), balance_abs_threshold=24.0), loads, b0=900).backend == "b0"
    strict = CacheAware(Random(0), balance_abs_threshold=8.0, balance_rel_threshold=4.0)
    assert decide(strict, loads, b0=900).backend == "b0"


@pytest.mark.parametrize(("tokens", "matches"), [(300, False), (301, True)])
def test_a_match_has_to_cover_enough(tokens: int, matches: bool) -> None:
    send = decide(CacheAware(Random(0)), pool((3, 32), (1, 32), (2, 32)), b0=tokens)
    assert send.backend == ("b0" if matches else "b1")
    assert send.reason == ("has 30% of the prompt cached" if matches else "most room in its cache, of 3")


def test_the_best_match_is_taken_and_ties_go_by_load() -> None:
    policy = CacheAware(Random(0))
    send = decide(policy, pool((1, 32), (3, 32), (2, 32)), b0=400, b1=600, b2=600)
    assert (send.backend, send.fallbacks) == ("b2", ("b1", "b0"))
    assert send.scores == {"b0": 0.4, "b1": 0.6, "b2": 0.6}


def test_new_prompts_fill_caches_by_their_room() -> None:
    """A cache with ten times the room gets ten times the tokens."""
    policy, backends = CacheAware(Random(0)), views(2)
    backends[0].kv_tokens, backends[1].kv_tokens = 100_000, 10_000
    got: Counter[str] = Counter()
    for number in range(110):
        chosen = decide(policy, backends, f"r{number}").backend
        got[chosen] += 1
        facts = request(f"r{number}", prompt_tokens=1000)
        policy.dispatched(facts, backends[int(chosen[1:])], 0.0)
    assert abs(got["b0"] - 100) <= 1


def test_only_what_is_new_fills_a_cache() -> None:
    policy, backends = CacheAware(Random(0)), views(2, kv_tokens=10_000)
    policy.dispatched(request("a", prompt_tokens=1000, cached={"b0": 900}), backends[0], 0.0)
    policy.dispatched(request("b", prompt_tokens=300), backends[1], 0.0)
    send = decide(policy, backends)
    assert send.backend == "b0"
    assert send.scores == pytest.approx({"b0": 0.01, "b1": 0.03})


def test_a_backend_that_comes_back_is_not_flooded() -> None:
    """It gets its share of what is new from now on, though the others have had a hundred prompts more."""
    policy, backends = CacheAware(Random(0)), views(3, kv_tokens=100_000)
    got: Counter[str] = Counter()
    for number in range(230):
        present = backends[:2] if number < 200 else backends
        chosen = decide(policy, present, f"r{number}").backend
        policy.dispatched(request(f"r{number}", prompt_tokens=1000), backends[int(chosen[1:])], 0.0)
        got[chosen] += number >= 200
    assert got == {"b0": 10, "b1": 10, "b2": 10}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"cache_threshold": 1.1}, "cache_threshold must be between 0 and 1, not 1.1"),
        ({"balance_abs_threshold": -1.0}, "balance_abs_threshold must be at least 0, not -1"),
        ({"balance_rel_threshold": 0.5}, "balance_rel_threshold must be at least 1, not 0.5"),
    ],
)
def test_parameters_are_checked(parameters: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CacheAware(Random(0), **parameters)


def test_prompts_find_what_is_cached() -> None:
    """40 beginnings of 4096 tokens, 4 caches with room for 19 each: 88 % of all prompt tokens come out of a cache,
    with least-load 42 %; 95 of 100 first tokens within 0.5 s instead of 2.4 s."""
    load = shared_prefixes(8.0)
    runs = [Run(pick, load, members(32, 32, 32, 32)) for pick in ("cache-aware", "least-load")]
    found, spread = [run.hit_share for run in runs]
    assert found > 0.85
    assert spread < 0.5
    assert runs[0].ttft_s(0.95) < 0.5 * runs[1].ttft_s(0.95)
