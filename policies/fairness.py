"""A fair queue: start-time fair queueing between tenants, priorities before it, ageing against starvation.

Start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996): a tenant that begins to wait is given the start
tag max(virtual time, its last finish tag); the tenant with the smallest start tag is served next, virtual
time moves to that tag, and the tenant's next one is its finish tag, start plus the tokens served. So two
tenants that both wait get the same number of tokens, however many requests each has. A tenant's own
requests go first in, first out.

Each priority is a level with tags of its own. The level that goes next is the one with the highest priority
plus one for every `AGEING_S` that its oldest request has waited: low priority waits longer, never for ever.

All operations are O(log tenants), besides a walk over the distinct priorities that wait.
"""

from __future__ import annotations

from collections import OrderedDict
from heapq import heappop, heappush
from math import exp, inf
from typing import TypeAlias

from policies.base import RequestFacts

AGEING_S = 2.0
"""Waiting this long is worth one level of priority."""

RATE_TAU_S = 10.0
"""Time constant of the rate at which a queue is served."""


class Held:
    """A request that waits. `sequence` orders all of them by arrival."""

    __slots__ = ("cold", "queue", "request", "sequence", "since", "until")

    def __init__(
        self, request: RequestFacts, sequence: int, since: float, until: float, cold: bool = False
    ) -> None:
        """`until`: when its hold ends at the latest, monotonic. `cold`: it waits for a standby, or has done."""
        self.request = request
        self.sequence = sequence
        self.since = since
        self.until = until
        self.cold = cold
        self.queue: FairQueue | None = None
        """Where it waits; None: it has been answered."""


class Flow:
    """What one tenant has waiting on one level."""

    __slots__ = ("in_heap", "start", "waiting")

    def __init__(self) -> None:
        self.start = 0
        """Start tag of its head, tokens."""
        self.waiting: OrderedDict[int, Held] = OrderedDict()
        self.in_heap = False


class Level:
    """Requests of one priority."""

    __slots__ = ("flows", "heap", "priority", "virtual_time", "waiting")

    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.virtual_time = 0
        self.flows: dict[str, Flow] = {}
        self.waiting: OrderedDict[int, Held] = OrderedDict()
        """All of them by arrival."""
        self.heap: list[tuple[int, int, Flow]] = []
        """Start tag, sequence of the head (breaks ties), flow; as they were when pushed. `first` repairs."""

    def push(self, flow: Flow) -> None:
        flow.in_heap = True
        heappush(self.heap, (flow.start, next(iter(flow.waiting)), flow))

    def pop(self) -> Flow:
        flow = heappop(self.heap)[2]
        flow.in_heap = False
        return flow

    def first(self) -> Flow | None:
        """The flow with the smallest start tag, on top of the heap."""
        while self.heap:
            start, _, flow = self.heap[0]
            if flow.waiting and start == flow.start:
                return flow
            self.pop()
            if flow.waiting:
                self.push(flow)
        return None


Waiting: TypeAlias = dict[str, tuple[int, int]]
"""Requests, and their tokens with those expected of the answers, by model."""


