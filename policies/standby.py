"""The life of a standby: a backend that is bound but not running, until traffic needs it.

One table says which moves there are. Whoever acts (`proxy/scaling/`, the simulator) does in each state what
`WORK` says, as often as it likes, since every operation of a provider is idempotent, and reports what came of it
as an event. So a process that was killed goes on where the last written move left it, and does nothing twice.

    standby → preparing → starting → ready → draining → stopping → standby

Whatever fails is failed: what there may be of it is stopped first, then, after a pause that doubles with each
failure, it is a standby again. Draining can be taken back, since nothing was stopped yet; stopping cannot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

FIRST_PAUSE_S: Final = 5.0
"""After the first failure; doubled with each further one in a row."""
LONGEST_PAUSE_S: Final = 300.0
STEADY_S: Final = 300.0
"""One that was ready for so long starts with the first pause again: shorter lives are flapping."""


class State(StrEnum):
    """Where a standby is."""

    STANDBY = "standby"
    """Nothing runs; nothing is paid."""
    PREPARING = "preparing"
    """What must be there first is being brought: tunnel, model files, image."""
    STARTING = "starting"
    """Told to start, and does not answer yet."""
    READY = "ready"
    """Answers; takes requests."""
    DRAINING = "draining"
    """Takes nothing new; what runs on it ends."""
    STOPPING = "stopping"
    """Told to stop, and not known to have stopped."""
    FAILED = "failed"
    """Something went wrong; what is left of it is being stopped, or it waits to be tried again."""


class Event(StrEnum):
    """What happens to it."""

    START = "start"
    """Somebody wants it."""
    PREPARED = "prepared"
    STARTED = "started"
    """It answers."""
    STOP = "stop"
    """Nobody wants it any more."""
    DRAINED = "drained"
    """Nothing runs on it, or no longer may."""
    STOPPED = "stopped"
    """The provider says that nothing is left of it."""
    FAIL = "fail"
    """An operation failed or took too long, or it died."""
    RECOVERED = "recovered"
    """Nothing is left of what failed, and the pause is over."""
    FOUND = "found"
    """Something runs that nobody has started: left over from an earlier life."""


class Work(StrEnum):
    """What is to be done while it is in a state."""

    PREPARE = "prepare"
    START = "start"
    STOP = "stop"


_S, _E = State, Event

MOVES: Final[Mapping[tuple[State, Event], State]] = MappingProxyType(
    {
        (_S.STANDBY, _E.START): _S.PREPARING,
        (_S.STANDBY, _E.FOUND): _S.STOPPING,
        (_S.PREPARING, _E.PREPARED): _S.STARTING,
        (_S.PREPARING, _E.STOP): _S.STOPPING,
        (_S.PREPARING, _E.FAIL): _S.FAILED,
        (_S.STARTING, _E.STARTED): _S.READY,
        (_S.STARTING, _E.STOP): _S.STOPPING,
        (_S.STARTING, _E.FAIL): _S.FAILED,
        (_S.READY, _E.STOP): _S.DRAINING,
        (_S.READY, _E.FAIL): _S.FAILED,
        (_S.DRAINING, _E.START): _S.READY,
        (_S.DRAINING, _E.DRAINED): _S.STOPPING,
        (_S.DRAINING, _E.FAIL): _S.FAILED,
        (_S.STOPPING, _E.STOPPED): _S.STANDBY,
        (_S.FAILED, _E.RECOVERED): _S.STANDBY,
    }
)
"""State and event to the next state. What is not here does not happen: a second start of one that starts changes
nothing."""

WORK: Final[Mapping[State, Work]] = MappingProxyType(
    {
        _S.PREPARING: Work.PREPARE,
        _S.STARTING: Work.START,
        _S.STOPPING: Work.STOP,
        _S.FAILED: Work.STOP,
    }
)
"""What a provider is to be asked for in each state, again after a restart."""

PAID: Final = frozenset({_S.STARTING, _S.READY, _S.DRAINING, _S.STOPPING})
"""States in which its hours are paid."""


@dataclass(frozen=True, slots=True)
class Move:
    """One move, as the journal has it."""

    name: str
    run: str
    """Of one start to the end of its stop; providers take it for an idempotency key. Empty: never started."""
    before: State
    event: Event
    after: State
    reason: str
    """In words, with the figures that led to it."""
    wall: float
    """Unix time."""
    plan: str = ""
    """Id of the plan that paid for the run; empty: none."""


@dataclass(slots=True)
class Standby:
    """One standby as it stands. `move` is the only thing that changes it."""

    name: str
    state: State = State.STANDBY
    run: str = ""
    since: float = 0.0
    """Unix time of the last move."""
    reason: str = ""
    """Of the last move."""
    failures: int = 0
    """In a row."""
    retry_at: float = 0.0
    """Unix time before which a failed one is not tried again. After a clock was set back it is at most
    `LONGEST_PAUSE_S` away: see `pause_left`."""
    ready_at: float = 0.0
    """Unix time at which this run was last ready; 0: it was not."""
    plan: str = ""
    runs: int = 0

    def may(self, event: Event) -> bool:
        """Whether there is such a move."""
        return (self.state, event) in MOVES

    def move(self, event: Event, reason: str, wall: float, plan: str = "") -> Move | None:
        """Take the move there is for the event, if there is one. None: the event changes nothing."""
        after = MOVES.get((self.state, event))
        if after is None:
            return None
        before = self.state
        if before is State.STANDBY:
            self.runs += 1
            self.run, self.plan, self.ready_at = f"{self.name}-{int(wall)}-{self.runs}", plan, 0.0
        if event is Event.FAIL:
            if before is State.READY and wall - self.ready_at >= STEADY_S:
                self.failures = 0
            self.failures += 1
            self.retry_at = wall + pause_after(self.failures)
        elif event is Event.STOPPED:
            if self.ready_at and wall - self.ready_at >= STEADY_S:
                self.failures = 0
        elif event is Event.STARTED:
            self.ready_at = wall
        self.state, self.since, self.reason = after, wall, reason
        return Move(self.name, self.run, before, event, after, reason, wall, self.plan)

    def pause_left(self, wall: float) -> float:
        """Seconds until a failed one may be tried again, whatever was done to the clock."""
        return min(max(self.retry_at - wall, 0.0), pause_after(self.failures)) if self.failures else 0.0


def pause_after(failures: int) -> float:
    """Seconds of back-off after so many failures in a row."""
    if failures <= 0:
        return 0.0
    return min(FIRST_PAUSE_S * 2.0 ** min(failures - 1, 16), LONGEST_PAUSE_S)
