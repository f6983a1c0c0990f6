"""Engines in real time, with a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.engine import Engine, EngineSettings, Sequence, StepCost
from sim.generation import EngineFigures, Generation, SequencePlan, TokenSequence
from sim.realtime import Driver, RealtimeEngine

COST = StepCost(alpha=20_000.0, beta=0.0, gamma=0.0, delta=100.0)
"""20 ms a step, a tenth of one more for each token of a prompt."""


class FakeTimer:
    def __init__(self, when: float, callback: Callable[[], object]) -> None:
        self.when = when
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class FakeLoop:
    """A clock and timers as data. As uvloop's, timers take whole milliseconds."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.timers: list[FakeTimer] = []
        self.fired = 0

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[[], object], /) -> FakeTimer:
        timer = FakeTimer(self.now + round(delay * 1000) / 1000, callback)
        self.timers.append(timer)
        return timer

    def run_for(self, seconds: float) -> None:
        end = self.now + seconds
        while due := [timer for timer in self.timers if not timer.cancelled and timer.when <= end]:
            timer = min(due, key=lambda timer: timer.when)
            self.timers.remove(timer)
            self.now = max(self.now, timer.when)
            self.fired += 1
            timer.callback()
        self.now = end


class Log:
    """An observer that writes everything down; times in milliseconds since the start."""

    def __init__(self, loop: FakeLoop) -> None:
        self.loop = loop
        self.tokens: list[tuple[TokenSequence, int, float]] = []
        self.ends: list[TokenSequence] = []

    def advanced(self, sequence: TokenSequence, tokens: int, now: float) -> None:
        assert now == self.loop.now
        self.tokens.append((sequence, tokens, round((now - 1000.0) * 1000, 3)))

    def finished(self, sequence: TokenSequence) -> None:
        self.ends.append(sequence)

    def of(self, generation: Generation, index: int = 0) -> list[tuple[int, float]]:
        """(tokens, when) of one sequence."""
        wanted = generation.sequences[index]
        return [(tokens, when) for sequence, tokens, when in self.tokens if sequence is wanted]


class World:
    """A loop, its driver and an engine."""

    def __init__(self, slots: int = 4, speed: float = 1.0, overhead_us: float = 0.0) -> None:
        self.loop = FakeLoop()
        self.log = Log(self.loop)
        self.driver = Driver(self.loop.time, self.loop.call_later)
        self.engine = self.another(slots, speed, overhead_us)

    def another(self, slots: int = 4, speed: float = 1.0, overhead_us: float = 0.0) -> RealtimeEngine:
        settings = EngineSettings(COST, max_num_seqs=slots, kv_tokens=100_000, prefix_unit_tokens=16)
        return RealtimeEngine(self.driver, settings, overhead_us=overhead_us, speed=speed, observer=self.log)


def plans(*lengths: int, prompt: int = 100) -> list[SequencePlan]:
    return [SequencePlan(prompt, length, length, "length") for length in lengths]


def test_tokens_come_when_their_steps_end() -> None:
    world = World()
    generation = world.engine.submit(plans(4))
    world.loop.run_for(1.0)
    assert world.log.of(generation) == [(1, 30), (1, 50), (1, 70), (1, 90)]
    assert world.log.ends == generation.sequences
    assert world.engine.figures() == EngineFigures(0, 0, 0.0)
    assert world.loop.fired == 4


def test_a_late_loop_merges_tokens_and_does_not_drift() -> None:
    world = World()
    generation = world.engine.submit(plans(6))
    world.loop.now += 0.081
    world.loop.run_for(1.0)
    assert world.log.of(generation) == [(3, 81), (1, 90), (1, 110), (1, 130)]


def test_what_is_due_within_a_millisecond_comes_together() -> None:
    world = World(speed=100.0)
    generation = world.engine.submit(plans(50))
    world.loop.run_for(1.0)
    times = [when for _, when in world.log.of(generation)]
    assert sum(tokens for tokens, _ in world.log.of(generation)) == 50
    assert len(times) <= 11  # 50 steps of 0.2 ms
    assert times[-1] == pytest.approx(0.3 + 49 * 0.2, abs=1.0)


