"""One vLLM with continuous batching: when its tokens come, in virtual time.

A step of the engine computes one token for every decoding sequence and, with what is left of its token
budget, pieces of prompts. It takes

    alpha + beta * decodes + gamma * (tokens in the decodes' contexts) + delta * (prompt tokens computed)

(`StepCost`; fits measured vLLM timings to a few per cent). Waiting sequences are admitted first come, first
served while budget, sequences and KV blocks last; there must be blocks for a whole prompt (vLLM's
`scheduler_reserve_full_isl`). When the KV cache is full, the sequence admitted last loses its blocks and
computes all again ("preemption by recompute"); a step that preempted admits nobody. Finished prompts stay in
the prefix cache until their blocks are needed. That is the scheduler of vLLM V1; `sim/reference.py` says it
step by step and is what this engine is tested against.

Between two events all decoding sequences gain one token a step, so they are not advanced one by one: the
engine counts steps, each sequence knows the step in which it ends, and k steps of n decodes take `k*c +
gamma*n*k*(k-1)/2`, where c is what the first one takes. A run of steps ends where something happens: a
sequence ends, the KV cache is full, or a new sequence can be admitted. So the cost of a simulated request
does not grow with its tokens.

Times are microseconds since the beginning of the simulation. Arrivals and events are whole ones; between
them an engine keeps the fraction, so that nothing drifts.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from heapq import heappop, heappush
from math import ceil, inf, isfinite, sqrt
from typing import Final

from sim.kv_cache import PrefixCache

FIRST_TOKEN: Final = 0
FINISHED: Final = 1
"""Kinds of events."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """What a step takes, microseconds. Raises ValueError for what is negative, or takes no time at all."""

    alpha: float
    """A step, whatever is in it: reading the weights, launching kernels."""
    beta: float
    """Each decoding sequence."""
    gamma: float
    """Each token in the context of a decoding sequence: reading its keys and values."""
    delta: float
    """Each prompt token computed."""

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma", "delta"):
            value = getattr(self, name)
            if not (isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be zero or more microseconds, not {value}")
        if self.alpha <= 0:
            raise ValueError("alpha must be above zero: no step is free")

    def of(self, decodes: int, context: int, prefill: int) -> float:
        """One step, microseconds."""
        return self.alpha + self.beta * decodes + self.gamma * context + self.delta * prefill

    def run(self, steps: int, decodes: int, context: int) -> float:
        """So many steps of decodes alone, microseconds; `context` at the first of them."""
        return steps * (self.alpha + self.beta * decodes + self.gamma * context) + (
            self.gamma * decodes * steps * (steps - 1) / 2
        )


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How an engine is set up, in vLLM's words. Raises ValueError."""

    cost: StepCost
    max_num_batched_tokens: int = 2048
    """Tokens that one step computes at most."""
    max_num_seqs: int = 256
    """Sequences in the batch at most."""
    kv_tokens: int | None = None
    """Size of the KV cache, tokens; None: never full."""
    block_tokens: int = 16
    """Tokens in one block of it."""
    prefix_unit_tokens: int = 0
    """Tokens that one hash of a sequence stands for, a multiple of `block_tokens`; 0: no prefix cache."""

    def __post_init__(self) -> None:
        for name in ("max_num_batched_tokens", "max_num_seqs", "block_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError("max_num_batched_tokens must be at least max_num_seqs: every decode takes one")
        if self.kv_tokens is not None and self.kv_tokens < self.block_tokens:
            raise ValueError("kv_tokens must hold one block at least")
        if self.prefix_unit_tokens and (
            self.prefix_unit_tokens < 0 or self.prefix_unit_tokens % self.block_tokens
        ):
            raise ValueError("prefix_unit_tokens must be a multiple of block_tokens")

    @property
    def kv_blocks(self) -> int | None:
        """Whole blocks of the KV cache."""
        return None if self.kv_tokens is None else self.kv_tokens // self.block_tokens


class Sequence:
    """One request inside an engine. What the caller sets stands first; the engine writes the rest."""

    __slots__ = (
        "_base",
        "admitted",
        "arrived",
        "cached_tokens",
        "cancelled",
        "computed",
        "finish_step",
        "finished",
        "first_token",
        "generated",
        "hashes",
        "output_tokens",
        "preemptions",
        "prompt_tokens",
        "shared",
        "tag",
    )

    def __init__(
        self, prompt_tokens: int, output_tokens: int, hashes: tuple[int, ...] = (), tag: object = None
    ) -> None:
        """`hashes`: one for each full unit of the prompt, and of the answer as far as others may continue
        it."""
        if prompt_tokens < 1 or output_tokens < 1:
            raise ValueError("a sequence has at least one token of prompt and one of output")
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.hashes = hashes
        self.tag = tag
        self.arrived = 0
        self.admitted = -1.0
        """Start of the step that first computed something of it; below zero: not yet. Microseconds, as all
        times."""
        self.first_token = -1
        self.finished = -1
        self.generated = 0
        self.computed = 0
        """Tokens in the KV cache, while it is not decoding."""
        self.cached_tokens = 0
        """Of its prompt, found in the prefix cache when it was first admitted."""
        self.preemptions = 0
        self.cancelled = False
        self.shared = 0
        """Units of its hashes that the prefix cache keeps for it."""
        self.finish_step = -1
        """The step that gives its last token, while it is decoding."""
        self._base = 0
        """While it is decoding: tokens in the KV cache, less the number of the step."""

    @property
    def decoding(self) -> bool:
        """Whether it gains a token with every step."""
        return self.finish_step >= 0


class Event:
    """Something that happened to a sequence, at the end of a step."""

    __slots__ = ("at", "kind", "sequence")

    def __init__(self, at: int, kind: int, sequence: Sequence) -> None:
        self.at = at
        """Microseconds."""
        self.kind = kind
        """`FIRST_TOKEN` or `FINISHED`."""
        self.sequence = sequence


class Engine:
    """Takes sequences and tells when their first tokens and their ends come.

    Its driver calls `advance(now)` before everything else it does at `now`, and at `next_at` at the latest.
    """

    __slots__ = (
        "_alpha",
        "_begun",
        "_beta",
        "_block",
        "_blocks",
        "_budget",
        "_cache",
        "_cancelled",
        "_context",
        "_crossing",
        "_decodes",
        "_delta",
        "_finishes",
        "_free",
        "_gamma",
        "_joining",
        "_max_seqs",
        "_order",
        "_partial",
        "_prefill",
        "_running",
        "_step",
        "_steps",
        "_taken",
        "_waiting",
        "next_at",
        "preemptions",
        "prefill_tokens",
        "settings",
        "stalled",
    )

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        cost = settings.cost
        self._alpha = cost.alpha
        self._beta = cost.beta
        self._gamma = cost.gamma
        self._delta = cost.delta
        self._budget = settings.max_num_batched_tokens
        self._max_seqs = settings.max_num_seqs
        self._block = settings.block_tokens
        blocks = settings.kv_blocks
        self._blocks = -1 if blocks is None else blocks
        """All there are; below zero: no limit."""
        self._free = self._blocks
        """That hold nothing."""
        self._cache = (
            PrefixCache(settings.prefix_unit_tokens, settings.prefix_unit_tokens // settings.block_tokens)
            if settings.prefix_unit_tokens
            else None
        )
        self._waiting: deque[Sequence] = deque()
        self._running: dict[Sequence, None] = {}
        """In the order of their admission."""
        self._partial: Sequence | None = None
        """The one whose prompt is not computed yet. There is one at most, and it was admitted last: whoever
        comes before it takes what is left of the budget until its prompt is complete."""
        self._joining: list[Sequence] = []
        """Whose prompts the present step completes."""
        self._decodes = 0
        self._context = 0
        """Tokens in the KV cache of those that decode, at the beginning of the present run."""
        self._crossing = [0] * (2 * self._block)
        """How many decodes need a new block in a step, by the number of the step modulo the block; twice
        over."""
        self._finishes: list[tuple[int, int, Sequence]] = []
        """Heap of (step, order, sequence) of those that decode; preempted and cancelled ones stay until
        they come up."""
        self._cancelled: list[Sequence] = []
        """In the batch still."""
        self._order = 0
        self._step = 0
        """Number of the next step, at the beginning of the present run."""
        self._steps = 0
        """In the present run; 0: idle."""
        self._taken = 0
        """New blocks that the first step of the present run has taken; the others are taken at its end."""
        self._prefill = 0
        """Prompt tokens that the present run computes."""
        self._begun = 0.0
        self.next_at = inf
        """When the present run ends, microseconds; inf: idle."""
        self.preemptions = 0
        self.stalled: dict[Sequence, float] = {}
        """Those that were preempted amid their answers and do not decode again yet, and since when."""
        self.prefill_tokens = 0
        """Computed so far."""

    # What an engine says of itself

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether it has nothing to do."""
        return self._steps == 0

    def kv_use(self, now: float) -> float:
        """Share of the KV cache that sequences hold, 0 to 1. What only the prefix cache keeps counts as
        free."""
        if self._blocks <= 0:
            return 0.0
        begun = min(self.steps_done(now) + 1, self._steps)
        return 1.0 - (self._available() + self._taken - self._blocks_for(begun)) / self._blocks

    def steps_done(self, now: float) -> int:
        """Steps of the present run that have ended by `now`."""
        if now >= self.next_at:
            return self._steps
        return self._steps_within(now - self._begun) if self._steps > 1 else 0

    def tokens(self, sequence: Sequence, now: float) -> int:
        """Tokens of its answer that are there by `now`."""
        if sequence.finish_step < 0:
            return sequence.generated
        return sequence.output_tokens - (sequence.finish_step + 1 - self._step - self.steps_done(now))

    def next_step_at(self, now: float) -> float:
        """When the step that is running at `now` ends, microseconds; inf: none is."""
        if self._steps <= 1:
            return self.next_at
        return self._begun + self._run_time(min(self.steps_done(now) + 1, self._steps))

    # What comes in

    def submit(self, sequence: Sequence, now: int) -> None:
        """Queue a sequence. Raises ValueError if it can never fit into the KV cache."""
        if self._blocks >= 0:
            most = sequence.prompt_tokens + sequence.output_tokens - 1
            if -(-most // self._block) > self._blocks:
                raise ValueError(
                    f"a sequence of {most} tokens does not fit into {self._blocks} blocks of {self._block}"
                )
        sequence.arrived = now
        waiting = self._waiting
        waiting.append(sequence)
        if self._steps == 0:
            self._begin(float(now))
        elif self._steps > 1 and len(waiting) == 1 and len(self._running) < self._max_seqs:
            self._cut_run(now)

    def cancel(self, sequence: Sequence, now: int) -> None:
        """Forget a sequence: its client has left. Nothing more is told of it; what it holds is free with
        the end of the step that is running."""
        if sequence.finished >= 0 or sequence.cancelled:
            return
        sequence.cancelled = True
        self.stalled.pop(sequence, None)
        if sequence not in self._running:
            if sequence in self._waiting:
                self._waiting.remove(sequence)  # those behind it may fit where it did not
        else:
            self._cancelled.append(sequence)
        if self._steps > 1:
            self._cut_run(now)

    def advance(self, now: float) -> list[Event]:
        """Let time pass until `now`. -> what has happened, in order."""
        events: list[Event] = []
        while self.next_at <= now:
            end = self.next_at
            self._end_run(end, events)
            self._begin(end)
        return events

    # A run: one step with pieces of prompts in it, or any number without

    def _begin(self, now: float) -> None:
        """Schedule the next step, and the ones that will be like it."""
        if self._cancelled:
            self._drop_cancelled()
        self._begun = now
        self._taken = 0
        decodes = self._decodes
        preempted = False
        if decodes and self._blocks >= 0:
            at = self._step % self._block
            new_blocks = self._crossing[at]
            if new_blocks <= self._free:
                self._free -= new_blocks
            elif self._make_room(new_blocks):
                preempted = True
                decodes = self._decodes
                new_blocks = self._crossing[at]
            self._taken = new_blocks
        budget = self._budget - decodes
        prefill = 0
        partial = self._partial
        if partial is not None:
            tokens = self._compute(partial, budget)
            if tokens:
                prefill = tokens
                budget -= tokens
            elif budget > 0:
                preempted = True
                self._put_back(partial)
                self._partial = None
        if not preempted and self._waiting:
            prefill += self._admit(now, budget)
        self._prefill = prefill
        if prefill:
            self._steps = 1
        elif not decodes:
            self._steps = 0
            self.next_at = inf
            if self._waiting:  # everything was preempted by itself; with an empty batch there is room
                self._begin(now)
            return
        elif preempted:
            self._steps = 1  # the next one may admit
        else:
            finishes = self._finishes
            while finishes[0][2].finish_step != finishes[0][0]:
                heappop(finishes)
            steps = finishes[0][0] - self._step + 1
            if self._blocks >= 0:
                steps = self._steps_with(steps, self._available() + self._taken)
            self._steps = steps
        self.next_at = now + self._run_time(self._steps)

    def _end_run(self, end: float, events: list[Event]) -> None:
        """Let the present run have happened."""
        steps, decodes = self._steps, self._decodes
        if decodes:
            if steps > 1 and self._blocks >= 0:
                self._take(self._blocks_for(steps) - self._taken)
            self._context += decodes * steps
        self._step += steps
        last = self._step - 1
        self.prefill_tokens += self._prefill
        at = ceil(end)
        finishes = self._finishes
        while finishes and finishes[0][0] <= last:
            step, _, sequence = heappop(finishes)
            if sequence.finish_step == step:
                self._stop_decoding(sequence)
                self._finish(sequence, at, events)
        if self._joining:
            for sequence in self._joining:
                self._join(sequence, at, events)
            self._joining.clear()

    def _finish(self, sequence: Sequence, at: int, events: list[Event]) -> None:
        sequence.generated = sequence.output_tokens
        self._release(sequence)
        del self._running[sequence]
        if not sequence.cancelled:
            sequence.finished = at
            events.append(Event(at, FINISHED, sequence))

    def _join(self, sequence: Sequence, at: int, events: list[Event]) -> None:
        """Its prompt is complete: it has one more token, and decodes from now on."""
        sequence.generated += 1
        if self.stalled:
            self.stalled.pop(sequence, None)
        if sequence.first_token < 0 and not sequence.cancelled:
            sequence.first_token = at
            events.append(Event(at, FIRST_TOKEN, sequence))
        left = sequence.output_tokens - sequence.generated
        if not left:
            self._finish(sequence, at, events)
            return
        sequence.finish_step = finish = self._step + left - 1
        sequence._base = base = sequence.computed - self._step
        self._order += 1
        heappush(self._finishes, (finish, self._order, sequence))
        self._decodes += 1
        self._context += sequence.computed
        block = self._block
        crossing = -base % block
        self._crossing[crossing] += 1
        self._crossing[crossing + block] += 1

    def _stop_decoding(self, sequence: Sequence) -> None:
        """Take a sequence out of the decodes; its blocks stay its own."""
        sequence.computed = computed = sequence._base + self._step
        sequence.generated = sequence.output_tokens - (sequence.finish_step - self._step + 1)
        sequence.finish_step = -1
        self._decodes -= 1
        self._context -= computed
        block = self._block
        crossing = -sequence._base % block
        self._crossing[crossing] -= 1
        self._crossing[crossing + block] -= 1

    def _drop_cancelled(self) -> None:
        for sequence in self._cancelled:
            if sequence not in self._running:
                continue  # it has ended meanwhile
            if sequence.finish_step >= 0:
                self._stop_decoding(sequence)
            else:
                self._partial = None
            self._release(sequence)
            del self._running[sequence]
        self._cancelled.clear()

    # Admission and preemption

    def _admit(self, now: float, budget: int) -> int:
        """Admit who waits, first come, first served. -> prompt tokens that the step computes for them."""
        waiting, running, cache = self._waiting, self._running, self._cache
        prefill = 0
        while waiting and budget > 0 and len(running) < self._max_seqs:
            sequence = waiting[0]
            if cache is not None:
                # The last token is computed always: it gives the next one.
                most = (sequence.prompt_tokens + sequence.generated - 1) // cache.unit_tokens
                found = cache.use(sequence.hashes, most)
                sequence.computed = found * cache.unit_tokens
                sequence.shared = found
            tokens = self._compute(sequence, budget) if self._fits(sequence) else 0
            if not tokens:
                if cache is not None:
                    cache.leave(sequence.hashes, sequence.shared)
                    sequence.computed = sequence.shared = 0
                break
            if sequence.admitted < 0:
                sequence.admitted = now
                sequence.cached_tokens = sequence.computed - tokens
                if cache is not None:
                    cache.queried_tokens += sequence.prompt_tokens
                    cache.hit_tokens += sequence.cached_tokens
            waiting.popleft()
            running[sequence] = None
            prefill += tokens
            budget -= tokens
        return prefill

    def _fits(self, sequence: Sequence) -> bool:
        """Whether there are blocks for all of it that is known, and not for its first piece alone."""
        if self._blocks < 0:
            return True
        block = self._block
        known = sequence.prompt_tokens + sequence.generated
        return -(-known // block) - -(-sequence.computed // block) <= self._available()

    def _compute(self, sequence: Sequence, budget: int) -> int:
        """Let the present step compute a piece of a prompt. -> its tokens; 0: no budget, or no blocks."""
        target = sequence.prompt_tokens + sequence.generated
        computed = sequence.computed
        tokens = target - computed
        if tokens > budget:
            tokens = budget
        if tokens <= 0:
            return 0
        if self._blocks >= 0:
            block = self._block
            blocks = -(-(computed + tokens) // block) - -(-computed // block)
            if blocks > self._available():
                return 0
            self._take(blocks)
        sequence.computed = computed = computed + tokens
        if self._cache is not None:
            self._share(sequence)
        if computed == target:
            self._joining.append(sequence)
            self._partial = None
        else:
            self._partial = sequence
        return tokens

    def _make_room(self, new_blocks: int) -> bool:
        """Let the decodes take new blocks: those of the prefix cache, then those of whoever was admitted last.
        True: somebody was preempted."""
        available = self._available()
        if new_blocks <= available:
            self._take(new_blocks)
            return False
        # Those admitted first have taken what there was before one finds nothing.
        self._take(available)
        left = new_blocks - available
        step, block = self._step, self._block
        while left > self._available():
            victim = next(reversed(self._running))
            if victim is self._partial:
                self._partial = None
            else:
                if (victim._base + step) % block == 0:
                    left -= 1
                self._stop_decoding(victim)
            self._put_back(victim)
        self._take(left)
        return True

    def _put_back(self, sequence: Sequence) -> None:
        """To the head of the queue, with nothing computed."""
        self._release(sequence)
        del self._running[sequence]
        self._waiting.appendleft(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        if sequence.generated:
            self.stalled.setdefault(sequence, self._begun)

    # KV blocks

    def _available(self) -> int:
        cache = self._cache
        return self._free if cache is None else self._free + cache.evictable * cache.unit_blocks

    def _take(self, blocks: int) -> None:
        free = self._free - blocks
        if free < 0:
            cache = self._cache
            assert cache is not None
            while free < 0:
                cache.evict()
                free += cache.unit_blocks
        self._free = free

    def _share(self, sequence: Sequence) -> None:
        """Enter what has been computed of it into the prefix cache."""
        cache = self._cache
        assert cache is not None
        hashes = sequence.hashes
        units = min(sequence.computed // cache.unit_tokens, len(hashes))
        for index in range(sequence.shared, units):
            if not cache.add(hashes[index]) and self._blocks >= 0:
                self._free += cache.unit_blocks
        if units > sequence.shared:
            sequence.shared = units

    def _release(self, sequence: Sequence) -> None:
        """Give back what a sequence holds; nothing of it is computed any more."""
        cache = self._cache
        if cache is not None:
            self._share(sequence)  # its answer too, for who continues it
        if self._blocks >= 0:
            self._free += -(-sequence.computed // self._block)
        if cache is not None:
            if self._blocks >= 0:
                self._free -= sequence.shared * cache.unit_blocks
            cache.leave(sequence.hashes, sequence.shared)
            sequence.shared = 0
        sequence.computed = 0

    def _blocks_for(self, steps: int) -> int:
        """New blocks that the decodes need in so many steps of the present run."""
        if self._blocks < 0 or not steps or not self._decodes:
            return 0
        block = self._block
        cycles, rest = divmod(steps, block)
        at = self._step % block
        return cycles * self._decodes + sum(self._crossing[at : at + rest])

    def _steps_with(self, steps: int, blocks: int) -> int:
        """So many of `steps` that the decodes need no more than so many new blocks."""
        decodes, block = self._decodes, self._block
        if (steps // block + 1) * decodes <= blocks:
            return steps
        cycles, blocks = divmod(blocks, decodes)  # in each, every decode needs one
        possible = cycles * block
        at = self._step % block
        while possible < steps:
            blocks -= self._crossing[at]
            if blocks < 0:
                break
            possible += 1
            at = (at + 1) % block
        return min(possible, steps)

    # Time

    def _run_time(self, steps: int) -> float:
        """From the beginning of the run to the end of so many of its steps, microseconds."""
        decodes = self._decodes
        first = self._alpha + self._beta * decodes + self._gamma * self._context
        return (
            steps * first + self._gamma * decodes * (steps * (steps - 1) // 2) + self._delta * self._prefill
        )

    def _steps_within(self, elapsed: float) -> int:
        """How many steps of a run of decodes end within so many microseconds of its beginning."""
        growth = self._gamma * self._decodes
        first = self._alpha + self._beta * self._decodes + self._gamma * self._context
        if growth * self._steps > 1e-9 * first:
            half = first - growth / 2
            steps = int((sqrt(half * half + 2 * growth * elapsed) - half) / growth)
        else:
            steps = int(elapsed / first)
        steps = min(max(steps, 0), self._steps)
        while steps and self._run_time(steps) > elapsed:  # floating point is not to decide
            steps -= 1
        while steps < self._steps and self._run_time(steps + 1) <= elapsed:
            steps += 1
        return steps

    def _cut_run(self, now: float) -> None:
        """End the present run of decodes with the step that is running at `now`."""
        self._steps = min(self._steps_within(now - self._begun) + 1, self._steps)
        self.next_at = self._begun + self._run_time(self._steps)
