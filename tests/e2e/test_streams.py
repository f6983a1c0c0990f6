"""Clients that leave and clients that are slow, on real sockets."""

from __future__ import annotations

import asyncio
import time

import psutil
import pytest

from tests.e2e import backends as b
from tests.e2e.backends import Wire, answers, waits
from tests.e2e.conftest import StartTidegate
from tests.e2e.faults.figures import Figure
from tests.e2e.proxy_fixtures import (
    Answer,
    Client,
    MakeKey,
    StartBackend,
    StartProxy,
    bound,
    chat,
    eventually,
)

pytestmark = pytest.mark.e2e

MIB = 1024 * 1024


@pytest.mark.parametrize("way", ["close", "reset"])
async def test_a_client_that_leaves_a_silent_stream_stops_the_engine(
    way: str, start_backend: StartBackend, start_proxy: StartProxy, make_key: MakeKey
) -> None:
    key = make_key(tpm=100_000, concurrency=1)
    backend = await start_backend(b.stalls_midstream)
    proxy = await start_proxy(backend)
    client, answer = await proxy.connect(), Answer()
    await client.send(chat(None, key, stream=True))
    await client.first(answer)
    await eventually(lambda: proxy.backend("a").in_flight == 1)
    left = time.monotonic()
    client.close() if way == "close" else client.reset()
    await eventually(lambda: backend.aborted == 1, bound(1.0))
    assert time.monotonic() - left < bound(1.0)
    row = await proxy.row(answer)
    assert (row.outcome, row.status, row.usage_source) == ("client_gone", 200, "reported")
    assert (row.prompt_tokens, row.completion_tokens, row.cost_nano) == (7, 2, 11_000)
    assert proxy.backend("a").failed == 0
    await proxy.idle()
    answer = await proxy.chat(key)  # its place among the key's one at once is free again
    assert answer.status == 200
    used = int(answer.fields["x-ratelimit-limit-tokens"]) - int(answer.fields["x-ratelimit-remaining-tokens"])
    assert used < 500  # nothing is held for the one that left