class FairQueue:
    """Held requests that wait for the same backends.

    To ask the heads in order: `head`, then `remove` it or `pass_over` it, then `head` again; at the end
    `resume`, which puts back what was passed over.
    """

    def __init__(self, key: tuple[str, frozenset[str]]) -> None:
        self.key = key
        self.tenants: dict[str, int] = {}
        """Requests waiting by tenant."""
        self.models: Waiting = {}
        """Those that wait."""
        self.blocked = False
        """Whoever asked last found no room, so nobody in it will until something changes."""
        self._levels: dict[int, Level] = {}
        self._length = 0
        self._began = inf
        """When the first request began to wait."""
        self._served = 0.0
        """Requests that were sent, each forgotten with time, as of `_served_at`."""
        self._served_at = -inf
        self._passed: list[tuple[Level, Flow]] = []

    def __len__(self) -> int:
        return self._length

    def add(self, held: Held) -> None:
        """Append a request. Sequences must come in rising order."""
        tenant, priority = held.request.tenant, held.request.priority
        level = self._levels.get(priority)
        if level is None:
            level = self._levels[priority] = Level(priority)
        flow = level.flows.get(tenant)
        if flow is None:
            flow = level.flows[tenant] = Flow()
        if not flow.waiting:
            flow.start = max(flow.start, level.virtual_time)
        flow.waiting[held.sequence] = held
        level.waiting[held.sequence] = held
        if not flow.in_heap:
            level.push(flow)
        held.queue = self
        self._began = min(self._began, held.since)
        self.tenants[tenant] = self.tenants.get(tenant, 0) + 1
        self._count(held.request, 1)
        self._length += 1

    def remove(self, held: Held, served: bool) -> None:
        """Take a request out. Served: its tenant is charged for the tokens."""
        tenant, priority = held.request.tenant, held.request.priority
        level = self._levels[priority]
        flow = level.flows[tenant]
        if served:
            if level.first() is flow:  # not out of turn, because its wait was over
                level.virtual_time = flow.start
            flow.start += max(held.request.tokens, 1)
        del flow.waiting[held.sequence], level.waiting[held.sequence]
        held.queue = None
        self._length -= 1
        self.tenants[tenant] -= 1
        if not self.tenants[tenant]:
            del self.tenants[tenant]
        self._count(held.request, -1)
        if not level.waiting:  # tags mean nothing once nobody waits
            del self._levels[priority]

    def _count(self, request: RequestFacts, sign: int) -> None:
        count, tokens = self.models.get(request.model, (0, 0))
        if count + sign:
            self.models[request.model] = (count + sign, tokens + sign * request.tokens)
        else:
            del self.models[request.model]

    def served(self, now: float) -> None:
        """One of it was sent, because there was room."""
        self._served = self._served * exp(min(self._served_at - now, 0.0) / RATE_TAU_S) + 1.0
        self._served_at = now

    def expected_wait(self, request: RequestFacts, now: float) -> float:
        """How long the request would wait, seconds: what goes before it on its level, at the rate of late.

        A tenant shares the rate with the others of its level equally. One more than were sent are taken as sent, so
        that a queue of a moment ago does not look stuck.
        """
        span = RATE_TAU_S * (1.0 - exp(min(self._began - now, 0.0) / RATE_TAU_S))
        if span <= 0.0:
            return 0.0
        rate = (self._served * exp(min(self._served_at - now, 0.0) / RATE_TAU_S) + 1.0) / span
        level = self._levels.get(request.priority)
        if level is None:
            return 1.0 / rate
        flow = level.flows.get(request.tenant)
        own = len(flow.waiting) if flow is not None else 0
        lines = sum(bool(flow.waiting) for flow in level.flows.values()) + (own == 0)
        return min(len(level.waiting) + 1, (own + 1) * lines) / rate

    def head(self, now: float) -> Held | None:
        """The request to ask next; None: all that are left were passed over."""
        best: Flow | None = None
        best_rank = (-inf, 0)
        for level in self._levels.values():
            flow = level.first()
            if flow is None:
                continue
            oldest = next(iter(level.waiting.values()))
            rank = (level.priority + (now - oldest.since) // AGEING_S, -oldest.sequence)
            if rank > best_rank:
                best, best_rank = flow, rank
        return None if best is None else next(iter(best.waiting.values()))

    def pass_over(self, head: Held) -> None:
        """Leave the head, and all that its tenant has behind it, out until `resume`."""
        level = self._levels[head.request.priority]
        self._passed.append((level, level.pop()))

    def resume(self) -> None:
        """Put back what was passed over."""
        for level, flow in self._passed:
            level.push(flow)
        self._passed.clear()

    def displaced_by(self, request: RequestFacts) -> Held | None:
        """Whose place the request may take when the queue is full: so that a flood cannot shut others out.

        It is the newest request of the tenant that has most waiting, on the lowest priority it has there;
        never one of higher priority, and only of a tenant that still has as many as the newcomer's
        afterwards.
        """
        heaviest = max(self.tenants, key=self.tenants.__getitem__, default="")
        if self.tenants.get(heaviest, 0) <= self.tenants.get(request.tenant, 0) + 1:
            return None
        for priority in sorted(self._levels):
            flow = self._levels[priority].flows.get(heaviest)
            if priority <= request.priority and flow is not None and flow.waiting:
                return next(reversed(flow.waiting.values()))
        return None

    def first(self) -> RequestFacts:
        """The one that arrived first on one of its levels; somebody waits."""
        return next(iter(next(iter(self._levels.values())).waiting.values())).request

    def oldest_since(self) -> float:
        """When the request that waits longest began to wait; inf: nothing waits."""
        return min((next(iter(level.waiting.values())).since for level in self._levels.values()), default=inf)
