"""The reference scheduler and Tidegate, over real sockets, with emulated engines as processes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from examples.scheduler.scheduler import Scheduler, site_of
from proxy.scaling.calls import Caller
from proxy.scaling.facts import Facts
from proxy.scaling.messages import ScaleRequest
from proxy.scaling.provider import Presence, ProviderError
from proxy.scaling.scheduler import SchedulerProvider
from proxy.scaling.sections import SchedulerPlatform, StandbySection
from tests.e2e import backends as b
from tests.e2e.proxy_fixtures import Proxy, StartBackend, StartProxy, chat, eventually
from tests.proxy.scaling.endpoint import endpoint

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

SECRET = b"a-secret-of-16-b"
PATIENCE_S = 120.0
"""On a busy machine a process takes long to start."""


class Platform:
    """A scheduler with its address."""

    def __init__(self, scheduler: Scheduler, runner: web.AppRunner) -> None:
        self.scheduler, self.runner = scheduler, runner
        self.url = ""

    async def start(self) -> None:
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"

    def config(self) -> dict[str, Any]:
        scheduler = {"url": self.url, "secret_env": "HOOK", "networks": ["127.0.0.0/8"], "timeout": "60s"}
        return {"scaling": {"scheduler": scheduler}, "sites": {"nanjing": {}}}


StartPlatform = Callable[..., Awaitable[Platform]]


@pytest.fixture
async def start_platform(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[StartPlatform]:
    monkeypatch.setenv("HOOK", SECRET.decode())
    running = []

    async def start(ttl_s: float = 60.0) -> Platform:
        sites = [site_of("nanjing=H20:8")]
        scheduler = Scheduler(
            (SECRET,), "http://127.0.0.1:1", sites, ttl_s=ttl_s, models={"m": "32b"}, speed=50
        )
        platform = Platform(scheduler, web.AppRunner(scheduler.app(), shutdown_timeout=0.1))
        await platform.start()
        running.append(platform)
        return platform

    yield start
    for platform in running:
        await platform.runner.cleanup()


def wanted(**fields: Any) -> ScaleRequest:
    return ScaleRequest.model_validate(
        {
            "id": "want-1",
            "model": "m",
            "demand": {"requests": 8, "tokens": 16_000},
            "sla": {"ttft_s": 5, "tpot_s": 0.1},
            "count": 1,
            "expires": time.time() + 600,
            **fields,
        }
    )


def names(proxy: Proxy) -> list[str]:
    return [backend.name for backend in proxy.runtime.fleet if backend.name.startswith("nanjing-")]


async def test_a_placement_becomes_a_backend_and_goes_with_its_platform(
    start_platform: StartPlatform, start_proxy: StartProxy, start_backend: StartBackend
) -> None:
    local = await start_backend(then=b.answers(3))
    platform = await start_platform(ttl_s=1.5)
    config = platform.config() | {"probing": {}}
    proxy = await start_proxy(local, **config)
    platform.scheduler.tidegate = proxy.admin
    await proxy.service.platform.request(wanted())
    await eventually(lambda: names(proxy), PATIENCE_S)
    name = names(proxy)[0]
    assert platform.scheduler.placed[name].engine is None, "a placeholder: nothing runs"
    shown = proxy.service.platform.shown()
    assert shown["placements"][0]["card"] == "H20"
    await eventually(lambda: proxy.service.platform.shown()["resources"], PATIENCE_S)
    await platform.runner.cleanup()
    await eventually(lambda: not names(proxy), PATIENCE_S)
    assert (await proxy.ask(chat())).status == 200, "the others have not noticed"


async def test_given_back_it_goes_at_once(
    start_platform: StartPlatform, start_proxy: StartProxy, start_backend: StartBackend
) -> None:
    platform = await start_platform()
    config = platform.config() | {"probing": {}}
    proxy = await start_proxy(await start_backend(then=b.answers(3)), **config)
    platform.scheduler.tidegate = proxy.admin
    await proxy.service.platform.request(wanted())
    await eventually(lambda: names(proxy), PATIENCE_S)
    await proxy.service.platform.release("want-1")
    await eventually(lambda: not names(proxy), PATIENCE_S)
    await eventually(lambda: platform.scheduler.sites["nanjing"].free == 8, PATIENCE_S)


async def test_what_no_resources_meet_is_refused(
    start_platform: StartPlatform, start_proxy: StartProxy, start_backend: StartBackend
) -> None:
    platform = await start_platform()
    config = platform.config() | {"probing": {}}
    proxy = await start_proxy(await start_backend(then=b.answers(3)), **config)
    for fields in ({"model": "unknown"}, {"cards": ["A100"]}, {"sites": ["beijing"]}):
        with pytest.raises(ProviderError, match="refuses it: 422"):
            await proxy.service.platform.request(wanted(**fields))


async def test_an_engine_runs_from_start_to_stop(start_platform: StartPlatform) -> None:
    """Asked for twice, it is one engine; stopped, nothing of it is left."""
    platform = await start_platform()
    config = SchedulerPlatform.model_validate(platform.config()["scaling"]["scheduler"])
    caller = Caller([SECRET])
    async with endpoint() as tidegate:
        platform.scheduler.tidegate = tidegate.url
        content = wanted().model_dump(mode="json", exclude_none=True)
        await caller.call("POST", f"{platform.url}/v1/scale-requests", content, id="m1", within_s=PATIENCE_S)
        id, placed = next(iter(platform.scheduler.placed.items()))
        section = StandbySection.model_validate({"scheduler": {"placement": id}})
        facts = Facts(id, placed.message["url"], ["m"], platform=config)
        provider = SchedulerProvider(section, facts, caller)
        await provider.prepare("r1")
        assert (await provider.status()).presence is Presence.ABSENT
        await asyncio.gather(provider.start("r1"), provider.start("r1"))
        await eventually(lambda: placed.state == "ready", PATIENCE_S)
        found = await provider.status()
        assert (found.presence, found.run) == (Presence.RUNNING, "r1")
        async with (
            aiohttp.ClientSession() as session,
            session.get(placed.message["url"] + "/v1/models") as answer,
        ):
            assert (await answer.json())["data"][0]["id"] == "m"
        engine = placed.engine
        assert engine is not None
        await provider.stop("r1")
        assert engine.returncode is not None
        assert (await provider.status()).presence is Presence.ABSENT

        def told() -> list[str]:
            return [one.body["state"] for one in tidegate.asked if one.path == "/platform/progress"]

        await eventually(lambda: told() == ["starting", "ready", "standby"], PATIENCE_S)
        await provider.close()


async def test_traffic_wakes_a_placement_from_zero(
    start_platform: StartPlatform, start_proxy: StartProxy, start_backend: StartBackend
) -> None:
    """A request that only the placement may serve is held, the platform deploys it, and it answers."""
    platform = await start_platform()
    other = {"url": (await start_backend(then=b.answers(3))).url, "models": ["other"]}
    proxy = await start_proxy(
        other, **(platform.config() | {"probing": {"interval": "200ms", "timeout": "100ms"}})
    )
    platform.scheduler.tidegate = proxy.admin
    await proxy.service.platform.request(wanted())
    await eventually(lambda: names(proxy), PATIENCE_S)
    placed = platform.scheduler.placed[names(proxy)[0]]
    assert placed.engine is None
    answer = await proxy.ask(chat(model="m"))
    assert answer.status == 200
    assert placed.engine is not None
