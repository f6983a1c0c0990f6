"""For each kind of provider a world in which the truth can be seen, and things can be broken and mended."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

from benchmarks.processes import free_port
from proxy.scaling.calls import Caller
from proxy.scaling.command import CommandProvider
from proxy.scaling.facts import Facts
from proxy.scaling.process import ProcessProvider
from proxy.scaling.provider import Provider
from proxy.scaling.scheduler import SchedulerProvider
from proxy.scaling.sections import SchedulerPlatform, StandbySection
from proxy.scaling.sleep import SleepProvider
from proxy.scaling.supervisor import is_locked
from proxy.scaling.webhook import WebhookProvider
from tests.proxy.scaling.endpoint import Asked, Reply, endpoint
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


class CommandWorld:
    """A script with an engine that is a file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        script = folder / "standby.sh"
        script.write_text(
            f"""#!/bin/sh
cd {folder}
case $1 in
  start)
    if test -e broken; then echo no cards >&2; exit 1; fi
    test -e engine || echo >> launched
    touch engine ;;
  stop) rm -f engine ;;
  status) if test -e engine; then echo running; else echo absent; fi ;;
esac
"""
        )
        script.chmod(0o700)
        section = StandbySection.model_validate({"command": {"command": [str(script)]}})
        self.provider: Provider = CommandProvider(section, Facts("a", "http://127.0.0.1:1", ("m",)))

    def runs(self) -> bool:
        return (self._folder / "engine").exists()

    def launched(self) -> int:
        launched = self._folder / "launched"
        return launched.read_bytes().count(b"\n") if launched.exists() else 0

    def breaks(self) -> None:
        (self._folder / "broken").touch()

    def mends(self) -> None:
        (self._folder / "broken").unlink(missing_ok=True)


class RemoteWorld:
    """An engine that an HTTP endpoint starts and stops: that of a webhook, or a platform's."""

    provider: Provider

    def __init__(self) -> None:
        self._running = self._broken = False
        self._launched = 0

    def webhook(self, asked: Asked) -> Reply:
        return self._do(asked.body["operation"], {"presence": "running" if self._running else "absent"})

    def platform(self, asked: Asked) -> Reply:
        operation = asked.path.rpartition("/")[2] if asked.method == "POST" else "status"
        status = {"id": "p1", "state": "ready" if self._running else "standby"}
        return self._do(operation, status)

    def _do(self, operation: str, status: dict[str, Any]) -> Reply:
        if operation == "start":
            if self._broken:
                return 422, {"error": "no cards"}
            self._launched += not self._running
            self._running = True
        elif operation == "stop":
            self._running = False
        return 200, status

    def runs(self) -> bool:
        return self._running

    def launched(self) -> int:
        return self._launched

    def breaks(self) -> None:
        self._broken = True

    def mends(self) -> None:
        self._broken = False


@asynccontextmanager
async def command_world(folder: Path) -> AsyncIterator[World]:
    yield CommandWorld(folder)


@asynccontextmanager
async def webhook_world(folder: Path) -> AsyncIterator[World]:
    world = RemoteWorld()
    async with endpoint(otherwise=world.webhook) as server:
        section = StandbySection.model_validate({"webhook": {"url": server.url}})
        world.provider = WebhookProvider(section, Facts("a", "http://127.0.0.1:1", ("m",)))
        yield world


@asynccontextmanager
async def scheduler_world(folder: Path) -> AsyncIterator[World]:
    world = RemoteWorld()
    async with endpoint(otherwise=world.platform) as server:
        platform = SchedulerPlatform.model_validate({"url": server.url, "secret_env": "HOOK"})
        section = StandbySection.model_validate({"scheduler": {"placement": "p1"}})
        facts = Facts("a", "http://127.0.0.1:1", ("m",), platform=platform)
        world.provider = SchedulerProvider(section, facts, Caller([b"a-secret-of-16-b"]))
        yield world


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
    "command": command_world,
    "webhook": webhook_world,
    "scheduler": scheduler_world,
}
"""Kind to its world."""
