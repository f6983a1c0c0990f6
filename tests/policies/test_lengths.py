"""Lengths of answers, forecast."""

from __future__ import annotations

from policies.lengths import EXPECTED_TOKENS, REMEMBERED, Lengths
from tests.policies.driver import request


def test_what_nothing_is_known_of_is_usual() -> None:
    lengths = Lengths()
    assert lengths.expected("t", "m") == EXPECTED_TOKENS
    assert lengths.expected("t", "m", limit=16) == 16


def test_a_tenant_comes_from_its_models_mean_to_its_own() -> None:
    lengths = Lengths()
    for _ in range(400):
        lengths.note("reports", "m", 1000)
    assert 850 < lengths.expected("new", "m") < 1000
    lengths.note("chat", "m", 20)
    assert 700 < lengths.expected("chat", "m") < 1000
    for _ in range(200):
        lengths.note("chat", "m", 20)
    assert lengths.expected("chat", "m") < 60
    assert lengths.expected("reports", "m") > 900
    assert lengths.expected("reports", "other") == EXPECTED_TOKENS


def test_it_follows_what_changes() -> None:
    lengths = Lengths()
    for tokens in [100] * 1000 + [500] * 1000:
        lengths.note("t", "m", tokens)
    assert 480 <= lengths.expected("t", "m") <= 500


def test_memory_is_bounded() -> None:
    lengths = Lengths()
    for number in range(3 * REMEMBERED):
        lengths.note(f"t{number}", f"m{number}", 10)
    assert len(lengths) == 2 * REMEMBERED
    assert request().expected_tokens == 100
