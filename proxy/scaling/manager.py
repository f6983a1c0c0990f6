"""All standbys of one proxy: asks the controller what to do, has it done, and shows the fleet where each is.

The only writer of their journal. A file lock says which process acts: during `tidegate upgrade` the one before has
to have ended its operations first. From then on that one reads in the journal what the new one does, so that its
last requests find a standby that has become ready.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Mapping
from math import inf
from pathlib import Path
from typing import Any, Final

from policies.scaling import Controller
from policies.standby import PAID, Event, Move, Standby, State
from policies.state import Backend
from proxy.appended import AppendedFile
from proxy.config import BackendConfig
from proxy.observe import Histogram
from proxy.scaling.asks import Asks
from proxy.scaling.decisions import Decisions
from proxy.scaling.filelock import FileLock
from proxy.scaling.hours import Hours
from proxy.scaling.journal import JOURNAL_FILE, UNTIL_STOPPED, Kept, StandbyJournal
from proxy.scaling.keeper import Keeper
from proxy.scaling.provider import Provider
from proxy.scaling.seams import Around, Gate, MakeProvider, NoGate, NotPossibleError, provided, section_of
from proxy.tasks import Tasks

log = logging.getLogger("tidegate")

TICK_S: Final = 1.0
"""Between two decisions, unless a request is held for a standby."""
LOCK_FILE: Final = "standbys.lock"
LOCK_LOOK_S: Final = 0.1
START_SECONDS: Final = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 180.0, 300.0, 600.0, 900.0, 1800.0)
"""Buckets of how long starts take."""


class Scaling:
    """`configure`, `read`, `begin`; at the end `stop`, or `hand_over` and `stop`."""

    def __init__(
        self,
        around: Around,
        make: MakeProvider,
        directory: Path,
        *,
        controller: Controller | None = None,
        gate: Gate | None = None,
        hours: Hours | None = None,
        journal: StandbyJournal | None = None,
        asks: Asks | None = None,
    ) -> None:
        """`asks`: of a scheduling platform."""
        self.around = around
        self.controller = controller or Controller()
        self.gate: Gate = gate or NoGate()
        self.hours = hours or Hours(None)
        self.keepers: dict[str, Keeper] = {}
        """By name; those included that are no longer configured, until nothing of them is left."""
        self.decisions = Decisions(around, self.controller, self.gate, asks, self.keepers)
        self.journal = journal or StandbyJournal(directory / JOURNAL_FILE)
        self.acting = False
        """Whether this process is the one that starts and stops."""
        self.trouble = ""
        """Why the journal cannot be written; empty: all is well."""
        self.moves: dict[tuple[str, str], int] = {}
        """By standby and event, since the start."""
        self.starts: dict[str, Histogram] = {}
        """Seconds from start to ready, by standby."""
        self.make = make
        self._tasks = Tasks()
        self._running: dict[str, asyncio.Task[Any]] = {}
        self._made: dict[str, Provider] = {}
        """Of those that there is no keeper of yet."""
        self._sections: dict[str, BackendConfig] = {}
        self._backends: dict[str, Backend] = {}
        """As which they run, also when the fleet does not have them any more."""
        self._wanted = asyncio.Event()
        self._lock = FileLock(directory / LOCK_FILE)
        self._handed_over = False
        self._ending = asyncio.Lock()
        self._ended = False

    # Configuration

    def make_all(self, sections: Collection[BackendConfig], make: MakeProvider) -> dict[str, Provider]:
        """Providers of all standbys that are new or changed. Raises what `make` does, and changes nothing."""
        made = {}
        for section in sections:
            before = self._sections.get(section.name)
            if section.standby is not None and (before is None or provided(before) != provided(section)):
                made[section.name] = make(section)
        return made

    def configure(
        self, sections: Collection[BackendConfig], made: Mapping[str, Provider], most: Mapping[str, int]
    ) -> None:
        """Follow a configuration: `made` of it, and how many standbys of a site may run at once."""
        self._sections = {section.name: section for section in sections if section.standby is not None}
        self.decisions.use(self._sections, most)
        if self._handed_over:
            self.show()
            return
        if not self.acting:
            made_so_far = {**self._made, **made}
            self._made = {name: made_so_far[name] for name in self._sections}
        for name, keeper in list(self.keepers.items()):
            keeper.configure(self._sections.get(name), made.get(name))
        if self.acting:
            for name, section in self._sections.items():
                if name not in self.keepers:
                    self._keep(section, Kept(Standby(name, since=self.around.wall())), made[name])
        self.show()

    # Start and end

    def read(self) -> None:
        """Learn from the journal where each standby is, before traffic comes. Raises OSError."""
        self.journal.read()
        self.show()

    def begin(self) -> None:
        """Look after them, as soon as no other process does."""
        self.spawn(self._act(), "standbys")

    async def _act(self) -> None:
        await self._alone()
        await self._open()
        self._keep_all()
        self.acting = True
        self.show()
        taken_up = [
            (keeper.kept, keeper.config, self.gate.template_of(keeper.standby.plan))
            for keeper in self.keepers.values()
        ]
        await self.hours.begin(taken_up, self.around.wall(), self.around.now())
        for name in list(self.keepers):
            if name not in self._running:  # a reload may have been faster
                self._run(name)
        while True:
            try:
                self.turn()
            except Exception:
                log.exception("deciding over standbys failed this time")
            try:
                async with asyncio.timeout(TICK_S):
                    await self._wanted.wait()
            except TimeoutError:
                pass
            self._wanted.clear()

    async def _alone(self) -> None:
        """Return as soon as no other process acts."""
        while True:
            pause_s = LOCK_LOOK_S
            try:
                if self._lock.taken():
                    return
            except OSError as error:
                self._not_written(error)
                pause_s = TICK_S
            await asyncio.sleep(pause_s)

    async def _open(self) -> None:
        """Try until it can be read and written: nothing is started that was not written."""
        while True:
            try:
                await asyncio.to_thread(self.journal.open)
            except OSError as error:
                self._not_written(error)
                await asyncio.sleep(TICK_S)
            else:
                self.trouble = ""
                return

    def _keep_all(self) -> None:
        """A keeper for each standby that is configured, and for each that may still run."""
        for name, kept in list(self.journal.kept.items()):
            section = self._sections.get(name)
            if kept.standby.state is State.STANDBY:
                if section is None:
                    self.journal.forget(name)
                else:
                    self._keep(section, kept, self._made.pop(name))
                continue
            old = section_of(kept, name)
            if section is not None and (old is None or provided(old) == provided(section)):
                self._keep(section, kept, self._made.pop(name))
                continue
            if old is None:
                continue
            try:
                provider = self.make(old)
            except Exception as error:
                log.error(
                    "standby %s may run, and cannot be stopped by the section that started it: %s",
                    name,
                    error,
                )
                continue
            keeper = self._keep(old, kept, provider)
            if section is None:
                keeper.leaving = True
            else:
                keeper.successor = (self._made.pop(name), section)
        for name, provider in self._made.items():
            self._keep(self._sections[name], Kept(Standby(name, since=0.0)), provider)
        self._made = {}

    def _keep(self, section: BackendConfig, kept: Kept, provider: Provider) -> Keeper:
        keeper = Keeper(self, kept, provider, section)
        self.keepers[keeper.name] = keeper
        if self.acting:
            self._run(keeper.name)
        return keeper

    def _run(self, name: str) -> None:
        self._running[name] = self.spawn(self._look_after(self.keepers[name]), f"standby {name}")

    async def _look_after(self, keeper: Keeper) -> None:
        await keeper.run()
        await keeper.close()
        if keeper.closing:
            return
        del self.keepers[keeper.name]
        self._backends.pop(keeper.name, None)
        if keeper.successor is not None:  # it was configured again meanwhile
            provider, section = keeper.successor
            self._keep(section, keeper.kept, provider)
        else:
            self.journal.forget(keeper.name)
            self.moves = {key: count for key, count in self.moves.items() if key[0] != keeper.name}
            self.starts.pop(keeper.name, None)
            self.hours.cost.pop(keeper.name, None)

    async def stop(self, *, keep: bool, hurry: Callable[[], bool] = lambda: False) -> None:
        """End with the proxy: all are stopped first, unless they are to go on (`keep`). `hurry`: wait no longer."""
        if self.acting and not keep:
            for keeper in self.keepers.values():
                keeper.closing = True
                keeper.wake()
            longest = max((keeper.terms.stop_timeout for keeper in self.keepers.values()), default=0.0)
            deadline = self.around.now() + longest
            while (  # noqa: ASYNC110 (`hurry` may change at any time)
                any(not task.done() for task in self._running.values())
                and self.around.now() < deadline
                and not hurry()
            ):
                await asyncio.sleep(0.05)
            for keeper in self.keepers.values():
                if keeper.state is not State.STANDBY:
                    log.warning(
                        "standby %s is still %s: the next start goes on with that", keeper.name, keeper.state
                    )
        await self._end()

    async def hand_over(self) -> None:
        """Another process acts from now on: let go, and follow what it does until this is cancelled."""
        self._handed_over = True
        follow = AppendedFile(self.journal.path, at_end=True)
        await self._end()
        while True:
            try:
                self.journal.learn(follow.news())
            except OSError as error:
                log.warning("%s cannot be read: %s", self.journal.path, error.strerror or error)
            self.keepers.clear()
            self.show()
            await asyncio.sleep(TICK_S)

    async def _end(self) -> None:
        self.acting = False
        async with self._ending:
            if self._ended:
                return
            await self._tasks.cancel_all()
            for keeper in self.keepers.values():
                await keeper.close()
            await asyncio.to_thread(self.journal.close)
            await self.hours.write(self.around.wall(), self.around.now())
            self._lock.release()
            self._ended = True

    # Deciding

    def wanted(self) -> None:
        """A request is held that only a standby may serve: decide at once."""
        self._wanted.set()

    def condition(self, name: str) -> str:
        """How it is, in words that follow its name: `starting for 12 s`."""
        keeper = self.keepers.get(name)
        if keeper is None:
            return f"{self._written(name)} ({self.idle})" if name in self._sections else "no standby"
        words = f"{keeper.state} for {keeper.in_state_s:.0f} s" if keeper.standby.run else "never started"
        if keeper.trouble or keeper.state is State.FAILED:
            words += f" ({keeper.trouble or keeper.standby.reason})"
        return words

    def answered(self, name: str) -> None:
        """The probes have had its first good answer."""
        if (keeper := self.keepers.get(name)) is not None:
            keeper.wake()

    def turn(self) -> None:
        """Decide once, and have it done."""
        now, wall = self.around.now(), self.around.wall()
        self.hours.advance(wall, now)
        if self.hours.due(now):
            self.spawn(self.hours.write(wall, now), "capacity hours")
        self.decisions.turn(now, wall)

    # By hand

    async def start(self, name: str, seconds: float = inf, by: str = "somebody") -> None:
        """Start it, and keep it on for so long; `by`: who wants it. Raises NotPossibleError, KeyError, OSError."""
        keeper = self._keeper(name)
        if keeper.wants_out:
            raise NotPossibleError(f"{name} is {keeper.state} and is no longer configured as it runs")
        if keeper.state in (State.STOPPING, State.FAILED):
            raise NotPossibleError(f"{name} is {keeper.state}: {keeper.trouble or keeper.standby.reason}")
        if keeper.state is State.STANDBY and not keeper.is_asked and not self.decisions.has_room(keeper):
            site = keeper.config.site
            raise NotPossibleError(
                f"site {site} may have {self.decisions.most[site]} run, and has: `scaling.most` says so"
            )
        until = UNTIL_STOPPED if seconds == inf else self.around.wall() + seconds
        starts = keeper.state is State.STANDBY and not keeper.is_asked
        plan = await self.gate.by_hand(name, by) if starts else ""
        await keeper.pin(until)
        keeper.ask(Event.START, "started by hand", plan)

    async def stop_one(self, name: str) -> None:
        """Stop it, as soon as what runs on it has ended. Raises NotPossibleError, KeyError, OSError."""
        keeper = self._keeper(name)
        runs = keeper.state in (State.PREPARING, State.STARTING, State.READY)
        if not (runs or keeper.pinned or (keeper.state is State.STANDBY and keeper.is_asked)):
            raise NotPossibleError(
                f"{name} is {keeper.state}: {keeper.standby.reason or 'it was never started'}"
            )
        await keeper.pin(0.0)
        keeper.ask(Event.STOP, "stopped by hand")

    def _keeper(self, name: str) -> Keeper:
        if not self.acting:
            raise NotPossibleError(f"nothing can be started or stopped now: {self.idle}")
        return self.keepers[name]

    # What keepers ask for

    def now(self) -> float:
        return self.around.now()

    def wall(self) -> float:
        return self.around.wall()

    def spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[Any]:
        return self._tasks.spawn(coroutine, name)

    def answers(self, name: str) -> bool:
        return self.around.answers(name)

    def in_flight(self, keeper: Keeper) -> int:
        backend = self._backends.get(keeper.name)
        running = backend.in_flight if backend is not None else 0
        return running if self.around.alone else max(running, 1)

    async def write(self, kept: Kept, move: Move | None) -> None:
        try:
            await self.journal.append(kept, move)
        except OSError as error:
            self._not_written(error)
            raise
        self.trouble = ""

    def _not_written(self, error: OSError) -> None:
        said = f"{error.filename or self.journal.path} cannot be written: {error.strerror or error}"
        if said != self.trouble:
            log.error("no standby is started or stopped: %s", said)
        self.trouble = said

    def moved(self, keeper: Keeper, move: Move) -> None:
        name, wall, now = keeper.name, self.around.wall(), self.around.now()
        level = logging.WARNING if move.event in (Event.FAIL, Event.FOUND) else logging.INFO
        log.log(level, "standby %s: %s -> %s: %s", name, move.before, move.after, move.reason)
        key = (name, str(move.event))
        self.moves[key] = self.moves.get(key, 0) + 1
        if move.event is Event.STARTED and keeper.began < inf:
            self.starts.setdefault(name, Histogram(START_SECONDS)).observe(now - keeper.began)
        if move.after in PAID:
            self.hours.open(keeper.kept, keeper.config, self.gate.template_of(move.plan), wall, now)
        elif move.after is State.STANDBY:
            self.hours.close(move.run, wall, now)
        self.gate.moved(move)
        self.show()
        self._wanted.set()

    def gone(self, keeper: Keeper) -> None:
        self.hours.close(keeper.standby.run, self.around.wall(), self.around.now())

    # Showing

    def show(self) -> None:
        """Have the fleet and the probes know where each standby is. The one place for that."""
        for name in self._sections:
            if name not in self.around.fleet.backends:  # a reload has not come so far
                continue
            keeper = self.keepers.get(name)
            if keeper is None or keeper.successor is None:
                self._backends[name] = self.around.fleet[name]
            if keeper is not None:
                state = State.STANDBY if keeper.successor is not None else keeper.state
            else:
                state = self._written(name)
            self.around.put(name, state)

    def _written(self, name: str) -> State:
        """Where one is, as far as the journal tells."""
        kept = self.journal.kept.get(name)
        if kept is None or kept.standby.state is not State.READY:
            return kept.standby.state if kept is not None else State.STANDBY
        section = section_of(kept, name)  # it may have been configured anew since, and is stopped first
        same = section is not None and provided(section) == provided(self._sections[name])
        return State.READY if same else State.STANDBY

    def known(self, name: str) -> tuple[Kept, BackendConfig]:
        """What is kept of one of `names`, and the section that it goes by."""
        keeper = self.keepers.get(name)
        if keeper is not None:
            return keeper.kept, keeper.config
        kept = self.journal.kept.get(name) or Kept(Standby(name, since=self.around.wall()))
        return kept, self._sections[name]

    def section(self, name: str) -> BackendConfig | None:
        """Its configuration; None: it has none any more."""
        return self._sections.get(name)

    @property
    def idle(self) -> str:
        """Why this process starts and stops nothing now; empty: it does."""
        return "" if self.acting else self.trouble or "another process starts and stops it"

    def standby_of(self, name: str) -> Standby | None:
        """As it stands; None: there is none, or this process does not act."""
        keeper = self.keepers.get(name)
        return keeper.standby if keeper is not None and self.acting else None

    @property
    def names(self) -> list[str]:
        """Of all, those included that are no longer configured and not gone yet."""
        return list(dict.fromkeys((*self._sections, *self.keepers)))
