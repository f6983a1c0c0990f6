"""The proxy is killed and is stopped, with streams open."""

from __future__ import annotations

import asyncio
import signal

import pytest

from benchmarks import crash
from benchmarks.processes import raise_open_files
from tests.e2e.backends import waits
from tests.e2e.faults.conftest import Serve
from tests.e2e.faults.figures import Figure
from tests.e2e.faults.streams import Clients, readiness, rows, until
from tests.e2e.proxy_fixtures import StartBackend, eventually

pytestmark = pytest.mark.e2e


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_f20_a_killed_proxy_loses_at_most_the_last_second(figure: Figure) -> None:
    rounds = 20
    raise_open_files(4096)
    verdict, restarts = crash.run_rounds(rounds, 20)
    assert verdict.good, verdict.details
    assert verdict.delivered > 500 * rounds
    lost = verdict.missing + verdict.twice + verdict.excess + verdict.changed
    figure("F20", lost, f"tokens wrong of {verdict.delivered}, in {rounds} kills")
    figure("F20", max(restarts), "s until it served again")


@pytest.mark.parametrize("streams", [40, pytest.param(200, marks=pytest.mark.slow)])
async def test_f21_a_stop_lets_all_streams_end(
    streams: int, start_backend: StartBackend, serve: Serve, figure: Figure
) -> None:
    raise_open_files(4096)
    gate, tokens = asyncio.Event(), 20
    backend = await start_backend(then=waits(gate, tokens))
    section = {"name": "a", "url": backend.url, "models": ["m"], "slots": streams}
    proxy = await serve(section, timeouts={"drain": "60s"})
    clients = Clients(proxy.port)
    for _ in range(streams):
        clients.stream(tokens)
    await eventually(lambda: all(one.tokens for one in clients.heard))
    proxy.service.process.send_signal(signal.SIGTERM)

    async def unready() -> bool:
        return await readiness(proxy) == 503

    await until(unready)
    assert [one.tokens for one in clients.heard] == [1] * streams, "they still run"
    gate.set()
    heard = await clients.ended()
    assert {(one.done, one.complete, one.tokens) for one in heard} == {(True, True, tokens)}
    assert await asyncio.to_thread(proxy.service.process.wait, 30) == 0
    ledger = await rows(proxy, streams)
    assert len(ledger) == streams
    assert {(row["outcome"], row["completion_tokens"]) for row in ledger.values()} == {("ok", tokens)}
    figure("F21", 0, f"of {streams} streams cut")
