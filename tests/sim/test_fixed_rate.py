from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.fixed_rate import FixedRateEngine
from sim.generation import EngineFigures, Generation, SequencePlan, TokenSequence


class FakeTimer:
    def __init__(self, when: float, callback: Callable[[], object]) -> None:
        self.when = when
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class FakeTimers:
    """Timers as data: `run_until` fires them in order."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[FakeTimer] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], object], /) -> FakeTimer:
        timer = FakeTimer(when, callback)
        self.timers.append(timer)
        return timer

    def run_until(self, end: float) -> None:
        while True:
            due = [timer for timer in self.timers if not timer.cancelled and timer.when <= end]
            if not due:
                break
            timer = min(due, key=lambda timer: timer.when)
            self.timers.remove(timer)
            self.now = max(self.now, timer.when)
            timer.callback()
        self.now = end


class Log:
    """An observer that writes everything down."""

    def __init__(self) -> None:
        self.starts: list[tuple[TokenSequence, float]] = []
        self.tokens: list[tuple[TokenSequence, float]] = []
        self.ends: list[TokenSequence] = []

    def started(self, sequence: TokenSequence, now: float) -> None:
        self.starts.append((sequence, round(now, 6)))

    def advanced(self, sequence: TokenSequence, tokens: int, now: float) -> None:
        self.tokens += [(sequence, round(now, 6))] * tokens

    def finished(self, sequence: TokenSequence) -> None:
        self.ends.append(sequence)


def make(slots: int = 2, slowdown: float = 0.0) -> tuple[FixedRateEngine, FakeTimers, Log]:
    timers, log = FakeTimers(), Log()
    engine = FixedRateEngine(
        timers, slots=slots, ttft_s=1.0, tpot_s=0.1, slowdown=slowdown, kv_tokens=1600, observer=log
    )
    return engine, timers, log


def plans(*lengths: int) -> list[SequencePlan]:
    return [SequencePlan(20, length, length, "length") for length in lengths]


def started(log: Log) -> list[Generation]:
    return [sequence.generation for sequence, _ in log.starts]


def times(log: Log, generation: Generation) -> list[float]:
    return [when for sequence, when in log.tokens if sequence.generation is generation]


def test_first_token_after_ttft_and_each_further_one_after_tpot() -> None:
    engine, timers, log = make()
    generation = engine.submit(plans(4))
    timers.run_until(10.0)
    assert times(log, generation) == [1.0, 1.1, 1.2, 1.3]
    assert log.ends == generation.sequences
    assert engine.figures() == EngineFigures(0, 0, 0.0)


def test_the_queue_is_first_come_first_served() -> None:
    engine, timers, log = make(slots=2)
    generations = [engine.submit(plans(length)) for length in (11, 1, 1, 1)]
    assert engine.figures()[:2] == (2, 2)
    timers.run_until(100.0)
    assert started(log) == generations
    # The third starts when the second is done, the fourth when the third is.
    assert [when for _, when in log.starts] == [0.0, 0.0, 1.0, 2.0]


def test_choices_of_one_request_take_a_slot_each() -> None:
    engine, timers, log = make(slots=2)
    generation = engine.submit(plans(3, 3, 3))
    assert engine.figures()[:2] == (2, 1)
    timers.run_until(100.0)
    assert [sequence.index for sequence, _ in log.starts] == [0, 1, 2]
    assert [sequence.index for sequence, _ in log.tokens] == [0, 1, 0, 1, 0, 1, 2, 2, 2]
    assert all(sequence.finished for sequence in generation.sequences)


def test_cancelling_a_running_request_lets_the_next_one_in_at_once() -> None:
    engine, timers, log = make(slots=1)
    first, second = engine.submit(plans(100)), engine.submit(plans(1))
    timers.run_until(2.05)
    engine.cancel(first)
    assert engine.figures()[:2] == (1, 0)
    timers.run_until(50.0)
    assert log.starts[1] == (second.sequences[0], 2.05)
    assert times(log, second) == [3.05]
    assert len(times(log, first)) == 11
    assert log.ends == second.sequences


def test_cancelling_a_queued_request_keeps_the_order_of_the_others() -> None:
    engine, timers, log = make(slots=1)
    generations = [engine.submit(plans(1)) for _ in range(4)]
    engine.cancel(generations[2])
    assert engine.figures()[:2] == (1, 2)
    timers.run_until(50.0)
    assert started(log) == [generations[0], generations[1], generations[3]]


def test_cancelling_what_has_finished_changes_nothing() -> None:
    engine, timers, _ = make(slots=1)
    first, second = engine.submit(plans(1)), engine.submit(plans(100))
    timers.run_until(2.0)
    engine.cancel(first)
    assert engine.figures()[:2] == (1, 0)
    assert not second.sequences[0].finished


def test_others_slow_a_request_down() -> None:
    engine, timers, log = make(slots=3, slowdown=0.5)
    generations = [engine.submit(plans(3)) for _ in range(3)]
    timers.run_until(50.0)
    assert times(log, generations[0]) == [1.0, 1.2, 1.4]
    # Alone after the first two ended at the same time: its last interval began while they still ran.
    assert times(log, generations[2])[:2] == [1.0, 1.2]


def test_kv_use_is_blocks_of_what_runs() -> None:
    engine, timers, _ = make()
    engine.submit(plans(40))
    assert engine.figures().kv_use == pytest.approx(2 / 100)  # 20 tokens: 2 of 100 blocks of 16
    timers.run_until(2.3)
    assert engine.figures().kv_use == pytest.approx(3 / 100)  # 34 tokens


def test_a_late_loop_loses_no_tokens_and_keeps_the_rate() -> None:
    engine, timers, log = make()
    generation = engine.submit(plans(5))
    timers.now = 1.25
    timers.timers.pop().callback()
    assert times(log, generation) == [1.0, 1.1, 1.2]
    timers.run_until(50.0)
    assert times(log, generation) == [1.0, 1.1, 1.2, 1.3, 1.4]


async def collect(generation: Generation) -> list[list[tuple[int, int]]]:
    return [step async for step in generation]


async def test_a_late_reader_finds_tokens_merged() -> None:
    engine, timers, _ = make()
    generation = engine.submit(plans(3, 2))
    timers.run_until(1.1)
    first = await anext(generation)
    timers.run_until(50.0)
    assert first == [(0, 2), (1, 2)]
    assert await collect(generation) == [[(0, 1)]]


@given(
    slots=st.integers(1, 4),
    requests=st.lists(
        st.tuples(
            st.floats(0, 5), st.lists(st.integers(1, 30), min_size=1, max_size=3), st.none() | st.floats(0, 5)
        ),
        min_size=1,
        max_size=12,
    ),
)
def test_whatever_happens_slots_are_kept_and_counts_add_up(
    slots: int, requests: list[tuple[float, list[int], float | None]]
) -> None:
    engine, timers, log = make(slots=slots, slowdown=0.1)
    actions: list[tuple[float, int, int]] = []
    for number, (arrival, _, patience) in enumerate(requests):
        actions.append((arrival, 0, number))
        if patience is not None:
            actions.append((arrival + patience, 1, number))
    generations: dict[int, Generation] = {}
    cancelled: set[int] = set()
    for when, kind, number in sorted(actions):
        timers.run_until(when)
        if kind == 0:
            generations[number] = engine.submit(plans(*requests[number][1]))
        else:
            engine.cancel(generations[number])
            cancelled.add(number)
        running, waiting, _ = engine.figures()
        assert running <= slots
        assert waiting == 0 or running == slots
    timers.run_until(1e6)
    assert engine.figures() == EngineFigures(0, 0, 0.0)
    for number, generation in generations.items():
        for sequence in generation.sequences:
            assert sequence.started_at >= sequence.submitted_at
            assert sequence.finished or number in cancelled
            assert [s for s, _ in log.tokens].count(sequence) == sequence.done
    in_order = [sequence.submitted_at for sequence, _ in log.starts]
    assert in_order == sorted(in_order)


def test_plans_may_come_from_any_iterable() -> None:
    engine, timers, _ = make()
    several: Iterable[SequencePlan] = (plan for plan in plans(1, 1))
    generation = engine.submit(several)
    timers.run_until(5.0)
    assert len(generation.sequences) == 2
