"""For each kind of provider a world in which the truth can be seen, and things can be broken and mended."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Protocol

from benchmarks.processes import free_port
from proxy.scaling.facts import Facts
from proxy.scaling.process import ProcessProvider
from proxy.scaling.provider import Provider
from proxy.scaling.sections import StandbySection
from proxy.scaling.sleep import SleepProvider
from proxy.scaling.supervisor import is_locked
from tests.proxy.scaling.home import at_home
from tests.proxy.scaling.sleeper import Sleeper, sleeper


class World(Protocol):
    """Where one provider acts."""

    provider: Provider

    def runs(self) -> bool:
        """Whether an engine of the standby runs, whatever the provider says."""

    def launched(self) -> int:
        """How many engines have been started."""

    def breaks(self) -> None:
        """From now on starting fails."""

    def mends(self) -> None:
        """It works again."""


class ProcessWorld:
    def __init__(self, folder: Path, command: list[str]) -> None:
        self._script = folder / "engine.sh"
        self._launched = folder / "launched"
        self._launched.touch()
        lines = ["#!/bin/sh", f"echo >> {self._launched}", "exec " + " ".join(command)]
        self._script.write_text("\n".join(lines) + "\n")
        self._directory = folder / "standbys"
        self.mends()
        section = StandbySection.model_validate({"process": {"command": [str(self._script)], "grace": "5s"}})
        url = f"http://127.0.0.1:{free_port()}"
        self.provider = ProcessProvider(section, Facts("a", url, ("m",), directory=self._directory))

    def runs(self) -> bool:
        return is_locked(self._directory / "a")

    def launched(self) -> int:
        return self._launched.read_bytes().count(b"\n")

    def breaks(self) -> None:
        self._script.chmod(0o600)

    def mends(self) -> None:
        self._script.chmod(0o700)


class SleepWorld:
    def __init__(self, engine: Sleeper) -> None:
        self._engine = engine
        section = StandbySection.model_validate({"sleep": {"level": 2}})
        self.provider = SleepProvider(section, Facts("a", engine.url, ("m",)))
        engine.asleep = {"weights", "kv_cache"}
        engine.level = 2

    def runs(self) -> bool:
        return self._engine.awake

    def launched(self) -> int:
        return sum(asked == "POST /wake_up?tags=kv_cache" for asked in self._engine.asked)

    def breaks(self) -> None:
        self._engine.failing["/wake_up"] = 500

    def mends(self) -> None:
        self._engine.failing.clear()


@asynccontextmanager
async def process_world(folder: Path) -> AsyncIterator[World]:
    async with at_home() as home:
        yield ProcessWorld(folder, home.command())


@asynccontextmanager
async def sleep_world(folder: Path) -> AsyncIterator[World]:
    async with sleeper() as engine:
        yield SleepWorld(engine)


WORLDS: dict[str, Callable[[Path], AbstractAsyncContextManager[World]]] = {
    "process": process_world,
    "sleep": sleep_world,
}
"""Kind to its world."""
