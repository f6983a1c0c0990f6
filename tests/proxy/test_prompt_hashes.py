"""Hashes of how prompts begin."""

from __future__ import annotations

import orjson
import pytest

from proxy.prompt_hashes import BLOCKS, prompt_hashes
from tests.proxy.fakes import World


def body(text: str, **fields: object) -> bytes:
    return orjson.dumps({**fields, "messages": [{"role": "user", "content": text}]})


def test_equal_beginnings_share_hashes_whatever_stands_before_the_prompt() -> None:
    first = prompt_hashes(body("a" * 5000 + "b" * 5000, model="m"), b"salt")
    second = prompt_hashes(body("a" * 5000 + "c" * 5000, model="another", temperature=0.1), b"salt")
    assert len(first) == 4
    assert first[:2] == second[:2]
    assert not set(first[2:]) & set(second[2:])


def test_salts_share_nothing() -> None:
    raw = body("a" * 9000)
    assert not set(prompt_hashes(raw, b"one")) & set(prompt_hashes(raw, b"other"))


def test_short_ones_have_none_and_long_ones_have_an_end() -> None:
    assert prompt_hashes(body("a" * 100), b"") == ()
    assert len(prompt_hashes(body("a" * 2_000_000), b"")) <= BLOCKS + 1
    assert all(0 <= one < 2**63 for one in prompt_hashes(body("a" * 9000), b""))


@pytest.mark.parametrize(
    ("needs", "hashed"), [({"prefix"}, True), ({"hashes"}, True), ({"speed"}, False), (set(), False)]
)
def test_a_request_has_them_before_it_is_decided_where_a_policy_needs_them(
    needs: set[str], hashed: bool
) -> None:
    world = World("a")
    world.runtime.fleet.see_to(frozenset(needs))
    raw = body("a" * 9000, model="m")
    facts = world.start(raw=raw).facts
    assert facts is not None
    assert facts.prefix == (prompt_hashes(raw, world.runtime.salt) if hashed else ())
