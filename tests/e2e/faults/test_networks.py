"""Connections to backends that fail: reset, silent, refused, closed while idle, cut into single bytes."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from random import Random

import pytest

from proxy.tasks import Tasks
from tests.e2e.backends import Behaviour, Wire, answers
from tests.e2e.faults.conftest import StartLine
from tests.e2e.faults.figures import Figure
from tests.e2e.proxy_fixtures import Answer, Proxy, StartBackend, StartProxy, bound, eventually

pytestmark = pytest.mark.e2e

NEVER = 10**9
"""Failures in a row that a breaker would need."""
PROBING = {"interval": "100ms", "timeout": "50ms", "up": 2, "down": 1, "metrics": False}


async def at_once(proxy: Proxy, requests: int, clients: int) -> list[Answer]:
    """So many streams, so many at a time."""
    found: list[Answer] = []
    left = iter(range(requests))

    async def client() -> None:
        for _ in left:
            found.append(await proxy.chat(stream=True))

    await asyncio.gather(*(client() for _ in range(clients)))
    return found


async def test_f02_a_reset_behind_the_head_is_not_noticed(
    start_backend: StartBackend, start_proxy: StartProxy, start_line: StartLine, figure: Figure
) -> None:
    count = 40
    bad, good = await start_backend(then=answers(4)), await start_backend(then=answers(4))
    line = await start_line(bad.port, behind=b"\r\n\r\n", then="reset")
    proxy = await start_proxy({"url": line.url}, good)
    proxy.backend("a").breaker.threshold = NEVER
    found = await at_once(proxy, count, 4)
    assert {(answer.status, answer.backend, answer.text, answer.done) for answer in found} == {
        (200, "b", "xxxx", True)
    }
    rows = [await proxy.row(answer) for answer in found]
    assert {(row.outcome, row.attempts, row.completion_tokens) for row in rows} == {("ok", 2, 4)}
    assert (line.failed, len(bad.received), proxy.backend("a").failed) == (count, count, count)
    await proxy.idle()
    figure("F2", 0, f"of {count} clients saw an error")


def serves_once() -> Behaviour:
    """A connection is closed as its second request comes: that one was on its way."""
    used: set[asyncio.StreamWriter] = set()

    async def behave(wire: Wire) -> None:
        if wire.writer in used:
            wire.reset()
            return
        used.add(wire.writer)
        await answers()(wire)

    return behave


async def test_f03_a_kept_connection_that_closes_costs_nobody_anything(
    start_backend: StartBackend, start_proxy: StartProxy, figure: Figure
) -> None:
    count = 200
    backend = await start_backend(then=serves_once())
    proxy = await start_proxy(backend)
    found = await at_once(proxy, count, 4)
    assert {answer.status for answer in found} == {200}
    rows = [await proxy.row(answer) for answer in found]
    assert {(row.outcome, row.completion_tokens) for row in rows} == {("ok", 3)}
    assert proxy.backend("a").failed == 0
    races = len(backend.received) - count
    assert races >= count / 2
    figure("F3", 0, f"of {count} requests failed, with {races} lost races")


def idles(seconds: float) -> Behaviour:
    """Closes a connection over which nothing has come for so long."""
    timers: dict[asyncio.StreamWriter, asyncio.TimerHandle] = {}

    async def behave(wire: Wire) -> None:
        if (timer := timers.pop(wire.writer, None)) is not None:
            timer.cancel()
        await answers()(wire)
        timers[wire.writer] = asyncio.get_running_loop().call_later(seconds, wire.writer.close)

    return behave


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_f03_ten_thousand_races_with_an_idle_timeout(
    start_backend: StartBackend, start_proxy: StartProxy, figure: Figure
) -> None:
    idle_s, count, chance = 0.02, 10_000, Random(3)
    backend = await start_backend(then=idles(idle_s))
    proxy = await start_proxy({"url": backend.url, "slots": 64})
    statuses: list[int] = []

    async def client() -> None:
        for _ in range(count // 40):
            statuses.append((await proxy.chat()).status)
            await asyncio.sleep(idle_s * chance.uniform(0.8, 1.2))

    await asyncio.gather(*(client() for _ in range(40)))
    assert statuses == [200] * count
    assert proxy.backend("a").failed == 0
    figure("F3", 0, f"of {count} requests failed that came as connections idled out")


async def test_f04_a_backend_that_never_answers_is_left_out_after_five(
    start_backend: StartBackend, start_proxy: StartProxy, start_line: StartLine, figure: Figure
) -> None:
    first_token_s = 0.2
    hole, good = await start_backend(), await start_backend(then=answers(2))
    line = await start_line(hole.port, then="silence")
    proxy = await start_proxy({"url": line.url}, good, timeouts={"first_token": first_token_s})
    found = [await proxy.chat(stream=True) for _ in range(12)]
    assert {(answer.status, answer.backend, answer.done) for answer in found} == {(200, "b", True)}
    assert line.asked == 5
    assert not proxy.backend("a").available
    waits = [(await proxy.row(answer)).ttft_s or 0.0 for answer in found]
    assert min(waits[:5]) >= first_token_s
    assert max(waits) < bound(first_token_s + 0.1)
    await proxy.idle()
    figure("F4", max(waits), f"s was the longest time to a first token, {first_token_s} s allowed")
    figure("F4", line.asked, f"of {len(found)} requests went there")


@pytest.fixture
def silent() -> Iterator[int]:
    """A port at which handshakes are not answered: its queue is full, and nobody accepts."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        fillers = [socket.socket() for _ in range(3)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        yield port
        for filler in fillers:
            filler.close()


