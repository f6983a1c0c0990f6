"""The compiled policy file: where a request may go, in which order backends are asked, and who chooses.

The first rule that matches a request applies. Its tiers are asked in order, and only when none of them takes
the request it is held: spilling comes before waiting. That a tier's policy asks to wait is no different from
having no room: the next tier is asked.

A tier with `spill` is open or closed, with hysteresis: it opens when the capacity-weighted mean saturation of
its available backends reaches `enter`, and closes below `leave`. While closed, the tier takes every request,
on its backends with a free slot if there are any, else on those below `enter` (above 1 it lets the engine queue a
little). While open, it still takes a request whenever one of its backends has a free slot. A tier without `spill`
takes a request only with a free slot. The flag itself is what sessions, waking and alerts go by. Requests move it,
and so do polls, both ways: a tier that is full spills, whether or not the next request has come.

When no backend that may serve a request is available, it is held as long as one of them is a standby that may be
started for it.

A backend whose host is outside of its tier's `host` has no free slot, whatever its saturation; nor has one that is
measured with few in flight (`adaptive.py`) when it has those.

Saturation is taken over the backends that may serve the request at hand: one model being full says nothing
about another. So the flag is kept per tier and set of feasible backends, which in a fleet with one model is
one flag per tier.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from math import inf

from policies.base import Hold, Reject, RequestFacts, Send
from policies.candidates import Candidates, CandidateSets, SpillState
from policies.constraints import RETRY_AFTER_S
from policies.host import HostBounds
from policies.match import Hours, Match, Selector
from policies.refusals import standbys, undecided
from policies.routing import AVAILABILITY, STANDBY, TIERS, Candidate, Routing, copy_figures
from policies.rule import Queue, Rule, Spill, Tier
from policies.state import Backend, Fleet, cached_in

__all__ = [
    "Candidate",
    "Hours",
    "Match",
    "Queue",
    "Routing",
    "Rule",
    "RuleSet",
    "Selector",
    "Spill",
    "SpillState",
    "Tier",
]

NOTHING_TRIED: frozenset[str] = frozenset()


class RuleSet:
    """All rules of a policy file, with the state of their spills. The last one must match every request."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        assert rules, "a policy file needs a rule"
        assert rules[-1].matches_all, "the last rule must match every request"
        assert len({rule.name for rule in rules}) == len(rules), "names of rules must be unique"
        self.rules = tuple(rules)
        self._sets = CandidateSets()
        self.needs = frozenset[str]().union(*(chooser.needs for rule in rules for chooser in rule.choosers))
        """Of all policies of the file."""

    @property
    def spills(self) -> Sequence[SpillState]:
        """Every spill flag there is, for `/state`, metrics and alerts."""
        return tuple(self._sets.spills.values())

    @property
    def in_spite(self) -> Set[str]:
        """Backends that are used although they look sick, since too few others are left."""
        return self._sets.in_spite

    def rule_for(self, request: RequestFacts) -> Rule:
        """The first rule that matches."""
        for rule in self.rules:
            if rule.matches_all or rule.match.accepts(request):
                return rule
        raise AssertionError("the last rule matches every request")

    def candidates(
        self, request: RequestFacts, fleet: Fleet, failed: frozenset[str] = NOTHING_TRIED
    ) -> Candidates:
        """Who may serve the request under its rule, by tier; cached until the fleet changes. `failed`: as for
        `route`; they are not left out."""
        return self._sets.find(self.rule_for(request), request, fleet, failed)

    def aside(self) -> RuleSet:
        """The same rules with policies and flags of their own, as they stand: deciding with it leaves no trace.

        Raises whatever a policy raises that cannot be copied.
        """
        other = RuleSet([rule.aside() for rule in self.rules])
        other._sets = self._sets.aside()
        return other

    def observe(self, fleet: Fleet, now: float) -> None:
        """Let the spill flags follow the load while no request comes to move them."""
        self._sets.move_spills(fleet, now)

    def route(
        self,
        request: RequestFacts,
        fleet: Fleet,
        now: float,
        tried: frozenset[str] = NOTHING_TRIED,
        full: float = 1.0,
        failed: frozenset[str] = NOTHING_TRIED,
    ) -> Routing:
        """Decide; nothing is counted yet. Backends in `tried` are left out; one below the saturation `full` has a
        free slot. A request leaves its part of a split when all that is available of it is in `failed`, and not
        because it is left out for another reason.

        Without a backend that may serve it: `Reject`, named after the constraint. With none that is
        available: `Hold` if a standby may serve it, else `Reject` with `no_backend`. With no tier that takes it:
        `Hold`, until the first of the policies that asked to wait would be asked again.
        """
        candidates = self._sets.find(self.rule_for(request), request, fleet, failed)
        rule = candidates.rule
        if tried:
            candidates = candidates.without(tried)
        if not candidates.order:
            return self._unserved(request, candidates, fleet, now)
        passed: tuple[float, ...] = ()
        spilling = False
        waits: dict[int, str] | None = None
        held: Routing | None = None
        until = inf
        for tier in candidates.tiers:
            free = []
            figures = []
            host = tier.host
            load = 0.0
            slots = 0
            for backend in tier.backends:
                saturation = backend.saturation(now)
                load += saturation * backend.slots
                slots += backend.slots
                if saturation < full and _takes(backend, host, now):
                    free.append(backend)
                    figures.append(copy_figures(backend, saturation))
            mean = load / slots if slots else inf
            spill = tier.spill
            if spill is not None:
                # What is left after failed attempts says nothing about the tier.
                if not tried:
                    spill.move(mean, now)
                spilling = spilling or spill.open
                if not free and slots and not spill.open:
                    enter = spill.spill.enter
                    free = [
                        one for one in tier.backends if one.saturation(now) < enter and _takes(one, host, now)
                    ]
                    figures = [copy_figures(backend, backend.saturation(now)) for backend in free]
            if free:
                routing = self._choose(request, candidates, tier.tier, free, figures, now)
                decision = routing.decision
                if type(decision) is not Hold:
                    routing.part = candidates.part
                    routing.passed = passed
                    routing.spilling = spilling
                    routing.waits = waits
                    return routing
                if waits is None:
                    waits = {}
                waits[tier.tier] = decision.reason
                if held is None or decision.until < until:
                    held, until = routing, decision.until
            passed = (*passed, mean)
        if held is None:
            hold = Hold(self.hold_until(request, rule), "no free slot")
            held = Routing(request, rule.name, hold, TIERS, rule.guarded, removed=candidates.removed, at=now)
        held.tier = -1
        held.passed = passed
        held.spilling = spilling
        held.waits = waits
        held.part = candidates.part
        return held

    @staticmethod
    def hold_until(request: RequestFacts, rule: Rule, cold: bool = False) -> float:
        """The latest a request of this rule may be held, monotonic. `cold`: it waits for a standby, or has done."""
        queue = rule.queue
        return min(request.arrived + (queue.cold_start_s if cold else queue.wait_s), request.deadline)

    def _choose(
        self,
        request: RequestFacts,
        candidates: Candidates,
        tier: int,
        eligible: list[Backend],
        figures: list[Candidate],
        now: float,
    ) -> Routing:
        rule = candidates.rule
        chooser = rule.choosers[tier]
        if chooser.by_prefix and request.prefix:
            request.cached = cached_in(eligible, request)
        decision, decided_by = chooser.decide(request, eligible, now)
        if isinstance(decision, Send):
            fallbacks = candidates.fallbacks(tier, decision.backend, decision.fallbacks)
            if fallbacks != decision.fallbacks:
                decision = Send(
                    decision.backend, fallbacks, decision.reason, decision.scores, decision.propensity
                )
        elif isinstance(decision, Hold):
            decision = Hold(min(decision.until, self.hold_until(request, rule)), decision.reason)
        return Routing(
            request,
            rule.name,
            decision,
            decided_by,
            chooser,
            tier,
            (),
            False,
            candidates.removed,
            tuple(figures),
            now,
        )

    def _unserved(self, request: RequestFacts, candidates: Candidates, fleet: Fleet, now: float) -> Routing:
        """No candidate is available: held for those that sleep, or refused."""
        if candidates.asleep:
            until = self.hold_until(request, candidates.rule, cold=True)
            if until > now:
                hold = Hold(until, f"no backend runs that may serve it; waiting for {standbys(candidates)}")
                return undecided(request, candidates, hold, STANDBY, now)
        return self._refused(request, candidates, fleet, now)

    @staticmethod
    def _refused(request: RequestFacts, candidates: Candidates, fleet: Fleet, now: float) -> Routing:
        refusal, decided_by = candidates.refusal, "constraints"
        if refusal is not None and refusal.code == "context_length":  # shared with others of other lengths
            asked = f" and asks for {request.max_tokens} more" if request.max_tokens else ""
            reason = f"{refusal.reason}; this prompt has about {request.prompt_tokens}{asked}"
            refusal = Reject(refusal.code, reason)
        if refusal is None:
            refusal = _unavailable([fleet[name] for name in candidates.key[1]], now)
            decided_by = AVAILABILITY
        return Routing(
            request,
            candidates.rule.name,
            refusal,
            decided_by,
            candidates.rule.guarded,
            removed=candidates.removed,
            at=now,
            part=candidates.part,
        )


def _takes(backend: Backend, host: HostBounds | None, now: float) -> bool:
    """Whether it takes requests at all, however full it is."""
    if backend.measuring_slots and backend.in_flight >= backend.measuring_slots:
        return False
    return host is None or host.accept(backend, now)


def _unavailable(feasible: list[Backend], now: float) -> Reject:
    """Why none of the backends that may serve a request takes it now: full is not down."""
    pauses = [
        backend.backoff_until - now
        for backend in feasible
        if now < backend.backoff_until
        and backend.probed_up
        and not backend.draining
        and not backend.asleep
        and not backend.over_budget
        and backend.breaker.allows(now)
    ]
    if pauses:
        return Reject("overloaded", "every backend that may serve this has asked for a pause", min(pauses))
    return Reject("no_backend", "no backend that may serve this is available", RETRY_AFTER_S)
