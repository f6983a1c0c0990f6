"""Weights of a rule in place of those of the configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy

from policies.base import BackendView, Decision, Finished, Policy, RequestFacts


class WithWeights(Policy):
    """A policy that sees some backends, by name, with other weights. Costs a copy of those at every decision."""

    def __init__(self, policy: Policy, weights: Mapping[str, float]) -> None:
        self.policy = policy
        self.weights = weights
        self.needs = policy.needs

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        return self.policy.choose(request, [self._seen(backend) for backend in backends], now)

    def dispatched(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        self.policy.dispatched(request, self._seen(backend), now)

    def first_token(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        self.policy.first_token(request, self._seen(backend), now)

    def finished(self, finished: Finished) -> None:
        self.policy.finished(finished)

    def _seen(self, backend: BackendView) -> BackendView:
        weight = self.weights.get(backend.name)
        if weight is None:
            return backend
        seen = copy(backend)
        seen.weight = weight
        return seen
