"""The router of a simulation: the proxy's own deciding, driven as `proxy/exchange.py` and
`proxy/runtime.py` drive it.

The fleet, the valve, the policies, the breakers and the retry budget are the objects that the proxy runs.
What the proxy does around them at each point of a request's life stands here once more, without sockets:
whoever inherits from `Router` sends requests somewhere and tells what became of them (`sim/cluster.py` to
simulated engines, `sim/replay.py` as a log says). Times are seconds, monotonic, as everywhere in
`policies/`. Hedging is left out: a simulated request is on one backend at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import Enum
from typing import Final

from policies.base import Hold, Outcome, Reject, RequestFacts, Send
from policies.eventlog import EventLog, RecordedFleet, RecordedValve, Retries
from policies.health import Health
from policies.retries import RetryBudget
from policies.routing import Routing
from policies.rules import RuleSet
from policies.state import Backend, Fleet, Lease
from policies.valve import Valve
from probes.passive import BACKOFF_MAX_S, AttemptError, backoff_s, is_silent, outcome_of, tried_elsewhere

ATTEMPTS: Final = 3
"""Backends that one request is sent to at most, as configured by default."""
FIRST_TOKEN_S: Final = 120.0
BETWEEN_TOKENS_S: Final = 30.0
TOTAL_S: Final = 3600.0
"""Timeouts, as configured by default."""


class End(Enum):
    """How a request ended."""

    OK = "ok"
    CLIENT_ERROR = "client_error"
    """A backend found fault with the request itself."""
    REJECTED = "rejected"
    """By the router: queue full, waited too long, nothing available."""
    FAILED = "failed"
    """No backend answered."""
    CUT = "cut"
    """The answer had begun and broke off."""
    GONE = "gone"
    """The client left."""


class Request:
    """One request on its way, as the router sees it, and afterwards what became of it. Times are seconds."""

    __slots__ = (
        "attempts",
        "backend",
        "end",
        "ended",
        "facts",
        "first_token",
        "held_s",
        "lease",
        "reason",
        "routing",
        "tried",
    )

    def __init__(self, facts: RequestFacts) -> None:
        self.facts = facts
        self.routing: Routing | None = None
        """The last decision; None once the request has ended."""
        self.lease: Lease | None = None
        """Of the present attempt."""
        self.tried: frozenset[str] = frozenset()
        self.attempts = 0
        self.backend = ""
        """The last one that it was sent to."""
        self.held_s = 0.0
        """How long the valve kept it."""
        self.first_token = -1.0
        """Below zero: none came."""
        self.ended = -1.0
        self.end: End | None = None
        self.reason = ""
        """Why it was refused, or failed."""

    @property
    def arrived(self) -> float:
        return self.facts.arrived

    @property
    def ttft_s(self) -> float | None:
        """From its arrival to its first token; None: none came."""
        return self.first_token - self.facts.arrived if self.first_token >= 0.0 else None

    @property
    def total_s(self) -> float:
        """From its arrival to its end."""
        return self.ended - self.facts.arrived


class Router(ABC):
    """Decides over requests and counts them, until each has ended exactly once."""

    def __init__(
        self,
        backends: Sequence[Backend],
        rules: RuleSet,
        *,
        retry_ratio: float = 0.2,
        retries_per_s: float = 10.0,
        attempts: int = ATTEMPTS,
        health: Health | None = None,
        log: EventLog | None = None,
    ) -> None:
        """`log`: hears of everything, from the first record on."""
        self.log = log
        if log is None:
            self.fleet = Fleet(backends, health)
            self.valve = Valve(rules, self.fleet)
        else:
            self.fleet = recorded = RecordedFleet(backends, log, health)
            self.valve = RecordedValve(rules, recorded, log)
            log.begin(recorded, Retries(retry_ratio, retries_per_s, attempts))
        self.retry_budget = RetryBudget(retry_ratio, retries_per_s)
        self.attempts = attempts
        self.held: dict[str, Request] = {}
        """By id: those that the valve keeps."""
        self._polling = False
        self._poll_again = False

    # What whoever inherits does

    @abstractmethod
    def send(self, request: Request, now: float) -> None:
        """It is leased to `request.lease.backend`: send it there."""

    @abstractmethod
    def over(self, request: Request, now: float) -> None:
        """It has ended."""

    def decided(self, request: Request, now: float) -> None:  # noqa: B027 - for who wants to know
        """`request.routing` is new."""

    # What happens to a request

    def submit(self, request: Request, now: float) -> None:
        """It has arrived, and is admitted."""
        self.retry_budget.deposit(now)
        self._routed(request, self.valve.submit(request.facts, now), now)

    def begun(self, request: Request, now: float) -> None:
        """Its first token is there."""
        assert request.lease is not None
        request.first_token = now
        self.fleet.first_token(request.lease, now)

    def finished(self, request: Request, usage: tuple[int, int, int], now: float) -> None:
        """Its answer is complete; `usage`: tokens of the prompt, of it cached, and of the answer."""
        self.settled(request, End.OK, Outcome.OK, now, usage)

    def failed(
        self,
        request: Request,
        error: AttemptError | int,
        now: float,
        retry_after_s: float | None = None,
        usage: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        """Its attempt has failed; `error`: a status, or why there is none. `usage`: as far as it was told."""
        assert request.lease is not None
        name = request.lease.backend.name
        outcome = outcome_of(error, retry_after_s is not None)
        reason = error.value if isinstance(error, AttemptError) else f"status {error}"
        if request.first_token >= 0.0:
            self.settled(request, End.CUT, outcome, now, usage, reason)
            return
        if isinstance(error, int) and not tried_elsewhere(error):
            self.settled(request, End.CLIENT_ERROR, outcome, now, usage, reason)
            return
        request.lease.silent = is_silent(error)
        self._release(request, outcome, now, usage)
        if isinstance(error, int):
            pause = _pause_s(error, retry_after_s)
            if pause > 0.0:
                self.fleet.back_off(name, pause, now)
        if self.log is not None:
            self.log.failed(error if isinstance(error, int) else error.value)
        request.tried |= {name}
        assert request.routing is not None
        others = self.valve.rules.candidates(request.facts, self.fleet).without(request.tried).order
        if others and request.attempts < self.attempts and self.retry_budget.withdraw(now):
            routing = self.valve.retry(request.facts, request.routing, request.tried, now)
            if type(routing.decision) is Send:
                self._routed(request, routing, now)
                return
        self._end(request, End.FAILED, now, reason)

    def overdue(self, request: Request, now: float, usage: tuple[int, int, int] = (0, 0, 0)) -> None:
        """It was sent, and the time for all of it is over; `usage`: as far as it was told."""
        end = End.CUT if request.first_token >= 0.0 else End.FAILED
        error = AttemptError.DEADLINE
        self.settled(request, end, outcome_of(error), now, usage, error.value)

    def left(self, request: Request, now: float, usage: tuple[int, int, int] = (0, 0, 0)) -> None:
        """Its client has gone; `usage`: as far as it was told."""
        self.settled(request, End.GONE, Outcome.IGNORED, now, usage)

    def settled(
        self,
        request: Request,
        end: End,
        outcome: Outcome,
        now: float,
        usage: tuple[int, int, int] = (0, 0, 0),
        reason: str = "",
    ) -> None:
        """It is over, held or sent, and is not tried again. `outcome`: of its attempt, if it is sent."""
        if request.lease is None:
            self.valve.cancel(request.facts.id, now)
            self.held.pop(request.facts.id, None)
        self._release(request, outcome, now, usage)
        self._end(request, end, now, reason)

    # Time

    def poll(self, now: float) -> None:
        """Let the valve answer those that it holds: time has passed, or a probe has found something."""
        if self.log is not None and not self._polling:
            self.log.poll(now)
        self._poll(now)

    def freed(self, now: float) -> None:
        """A request has ended: somebody may be waiting for its place."""
        if self.log is not None:
            self.log.freed(now)
        if self.valve.queued:
            self._poll(now)

    def sweep(self, now: float) -> None:
        """What the proxy does a few times a second."""
        self.fleet.refresh(now)
        self.poll(now)

    # Inside

    def _poll(self, now: float) -> None:
        if self._polling:
            self._poll_again = True
            return
        self._polling = True
        if self.log is not None:
            self.log.polling = True
        while True:
            self._poll_again = False
            for routing in self.valve.poll(now):
                request = self.held.pop(routing.request.id)
                request.held_s = routing.held_s
                self._routed(request, routing, now)
            if not self._poll_again:
                break
        self._polling = False
        if self.log is not None:
            self.log.polling = False

    def _routed(self, request: Request, routing: Routing, now: float) -> None:
        request.routing = routing
        decision = routing.decision
        self.decided(request, now)
        if type(decision) is Send:
            lease = routing.lease
            assert lease is not None
            request.lease = lease
            request.attempts += 1
            request.backend = lease.backend.name
            self.send(request, now)
        elif type(decision) is Hold:
            self.held[request.facts.id] = request
        else:
            assert type(decision) is Reject
            self._end(request, End.REJECTED, now, decision.code)

    def _release(
        self, request: Request, outcome: Outcome, now: float, usage: tuple[int, int, int] = (0, 0, 0)
    ) -> None:
        lease = request.lease
        if lease is not None:
            request.lease = None
            self.fleet.release(lease, outcome, now, usage)

    def _end(self, request: Request, end: End, now: float, reason: str = "") -> None:
        request.end = end
        request.reason = reason
        request.ended = now
        if self.log is not None:
            self.log.ended(request.facts.id)
        request.routing = None
        self.over(request, now)
        self.freed(now)


def _pause_s(status: int, retry_after_s: float | None) -> float:
    """`probes.passive.backoff_s` for a field whose value is a number already."""
    if retry_after_s is None:
        return backoff_s(status, None, 0.0)
    return min(backoff_s(status, f"{BACKOFF_MAX_S:.0f}", 0.0), retry_after_s)
