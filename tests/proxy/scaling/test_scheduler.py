"""The provider `scheduler`, against a platform that starts, takes its time, fails, forgets and recovers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from proxy.config import Config
from proxy.scaling.calls import Caller
from proxy.scaling.facts import Facts, nobody_says
from proxy.scaling.images import Launch
from proxy.scaling.provider import Presence, ProviderError
from proxy.scaling.scheduler import SchedulerProvider
from proxy.scaling.sections import SchedulerPlatform, StandbySection
from tests.proxy.scaling.endpoint import Endpoint, Pauses, endpoint


def provider(
    server: Endpoint, launch: Callable[[], Launch | None] = nobody_says, **times: float
) -> SchedulerProvider:
    section = StandbySection.model_validate({"scheduler": {"placement": "p1"}, **times})
    platform = SchedulerPlatform.model_validate({"url": server.url, "secret_env": "HOOK"})
    pauses = Pauses()
    caller = Caller([b"a-secret-of-16-b"], clock=pauses.clock, sleep=pauses)
    facts = Facts("nj", "http://10.0.0.7:8000", ["m"], "nanjing", platform=platform, launch=launch)
    return SchedulerProvider(section, facts, caller, clock=pauses.clock, sleep=pauses)


def state(state: str, **more: Any) -> tuple[int, dict[str, Any]]:
    return 200, {"id": "p1", "state": state, **more}


async def test_prepare_waits_until_all_is_there() -> None:
    async with endpoint(state("preparing", progress=0.2), state("preparing"), state("standby")) as server:
        one = provider(server)
        await one.prepare("r1")
        await one.close()
    assert [asked.path for asked in server.asked] == ["/v1/placements/p1"] * 3


async def test_prepare_fails_and_recovers() -> None:
    async with endpoint(state("failed", detail="the tunnel is down"), state("standby")) as server:
        one = provider(server)
        with pytest.raises(ProviderError, match="the tunnel is down"):
            await one.prepare("r1")
        await one.prepare("r2")
        await one.close()


async def test_start_names_its_run_and_is_one_message_however_often() -> None:
    async with endpoint((503, {}), (202, {}), (202, {}), (202, {})) as server:
        one = provider(server)
        await one.start("r1")
        await one.start("r1")
        await one.start("r2")
        await one.close()
    assert {asked.path for asked in server.asked} == {"/v1/placements/p1/start"}
    assert server.asked[0].body == {"operation": "start", "placement": "p1", "run": "r1"}
    ids = [asked.headers["webhook-id"] for asked in server.asked]
    assert ids[0] == ids[1] == ids[2] != ids[3]


async def test_stop_returns_when_nothing_is_left() -> None:
    async with endpoint((202, {}), state("stopping"), state("ready"), state("standby")) as server:
        one = provider(server)
        await one.stop("r1")
        await one.close()
    assert len(server.asked) == 4


async def test_a_stop_that_never_ends() -> None:
    async with endpoint((202, {}), otherwise=state("stopping")) as server:
        one = provider(server, stop_timeout=30)
        with pytest.raises(ProviderError, match="has not stopped it within"):
            await one.stop("r1")
        await one.close()


@pytest.mark.parametrize("status", [404, 410])
async def test_what_the_platform_does_not_know_does_not_run(status: int) -> None:
    async with endpoint(otherwise=(status, {})) as server:
        one = provider(server)
        await one.stop("r1")
        assert (await one.status()).presence is Presence.ABSENT
        with pytest.raises(ProviderError):
            await one.start("r1")
        await one.close()


async def test_a_stop_that_is_refused_is_no_stop() -> None:
    async with endpoint(otherwise=(403, {})) as server:
        one = provider(server)
        with pytest.raises(ProviderError, match="403"):
            await one.stop("r1")
        assert (await one.status()).presence is Presence.UNKNOWN
        await one.close()


@pytest.mark.parametrize(
    ("said", "presence"),
    [
        ("standby", Presence.ABSENT),
        ("preparing", Presence.STARTING),
        ("starting", Presence.STARTING),
        ("ready", Presence.RUNNING),
        ("stopping", Presence.RUNNING),
        ("failed", Presence.ABSENT),
    ],
)
async def test_status(said: str, presence: Presence) -> None:
    async with endpoint(state(said, run="r1", progress=0.5, detail="as it is")) as server:
        one = provider(server)
        found = await one.status()
        await one.close()
    assert (found.presence, found.run, found.progress, found.detail) == (presence, "r1", 0.5, "as it is")


@pytest.mark.parametrize("answer", [(200, {"id": "p1"}), (200, b"{"), (200, {"id": "p1", "state": "gone"})])
async def test_a_status_that_says_nothing_is_unknown(answer: Any) -> None:
    async with endpoint(answer) as server:
        one = provider(server)
        found = await one.status()
        await one.close()
    assert found.presence is Presence.UNKNOWN
    assert found.detail


@pytest.mark.parametrize("id", ["a/../b", "a b", ""])
def test_an_id_that_is_none_is_refused_with_the_file(id: str) -> None:
    with pytest.raises(ValueError, match="a name is made of"):
        StandbySection.model_validate({"scheduler": {"placement": id}})


def test_without_a_platform_it_is_refused() -> None:
    section = StandbySection.model_validate({"scheduler": {"placement": "p1"}})
    facts = Facts("nj", "http://10.0.0.7:8000", ["m"])
    assert [problem.at for problem in SchedulerProvider.check(section, facts)] == [("scheduler",)]
    backend = {"name": "nj", "url": facts.url, "models": ["m"], "standby": {"scheduler": {"placement": "p1"}}}
    with pytest.raises(ValueError, match="placement of which platform"):
        Config.model_validate({"backends": [backend]})


async def test_what_is_prepared_after_its_start_is_on_its_way() -> None:
    """Whatever the order in which a platform does things, it is not taken for one that has ended."""
    steps = [
        state("preparing"),
        (202, {}),
        state("preparing"),
        (202, {}),
        state("standby"),
        state("preparing"),
        state("preparing", run="r1"),
    ]
    async with endpoint(*steps) as server:
        one = provider(server)
        before = (await one.status()).presence
        await one.start("r1")
        started = (await one.status()).presence
        await one.stop("r1")
        stopped = (await one.status()).presence
        after_a_restart = (await one.status()).presence
        await one.close()
    assert (before, started) == (Presence.ABSENT, Presence.STARTING)
    assert (stopped, after_a_restart) == (Presence.ABSENT, Presence.STARTING)


async def test_what_is_to_run_is_told_with_the_start() -> None:
    launch = Launch("vllm:v1", arguments=("--port", "8000"))
    async with endpoint((202, {}), (202, {}), otherwise=state("standby")) as server:
        one = provider(server, launch=lambda: launch)
        await one.start("r1")
        await one.stop("r1")
        await one.close()
    assert [asked.body.get("launch") for asked in server.asked[:2]] == [launch.as_dict(), None]
