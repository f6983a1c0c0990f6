"""One recent request explained: its record, and what the proxy knows besides, in words.

The record holds what a decision was made from. Which backends were not among its candidates follows from the
rule; why one of them was not available is told by its state now, which is what it was then if it has not
changed since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import inf
from typing import Any, Final, Protocol

from policies.explain import tier_in_words
from policies.files import CompiledPolicy
from policies.routing import AVAILABILITY, Routing
from policies.state import Backend, Fleet
from policies.valve import Valve
from proxy import records
from proxy.observe import Record
from proxy.records import Row
from proxy.runtime import Runtime
from proxy.scaling.wake import Waker


class HasPolicy(Protocol):
    """What was made of a configuration, as far as it matters here."""

    @property
    def policy(self) -> CompiledPolicy: ...


class Deciding(Protocol):
    """What decides, as far as it is looked at: a running proxy, or one that is only imagined (`idle.py`)."""

    @property
    def now(self) -> Callable[[], float]: ...

    @property
    def fleet(self) -> Fleet: ...

    @property
    def valve(self) -> Valve: ...

    @property
    def built(self) -> HasPolicy: ...

    @property
    def probes(self) -> Callable[[], Mapping[str, Any]]: ...

    @property
    def scaling(self) -> Waker | None: ...


WHY: Final[dict[str, str]] = {
    "model_not_allowed": "the key does not list this model",
    "idempotency_running": "the first request with its Idempotency-Key was still running",
    "idempotency_spent": "a request with its Idempotency-Key had been done, and its answer is not kept",
    "idempotency_mismatch": "its Idempotency-Key had been sent with another request",
    "model_not_found": "no backend that the rule allows serves this model",
    "data_class": "no site that serves this model accepts the request's data class",
    "context_length": "it is longer than the context of every backend that could serve it",
    "no_backend": "every backend that may serve it was down, or it is not known yet what they serve",
    "overloaded": "every backend that may serve it had asked for a pause, or the proxy itself had no room",
    "queue_full": "as many requests as the rule's queue holds were waiting",
    "queue_timeout": "it was held for as long as its deadline, `wait` or `cold_start` allows",
    "backend_unreachable": "no connection to the backend could be made",
    "backend_reset": "the backend closed the connection before its answer was complete",
    "backend_protocol": "what the backend sent was no well-formed answer",
    "backend_error": "the backend answered with an error",
    "backend_auth": "the backend refused the key that the configuration gives it",
    "backend_timeout": "the backend was silent for too long, or the request took too long (`timeouts`)",
    "ledger_unavailable": "usage could not be recorded, so nothing is served",
    "shutting_down": "the proxy was stopping",
    "internal": "a fault of the proxy's own: see its log",
}
"""Why a request was refused or cut, by the code of its error."""


def explanation(runtime: Runtime, record: Record) -> dict[str, Any]:
    """What `GET /explain/{id}` answers."""
    shown = record.explain()
    tried: dict[str, str] = {}
    for routing, decision in zip(record.routings, shown["decisions"], strict=True):
        decision["tiers"] = list(tiers(runtime, routing))
        decision["others"] = dict(_others(runtime, routing, tried))
        if decision["backend"]:
            tried[decision["backend"]] = "had failed before" if routing.failure else "was at it already"
    return {**shown, "why": why(runtime, record.row, record.routings)}


# Why it was refused or cut


def why(runtime: Runtime, row: Row, routings: list[Routing]) -> str:
    """Why a request did not end well, in words; empty if it did."""
    if row.outcome == records.CLIENT_GONE:
        return "the client left before the answer was complete"
    limit = _limit(runtime, row)
    words = limit or WHY.get(row.code, "")
    if row.code == "context_length" and routings:
        facts = routings[0].request
        asked = f"a prompt of about {facts.prompt_tokens} tokens"
        if facts.max_tokens:
            asked += f" and up to {facts.max_tokens} for the answer"
        words = f"{asked}: {words}"
    if row.outcome in (records.CUT, records.SHUTDOWN) and row.status == 200:
        count = row.completion_tokens
        tokens = f"{count} token{'' if count == 1 else 's'}"
        return f"the answer was cut after {tokens}: {words or 'the proxy gave up'}"
    if not words and row.outcome == records.BACKEND_FAILED:
        return f"the backend itself answered {row.status}"
    return words


def _limit(runtime: Runtime, row: Row) -> str:
    """The limit of a key that a request ran into, as it is now."""
    key = runtime.keys.find(row.key_id) if row.key_id else None
    budget = "its budget" if key is None or key.budget_nano is None else f"{key.budget_nano / 1e9:g}"
    limits = {
        "rate_limit_requests": f"{'the' if key is None else key.rpm} requests per minute were used",
        "rate_limit_tokens": f"its {'' if key is None else f'{key.tpm} '}tokens per minute do not cover it",
        "concurrency": f"{'all its' if key is None else key.concurrency} requests at once were running",
        "budget": f"what is left of {budget} {runtime.prices.currency} per month does not cover it",
    }
    words = limits.get(row.code, "")
    return f"limit of key {row.key_id}: {words}" if words else ""


# The tiers of a rule


def tiers(runtime: Deciding, routing: Routing) -> Iterator[dict[str, Any]]:
    """The tiers that were asked, in order: how full they were, and which one took the request."""
    rule = next((rule for rule in runtime.built.policy.file.rules if rule.name == routing.rule), None)
    asked = sorted({tier for tier in tier_of(runtime, routing).values() if tier >= 0})
    for tier, saturation in zip(asked, routing.passed, strict=False):
        yield {
            "tier": tier,
            "backends": tier_in_words(rule, tier) if rule else "",
            "saturation": None if saturation == inf else saturation,
            "took_it": False,
        }
    if routing.tier >= 0:
        words = tier_in_words(rule, routing.tier) if rule else ""
        yield {"tier": routing.tier, "backends": words, "saturation": None, "took_it": True}


def tier_of(runtime: Deciding, routing: Routing) -> Mapping[str, int]:
    """Tier by name of the backends that may serve the request; -1: its rule is there no more."""
    rule = next((rule for rule in runtime.valve.rules.rules if rule.name == routing.rule), None)
    removed = routing.removed or {}
    return {
        backend.name: rule.tier_of(backend) if rule else -1
        for backend in runtime.fleet
        if backend.name not in removed
    }


# Backends that might have served it


def _others(runtime: Runtime, routing: Routing, tried: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Backends that may serve the request and were no candidates, with the reason in words."""
    if routing.decided_by in ("fallback", "queue"):
        return  # nobody was compared
    everybody_available = routing.decided_by == "wait over"
    candidates = {candidate.name for candidate in routing.candidates}
    for name, tier in tier_of(runtime, routing).items():
        if name in candidates:
            continue
        if name in tried:
            yield name, tried[name]
        elif tier > routing.tier >= 0 and not everybody_available:
            yield name, "of a later tier"
        elif routing.waits and tier in routing.waits:
            yield name, f"its tier had room, but asked to wait: {routing.waits[tier] or 'no reason given'}"
        else:
            yield name, _absence(runtime, runtime.fleet[name], routing, everybody_available)