def test_choices_of_one_request_are_sequences_of_their_own() -> None:
    world = World(slots=2)
    world.engine.submit(plans(3, 3, 3))
    assert world.engine.figures()[:2] == (1, 2)  # the first was admitted before the others were there
    world.loop.run_for(0.031)
    assert world.engine.figures()[:2] == (2, 1)
    world.loop.run_for(1.0)
    assert [sequence.index for sequence in world.log.ends] == [0, 1, 2]


def test_the_overhead_comes_before_the_queue() -> None:
    world = World(overhead_us=700.0)
    generation = world.engine.submit(plans(2))
    assert world.engine.figures()[:2] == (0, 0)
    world.loop.run_for(1.0)
    # 0.7 and 30 ms, and what the timer rounds up.
    assert world.log.of(generation) == [(1, 31), (1, 51)]


def test_a_late_loop_does_not_make_the_overhead_longer() -> None:
    world = World(overhead_us=5000.0)
    generation = world.engine.submit(plans(3))
    world.loop.now += 0.045
    world.loop.run_for(1.0)
    assert world.log.of(generation) == [(1, 45), (1, 55), (1, 75)]


def test_a_late_loop_queues_requests_when_their_overhead_was_over() -> None:
    world = World(overhead_us=5000.0)
    world.engine.submit(plans(3))
    world.loop.run_for(0.04)
    second = world.engine.submit(plans(2))
    world.loop.now += 0.06
    world.loop.run_for(1.0)
    # In the queue at 45 ms, admitted with the step that begins at 55 and takes 30.
    assert world.log.of(second) == [(1, 100), (1, 105)]


def test_who_leaves_during_the_overhead_is_never_queued() -> None:
    world = World(overhead_us=5000.0)
    world.engine.cancel(world.engine.submit(plans(2)))
    world.loop.run_for(1.0)
    assert world.log.tokens == []
    assert world.engine.wake_at == float("inf")


@pytest.mark.parametrize("overhead_us", [0.0, 5000.0])
def test_what_can_never_fit_is_refused_at_once_and_as_a_whole(overhead_us: float) -> None:
    world = World(overhead_us=overhead_us)
    with pytest.raises(ValueError, match="a sequence of 100001 tokens does not fit"):
        world.engine.submit(plans(1, 99_902))
    fits = world.engine.submit(plans(1))
    world.loop.run_for(1.0)
    assert world.log.ends == fits.sequences


def test_what_just_fits_is_served() -> None:
    world = World(overhead_us=5000.0)
    world.engine.submit(plans(1, prompt=100_000))
    world.loop.run_for(100.0)
    assert len(world.log.ends) == 1


def test_cancelling_frees_the_slot_with_the_end_of_the_step() -> None:
    world = World(slots=1)
    first, second = world.engine.submit(plans(100)), world.engine.submit(plans(1))
    world.loop.run_for(0.055)
    world.engine.cancel(first)
    assert world.engine.figures()[:2] == (1, 1)
    world.loop.run_for(1.0)
    assert world.log.of(first) == [(1, 30), (1, 50)]
    assert world.log.of(second) == [(1, 100)]  # 70 is the end of the step, 30 ms take its prompt
    assert world.log.ends == second.sequences
    world.engine.cancel(second)
    assert world.engine.figures()[:2] == (0, 0)


def test_engines_share_one_timer() -> None:
    world = World()
    engines = [world.engine, *(world.another() for _ in range(9))]
    generations = [engine.submit(plans(5)) for engine in engines]
    assert len([timer for timer in world.loop.timers if not timer.cancelled]) == 1
    world.loop.run_for(1.0)
    assert world.loop.fired == 5
    assert all(world.log.of(generation)[-1] == (1, 110) for generation in generations)


def test_slow_engines_take_longer_from_then_on() -> None:
    world = World()
    generation = world.engine.submit(plans(5))
    world.loop.run_for(0.030)
    world.engine.slow_down(3.0)
    world.loop.run_for(0.090)
    world.engine.slow_down(1.0)
    world.loop.run_for(1.0)
    assert world.log.of(generation) == [(1, 30), (1, 90), (1, 130), (1, 150), (1, 170)]


