"""Engines that are started and stopped by a provider that the test spoils, and a proxy around them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from policies.scaling import Controller, ScalingSettings
from policies.standby import State
from policies.state import Backend, Fleet
from proxy.config import BackendConfig
from proxy.scaling.journal import JOURNAL_FILE, StandbyJournal
from proxy.scaling.manager import Scaling
from proxy.scaling.provider import Presence, ProviderError, Status
from proxy.scaling.seams import Gate
from tests.proxy.scaling.virtual import Inline


class Engine:
    """What there is of one standby, whoever manages it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.runs: list[str] = []
        """That run now; more than one must never be."""
        self.most = 0
        """That ever ran at once."""
        self.calls: list[tuple[str, str]] = []
        """Operations and the runs they were about."""
        self.busy = 0
        self.overlapped = False
        """Two operations were done at once."""
        self.modes: dict[str, str] = {}
        """By operation: `fail`, `hang`, `lie` (it says that it is done, and does nothing), `half` (a start that
        fails and leaves an engine), `late` (a start that hangs, and leaves one some time later)."""
        self.known = True
        """The provider can be asked."""
        self.loads_s = 3.0
        """From its start to its first answer."""
        self.answers_at = 0.0
        self.frozen = False

    def answers(self, now: float) -> bool:
        return bool(self.runs) and now >= self.answers_at and not self.frozen

    def begins(self, run: str) -> None:
        self.runs.append(run)
        self.most = max(self.most, len(self.runs))
        self.frozen = False
        self.answers_at = asyncio.get_running_loop().time() + self.loads_s

    def comes_late(self, run: str) -> None:
        """A start that nobody waits for any more takes effect."""
        if not self.runs:
            self.begins(run)

    def dies(self) -> None:
        self.runs.clear()


class FakeProvider:
    """One life of a provider: another process has another one, of the same engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.closed = False

    async def prepare(self, run: str) -> None:
        await self._do("prepare", run)

    async def start(self, run: str) -> None:
        engine = self.engine
        if engine.modes.get("start") == "late":
            asyncio.get_running_loop().call_later(8.0, engine.comes_late, run)
        if not await self._do("start", run) or run in engine.runs:
            return
        engine.begins(run)
        if engine.modes.get("start") == "half":
            raise ProviderError("it began, and then something went wrong")

    async def stop(self, run: str) -> None:
        if await self._do("stop", run):
            self.engine.runs.clear()

    async def status(self) -> Status:
        if not self.engine.known:
            return Status(Presence.UNKNOWN, detail="nobody answers")
        if not self.engine.runs:
            return Status(Presence.ABSENT, detail="exit code 1")
        return Status(Presence.RUNNING, self.engine.runs[0])

    async def close(self) -> None:
        self.closed = True

    async def _do(self, operation: str, run: str) -> bool:
        engine = self.engine
        engine.calls.append((operation, run))
        engine.busy += 1
        engine.overlapped = engine.overlapped or engine.busy > 1
        try:
            mode = engine.modes.get(operation)
            await asyncio.sleep(1e9 if mode in ("hang", "late") else 0.1)
            if mode == "fail":
                raise ProviderError(f"{operation} cannot be done")
            return mode != "lie"
        finally:
            engine.busy -= 1


def section(name: str, **standby: Any) -> BackendConfig:
    return BackendConfig.model_validate(
        {
            "name": name,
            "url": "http://127.0.0.1:1",
            "models": ["m"],
            "slots": 4,
            "standby": {
                "command": {"command": ["true"]},
                "prepare_timeout": 20,
                "start_timeout": 20,
                "stop_timeout": 10,
                "drain": 10,
                "min_on": 0,
                "min_off": 0,
                "cost_per_hour": 36,
                **standby,
            },
        }
    )


class Around:
    """A proxy in one process: requests for the model `m` that only standbys may serve."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self.engines = engines
        self.fleet = Fleet([Backend(name, models=frozenset({"m"}), slots=4) for name in engines])
        self.valve = self
        self.alone = True
        self.held = 0
        self.clock_set = 0.0
        """By so much the wall clock was put forward."""
        self.states: dict[str, State] = {}

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def wall(self) -> float:
        return self.now() + 1_700_000_000.0 + self.clock_set

    def put(self, name: str, state: State) -> None:
        self.states[name] = state
        self.fleet[name].available = state is State.READY

    def answers(self, name: str) -> bool:
        return self.engines[name].answers(self.now())

    def ended(self) -> dict[str, tuple[int, int]]:
        return {}

    def waiting_by_model(self) -> dict[str, tuple[int, int]]:
        return {"m": (self.held, self.held * 100)} if self.held else {}

    def waiting_for_standbys(self) -> list[tuple[frozenset[str], int, float]]:
        return [(frozenset(self.engines), self.held, self.held * 100.0)] if self.held else []


class Disk(StandbyJournal):
    """A journal whose disk may be full."""

    full = False

    def _write(self, *arguments: Any) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        super()._write(*arguments)


class Proxy:
    """Its lives, one after the other, on one state directory."""

    def __init__(self, directory: Path, *names: str, settle_s: float = 0.0, gate: Gate | None = None) -> None:
        self.directory = directory
        self.engines = {name: Engine(name) for name in names}
        self.around = Around(self.engines)
        self.sections = {name: section(name) for name in names}
        self.settings = ScalingSettings(settle_s=settle_s)
        self.most: dict[str, int] = {}
        self.gate = gate
        self.scaling: Scaling
        self.journal: Disk
        self.providers: list[FakeProvider] = []
        self.full = False

    def make(self, configured: BackendConfig) -> FakeProvider:
        self.providers.append(FakeProvider(self.engines[configured.name]))
        return self.providers[-1]

    def start(self) -> Scaling:
        """A new life."""
        self.journal = Disk(self.directory / JOURNAL_FILE, Inline())
        self.journal.full = self.full
        self.scaling = scaling = Scaling(
            self.around,
            self.make,
            self.directory,
            controller=Controller(self.settings),
            gate=self.gate,
            journal=self.journal,
        )
        self.reload()
        scaling.read()
        scaling.begin()
        return scaling

    async def acting(self) -> None:
        while not self.scaling.acting:  # noqa: ASYNC110
            await asyncio.sleep(0.001)

    def reload(self) -> None:
        sections = list(self.sections.values())
        self.scaling.configure(sections, self.scaling.make_all(sections, self.make), self.most)

    async def crash(self) -> None:
        """As kill -9: nothing more is said or written."""
        scaling = self.scaling
        scaling.acting = False
        self.journal.full = True
        await scaling._tasks.cancel_all()
        self.journal.close()
        scaling._lock.release()

    def disk(self, *, full: bool) -> None:
        self.full = self.journal.full = full

    def state(self, name: str) -> State:
        return self.scaling.keepers[name].state

    async def until(self, name: str, state: State, within_s: float = 60.0) -> None:
        """Time passes until it is there. Raises TimeoutError."""
        async with asyncio.timeout(within_s):
            while name not in self.scaling.keepers or self.state(name) is not state:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
