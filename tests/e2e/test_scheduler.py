"""The reference scheduler and Tidegate, over real sockets, with emulated engines as processes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from benchmarks.processes import free_port
from examples.scheduler.scheduler import Scheduler, site_of
from policies.standby import State
from proxy.build import ConfigError
from proxy.scaling.calls import Caller, new_id
from proxy.scaling.facts import Facts
from proxy.scaling.messages import ScaleRequest
from proxy.scaling.provider import Presence, ProviderError
from proxy.scaling.scheduler import SchedulerProvider
from proxy.scaling.sections import SchedulerPlatform, StandbySection
from proxy.scaling.service import scaling_in
from proxy.scaling.signing import signed, what_is_signed
from proxy.tasks import Tasks
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
        return self.config_of(self.url)

    @staticmethod
    def config_of(url: str) -> dict[str, Any]:
        scheduler = {"url": url, "secret_env": "HOOK", "networks": ["127.0.0.0/8"], "timeout": "60s"}
        return {"scaling": {"scheduler": scheduler}, "sites": {"nanjing": {}}}


StartPlatform = Callable[..., Awaitable[Platform]]


@pytest.fixture
async def start_platform(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[StartPlatform]:
    monkeypatch.setenv("HOOK", SECRET.decode())
    running = []

    async def start(ttl_s: float = 60.0, site: str = "nanjing=H20:8:10") -> Platform:
        sites = [site_of(site)]
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


async def pushed(proxy: Proxy, method: str, placement: str, **fields: Any) -> int:
    """What a message of a platform is answered with that is not there otherwise."""
    path, raw = f"/platform/placements/{placement}", json.dumps(fields).encode() if fields else b""
    headers = signed([SECRET], new_id(), int(time.time()), what_is_signed(method, path, raw))
    return (await proxy.service.platform.push(method, path, headers, raw)).status


async def test_a_placement_that_cannot_be_taken_out_is_waited_for_by_nobody(
    start_proxy: StartProxy, start_backend: StartBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of the configuration may be broken at that moment."""
    monkeypatch.setenv("HOOK", SECRET.decode())
    place = {"url": "http://127.0.0.1:8000", "site": "nanjing", "models": ["far"], "ttl_s": 60}
    async with endpoint(otherwise=(404, {})) as platform:
        config = Platform.config_of(platform.url) | {"probing": {}}
        proxy = await start_proxy(await start_backend(then=b.answers(3)), **config)
        assert await pushed(proxy, "PUT", "p1", id="p1", name="nanjing-1", **place) == 201
        assert proxy.backend("nanjing-1").asleep

        def broken(*_: Any) -> None:
            raise ConfigError("policy.yaml: half of it is written")

        with monkeypatch.context() as amid:
            amid.setattr("proxy.serve.build", broken)
            assert await pushed(proxy, "DELETE", "p1") == 200
        scaling = scaling_in(proxy.runtime)
        assert scaling is not None
        await eventually(lambda: "nanjing-1" not in scaling.keepers, PATIENCE_S)
        scaling.show()  # as with each move of another standby
        found = proxy.backend("nanjing-1")
        assert (found.asleep, found.draining, found.available) == (False, True, False)
        assert (await proxy.ask(chat(model="far"))).code == "no_backend", "it is not held"
        assert await pushed(proxy, "PUT", "p1", id="p1", name="nanjing-1", **place) == 201
        assert proxy.backend("nanjing-1").asleep
        assert "nanjing-1" in scaling.keepers


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


async def test_a_demand_that_grows_keeps_what_is_placed(start_platform: StartPlatform) -> None:
    """It may run, and would have to start from cold elsewhere in the middle of a rush."""
    platform = await start_platform(site="nanjing=H20:64:10")
    placed, caller = platform.scheduler.placed, Caller([SECRET])

    async def ask(**fields: Any) -> int:
        content = wanted(**fields).model_dump(mode="json", exclude_none=True)
        url = f"{platform.url}/v1/scale-requests"
        answer = await caller.call("POST", url, content, id=new_id(), within_s=PATIENCE_S)
        added: int = answer.json()["placements"]
        return added

    async with endpoint() as tidegate:
        platform.scheduler.tidegate = tidegate.url
        assert await ask() == 1
        (first,) = placed
        twice = 2.0 * placed[first].message["slots"]
        assert await ask(count=2, demand={"requests": twice, "tokens": 2000 * twice}) == 1
        assert first in placed
        later = time.time() + 3600
        far_more = {"requests": 1e5, "tokens": 1e8}
        assert await ask(count=None, demand=far_more, expires=later) == 0, "there are no cards for that"
        assert first in placed
        assert len(placed) == 2
        assert platform.scheduler.requests["want-1"].expires == later
        with pytest.raises(ProviderError, match="there are nanjing"):
            await ask(id="want-2", sites=["beijing"])
        assert await ask(id="want-2", sites=["beijing", "nanjing"]) == 1
        with pytest.raises(ProviderError, match="no free cards meet it"):
            await ask(id="want-3", budget={"month_left": 5})
        await caller.close()


