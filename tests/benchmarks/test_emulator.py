from __future__ import annotations

import asyncio

import pytest

from benchmarks.emulator import Client, Round, Seen, generated, keeps_promise, request
from sim.emulator import EmulatorSettings, emulator
from tests.sim.emulated import until


async def test_a_client_counts_events_and_asks_again() -> None:
    seen = Seen()
    async with emulator(EmulatorSettings(speed=100, shutdown_timeout_s=0.1)) as server:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(
            lambda: Client(request(3), seen), server.host, server.port
        )
        await until(lambda: seen.events > 10)
        transport.close()
        counted = await asyncio.to_thread(generated, server.port)
    # A role, a usage and at least one event of text for each three tokens.
    assert counted >= 6
    assert seen.events <= counted / 3 * 5 + 5


def test_figures_of_a_round() -> None:
    one = Round(tokens=10_000, events=10_100, cpu_s=0.25, seconds=1.0)
    assert one.us_per_token == pytest.approx(25)
    assert one.tokens_per_core == pytest.approx(40_000)


@pytest.mark.parametrize(
    ("tokens", "events", "kept"), [(10_000, 10_100, True), (9_990, 10_100, False), (20_000, 9_990, False)]
)
def test_the_promise_is_about_a_core_and_about_events(tokens: float, events: int, kept: bool) -> None:
    rounds = [Round(tokens, events, cpu_s=1.0, seconds=2.0)] * 3
    assert keeps_promise(rounds) is kept
    assert not keeps_promise([])
