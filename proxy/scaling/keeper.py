"""Who looks after one standby: does what its state asks for, and makes every move of it.

One task, so that there is at most one operation of the provider at a time, and no move between two others. A move
is written before it is in force (`journal.py`); what cannot be written is not made, and is tried again. Whatever is
cut off at any point, by a crash or an upgrade, goes on with the work of the state that was written last.

Lengths of time are taken from a clock that nobody sets; only what outlives the process is Unix time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import Any, Final, Protocol

from policies.standby import PAID, Event, Move, Standby, State
from proxy.config import BackendConfig
from proxy.scaling.guarded import STATUS_S, attempt, close, status_of
from proxy.scaling.journal import UNTIL_STOPPED, Kept
from proxy.scaling.provider import Presence, Provider, Status
from proxy.scaling.sections import StandbySection

log = logging.getLogger("tidegate")

RETRY_S: Final = 1.0
"""After a move that could not be written, or a bug."""
LOOK_S: Final = 20.0
"""How often the provider is asked whether something runs that nobody has started: a start that came late."""
SILENT_S: Final = 30.0
"""A ready one that does not answer for so long, and of which the provider knows nothing, is dead."""
HUNG_S: Final = 120.0
"""A ready one that does not answer for so long is dead although its engine runs."""
LONGEST_STOP_PAUSE_S: Final = 30.0
"""Between two stops of one that does not stop; the first pause is a second, each further one twice as long."""
CANCEL_S: Final = 10.0
"""An operation that was cancelled may take so long to end."""


class Owner(Protocol):
    """What a keeper asks of whoever has all of them (`manager.py`)."""

    def now(self) -> float:
        """Monotonic, seconds."""

    def wall(self) -> float:
        """Unix time."""

    def spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[Any]:
        """Start a task."""

    def answers(self, name: str) -> bool:
        """Whether the probes say that it answers now."""

    def in_flight(self, keeper: Keeper) -> int:
        """Requests that run on it, as far as is known."""

    async def write(self, kept: Kept, move: Move | None) -> None:
        """Have it on the disk. Raises OSError."""

    def moved(self, keeper: Keeper, move: Move) -> None:
        """A move is in force."""

    def gone(self, keeper: Keeper) -> None:
        """Nothing of it is left, and nothing is paid."""


@dataclass(frozen=True, slots=True)
class _Asked:
    event: Event
    reason: str
    plan: str = ""


class Keeper:
    """One standby, its provider, and the task that looks after it (`run`)."""

    def __init__(self, owner: Owner, kept: Kept, provider: Provider, config: BackendConfig) -> None:
        self.owner = owner
        self.kept = kept
        self.provider = provider
        self.config = config
        """What the provider was made of; kept with a run, to stop it by when it is no longer configured."""
        self.successor: tuple[Provider, BackendConfig] | None = None
        """It was configured anew: what runs is stopped first, then these take over."""
        self.leaving = False
        """It is no longer configured: what runs is stopped, and it is forgotten."""
        self.trouble = ""
        """What stands in its way now, in words; empty: nothing."""
        self.detail = ""
        """What the provider last said that it does."""
        self.progress: float | None = None
        self.entered = owner.now()
        """When it came into its state, monotonic."""
        if kept.standby.state in (State.STANDBY, State.READY):  # elsewhere a time-out begins anew
            self.entered -= max(owner.wall() - kept.standby.since, 0.0)
        self.began = inf
        """When it was last started, monotonic."""
        self.closing = False
        """The proxy stops: so does this, without draining."""
        self.done = False
        self._asked: _Asked | None = None
        self._begins = False
        """Its start is being written."""
        self._wake = asyncio.Event()
        self._writing = asyncio.Lock()
        """From one `kept` to the next: a move and a pin at the same time would each lose the other."""
        self._looked = -inf
        self._silent_since = inf
        self._absent = 0
        """Looks in a row at which the provider knew nothing of it."""
        self._gone = False
        """Of one that failed: nothing is left."""
        self._stops = 0
        """That have not stopped it."""
        self._retry_at = owner.now() + kept.standby.pause_left(owner.wall())
        self._pinned_until = self._pin_ends()
        self._turns: dict[State, Callable[[], Awaitable[None]]] = {
            State.STANDBY: self._stand_by,
            State.PREPARING: self._prepare,
            State.STARTING: self._start,
            State.READY: self._serve,
            State.DRAINING: self._drain,
            State.STOPPING: self._stop,
            State.FAILED: self._recover,
        }

    def __repr__(self) -> str:
        return f"<standby {self.name}: {self.state}>"

    @property
    def name(self) -> str:
        return self.standby.name

    @property
    def standby(self) -> Standby:
        return self.kept.standby

    @property
    def state(self) -> State:
        return self.kept.standby.state

    @property
    def terms(self) -> StandbySection:
        """How long things may take."""
        assert self.config.standby is not None
        return self.config.standby

    @property
    def in_state_s(self) -> float:
        return self.owner.now() - self.entered

    @property
    def pause_s(self) -> float:
        """Left of the back-off after a failure, seconds."""
        return max(self._retry_at - self.owner.now(), 0.0) if self.standby.failures else 0.0

    @property
    def pinned(self) -> bool:
        """Whether it was started by hand, to stay."""
        return self._pinned_until > self.owner.now()

    @property
    def wants_out(self) -> bool:
        return self.closing or self.leaving or self.successor is not None

    def ask(self, event: Event, reason: str, plan: str = "") -> bool:
        """Have it started or stopped. False: that is no move of its state, and nothing changes."""
        if event is Event.STOP and self.state is State.STANDBY and self.is_asked:
            # A start that has not begun is taken back; one that is being written is followed by the stop.
            self._asked = _Asked(event, reason) if self._begins else None
            return True
        if not self.standby.may(event) or (event is Event.START and self.wants_out):
            return False
        self._asked = _Asked(event, reason, plan)
        self._wake.set()
        return True

    @property
    def is_asked(self) -> bool:
        """Whether a start or stop is under way to become a move."""
        return self._asked is not None or self._begins

    @property
    def has_place(self) -> bool:
        """Whether something of it may run, or is about to: it counts against the ceiling of its site."""
        return self.is_asked or not (self.state is State.STANDBY or self._gone)

    def configure(self, section: BackendConfig | None, provider: Provider | None) -> None:
        """Follow a configuration. No `section`: it is no longer in there. `provider`: it is another standby now."""
        self.leaving = section is None
        if section is not None and provider is not None:
            self.successor = (provider, section)
        elif section is not None and self.successor is not None:  # what runs is still the one before
            self.successor = (self.successor[0], section)
        elif section is not None:
            self.config = section
        self._wake.set()

    def wake(self) -> None:
        """Something may have changed: look at once."""
        self._wake.set()

    async def pin(self, until: float) -> None:
        """Note that it is to stay until then, Unix time. Raises OSError."""
        async with self._writing:
            kept = replace(self.kept, pin=until)
            await self.owner.write(kept, None)
            self.kept = kept
            self._pinned_until = self._pin_ends()

    def _pin_ends(self) -> float:
        pin = self.kept.pin
        return inf if pin == UNTIL_STOPPED else self.owner.now() + max(pin - self.owner.wall(), 0.0)

    async def run(self) -> None:
        """Look after it until it is `done` or this is cancelled."""
        while not self.done:
            try:
                await self._turns[self.state]()
            except OSError as error:
                self.trouble = f"its next move cannot be written: {error.strerror or error}"
                log.error("standby %s: %s", self.name, self.trouble)
                await asyncio.sleep(RETRY_S)
            except Exception:
                log.exception("standby %s: this turn failed", self.name)
                await asyncio.sleep(RETRY_S)

    async def close(self) -> None:
        """Let go of the provider; what runs goes on."""
        await close(self.provider, self.name)

    # The states

    async def _stand_by(self) -> None:
        if self.successor is not None and self._looked > -inf:
            await self.close()
            self.provider, self.config = self.successor
            self.successor, self._looked = None, -inf
        left = self._looked + LOOK_S - self.owner.now()
        if left <= 0.0:
            status = await self._status()
            self._looked = self.owner.now()
            if status.presence in (Presence.STARTING, Presence.RUNNING) and self.owner.in_flight(self) == 0:
                await self._move(Event.FOUND, f"the provider has it {status.presence}, and nobody started it")
            return
        if self.leaving or self.closing:
            self.done = True
            return
        asked = self._take(Event.START)
        if asked is not None:
            try:
                self._begins = True
                await self._move(Event.START, asked.reason, asked.plan)
            except OSError:
                self._asked = self._asked or asked
                raise
            finally:
                self._begins = False
            return
        await self._wait(left)

    async def _prepare(self) -> None:
        run = self.standby.run
        outcome = await self._operate(
            partial(self.provider.prepare, run), self.terms.prepare_timeout, "to prepare"
        )
        await self._after(outcome, Event.PREPARED, "all that it needs is there")

    async def _start(self) -> None:
        run = self.standby.run
        outcome = await self._operate(partial(self.provider.start, run), self.terms.start_timeout, "to start")
        look_at, self._absent = self.owner.now() + STATUS_S, 0
        while outcome is None and not self.owner.answers(self.name):
            now = self.owner.now()
            if (asked := self._stop_asked()) is not None:
                outcome = asked
            elif self.in_state_s >= self.terms.start_timeout:
                outcome = f"it did not answer within {self.terms.start_timeout:g} s"
            elif now >= look_at:
                look_at = now + STATUS_S
                outcome = self._missing(await self._status())
            else:
                await self._wait(min(1.0, look_at - now))
        await self._after(outcome, Event.STARTED, "it answers")

    async def _serve(self) -> None:
        now = self.owner.now()
        asked = self._stop_asked()
        if asked is not None:
            await self._stop_by(asked)
            return
        first, answers = self._looked == -inf, self.owner.answers(self.name)
        if answers:
            self._silent_since, self._absent = inf, 0
            self.trouble = ""
        elif self._silent_since == inf:
            self._silent_since, self.trouble = now, "it does not answer"
        if first or (not answers and now - self._looked >= STATUS_S):
            status = await self._status()
            self._looked = self.owner.now()
            silent_s = now - self._silent_since if self._silent_since < inf else 0.0
            gone = self._missing(status)
            if first and status.presence is Presence.ABSENT:
                gone = gone or "it ended while the proxy did not run"
            elif status.presence is Presence.UNKNOWN and silent_s >= SILENT_S:
                gone = f"it has not answered for {silent_s:.0f} s: {status.detail or 'nobody knows of it'}"
            elif silent_s >= HUNG_S:
                gone = f"its engine runs, and has not answered for {silent_s:.0f} s"
            if gone:
                await self._move(Event.FAIL, gone)
            return
        await self._wait(1.0)

    async def _drain(self) -> None:
        asked = self._take(Event.START)
        if asked is not None:
            await self._move(Event.START, asked.reason)
            return
        running = self.owner.in_flight(self)
        left = 0.0 if self.closing else self.terms.drain - self.in_state_s
        if running == 0:
            await self._move(Event.DRAINED, "nothing runs on it any more")
        elif left <= 0.0:
            await self._move(Event.DRAINED, f"{running} requests still ran after {self.in_state_s:.0f} s")
        else:
            await self._wait(min(left, 1.0))

    async def _stop(self) -> None:
        self._asked = None
        if await self._stopped():
            await self._move(Event.STOPPED, "nothing of it is left")

    async def _recover(self) -> None:
        self._asked = None
        if not self._gone:
            if not await self._stopped():
                return
            if self.kept.paid_since:
                async with self._writing:
                    kept = replace(self.kept, paid_since=0.0)
                    await self.owner.write(kept, None)
                    self.kept = kept
                self.owner.gone(self)
            self._gone = True
        elif self.wants_out or self.pause_s <= 0.0:
            await self._move(Event.RECOVERED, f"after a pause; it had failed: {self.standby.reason}")
        else:
            await self._wait(self.pause_s)

    # What they are made of

    async def _after(self, outcome: str | _Asked | None, event: Event, reason: str) -> None:
        if isinstance(outcome, _Asked):
            await self._stop_by(outcome)
        elif outcome is not None:
            await self._move(Event.FAIL, outcome)
        else:
            await self._move(event, reason)

    async def _stop_by(self, asked: _Asked) -> None:
        try:
            await self._move(Event.STOP, asked.reason)
        except OSError:
            self._asked = self._asked or asked
            raise

    def _take(self, event: Event) -> _Asked | None:
        """What was asked for, if it is this, once; anything else is void here."""
        asked, self._asked = self._asked, None
        return asked if asked is not None and asked.event is event and not self.wants_out else None

    def _stop_asked(self) -> _Asked | None:
        if self.wants_out:
            words = (
                "the proxy stops"
                if self.closing
                else "it is no longer configured"
                if self.leaving
                else "it was configured anew"
            )
            return _Asked(Event.STOP, words)
        asked, self._asked = self._asked, None
        return asked if asked is not None and asked.event is Event.STOP else None

    def _missing(self, status: Status) -> str | None:
        """Why it is dead, once the provider has known nothing of it twice in a row."""
        self._absent = self._absent + 1 if status.presence is Presence.ABSENT else 0
        if self._absent < 2:
            return None
        return (
            f"it ended: {status.detail}" if status.detail else "it ended, and the provider does not say why"
        )

    async def _stopped(self) -> bool:
        """Have it stopped, once; whether the provider then says that nothing is left. Pauses if not."""
        outcome = await self._operate(
            partial(self.provider.stop, self.standby.run), self.terms.stop_timeout, "to stop", stoppable=False
        )
        status = await self._status()
        if status.presence is Presence.ABSENT:
            self._stops = 0
            return True
        said = str(outcome or status.detail or f"the provider has it {status.presence}")
        if said != self.trouble:
            log.warning("standby %s does not stop: %s", self.name, said)
        self.trouble = said
        pause_s = min(RETRY_S * 2.0 ** min(self._stops, 16), LONGEST_STOP_PAUSE_S)
        self._stops += 1
        await asyncio.sleep(pause_s)
        return False

    async def _operate(
        self,
        operation: Callable[[], Coroutine[Any, Any, None]],
        timeout_s: float,
        doing: str,
        *,
        stoppable: bool = True,
    ) -> str | _Asked | None:
        """Do one thing; None: it went well, else why it did not, or the stop that has ended it."""
        failed: list[str] = []
        task = self.owner.spawn(attempt(operation, failed, self.name), f"standby {self.name}")
        task.add_done_callback(lambda _: self._wake.set())
        deadline = self.owner.now() + timeout_s
        try:
            while not task.done():
                if stoppable and (asked := self._stop_asked()) is not None:
                    return asked
                left = deadline - self.owner.now()
                if left <= 0.0:
                    return f"it took longer than {timeout_s:g} s {doing}"
                await self._wait(left)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=CANCEL_S)
        return failed[0] if failed else None

    async def _status(self) -> Status:
        status = await status_of(self.provider, self.name)
        self.detail, self.progress = status.detail, status.progress
        return status

    async def _wait(self, seconds: float) -> None:
        """Until something may have changed, at most so long."""
        try:
            async with asyncio.timeout(max(seconds, 0.0)):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()

    async def _move(self, event: Event, reason: str, plan: str = "") -> None:
        """Take the move if there is one. Raises OSError: it could not be written, and is not made."""
        async with self._writing:
            await self._move_now(event, reason, plan)

    async def _move_now(self, event: Event, reason: str, plan: str) -> None:
        standby = replace(self.standby)
        wall, now = self.owner.wall(), self.owner.now()
        before = standby.state
        move = standby.move(event, reason, wall, plan)
        if move is None:
            return
        kept = replace(self.kept, standby=standby)
        if before is State.STANDBY:
            kept.backend = self.config.model_dump(mode="json")
        if standby.state in PAID and not kept.paid_since:
            kept.paid_since = wall
        if standby.state is State.STANDBY:
            kept.backend, kept.paid_since = {}, 0.0
        if event is Event.STARTED and self.began < inf:
            took = now - self.began
            kept.cold_start_s = (kept.cold_start_s + took) / 2 if kept.cold_start_s else took
        await self.owner.write(kept, move)
        self.kept, self.entered, self.trouble = kept, self.owner.now(), ""
        self._silent_since, self._absent, self._gone, self._stops = inf, 0, False, 0
        if standby.state in (State.STANDBY, State.READY):
            self._looked = self.entered  # just seen
        if event is Event.FAIL:
            self._retry_at = self.entered + standby.pause_left(wall)
        if standby.state is State.PREPARING:
            self.began = self.entered
        elif standby.state is State.STANDBY:
            self.began = inf
        self.owner.moved(self, move)
