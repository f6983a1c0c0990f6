"""Admission, queueing and dispatch: the valve owns time and the queue.

Its driver (the proxy, the simulator, a test) calls `submit` for every request, `retry` after a failed
attempt, `poll` after everything that may have freed capacity (a release, a probe, a change of the fleet)
and at `next_wake`. An answer that is a `Send` carries a lease: it is counted before the next request is
decided, or all that are answered at once would pick the same backend.

Held requests wait in one queue per rule and set of feasible backends, so that one model's queue, being
stuck, stops no other. A poll asks at most `HEADS_PER_POLL` heads of each queue, one of each in turn, in
fair order (`fairness.py`). Only a change of the fleet or of the policy file walks over those who wait, and
a full queue is searched for the tenant that has most in it. The `until` of a policy's hold is when the heads
are asked again. A hold ends with its rule's wait or the request's deadline: then the request goes to the least
saturated backend that may serve it, whatever its tier, if that is below the rule's `overflow`, or is refused.

What only a standby may serve is held for as long as its rule's `cold_start` allows, and goes to whoever is there
first. Who would wait for most of a rule's `wait` anyway is refused at once, so that an overload is shed at the
door. Between tenants, the last free slots of a backend go by shares (`shares.py`).

Every request that is submitted gets exactly one answer that is not a `Hold`, by `submit` or by `poll`,
unless it is cancelled.
"""

from __future__ import annotations

from collections.abc import Collection
from heapq import heapify, heappop, heappush
from math import inf

from policies.base import Hold, RequestFacts, Send
from policies.candidates import Candidates
from policies.fairness import FairQueue, Held, Waiting
from policies.refusals import hopeless, overflow, overflow_room, queue_full, to_any, too_late, undecided
from policies.routing import (
    AVAILABILITY,
    HEDGE,
    SHARES,
    STANDBY,
    TIERS,
    WAIT_OVER,
    Routing,
    because,
    copy_figures,
)
from policies.rules import RuleSet
from policies.shares import MOST_KEPT
from policies.state import Fleet
from policies.waiting import by_model, by_tenant, for_standbys

MOST_OF_WAIT = 0.6
"""A request that would wait for more of its rule's wait than this is refused at once. The rest is for what the
forecast does not know, and for lower priorities to come up by ageing."""

HEADS_PER_POLL = 8
"""Heads of one queue that are asked in one poll; the rest in the next, which `next_wake` calls for at
once."""


