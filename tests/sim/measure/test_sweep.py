"""The measurement: who is in flight when, what is counted, where it searches, how it ends early."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, cast

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from sim.measure.endpoint import Endpoint, Facts
from sim.measure.level import RequestRecord
from sim.measure.prompts import Prefix, Prompts
from sim.measure.sweep import Plan, Report, Sweep, closed_loop, measure
from sim.measure.verdict import Capacity, Sla
from sim.measure.wire import Api
from tests.sim.emulated import client
from tests.sim.measure.fake_server import DONE, record, serving, stream, token, usage


class FakeEndpoint:
    """Answers after two turns of the loop; TTFT is a tenth of a second for each request in flight."""

    url, model, api, exact_length = "http://fake", "m", Api.CHAT, True

    def __init__(self, fails_above: int = 1000, cold: int = 0) -> None:
        """`cold`: so many warming requests fail."""
        self.bodies: list[bytes] = []
        self.in_flight = 0
        self.fails_above = fails_above
        self.cold = cold

    def body(self, text: str, output_tokens: int) -> bytes:
        return f"{output_tokens} {text}".encode()

    async def ask(self, body: bytes, began_at: float = 0.0) -> RequestRecord:
        self.bodies.append(body)
        self.in_flight += 1
        await asyncio.sleep(0)
        users = self.in_flight
        await asyncio.sleep(0)
        self.in_flight -= 1
        error = "status 503: full" if users > self.fails_above else ""
        if body.startswith(b"1 ") and self.cold:
            self.cold -= 1
            error = "status 500: cold"
        return record(ttft=0.1 * users, e2e=0.1 * users + 1, error=error)


async def swept(endpoint: FakeEndpoint, plan: Plan) -> Report:
    sweep = Sweep(cast(Endpoint, endpoint), Facts(), Prompts(["a", "b", "c", "d"], 40, 0), plan)
    await sweep.run()
    return sweep.report


@given(st.integers(1, 20), st.integers(1, 100))
def test_a_closed_loop_keeps_its_users_busy(users: int, requests: int) -> None:
    in_flight: list[int] = []
    running = 0

    async def ask(body: bytes) -> RequestRecord:
        nonlocal running
        running += 1
        in_flight.append(running)
        for _ in range(body[0] % 5):
            await asyncio.sleep(0)
        running -= 1
        return record()

    done: list[RequestRecord] = []
    bodies = deque(bytes([number * 7 % 256]) for number in range(requests))
    asyncio.run(closed_loop(ask, bodies, users, done.append))
    assert len(done) == len(in_flight) == requests
    assert max(in_flight) <= users
    if all(number * 7 % 256 % 5 for number in range(min(users, requests))):
        assert max(in_flight) == min(users, requests)


async def test_levels_are_measured_in_order_with_four_requests_a_user() -> None:
    endpoint = FakeEndpoint()
    report = await swept(endpoint, Plan((4, 1, 2, 2), output_tokens=10))
    (series,) = report.series
    assert [(level.concurrency, level.completed) for level in series.levels] == [(1, 4), (2, 8), (4, 16)]
    means = [level.ttft_s.mean for level in series.levels if level.ttft_s]
    assert means == pytest.approx([0.1, 0.2, 0.4])
    assert len(set(endpoint.bodies)) == len(endpoint.bodies) == 28


async def test_a_warm_beginning_is_brought_in_before_each_level() -> None:
    endpoint = FakeEndpoint()
    plan = Plan((1, 2), output_tokens=10, requests=3, prefixes=(Prefix.COLD, Prefix.WARM))
    report = await swept(endpoint, plan)
    assert [(series.prefix, len(series.levels)) for series in report.series] == [("cold", 2), ("warm", 2)]
    limits = [int(body.split()[0]) for body in endpoint.bodies]
    assert limits == [10] * 6 + [1] + [10] * 3 + [1] + [10] * 3
    assert {body.split()[5] for body in endpoint.bodies[6:]} == {endpoint.bodies[6].split()[5]}


@pytest.mark.parametrize("cold", [0, 1, 2])
async def test_a_warming_request_that_fails_is_not_forgotten(cold: int) -> None:
    plan = Plan((1, 2), output_tokens=10, prefixes=(Prefix.COLD, Prefix.WARM))
    before, after = (await swept(FakeEndpoint(cold=cold), plan)).series
    assert [level.warm_up_error for level in before.levels] == ["", ""]
    assert not before.never_warmed
    assert [level.warm_up_error for level in after.levels] == ["status 500: cold"] * cold + [""] * (2 - cold)
    assert [level.completed for level in after.levels] == [4, 8]
    assert after.never_warmed == (cold == 2)


async def test_a_search_measures_between_levels() -> None:
    plan = Plan((1, 8, 32), sla=Sla(ttft_s=1.35), search=True)
    (series,) = (await swept(FakeEndpoint(), plan)).series
    assert [level.concurrency for level in series.levels] == [1, 8, 11, 12, 13, 14, 20, 32]
    assert series.capacity == Capacity(13, 14)


async def test_a_search_keeps_all_users_busy_with_one_request_each() -> None:
    plan = Plan((1, 8, 32), requests=32, sla=Sla(ttft_s=1.35), search=True)
    (series,) = (await swept(FakeEndpoint(), plan)).series
    assert series.capacity == Capacity(14, 15)  # the last ones, of an incomplete round, have less to wait for
    for level in series.levels:
        most = max(request.ttft_s or 0 for request in level.requests)
        assert (level.completed, most) == (32, pytest.approx(0.1 * level.concurrency))


async def test_without_a_search_the_sla_is_judged_by_the_levels() -> None:
    (series,) = (await swept(FakeEndpoint(), Plan((1, 8, 32), sla=Sla(ttft_s=1.35)))).series
    assert series.capacity == Capacity(8, 32)


async def test_a_level_that_fails_as_a_whole_is_the_last() -> None:
    (series,) = (await swept(FakeEndpoint(fails_above=0), Plan((1, 2, 4)))).series
    assert [(level.concurrency, level.failed) for level in series.levels] == [(1, 4)]
    assert series.levels[0].errors == {"status 503: full": 4}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"concurrency": ()}, "one user or more"),
        ({"concurrency": (2, 0)}, "one user or more"),
        ({"concurrency": (1,), "requests": 0}, "one or more"),
        ({"concurrency": (1, 4), "requests": 3}, "3 requests are too few for 4 users"),
        ({"concurrency": (1,), "output_tokens": 0}, "one or more"),
        ({"concurrency": (1,), "search": True}, "needs an SLA"),
    ],
)
def test_a_plan_that_makes_no_sense(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(**wrong)


async def test_an_emulated_vllm_is_measured_as_it_is_set() -> None:
    """Two slots, and two users or four: the same throughput, and half of the four wait."""
    async with client(slots=2, ttft_s=1.0, tpot_s=0.5, speed=50) as http:
        report = await measure(http.server.url, {}, Plan((2, 4), 32, 20, requests=8))
    (series,) = report.series
    assert [level.errors for level in series.levels] == [{}, {}]
    for level in series.levels:
        assert level.output_tokens == 160
        assert {request.prompt_tokens for request in level.requests} == {32}
        # A busy machine makes them longer, and nothing makes them shorter: 0.01 s for each token.
        assert min(request.ttft_s or 0 for request in level.requests) > 0.009
        assert min(request.e2e_s or 0 for request in level.requests) > 0.195
    waited = sum((request.ttft_s or 0) > 0.15 for request in series.levels[1].requests)
    assert waited >= 6  # all but the first two


async def test_what_was_measured_survives_a_cancellation() -> None:
    asked = 0
    third = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal asked
        words = len((await request.json())["messages"][0]["content"].split())
        if words == 20:
            asked += 1
            if asked == 7:
                third.set()
                await asyncio.Event().wait()
        return await stream(request, token("a"), usage(words, 1), DONE)

    async with serving(answer, v1__models={"data": [{"id": "m"}]}) as url, asyncio.TaskGroup() as group:
        task = group.create_task(measure(url, {}, Plan((1, 2), 20, 1)))
        await third.wait()
        task.cancel()
        report = await task
    assert report.interrupted
    first, second = report.series[0].levels
    assert (first.completed, first.interrupted) == (4, False)
    assert (second.failed, second.interrupted) == (0, True)
    assert 1 <= second.completed <= 7
    assert report.series[0].complete == [first]
