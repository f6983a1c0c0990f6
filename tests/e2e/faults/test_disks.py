"""Disks that forget, fail and are full, beneath the proxy as a process."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from proxy.tasks import Tasks
from tests.e2e.backends import answers, waits
from tests.e2e.faults.conftest import Serve, needed
from tests.e2e.faults.figures import Figure
from tests.e2e.faults.streams import Clients, Heard, ask, readiness, rows
from tests.e2e.proxy_fixtures import StartBackend, eventually

pytestmark = pytest.mark.e2e

SOURCE = Path(__file__).with_name("durable_only.c")
TOKENS = 5


@pytest.fixture
def forgetful(tmp_path: Path) -> dict[str, str]:
    """The environment of a process whose files are kept as they were when it last synced them."""
    library = tmp_path / "durable_only.so"
    command = [
        needed("cc", "gcc"),
        "-O2",
        "-Wall",
        "-shared",
        "-fPIC",
        "-o",
        str(library),
        str(SOURCE),
        "-ldl",
    ]
    subprocess.run(command, check=True, timeout=60)
    places = {"DURABLE_FROM": str(tmp_path / "state"), "DURABLE_TO": str(tmp_path / "kept")}
    return {"LD_PRELOAD": str(library), **places}


async def test_f23_what_was_answered_survives_the_loss_of_all_that_was_not_synced(
    forgetful: dict[str, str], start_backend: StartBackend, serve: Serve, tmp_path: Path, figure: Figure
) -> None:
    # The second loss finds the rows of the first life in the database only: their journal is gone.
    lives, each = 2, 80
    backend = await start_backend(then=answers(TOKENS))
    section = {"name": "a", "url": backend.url, "models": ["m"], "slots": 64}
    proxy = await serve(section, durability="strict", environment=forgetful)
    answered: dict[str, float] = {}
    lost_power_at = []

    async def client() -> None:
        while True:
            try:
                heard = await ask(proxy.port, stream=True)
            except ConnectionError:
                return
            if heard.done:
                answered[heard.id] = time.monotonic()

    for _ in range(lives):
        wanted = len(answered) + each
        tasks = Tasks()
        for _ in range(4):
            tasks.spawn(client(), "client")
        await eventually(lambda wanted=wanted: len(answered) >= wanted, 30)
        proxy.kill()
        lost_power_at.append(time.monotonic())
        await tasks.cancel_all()
        shutil.rmtree(proxy.state_folder)
        shutil.copytree(tmp_path / "kept", proxy.state_folder)
        proxy.state_folder.chmod(0o700)
        if len(lost_power_at) == lives:
            proxy.environment = {}
        await asyncio.to_thread(proxy.start)
    ledger = await rows(proxy, len(answered))
    unknown = answered.keys() - ledger.keys()
    assert not unknown, f"{len(unknown)} of {len(answered)}"
    for op, at in answered.items():
        assert ledger[op]["outcome"] in ("ok", "lost")
        if not any(at < lost_at < at + 1.0 for lost_at in lost_power_at):
            assert (ledger[op]["outcome"], ledger[op]["completion_tokens"]) == ("ok", TOKENS)
    assert len(ledger) <= len(answered) + 8 * lives  # and what had not been answered yet
    figure("F23", 0, f"of {len(answered)} answered requests without a row, in {lives} losses")


CALLS = {"EIO": "fdatasync", "ENOSPC": "write"}


@pytest.mark.parametrize("error", ["EIO", pytest.param("ENOSPC", marks=pytest.mark.slow)])
async def test_f24_a_disk_that_fails_refuses_what_is_new_and_loses_nothing(
    error: str, start_backend: StartBackend, serve: Serve, tmp_path: Path, figure: Figure
) -> None:
    call = CALLS[error]
    gate = asyncio.Event()
    backend = await start_backend(waits(gate, TOKENS), then=answers(TOKENS))
    section = {"name": "a", "url": backend.url, "models": ["m"], "slots": 64}
    strace = (
        *(
            needed("strace", "strace"),
            "-DD",
            "-f",
            "--seccomp-bpf",
            "-qq",
            "-o",
            str(tmp_path / "strace.log"),
        ),
        *("-P", str(tmp_path / "state" / "journal" / "00000001.journal")),
        *("-e", f"trace={call}", "-e", f"inject={call}:error={error}:when=4+"),
    )
    proxy = await serve(section, before=strace)
    clients = Clients(proxy.port)
    running = clients.start(stream=True)
    await eventually(lambda: running.at)
    answered: list[Heard] = []
    for _ in range(200):
        heard = await ask(proxy.port)
        if heard.status != 200:
            break
        answered.append(heard)
    assert (heard.status, heard.code) == (503, "ledger_unavailable")
    assert answered
    assert f"{call}(" in (tmp_path / "strace.log").read_text()
    assert await readiness(proxy) == 503
    gate.set()
    await clients.ended()
    assert running.done
    await asyncio.to_thread(proxy.stop)
    proxy.before = ()
    await asyncio.to_thread(proxy.start)
    assert (await ask(proxy.port)).status == 200
    ledger = await rows(proxy, len(answered) + 2)
    assert len(ledger) == len(answered) + 2
    for heard in (running, *answered):
        assert ledger[heard.id]["outcome"] == "ok"
    assert ledger[running.id]["completion_tokens"] == TOKENS
    figure("F24", 0, f"of {len(answered) + 1} answered requests lost ({error})")
