"""Decisions that the valve makes without a policy, and its refusals in words."""

from __future__ import annotations

from math import ceil
from typing import Final

from policies.base import Decision, Reject, RequestFacts, Send
from policies.candidates import Candidates
from policies.constraints import RETRY_AFTER_S
from policies.routing import WAIT_OVER, Routing, copy_figures
from policies.state import Fleet

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


def standbys(candidates: Candidates) -> str:
    """Those that sleep, in words."""
    names = candidates.asleep
    return f"standby {names[0]}" if len(names) == 1 else f"one of the standbys {', '.join(names)}"


def too_late(request: RequestFacts, candidates: Candidates, now: float) -> Routing:
    """Refused since its wait is over."""
    if request.deadline <= now:
        reason = "its deadline passed while it was held"
    elif candidates.asleep and not candidates.order:
        reason = f"{standbys(candidates)} was to be started for it, and was not ready in time"
    else:
        reason = "no backend had room for it while it was held"
    return undecided(request, candidates, Reject("queue_timeout", reason, RETRY_AFTER_S), WAIT_OVER, now)


def to_any(
    request: RequestFacts, candidates: Candidates, fleet: Fleet, decided_by: str, reason: str, now: float
) -> Routing:
    """To the least saturated of the available `candidates`, of which there is one at least."""
    figures = sorted(
        (
            copy_figures(backend, backend.saturation(now))
            for backend in map(fleet.__getitem__, candidates.order)
        ),
        key=lambda figure: figure.saturation,
    )
    names = tuple(figure.name for figure in figures)
    routing = undecided(request, candidates, Send(names[0], names[1:], reason), decided_by, now)
    routing.candidates = tuple(figures)
    return routing


def overflow(request: RequestFacts, candidates: Candidates, fleet: Fleet, now: float) -> Routing:
    """Its wait is over and there is no room: to the least saturated backend that is not too full for that, nor one
    that its tenant has more than its share of; else it is refused."""
    most = candidates.rule.queue.overflow
    crowded = frozenset(
        backend.name
        for backend in map(fleet.__getitem__, candidates.order)
        if backend.saturation(now) >= most
        or backend.shares.kept_from(request.tenant, request.priority, backend.slots, now) >= 0
    )
    left = candidates.without(crowded) if crowded else candidates
    if left.order:
        return to_any(request, left, fleet, WAIT_OVER, "held long enough", now)
    return too_late(request, candidates, now)


def overflow_room(candidates: Candidates, fleet: Fleet) -> float:
    """Requests that would be sent when their wait is over, though no slot has come free."""
    most = candidates.rule.queue.overflow
    backends = map(fleet.__getitem__, candidates.order)
    return sum(max(backend.slots * most - backend.in_flight, 0.0) for backend in backends)


def hopeless(request: RequestFacts, candidates: Candidates, wait: float, now: float) -> Routing:
    """Refused at once, since it would only wait to be refused later."""
    advice = min(max(wait, 1.0), MOST_ADVICE_S)
    reject = Reject("queue_full", f"it would wait for about {ceil(wait)} s", advice)
    return undecided(request, candidates, reject, "queue", now)


def queue_full(request: RequestFacts, candidates: Candidates, now: float) -> Routing:
    queue = candidates.rule.queue
    reject = Reject("queue_full", f"{queue.depth} requests wait already", max(queue.wait_s, 1.0))
    return undecided(request, candidates, reject, "queue", now)
