from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from policies.match import Hours, Match
from policies.unmatched import why_not
from tests.policies.builders import request

CASES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"models": ("qwen*", "llama")}, {}, "its model is m, not qwen* or llama"),
    ({"tenants": frozenset({"vip", "acme"})}, {}, "its tenant is default, not acme or vip"),
    ({"data_classes": frozenset({"secret"})}, {}, "its data class is public, not secret"),
    ({"endpoints": frozenset({"score"})}, {}, "its endpoint is chat, not score"),
    ({"stream": True}, {}, "it is no stream"),
    ({"stream": False}, {"stream": True}, "it is a stream"),
    ({"min_priority": 2}, {"priority": 1}, "its priority is 1, below 2"),
    ({"max_priority": 2}, {"priority": 3}, "its priority is 3, above 2"),
    ({"min_prompt_tokens": 4000}, {"prompt_tokens": 9}, "its prompt in tokens is 9, below 4000"),
    ({"max_prompt_tokens": 8}, {"prompt_tokens": 9}, "its prompt in tokens is 9, above 8"),
    ({"labels": {"kind": "batch"}}, {}, "it has no label kind=batch"),
    ({"labels": {"kind": "batch"}}, {"labels": {"kind": "x"}}, "it has the label kind=x, not kind=batch"),
    ({"sla": frozenset({"gold", "silver"})}, {}, "it has no label sla=gold or sla=silver"),
    ({"sla": frozenset({"gold"})}, {"labels": {"sla": "x"}}, "it has the label sla=x, not sla=gold"),
    (
        {"task": frozenset({"chat"})},
        {"labels": {"task": "code"}},
        "it has the label task=code, not task=chat",
    ),
    ({"hours": Hours(60, 120)}, {"wall": 0.0}, "it is not the time"),
]


@pytest.mark.parametrize(("conditions", "facts", "said"), CASES)
def test_the_condition_that_fails_is_named(
    conditions: dict[str, Any], facts: dict[str, Any], said: str
) -> None:
    assert why_not(Match(**conditions), request(**facts)) == said


def test_every_condition_there_is_has_its_words() -> None:
    assert {name for conditions, *_ in CASES for name in conditions} == {one.name for one in fields(Match)}


def test_one_that_matches_has_no_reason() -> None:
    assert why_not(Match(), request()) == ""
    assert why_not(Match(models=("m*",), hours=Hours(60, 120)), request(wall=3600.0)) == ""
