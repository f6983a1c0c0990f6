"""What stands between the HTTP face of the emulator and the engine that sets its pace.

The face knows the text: it plans every sequence of a request (an answer, or one of `n` answers) down to its
last token before it submits it. The engine knows time: when each of its tokens is there. So an engine is told
counts and gives back counts, and any engine fits behind `Engine`.

An engine calls `TokenSequence.advance`; the face iterates over the `Generation`. A face that falls behind (a
slow client) finds the tokens it missed merged into one step, as vLLM does it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from sim.engine import Sequence


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """One sequence, as the face wants it served. All counts in tokens."""

    prompt_tokens: int
    output_tokens: int
    """How many it will have, at least 1; the end-of-sequence token counts."""
    max_tokens: int
    """The request's limit, for the record."""
    finished_reason: str
    """`stop` or `length`, for the record."""
    hashes: tuple[int, ...] = ()
    """Of prompt and answer, for the prefix cache (`sim.prefix_hashes`)."""


class EngineFigures(NamedTuple):
    """What an engine says of itself."""

    running: int
    """Sequences in the batch."""
    waiting: int
    """Sequences in the queue."""
    kv_use: float
    """Share of the KV cache in use, 0 to 1."""
    preemptions: int = 0
    """So far."""


class Observer(Protocol):
    """Hears of every sequence; the metrics page is one. Times are those of the clock on the wall, seconds."""

    def advanced(self, sequence: TokenSequence, tokens: int, now: float) -> None:
        """`tokens` more are there; called before the sequence's own times and counts move on."""

    def finished(self, sequence: TokenSequence) -> None:
        """All of its tokens are there."""


class Engine(Protocol):
    """Sets the pace of tokens. Everything it does, it does in the event loop's thread."""

    def submit(self, plans: Iterable[SequencePlan]) -> Generation:
        """Queue the sequences of one request, in order. Raises ValueError if one can never fit."""

    def cancel(self, generation: Generation) -> None:
        """Drop what has not finished; what it held is free with the end of the step that is running."""

    def figures(self) -> EngineFigures: ...


class TokenSequence:
    """A sequence of the engine's with what the face and the metrics need: its plan, and times on the wall.

    It has one and is none: the engine may be compiled, and then nothing inherits from its classes.
    """

    __slots__ = (
        "done",
        "first_token_at",
        "generation",
        "index",
        "inner",
        "last_token_at",
        "plan",
        "submitted_at",
    )

    def __init__(self, generation: Generation, index: int, plan: SequencePlan, now: float) -> None:
        self.inner = Sequence(plan.prompt_tokens, plan.output_tokens, plan.hashes, self)
        """The engine's."""
        self.generation = generation
        self.index = index
        self.plan = plan
        self.submitted_at = now
        self.first_token_at = now
        self.last_token_at = now
        self.done = 0
        """Tokens delivered."""

    @property
    def complete(self) -> bool:
        """Whether all its tokens are delivered."""
        return self.done == self.plan.output_tokens

    @property
    def cached_tokens(self) -> int:
        """Of its prompt, found in the prefix cache."""
        return self.inner.cached_tokens

    @property
    def queued_s(self) -> float:
        """From its submission to its admission, as a share of the time to the first token; seconds."""
        inner = self.inner
        whole = inner.first_token - inner.arrived
        share = (inner.admitted - inner.arrived) / whole if whole > 0 else 0.0
        return share * (self.first_token_at - self.submitted_at)

    def advance(self, tokens: int, now: float) -> None:
        """`tokens` more are there."""
        observer = self.generation.observer
        if observer is not None:
            observer.advanced(self, tokens, now)
        if self.done == 0:
            self.first_token_at = now
        self.last_token_at = now
        self.done += tokens
        self.generation.deliver(self.index, tokens)
        if observer is not None and self.complete:
            observer.finished(self)


class Generation:
    """The tokens of one request as they come: an async iterator over `[(sequence index, new tokens), ...]`."""

    def __init__(self, plans: Iterable[SequencePlan], now: float, observer: Observer | None = None) -> None:
        self.observer = observer
        self.sequences = [TokenSequence(self, index, plan, now) for index, plan in enumerate(plans)]
        self._ready: dict[int, int] = {}
        self._undelivered = sum(sequence.plan.output_tokens for sequence in self.sequences)
        self._waiter: asyncio.Future[None] | None = None

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens of its last sequence that the prefix cache had: vLLM reports those."""
        return self.sequences[-1].cached_tokens

    def deliver(self, index: int, tokens: int) -> None:
        """Hand tokens of one sequence to whoever iterates."""
        self._ready[index] = self._ready.get(index, 0) + tokens
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> list[tuple[int, int]]:
        if self._undelivered == 0:
            raise StopAsyncIteration
        if not self._ready:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        step = list(self._ready.items())
        self._ready.clear()
        self._undelivered -= sum(tokens for _, tokens in step)
        return step
