"""Backends behind a router, in virtual time: `sim.router.Router` before one `sim.engine.Engine` each.

Simulated are the arrivals, the network (half a round trip each way), the engines and what goes wrong. The router
knows of an engine what the proxy knows: its own counts, and figures that are as old as the last scrape.

Time is an integer, microseconds, and what happens at one moment happens in a fixed order, so one seed gives one
result, byte for byte.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import ceil, inf
from random import Random
from typing import Any, Final

from policies.base import RequestFacts
from policies.eventlog import EventLog
from policies.health import Health
from policies.rules import RuleSet
from probes.base import Timing
from probes.passive import AttemptError
from sim.engine import FIRST_TOKEN, Engine, Sequence
from sim.members import Change, Incident, Member, Node
from sim.router import ATTEMPTS, Request, Router
from sim.workload import Arrival, Workload

SECOND: Final = 1_000_000
"""Microseconds."""
SWEEP: Final = SECOND // 4
"""How often the proxy looks at what only time changes."""
EXPECTED_TOKENS: Final = 256
"""The proxy's forecast of an answer whose length the client did not limit further."""
BYTES_PER_TOKEN: Final = 4


_ARRIVE: Final = 0
_REACH: Final = 1
_ENGINE: Final = 2
_FIRST_TOKEN: Final = 3
_DONE: Final = 4
_FAIL: Final = 5
_LEAVE: Final = 6
_POLL: Final = 7
_SWEEP: Final = 8
_CHECK: Final = 9
_CHANGE: Final = 10


class Trip(Request):
    """A request of a workload."""

    __slots__ = ("arrival", "cached_tokens", "index", "node", "preemptions", "sequence")

    def __init__(self, index: int, arrival: Arrival, facts: RequestFacts) -> None:
        super().__init__(facts)
        self.index = index
        """Its place in the workload."""
        self.arrival = arrival
        self.node: Node | None = None
        """Where its present attempt goes."""
        self.sequence: Sequence | None = None
        """Of its present attempt, once that is in an engine."""
        self.cached_tokens = 0
        self.preemptions = 0

    @property
    def tpot_s(self) -> float | None:
        """Seconds per token after the first; None: there is no such token, or no complete answer."""
        tokens = self.arrival.output_tokens
        if self.sequence is None or self.sequence.finished < 0 or tokens < 2:
            return None
        return (self.ended - self.first_token) / (tokens - 1)


@dataclass(slots=True)
class Result:
    """What a simulation saw."""

    trips: list[Trip] = field(default_factory=list)
    """In the order of their arrivals."""
    events: int = 0
    """That were processed."""
    ended: int = 0
    """Virtual time at the end, microseconds."""
    moves: list[tuple[int, str, bool]] = field(default_factory=list)
    """(time, backend, available): each change of what the router holds available."""


