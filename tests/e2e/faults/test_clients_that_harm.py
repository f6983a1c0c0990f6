"""Clients that are slow, that leave, and that only connect."""

from __future__ import annotations

import asyncio
import re
import time
from random import Random

import psutil
import pytest

from benchmarks.processes import raise_open_files
from proxy.open_files import RESERVED
from proxy.tasks import Tasks
from tests.e2e.backends import answers
from tests.e2e.emulator_process import EmulatorProcess
from tests.e2e.faults.conftest import Serve, needed
from tests.e2e.faults.figures import Figure
from tests.e2e.faults.streams import Clients, ask, rows, until
from tests.e2e.proxy_fixtures import Client, StartBackend, bound, chat, eventually
from tests.e2e.tidegate_process import TidegateProcess

pytestmark = pytest.mark.e2e

FURTHER_DESCRIPTORS = 5 + RESERVED
"""That a proxy may have open after a flood, more than before it; it reserves some a moment after it has started."""


def open_files(proxy: TidegateProcess) -> int:
    return int(psutil.Process(proxy.service.pid).num_fds())


async def settled(proxy: TidegateProcess, before: int, within_s: float) -> int:
    """Wait until a proxy has no more files open than before. -> how many more."""
    await eventually(lambda: open_files(proxy) <= before + FURTHER_DESCRIPTORS, within_s)
    return max(0, open_files(proxy) - before)


SLOW = {
    "head": ("-H", "-i", "1", "-x", "8"),
    "body": ("-B", "-i", "1", "-x", "8", "-s", "8192", "-t", "POST"),
    "reading": ("-X", "-w", "16", "-y", "64", "-n", "1", "-z", "8", "-k", "3"),
}
"""Modes of slowhttptest."""


@pytest.mark.parametrize("connections", [100, pytest.param(1000, marks=pytest.mark.slow)])
async def test_f13_slow_clients_are_in_nobodys_way(
    connections: int, start_backend: StartBackend, serve: Serve, figure: Figure
) -> None:
    program = needed("slowhttptest", "slowhttptest")
    raise_open_files(8192)
    backend = await start_backend(then=answers(20, gap_s=0.002))
    section = {"name": "a", "url": backend.url, "models": ["m"], "slots": 64}
    deadlines = {"head": "1s", "body": "1s", "idle": "1s", "client_write": "1s"}
    proxy = await serve(section, timeouts=deadlines)
    assert (await ask(proxy.port)).status == 200
    before = open_files(proxy)
    asked: list[float] = []
    most = 0

    async def attack(mode: str) -> str:
        process = await asyncio.create_subprocess_exec(
            *(program, *SLOW[mode], "-u", f"{proxy.url}/v1/models", "-v", "1"),
            *("-c", str(connections), "-r", str(connections), "-l", "3", "-p", "3"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        async with asyncio.timeout(60):
            output, _ = await process.communicate()
        return output.decode(errors="replace")

    attacks = asyncio.gather(*map(attack, SLOW))
    while not attacks.done():
        began = time.monotonic()
        heard = await ask(proxy.port, stream=True)
        asked.append(time.monotonic() - began)
        assert (heard.status, heard.done) == (200, True)
        most = max(most, open_files(proxy) - before)
    for mode, output in zip(SLOW, await attacks, strict=True):
        plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", output)
        assert re.search(r"service available:\s+YES", plain), plain
        # What a slow reader still has to read is the system's to send; the proxy has closed these too.
        assert "No open connections left" in plain or mode == "reading", plain
    more = await settled(proxy, before, bound(3.0))
    assert most > connections / 2, "it was an attack"
    assert len(asked) > 20
    figure("F13", 0, f"of {len(asked)} other streams failed, the slowest in {max(asked):.2f} s")
    figure("F13", more, f"descriptors left of {most}")


async def test_f15_clients_that_leave_take_their_generations_with_them(
    engine: EmulatorProcess, serve: Serve, figure: Figure
) -> None:
    count, tokens, many, chance = 60, 60, 200, Random(15)
    before = await asyncio.to_thread(engine.counter, "generation_tokens_total")
    proxy = await serve(*engine.sections(slots=64))
    clients = Clients(proxy.port)
    leaving = set(chance.sample(range(count), count // 3))
    for number in range(count):
        if number in leaving:
            clients.stream(many, leave_after=chance.randrange(1, tokens))
        else:
            clients.stream(tokens)
    heard = await clients.ended()
    ended = time.monotonic()

    async def idle() -> bool:
        return await asyncio.to_thread(engine.counter, "num_requests_running") == 0

    await until(idle, bound(2.0))
    took = time.monotonic() - ended
    ledger = await rows(proxy, count)
    for number, one in enumerate(heard):
        row = ledger[one.id]
        if number in leaving:
            assert row["outcome"] == "client_gone"
            assert one.tokens <= row["completion_tokens"] < many
        else:
            assert (one.done, row["outcome"], row["completion_tokens"], one.tokens) == (
                True,
                "ok",
                tokens,
                tokens,
            )
    generated = await asyncio.to_thread(engine.counter, "generation_tokens_total") - before
    billed = sum(row["completion_tokens"] for row in ledger.values())
    read = sum(one.tokens for one in heard)
    assert read <= billed <= generated < count * tokens + len(leaving) * (many - tokens)
    figure("F15", 0, f"generations left {took:.2f} s after the last client")
    figure("F15", billed, f"tokens in the ledger, {read} read, {generated:.0f} generated")


@pytest.mark.parametrize(
    "count", [1000, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(300)])]
)
async def test_f16_connections_without_requests_are_bounded(
    count: int, start_backend: StartBackend, serve: Serve, figure: Figure
) -> None:
    most, idle_s = count // 2, 0.8 + count / 2500
    if raise_open_files(4 * count) < 2 * count:
        pytest.skip(f"NOT RUN: so many files cannot be open here; `ulimit -n {4 * count}` allows it")
    backend = await start_backend(then=answers())
    section = {"name": "a", "url": backend.url, "models": ["m"]}
    proxy = await serve(section, limits={"connections": most}, timeouts={"idle": idle_s})
    before = open_files(proxy)
    kept = Client(*await asyncio.open_connection("127.0.0.1", proxy.port))

    requests = 0

    async def served() -> bool:
        """On a connection that stays, and on a new one."""
        nonlocal requests
        requests += 2
        await kept.send(chat())
        return [(await kept.answer()).status, (await ask(proxy.port)).status] == [200, 200]

    assert await served()

    told: list[bytes] = []

    async def silent() -> None:
        """Say nothing; what it is told in the end goes into `told`."""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port, limit=4096)
            try:
                told.append(await reader.read())
            finally:
                writer.transport.abort()
        except ConnectionError:
            told.append(b"reset")

    tasks = Tasks()
    for _ in range(count):
        tasks.spawn(silent(), "silent client")
    try:
        async with asyncio.timeout(60 + bound(idle_s)):
            while len(told) < count - most:  # these made room
                assert await served()
            await eventually(lambda: open_files(proxy) <= before + most + FURTHER_DESCRIPTORS)
            while len(tasks):
                assert await served()
    finally:
        await tasks.cancel_all()
        kept.close()
    assert set(told) <= {b"", b"reset"}
    more = await settled(proxy, before, bound(3.0))
    assert (await ask(proxy.port)).status == 200
    figure("F16", 0, f"of {requests} requests failed beside {count} connections, {most} allowed")
    figure("F16", more, "descriptors left")