class Valve:
    """Decides over every request of one router, at the moment when it can be decided."""

    def __init__(self, rules: RuleSet, fleet: Fleet) -> None:
        self.rules = rules
        self.fleet = fleet
        fleet.see_to(rules.needs)
        self._held: dict[str, Held] = {}
        """By request id, in order of arrival."""
        self._queues: dict[tuple[str, frozenset[str]], FairQueue] = {}
        """Those with somebody in them."""
        self._ask_at = inf
        """When the first of the policies that hold requests wants to be asked again. One time for all queues is
        enough, since a poll asks the heads of all; it may be too early, when a request has left."""
        self._ends: list[tuple[float, int, Held]] = []
        """Heap by the end of the hold. Answered ones stay until they come up, or outnumber the others."""
        self._answers: list[Routing] = []
        """Refusals that were decided between polls."""
        self._sequence = 0
        self._turn = 0
        self._now = -inf
        self._unasked = False
        """The last poll stopped at its limit while requests were still being sent."""
        self._version = -1
        self._impaired = False
        """Some backend is not available, so that time, or the end of a trial, may bring it back."""
        self._back_at = inf
        """When time alone may make a backend available, or end that it is measured."""

    def __repr__(self) -> str:
        return f"<Valve: {len(self._held)} held in {len(self._queues)} queues>"

    @property
    def queued(self) -> int:
        """Requests that are held."""
        return len(self._held)

    def queued_by_tenant(self) -> dict[str, int]:
        return by_tenant(self._queues.values())

    def oldest_age(self, now: float, model: str = "") -> float:
        """Seconds for which the longest waiting request has been held; 0: none is. `model`: of the queues that
        requests of this model wait in."""
        of = (queue for queue in self._queues.values() if not model or model in queue.models)
        return max((now - queue.oldest_since() for queue in of), default=0.0)

    def waiting_by_model(self) -> Waiting:
        """Requests that are held, by model."""
        return by_model(self._queues.values())

    def waiting_for_standbys(self) -> list[tuple[frozenset[str], int, float]]:
        """For every queue of requests that nothing but standbys may serve: which ones, how many wait, and their
        tokens."""
        return for_standbys(self._queues.values(), self.rules, self.fleet)

    def submit(self, request: RequestFacts, now: float) -> Routing:
        """Decide over a new request. With a `Hold` it is in the queue, and its answer comes from a `poll`."""
        assert request.id not in self._held, "ids of requests must be unique"
        self._now = now
        lengths = self.fleet.lengths
        if lengths is not None and request.expected_tokens:
            limit = max(request.max_tokens, request.expected_tokens) if request.max_tokens else 0
            request.expected_tokens = lengths.expected(request.tenant, request.model, limit)
        if self.fleet.offered and (offered := self.fleet.offered.get(request.model)) is not None:
            offered.arrived(request.tokens, now)
        if now >= self._back_at or self.fleet.version != self._version:
            self._follow_fleet(now)
        if request.backend and not request.tokens:  # it asks after what is there, and takes nobody's place
            candidates = self.rules.candidates(request, self.fleet)
            if candidates.order:
                routing = to_any(request, candidates, self.fleet, "holder", "what it asks for is there", now)
                self._lease(routing, now)
                return routing
        if self._held:
            candidates = self.rules.candidates(request, self.fleet)
            queue = self._queues.get(candidates.key)
            if queue is not None and candidates.order and not self._owing(request, candidates, now):
                if not queue.blocked:  # those before it were held for reasons of their own
                    self._unasked = True
                until = self.rules.hold_until(request, candidates.rule)
                waiting = undecided(
                    request, candidates, Hold(until, "others wait for the same"), "queue", now
                )
                return self._enqueue(waiting, candidates, now)
        routing = self._route(request, now)
        if type(routing.decision) is Hold:
            candidates = self.rules.candidates(request, self.fleet)
            beyond = self._beyond(routing, candidates, now)
            if beyond is None:
                return self._enqueue(routing, candidates, now)
            routing = beyond
        self._lease(routing, now)
        return routing

    def retry(self, request: RequestFacts, routing: Routing, tried: Collection[str], now: float) -> Routing:
        """Decide where a request goes after its attempts on `tried` have failed. Never a `Hold`.

        The earlier decision's fallbacks in their order, as far as constraints and availability still allow
        them; after those a fresh decision without `tried`, on any available backend if no tier has room.
        """
        self._now = now
        if now >= self._back_at or self.fleet.version != self._version:
            self._follow_fleet(now)
        excluded = frozenset(tried)
        candidates = self.rules.candidates(request, self.fleet, excluded).without(excluded)
        if type(routing.decision) is Send:
            left = tuple(name for name in routing.decision.fallbacks if name in candidates.order)
            if left:
                send = Send(left[0], left[1:], f"fallback after {', '.join(sorted(excluded))}")
                again = undecided(request, candidates, send, "fallback", now)
                backend = self.fleet[left[0]]
                again.candidates = (copy_figures(backend, backend.saturation(now)),)
                self._lease(again, now)
                return again
        again = self.rules.route(request, self.fleet, now, excluded, failed=excluded)
        if type(again.decision) is Hold:
            again = to_any(
                request, candidates, self.fleet, "fallback", "no tier has room for another attempt", now
            )
        self._lease(again, now)
        return again

    def hedge(self, request: RequestFacts, tried: frozenset[str], now: float) -> Routing | None:
        """Where a request whose first token is late may be sent besides, its lease included; None: nowhere.

        To a backend that its rule would choose now without those in `tried`, with a slot that is free and not kept
        for other tenants, and only while nobody is held: a place that others wait for is theirs. The policy hears
        of it by `hedge_won` alone, or a session would follow an attempt that lost.
        """
        self._now = now
        if now >= self._back_at or self.fleet.version != self._version:
            self._follow_fleet(now)
        if self._held:
            return None
        routing = self.rules.route(request, self.fleet, now, tried)
        decision = routing.decision
        if type(decision) is not Send:
            return None
        backend = self.fleet[decision.backend]
        kept = backend.shares.kept_from(request.tenant, request.priority, backend.slots, now)
        if not backend.has_free_slot(now) or kept >= backend.slots - backend.in_flight:
            return None
        routing.decision = because("first token late, so here too", decision)
        routing.decided_by = HEDGE
        routing.lease = self.fleet.lease(request, decision.backend, now, None, HEDGE)
        return routing

    def hedge_won(self, routing: Routing, now: float) -> None:
        """The attempt that `hedge` led to goes on alone: its policy hears of it from here on."""
        lease = routing.lease
        assert lease is not None
        lease.policy = routing.policy
        if lease.policy is not None:
            lease.policy.dispatched(lease.request, lease.backend, now)

    def poll(self, now: float) -> list[Routing]:
        """Answer held requests: those that capacity has come free for, and those whose hold has ended."""
        self._now = now
        if self._impaired or now >= self._back_at or self.fleet.version != self._version:
            self._follow_fleet(now)
        self.rules.observe(self.fleet, now)
        self._unasked = False
        self._ask_at = inf
        if not self._held and not self._answers:
            return []
        answers, self._answers = self._answers, []
        self._end_holds(now, answers)
        self._ask_heads(now, answers)
        return answers

    def next_wake(self) -> float:
        """When to poll if nothing happens before, monotonic.

        It is the end of the next hold, the moment when a policy that holds requests wants to be asked again, or
        when a breaker or a back-off lets a backend be tried again, or its measuring ends; inf: none is pending.
        """
        if self._answers or self._unasked:
            return self._now
        while self._ends and self._ends[0][2].queue is None:
            heappop(self._ends)
        return min(self._ends[0][0], self._ask_at, self._back_at) if self._ends else self._back_at

    def cancel(self, request_id: str, now: float | None = None) -> bool:
        """The client has left: forget its request. False: it is not held, so it has been answered.

        Nothing here depends on `now`; an event log has it (None: the time of the last call).
        """
        held = self._held.get(request_id)
        if held is not None:
            self._take(held, served=False)
            return True
        for index, routing in enumerate(self._answers):
            if routing.request.id == request_id:
                del self._answers[index]
                return True
        return False

    def swap(self, rules: RuleSet, now: float) -> None:
        """Take a new policy file. Held requests wait on under its rules; poll afterwards, to ask them
        again."""
        self.rules = rules
        self.fleet.see_to(rules.needs)
        self._now = now
        self._place_again(now, new_rules=True)
        self._unasked = bool(self._held)

    def _route(self, request: RequestFacts, now: float) -> Routing:
        """As the rules decide, but nowhere where the last free slots are kept for other tenants."""
        routing = self.rules.route(request, self.fleet, now)
        full: frozenset[str] = frozenset()
        while type(routing.decision) is Send:
            backend = self.fleet[routing.decision.backend]
            free = backend.slots - backend.in_flight
            if free > backend.slots // MOST_KEPT:
                break  # more than are ever kept
            kept = backend.shares.kept_from(request.tenant, request.priority, backend.slots, now)
            if kept < 0 or free > kept:
                break
            full |= {backend.name}
            again = self.rules.route(request, self.fleet, now, full)
            if type(again.decision) is not Send:
                candidates = self.rules.candidates(request, self.fleet)
                until = self.rules.hold_until(request, candidates.rule)
                hold = Hold(until, "the free slots are kept for other tenants")
                return undecided(request, candidates, hold, SHARES, now)
            routing = again
        return routing

    def _owing(self, request: RequestFacts, candidates: Candidates, now: float) -> list[str]:
        """The backends where its tenant is owed a slot; none if others of its tenant wait."""
        queue = self._queues.get(candidates.key)
        if queue is not None and request.tenant in queue.tenants:
            return []
        return [
            backend.name
            for backend in map(self.fleet.__getitem__, candidates.order)
            if backend.shares.owes(request.tenant, request.priority, backend.slots, now)
        ]

    def _beyond(self, waits: Routing, candidates: Candidates, now: float) -> Routing | None:
        """As its rule decides among the backends that owe its tenant a slot, were they not full; None: it waits."""
        owing = self._owing(waits.request, candidates, now)
        if not owing or waits.decided_by not in (TIERS, SHARES):  # the policy has it wait
            return None
        others, most = frozenset(candidates.order).difference(owing), candidates.rule.queue.overflow
        routing = self.rules.route(waits.request, self.fleet, now, others, most)
        if type(routing.decision) is not Send:
            return None
        routing.decision = because("others hold its share of the slots", routing.decision)
        routing.decided_by = SHARES
        return routing

    def _lease(self, routing: Routing, now: float) -> None:
        decision = routing.decision
        if type(decision) is Send:
            routing.lease = self.fleet.lease(
                routing.request, decision.backend, now, routing.policy, routing.decided_by
            )

    def _enqueue(self, routing: Routing, candidates: Candidates, now: float) -> Routing:
        """Hold the request as `routing` says, or refuse one if the queue is full."""
        assert type(routing.decision) is Hold
        request = routing.request
        queue = self._queues.get(candidates.key)
        if queue is None:
            queue = FairQueue(candidates.key)
        refusal = self._no_place(request, candidates, queue, now)
        if refusal is not None:
            return refusal
        if len(queue) >= candidates.rule.queue.depth:
            displaced = queue.displaced_by(request)
            assert displaced is not None
            self._take(displaced, served=False)
            refusal = queue_full(displaced.request, candidates, now)
            refusal.held_s = now - displaced.since
            self._answers.append(refusal)
        self._sequence += 1
        cold = routing.decided_by == STANDBY
        until = self.rules.hold_until(request, candidates.rule, cold)
        held = Held(request, self._sequence, now, until, cold)
        if routing.decided_by == TIERS:
            queue.blocked = True
        elif not cold:
            self._ask_again(routing.decision, now)
        self._queues[candidates.key] = queue
        queue.add(held)
        self._held[request.id] = held
        heappush(self._ends, (held.until, held.sequence, held))
        return routing

    def _no_place(
        self, request: RequestFacts, candidates: Candidates, queue: FairQueue, now: float
    ) -> Routing | None:
        """Its refusal if it would wait in vain, or the queue is full and it may take no place; None: it waits."""
        limits = candidates.rule.queue
        # While nobody is there nothing is served, so there is no rate to go by.
        if candidates.order and limits.wait_s > 0.0 and len(queue) > overflow_room(candidates, self.fleet):
            wait = queue.expected_wait(request, now)
            if wait > limits.wait_s * MOST_OF_WAIT:
                return hopeless(request, candidates, wait, now)
        if len(queue) >= limits.depth and queue.displaced_by(request) is None:
            return queue_full(request, candidates, now)
        return None

    def _take(self, held: Held, served: bool) -> None:
        """Take a request out of its queue."""
        queue = held.queue
        assert queue is not None
        queue.remove(held, served)
        if not queue:
            del self._queues[queue.key]
        del self._held[held.request.id]
        if len(self._ends) > 2 * len(self._held) + 64:
            self._ends = [end for end in self._ends if end[2].queue is not None]
            heapify(self._ends)

    def _answer(self, held: Held, routing: Routing, now: float, answers: list[Routing]) -> None:
        queue, served = held.queue, type(routing.decision) is Send
        assert queue is not None
        self._take(held, served)
        if served and routing.decided_by != WAIT_OVER:
            queue.served(now)
        if held.cold and type(routing.decision) is Send:
            routing.decision = because("waited for a standby", routing.decision)
        routing.held_s = now - held.since
        self._lease(routing, now)
        answers.append(routing)

    def _end_holds(self, now: float, answers: list[Routing]) -> None:
        """Answer those that have been held for long enough."""
        while self._ends and self._ends[0][0] <= now:
            held = heappop(self._ends)[2]
            if held.queue is None:
                continue
            request = held.request
            candidates = self.rules.candidates(request, self.fleet)
            if candidates.asleep and not candidates.order:
                # All that were there have gone while it waited: a standby may be started for it yet.
                held.cold, held.until = True, self.rules.hold_until(request, candidates.rule, cold=True)
                if held.until > now:
                    heappush(self._ends, (held.until, held.sequence, held))
                    continue
                routing = too_late(request, candidates, now)
            elif request.deadline <= now:
                routing = too_late(request, candidates, now)
            else:
                routing = self._route(request, now)
                if type(routing.decision) is Hold:
                    routing = overflow(request, candidates, self.fleet, now)
            self._answer(held, routing, now, answers)

    def _ask_heads(self, now: float, answers: list[Routing]) -> None:
        if not self._queues:
            return
        queues = list(self._queues.values())
        self._turn = (self._turn + 1) % len(queues)
        asking = queues[self._turn :] + queues[: self._turn]
        for _ in range(HEADS_PER_POLL):
            asking = [queue for queue in asking if self._ask_head(queue, now, answers)]
            if not asking:
                break
        for queue in queues:
            queue.resume()
        self._unasked = bool(asking and answers)

    def _ask_head(self, queue: FairQueue, now: float, answers: list[Routing]) -> bool:
        """Ask the next head of a queue. True: another may fare better."""
        held = queue.head(now)
        if held is None:
            return False
        routing = self._route(held.request, now)
        if routing.decided_by == STANDBY or (
            routing.decided_by == AVAILABILITY and self._may_wait(held, now)
        ):
            return False  # nobody is there; one may come, or come back, before its wait is over
        if type(routing.decision) is Hold:
            if routing.decided_by == TIERS:
                queue.blocked = True  # no room, nor for those behind it
                return False
            queue.blocked = False
            self._ask_again(routing.decision, now)
            queue.pass_over(held)
            return True
        queue.blocked = False
        self._answer(held, routing, now, answers)
        return len(queue) > 0

    def _may_wait(self, held: Held, now: float) -> bool:
        """Whether it may wait on though no standby is left that it could wait for."""
        request = held.request
        return not held.cold or now < self.rules.hold_until(request, self.rules.rule_for(request))

    def _ask_again(self, hold: Hold, now: float) -> None:
        """Note when a policy wants to be asked again. A time that has passed is none: polls would run in a
        circle."""
        if now < hold.until < self._ask_at:
            self._ask_at = hold.until

    def _follow_fleet(self, now: float) -> None:
        """Notice what probes, breakers and time have changed."""
        fleet = self.fleet
        fleet.refresh(now)
        if fleet.version != self._version:
            self._version = fleet.version
            if self._held:
                self._place_again(now, new_rules=False)
        away = [backend for backend in fleet if not backend.available and not backend.asleep]
        self._impaired = bool(away)
        back_at = [max(backend.breaker.opened_until, backend.backoff_until) for backend in away]
        back_at += [backend.adaptive.measured_until for backend in fleet if backend.adaptive is not None]
        self._back_at = min((at for at in back_at if at > now), default=inf)

    def _place_again(self, now: float, new_rules: bool) -> None:
        """Sort held requests into queues by what may serve them now; refuse those that nothing may any
        more."""
        places = [(held, self.rules.candidates(held.request, self.fleet)) for held in self._held.values()]
        if not new_rules and all(
            held.queue is not None and held.queue.key == candidates.key for held, candidates in places
        ):
            return
        self._queues.clear()
        for held, candidates in places:
            if candidates.refusal is not None:
                held.queue = None
                del self._held[held.request.id]
                refusal = self.rules.route(held.request, self.fleet, now)
                refusal.held_s = now - held.since
                self._answers.append(refusal)
                continue
            queue = self._queues.get(candidates.key)
            if queue is None:
                queue = self._queues[candidates.key] = FairQueue(candidates.key)
            queue.add(held)
            if new_rules:
                held.until = self.rules.hold_until(held.request, candidates.rule, held.cold)
        self._ends = [(held.until, held.sequence, held) for held in self._held.values()]
        heapify(self._ends)
