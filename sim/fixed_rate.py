"""An engine of fixed rates: so many sequences at once, the rest in a queue, each token after a set time.

A sequence that leaves the queue has its first token after `ttft_s`, and each further one `tpot_s` later,
stretched by `1 + slowdown * (running - 1)` while others run. It knows nothing of prompt lengths, batches or
memory pressure: a stand-in that makes queues, waiting and spilling visible, not a forecast of any card.

One heap holds the next token of every running sequence and one timer its head, so a token costs a heap step and
not a timer or a task of its own. Due times are counted from due times, not from when the loop came round to
them: a late loop merges tokens but loses none, and rates stay exact.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from heapq import heappop, heappush, heapreplace
from itertools import count
from math import ceil, inf
from typing import Protocol

from sim.generation import EngineFigures, Generation, Observer, SequencePlan, TokenSequence

BLOCK_TOKENS = 16
"""KV cache block, as on a GPU."""

TIMER_RESOLUTION_S = 0.001
"""uvloop's timers and clock count milliseconds: what is due within one is taken as due, else the loop spins."""


class Timer(Protocol):
    """What `call_at` gives back."""

    def cancel(self) -> object: ...


class Timers(Protocol):
    """The part of an event loop that an engine needs."""

    def time(self) -> float: ...

    def call_at(self, when: float, callback: Callable[[], object], /) -> Timer: ...


class FixedRateEngine:
    """Implements `sim.generation.Engine`."""

    def __init__(
        self,
        timers: Timers,
        *,
        slots: int,
        ttft_s: float,
        tpot_s: float,
        slowdown: float,
        kv_tokens: int,
        observer: Observer | None = None,
    ) -> None:
        self._timers = timers
        self._slots = slots
        self._ttft_s = ttft_s
        self._tpot_s = tpot_s
        self._slowdown = slowdown
        self._blocks = kv_tokens // BLOCK_TOKENS
        self._observer = observer
        self._waiting: deque[TokenSequence] = deque()
        self._running: set[TokenSequence] = set()
        self._due: list[tuple[float, int, TokenSequence]] = []
        """Heap of (due, tie-break in order of scheduling, sequence); cancelled sequences stay until due."""
        self._order = count()
        self._timer: Timer | None = None
        self._timer_at = inf

    def submit(self, plans: Iterable[SequencePlan]) -> Generation:
        """Queue the sequences of one request, in order."""
        now = self._timers.time()
        generation = Generation(plans, now, self._observer)
        self._waiting.extend(generation.sequences)
        self._admit(now)
        self._arm()
        return generation

    def cancel(self, generation: Generation) -> None:
        """Drop what has not finished, at once; the next in the queue starts."""
        for sequence in generation.sequences:
            if sequence in self._running:
                self._running.discard(sequence)
            elif not sequence.finished and sequence in self._waiting:
                self._waiting.remove(sequence)
        self._admit(self._timers.time())
        self._arm()

    def figures(self) -> EngineFigures:
        """Sequences running and waiting, and KV use."""
        blocks = sum(
            ceil((sequence.plan.prompt_tokens + sequence.done) / BLOCK_TOKENS) for sequence in self._running
        )
        return EngineFigures(len(self._running), len(self._waiting), min(blocks / self._blocks, 1.0))

    def _admit(self, now: float) -> None:
        while self._waiting and len(self._running) < self._slots:
            sequence = self._waiting.popleft()
            # A slot may have come free at a due time just before this request arrived.
            start = max(now, sequence.submitted_at)
            self._running.add(sequence)
            sequence.start(start)
            heappush(self._due, (start + self._ttft_s, next(self._order), sequence))

    def _tick(self) -> None:
        self._timer, self._timer_at = None, inf
        until = self._timers.time() + TIMER_RESOLUTION_S
        while self._due and self._due[0][0] <= until:
            due, _, sequence = self._due[0]
            if sequence not in self._running:
                heappop(self._due)
                continue
            sequence.advance(1, due)
            if sequence.finished:
                heappop(self._due)
                self._running.discard(sequence)
                self._admit(due)
            else:
                pace = self._tpot_s * (1.0 + self._slowdown * (len(self._running) - 1))
                heapreplace(self._due, (due + pace, next(self._order), sequence))
        self._arm()

    def _arm(self) -> None:
        if not self._due or self._due[0][0] >= self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = self._due[0][0]
        self._timer = self._timers.call_at(self._timer_at, self._tick)
