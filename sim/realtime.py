"""Engines in real time: `sim.engine.Engine` behind a clock, any number of them in one event loop.

The engine computes when its steps end; here is waited until they have. A wake-up that comes late finds several
steps ended and delivers their tokens together, and the next one is due when it would have been anyway: times come
from the engine, so nothing drifts and no token is lost, however late the loop is.

One timer serves all engines. Event loops' timers count milliseconds (uvloop, as libuv), so what falls due within
one is delivered at its end, together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from itertools import count
from math import ceil, inf
from typing import Protocol

from sim.engine import FIRST_TOKEN, Engine, EngineSettings
from sim.generation import EngineFigures, Generation, Observer, SequencePlan, TokenSequence

_ROUNDING_S = 1e-9
"""What a time may lose on its way through floating point; far below the engine's microsecond."""


class Timer(Protocol):
    """What `call_later` gives back."""

    def cancel(self) -> object: ...


class CallLater(Protocol):
    """`loop.call_later`."""

    def __call__(self, delay: float, callback: Callable[[], object], /) -> Timer: ...


class Driver:
    """Wakes engines when they are due: never early, and at most a millisecond late while the loop is free."""

    def __init__(self, clock: Callable[[], float], call_later: CallLater) -> None:
        """`clock`: seconds, such as `time.monotonic`; it must be finer than the loop's own."""
        self.clock = clock
        self._call_later = call_later
        self._due: list[tuple[float, int, RealtimeEngine]] = []
        """Heap of (when, tie-break, engine); one whose engine is now due at another time is ignored."""
        self._order = count()
        self._timer: Timer | None = None
        self._timer_at = inf

    def wake(self, engine: RealtimeEngine, at: float) -> None:
        """Call `engine.tick` at `at`, if that is still its `wake_at`."""
        heappush(self._due, (at, next(self._order), engine))
        if at < self._timer_at:
            self._arm()

    def _tick(self) -> None:
        self._timer, self._timer_at = None, inf
        now = self.clock() + _ROUNDING_S
        due = self._due
        ripe = []
        while due and due[0][0] <= now:
            at, _, engine = heappop(due)
            if engine.wake_at == at:
                engine.wake_at = inf
                ripe.append(engine)
        for engine in ripe:
            engine.tick()
        if due and due[0][0] < self._timer_at:
            self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = self._due[0][0]
        milliseconds = max(ceil((self._timer_at - self.clock() - _ROUNDING_S) * 1000), 1)
        self._timer = self._call_later(milliseconds / 1000, self._tick)