@pytest.mark.parametrize("behaviour", [b.stalls, b.stalls_after_head])
async def test_a_client_that_leaves_before_the_first_token_pays_nothing(
    behaviour: b.Behaviour, start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend(behaviour)
    proxy = await start_proxy(backend)
    client = await proxy.connect()
    await client.send(chat(None, "x-request-id: left", stream=True))
    await eventually(lambda: backend.running)
    client.close()
    await eventually(lambda: backend.aborted == 1, bound(1.0))
    row = await proxy.row_of("left")
    assert (row.outcome, row.status, row.completion_tokens, row.cost_nano) == ("client_gone", 0, 0, 0)
    await proxy.idle()


async def test_a_client_that_leaves_the_queue_is_forgotten(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    gate = asyncio.Event()
    backend = await start_backend(then=waits(gate))
    proxy = await start_proxy({"url": backend.url, "slots": 1})
    first, second = await proxy.connect(), await proxy.connect()
    await first.send(chat())
    await eventually(lambda: backend.running)
    await second.send(chat(None, "x-request-id: left"))
    await eventually(lambda: proxy.runtime.held)
    second.close()
    await eventually(lambda: not proxy.runtime.held, bound(1.0))
    assert (await proxy.row_of("left")).outcome == "client_gone"
    gate.set()
    assert (await first.answer()).status == 200
    await proxy.idle()
    assert len(backend.received) == 1


async def test_clients_that_hang_up_on_done_were_served(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    async def never_ends(wire: Wire) -> None:
        await wire.begin()
        await wire.tokens(1, 2)
        await wire.send(b.chunk(wire.request.end(2)))
        await wire.gone()

    proxy = await start_proxy(await start_backend(never_ends))
    client = await proxy.connect()
    await client.send(chat(None, "x-request-id: done", stream=True))
    await client.reader.readuntil(b"data: [DONE]\n\n")
    client.close()
    row = await proxy.row_of("done")
    assert (row.outcome, row.completion_tokens) == ("ok", 2)
    await proxy.idle()


async def read_slowly(client: Client, seconds: float) -> int:
    """Read a little now and then. -> bytes."""
    came, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        came += len(await client.reader.read(256))
        await asyncio.sleep(0.02)
    return came


async def test_a_slow_reader_stops_its_backend_and_nobody_elses(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    wires: list[Wire] = []
    backend = await start_backend(b.floods(wires, 100 * MIB), then=answers(50))
    proxy = await start_proxy(backend)
    slow = await proxy.connect(receive_buffer=4096)
    await slow.send(chat(stream=True))
    await eventually(lambda: wires)
    await eventually(lambda: any(e.blocked_since for e in proxy.runtime.exchanges))
    assert await read_slowly(slow, 0.3) > 0
    # What has been taken fits into the buffers of the two connections and ours.
    sent = wires[0].sent
    assert sent < 20 * MIB
    client = next(client for client in proxy.runtime.clients if client.exchange is not None)
    assert client.transport.get_write_buffer_size() < 2 * MIB
    answer = await proxy.chat(stream=True)
    assert answer.text == "x" * 50
    slow.reset()
    await eventually(lambda: backend.aborted == 1, bound(1.0))
    await proxy.idle()


async def test_a_slow_reader_gets_everything_in_the_end(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    wires: list[Wire] = []
    backend = await start_backend(b.floods(wires, 4 * MIB))
    proxy = await start_proxy(backend, timeouts={"between_tokens": "300ms"})
    client = await proxy.connect(receive_buffer=4096)
    await client.send(chat(stream=True))
    await eventually(lambda: any(e.blocked_since for e in proxy.runtime.exchanges))
    await asyncio.sleep(1.0)  # longer than the backend may be silent; but it is we who do not listen
    answer = await client.answer()
    assert (answer.done, answer.complete) == (True, True)
    assert len(answer.text) > 3 * MIB
    assert (await proxy.row(answer)).outcome == "ok"


async def test_a_client_that_stops_reading_is_cut_off(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend(b.floods([], 100 * MIB))
    proxy = await start_proxy(backend, timeouts={"client_write": "300ms"})
    client = await proxy.connect(receive_buffer=4096)
    await client.send(chat(None, "x-request-id: stuck", stream=True))
    row = await proxy.row_of("stuck")
    assert row.outcome == "client_gone"
    await eventually(lambda: backend.aborted == 1, bound(1.0))
    assert proxy.backend("a").failed == 0
    await proxy.idle()


@pytest.mark.parametrize(
    "readers", [10, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(300)])]
)
async def test_slow_readers_do_not_fill_the_memory(
    readers: int, start_backend: StartBackend, tidegate: StartTidegate, figure: Figure
) -> None:
    size = 50 * MIB
    wires: list[Wire] = []
    backend = await start_backend(then=b.floods(wires, size))
    section = {"name": "a", "url": backend.url, "models": ["m"], "slots": 256}
    proxy = await asyncio.to_thread(tidegate, section, log="off", probing={"enabled": False})
    process = psutil.Process(proxy.service.pid)
    before = process.memory_info().rss
    writers = []
    for _ in range(readers):
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port, limit=1024)
        writers.append(writer)
        writer.write(chat(stream=True))
        await reader.readuntil(b"\r\n\r\n")
    # All are blocked once nothing more is taken from their backends.
    seen = [-1.0]

    def nothing_moves() -> bool:
        seen.append(sum(wire.sent for wire in wires))
        return len(seen) > 50 and seen[-1] == seen[-50]

    await eventually(nothing_moves, 60)
    sent = seen[-1]
    grown = process.memory_info().rss - before
    assert sent < readers * size / 2
    assert grown < readers * MIB + 20 * MIB
    for writer in writers:
        writer.transport.abort()
    await eventually(lambda: backend.running == 0, bound(1.0))
    figure("F14", grown / readers / MIB, f"MiB more memory for each of {readers} readers")
