"""The record of one decision: what was asked, what was seen, what was answered.

It holds copies, so it can be kept, shown (`tidegate explain`) and replayed: `rebuild` makes the views again
that the policy saw, and the policy, asked again, gives the same answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from policies.base import BackendView, Decision, Policy, RequestFacts, Send
from policies.state import Lease

AVAILABILITY = "availability"
"""`decided_by` when no backend that may serve the request is available."""

HEDGE = "hedge"
"""`decided_by` of a second attempt for a first token that is late."""

TIERS = "tiers"
"""`decided_by` when no tier has room."""

SHARES = "shares"
"""`decided_by` when the free slots are kept for other tenants."""

STANDBY = "standby"
"""`decided_by` when no backend that may serve the request is available, and it is held for one that sleeps."""

WAIT_OVER = "wait over"
"""`decided_by` when a request was held long enough."""


class Candidate(NamedTuple):
    """The changing figures of one backend at the moment of a decision; the others are in the configuration.

    Units as in `BackendView`; `saturation` is derived from the rest.
    """

    name: str
    saturation: float
    in_flight: int
    in_flight_tokens: int
    slots: int
    ttft_s: float
    tpot_s: float
    rtt_s: float
    running: int
    waiting: int
    kv_use: float
    sampled_at: float
    prefilling: int
    prefill_tokens: int
    ttft_fit: tuple[float, ...]
    tpot_fit: tuple[float, ...]


def copy_figures(backend: BackendView, saturation: float) -> Candidate:
    # A named tuple's own constructor is a Python function, and this runs for every backend of every request.
    return tuple.__new__(
        Candidate,
        (
            backend.name,
            saturation,
            backend.in_flight,
            backend.in_flight_tokens,
            backend.slots,
            backend.ttft_s,
            backend.tpot_s,
            backend.rtt_s,
            backend.running,
            backend.waiting,
            backend.kv_use,
            backend.sampled_at,
            backend.prefilling,
            backend.prefill_tokens,
            backend.ttft_fit,
            backend.tpot_fit,
        ),
    )


def rebuild(candidates: Iterable[Candidate], configured: Mapping[str, BackendView]) -> Sequence[BackendView]:
    """The views a policy saw: configured facts (site, weight, price, labels) with the copied figures.

    KeyError: a candidate is not configured any more.
    """
    views = []
    for candidate in candidates:
        backend = configured[candidate.name]
        view = BackendView(**{field.name: getattr(backend, field.name) for field in fields(BackendView)})
        for figure in Candidate._fields:
            if figure != "saturation":
                setattr(view, figure, getattr(candidate, figure))
        view.available = True
        views.append(view)
    return views


@dataclass(slots=True)
class Routing:
    """What was decided for a request, and from what."""

    request: RequestFacts
    rule: str
    """Name of the rule that applied."""
    decision: Decision
    decided_by: str
    """The policy's name; or `constraints` (nothing may serve it), `availability` (nothing is up), `standby`
    (nothing is up, and a standby may be), `tiers` (no tier has room), `shares` (what is free is kept for other
    tenants, or others hold what is its own), `queue` (full, or others wait), `wait over` (held long enough: to any
    backend), `fallback` (after a failed attempt), `hedge` (besides one that is late), `policy failed` (the least
    loaded instead)."""
    policy: Policy | None = None
    """Hears how it goes; the lease carries it too."""
    tier: int = -1
    """Index of the tier that took or refused the request; -1: none did."""
    passed: tuple[float, ...] = ()
    """Saturation of the tiers that were asked and did not take it; inf: none of its backends was
    available."""
    spilling: bool = False
    """Whether the tier that took it, or one asked before, stood open."""
    removed: Mapping[str, str] | None = None
    """Backends that constraints, the rule or weight 0 removed, with the reason. Shared between decisions: not to be
    changed."""
    candidates: tuple[Candidate, ...] = ()
    """What the policy chose from. A feasible backend that is not here had no free slot, was not available,
    or is of another tier."""
    at: float = 0.0
    """Monotonic time of the decision."""
    held_s: float = 0.0
    """How long the request was held before."""
    waits: Mapping[int, str] | None = None
    """Tiers passed that have room, but whose policy asked to wait: index and reason."""
    failure: str = ""
    """Why the attempt failed that this decision led to; empty: it did not."""
    part: str = ""
    """The part of the rule's split whose backends it was decided among; empty: there is none."""
    lease: Lease | None = None
    """With a `Send` from the valve: load already counted; whoever gets it releases it."""


def because(why: str, send: Send) -> Send:
    """The same, with a reason in front of the policy's."""
    return Send(send.backend, send.fallbacks, f"{why}: {send.reason}", send.scores, send.propensity)
