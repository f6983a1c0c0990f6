"""Processes and networks that the tests of the fault matrix let fail."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest

from benchmarks.processes import Services
from tests.e2e.emulator_process import EmulatorProcess
from tests.e2e.fault_proxy import FaultProxy
from tests.e2e.tidegate_process import TidegateProcess


class Emulate(Protocol):
    def __call__(self, *names: str, **options: float) -> Awaitable[EmulatorProcess]: ...


class Serve(Protocol):
    def __call__(
        self,
        *backends: dict[str, Any],
        before: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        **config: Any,
    ) -> Awaitable[TidegateProcess]: ...


class StartLine(Protocol):
    def __call__(self, port: int, **settings: Any) -> Awaitable[FaultProxy]: ...


@pytest.fixture
def emulate(tidegate_services: Services) -> Emulate:
    """Starts a process with emulated vLLMs: `engines = await emulate("a", "b", slots=4)`."""

    async def start(*names: str, **options: float) -> EmulatorProcess:
        return await asyncio.to_thread(EmulatorProcess, tidegate_services, *names, **options)

    return start


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatorProcess]:
    """One emulated vLLM, `a`, that tests share: not to be harmed."""
    with Services(tmp_path_factory.mktemp("engine")) as services:
        yield EmulatorProcess(services, "a", slots=256, ttft=0.02, tpot=0.01)


@pytest.fixture
def serve(tidegate_services: Services, tmp_path: Path) -> Serve:
    """Starts the proxy as a process, without probes and request log unless they are asked for."""

    async def start(
        *backends: dict[str, Any],
        before: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        **config: Any,
    ) -> TidegateProcess:
        settings = {"log": "off", "probing": {"enabled": False}, "backends": list(backends), **config}
        return await asyncio.to_thread(
            TidegateProcess, tidegate_services, tmp_path, settings, before=before, environment=environment
        )

    return start


@pytest.fixture
async def start_line() -> AsyncIterator[StartLine]:
    """Starts fault proxies in front of backends."""
    async with AsyncExitStack() as stack:

        async def start(port: int, **settings: Any) -> FaultProxy:
            return await stack.enter_async_context(FaultProxy(port, **settings))

        yield start


def needed(program: str, package: str) -> str:
    """The path of a program. Skips the test where it is not installed."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"NOT RUN: there is no {program} here; `apt-get install {package}` installs it")
    return found
