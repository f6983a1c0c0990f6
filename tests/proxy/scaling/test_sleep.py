"""The provider `sleep` against a server that answers as vLLM does; with the real one in `tests/e2e`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from benchmarks.processes import free_port
from proxy.scaling.facts import Facts
from proxy.scaling.provider import Presence, ProviderError
from proxy.scaling.sections import StandbySection
from proxy.scaling.sleep import SleepProvider
from tests.proxy.scaling.sleeper import Sleeper, sleeper


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[Sleeper]:
    async with sleeper() as found:
        yield found


def provider_for(url: str, level: int = 1) -> SleepProvider:
    section = StandbySection.model_validate({"sleep": {"level": level}})
    return SleepProvider(section, Facts("a", url, ("m",), key="sk-1"))


@pytest.mark.parametrize("level", [1, 2])
async def test_it_sleeps_and_wakes_with_its_weights(engine: Sleeper, level: int) -> None:
    provider = provider_for(engine.url, level)
    await provider.prepare("r")
    assert (await provider.status()).presence is Presence.RUNNING
    await provider.stop("r")
    assert (engine.awake, engine.level, engine.weights_good) == (False, level, level == 1)
    assert (await provider.status()).presence is Presence.ABSENT
    await provider.start("r")
    assert (engine.awake, engine.weights_good) == (True, True)
    assert (await provider.status()).presence is Presence.RUNNING
    assert engine.keys == {"Bearer sk-1"}
    asked = len(engine.asked)
    await provider.start("r")
    assert engine.asked[asked:] == ["GET /is_sleeping"]
    await provider.close()


async def test_weights_that_another_configuration_dropped_are_loaded(engine: Sleeper) -> None:
    deep, light = provider_for(engine.url, 2), provider_for(engine.url, 1)
    await deep.stop("r")
    await light.start("r")
    assert (engine.awake, engine.weights_good) == (True, True)
    await light.close()
    await deep.close()


@pytest.mark.parametrize("path", ["/wake_up", "/collective_rpc", "/reset_prefix_cache"])
@pytest.mark.parametrize("then", ["start", "stop"])
async def test_a_waking_that_fails_halfway_is_never_taken_for_awake(
    engine: Sleeper, path: str, then: str
) -> None:
    provider = provider_for(engine.url, 2)
    await provider.stop("r")
    engine.failing[path] = 500
    with pytest.raises(ProviderError, match=f"{path}: 500"):
        await provider.start("r")
    assert (await provider.status()).presence is Presence.STARTING
    engine.failing.clear()
    if then == "start":
        await provider.start("r")
        assert (engine.awake, engine.weights_good) == (True, True)
    else:
        await provider.stop("r")
        assert engine.asleep == {"weights", "kv_cache"}
        assert (await provider.status()).presence is Presence.ABSENT
    await provider.close()


async def test_without_the_endpoints_the_error_says_how_to_have_them(engine: Sleeper) -> None:
    engine.failing["/is_sleeping"] = 404
    provider = provider_for(engine.url)
    for operation in (provider.prepare, provider.start, provider.stop):
        with pytest.raises(ProviderError, match=r"VLLM_SERVER_DEV_MODE=1 .* --enable-sleep-mode"):
            await operation("r")
    status = await provider.status()
    assert status.presence is Presence.UNKNOWN
    assert "VLLM_SERVER_DEV_MODE=1" in status.detail
    await provider.close()


async def test_one_that_cannot_be_reached_is_unknown() -> None:
    provider = provider_for(f"http://127.0.0.1:{free_port()}")
    assert (await provider.status()).presence is Presence.UNKNOWN
    with pytest.raises(ProviderError, match="/is_sleeping"):
        await provider.stop("r")
    await provider.close()


async def test_another_server_is_no_vllm() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b'HTTP/1.1 200 OK\r\ncontent-length: 21\r\n\r\n{"is_sleeping": "no"}')
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    provider = provider_for(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    with pytest.raises(ProviderError, match="something else than a vLLM"):
        await provider.start("r")
    await provider.close()
    server.close()