async def test_a_launch_that_failed_is_tried_again_and_a_late_order_is_not(
    start_platform: StartPlatform,
) -> None:
    platform = await start_platform()
    config = SchedulerPlatform.model_validate(platform.config()["scaling"]["scheduler"])
    caller = Caller([SECRET])
    async with endpoint() as tidegate:
        platform.scheduler.tidegate = tidegate.url
        content = wanted().model_dump(mode="json", exclude_none=True)
        await caller.call("POST", f"{platform.url}/v1/scale-requests", content, id="m1", within_s=PATIENCE_S)
        id, placed = next(iter(platform.scheduler.placed.items()))
        section = StandbySection.model_validate({"scheduler": {"placement": id}})
        provider = SchedulerProvider(section, Facts(id, "http://h", ["m"], platform=config), caller)
        profile, placed.profile = placed.profile, "no-such-profile"
        await provider.start("r1")
        await eventually(lambda: placed.state == "failed", PATIENCE_S)
        with pytest.raises(ProviderError, match="ended before it listened"):
            await provider.prepare("r2")
        await provider.stop("r1")
        placed.profile = profile
        await provider.prepare("r2")
        with pytest.raises(ProviderError, match="this run was stopped"):
            await provider.start("r1")
        order = {"operation": "stop", "placement": id, "run": "r2"}
        with pytest.raises(ProviderError, match="not those of the path"):
            await caller.call(
                "POST", f"{platform.url}/v1/placements/{id}/start", order, id="m2", within_s=9.0
            )
        await provider.start("r2")
        await eventually(lambda: placed.state == "ready", PATIENCE_S)
        assert placed.engine is not None
        placed.engine.kill()
        await eventually(lambda: placed.state == "failed", PATIENCE_S)
        assert (await provider.status()).presence is Presence.ABSENT
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
    scaling = scaling_in(proxy.runtime)
    assert scaling is not None
    keeper = scaling.keepers[names(proxy)[0]]
    assert keeper.state is State.READY
    await proxy.service.platform.release("want-1")
    await eventually(lambda: keeper.name not in scaling.keepers, PATIENCE_S)
    assert keeper.state is State.STANDBY, "its placement is gone: nothing of it is left"


async def test_the_platform_is_asked_when_our_own_capacity_is_short(
    start_platform: StartPlatform, start_proxy: StartProxy, start_backend: StartBackend
) -> None:
    gate = asyncio.Event()
    platform = await start_platform()
    own = {"url": (await start_backend(then=b.waits(gate))).url, "models": ["m"], "slots": 1}
    budget = {"budgets": {"sites": {"nanjing": 100}}}
    config = platform.config() | {"probing": {}}
    config["scaling"] |= budget
    proxy = await start_proxy(own, **config)
    platform.scheduler.tidegate = proxy.admin
    tasks = Tasks()
    answer = tasks.spawn(proxy.ask(chat(model="m")), "a request")
    await eventually(lambda: names(proxy), PATIENCE_S)
    (asked,) = platform.scheduler.requests.values()
    assert asked.model == "m"
    assert asked.budget is not None
    assert asked.budget.month_left == 100.0
    gate.set()
    assert (await answer).status == 200


async def test_with_nothing_of_ones_own_a_platform_is_enough(
    start_platform: StartPlatform, start_proxy: StartProxy
) -> None:
    """A model that nobody has ever served is reserved with the start, and its first request deploys it."""
    platform = await start_platform()
    admin = f"127.0.0.1:{free_port()}"
    platform.scheduler.tidegate = f"http://{admin}"
    config = platform.config() | {"admin": admin, "probing": {"interval": "200ms", "timeout": "100ms"}}
    config["scaling"]["scheduler"]["models"] = ["m"]
    proxy = await start_proxy(**config)
    await eventually(lambda: names(proxy), PATIENCE_S)
    placed = platform.scheduler.placed[names(proxy)[0]]
    assert placed.engine is None, "a placeholder: nothing runs"
    assert (await proxy.ask(chat(model="m"))).status == 200
    assert placed.engine is not None
