"""The schedule against real servers, by a clock that is moved by hand: nothing here waits for time to pass.

The clock decides what is due; timeouts are real, so they are long where an answer comes and a few milliseconds
where none ever will.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from random import Random

import pytest

from policies.base import Outcome, RequestFacts
from policies.state import NOT_ASKED, Backend, Fleet
from probes.active import new_session
from probes.base import Target, Timing
from probes.runner import Prober, probe_once
from proxy.tasks import Tasks
from tests.probes.fake import Clock, FakeBackend, metrics_page, model_list

PATIENT = Timing(
    interval_s=31.0, retry_s=10.0, timeout_s=30.0, models_s=100.0, jitter=0.0, metrics_idle_s=1e6
)
"""A check each 31 s of fake time."""
HASTY = replace(PATIENT, timeout_s=0.2)


class Bench:
    """A prober with all that it needs, and what it told."""

    def __init__(self, clock: Clock, tasks: Tasks) -> None:
        self.clock = clock
        self.tasks = tasks
        self.fleet = Fleet()
        self.told = 0
        self.listener: Callable[[], None] = lambda: None
        self.prober = Prober((), self.fleet, spawn=tasks.spawn, clock=clock, changed=self.changed)

    def watch(
        self, *targets: Target, timing: Timing = PATIENT, random: Random | None = None, metrics: bool = True
    ) -> None:
        self.fleet.replace(
            [
                Backend(target.name, slots=target.slots or 32, models_unknown=NOT_ASKED, models_awaited=True)
                for target in targets
            ]
        )
        self.fleet.refresh(self.clock.now)
        self.prober = Prober(
            targets,
            self.fleet,
            spawn=self.tasks.spawn,
            clock=self.clock,
            timing=timing,
            changed=self.changed,
            random=random,
            metrics=metrics,
        )

    def changed(self) -> None:
        self.told += 1
        self.listener()

    async def pass_time(self, seconds: float = 0.0) -> int:
        """Move the clock, start what is due and wait for it. How many rounds that were."""
        self.clock.now += seconds
        rounds = self.prober.step(self.clock.now)
        await asyncio.gather(*rounds)
        return len(rounds)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench(Clock(), Tasks())
    yield bench
    await bench.prober.close()
    await bench.tasks.cancel_all()


@pytest.fixture
async def backend() -> AsyncIterator[FakeBackend]:
    async with FakeBackend() as fake:
        yield fake


async def test_the_first_round_learns_everything(bench: Bench, backend: FakeBackend) -> None:
    backend.metrics = metrics_page(running=2, waiting=1, kv_use=0.5, concurrency=8.5)
    bench.watch(Target("a", backend.url))
    version = bench.fleet.version
    await bench.pass_time()
    known = bench.fleet["a"]
    assert known.available
    assert known.models == {"m"}
    assert known.context_tokens == {"m": 2048}
    assert (known.running, known.waiting, known.kv_use, known.sampled_at) == (2, 1, 0.5, 1000.0)
    assert known.slots == 8
    assert known.rtt_s > 0.0
    assert bench.fleet.version > version
    assert bench.told == 2  # models, slots


async def test_nothing_changed_nothing_told(bench: Bench, backend: FakeBackend) -> None:
    bench.watch(Target("a", backend.url))
    await bench.pass_time()
    told, version = bench.told, bench.fleet.version
    for _ in range(5):
        assert await bench.pass_time(31.0) == 1
    assert (bench.told, bench.fleet.version) == (told, version)


async def test_a_slow_answer_is_a_failure(bench: Bench, backend: FakeBackend) -> None:
    backend.health = "hang"
    bench.watch(Target("a", backend.url), timing=HASTY)
    await bench.pass_time()
    assert not bench.fleet["a"].available
    assert bench.prober.snapshot()["a"]["reason"] == "GET /health: no answer within 0.2 s"


async def test_three_failures_take_it_down_and_two_successes_bring_it_back(
    bench: Bench, backend: FakeBackend
) -> None:
    bench.watch(Target("a", backend.url))
    await bench.pass_time()
    told = bench.told
    backend.health = 503
    for available in (True, True, False):
        assert await bench.pass_time(31.0) == 1
        assert bench.fleet["a"].available == available
    assert bench.told == told + 1
    backend.health = 200
    # Down, it is asked after 10 s and not only after 31.
    assert await bench.pass_time(9.9) == 0
    assert await bench.pass_time(0.1) == 1
    assert not bench.fleet["a"].available
    assert await bench.pass_time(10.0) == 1
    assert bench.fleet["a"].available
    assert bench.told == told + 2
    assert await bench.pass_time(30.9) == 0
    assert await bench.pass_time(0.1) == 1


async def test_a_short_interval_holds_for_one_that_is_down_too(bench: Bench, backend: FakeBackend) -> None:
    backend.health = 503
    bench.watch(Target("a", backend.url), timing=replace(PATIENT, retry_s=500.0))
    await bench.pass_time()
    assert await bench.pass_time(31.0) == 1


async def test_flapping_does_not_move_it(bench: Bench, backend: FakeBackend) -> None:
    bench.watch(Target("a", backend.url))
    await bench.pass_time()
    told = bench.told
    for turn in range(12):
        backend.health = 200 if turn % 3 == 0 else 503
        await bench.pass_time(31.0)
        assert bench.fleet["a"].available
    assert bench.told == told


async def test_one_that_was_never_there_comes_up_by_itself(bench: Bench) -> None:
    async with FakeBackend(listening=False) as late:
        bench.watch(Target("a", late.url, frozenset({"m"})))
        await bench.pass_time()
        assert not bench.fleet["a"].available
        assert bench.prober.snapshot()["a"]["reason"] == "TCP connect: Connection refused"
        await late.listen()
        await bench.pass_time(10.0)
        await bench.pass_time(10.0)
        assert bench.fleet["a"].available


async def test_one_that_comes_back_is_known_anew_before_it_is_used(
    bench: Bench, backend: FakeBackend
) -> None:
    bench.watch(Target("a", backend.url), timing=replace(PATIENT, models_s=1e6))
    await bench.pass_time()
    backend.health = 503
    for _ in range(3):
        await bench.pass_time(31.0)
    backend.health, backend.models, backend.metrics = 200, model_list("other"), metrics_page(concurrency=4)
    seen = []
    bench.listener = lambda: seen.append((bench.fleet["a"].available, sorted(bench.fleet["a"].models)))
    await bench.pass_time(10.0)
    await bench.pass_time(10.0)
    await bench.pass_time()
    assert (True, ["m"]) not in seen
    assert seen[-1] == (True, ["other"])
    assert bench.fleet["a"].slots == 4


async def test_coming_up_lets_an_open_breaker_try_at_once(bench: Bench, backend: FakeBackend) -> None:
    bench.watch(Target("a", backend.url))
    await bench.pass_time()
    backend.health = 503
    for _ in range(3):
        await bench.pass_time(31.0)
    for _ in range(5):
        lease = bench.fleet.lease(RequestFacts(id="r", model="m"), "a", bench.clock.now)
        bench.fleet.release(lease, Outcome.FAILED, bench.clock.now)
    breaker = bench.fleet["a"].breaker
    breaker.opened_until = bench.clock.now + 300.0
    backend.health = 200
    await bench.pass_time(10.0)
    assert breaker.state(bench.clock.now) == "open"
    await bench.pass_time(10.0)
    assert breaker.state(bench.clock.now) == "half-open"
    assert bench.fleet["a"].available


@pytest.mark.parametrize("metrics", [404, 500, b"<html>not vLLM</html>"])
async def test_no_metrics_no_matter(bench: Bench, backend: FakeBackend, metrics: int | bytes) -> None:
    backend.metrics = metrics
    bench.watch(Target("a", backend.url), timing=replace(PATIENT, metrics_idle_s=1.0, metrics_max_s=60.0))
    await bench.pass_time()
    for _ in range(600):
        await bench.pass_time(0.5)
        assert bench.fleet["a"].available
    assert bench.fleet["a"].saturation(bench.clock.now) == 0.0
    assert bench.fleet["a"].slots == 32
    # after 0, 2, 6, 14, 30, 62 (pauses double up to a minute), 122, 182, 242 s
    assert 8 <= backend.asked("/metrics") <= 11
    backend.metrics = metrics_page(running=1)
    await bench.pass_time(61.0)
    assert bench.fleet["a"].running == 1


async def test_metrics_can_be_left_alone(bench: Bench, backend: FakeBackend) -> None:
    bench.watch(Target("a", backend.url), metrics=False)
    for _ in range(3):
        assert await bench.pass_time(31.0) == 1
    assert bench.fleet["a"].available
    assert backend.asked("/metrics") == 0


async def test_metrics_that_hang_keep_nobody_out_and_are_asked_once(
    bench: Bench, backend: FakeBackend
) -> None:
    backend.metrics = "hang"
    bench.watch(Target("a", backend.url))
    told = asyncio.Event()
    bench.listener = told.set
    bench.prober.step(bench.clock.now)
    await told.wait()
    assert bench.fleet["a"].models == {"m"}
    await backend.hung.wait()
    for _ in range(5):
        bench.clock.now += 31.0
        assert bench.prober.step(bench.clock.now) == []  # its round is still on
    assert backend.most_open == 1


async def test_figures_are_asked_for_often_only_while_it_works(bench: Bench, backend: FakeBackend) -> None:
    bench.watch(Target("a", backend.url), timing=replace(PATIENT, metrics_s=1.0, metrics_idle_s=10.0))

    async def asked_in(seconds: int) -> int:
        before = backend.asked("/metrics")
        for _ in range(seconds * 2):
            await bench.pass_time(0.5)
        return backend.asked("/metrics") - before

    await bench.pass_time()
    assert await asked_in(30) == 3
    lease = bench.fleet.lease(RequestFacts(id="r", model="m"), "a", bench.clock.now)
    assert await asked_in(30) == 30
    bench.fleet.release(lease, Outcome.OK, bench.clock.now)
    assert await asked_in(30) == 3
    backend.metrics = metrics_page(running=4)  # somebody else's requests
    await bench.pass_time(10.0)
    assert await asked_in(30) == 30


async def test_a_backend_that_is_down_is_not_scraped(bench: Bench, backend: FakeBackend) -> None:
    backend.health = 503
    bench.watch(Target("a", backend.url), timing=replace(PATIENT, metrics_idle_s=1.0))
    for _ in range(10):
        assert await bench.pass_time(10.0) == 1
    assert backend.asked("/metrics") == 0


async def test_without_health_the_models_tell(bench: Bench, backend: FakeBackend) -> None:
    backend.health = 404
    bench.watch(Target("a", backend.url))
    await bench.pass_time()
    assert bench.fleet["a"].available
    assert bench.fleet["a"].models == {"m"}
    assert backend.asked("/v1/models") == 1
    backend.models = 502
    for available in (True, True, False):
        await bench.pass_time(31.0)
        assert bench.fleet["a"].available == available
    assert bench.prober.snapshot()["a"]["reason"] == "GET /health: 404; GET /v1/models: 502"


async def test_a_model_that_is_gone_and_back(
    bench: Bench, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.models = model_list("m", "n", "not-configured")
    bench.watch(Target("a", backend.url, frozenset({"m", "n"})))
    await bench.pass_time()
    known = bench.fleet["a"]
    assert known.models == {"m", "n"}
    told = bench.told
    backend.models = model_list("m", "not-configured")
    with caplog.at_level(logging.WARNING, "tidegate.probes"):
        for _ in range(8):
            await bench.pass_time(31.0)
    assert known.available
    assert known.models == {"m"}
    complaint = "does not serve model n (it serves: m, not-configured)"
    assert bench.prober.snapshot()["a"]["misconfigured"] == [complaint]
    assert caplog.text.count(complaint) == 1
    assert bench.told == told + 1
    backend.models = model_list("m", "n")
    for _ in range(4):
        await bench.pass_time(31.0)
    assert known.models == {"m", "n"}
    assert bench.prober.snapshot()["a"]["misconfigured"] == []


async def test_what_a_backend_serves_is_logged_once_and_in_words(
    bench: Bench, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    def said() -> list[str]:
        return [record.getMessage() for record in caplog.records if "serves" in record.getMessage()]

    backend.models = model_list("m", "bench")
    bench.watch(Target("a", backend.url))
    with caplog.at_level(logging.INFO, "tidegate.probes"):
        await bench.pass_time()
        assert said() == ["backend a serves bench, m on 8 slots"]  # with what its engine says of its slots
        await bench.pass_time(200)
        assert len(said()) == 1
        backend.models = model_list()
        await bench.pass_time(200)
        assert said()[1:] == ["backend a: serves no model"]


async def test_the_list_of_models_is_asked_for_now_and_then(bench: Bench, backend: FakeBackend) -> None:
    bench.watch(Target("a", backend.url))
    for _ in range(13):
        await bench.pass_time(31.0)
    assert backend.asked("/health") == 13
    assert backend.asked("/v1/models") == 4  # each 100 s, with the next check


async def test_unknown_models_are_asked_for_with_every_check(bench: Bench, backend: FakeBackend) -> None:
    backend.models = 500
    bench.watch(Target("a", backend.url))
    for _ in range(3):
        await bench.pass_time(31.0)
    assert bench.fleet["a"].models == frozenset()
    assert backend.asked("/v1/models") == 3


async def test_the_key_goes_to_the_list_of_models_only(
    bench: Bench, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        bench.watch(Target("a", backend.url, headers={"Authorization": "Bearer geheim"}))
        await bench.pass_time()
        backend.models = 401
        for _ in range(4):
            await bench.pass_time(31.0)
    shown = {path for path, headers in backend.requests if "geheim" in headers.get("authorization", "")}
    assert shown == {"/v1/models"}
    assert {path for path, _ in backend.requests} == {"/health", "/v1/models", "/metrics"}
    assert "is its key right?" in caplog.text
    assert "geheim" not in caplog.text + json.dumps(bench.prober.snapshot())


async def test_a_backend_that_keeps_its_models_to_itself_is_not_available(
    bench: Bench, backend: FakeBackend
) -> None:
    backend.models = 401
    bench.watch(Target("a", backend.url))
    await bench.pass_time()
    known = bench.fleet["a"]
    assert (known.probed_up, known.available) == (True, False)
    assert known.models_unknown == "GET /v1/models: 401: is its key right?"
    assert not known.models_awaited
    backend.models = model_list("m")
    await bench.pass_time(31.0)
    assert (known.available, known.models_unknown, known.models) == (True, "", {"m"})


async def test_a_hanging_backend_delays_nobody_else(bench: Bench, backend: FakeBackend) -> None:
    async with FakeBackend(health="hang") as hanging:
        bench.watch(Target("hanging", hanging.url), Target("a", backend.url))
        stuck, round_of_a = bench.prober.step(bench.clock.now)
        await round_of_a
        assert bench.fleet["a"].models == {"m"}
        for _ in range(5):
            assert await bench.pass_time(31.0) == 1
        assert not stuck.done()
        assert backend.asked("/health") == 6
        assert hanging.asked("/health") == 1


async def test_one_question_at_a_time(bench: Bench, backend: FakeBackend) -> None:
    bench.watch(Target("a", backend.url), timing=replace(PATIENT, metrics_idle_s=1.0))
    for _ in range(20):
        await bench.pass_time(31.0)
    assert backend.asked("/metrics") == 20
    assert backend.most_open == 1


async def test_slots_of_the_configuration_stay(bench: Bench, backend: FakeBackend) -> None:
    bench.watch(Target("a", backend.url, slots=24))
    await bench.pass_time()
    assert bench.fleet["a"].slots == 24
    assert bench.prober.snapshot()["a"]["slots_reported"] is None


async def test_pauses_are_jittered_within_their_bounds(bench: Bench, backend: FakeBackend) -> None:
    bench.watch(
        Target("a", backend.url), timing=replace(PATIENT, interval_s=100.0, jitter=0.1), random=Random(1)
    )
    pauses = []
    await bench.pass_time()
    for _ in range(20):
        began = bench.clock.now
        while await bench.pass_time(1.0) == 0:
            pass
        pauses.append(bench.clock.now - began)
    assert min(pauses) >= 90.0
    assert max(pauses) <= 111.0
    assert len(set(pauses)) > 5


async def test_time_alone_ends_a_back_off(bench: Bench, backend: FakeBackend) -> None:
    bench.watch(Target("a", backend.url))
    await bench.pass_time()
    told = bench.told
    bench.fleet.back_off("a", 3.0, bench.clock.now)
    await bench.pass_time(3.0)
    assert bench.fleet["a"].available
    assert bench.told == told + 1


async def test_a_faulty_listener_stops_nothing(
    bench: Bench, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    bench.listener = fail
    bench.watch(Target("a", backend.url))
    await bench.pass_time()
    assert bench.fleet["a"].slots == 8
    assert "ZeroDivisionError" in caplog.text


async def test_a_reload_keeps_what_is_known_of_the_unchanged(bench: Bench, backend: FakeBackend) -> None:
    async with FakeBackend(health=503) as sick, FakeBackend(health="hang") as hanging:
        stay, go = Target("stay", sick.url), Target("go", hanging.url)
        bench.watch(Target("a", backend.url), stay, go)
        first, second, third = bench.prober.step(bench.clock.now)
        await asyncio.gather(first, second)
        asked = len(backend.requests)
        bench.fleet.replace([Backend(name="a"), Backend(name="stay"), Backend(name="new")])
        bench.prober.replace([Target("a", backend.url), stay, Target("new", backend.url)])
        # New objects, brought in line without asking anybody.
        assert bench.fleet["a"].models == {"m"}
        assert bench.fleet["a"].slots == 8
        assert not bench.fleet["stay"].available
        assert len(backend.requests) == asked
        await asyncio.wait([third], timeout=10.0)
        assert third.cancelled()
        assert await bench.pass_time() == 1  # the new one
        assert bench.fleet["new"].models == {"m"}
        assert bench.prober.snapshot().keys() == {"a", "stay", "new"}


async def test_a_reload_tries_what_changed_at_once(bench: Bench, backend: FakeBackend) -> None:
    bench.watch(Target("a", backend.url))
    await bench.pass_time()
    bench.prober.replace(
        [Target("a", backend.url, frozenset({"other"}), headers={"Authorization": "Bearer new"})]
    )
    assert bench.fleet["a"].models == frozenset()
    backend.models = model_list("other")
    assert await bench.pass_time() == 1
    assert bench.fleet["a"].models == {"other"}
    assert backend.requests[-1][1]["authorization"] == "Bearer new"


async def test_a_reload_forgets_what_was_known_of_another_address(bench: Bench, backend: FakeBackend) -> None:
    bench.watch(Target("a", backend.url))
    await bench.pass_time()
    async with FakeBackend(health=503) as other:
        bench.fleet.replace([Backend(name="a")])
        bench.prober.replace([Target("a", other.url)])
        assert bench.prober.snapshot()["a"]["models"] == []
        await bench.pass_time()
        assert not bench.fleet["a"].available


async def test_probe_once_tells_everything() -> None:
    async with FakeBackend() as backend, new_session() as session:
        status = await probe_once(Target("a", backend.url, frozenset({"x"})), session, Clock())
        assert status.up
        assert status.slots == 8
        assert status.misconfigured == ["does not serve model x (it serves: m)"]
        backend.health = 503
        status = await probe_once(Target("a", backend.url), session, Clock())
        assert not status.up
        assert status.checked is not None
        assert status.checked.reason == "GET /health: 503"
        assert backend.asked("/metrics") == 1


async def test_it_runs_by_itself_from_start_to_close(backend: FakeBackend) -> None:
    tasks, fleet, moved = Tasks(), Fleet([Backend(name="a")]), asyncio.Event()
    quick = Timing(interval_s=0.02, retry_s=0.02, timeout_s=0.019, models_s=0.05, down=1)
    prober = Prober(
        [Target("a", backend.url)],
        fleet,
        spawn=tasks.spawn,
        clock=asyncio.get_running_loop().time,
        timing=quick,
        changed=moved.set,
    )
    await prober.start()

    async def until(condition: Callable[[], bool]) -> None:
        while not condition():
            moved.clear()
            await asyncio.wait_for(moved.wait(), 20.0)

    await until(lambda: fleet["a"].models == {"m"})
    backend.health = 503
    await until(lambda: not fleet["a"].available)
    backend.health = 200
    await until(lambda: fleet["a"].available)
    await prober.close()
    assert len(tasks) == 0


async def test_start_waits_no_longer_than_its_patience(bench: Bench, backend: FakeBackend) -> None:
    async with FakeBackend(health="hang") as hanging:
        bench.watch(Target("hanging", hanging.url), Target("a", backend.url))
        await bench.prober.start(patience_s=0.01)
        await hanging.hung.wait()
        assert hanging.open == 1
        assert bench.prober.snapshot()["hanging"]["up"] is None
        await bench.prober.close()
        assert len(bench.tasks) == 0
