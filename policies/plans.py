"""The life of a plan: a proposal to start standbys, with what it takes, what it costs and what it promises.

One table says which moves there are, as for standbys. A plan is proposed by the controller, by a template or by
hand; in mode `auto` it is approved at once when it is within budget, in mode `confirm` somebody has to; it is
executed while its standbys start, and done when all of them are ready.

    proposed → approved → executing → done

A plan that nobody has approved in time expires, and one whose standby fails has failed. None of these comes back:
whoever still wants the capacity proposes it anew, with the figures of that time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import ceil, inf
from types import MappingProxyType
from typing import Any, Final

from policies.profile import Profile
from policies.standby import Event, Move, Standby, State

AUTO: Final = "auto"
CONFIRM: Final = "confirm"


class PlanState(StrEnum):
    """Where a plan is."""

    PROPOSED = "proposed"
    """It waits: for somebody to approve it, or for money."""
    APPROVED = "approved"
    """Its standbys are to start."""
    EXECUTING = "executing"
    """One of them has been told to."""
    DONE = "done"
    """All of them were ready."""
    REFUSED = "refused"
    """By somebody, before anything was started."""
    EXPIRED = "expired"
    """Nobody approved it in time, or nothing came of it."""
    FAILED = "failed"
    """One of its standbys failed before all were ready."""


class PlanEvent(StrEnum):
    """What happens to it."""

    APPROVE = "approve"
    REFUSE = "refuse"
    EXPIRE = "expire"
    BEGIN = "begin"
    """A standby of it leaves the state `standby`."""
    FINISH = "finish"
    """The last of its standbys is ready."""
    FAIL = "fail"


_S, _E = PlanState, PlanEvent

MOVES: Final[Mapping[tuple[PlanState, PlanEvent], PlanState]] = MappingProxyType(
    {
        (_S.PROPOSED, _E.APPROVE): _S.APPROVED,
        (_S.PROPOSED, _E.REFUSE): _S.REFUSED,
        (_S.PROPOSED, _E.EXPIRE): _S.EXPIRED,
        (_S.APPROVED, _E.BEGIN): _S.EXECUTING,
        (_S.APPROVED, _E.REFUSE): _S.REFUSED,
        (_S.APPROVED, _E.EXPIRE): _S.EXPIRED,
        (_S.EXECUTING, _E.FINISH): _S.DONE,
        (_S.EXECUTING, _E.FAIL): _S.FAILED,
        (_S.EXECUTING, _E.EXPIRE): _S.EXPIRED,
    }
)
"""State and event to the next state. What is not here does not happen: a second approval changes nothing."""

OPEN: Final = frozenset({_S.PROPOSED, _S.APPROVED, _S.EXECUTING})
"""States of which a standby has one plan at most."""
ENDED: Final = frozenset(PlanState) - OPEN


class Trigger(StrEnum):
    """What made a plan."""

    CONTROLLER = "controller"
    TEMPLATE = "template"
    HAND = "hand"


@dataclass(frozen=True, slots=True)
class Resources:
    """What a plan takes."""

    model: str = ""
    task: str = "generate"
    site: str = ""
    """Of all its standbys; several are joined by commas."""
    card: str = ""
    """Empty: nobody has said it."""
    cards: int = 1
    """Of each standby."""
    count: int = 1
    """Standbys."""
    image: str = ""
    """That is to run on it; empty: the provider brings its own."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is expected of it with all its places taken. None: unknown."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    tokens_per_s: float | None = None
    """Output tokens of all requests together."""
    concurrency: int | None = None
    """Requests at once inside the service level."""

    def and_then(self, other: Forecast) -> Forecast:
        """Of two standbys side by side: the slower times, the sum of what they do. What one does not know, both
        together do not."""
        return Forecast(
            _both(max, self.ttft_s, other.ttft_s),
            _both(max, self.tpot_s, other.tpot_s),
            _both(_sum, self.tokens_per_s, other.tokens_per_s),
            _both(_sum, self.concurrency, other.concurrency),
        )

    @property
    def known(self) -> bool:
        """Whether it says anything of times."""
        return self.ttft_s is not None or self.tpot_s is not None


def _sum(left: Any, right: Any) -> Any:
    return left + right


def _both(join: Any, left: Any, right: Any) -> Any:
    return None if left is None or right is None else join(left, right)


