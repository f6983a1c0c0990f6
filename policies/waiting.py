"""Who waits, summed over the valve's queues."""

from __future__ import annotations

from collections.abc import Iterable

from policies.fairness import FairQueue, Waiting
from policies.rules import RuleSet
from policies.state import Fleet


def by_tenant(queues: Iterable[FairQueue]) -> dict[str, int]:
    """Requests by tenant."""
    counts: dict[str, int] = {}
    for queue in queues:
        for tenant, count in queue.tenants.items():
            counts[tenant] = counts.get(tenant, 0) + count
    return counts


def by_model(queues: Iterable[FairQueue]) -> Waiting:
    """Requests and their tokens, by model."""
    sums: Waiting = {}
    for queue in queues:
        for model, (count, tokens) in queue.models.items():
            before = sums.get(model, (0, 0))
            sums[model] = (before[0] + count, before[1] + tokens)
    return sums


def for_standbys(
    queues: Iterable[FairQueue], rules: RuleSet, fleet: Fleet
) -> list[tuple[frozenset[str], int, float]]:
    """For every queue of requests that nothing but standbys may serve: which ones, how many wait, and their
    tokens."""
    found = []
    for queue in queues:
        candidates = rules.candidates(queue.first(), fleet)  # the same for all that are in it
        if candidates.asleep and not candidates.order:
            tokens = sum(tokens for _, tokens in queue.models.values())
            found.append((frozenset(candidates.asleep), len(queue), float(tokens)))
    return found
