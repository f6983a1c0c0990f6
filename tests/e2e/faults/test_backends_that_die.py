"""Engines that are killed, stopped or slowed down, as processes behind the proxy as a process."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.faults.conftest import Emulate, Serve
from tests.e2e.faults.figures import Figure
from tests.e2e.faults.streams import Clients, Heard, ask, readiness, rows, until
from tests.e2e.proxy_fixtures import bound, eventually
from tests.e2e.tidegate_process import TidegateProcess

pytestmark = pytest.mark.e2e

EVENLY = "rules: [{name: all, pick: least-load}]"


def policy(folder: Path, text: str) -> str:
    file = folder / "policy.yaml"
    file.write_text(text)
    return str(file)


async def backend_states(proxy: TidegateProcess) -> dict[str, dict[str, Any]]:
    """By name, from `/state`."""
    state = await asyncio.to_thread(proxy.state)
    return {backend["name"]: backend for backend in state["backends"]}


def began(clients: Clients, backend: str) -> list[Heard]:
    """Streams of a backend that have had some tokens."""
    return [heard for heard in clients.heard if heard.backend == backend and heard.tokens >= 3]


async def test_f01_a_killed_backend_costs_its_begun_streams_and_nothing_else(
    emulate: Emulate, serve: Serve, tmp_path: Path, figure: Figure
) -> None:
    # `a` computes six requests at once, and the proxy gives it twice as many: the others have no token yet.
    doomed, other = await asyncio.gather(
        emulate("a", slots=6, ttft=0.02, tpot=0.02), emulate("b", slots=32, ttft=0.02, tpot=0.002)
    )
    proxy = await serve(
        *doomed.sections(slots=12),
        *other.sections(slots=12),
        policy=policy(tmp_path, EVENLY),
        durability="strict",
    )
    clients = Clients(proxy.port)
    for _ in range(24):
        clients.stream(300)
    await eventually(lambda: len(began(clients, "a")) == 6)
    assert (await backend_states(proxy))["a"]["in_flight"] == 12
    doomed.kill()
    heard = await clients.ended()
    begun = [one for one in heard if one.backend == "a"]
    others = [one for one in heard if one.backend == "b"]
    assert (len(begun), len(others)) == (6, 18)
    assert [one.cut for one in begun] == [True] * 6
    assert [(one.done, one.complete, one.tokens) for one in others] == [(True, True, 300)] * 18
    ledger = await rows(proxy, 24)
    assert {one.id: ledger[one.id]["completion_tokens"] for one in heard} == {
        one.id: one.tokens for one in heard
    }
    assert {ledger[one.id]["outcome"] for one in begun} == {"cut"}
    figure("F1", 0, "of 18 requests failed that had not begun")
    figure("F1", 0, f"of {sum(one.tokens for one in heard)} delivered tokens not in the ledger")


async def test_f06_a_stalled_backend_ends_its_streams_and_no_others(
    emulate: Emulate, serve: Serve, tmp_path: Path, figure: Figure
) -> None:
    idle_s = 0.5
    stalled, other = await asyncio.gather(
        *(emulate(name, slots=32, ttft=0.02, tpot=0.02) for name in ("a", "b"))
    )
    proxy = await serve(
        *stalled.sections(slots=8),
        *other.sections(slots=8),
        policy=policy(tmp_path, EVENLY),
        timeouts={"between_tokens": idle_s},
    )
    clients = Clients(proxy.port)
    for _ in range(16):
        clients.stream(100)
    await eventually(lambda: len(began(clients, "a")) == len(began(clients, "b")) == 8)
    stalled.freeze()
    try:
        frozen = time.monotonic()
        heard = await clients.ended()
    finally:
        stalled.thaw()
    cut = [one for one in heard if one.backend == "a"]
    assert [one.cut for one in cut] == [True] * 8
    slowest = max(one.at[-1] for one in cut) - frozen
    assert slowest < bound(idle_s + 1.0)
    whole = [one for one in heard if one.backend == "b"]
    assert [(one.done, one.tokens) for one in whole] == [(True, 100)] * 8
    gap = max(one.longest_gap_s for one in whole)
    assert gap < bound(0.2)
    figure("F6", slowest, f"s to the error event, with {idle_s} s between tokens")
    figure("F6", 1000 * gap, "ms was the longest pause of another stream, of 20 ms each")


async def test_f07_a_slow_backend_gets_little_and_stays(
    emulate: Emulate, serve: Serve, tmp_path: Path, figure: Figure
) -> None:
    engines = await emulate("a", "b", "c", slots=64, ttft=0.04, tpot=0.008)
    proxy = await serve(
        *engines.sections(slots=64),
        policy=policy(tmp_path, EVENLY),
        timeouts={"total": "20s"},
    )
    engines.order("a", kind="slow", factor=10)
    served = {"a": 0, "b": 0, "c": 0}
    left = 240

    async def client() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            heard = await ask(proxy.port, max_tokens=15, ignore_eos=True)
            assert heard.status == 200
            served[heard.backend] += left > 0  # what only ends would count for the slow one

    async with asyncio.timeout(30):
        await asyncio.gather(*(client() for _ in range(12)))
    assert (await backend_states(proxy))["a"]["available"]
    of_fair = served["a"] / (sum(served.values()) / 3)
    assert 0 < of_fair <= 1 / 5
    figure("F7", of_fair, "of its fair share")


async def test_f09_without_any_backend_everybody_is_told_so_at_once(
    emulate: Emulate, serve: Serve, figure: Figure
) -> None:
    interval_s = 0.2
    probing = {"interval": interval_s, "timeout": 0.15, "metrics": False}
    engines = await emulate("a", "b", slots=8, ttft=0.02, tpot=0.002)
    proxy = await serve(*engines.sections(slots=8), probing=probing)
    engines.kill()

    async def unready() -> bool:
        return await readiness(proxy) == 503

    async def served() -> bool:
        return (await ask(proxy.port)).status == 200

    await until(unready)
    asked = time.monotonic()
    clients = Clients(proxy.port)
    for _ in range(20):
        clients.start()
    heard = await clients.ended()
    slowest = max(one.at[-1] for one in heard) - asked
    assert {(one.status, one.code) for one in heard} == {(503, "no_backend")}
    assert all(int(one.fields["retry-after"]) >= 1 for one in heard)
    state = await asyncio.to_thread(proxy.state)
    assert (state["queue"]["waiting"], state["connections"]["open_exchanges"]) == (0, 0)

    await asyncio.to_thread(engines.start)
    back = time.monotonic()
    await until(served)
    took = time.monotonic() - back
    assert took < bound(2.2 * interval_s + 0.15)  # pauses are stretched by up to a tenth
    figure("F9", 1000 * slowest, "ms until the last of 20 was told")
    figure("F9", took, f"s from the return to the first 200, with {interval_s} s between probes")
