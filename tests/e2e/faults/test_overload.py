"""More than there is room for: memory, capacity, and the turn of the event loop."""

from __future__ import annotations

import asyncio
import json
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from benchmarks import overload
from benchmarks.summary import quantile
from tests.e2e import backends as b
from tests.e2e.backends import answers
from tests.e2e.faults.conftest import Serve
from tests.e2e.faults.figures import Figure
from tests.e2e.faults.streams import ask, until
from tests.e2e.faults.watch import Watch
from tests.e2e.proxy_fixtures import Answer, Client, StartBackend, bound, chat, chat_body, eventually
from tests.patience import PATIENCE

pytestmark = pytest.mark.e2e

MB = 1_000_000
MIB = 1024 * 1024


async def test_f18_memory_that_runs_short_is_shed_in_time(
    start_backend: StartBackend, serve: Serve, figure: Figure
) -> None:
    most, body = 192 * MIB, chat_body(messages=[{"role": "user", "content": "x" * 2 * MB}])
    backend = await start_backend(then=b.stalls)
    section = {"name": "a", "url": backend.url, "models": ["m"], "slots": 1000}
    proxy = await serve(section, limits={"memory": most})
    process = psutil.Process(proxy.service.pid)
    begun: list[Client] = []
    shed: list[Answer] = []
    peak = 0
    with Watch(proxy.admin, 0.02) as watch, ExitStack() as opened:
        while len(shed) < 10 and len(begun) < 200:
            client = Client(*await asyncio.open_connection("127.0.0.1", proxy.port))
            opened.callback(client.reset)
            running = backend.running
            answer = asyncio.gather(client.answer(), return_exceptions=True)
            await asyncio.gather(client.send(chat(body)), return_exceptions=True)
            # Either its backend has it, or it has been told no.
            await eventually(
                lambda running=running, answer=answer: backend.running > running or answer.done()
            )
            if answer.done():
                (found,) = await answer
                assert isinstance(found, Answer), found
                shed.append(found)
                client.reset()
            else:
                answer.cancel()
                begun.append(client)
            peak = max(peak, process.memory_info().rss)
            if peak > 0.85 * most and not shed:
                await asyncio.sleep(0.26)  # it looks four times a second
        assert len(shed) == 10, "it was not enough"
        assert {one.status for one in shed} == {503}
        # Whoever is turned away while it still sends may find the connection reset amid the answer's body.
        assert {one.code for one in shed if one.complete} == {"overloaded"}
        assert all(int(one.fields["retry-after"]) >= 1 for one in shed)
        assert (await asyncio.to_thread(proxy.state))["memory"]["shedding"] >= 2
        backend.then = answers()
        for client in begun:
            client.reset()

        async def recovered() -> bool:
            return (await ask(proxy.port)).status == 200

        await until(recovered, 20)
    assert proxy.service.process.poll() is None
    assert peak < 1.05 * most
    slowest = quantile(watch.waits, 0.99)
    assert slowest < bound(0.1)
    figure("F18", round(peak / MIB), f"MiB at most of {most // MIB}, {len(begun)} bodies let in")
    figure("F18", 1000 * slowest, "ms for `/healthz`, p99")


QUICK = {"TIMES": (5,), "WARM_UP_S": 1.0, "WAIT_S": 1, "SLOTS": 4, "TPOT_S": 0.005, "TOKENS": 20}
"""What of the benchmark is smaller here."""


@pytest.mark.parametrize(
    "seconds", [3.0, pytest.param(20.0, marks=[pytest.mark.slow, pytest.mark.timeout(300)])]
)
def test_f19_overload_costs_no_goodput(
    seconds: float, figure: Figure, monkeypatch: pytest.MonkeyPatch
) -> None:
    if seconds < 10:
        for name, value in QUICK.items():
            monkeypatch.setattr(overload, name, value)
        monkeypatch.setattr(overload, "POLICY", overload.POLICY.replace("wait: 2s", "wait: 1s"))
        service_s = overload.TTFT_S * overload.PROMPT / 1000 + overload.TPOT_S * overload.TOKENS
        monkeypatch.setattr(overload, "CAPACITY", overload.SLOTS / service_s)
    monkeypatch.setattr(overload, "MOST_SHED_MS", overload.MOST_SHED_MS * PATIENCE)
    found = overload.measure(seconds)
    assert overload.broken(found) == []
    peak = max(*(one.goodput for one in found), 0.8 * overload.CAPACITY)
    assert found[-1].goodput >= overload.LEAST_OF_PEAK * peak
    assert all(one.shed for one in found if one.times > 1)
    for one in found:
        figure(
            "F19",
            round(100 * one.goodput / peak),
            f"% of the peak's goodput at {one.times} times the capacity, turned away in {one.shed_p99_ms:.1f} ms",
        )


@pytest.mark.parametrize("bodies", [6, pytest.param(200, marks=pytest.mark.slow)])
async def test_f33_large_bodies_hold_up_nobody(
    bodies: int, start_backend: StartBackend, serve: Serve, tmp_path: Path, figure: Figure
) -> None:
    # As many brackets as would be too many, were they not in texts.
    parts = [{"type": "text", "text": "x{" * 185} for _ in range(20_000)]
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": parts}]}).encode()
    assert len(body) > 7.5 * MB
    backend = await start_backend(then=answers())
    section = {"name": "a", "url": backend.url, "models": ["m"], "slots": 8}
    proxy = await serve(section)
    with Watch(proxy.admin) as watch:
        for _ in range(bodies):
            client = Client(*await asyncio.open_connection("127.0.0.1", proxy.port))
            await client.send(chat(body))
            answer = await client.answer()
            assert answer.status == 200
            client.close()
    assert len(backend.received) == bodies
    slowest = quantile(watch.waits, 0.99)
    assert slowest < bound(0.05)
    figure("F33", 1000 * slowest, f"ms for `/healthz`, p99 of {len(watch.waits)}")
