"""Work on several processes: all of it, in any order, errors and deaths told, none left behind."""

from __future__ import annotations

import os
import signal
from multiprocessing import Pipe, active_children

import pytest

from sim.workers import WorkerDiedError, Workers, _work, cores


def square(number: int) -> int:
    if number < 0:
        raise ValueError(f"{number} is below zero")
    return number * number


def die(_: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def interrupt_disposition(_: int) -> bool:
    return signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("count", [1, 3])
def test_every_item_is_done_once(count: int) -> None:
    items = list(range(11))
    with Workers(square, count) as workers:
        for _ in range(2):
            assert sorted(workers.over(items)) == [(place, place * place) for place in items]
        assert list(workers.over([])) == []
    assert not active_children()


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_comes_back(count: int) -> None:
    with pytest.raises(ValueError, match="-3 is below zero"), Workers(square, count) as workers:
        list(workers.over([1, -3, 2]))
    assert not active_children()


def test_a_death_is_told() -> None:
    with pytest.raises(WorkerDiedError, match="exit code -9"), Workers(die, 2) as workers:
        list(workers.over([1, 2]))
    assert not active_children()


def test_an_interrupt_of_the_parent_ends_all_and_reaches_none() -> None:
    def left_early() -> None:
        with Workers(interrupt_disposition, 2) as workers:
            for _, ignores in workers.over([1, 2, 3, 4]):
                assert ignores
                raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        left_early()
    assert not active_children()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_worker_whose_parent_was_killed_ends_in_silence() -> None:
    ours, theirs = Pipe()

    def killed(_: int) -> int:
        ours.close()
        return 0

    ours.send((0, 1))
    before = signal.getsignal(signal.SIGINT)
    try:
        _work(theirs, killed)
    finally:
        signal.signal(signal.SIGINT, before)
        theirs.close()


def test_cores_are_those_that_may_be_used() -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)
