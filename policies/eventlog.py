"""The event log of a router: what happened outside its deciding, and every decision, as plain values.

One `EventLog` hears of both. `RecordedFleet` and `RecordedValve` tell it of what passes through them; the driver
(`proxy/eventlog.py`, `sim/router.py`) tells it why an attempt ended, and when it polls. A driver that goes through
the same events with a log of its own writes the same log again, line by line, if it decides alike: that is what
`sim/replay.py` looks for.

A record is a mapping that JSON can hold, numbered by `n` from 0 (`sim/record_forms.py` has the form of each). The
first is `start`: backends, policy, retries and health (`policies/health.py`). After it come events, each with its
name, and decisions:

| event | what happened | besides `at` |
|---|---|---|
| `arrival` | a request was submitted | `request`: its facts |
| `first token` | an attempt sent its first data | `request` |
| `failed` | an attempt failed before that | `request`, `error`, `outcome`, `pause` (of the backend, s), `usage` |
| `ended` | a request ended in any other way | `request`, `outcome`, `usage` |
| `freed` | after a request has ended: who waits may be asked | |
| `poll` | the valve was polled for any other reason | |
| `figures` | what is known of backends has changed (`OBSERVED`) | `backends`: by name, what is new |
| `refresh` | who is available was looked at, and something was new | `renewed`: models or slots had changed |
| `end` | nothing more is recorded | `reason` |

`at` is seconds, monotonic, since `start`, which is whole: such differences are exact, and so is their sum with it.
What is as it is by default is left out of facts and backends. An event with `within` happened amid a poll,
after its answers were decided. Sessions stand in the ledger's form: whoever gives `salted` makes the policies see
them in that form too, so that a replay sees what they saw. Of why a backend's models are unknown it holds only
that there is a reason: the reason may name a host.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from math import inf
from typing import Any, Final, NamedTuple

from policies.adaptive import AdaptiveSlots
from policies.base import Finished, Hold, Outcome, RequestFacts, Send
from policies.breaker import Breaker
from policies.health import Health
from policies.routing import Routing
from policies.rules import RuleSet
from policies.state import Backend, Fleet, Lease
from policies.valve import Valve

FORMAT: Final = 4

FACTS: Final = tuple([field for field in fields(RequestFacts) if field.name != "cached"])
"""Of a request, what is recorded; what of it is cached follows from what was sent where."""

CONFIGURED: Final = (
    *("name", "site", "slots", "weight", "models", "models_unknown", "models_awaited", "labels", "operator"),
    *("location", "data_classes", "context_tokens", "bandwidth", "price_input", "price_output"),
    *("carbon_gco2_kwh", "probed_up", "kv_tokens", "asleep", "standby"),
)
"""Of a backend, what the first record holds."""

OBSERVED: Final = (
    *("probed_up", "connects", "full_slots", "models", "models_unknown", "models_awaited", "context_tokens"),
    *("rtt_s", "running", "waiting", "kv_use", "sampled_at", "host", "host_at", "kv_tokens"),
    *("asleep", "draining", "over_budget"),
)
"""Of a backend, what probes set, where its standby is, and whether its budget is used up."""

_MODELS_UNKNOWN: Final = OBSERVED.index("models_unknown")

TIMES: Final = frozenset({"arrived", "deadline", "sampled_at", "host_at"})
SETS: Final = frozenset({"models", "data_classes"})
TUPLES: Final = frozenset({"prefix", "location"})

UNKNOWN: Final = "unknown"
"""Stands for every reason why models are unknown: no decision depends on which it is."""


class PolicySource(NamedTuple):
    """What a rule set was compiled from, by `policies.files.read_policy`."""

    name: str
    text: str
    seed: int


class Retries(NamedTuple):
    """How failed attempts are repeated."""

    ratio: float = 0.2
    per_second: float = 10.0
    attempts: int = 3


class EventLog:
    """Numbers records and hands them to `write`."""

    def __init__(
        self,
        write: Callable[[dict[str, Any]], None],
        policy: PolicySource,
        start: float = 0.0,
        salted: Callable[[str], str] | None = None,
        close: Callable[[str], None] | None = None,
    ) -> None:
        """`start`: monotonic time, the zero of the log, whole seconds. `salted`: what stands for a session.

        `close` is called once, with the reason, after the last record.
        """
        self.write = write
        self.policy = policy
        self.start = start
        self.salted = salted
        self.closed = False
        self.polling = False
        """The driver is amid a poll."""
        self.deciding = False
        """Fleet or valve are at work: what they do in there follows from the events."""
        self._close = close
        self._number = 0
        self._open: set[str] = set()
        """Requests that were submitted and have not ended."""
        self._ended: list[bool] = []
        """For each end whose place has not been offered yet: whether the request had been submitted."""
        self._attempt: dict[str, Any] | None = None
        """How the last attempt ended, while nobody has said why."""
        self._pause = 0.0
        self._figures: dict[str, tuple[object, ...]] = {}
        """By backend, as last told."""
        self._version = 0
        self._last = start

    def begin(self, fleet: Fleet, retries: Retries) -> None:
        """Write the first record."""
        backends, health = list(fleet), fleet.health
        self._figures = {backend.name: _figures(backend) for backend in backends}
        self._record(
            {
                "event": "start",
                "format": FORMAT,
                "start": self.start,
                "policy": self.policy._asdict(),
                "retries": retries._asdict(),
                "health": [health.slow_start_s, health.panic, health.most_ejected],
                "backends": [self._backend(backend) for backend in backends],
            }
        )

    def end(self, reason: str) -> None:
        """Write the last record. What comes later is not recorded."""
        if self.closed:
            return
        self._event("end", self._last, reason=reason)
        self.closed = True
        if self._close is not None:
            self._close(reason)

    # Told by fleet and valve

    def arrival(self, request: RequestFacts, now: float) -> None:
        if self.salted is not None and request.session:
            request.session = self.salted(request.session)
        self._open.add(request.id)
        self._event("arrival", now, request=self._facts(request))

    def decided(self, routing: Routing) -> None:
        decision = routing.decision
        said: dict[str, Any]
        if isinstance(decision, Send):
            said = {
                "send": decision.backend,
                "fallbacks": list(decision.fallbacks),
                "propensity": decision.propensity,
                "spilling": routing.spilling,
            }
        elif isinstance(decision, Hold):
            said = {"hold": _finite(decision.until - self.start)}
        else:
            said = {"reject": decision.code, "retry_after_s": decision.retry_after_s}
        request = routing.request.id
        by = {"decided_by": routing.decided_by, "rule": routing.rule, "tier": routing.tier}
        self._record({"decision": request, **said, **by})

    def first_token(self, lease: Lease, now: float) -> None:
        self._event("first token", now, request=lease.request.id)

    def released(self, request: str, outcome: Outcome, now: float, usage: tuple[int, int, int]) -> None:
        """An attempt has ended, or a hold was given up; `failed` or `ended` follows."""
        self._attempt = {"at": now, "request": request, "outcome": outcome.value, "usage": list(usage)}
        self._pause = 0.0

    def backed_off(self, seconds: float) -> None:
        self._pause = seconds

    def figures(self, backends: Iterable[Backend], now: float) -> None:
        """Note what probes have set since the last time."""
        changed: dict[str, Any] = {}
        for backend in backends:
            figures = _figures(backend)
            before = self._figures[backend.name]
            if figures == before:
                continue
            self._figures[backend.name] = figures
            changed[backend.name] = {
                name: self._plain(name, new)
                for name, old, new in zip(OBSERVED, before, figures, strict=True)
                if old != new
            }
        if changed:
            self._event("figures", now, backends=changed)

    def refreshed(self, renewed: bool, now: float) -> None:
        self._event("refresh", now, renewed=renewed)

    # Told by the driver

    def failed(self, error: str | int) -> None:
        """The last attempt failed before its first data; `error`: a status, or an `AttemptError`."""
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            self._event("failed", attempt.pop("at"), error=error, pause=self._pause, **attempt)

    def ended(self, request: str) -> None:
        """A request is over; `freed` follows."""
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            self._event("ended", attempt.pop("at"), **attempt)
        self._ended.append(request in self._open)
        self._open.discard(request)

    def freed(self, now: float) -> bool:
        """Its place may be given to who waits. False: it never had one, for it was refused unread."""
        submitted = self._ended.pop()
        if submitted and not self.polling:
            self._event("freed", now)
        return submitted

    def poll(self, now: float) -> None:
        self._event("poll", now)

    # Inside

    def _event(self, event: str, now: float, **values: Any) -> None:
        self._last = max(self._last, now)
        record: dict[str, Any] = {"event": event, "at": now - self.start, **values}
        if self.polling:
            record["within"] = True
        self._record(record)

    def _record(self, record: dict[str, Any]) -> None:
        if not self.closed:
            self.write({"n": self._number, **record})
            self._number += 1

    def _facts(self, request: RequestFacts) -> dict[str, Any]:
        values = ((field, getattr(request, field.name)) for field in FACTS)
        return {
            field.name: self._plain(field.name, value) for field, value in values if value != _default(field)
        }

    def _backend(self, backend: Backend) -> dict[str, Any]:
        values = (
            (field, getattr(backend, field.name)) for field in fields(Backend) if field.name in CONFIGURED
        )
        plain = {
            field.name: self._plain(field.name, value) for field, value in values if value != _default(field)
        }
        breaker = backend.breaker
        if backend.adaptive is not None:
            plain["adaptive"] = True
        return plain | {"breaker": [breaker.threshold, breaker.base_s, breaker.max_s]}

    def _plain(self, name: str, value: Any) -> Any:
        if name in TIMES:
            return value - self.start
        if name == "models_unknown":
            return UNKNOWN if value else ""
        if isinstance(value, frozenset):
            return sorted(value)
        if isinstance(value, tuple):
            return list(value)
        return dict(value) if isinstance(value, Mapping) else value


def backend_from(record: Mapping[str, Any], start: float) -> Backend:
    """The backend that a `start` record holds. KeyError, TypeError or ValueError: it holds none."""
    values = {
        name: plain_back(name, value, start)
        for name, value in record.items()
        if name not in ("breaker", "adaptive")
    }
    adaptive = AdaptiveSlots.of(record["name"]) if "adaptive" in record else None
    return Backend(**values, breaker=Breaker(*record["breaker"]), adaptive=adaptive)


def facts_from(record: Mapping[str, Any], start: float) -> RequestFacts:
    """The facts that an `arrival` holds. TypeError: it holds none."""
    return RequestFacts(**{name: plain_back(name, value, start) for name, value in record.items()})


def plain_back(name: str, value: Any, start: float) -> Any:
    """A value of facts or of a backend, as it was before it was recorded."""
    if name in TIMES:
        return start + value
    if name in SETS and value is not None:
        return frozenset(value)
    return tuple(value) if name in TUPLES and value is not None else value


class RecordedFleet(Fleet):
    """A fleet that tells of what is done to it from outside."""

    def __init__(self, backends: Sequence[Backend], log: EventLog, health: Health | None = None) -> None:
        super().__init__(backends, health)
        self.log = log
        self._told_version = self.version

    def replace(self, backends: Sequence[Backend]) -> None:
        self.log.end("the configuration was reloaded")
        super().replace(backends)

    def refresh(self, now: float) -> bool:
        log = self.log
        if log.deciding or log.closed:
            changed = super().refresh(now)
        else:
            log.figures(self, now)
            renewed = self.version != self._told_version
            changed = super().refresh(now)
            if changed or renewed:
                log.refreshed(renewed, now)
        self._told_version = self.version
        return changed

    def back_off(self, name: str, seconds: float, now: float) -> bool:
        self.log.backed_off(seconds)
        self.log.deciding = True
        changed = super().back_off(name, seconds, now)
        self.log.deciding = False
        return changed

    def first_token(self, lease: Lease, now: float) -> None:
        if lease.first_token_at is None:
            self.log.first_token(lease, now)
        self.log.deciding = True
        super().first_token(lease, now)
        self.log.deciding = False

    def release(
        self,
        lease: Lease,
        outcome: Outcome,
        now: float,
        usage: tuple[int, int, int] = (0, 0, 0),
    ) -> Finished | None:
        if not lease.released:
            self.log.released(lease.request.id, outcome, now, usage)
        self.log.deciding = True
        finished = super().release(lease, outcome, now, usage)
        self.log.deciding = False
        return finished


class RecordedValve(Valve):
    """A valve that tells of what it is asked, and of what it answers."""

    def __init__(self, rules: RuleSet, fleet: Fleet, log: EventLog) -> None:
        super().__init__(rules, fleet)
        self.log = log

    def submit(self, request: RequestFacts, now: float) -> Routing:
        self.log.arrival(request, now)
        self.log.deciding = True
        routing = super().submit(request, now)
        self.log.deciding = False
        self.log.decided(routing)
        return routing

    def retry(self, request: RequestFacts, routing: Routing, tried: Collection[str], now: float) -> Routing:
        self.log.deciding = True
        again = super().retry(request, routing, tried, now)
        self.log.deciding = False
        self.log.decided(again)
        return again

    def poll(self, now: float) -> list[Routing]:
        self.log.deciding = True
        answers = super().poll(now)
        self.log.deciding = False
        for routing in answers:
            self.log.decided(routing)
        return answers

    def cancel(self, request_id: str, now: float | None = None) -> bool:
        cancelled = super().cancel(request_id, now)
        if cancelled:
            self.log.released(request_id, Outcome.IGNORED, self._now if now is None else now, (0, 0, 0))
        return cancelled


def _figures(backend: Backend) -> tuple[object, ...]:
    """What probes set, as far as it is told."""
    figures = [getattr(backend, name) for name in OBSERVED]
    figures[_MODELS_UNKNOWN] = UNKNOWN if backend.models_unknown else ""
    return tuple(figures)


def _default(field: Field[Any]) -> object:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def _finite(value: float) -> float | None:
    return value if -inf < value < inf else None
