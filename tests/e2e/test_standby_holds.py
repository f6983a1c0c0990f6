"""Clients who wait for a standby, on real sockets: from nothing that runs to their answers."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import orjson
import pytest

from benchmarks.processes import free_port
from proxy.heartbeat import HEARTBEAT
from proxy.scaling.service import scaling_in
from proxy.tasks import Tasks
from sim.emulator import EmulatorSettings, emulator
from sim.recording import Recording
from sim.replay import compare
from tests.e2e.proxy_fixtures import Answer, Proxy, StartProxy, chat, eventually

pytestmark = pytest.mark.e2e

COLD_START = {"command": {"command": ["/bin/true"]}, "stop_timeout": 1}  # it never says that it has stopped
"""Whoever manages standbys would call it; here the test does its work."""


class Manager:
    """Starts an emulated engine when it is wanted."""

    def __init__(self, proxy: Proxy, port: int, stack: AsyncExitStack) -> None:
        self.proxy, self.port, self.stack = proxy, port, stack
        self.is_wanted = asyncio.Event()
        proxy.runtime.scaling = self

    def wanted(self) -> None:
        self.is_wanted.set()

    def answered(self, name: str) -> None:
        self.put(name, asleep=False)

    def condition(self, name: str) -> str:
        return "starting"

    def put(self, name: str, **where: bool) -> None:
        runtime = self.proxy.runtime
        runtime.fleet.put(name, runtime.now(), **where)
        runtime.poll(runtime.now())

    async def start(self, name: str) -> None:
        prober: Any = self.proxy.service._prober
        prober.watch(name, starting=True)
        settings = EmulatorSettings(models=("m",), port=self.port, speed=100, shutdown_timeout_s=0.1)
        await self.stack.enter_async_context(emulator(settings))


def standby(port: int, **fields: Any) -> dict[str, Any]:
    return {"url": f"http://127.0.0.1:{port}", "standby": COLD_START, **fields}


async def test_a_stream_and_a_plain_request_wait_for_an_engine_that_comes_up_later(
    start_proxy: StartProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "events.jsonl"
    port = free_port()
    async with AsyncExitStack() as stack:
        proxy = await start_proxy(
            standby(port),
            probing={"interval": 0.2, "timeout": 0.1},
            timeouts={"heartbeat": "1ms"},
            record=log,
        )
        if (own := scaling_in(proxy.runtime)) is not None:
            await own.stop(keep=True)
        manager = Manager(proxy, port, stack)
        assert orjson.loads((await proxy.get("/readyz"))[1])["status"] == "ready"
        tasks = Tasks()
        client = await proxy.connect()
        await client.send(chat(stream=True, max_tokens=5))
        await manager.is_wanted.wait()
        plain = tasks.spawn(proxy.chat(max_tokens=5), "client")
        leaves = await proxy.connect()
        await leaves.send(chat(max_tokens=5))
        await eventually(lambda: proxy.runtime.valve.queued == 3)
        leaves.reset()
        await eventually(lambda: proxy.runtime.valve.queued == 2)
        stream = Answer()
        parts = client.parts(stream)
        assert HEARTBEAT in await anext(parts)
        assert not plain.done()
        assert "is down" not in caplog.text  # nobody asked it, or was surprised
        await manager.start("a")
        async for _ in parts:
            pass
        assert (stream.status, stream.done, stream.complete) == (200, True, True)
        whole = await plain
        assert (whole.status, whole.backend) == (200, "a")
        assert whole.fields["x-tidegate-reason"].startswith("waited for a standby: ")
        await proxy.idle()
        manager.put("a", asleep=True)
        assert (await proxy.state())["backends"][0]["available"] is False
        again = tasks.spawn(proxy.chat(max_tokens=5), "client")
        await eventually(lambda: proxy.runtime.valve.queued == 1)
        manager.put("a", asleep=False)
        assert (await again).status == 200
        await proxy.service.stop()
    found = compare(Recording(log))
    assert found.difference is None, found.difference.text
    assert found.requests == 4


async def test_a_standby_that_never_comes_is_told_to_its_clients(
    start_proxy: StartProxy, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("rules: [{name: all, queue: {cold_start: 300ms}}]")
    proxy = await start_proxy(standby(free_port()), probing={}, policy=str(policy))
    answer = await proxy.chat()
    assert (answer.status, answer.code) == (503, "queue_timeout")
    assert "standby a was to be started for it" in answer.json["error"]["message"]
    assert int(answer.fields["retry-after"]) >= 1