def forecast_of(profile: Profile | None, slots: int | None = None) -> Forecast:
    """What one engine promises when it is full, by the step law of its profile (`sim/engine.py`).

    All `capacity.users` decode in one step; each prompt is computed in between, so its tokens are spread over the
    steps of its answer. Where no profile is known, only the `slots` that somebody has configured are.
    """
    capacity = profile.capacity if profile is not None else None
    if profile is None or capacity is None or not capacity.users:
        return Forecast(concurrency=slots)
    users = capacity.users if slots is None else min(slots, capacity.users)
    step, prompt, output = profile.step, capacity.prompt_tokens, capacity.output_tokens
    decode_us = step.alpha_us + users * (step.beta_us + step.gamma_us * (prompt + output / 2))
    tpot_s = (decode_us + users * step.delta_us * prompt / output) / 1e6
    steps = ceil(prompt / profile.limits.max_num_batched_tokens)
    ttft_s = (profile.overhead_us + steps * decode_us + step.delta_us * prompt) / 1e6
    return Forecast(ttft_s, tpot_s, users / tpot_s, users)


@dataclass(frozen=True, slots=True)
class Decision:
    """One move of a plan."""

    event: PlanEvent
    after: PlanState
    by: str
    """`auto`, `webhook`, `manager`, or the name that somebody gave."""
    reason: str
    wall: float


@dataclass(frozen=True, slots=True)
class Plan:
    """One plan as it stands. Times are Unix seconds, money is the ledger's currency."""

    id: str
    standbys: tuple[str, ...]
    trigger: Trigger
    reason: str
    """Why the capacity is wanted, with the figures."""
    mode: str
    created: float
    expires: float
    resources: Resources = field(default_factory=Resources)
    forecast: Forecast = field(default_factory=Forecast)
    cost_per_hour: float | None = None
    """Of all standbys together; None: one of them does not say it."""
    budget_left: float | None = None
    """Of the tightest ceiling that it falls under, when it was proposed; None: there is none."""
    figures: Mapping[str, float] = field(default_factory=dict)
    template: str = ""
    state: PlanState = PlanState.PROPOSED
    waits_for: str = ""
    """What it waits for while it is proposed: approval, or the ceiling that is reached."""
    started: tuple[str, ...] = ()
    """Standbys of it that were told to start."""
    ready: tuple[str, ...] = ()
    """Standbys of it that have been ready."""
    stopped: tuple[tuple[str, float], ...] = ()
    """Standbys of it that were stopped since, and when."""
    decisions: tuple[Decision, ...] = ()

    @property
    def began(self) -> float | None:
        """When the first of its standbys was told to start; None: none was."""
        return next((made.wall for made in self.decisions if made.event is PlanEvent.BEGIN), None)

    @property
    def open(self) -> bool:
        """Whether it still holds its standbys."""
        return self.state in OPEN

    @property
    def approved_by(self) -> str:
        """Empty: nobody."""
        return next((made.by for made in self.decisions if made.event is PlanEvent.APPROVE), "")

    def may(self, event: PlanEvent) -> bool:
        """Whether there is such a move."""
        return (self.state, event) in MOVES

    def moved(self, event: PlanEvent, by: str, reason: str, wall: float) -> Plan | None:
        """The plan after the move that there is for the event. None: the event changes nothing."""
        after = MOVES.get((self.state, event))
        if after is None:
            return None
        made = Decision(event, after, by, reason, wall)
        return replace(self, state=after, waits_for="", decisions=(*self.decisions, made))

    @property
    def due(self) -> float:
        """Unix time at which it has waited too long: for approval, and as long again for a standby to begin."""
        since = self.decisions[-1].wall if self.decisions else self.created
        return since + self.expires - self.created

    @property
    def waiting(self) -> str:
        """What it waits for; empty: for nothing, since all its standbys have begun."""
        if self.state is PlanState.PROPOSED:
            return self.waits_for or "approval"
        behind = [name for name in self.standbys if name not in self.started]
        return f"{' and '.join(behind)} to begin" if self.open and behind else ""

    def is_due(self, wall: float) -> bool:
        """Whether it has waited too long; also where the clock was set back by more than it may wait."""
        if not self.waiting:
            return False
        earliest = self.due - 2.0 * (self.expires - self.created)
        return not earliest <= wall < self.due

    def dearer(self, cost_per_hour: float) -> str:
        """Why it does not hold any more if its standbys cost so much an hour now; empty: it does, or has begun."""
        if self.state is PlanState.EXECUTING or self.cost_per_hour is None:
            return ""
        if cost_per_hour <= self.cost_per_hour * (1.0 + 1e-9):
            return ""
        return f"it costs {cost_per_hour:g} an hour now, not {self.cost_per_hour:g}"

    def began_with(self, standby: str, wall: float, reason: str) -> Plan | None:
        """After one of its standbys was told to start. None: that changes nothing."""
        if standby not in self.standbys or standby in self.started:
            return None
        now = replace(self, started=(*self.started, standby))
        return (
            now if self.state is PlanState.EXECUTING else now.moved(PlanEvent.BEGIN, "manager", reason, wall)
        )

    def ready_with(self, standby: str, wall: float) -> Plan | None:
        """After one of its standbys became ready: done, if it was the last."""
        if standby not in self.standbys or standby in self.ready or self.state is not PlanState.EXECUTING:
            return None
        now = replace(self, ready=(*self.ready, standby))
        if set(now.ready) < set(now.standbys):
            return now
        return now.moved(PlanEvent.FINISH, "manager", "all its standbys are ready", wall)

    def stopped_with(self, standby: str, wall: float, reason: str) -> Plan | None:
        """After one of its standbys was stopped: nothing comes of it any more, if it was not done."""
        if standby not in self.standbys or self.began is None or standby in dict(self.stopped):
            return None
        now = replace(self, stopped=(*self.stopped, (standby, wall)))
        return now.moved(PlanEvent.EXPIRE, "manager", reason, wall) or now

    def after(self, move: Move) -> Plan | None:
        """After a move of one of its standbys. None: that changes nothing."""
        name, reason, wall = move.name, move.reason, move.wall
        if move.after is State.PREPARING:
            return self.began_with(name, wall, reason)
        if move.event is Event.STARTED:
            return (self.began_with(name, wall, "") or self).ready_with(name, wall)
        if move.event is Event.FAIL:
            return self.moved(PlanEvent.FAIL, "manager", f"{name}: {reason}", wall)
        if move.after is State.STANDBY:
            return self.stopped_with(name, wall, f"{name}: {reason}")
        return None

    def is_paid_for(self, since: float) -> bool:
        """Whether a template has to pay for what one of its standbys did after `since`, Unix time."""
        ended = dict(self.stopped)
        return bool(self.template) and any(ended.get(name, inf) > since for name in self.started)

    def as_seen(self, standby: Standby, wall: float) -> Plan | None:
        """After the moves of one of its standbys that a crash has swallowed. None: there were none."""
        name, since = standby.name, standby.since
        if standby.plan != self.id:
            return self.stopped_with(name, wall, f"{name} is on again") if name in self.started else None
        now = self.began_with(name, since, standby.reason) or self
        if standby.state is State.STANDBY:
            now = now.stopped_with(name, since, f"{name} stands by") or now
        elif standby.state is State.FAILED:
            now = now.moved(PlanEvent.FAIL, "manager", f"{name}: {standby.reason}", since) or now
        elif standby.state in (State.READY, State.DRAINING):
            now = now.ready_with(name, since) or now
        return None if now is self else now

    def as_dict(self) -> dict[str, Any]:
        """As the store writes it and the admin port shows it."""
        return {
            "id": self.id,
            "state": self.state.value,
            "standbys": list(self.standbys),
            "started": list(self.started),
            "ready": list(self.ready),
            "trigger": self.trigger.value,
            "template": self.template,
            "reason": self.reason,
            "figures": dict(self.figures),
            "mode": self.mode,
            "waits_for": self.waits_for,
            "resources": {name: getattr(self.resources, name) for name in Resources.__slots__},
            "cost_per_hour": self.cost_per_hour,
            "budget_left": self.budget_left,
            "forecast": {name: getattr(self.forecast, name) for name in Forecast.__slots__},
            "created": self.created,
            "expires": self.expires,
            "stopped": dict(self.stopped),
            "decisions": [
                {
                    "event": made.event.value,
                    "state": made.after.value,
                    "by": made.by,
                    "reason": made.reason,
                    "time": made.wall,
                }
                for made in self.decisions
            ],
        }


