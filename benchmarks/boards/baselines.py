"""What the authors of a published policy compared it with, where the registry does not have it."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from policies.base import BackendView, Decision, Policy, RequestFacts
from policies.ranking import Rank, Turns, best_first, only


class QueueAndBatch(Policy):
    """The least 4 * waiting + running: the internal balancer of vLLM's data parallel engines.

    LMetric (arXiv 2603.15202) was measured against it. vLLM's engines tell both ten times a second, and a client
    counts what it sends until they do. Here the router counts itself, always exactly: waiting are requests without
    a first token, running those with one. A request that is being prefilled counts as waiting, then.
    """

    def __init__(self, rng: Random) -> None:
        self._turns = Turns()

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        if len(backends) == 1:
            return only(backends[0])
        ranking: list[Rank] = []
        scores = {}
        for index, backend in enumerate(backends):
            name = backend.name
            scores[name] = score = float(3 * backend.prefilling + backend.in_flight)
            ranking.append((score, 0.0, self._turns[name], index, name))
        return best_first(ranking, f"least 4 * waiting + running of {len(ranking)}", scores)

    def dispatched(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        self._turns.took(backend.name)
