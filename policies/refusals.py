"""Decisions that the valve makes without a policy, and its refusals in words."""

from __future__ import annotations

from math import ceil
from typing import Final

from policies.base import Decision, Reject, RequestFacts, Send
from policies.candidates import Candidates
from policies.routing import Routing

MOST_ADVICE_S: Final = 60.0
"""Longest `Retry-After` by forecast."""


def undecided(
    request: RequestFacts, candidates: Candidates, decision: Decision, decided_by: str, now: float
) -> Routing:
    """A decision that no policy made; the policy of the tier that it falls to hears of it all the same."""
    rule = candidates.rule
    tier = candidates.tier_of[decision.backend] if isinstance(decision, Send) else -1
    policy = rule.choosers[tier] if tier >= 0 else rule.guarded
    removed, part = candidates.removed, candidates.part
    return Routing(request, rule.name, decision, decided_by, policy, tier, removed=removed, at=now, part=part)


def hopeless(request: RequestFacts, candidates: Candidates, wait: float, now: float) -> Routing:
    """Refused at once, since it would only wait to be refused later."""
    advice = min(max(wait, 1.0), MOST_ADVICE_S)
    reject = Reject("queue_full", f"it would wait for about {ceil(wait)} s", advice)
    return undecided(request, candidates, reject, "queue", now)


def queue_full(request: RequestFacts, candidates: Candidates, now: float) -> Routing:
    queue = candidates.rule.queue
    reject = Reject("queue_full", f"{queue.depth} requests wait already", max(queue.wait_s, 1.0))
    return undecided(request, candidates, reject, "queue", now)