def test_a_restarted_engine_has_forgotten_everything() -> None:
    world = World()
    hashed = [SequencePlan(100, 5, 5, "length", tuple(range(6)))]
    before = world.engine.submit(hashed)
    world.loop.run_for(0.06)
    world.engine.restart(world.log)
    world.engine.cancel(before)
    again = world.engine.submit(hashed)
    world.loop.run_for(1.0)
    assert world.log.ends == again.sequences
    assert again.cached_tokens == 0


def test_times_in_the_queue_are_told() -> None:
    world = World(slots=1)
    _, second = world.engine.submit(plans(3)), world.engine.submit(plans(1))
    world.loop.run_for(1.0)
    [sequence] = second.sequences
    assert sequence.queued_s == pytest.approx(0.07)
    assert sequence.first_token_at - sequence.submitted_at == pytest.approx(0.1)


async def collect(generation: Generation) -> list[list[tuple[int, int]]]:
    return [step async for step in generation]


async def test_a_late_reader_finds_tokens_merged() -> None:
    world = World()
    generation = world.engine.submit(plans(3, 2))
    world.loop.run_for(0.06)
    first = await anext(generation)
    world.loop.run_for(1.0)
    assert first == [(0, 2), (1, 1)]
    assert await collect(generation) == [[(0, 1), (1, 1)]]


@given(
    requests=st.lists(
        st.tuples(
            st.integers(0, 400), st.integers(1, 300), st.integers(1, 30), st.none() | st.integers(0, 400)
        ),
        min_size=1,
        max_size=12,
    ),
    slots=st.integers(1, 4),
    speed=st.sampled_from([1.0, 3.0, 40.0]),
    late_ms=st.lists(st.integers(0, 90), max_size=5),
)
def test_it_tells_what_the_engine_tells(
    requests: list[tuple[int, int, int, int | None]], slots: int, speed: float, late_ms: list[int]
) -> None:
    """Each delivery, however late, is what the engine behind a perfect clock has by then."""
    world = World(slots=slots, speed=speed)
    twin = Engine(EngineSettings(COST, max_num_seqs=slots, kv_tokens=100_000, prefix_unit_tokens=16))
    pairs: dict[int, tuple[Generation, Sequence]] = {}
    actions = [(at, number, False) for number, (at, *_) in enumerate(requests)]
    actions += [
        (at + stay, number, True) for number, (at, _, _, stay) in enumerate(requests) if stay is not None
    ]
    delays = iter(late_ms)
    for at, number, leaves in sorted(actions):
        if (delay := next(delays, 0)) and world.loop.now < 1000 + at / 1000:
            world.loop.now += delay / 1000  # the loop is busy with something else
        world.loop.run_for(max(1000 + at / 1000 - world.loop.now, 0.0))
        emulated = round((world.loop.now - 1000) * speed * 1e6)
        twin.advance(emulated)
        _, prompt, output, _ = requests[number]
        if leaves:
            generation, sequence = pairs[number]
            world.engine.cancel(generation)
            twin.cancel(sequence, emulated)
        else:
            pairs[number] = (world.engine.submit(plans(output, prompt=prompt)), Sequence(prompt, output))
            twin.submit(pairs[number][1], emulated)
        figures = world.engine.figures()
        assert figures[:2] == (twin.running, twin.waiting)
        assert figures.kv_use == pytest.approx(twin.kv_use(emulated))
        for generation, sequence in pairs.values():
            if not sequence.cancelled:
                assert generation.sequences[0].done == twin.tokens(sequence, emulated)
    world.loop.run_for(100.0)
    twin.advance(10**12)
    for generation, sequence in pairs.values():
        assert generation.sequences[0].complete or sequence.cancelled
        if not sequence.cancelled:
            assert generation.sequences[0].inner.finished == sequence.finished
            told_ms, due_ms = world.log.of(generation)[-1][1], sequence.finished / speed / 1000
            assert told_ms >= due_ms - 0.001
    assert world.engine.wake_at == float("inf")