async def test_f05_handshakes_that_nobody_answers_cost_the_connect_timeout(
    silent: int, start_backend: StartBackend, start_proxy: StartProxy, figure: Figure
) -> None:
    connect_s = 0.2
    good = await start_backend(then=answers(2))
    proxy = await start_proxy(
        {"url": f"http://127.0.0.1:{silent}"}, good, timeouts={"connect": connect_s, "first_token": "60s"}
    )
    found = [await proxy.chat(stream=True) for _ in range(10)]
    assert {(answer.status, answer.backend, answer.done) for answer in found} == {(200, "b", True)}
    waits = [(await proxy.row(answer)).ttft_s or 0.0 for answer in found]
    assert min(waits[:5]) >= connect_s
    assert max(waits) < bound(connect_s + 0.1)
    assert not proxy.backend("a").available
    figure("F5", max(waits), f"s was the longest time to a first token, {connect_s} s allowed to connect")


async def test_f05_a_backend_that_listens_again_is_used_again(
    start_backend: StartBackend, start_proxy: StartProxy, figure: Figure
) -> None:
    first, second = await start_backend(), await start_backend()
    proxy = await start_proxy(first, second, probing=PROBING)
    found = [await proxy.chat()]
    await first.stop()
    found += [await proxy.chat() for _ in range(5)]
    await eventually(lambda: not proxy.backend("a").probed_up)
    found += [await proxy.chat() for _ in range(5)]
    await first.start()
    back = time.monotonic()
    await eventually(lambda: proxy.backend("a").available)
    took = time.monotonic() - back
    found.append(await proxy.chat())
    assert took < bound(2.2 * 0.1 + 0.1)
    assert {answer.status for answer in found} == {200}
    assert [found[0].backend, found[-2].backend, found[-1].backend] == ["a", "b", "a"]
    figure("F5", took, "s from listening again to being used, with 2 successes at 0.1 s wanted")


async def test_f08_a_backend_that_flaps_is_tried_less_and_less_often(
    start_backend: StartBackend, start_proxy: StartProxy, figure: Figure
) -> None:
    down_s, up_s, times, first_s = 0.12, 0.04, 14, 0.1
    flapping, other = await start_backend(), await start_backend()
    proxy = await start_proxy(flapping, other)
    breaker = proxy.backend("a").breaker
    breaker.base_s = first_s
    opened: list[float] = []
    statuses: set[int] = set()

    async def client() -> None:
        while True:
            statuses.add((await proxy.chat()).status)
            if breaker.is_open and breaker.moved_at not in opened[-1:] and not breaker.trial_running:
                opened.append(breaker.moved_at)

    tasks = Tasks()
    for _ in range(2):
        tasks.spawn(client(), "client")
    for _ in range(times):
        await flapping.stop()
        await asyncio.sleep(down_s)
        await flapping.start()
        await asyncio.sleep(up_s)
    await tasks.cancel_all()
    took = times * (down_s + up_s)
    without = took / (first_s + up_s)
    assert statuses == {200}
    assert breaker.backoff_s >= 4 * first_s
    assert 2 <= len(opened) < without / 2
    assert len(other.received) > len(flapping.received)
    figure("F8", len(opened), f"times taken out in {took:.0f} s, {without:.0f} without growing pauses")


async def test_f30_a_stream_in_single_bytes_is_the_same_stream(
    start_backend: StartBackend, start_proxy: StartProxy, start_line: StartLine, figure: Figure
) -> None:
    tokens, pieces = 40, (0, 1, 2, 7)
    backend = await start_backend(then=answers(tokens))
    line = await start_line(backend.port)
    proxy = await start_proxy({"url": line.url})
    found = []
    for piece in pieces:
        line.piece = piece
        answer = await proxy.chat(stream=True, stream_options={"include_usage": True})
        row = await proxy.row(answer)
        assert (row.outcome, row.completion_tokens, row.usage_source) == ("ok", tokens, "reported")
        found.append(answer)
    assert {(answer.status, answer.done, answer.complete) for answer in found} == {(200, True, True)}
    assert len(found[0].events) == tokens + 2
    assert {answer.body for answer in found} == {found[0].body}
    figure("F30", len(pieces), f"cuts, one into single bytes, gave the same {len(found[0].events)} events")
