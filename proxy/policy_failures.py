"""Policies that fail while they decide: counted, and said in the log.

No request is lost to one (`policies/guarded.py`), so nobody but the log and the figures would tell.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from math import inf
from typing import Any, Final

from policies.guarded import Guarded
from policies.rule import Rule
from policies.rules import RuleSet

log = logging.getLogger("tidegate")

TOLD_EVERY_S: Final = 60.0
"""How often a policy that goes on failing gets a line."""
_MOST_CHARACTERS: Final = 300


class PolicyFailures:
    """Those of one process, over all reloads."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], int] = {}
        """Calls that raised, or whose answer was none, by rule and policy."""
        self._seen: dict[Guarded, int] = {}
        self._told: dict[tuple[str, str], float] = {}

    def look(self, rules: RuleSet, now: float) -> None:
        """Count what is new; called a few times a second."""
        seen: dict[Guarded, int] = {}
        for rule, guard in _guards(rules):
            seen[guard] = guard.failures
            if new := guard.failures - self._seen.get(guard, 0):
                key = (rule.name, guard.name)
                self.counts[key] = self.counts.get(key, 0) + new
                if now - self._told.get(key, -inf) >= TOLD_EVERY_S:
                    self._told[key] = now
                    count = self.counts[key]
                    log.error("%s", failure_in_words(rule.name, guard.name, count, guard.last_failure))
        self._seen = seen


def failing(rules: RuleSet) -> list[dict[str, Any]]:
    """Policies that have failed since the rules were read, for `/state`."""
    return [
        {"rule": rule.name, "policy": guard.name, "failures": guard.failures, "last": guard.last_failure}
        for rule, guard in _guards(rules)
        if guard.failures
    ]


def failure_in_words(rule: str, policy: str, failures: int, last: str) -> str:
    """One line: the message is somebody else's."""
    calls = "1 call" if failures == 1 else f"{failures:,} calls"
    said = " ".join(last.split())[:_MOST_CHARACTERS]
    return (
        f"policy {policy} of rule '{rule}' failed in {calls}, the least loaded backend chosen instead: {said}"
    )


def _guards(rules: RuleSet) -> Iterator[tuple[Rule, Guarded]]:
    """Every policy once."""
    for rule in rules.rules:
        for guard in dict.fromkeys((rule.guarded, *rule.choosers)):
            yield rule, guard
