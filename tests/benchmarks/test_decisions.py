"""The benchmark of decisions runs over every policy, and its world is one in which there is something to decide."""

from __future__ import annotations

import pytest

import policies
from benchmarks import decisions


@pytest.mark.parametrize("policy", policies.names())
def test_every_policy_is_measured(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "ROUND", 20)
    run = decisions.measure(policy, 8, 1)
    assert run["choose_us"][0] > 0
    assert run["request_us"][0] > run["choose_us"][0]


def test_a_policy_that_fills_some_backends_still_decides_among_all() -> None:
    world = decisions.World("geo", 8)
    assert not all(backend.has_free_slot(world.now) for backend in world.fleet)
    assert all(backend.has_free_slot(world.now) for backend in world.candidates())
    assert len(world.candidates()) == 8


def test_its_world_is_half_busy_and_its_sessions_come_back() -> None:
    world = decisions.World("session-affinity", 8)
    assert sum(backend.in_flight for backend in world.fleet) == 8 * decisions.SLOTS // 2
    facts = [world.facts() for _ in range(1000)]
    assert len({one.prefix[0] for one in facts}) <= decisions.SESSIONS
