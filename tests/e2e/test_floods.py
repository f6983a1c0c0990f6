"""Floods before a proxy in a process of its own: of connections, of more than there are files for, of bad keys.
Others are served, what is used is bounded, and all is well again when they are over."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.processes import cpu_seconds, memory_bytes, raise_open_files
from proxy.access.keys import create_key
from proxy.access.pepper import load_pepper
from proxy.database import open_database
from proxy.server import MOST_REFUSED
from proxy.tasks import Tasks
from tests.e2e.backends import answers, waits
from tests.e2e.conftest import StartTidegate
from tests.e2e.faults.figures import Figure
from tests.e2e.local_http import get
from tests.e2e.proxy_fixtures import Answer, Client, StartBackend, chat, eventually
from tests.e2e.tidegate_process import TidegateProcess

pytestmark = pytest.mark.e2e

MOST_CPU = 0.5
"""Share of a core that a proxy without files may use."""
MOST_GROWTH = 16 * 1024 * 1024
MOST_CPU_PER_BAD_KEY_S = 0.002


def backend_of(url: str) -> dict[str, Any]:
    return {"name": "a", "url": url, "site": "local", "slots": 64, "models": ["m"]}


async def connect(proxy: TidegateProcess) -> Client:
    return Client(*await asyncio.open_connection("127.0.0.1", proxy.port))


async def ask(proxy: TidegateProcess, *lines: str) -> Answer:
    """One request on a connection of its own."""
    client = await connect(proxy)
    await client.send(chat(None, *lines))
    answer = await client.answer()
    client.close()
    return answer


def files(proxy: TidegateProcess) -> int:
    """Open files of the process."""
    return len(os.listdir(f"/proc/{proxy.service.pid}/fd"))


@asynccontextmanager
async def flood(proxy: TidegateProcess, count: int, beginning: bytes = b"") -> AsyncIterator[list[Client]]:
    """So many connections that send `beginning` and nothing more."""
    clients = []
    try:
        for _ in range(count):
            client = await connect(proxy)
            clients.append(client)
            if beginning:
                await client.send(beginning)
        yield clients
    finally:
        for client in clients:
            client.reset()


async def test_connections_without_requests_make_room_for_those_that_have_some(
    start_backend: StartBackend, tidegate: StartTidegate
) -> None:
    raise_open_files(4096)
    cap = 64
    backend = await start_backend()
    proxy = await asyncio.to_thread(tidegate, backend_of(backend.url), limits={"connections": cap})
    assert (await ask(proxy)).status == 200
    base = files(proxy)
    regular = await connect(proxy)
    await regular.send(chat())
    statuses = [(await regular.answer()).status]
    async with flood(proxy, cap // 2) as clients:
        for _ in range(10):
            async with flood(proxy, 100):
                await regular.send(chat())
                statuses += [(await regular.answer()).status, (await ask(proxy)).status]
                assert files(proxy) <= base + cap + MOST_REFUSED + 4  # two to the backend, two that go
        assert clients
    assert statuses == [200] * 21
    assert json.loads(await asyncio.to_thread(get, f"{proxy.admin}/state"))["errors"] == {}
    regular.close()
    await eventually(lambda: files(proxy) <= base + 2)


async def test_without_files_it_waits_says_so_once_and_goes_on_when_there_are_some(
    start_backend: StartBackend, tidegate: StartTidegate, figure: Figure
) -> None:
    raise_open_files(4096)
    gate = asyncio.Event()
    backend = await start_backend(waits(gate, 3), then=answers())
    proxy = await asyncio.to_thread(tidegate, backend_of(backend.url), timeouts={"head": "60s"})
    pid = proxy.service.pid
    streaming = await connect(proxy)
    await streaming.send(chat(stream=True))
    await eventually(lambda: backend.running == 1)
    # Its own limit is lowered rather than used up, which would take thousands of clients.
    limit = max(map(int, os.listdir(f"/proc/{pid}/fd"))) + 1 + 16
    hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, hard))
    async with flood(proxy, 3 * limit, b"P"):
        await eventually(lambda: "no more files" in proxy.service.log_tail(100_000))
        begun, cpu = time.monotonic(), cpu_seconds(pid)
        for _ in range(5):  # for the admin port there are some
            assert json.loads(await asyncio.to_thread(get, f"{proxy.admin}/healthz")) == {"status": "ok"}
            await asyncio.sleep(0.2)
        share = (cpu_seconds(pid) - cpu) / (time.monotonic() - begun)
        assert share < MOST_CPU
        figure("F17", share, "of a core used while no files were left; said once; what ran went on")
        gate.set()
        answer = await streaming.answer()  # what runs goes on
        assert (answer.text, answer.done) == ("xxx", True)
    streaming.close()
    client = await connect(proxy)  # it waits until it is accepted
    await client.send(chat())
    assert (await client.answer()).status == 200
    client.close()
    assert proxy.service.log_tail(100_000).count("no more files") == 1


def new_key(state: Path) -> str:
    """A key of a proxy, as the header line that carries it."""
    engine = open_database(state)
    try:
        text, _ = create_key(engine, load_pepper(state), tenant="acme")
    finally:
        engine.dispose()
    return f"authorization: Bearer {text}"


async def test_a_storm_of_bad_keys_costs_little_and_good_ones_go_on(
    start_backend: StartBackend, tidegate: StartTidegate, tmp_path: Path, figure: Figure
) -> None:
    backend = await start_backend()
    log = tmp_path / "requests.jsonl"
    (tmp_path / "state").mkdir()
    key = await asyncio.to_thread(new_key, tmp_path / "state")
    proxy = await asyncio.to_thread(tidegate, backend_of(backend.url), log=str(log))
    pid = proxy.service.pid
    bad = chat(None, "authorization: Bearer tg_nobody")
    refused: list[int] = []
    begun = time.monotonic()

    async def storm(count: int) -> None:
        for _ in range(count):
            client = await connect(proxy)
            await client.send(bad)
            refused.append((await client.answer()).status)
            client.close()

    await storm(100)  # what is made once is not counted
    base, memory, cpu = files(proxy), memory_bytes(pid), cpu_seconds(pid)
    tasks = Tasks()
    storms = [tasks.spawn(storm(50), "storm") for _ in range(20)]
    regular, statuses = await connect(proxy), []
    while not all(task.done() for task in storms):
        await regular.send(chat(None, key))
        statuses.append((await regular.answer()).status)
    await asyncio.gather(*storms)
    used = cpu_seconds(pid) - cpu
    assert len(statuses) > 10
    assert set(statuses) == {200}
    told = refused.count(401)  # 20 at first, and one more every three seconds
    assert 20 <= told <= 21 + (time.monotonic() - begun) / 3
    assert set(refused) == {401, 429}
    assert used < MOST_CPU_PER_BAD_KEY_S * (len(refused) + len(statuses))
    figure(
        "F31", 1e3 * used / (len(refused) + len(statuses)), f"ms of CPU for each of {len(refused)} bad keys"
    )
    assert memory_bytes(pid) < memory + MOST_GROWTH
    regular.close()
    await eventually(lambda: files(proxy) <= base + 2)
    await asyncio.to_thread(proxy.stop)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sum(line["status"] == 401 for line in lines) == told  # the rest is counted, and not written
    assert sum(line["status"] == 200 for line in lines) == len(statuses) == len(lines) - told
    assert len(backend.received) == len(statuses)
