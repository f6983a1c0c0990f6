"""Standbys before the probes: left alone while they sleep, asked for their first answer while they start."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

import pytest

from policies.state import Backend
from probes.base import Target
from probes.runner import Prober
from proxy.tasks import Tasks
from tests.probes.fake import Clock, FakeBackend, model_list
from tests.probes.test_runner import PATIENT, Bench


class Standby(Bench):
    """A prober over one standby `z` that sleeps."""

    def __init__(self, backend: FakeBackend) -> None:
        super().__init__(Clock(), Tasks())
        self.backend = backend
        self.answered: list[str] = []
        self.fleet.replace([Backend("z", models=frozenset({"m"}), asleep=True)])
        self.fleet.refresh(self.clock.now)
        target = Target("z", backend.url, frozenset({"m"}))
        self.prober = Prober(
            [target],
            self.fleet,
            spawn=self.tasks.spawn,
            clock=self.clock,
            timing=PATIENT,
            changed=self.changed,
            answered=self.answered.append,
        )


@pytest.fixture
async def standby() -> AsyncIterator[Standby]:
    async with FakeBackend(health=503) as backend:
        bench = Standby(backend)
        yield bench
        await bench.prober.close()
        await bench.tasks.cancel_all()


async def test_one_that_sleeps_is_not_asked(standby: Standby, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(5):
        assert await standby.pass_time(100.0) == 0
    assert standby.backend.requests == []
    assert not caplog.records
    assert standby.prober.snapshot()["z"]["up"] is None


async def test_one_that_starts_is_asked_until_it_answers_and_once_is_enough(
    standby: Standby, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    standby.prober.watch("z", starting=True)
    assert await standby.pass_time() == 1
    assert await standby.pass_time(9.9) == 0
    for _ in range(8):  # more than take a backend down
        assert await standby.pass_time(10.1) == 1
    assert not caplog.records
    assert standby.answered == []
    standby.backend.health = 200
    assert await standby.pass_time(10.1) == 1
    assert standby.answered == ["z"]
    assert [record.message for record in caplog.records][:1] == ["backend z is up"]
    assert standby.fleet["z"].probed_up
    assert not standby.fleet["z"].available  # that is not for the probes to say
    await standby.pass_time(31.0)  # its manager takes its time
    standby.fleet.put("z", standby.clock.now, asleep=False)
    await standby.pass_time(31.0)
    assert standby.fleet["z"].available
    assert standby.answered == ["z"]


async def test_one_that_is_ready_goes_down_and_comes_back_as_any_other(standby: Standby) -> None:
    standby.backend.health = 200
    standby.prober.watch("z", starting=True)
    await standby.pass_time()
    standby.fleet.put("z", standby.clock.now, asleep=False)
    standby.backend.health = 503
    for up in (True, True, False):
        await standby.pass_time(31.0)
        assert standby.fleet["z"].available == up
    standby.backend.health = 200
    for up in (False, True):
        await standby.pass_time(10.1)
        assert standby.fleet["z"].available == up


async def test_one_that_is_put_to_sleep_is_forgotten_with_its_models(
    standby: Standby, caplog: pytest.LogCaptureFixture
) -> None:
    standby.backend.health, standby.backend.models = 200, model_list("m", "n")
    standby.prober.watch("z", starting=True)
    await standby.pass_time()
    standby.fleet.put("z", standby.clock.now, asleep=False)
    standby.backend.models = model_list("n")
    await standby.pass_time(101.0)
    assert standby.fleet["z"].models == set()
    standby.backend.health = "hang"
    (running,) = standby.prober.step(standby.clock.now + 31.0)
    await standby.backend.hung.wait()
    standby.fleet.put("z", standby.clock.now, asleep=True)
    caplog.clear()
    assert standby.prober.step(standby.clock.now) == []
    assert running.cancelling()
    assert standby.fleet["z"].models == {"m"}  # those of the configuration, which it is held for
    assert not caplog.records


async def test_one_that_drains_is_asked_on(standby: Standby) -> None:
    standby.backend.health = 200
    standby.prober.watch("z", starting=True)
    await standby.pass_time()
    standby.fleet.put("z", standby.clock.now, asleep=False)
    standby.fleet.put("z", standby.clock.now, asleep=True, draining=True)
    assert await standby.pass_time(31.0) == 1
    standby.fleet.put("z", standby.clock.now, asleep=True)
    assert await standby.pass_time(31.0) == 0


async def test_one_whose_start_is_given_up_is_left_alone(standby: Standby) -> None:
    standby.prober.watch("z", starting=True)
    await standby.pass_time()
    standby.prober.watch("z", starting=False)
    assert await standby.pass_time(31.0) == 0
    standby.backend.health = 200
    standby.prober.watch("z", starting=True)
    assert await standby.pass_time() == 1
    assert standby.answered == ["z"]


async def test_a_listener_that_fails_does_not_end_the_watch(
    standby: Standby, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(name: str) -> None:
        raise ZeroDivisionError(name)

    standby.prober._answered = fail
    standby.backend.health = 200
    standby.prober.watch("z", starting=True)
    assert await standby.pass_time() == 1
    assert any(record.exc_info for record in caplog.records)
    assert await standby.pass_time(31.0) == 1
