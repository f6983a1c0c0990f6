"""What holds for every provider: see `proxy/scaling/provider.py`. A new kind needs a world in `worlds.py`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from proxy.scaling.provider import Presence, ProviderError
from proxy.scaling.providers import CLASSES
from proxy.scaling.sections import PROVIDERS
from tests.proxy.scaling.worlds import WORLDS, World

pytestmark = pytest.mark.timeout(300)
PATIENCE_S = 120.0


@pytest_asyncio.fixture(params=sorted(WORLDS))
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    async with WORLDS[request.param](tmp_path) as found:
        yield found
        found.mends()
        await found.provider.stop("")
        await found.provider.close()


async def presence(world: World) -> Presence:
    return (await world.provider.status()).presence


async def launched(world: World, count: int) -> None:
    """Wait until so many have started: what was launched says so a moment later."""
    async with asyncio.timeout(PATIENCE_S):
        while world.launched() < count:  # noqa: ASYNC110 - it has no way to tell
            await asyncio.sleep(0.01)


def test_every_provider_has_a_world() -> None:
    assert WORLDS.keys() == CLASSES.keys() <= set(PROVIDERS)


async def test_a_life_with_everything_asked_twice(world: World) -> None:
    provider = world.provider
    assert await presence(world) is Presence.ABSENT
    await provider.stop("r0")  # of what is not there
    await provider.prepare("r1")
    await provider.prepare("r1")
    assert not world.runs()
    await provider.start("r1")
    await provider.start("r1")
    assert await presence(world) is Presence.RUNNING
    await launched(world, 1)
    assert world.runs()
    await provider.stop("another run")
    assert not world.runs()
    await provider.stop("r1")
    assert await presence(world) is Presence.ABSENT
    await provider.start("r2")
    await launched(world, 2)
    await provider.stop("r2")
    assert world.launched() == 2
    assert not world.runs()


@pytest.mark.parametrize("turns", [1, 6])
async def test_what_was_cancelled_is_repeated_and_done_once(world: World, turns: int) -> None:
    provider = world.provider
    for operation in (provider.prepare, provider.start, provider.stop):
        await cancelled_after(turns, operation, "r1")
        await operation("r1")
        if operation == provider.start:
            await launched(world, 1)
            assert world.runs()
    assert not world.runs()
    assert await presence(world) is Presence.ABSENT
    assert world.launched() <= 2  # waking what just woke is no harm


async def cancelled_after(
    turns: int, operation: Callable[[str], Coroutine[Any, Any, None]], run: str
) -> None:
    task = asyncio.get_running_loop().create_task(operation(run))
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_what_fails_says_so_and_works_when_it_is_mended(world: World) -> None:
    provider = world.provider
    world.breaks()
    for _ in range(2):
        with pytest.raises(ProviderError) as error:
            await provider.start("r1")
        assert str(error.value)
        assert not world.runs()
    await presence(world)  # never raises
    world.mends()
    await provider.stop("r1")
    assert await presence(world) is Presence.ABSENT
    await provider.start("r2")
    await launched(world, 1)
    assert world.runs()
    assert await presence(world) is Presence.RUNNING


async def test_what_runs_goes_on_when_the_proxy_stops(world: World) -> None:
    await world.provider.start("r1")
    await launched(world, 1)
    await world.provider.close()
    await world.provider.close()
    assert world.runs()