def plan_from(written: Mapping[str, Any]) -> Plan:
    """A plan as `as_dict` wrote it. Raises ValueError, KeyError or TypeError: it is none."""
    return Plan(
        id=_text(written["id"]),
        standbys=tuple(map(_text, written["standbys"])),
        trigger=Trigger(written["trigger"]),
        reason=_text(written["reason"]),
        mode=_text(written["mode"]),
        created=float(written["created"]),
        expires=float(written["expires"]),
        resources=Resources(**written["resources"]),
        forecast=Forecast(**written["forecast"]),
        cost_per_hour=written["cost_per_hour"],
        budget_left=written["budget_left"],
        figures={_text(name): float(value) for name, value in written["figures"].items()},
        template=_text(written["template"]),
        state=PlanState(written["state"]),
        waits_for=_text(written["waits_for"]),
        started=tuple(map(_text, written["started"])),
        ready=tuple(map(_text, written["ready"])),
        stopped=tuple((_text(name), float(wall)) for name, wall in written["stopped"].items()),
        decisions=tuple(
            Decision(
                PlanEvent(made["event"]),
                PlanState(made["state"]),
                _text(made["by"]),
                _text(made["reason"]),
                float(made["time"]),
            )
            for made in written["decisions"]
        ),
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a text was expected, not {value!r}")
    return value
