"""A policy that cannot take requests down with it.

Policies come from other people, and from training. One that raises, names a backend that it was not offered, or
answers with anything else that is no decision, costs its say in that decision and is counted; the request goes to
the least loaded backend instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from math import inf
from typing import Any

from policies.base import (
    REJECT_CODES,
    BackendView,
    Decision,
    Finished,
    Hold,
    Policy,
    Reject,
    RequestFacts,
    Send,
)

FAILED = "policy failed"
"""`decided_by` of decisions made in a policy's stead."""


class Guarded:
    """A policy with its name; itself a `Policy`."""

    __slots__ = (
        "_hears_dispatched",
        "_hears_finished",
        "by_prefix",
        "failures",
        "last_failure",
        "name",
        "needs",
        "policy",
    )

    def __init__(self, policy: Policy, name: str) -> None:
        self.policy = policy
        self.name = name
        self.needs = policy.needs
        self.by_prefix = "prefix" in policy.needs
        self._hears_dispatched = _overrides(policy, "dispatched")
        self._hears_finished = _overrides(policy, "finished")
        self.failures = 0
        """Calls that raised, or whose answer was none, since start."""
        self.last_failure = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> Guarded:
        """Said here, since what is compiled is not made without its arguments (as in `simple.py`)."""
        other = Guarded(deepcopy(self.policy, memo), self.name)
        other.failures, other.last_failure = self.failures, self.last_failure
        return other

    def decide(
        self, request: RequestFacts, backends: Sequence[BackendView], now: float
    ) -> tuple[Decision, str]:
        """The policy's decision and its name; on failure the least loaded backend and `policy failed`."""
        try:
            decision = self.policy.choose(request, list(backends), now)  # it may sort them
            if _is_answer(decision, backends):
                return decision, self.name
            self._count(f"not an answer here: {decision!r}")
        except Exception as error:
            self._count(f"{type(error).__name__}: {error}")
        idlest = min(backends, key=lambda backend: backend.in_flight / backend.slots)
        return Send(idlest.name, reason=f"{FAILED}: {self.last_failure}"), FAILED

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        return self.decide(request, backends, now)[0]

    def dispatched(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        if not self._hears_dispatched:
            return
        try:
            self.policy.dispatched(request, backend, now)
        except Exception as error:
            self._count(f"dispatched: {type(error).__name__}: {error}")

    def first_token(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        try:
            self.policy.first_token(request, backend, now)
        except Exception as error:
            self._count(f"first_token: {type(error).__name__}: {error}")

    def finished(self, finished: Finished) -> None:
        if not self._hears_finished:
            return
        try:
            self.policy.finished(finished)
        except Exception as error:
            self._count(f"finished: {type(error).__name__}: {error}")

    def _count(self, failure: str) -> None:
        self.failures += 1
        self.last_failure = failure


def _is_answer(decision: Decision, backends: Sequence[BackendView]) -> bool:
    """Whether a decision holds what is declared: whatever else it held would fail later, outside of the guard.

    May raise as well, as comparing None with a number does.
    """
    if type(decision) is Send:
        if type(decision.fallbacks) is not tuple or not isinstance(decision.scores, Mapping):
            return False
        for name in decision.fallbacks:
            if type(name) is not str:
                return False
        if type(decision.reason) is not str or not -inf < decision.propensity < inf:  # NaN neither
            return False
        for backend in backends:  # noqa: SIM110  runs for every request, and a generator costs thrice as much
            if backend.name == decision.backend:
                return True
        return False
    if type(decision) is Hold:
        return decision.until >= -inf and type(decision.reason) is str
    if type(decision) is Reject:
        pause = decision.retry_after_s
        return (
            decision.code in REJECT_CODES
            and type(decision.reason) is str
            and (pause is None or 0.0 <= pause < inf)
        )
    return False


def _overrides(policy: Policy, name: str) -> bool:
    """Whether the policy does anything there: most listen to nothing."""
    return getattr(type(policy), name, None) is not getattr(Policy, name)
