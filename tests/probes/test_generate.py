"""The probe that asks for one token, on real sockets and a clock of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from policies.base import Outcome, RequestFacts
from probes.active import parse_generated
from probes.base import Generated, ProbeError, Target
from proxy.tasks import Tasks
from tests.probes.fake import Clock, FakeBackend, model_list
from tests.probes.test_runner import PATIENT, Bench

ASKING = replace(PATIENT, generate_s=60.0)
"""A check each 31 s of fake time, each 10 s while it is down."""


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench(Clock(), Tasks())
    yield bench
    await bench.prober.close()
    await bench.tasks.cancel_all()


@pytest.fixture
async def backend() -> AsyncIterator[FakeBackend]:
    async with FakeBackend(models=model_list("n", "m")) as fake:
        yield fake


async def test_it_is_off_by_default(bench: Bench, backend: FakeBackend) -> None:
    bench.watch(Target("a", backend.url))
    for _ in range(5):
        await bench.pass_time(100.0)
    assert backend.posted == []


async def test_a_token_is_asked_for_after_a_silence_with_the_key_and_counted_apart(
    bench: Bench, backend: FakeBackend
) -> None:
    bench.watch(Target("a", backend.url, headers={"Authorization": "Bearer k"}), timing=ASKING)
    await bench.pass_time()
    await bench.pass_time(31.0)
    assert backend.posted == []
    await bench.pass_time(31.0)
    assert backend.posted == [{"model": "m", "messages": [{"role": "user", "content": "."}], "max_tokens": 1}]
    fields = next(fields for path, fields in backend.requests if path == "/v1/chat/completions")
    assert fields["authorization"] == "Bearer k"
    await bench.pass_time(31.0)
    await bench.pass_time(31.0)
    assert bench.prober.snapshot()["a"]["generation"] == {
        "requests": 2,
        "prompt_tokens": 10,
        "completion_tokens": 2,
    }


async def test_none_is_asked_for_while_clients_get_theirs(bench: Bench, backend: FakeBackend) -> None:
    bench.watch(Target("a", backend.url), timing=ASKING)
    for _ in range(8):
        await bench.pass_time(31.0)
        bench.fleet["a"].observe_ttft(0.1, bench.clock.now)
    assert backend.posted == []


async def test_nor_while_they_get_whole_answers(bench: Bench, backend: FakeBackend) -> None:
    bench.watch(Target("a", backend.url), timing=ASKING)
    for number in range(8):
        await bench.pass_time(31.0)
        lease = bench.fleet.lease(RequestFacts(f"{number}", "m"), "a", bench.clock.now)
        bench.fleet.release(lease, Outcome.OK, bench.clock.now)
    assert backend.posted == []


async def test_those_that_end_badly_do_not_count(bench: Bench, backend: FakeBackend) -> None:
    bench.watch(Target("a", backend.url), timing=ASKING)
    for number in range(4):
        await bench.pass_time(31.0)
        lease = bench.fleet.lease(RequestFacts(f"{number}", "m"), "a", bench.clock.now)
        bench.fleet.release(lease, Outcome.IGNORED, bench.clock.now)
    assert backend.posted != []


@pytest.mark.parametrize("status", [400, 404, 405, 422, 501])
async def test_one_that_does_not_chat_is_well_and_is_not_asked_at_every_check(
    bench: Bench, backend: FakeBackend, status: int
) -> None:
    backend.generate = status
    bench.watch(Target("a", backend.url), timing=ASKING)
    for _ in range(9):
        await bench.pass_time(31.0)
    assert bench.fleet["a"].available
    assert len(backend.posted) == 4


@pytest.mark.parametrize("status", [401, 403, 408, 302, 503])
async def test_other_answers_take_it_down(bench: Bench, backend: FakeBackend, status: int) -> None:
    backend.generate = status
    bench.watch(Target("a", backend.url), timing=ASKING)
    for _ in range(6):
        await bench.pass_time(31.0)
    assert not bench.fleet["a"].available


async def test_an_engine_that_computes_nothing_goes_down_and_comes_back_by_itself(
    bench: Bench, backend: FakeBackend
) -> None:
    bench.watch(Target("a", backend.url), timing=ASKING)
    for _ in range(2):
        await bench.pass_time(31.0)
    backend.generate = 500
    up = []
    for _ in range(3):
        await bench.pass_time(31.0)
        up.append(bench.fleet["a"].available)
    assert up == [True, True, False]
    assert bench.prober.snapshot()["a"]["reason"] == "POST /v1/chat/completions: 500"
    await bench.pass_time(31.0)
    assert not bench.fleet["a"].available, "its /health is well all the time"
    backend.generate = {"choices": [{}]}
    for _ in range(2):
        await bench.pass_time(31.0)
    assert bench.fleet["a"].available


async def test_one_that_is_full_is_well(bench: Bench, backend: FakeBackend) -> None:
    backend.generate = 429
    bench.watch(Target("a", backend.url), timing=ASKING)
    for _ in range(8):
        await bench.pass_time(31.0)
    assert len(backend.posted) >= 5
    assert bench.fleet["a"].available


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b'{"choices": [{}], "usage": {"prompt_tokens": 7, "completion_tokens": 1}}', Generated(7, 1)),
        (b'{"choices": [{}], "usage": {"prompt_tokens": -7, "completion_tokens": "1"}}', Generated(0, 0)),
        (b'{"choices": [{}]}', Generated(0, 0)),
        (b'{"choices": []}', None),
        (b'{"error": {}}', None),
        (b"[]", None),
        (b"", None),
    ],
)
def test_only_an_answer_is_one(body: bytes, found: Generated | None) -> None:
    if found is None:
        with pytest.raises(ProbeError):
            parse_generated(body)
    else:
        assert parse_generated(body) == found
