from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import combinations

import orjson
import pytest

from benchmarks.conversations import LONGEST, UNIT_TOKENS, conversations
from benchmarks.open_loop import LEAST_PROMPT
from proxy.prompt_hashes import prompt_hashes
from sim.prefix_hashes import prefix_hashes
from sim.tokens import chat_pieces

BLOCK_TOKENS = 16
"""Of the emulator."""


def pieces(body: bytes) -> list[str]:
    """The tokens of its prompt."""
    return chat_pieces((one["role"], one["content"]) for one in orjson.loads(body)["messages"])


def common(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """How many leading ones are the same."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))


def test_a_body_has_the_tokens_that_it_is_said_to_have() -> None:
    asked = conversations(30, 4.0, 1)
    for body, arrival in zip(asked.bodies(), asked.workload, strict=True):
        assert len(pieces(body)) == arrival.prompt_tokens <= LONGEST + UNIT_TOKENS
        assert orjson.loads(body)["max_tokens"] == arrival.output_tokens


def test_simulator_proxy_and_engine_find_the_same_in_common() -> None:
    asked = conversations(40, 4.0, 1)
    bodies = asked.bodies()
    simulated = [arrival.hashes for arrival in asked.workload]
    seen = [prompt_hashes(body, b"salt") for body in bodies]
    engines = [prefix_hashes(pieces(body), BLOCK_TOKENS) for body in bodies]
    assert list(map(len, simulated)) == list(map(len, seen))
    shared = set()
    for a, b in combinations(range(len(bodies)), 2):
        units = common(simulated[a], simulated[b])
        assert common(seen[a], seen[b]) == units
        assert common(engines[a], engines[b]) == units * UNIT_TOKENS // BLOCK_TOKENS
        shared.add(units)
    assert {0, 1, 2, 3} <= shared, "some share nothing, some an application's prompt, some a conversation"


def test_a_turn_goes_on_from_the_one_before() -> None:
    arrivals = conversations(200, 4.0, 2).workload.arrivals
    later = 0
    for before, after in combinations(arrivals, 2):
        if before.session == after.session:
            later += 1
            assert after.hashes[: len(before.hashes)] == before.hashes
            assert after.prompt_tokens > before.prompt_tokens >= LEAST_PROMPT + UNIT_TOKENS
    assert later > 100


@pytest.mark.parametrize("seed", range(3))
def test_the_rate_is_exact_and_the_seed_makes_the_requests(seed: int) -> None:
    asked = conversations(101, 4.0, seed)
    assert len(asked.workload) == 101
    assert asked.workload.span == pytest.approx(25e6, abs=2)
    assert asked.workload.arrivals[0].at == 0
    assert asked == conversations(101, 4.0, seed)
    assert asked.workload.arrivals != conversations(101, 4.0, seed + 1).workload.arrivals
    assert asked.faster(2.0).workload.span == pytest.approx(12.5e6, abs=2)
    assert asked.faster(2.0).bodies() == asked.bodies()


def test_one_request_has_no_rate() -> None:
    with pytest.raises(ValueError, match="two requests at least"):
        conversations(1, 4.0, 1)