def _absence(runtime: Runtime, backend: Backend, routing: Routing, was_down: bool) -> str:
    was_down = was_down or routing.decided_by == AVAILABILITY
    reason, since = unavailable(runtime, backend)
    if reason and since <= routing.at:
        return reason
    now = f"now: {reason}" if reason else "it is available now"
    if was_down:
        return f"was not available then ({now})"
    if reason:
        return f"had no free slot, or was not available then ({now})"
    return "had no free slot, or was not available then"


def unavailable(runtime: Deciding, backend: Backend) -> tuple[str, float]:
    """Why nothing new is sent to a backend, and since when (monotonic; inf: not known). Empty: it may be."""
    now = runtime.now()
    if backend.over_budget:
        return "its budget for this month is used up", inf
    if backend.asleep:
        return f"a standby, {standby_words(runtime, backend)}", inf
    if backend.draining:
        return "it takes nothing new, and ends when what runs on it has ended", inf
    if not backend.probed_up:
        probe = runtime.probes().get(backend.name) or {}
        age = probe.get("since_s")
        reason = f"down: {probe.get('reason') or 'the probes say so'}"
        return reason, inf if age is None else now - age
    if backend.models_unknown:
        return f"models unknown: {backend.models_unknown}", inf
    if not backend.models:
        return "it serves no model", inf
    if not backend.breaker.allows(now):
        breaker = backend.breaker
        if breaker.trial_running:
            return "circuit breaker half-open, its trial request is running", breaker.moved_at
        wait = breaker.opened_until - now
        reason = f"circuit breaker open after {breaker.failures} failures, tried again in {wait:.0f} s"
        return reason, breaker.opened_until - breaker.backoff_s
    if now < backend.backoff_until:
        return f"it asked for a pause of {backend.backoff_until - now:.0f} s more", inf
    return "", inf


def standby_words(runtime: Deciding, backend: Backend) -> str:
    """How a standby is that sleeps."""
    words = runtime.scaling.condition(backend.name) if runtime.scaling is not None else ""
    return words or ("draining" if backend.draining else "not running")


def standbys(runtime: Deciding) -> dict[str, str]:
    """The standbys that requests may be held for, by name, and how they are."""
    return {backend.name: standby_words(runtime, backend) for backend in runtime.fleet if backend.awaited}
