"""Backends behind a router, in virtual time: `sim.router.Router` before one `sim.engine.Engine` each.

Simulated are the arrivals, the network (half a round trip each way), the engines, what goes wrong, and the timeouts
of the proxy for what it has sent. The router knows of an engine what the proxy knows: its own counts, and figures
that are as old as the last scrape.

Time is an integer, microseconds, and what happens at one moment happens in a fixed order, so one seed gives one
result, byte for byte.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from heapq import heappop, heappush
from math import ceil, inf
from random import Random
from typing import Any, Final

from policies.base import RequestFacts
from policies.eventlog import EventLog
from policies.health import Health
from policies.lengths import EXPECTED_TOKENS
from policies.rules import RuleSet
from probes.base import Timing
from probes.passive import AttemptError
from sim.engine import FIRST_TOKEN, Engine, Sequence
from sim.members import Change, Incident, Member, Node
from sim.router import ATTEMPTS, BETWEEN_TOKENS_S, FIRST_TOKEN_S, TOTAL_S, Request, Router
from sim.timeouts import Timeouts
from sim.trips import Result, Trip
from sim.workload import Arrival, Workload

SECOND: Final = 1_000_000
"""Microseconds."""
SWEEP: Final = SECOND // 4
"""How often the proxy looks at what only time changes."""
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
CHECK: Final = 9
CALL: Final = 10


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
        first_token_s: float = FIRST_TOKEN_S,
        between_tokens_s: float = BETWEEN_TOKENS_S,
        total_s: float = TOTAL_S,
        limited: bool = False,
        metrics: bool = True,
        retry_ratio: float = 0.2,
        retries_per_s: float = 10.0,
        attempts: int = ATTEMPTS,
        health: Health | None = None,
        log: EventLog | None = None,
        epoch: float = 0.0,
    ) -> None:
        """`patience_s`: after which a client leaves that has not had its first token; no router knows of it.
        `first_token_s`, `between_tokens_s`, `total_s`: the router's own patience (`timeouts` of the proxy).
        `limited`: clients set `max_tokens`, to what their answers have; else they set none. `metrics`: the proxy
        reads the engines' figures (`probing.metrics`). `log`: as of `Router`. `epoch`: Unix time of the beginning,
        for rules on the time of day. Raises ValueError for no member, two of a name, an incident of no member."""
        self.members = list(members)
        if not self.members:
            raise ValueError("a cluster has one member at least")
        named = Counter(member.backend.name for member in self.members)
        if twice := [name for name, count in named.items() if count > 1]:
            raise ValueError(f"two members are named {twice[0]}: each has a name of its own")
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
        self._ran = False
        self._patience = patience_s
        self._epoch = epoch
        self._timeouts = Timeouts(first_token_s, between_tokens_s, total_s)
        self._limited = limited
        self._metrics = metrics
        self._jitter = Random(f"{seed}/probes")  # noqa: S311 - a simulation is to be repeated
        self._heap: list[tuple[int, int, int, Any]] = []
        """(time, order, kind of event, what it is about)."""
        self._order = 0
        self._open = 0
        """Requests that have not ended, those included that come after others of their session."""
        self._turns: dict[tuple[str, str], list[tuple[int, Arrival]]] = {}
        """By tenant and session: what comes after an answer, the next one last."""
        self._wake = -1
        """When the valve is polled next; below zero: when something happens. What else the heap has of polls
        is void."""
        self._sweeping = False
        self._available = [backend.available for backend in self.fleet]
        self._unit_tokens = 512
        """Prompt tokens that one hash of an arrival stands for."""
        self._model = next((model for backend in self.fleet for model in sorted(backend.models)), "")
        for incident in incidents:
            if incident.backend not in self.nodes:
                wrong, names = incident.backend, ", ".join(self.nodes)
                raise ValueError(f"an incident names the backend {wrong!r}, the members are {names}")
            self._at(incident.at, CALL, partial(self._change, incident))
        for node in self.nodes.values():
            if not node.up:
                begins = Incident(0, node.backend.name, Change.UP)
                self._at(node.member.starts, CALL, partial(self._change, begins))
            self._at(0, CHECK, node)

    def run(self, workload: Workload, progress: Callable[[int], None] | None = None) -> Result:
        """Play a workload and let everything end. `progress` hears of every thousandth arrival.

        Raises ValueError for an arrival that cannot be, and RuntimeError the second time: time does not begin anew.
        """
        if self._ran:
            raise RuntimeError("a cluster runs once: make a new one, of new members, for another run")
        for index, arrival in enumerate(workload):
            if arrival.at < 0 or arrival.prompt_tokens < 1 or arrival.output_tokens < 1:
                raise ValueError(
                    f"arrival {index} comes at {arrival.at} with {arrival.prompt_tokens} prompt and "
                    f"{arrival.output_tokens} output tokens: times are zero or more, tokens one or more"
                )
        self._ran = True
        self._unit_tokens = workload.unit_tokens or self._unit_tokens
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
            session = (arrival.tenant, arrival.session)
            if arrival.think >= 0 and session in turns:
                turns[session].append((index, arrival))
            else:
                if arrival.session:
                    turns.setdefault(session, [])
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
        elif kind == CHECK:
            self._check(subject)
        elif kind == _ARRIVE:
            index, arrival = subject
            self._arrive(index, arrival)
        elif kind == _LEAVE:
            self._leave(subject)
        else:
            subject()

    # The life of a request

    def _arrive(self, index: int, arrival: Arrival) -> None:
        now = self.now / SECOND
        most = arrival.output_tokens if self._limited else 0
        facts = RequestFacts(
            str(index),
            arrival.model or self._model,
            arrival.endpoint,
            tenant=arrival.tenant,
            data_class=arrival.data_class,
            arrived=now,
            wall=self._epoch + now,
            deadline=now + self._timeouts.total_s,
            stream=arrival.stream,
            body_bytes=arrival.prompt_tokens * BYTES_PER_TOKEN,
            prompt_tokens=arrival.prompt_tokens,
            max_tokens=most,
            expected_tokens=min(most or EXPECTED_TOKENS, EXPECTED_TOKENS),
            session=f"{arrival.tenant}\0{arrival.session}" if arrival.session else "",
            priority=arrival.priority,
            labels=dict(arrival.labels),
            prefix=arrival.hashes,
            prefix_tokens=self._unit_tokens,
        )
        trip = Trip(index, arrival, facts)
        self.result.trips.append(trip)
        self._timeouts.arrived(trip)
        if not self._sweeping:
            self._sweeping = True
            self._at((self.now // SWEEP + 1) * SWEEP, _SWEEP)
        self.submit(trip, now)
        if facts.id in self.held:
            self._schedule()
        if self._patience < inf and trip.end is None:
            self._at(self.now + round(self._patience * SECOND), _LEAVE, trip)

    def send(self, request: Request, now: float) -> None:
        assert isinstance(request, Trip)
        assert request.lease is not None
        request.sequence = None
        request.node = node = self.nodes[request.backend]
        self._timeouts.sent(request)
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
        self._stop(trip)
        self.left(trip, self.now / SECOND)

    def _give_up(self) -> None:
        """End the attempts that take too long, as `sweep` of proxy/exchange.py does."""
        now, timeouts, nodes = self.now / SECOND, self._timeouts, self.nodes.values()
        while (trip := timeouts.overdue(now)) is not None:
            self.overdue(trip, now, self._stop(trip))
        while (trip := timeouts.silent(now)) is not None:
            self._stop(trip)
            self.failed(trip, AttemptError.FIRST_TOKEN_TIMEOUT, now)
        while (trip := timeouts.stalled(nodes, now)) is not None:
            self.failed(trip, AttemptError.STALLED, now, usage=self._stop(trip))

    def _stop(self, trip: Trip) -> tuple[int, int, int]:
        """Let its engine forget its present attempt. -> what it has used there, if its answer has begun."""
        node, sequence = trip.node, trip.sequence
        if trip.lease is None or node is None or sequence is None:
            return 0, 0, 0
        trip.sequence = None
        self._advance(node)
        tokens = node.engine.tokens(sequence, self.now)
        node.engine.cancel(sequence, self.now)
        self._arm(node)
        if trip.first_token < 0.0:
            return 0, 0, 0
        return sequence.prompt_tokens, sequence.cached_tokens, tokens

    def over(self, request: Request, now: float) -> None:
        assert isinstance(request, Trip)
        self._open -= 1
        last = request.arrival
        turns = self._turns.get((last.tenant, last.session)) if last.session else None
        if turns:
            index, arrival = turns.pop()
            self._at(self.now + max(arrival.think, 0), _ARRIVE, (index, arrival))

    # The valve's clock, as proxy/runtime.py has it

    def _poll(self, now: float) -> None:
        super()._poll(now)
        if not self._polling:  # else the poll that runs will
            self._schedule()

    def _schedule(self) -> None:
        if not self.held:
            self._wake = -1
            return
        wait = min(self.valve.next_wake() - self.now / SECOND, 3600.0)
        at = self.now + max(ceil(wait * SECOND), 1000)
        if at != self._wake:
            self._wake = at
            self._at(at, _POLL)

    def _sweep(self) -> None:
        if self._metrics:
            for node in self.nodes.values():
                if self.now >= node.scrape_working_at:
                    self._scrape(node)
        self._give_up()
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
        changed = self.fleet.refresh(now)
        self._note_moves()
        if changed:
            self.poll(now)
        pause = timing.interval_s if node.health.is_up else min(timing.retry_s, timing.interval_s)
        self._at(self.now + self._pause(pause), CHECK, node)

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
            backend.kv_tokens = node.member.settings.kv_tokens or 0
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
                sequence = trip.sequence
                if (
                    trip.node is node
                    and trip.lease is not None
                    and sequence is not None
                    and sequence.finished < 0
                ):
                    trip.sequence = None  # it died with its engine
                    self._fail(trip, AttemptError.RESET)
        elif change is Change.UP:
            node.up = True
        else:
            node.change = change
            node.retry_after_s = incident.retry_after_s
