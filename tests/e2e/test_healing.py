"""Backends that are out and come back by themselves, on real sockets."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.e2e import backends as b
from tests.e2e.backends import answers, status, waits
from tests.e2e.proxy_fixtures import StartBackend, StartProxy, chat, eventually
from tests.probes.fake import FakeBackend

pytestmark = pytest.mark.e2e

PROBING = {"interval": "100ms", "timeout": "50ms", "up": 1, "down": 1, "metrics": False}


async def test_broken_health_checks_everywhere_stop_nothing(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    first, second = await start_backend(health=503), await start_backend(health=503)
    proxy = await start_proxy(first, second, probing=PROBING)
    assert not any(proxy.backend(name).probed_up for name in "ab")
    for _ in range(3):
        assert (await proxy.chat()).status == 200
    rows = (await proxy.state())["backends"]
    assert [row["in_spite"] for row in rows] == [True, True]
    assert (await proxy.get("/readyz"))[0] == 200
    second.health = 200
    await eventually(lambda: proxy.backend("b").available)
    assert (await proxy.chat()).backend == "b"
    assert (await proxy.state())["backends"][0]["in_spite"] is False
    first.health = 200
    await eventually(lambda: proxy.backend("a").available)
    await proxy.idle()


async def test_the_only_backend_heals_with_its_first_good_answer(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend(*[status(500)] * 7)
    proxy = await start_proxy(backend)
    assert [(await proxy.chat()).status for _ in range(7)] == [500] * 7
    assert proxy.backend("a").breaker.state(proxy.runtime.now()) == "open"
    assert (await proxy.chat()).status == 200
    assert proxy.backend("a").breaker.state(proxy.runtime.now()) == "closed"
    await proxy.idle()


async def test_clients_that_leave_take_no_backend_out(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    gate = asyncio.Event()
    before, after = [waits(gate)] * 8, [b.stalls_midstream] * 8
    backend = await start_backend(*before, *after, then=answers(2))
    proxy = await start_proxy(backend)
    for number in range(16):
        client = await proxy.connect()
        await client.send(chat(None, stream=True))
        await eventually(lambda number=number: len(backend.received) == number + 1)
        client.reset()
    await proxy.idle()
    state = proxy.backend("a")
    assert (state.failed, state.ignored, state.breaker.failures) == (0, 16, 0)
    assert (await proxy.chat()).status == 200


async def test_a_backend_that_comes_back_starts_slowly_and_says_so(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    first, second = await start_backend(), await start_backend()
    proxy = await start_proxy(first, second, probing=PROBING, health={"slow_start": "1h"})
    assert (proxy.backend("a").slots, proxy.backend("b").slots) == (8, 8), "a start is no return"
    await first.stop()
    await eventually(lambda: not proxy.backend("a").available)
    assert (await proxy.chat()).backend == "b"
    await first.start()
    await eventually(lambda: proxy.backend("a").available)
    row = (await proxy.state())["backends"][0]
    assert (row["slots"], row["full_slots"], row["slow_start"]) == (1, 8, True)
    await second.stop()
    await eventually(lambda: proxy.backend("a").slots == 8)  # nobody else could take the rest
    await proxy.idle()


async def test_a_busy_host_sends_requests_elsewhere_until_it_has_room(
    start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    rules = tmp_path / "policy.yaml"
    rules.write_text(
        "rules: [{name: all, prefer: [{site: local, host: {gpu_utilisation: {max: 90%}}}, {site: '*'}]}]"
    )
    first, second = await start_backend(), await start_backend()
    async with FakeBackend(metrics=b"DCGM_FI_DEV_GPU_UTIL 99\n") as exporter:
        proxy = await start_proxy(
            first,
            second,
            probing=PROBING,
            policy=str(rules),
            sites={"local": {"host": {"dcgm": exporter.url}}},
        )
        assert (await proxy.chat()).backend == "b"
        host = (await proxy.state())["hosts"]["local"]
        assert (host["gpu_utilisation"], host["reasons"]) == (0.99, {})
        exporter.metrics = b"DCGM_FI_DEV_GPU_UTIL 20\n"
        await eventually(lambda: proxy.backend("a").host["gpu_utilisation"] == 0.2)
        assert (await proxy.chat()).backend == "a"
        await proxy.idle()