class RealtimeEngine:
    """Implements `sim.generation.Engine`."""

    def __init__(
        self,
        driver: Driver,
        settings: EngineSettings,
        *,
        overhead_us: float = 0.0,
        speed: float = 1.0,
        observer: Observer | None = None,
    ) -> None:
        """`overhead_us`: between a request and its place in the queue. `speed`: emulated seconds in a second."""
        self._driver = driver
        self._engine = Engine(settings)
        self._overhead = round(overhead_us)
        self._speed = speed
        self._observer = observer
        self._arriving: deque[tuple[int, Generation]] = deque()
        """(when it takes its place in the queue, microseconds of emulated time; what)."""
        self._answering: dict[TokenSequence, None] = {}
        """Those that have a first token and not all of them delivered."""
        self._origin = driver.clock()
        self._emulated_origin = 0.0
        self._rate = speed * 1e6
        """Microseconds of emulated time in a second, since `_origin`."""
        self._step_at = 0.0
        """When the present step ends, emulated time: nothing is to be delivered before."""
        self.wake_at = inf
        """When it wants to be called, by the driver's clock."""

    def submit(self, plans: Iterable[SequencePlan]) -> Generation:
        """Queue the sequences of one request, in order. Raises ValueError if one can never fit."""
        now = self._driver.clock()
        generation = Generation(plans, now, self._observer)
        for sequence in generation.sequences:
            self._check_size(sequence.plan)
        self._arriving.append((self._emulated(now) + self._overhead, generation))
        self.tick()
        return generation

    def cancel(self, generation: Generation) -> None:
        """Drop what has not finished; what it held is free with the end of the step that is running."""
        if all(sequence.complete for sequence in generation.sequences):
            return
        now = self.tick()
        self._arriving = deque(entry for entry in self._arriving if entry[1] is not generation)
        for sequence in generation.sequences:
            self._answering.pop(sequence, None)
            self._engine.cancel(sequence.inner, now)
        self._plan_wake(now)

    def figures(self) -> EngineFigures:
        """Sequences running and waiting, use of the KV cache, preemptions."""
        now = self.tick()
        engine = self._engine
        return EngineFigures(engine.running, engine.waiting, engine.kv_use(now), engine.preemptions)

    def slow_down(self, factor: float) -> None:
        """From now on everything takes `factor` times as long as the engine says; 1: as it says."""
        self.tick()
        now = self._driver.clock()
        self._emulated_origin += (now - self._origin) * self._rate
        self._origin = now
        self._rate = self._speed * 1e6 / factor
        self._plan_wake(self._emulated(now))

    def restart(self, observer: Observer | None) -> None:
        """Forget everything, as a process that is started anew; `observer` hears of what comes from now on."""
        self._engine = Engine(self._engine.settings)
        self._observer = observer
        self._arriving.clear()
        self._answering.clear()
        self._plan_wake(self.tick())

    def tick(self) -> int:
        """Let time pass until now, and deliver what there is. -> now, microseconds of emulated time."""
        wall = self._driver.clock()
        now = self._emulated(wall)
        if self._arriving and self._arriving[0][0] <= now:
            self._take_in(now)
        if now >= self._step_at:
            self._advance(now)
            self._deliver(now, wall)
        self._plan_wake(now)
        return now

    def _check_size(self, plan: SequencePlan) -> None:
        """Raise ValueError now: with an overhead, the engine would only when nobody can be told any more."""
        settings = self._engine.settings
        # The last token's keys and values are never needed.
        most = plan.prompt_tokens + plan.output_tokens - 1
        if settings.kv_blocks is not None and most > settings.kv_blocks * settings.block_tokens:
            raise ValueError(
                f"a sequence of {most} tokens does not fit into a KV cache of {settings.kv_tokens}"
            )

    def _emulated(self, wall: float) -> int:
        return round(self._emulated_origin + (wall - self._origin) * self._rate)

    def _take_in(self, now: int) -> None:
        while self._arriving and self._arriving[0][0] <= now:
            at, generation = self._arriving.popleft()
            self._advance(at)
            for sequence in generation.sequences:
                self._engine.submit(sequence.inner, at)
            self._step_at = min(self._step_at, self._engine.next_step_at(at))

    def _advance(self, until: int) -> None:
        for event in self._engine.advance(until):
            if event.kind == FIRST_TOKEN:
                sequence = event.sequence.tag
                assert isinstance(sequence, TokenSequence)
                self._answering[sequence] = None

    def _deliver(self, now: int, wall: float) -> None:
        engine = self._engine
        complete = []
        for sequence in self._answering:
            new = engine.tokens(sequence.inner, now) - sequence.done
            if new:
                sequence.advance(new, wall)
                if sequence.complete:
                    complete.append(sequence)
        for sequence in complete:
            del self._answering[sequence]

    def _plan_wake(self, now: int) -> None:
        self._step_at = due = self._engine.next_step_at(now)
        if self._arriving and self._arriving[0][0] < due:
            due = self._arriving[0][0]
        if due == inf:
            self.wake_at = inf
            return
        at = self._origin + (ceil(due) - self._emulated_origin) / self._rate
        if at != self.wake_at:
            self.wake_at = at
            self._driver.wake(self, at)
