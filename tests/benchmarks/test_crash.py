"""The judge of the crash benchmark finds every broken promise, and only those."""

from __future__ import annotations

from typing import Any

from benchmarks.client import Heard
from benchmarks.crash import Verdict, judge

KILLED_AT = 100.0


def row(op: str, completion: int, prompt: int = 10, **more: Any) -> dict[str, Any]:
    """A row of the ledger."""
    tokens = {"prompt_tokens": prompt, "completion_tokens": completion}
    return {"op": op, "overhead_prompt_tokens": 0, "overhead_completion_tokens": 0, **tokens, **more}


def sent(op: str, seed: int, tokens: int) -> dict[str, Any]:
    """What a backend sent for a request."""
    return {"request_id": op, "seed": seed, "prompt_tokens": 10, "tokens": tokens}


def heard(seed: int, *before_the_kill: float) -> Heard:
    """What a client read, each token so many seconds before the kill."""
    return Heard(seed, token_at=[KILLED_AT - age for age in before_the_kill])


def test_a_complete_ledger_is_good() -> None:
    verdict = judge([heard(7, 3.0, 2.0, 0.5)], [sent("a", 7, 4)], [row("a", 3)], KILLED_AT)
    assert verdict.good
    assert (verdict.requests, verdict.delivered, verdict.kept, verdict.recent) == (1, 3, 3, 0)


def test_tokens_of_the_last_second_may_be_missing() -> None:
    verdict = judge([heard(7, 3.0, 0.9, 0.5)], [sent("a", 7, 4)], [row("a", 1)], KILLED_AT)
    assert verdict.good
    assert verdict.recent == 2
    assert round(verdict.oldest_lost_s, 6) == 0.9


def test_an_older_token_must_not_be_missing() -> None:
    verdict = judge([heard(7, 3.0, 1.5, 0.5)], [sent("a", 7, 4)], [row("a", 1)], KILLED_AT)
    assert not verdict.good
    assert (verdict.missing, verdict.recent) == (1, 1)
    assert "seed 7" in verdict.details[0]


def test_a_request_without_a_row_has_lost_everything() -> None:
    verdict = judge([heard(7, 2.0, 2.0)], [sent("a", 7, 2)], [], KILLED_AT)
    assert (verdict.missing, verdict.kept) == (2, 0)


def test_an_operation_must_not_be_in_the_ledger_twice() -> None:
    verdict = judge([], [sent("a", 7, 2)], [row("a", 2), row("a", 2)], KILLED_AT)
    assert not verdict.good
    assert verdict.twice == 1


def test_the_ledger_must_not_hold_more_than_was_sent() -> None:
    assert judge([], [sent("a", 7, 2)], [row("a", 3)], KILLED_AT).excess == 1
    assert judge([], [sent("a", 7, 2)], [row("a", 2, prompt=12)], KILLED_AT).excess == 2
    assert judge([], [sent("a", 7, 2)], [row("a", 2, overhead_completion_tokens=1)], KILLED_AT).excess == 1
    assert judge([], [], [row("invented", 5, prompt=0)], KILLED_AT).excess == 5


def test_two_attempts_of_one_request_are_one_row() -> None:
    entries = [sent("a", 7, 0), sent("a", 7, 3)]
    rows = [row("a", 3, overhead_prompt_tokens=10)]
    verdict = judge([heard(7, 2.0, 2.0, 2.0)], entries, rows, KILLED_AT)
    assert verdict.good


def test_rounds_add_up() -> None:
    total = Verdict()
    total.add(Verdict(requests=1, delivered=5, oldest_lost_s=0.5))
    total.add(Verdict(requests=2, delivered=6, missing=1, oldest_lost_s=0.2, details=["x"]))
    assert (total.requests, total.delivered, total.missing, total.oldest_lost_s) == (3, 11, 1, 0.5)
    assert not total.good
    assert total.details == ["x"]
