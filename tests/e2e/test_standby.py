"""A real Tidegate whose only backend is a standby: from zero to a token, back to zero, and killed meanwhile."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import aiohttp
import pytest

from benchmarks.processes import free_port
from tests.e2e.conftest import StartTidegate
from tests.e2e.local_http import get
from tests.e2e.proxy_fixtures import HELLO, command
from tests.e2e.tidegate_process import COMMAND, TidegateProcess
from tests.patience import PATIENCE

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
WITHIN_S = 10.0 * PATIENCE
CHAT = {"model": "m", "messages": HELLO, "max_tokens": 2}


def standby(port: int, *arguments: str, **fields: Any) -> dict[str, Any]:
    emulate = [str(COMMAND), "emulate", "--host", "{host}", "--port", "{port}", "--model", "m", *arguments]
    section = {
        "process": {"command": emulate, "grace": "1s"},
        "min_on": 0,
        "min_off": 0,
        "cost_per_hour": 3600,
    }
    return {
        "name": "a",
        "url": f"http://127.0.0.1:{port}",
        "models": ["m"],
        "slots": 4,
        "standby": {**section, **fields},
    }


async def until(proxy: TidegateProcess, state: str) -> dict[str, Any]:
    """Wait until the standby is there."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            rows = (await asyncio.to_thread(proxy.state))["standbys"]
            if rows and rows[0]["state"] == state and not rows[0]["trouble"]:
                found: dict[str, Any] = rows[0]
                return found
            await asyncio.sleep(0.02)


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


async def chat(proxy: TidegateProcess) -> dict[str, Any]:
    url = f"{proxy.url}/v1/chat/completions"
    async with aiohttp.ClientSession() as session, session.post(url, json=CHAT) as response:
        answer: dict[str, Any] = await response.json()
        assert response.status == 200, answer
        return answer


async def ask(proxy: TidegateProcess, *arguments: str) -> tuple[int, str, str]:
    return await command("standby", *arguments, "--state", str(proxy.state_folder))


async def test_from_zero_to_a_token_and_back_to_zero(tidegate: StartTidegate) -> None:
    port = free_port()
    proxy = tidegate(standby(port), scaling={"settle": 0}, currency="CNY")
    assert not answers(port), "nobody wants it"
    answer = await chat(proxy)
    assert answer["usage"]["completion_tokens"] == 2
    await until(proxy, "standby")
    assert not answers(port)
    status, out, _ = await ask(proxy, "history", "a", "--json")
    assert status == 0
    moves = [move["event"] for move in json.loads(out)]
    assert moves == ["start", "prepared", "started", "stop", "drained", "stopped"]
    (line,) = json.loads(proxy.run("usage", "--capacity", "--json"))
    assert line["standby"] == "a"
    assert line["seconds"] > 0
    assert line["cost"] == pytest.approx(line["seconds"], rel=1e-6)


async def test_by_hand_with_words_for_what_is_not_possible(tidegate: StartTidegate) -> None:
    port = free_port()
    proxy = tidegate(standby(port), scaling={"settle": 0}, currency="CNY")
    await until(proxy, "standby")
    status, _, complaint = await ask(proxy, "stop", "a")
    assert (status, complaint) == (1, "tidegate: a is standby: it was never started\n")
    status, _, complaint = await ask(proxy, "start", "b")
    assert (status, complaint) == (1, "tidegate: no standby is called 'b'; there are a\n")
    assert (await ask(proxy, "start", "a", "--for", "soon"))[0] == 1
    assert (await ask(proxy, "start", "a", "--for", "0s"))[0] == 1
    status, out, _ = await ask(proxy, "start", "a", "--by", "ada")
    assert (status, out) == (0, "a is told to start: now it is standby\n")
    (plan,) = json.loads(await asyncio.to_thread(get, f"{proxy.admin}/plans"))["plans"]
    assert [made["by"] for made in plan["decisions"]][:1] == ["ada"]
    row = await until(proxy, "ready")
    assert row["pinned"]
    assert answers(port)
    metrics = await asyncio.to_thread(get, f"{proxy.admin}/metrics")
    assert 'tidegate_standby_state{standby="a",state="ready"} 1.0' in metrics
    assert (await ask(proxy, "stop", "a"))[0] == 0
    await until(proxy, "standby")
    assert not answers(port)


@pytest.mark.parametrize("state", ["starting", "ready"])
async def test_who_is_killed_goes_on_with_the_same_run(tidegate: StartTidegate, state: str) -> None:
    port = free_port()
    proxy = tidegate(standby(port), scaling={"settle": 0}, currency="CNY")
    await until(proxy, "standby")
    await ask(proxy, "start", "a")
    row = await until(proxy, state)
    proxy.kill()
    proxy.start()
    again = await until(proxy, "ready")
    assert again["run"] == row["run"]
    assert (await chat(proxy))["usage"]["completion_tokens"] == 2
    await ask(proxy, "stop", "a")
    await until(proxy, "standby")
    assert not answers(port)


async def test_a_stop_of_the_proxy_stops_its_standbys(tidegate: StartTidegate) -> None:
    port = free_port()
    proxy = tidegate(standby(port), scaling={"settle": 0}, currency="CNY")
    await until(proxy, "standby")
    await ask(proxy, "start", "a")
    await until(proxy, "ready")
    await asyncio.to_thread(proxy.stop)
    assert not answers(port)