class Cluster(Router):
    """One simulation. `run` plays a workload to its end, once."""

    def __init__(
        self,
        members: Iterable[Member],
        rules: RuleSet,
        *,
        seed: int = 0,
        timing: Timing | None = None,
        incidents: Iterable[Incident] = (),
        patience_s: float = inf,
        limited: bool = False,
        metrics: bool = True,
        retry_ratio: float = 0.2,
        retries_per_s: float = 10.0,
        attempts: int = ATTEMPTS,
        health: Health | None = None,
        log: EventLog | None = None,
    ) -> None:
        """`patience_s`: after which a client leaves that has not had its first token. `limited`: clients set
        `max_tokens`, to what their answers have; else they set none. `metrics`: the proxy reads the engines'
        figures (`probing.metrics`). `log`: as of `Router`."""
        self.members = list(members)
        super().__init__(
            [member.backend for member in self.members],
            rules,
            retry_ratio=retry_ratio,
            retries_per_s=retries_per_s,
            attempts=attempts,
            health=health,
            log=log,
        )
        self.timing = timing or Timing()
        self.now = 0
        """Microseconds."""
        self.nodes = {member.backend.name: Node(member, self.timing) for member in self.members}
        self.result = Result()
        self._patience = patience_s
        self._limited = limited
        self._metrics = metrics
        self._jitter = Random(f"{seed}/probes")  # noqa: S311 - a simulation is to be repeated
        self._heap: list[tuple[int, int, int, Any]] = []
        """(time, order, kind of event, what it is about)."""
        self._order = 0
        self._open = 0
        """Requests that have not ended, those included that come after others of their session."""
        self._turns: dict[str, list[tuple[int, Arrival]]] = {}
        """By session: what comes after an answer, the next one last."""
        self._wake = -1
        """When the valve is polled next; below zero: when something happens."""
        self._sweeping = False
        self._available = [backend.available for backend in self.fleet]
        self._model = next((model for backend in self.fleet for model in sorted(backend.models)), "")
        for incident in incidents:
            self._at(incident.at, _CHANGE, incident)
        for node in self.nodes.values():
            if not node.up:
                self._at(node.member.starts, _CHANGE, Incident(0, node.backend.name, Change.UP))
            self._at(0, _CHECK, node)

    def run(self, workload: Workload, progress: Callable[[int], None] | None = None) -> Result:
        """Play a workload and let everything end. `progress` hears of every thousandth arrival."""
        collects = gc.isenabled()
        gc.disable()  # it would walk over all that was kept, again and again, and find nothing
        try:
            return self._run(self._sort(workload), progress)
        finally:
            if collects:
                gc.enable()

    def _run(self, arrivals: list[tuple[int, Arrival]], progress: Callable[[int], None] | None) -> Result:
        heap = self._heap
        position = events = 0
        next_at = arrivals[0][1].at if arrivals else -1
        while True:
            if next_at >= 0 and (not heap or next_at < heap[0][0]):
                self.now = next_at  # arrivals are in order already: no need to go through the heap
                index, arrival = arrivals[position]
                position += 1
                next_at = arrivals[position][1].at if position < len(arrivals) else -1
                self._arrive(index, arrival)
                if progress is not None and position % 1000 == 0:
                    progress(position)
            elif heap and self._open:
                self.now, _, kind, subject = heappop(heap)
                self._happen(kind, subject)
            else:
                break
            events += 1
        self.result.trips.sort(key=lambda trip: (trip.facts.arrived, trip.index))
        self.result.events = events
        self.result.ended = self.now
        return self.result

    def _sort(self, workload: Workload) -> list[tuple[int, Arrival]]:
        """-> those that come at a time of their own; the others wait for an answer."""
        arrivals = []
        turns = self._turns
        for index, arrival in enumerate(workload):
            self._open += 1
            if arrival.think >= 0 and arrival.session in turns:
                turns[arrival.session].append((index, arrival))
            else:
                if arrival.session:
                    turns.setdefault(arrival.session, [])
                arrivals.append((index, arrival))
        for waiting in turns.values():
            waiting.reverse()
        return arrivals

    # Time

    def _at(self, at: int, kind: int, subject: Any = None) -> None:
        self._order += 1
        heappush(self._heap, (at, self._order, kind, subject))

    def _happen(self, kind: int, subject: Any) -> None:
        if kind == _ENGINE:
            node: Node = subject
            if node.wake == self.now:
                node.wake = -1
                self._advance(node)
                self._arm(node)
        elif kind == _FIRST_TOKEN:
            trip, lease = subject
            if trip.lease is lease:
                self.begun(trip, self.now / SECOND)
        elif kind == _DONE:
            trip, lease = subject
            if trip.lease is lease:
                self._finish(trip)
        elif kind == _REACH:
            trip, lease = subject
            if trip.lease is lease:
                self._reach(trip)
        elif kind == _FAIL:
            trip, lease, error, retry_after_s = subject
            if trip.lease is lease:
                self.failed(trip, error, self.now / SECOND, retry_after_s)
        elif kind == _POLL:
            if self._wake == self.now:
                self._wake = -1
                self.poll(self.now / SECOND)
        elif kind == _SWEEP:
            self._sweep()
        elif kind == _CHECK:
            self._check(subject)
        elif kind == _ARRIVE:
            index, arrival = subject
            self._arrive(index, arrival)
        elif kind == _LEAVE:
            self._leave(subject)
        else:
            self._change(subject)

    # The life of a request

    def _arrive(self, index: int, arrival: Arrival) -> None:
        now = self.now / SECOND
        most = arrival.output_tokens if self._limited else 0
        facts = RequestFacts(
            str(index),
            arrival.model or self._model,
            tenant=arrival.tenant,
            data_class=arrival.data_class,
            arrived=now,
            wall=now,
            deadline=now + self._patience,
            stream=True,
            body_bytes=arrival.prompt_tokens * BYTES_PER_TOKEN,
            prompt_tokens=arrival.prompt_tokens,
            max_tokens=most,
            expected_tokens=min(most or EXPECTED_TOKENS, EXPECTED_TOKENS),
            priority=arrival.priority,
            prefix=arrival.hashes,
        )
        if arrival.session:
            facts.session = f"{arrival.tenant}\0{arrival.session}"
        trip = Trip(index, arrival, facts)
        self.result.trips.append(trip)
        if not self._sweeping:
            self._sweeping = True
            self._at((self.now // SWEEP + 1) * SWEEP, _SWEEP)
        self.submit(trip, now)
        if self.held:
            self._schedule()
        if self._patience < inf and trip.end is None:
            self._at(self.now + round(self._patience * SECOND), _LEAVE, trip)

    def send(self, request: Request, now: float) -> None:
        assert isinstance(request, Trip)
        assert request.lease is not None
        request.sequence = None
        request.node = node = self.nodes[request.backend]
        if node.delay:
            self._at(self.now + node.delay, _REACH, (request, request.lease))
        else:
            self._reach(request)

    def _reach(self, trip: Trip) -> None:
        """The request is at its backend's engine."""
        node = trip.node
        assert node is not None
        if not node.up:
            self._fail(trip, AttemptError.CONNECT)
        elif node.change is Change.FAIL:
            self._fail(trip, 500)
        elif node.change is Change.FULL:
            self._fail(trip, 429, float(ceil(node.retry_after_s)))  # the field holds whole seconds
        else:
            arrival = trip.arrival
            sequence = Sequence(arrival.prompt_tokens, arrival.output_tokens, arrival.hashes, trip)
            trip.sequence = sequence
            self._advance(node)
            try:
                node.engine.submit(sequence, self.now)
            except ValueError:  # it would never fit
                self._fail(trip, 400)
            else:
                self._arm(node)

    def _fail(self, trip: Trip, error: AttemptError | int, retry_after_s: float | None = None) -> None:
        """Let the router hear of it, half a round trip later."""
        node = trip.node
        assert node is not None
        self._at(self.now + node.half, _FAIL, (trip, trip.lease, error, retry_after_s))

    def _arm(self, node: Node) -> None:
        """See to it that the next event of a node's engine is seen."""
        next_at = node.engine.next_at
        if next_at < inf:
            at = ceil(next_at)
            if node.wake < 0 or at < node.wake:
                node.wake = at
                self._at(at, _ENGINE, node)

    def _advance(self, node: Node) -> None:
        """Let a node's engine catch up; what it tells is on its way."""
        if node.engine.next_at > self.now:
            return
        for event in node.engine.advance(self.now):
            trip = event.sequence.tag
            assert isinstance(trip, Trip)
            if trip.sequence is not event.sequence:
                continue
            first = event.kind == FIRST_TOKEN
            if node.half:
                kind = _FIRST_TOKEN if first else _DONE
                self._at(event.at + node.half, kind, (trip, trip.lease))
            elif first:
                self.begun(trip, self.now / SECOND)
            else:
                self._finish(trip)

    def _finish(self, trip: Trip) -> None:
        sequence = trip.sequence
        assert sequence is not None
        sequence.tag = None
        trip.cached_tokens = sequence.cached_tokens
        trip.preemptions = sequence.preemptions
        usage = (sequence.prompt_tokens, sequence.cached_tokens, sequence.output_tokens)
        self.finished(trip, usage, self.now / SECOND)

    def _leave(self, trip: Trip) -> None:
        """Its client has waited long enough for a first token."""
        if trip.end is not None or trip.first_token >= 0.0:
            return
        node, sequence = trip.node, trip.sequence
        if trip.lease is not None and node is not None and sequence is not None:
            trip.sequence = None
            self._advance(node)
            node.engine.cancel(sequence, self.now)
            self._arm(node)
        self.left(trip, self.now / SECOND)

    def over(self, request: Request, now: float) -> None:
        assert isinstance(request, Trip)
        self._open -= 1
        session = request.arrival.session
        turns = self._turns.get(session) if session else None
        if turns:
            index, arrival = turns.pop()
            self._at(self.now + max(arrival.think, 0), _ARRIVE, (index, arrival))

    # The valve's clock, as proxy/runtime.py has it

    def _poll(self, now: float) -> None:
        super()._poll(now)
        self._schedule()

    def _schedule(self) -> None:
        if not self.held:
            return
        wait = min(self.valve.next_wake() - self.now / SECOND, 3600.0)
        at = self.now + max(ceil(wait * SECOND), 1000)
        if self._wake < 0 or at < self._wake:
            self._wake = at
            self._at(at, _POLL)

    def _sweep(self) -> None:
        if self._metrics:
            for node in self.nodes.values():
                if self.now >= node.scrape_working_at:
                    self._scrape(node)
        self.sweep(self.now / SECOND)
        self._note_moves()
        if self._open:
            self._at(self.now + SWEEP, _SWEEP)
        else:
            self._sweeping = False

    def _note_moves(self) -> None:
        for index, backend in enumerate(self.fleet):
            if backend.available != self._available[index]:
                self._available[index] = backend.available
                self.result.moves.append((self.now, backend.name, backend.available))

    # Probes, as probes/runner.py has them

    def _pause(self, seconds: float) -> int:
        jitter = self.timing.jitter
        return round(seconds * (1.0 + self._jitter.uniform(-jitter, jitter)) * SECOND)

    def _check(self, node: Node) -> None:
        """Ask whether it is alive."""
        now, timing, backend = self.now / SECOND, self.timing, node.backend
        node.health.record(node.up)
        backend.connects = node.up
        if node.health.decided:
            backend.probed(node.health.is_up, now)
        if node.up:
            backend.observe_rtt(node.member.rtt / SECOND, now)
        self.fleet.refresh(now)
        self._note_moves()
        pause = timing.interval_s if node.health.is_up else min(timing.retry_s, timing.interval_s)
        self._at(self.now + self._pause(pause), _CHECK, node)

    def _scrape(self, node: Node) -> None:
        """Look at its engine's figures, if it is time: often while it works, rarely while it does not."""
        timing, backend, engine = self.timing, node.backend, node.engine
        works = backend.in_flight > 0 or engine.running + engine.waiting > 0
        if not works and self.now < node.scrape_idle_at:
            return
        if node.up:
            self._advance(node)
            self._arm(node)
            backend.running, backend.waiting = engine.running, engine.waiting
            backend.kv_use, backend.sampled_at = engine.kv_use(self.now), self.now / SECOND
            if self.log is not None:
                self.log.figures(self.fleet, self.now / SECOND)
        stretch = self._pause(1.0)
        node.scrape_working_at = self.now + round(timing.metrics_s * stretch)
        node.scrape_idle_at = self.now + round(timing.metrics_idle_s * stretch)

    # What goes wrong

    def _change(self, incident: Incident) -> None:
        node = self.nodes[incident.backend]
        change = incident.change
        if change is Change.DOWN:
            self._advance(node)
            node.up = False
            node.wake = -1
            node.engine = Engine(node.member.settings)
            for trip in self.result.trips:
                if trip.node is node and trip.lease is not None and trip.sequence is not None:
                    self._fail(trip, AttemptError.RESET)
        elif change is Change.UP:
            node.up = True
        else:
            node.change = change
            node.retry_after_s = incident.retry_after_s
