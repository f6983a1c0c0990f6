"""The engine of `sim/engine.py` said plainly: one step after the other, one sequence after the other.

It is what tests compare the fast engine with, and what to read first. It keeps no counts that could be computed
again, and is a hundred times slower.
"""

from __future__ import annotations

from math import ceil, inf

from sim.engine import FINISHED, FIRST_TOKEN, EngineSettings, Event, Sequence


class ReferenceEngine:
    """The same interface as `sim.engine.Engine`, as far as tests need it."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.unit_blocks = settings.prefix_unit_tokens // settings.block_tokens
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.units: dict[int, set[Sequence]] = {}
        """The prefix cache: who uses which unit, the least recently used one first."""
        self.scheduled: list[tuple[Sequence, int]] = []
        """What the present step computes: tokens of each sequence."""
        self.next_at = inf
        self.preemptions = 0
        self.prefill_tokens = 0

    def submit(self, sequence: Sequence, now: int) -> None:
        sequence.arrived = now
        self.waiting.append(sequence)
        if self.next_at == inf:
            self.begin_step(now)

    def cancel(self, sequence: Sequence, now: int) -> None:
        if sequence.finished >= 0:
            return
        sequence.cancelled = True
        if sequence in self.waiting:
            self.waiting.remove(sequence)

    def advance(self, now: float) -> list[Event]:
        events: list[Event] = []
        while self.next_at <= now:
            end = self.next_at
            self.end_step(end, events)
            self.begin_step(end)
        return events

    # A step

    def begin_step(self, now: float) -> None:
        settings = self.settings
        for sequence in [*self.running, *self.waiting]:
            if sequence.cancelled:
                self.drop(sequence)
        budget = settings.max_num_batched_tokens
        scheduled: dict[Sequence, int] = {}
        preempted = False
        index = 0
        while index < len(self.running) and budget > 0:
            sequence = self.running[index]
            tokens = min(self.missing(sequence), budget)
            while not self.fits(sequence, tokens):
                victim = self.running[-1]
                self.drop(victim)
                self.waiting.insert(0, victim)
                victim.preemptions += 1
                self.preemptions += 1
                preempted = True
                if victim is sequence:
                    break
            else:
                scheduled[sequence] = tokens
                self.compute(sequence, tokens)
                budget -= tokens
                index += 1
        while not preempted and self.waiting and budget > 0 and len(self.running) < settings.max_num_seqs:
            sequence = self.waiting[0]
            self.find_prefix(sequence)
            cached = sequence.computed
            tokens = min(self.missing(sequence), budget)
            if not (self.has_room(sequence, self.missing(sequence)) and self.fits(sequence, tokens)):
                self.leave_units(sequence)
                sequence.computed = 0
                break
            if sequence.admitted < 0:
                sequence.admitted = now
                sequence.cached_tokens = cached
            self.running.append(self.waiting.pop(0))
            scheduled[sequence] = tokens
            self.compute(sequence, tokens)
            budget -= tokens
        decodes = context = prefill = 0
        for sequence, tokens in scheduled.items():
            if tokens == 1 and sequence.generated and sequence.decoding:
                decodes += 1
                context += sequence.computed - 1
            else:
                prefill += tokens
        self.prefill_tokens += prefill
        self.scheduled = list(scheduled.items())
        if self.scheduled:
            self.next_at = now + settings.cost.of(decodes, context, prefill)
        elif preempted:
            self.begin_step(now)
        else:
            self.next_at = inf

    def end_step(self, end: float, events: list[Event]) -> None:
        at = ceil(end)
        first_tokens = []
        finished = []
        for sequence, _ in self.scheduled:
            if self.missing(sequence):
                continue
            sequence.generated += 1
            sequence.finish_step = 0  # decodes from now on
            if sequence.first_token < 0 and not sequence.cancelled:
                sequence.first_token = at
                first_tokens.append(Event(at, FIRST_TOKEN, sequence))
            if sequence.generated == sequence.output_tokens:
                self.drop(sequence)
                if not sequence.cancelled:
                    sequence.finished = at
                    finished.append(Event(at, FINISHED, sequence))
        events += first_tokens
        events += finished

    def missing(self, sequence: Sequence) -> int:
        """Tokens to compute until the next one can be sampled."""
        return sequence.prompt_tokens + sequence.generated - sequence.computed

    def compute(self, sequence: Sequence, tokens: int) -> None:
        sequence.computed += tokens
        self.share(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Out of the batch or the queue, with all it holds."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.share(sequence)
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        self.leave_units(sequence)
        sequence.computed = 0
        sequence.finish_step = -1

    # What an engine says of itself

    def kv_use(self) -> float:
        """Share of the KV cache that sequences hold, 0 to 1."""
        blocks = self.settings.kv_blocks
        return 0.0 if blocks is None else self.held() / blocks

    @property
    def stalled(self) -> set[Sequence]:
        """Those that were preempted amid their answers and do not decode again yet."""
        return {
            sequence
            for sequence in [*self.running, *self.waiting]
            if sequence.generated and not sequence.decoding and not sequence.cancelled
        }

    # KV blocks

    def blocks_of(self, sequence: Sequence) -> int:
        """Blocks that are its own and not the prefix cache's."""
        return ceil(sequence.computed / self.settings.block_tokens) - sequence.shared * self.unit_blocks

    def has_room(self, sequence: Sequence, tokens: int) -> bool:
        """Whether there are blocks for so many more tokens, those included that only the prefix cache keeps."""
        settings = self.settings
        if settings.kv_blocks is None:
            return True
        return self.held() + self.new_blocks(sequence, tokens) <= settings.kv_blocks

    def fits(self, sequence: Sequence, tokens: int) -> bool:
        """The same, and the room is made."""
        if not self.has_room(sequence, tokens):
            return False
        blocks = self.settings.kv_blocks
        while blocks is not None and self.used() + self.new_blocks(sequence, tokens) > blocks:
            del self.units[next(value for value, users in self.units.items() if not users)]
        return True

    def new_blocks(self, sequence: Sequence, tokens: int) -> int:
        block = self.settings.block_tokens
        return ceil((sequence.computed + tokens) / block) - ceil(sequence.computed / block)

    def used(self) -> int:
        """Blocks that hold something."""
        return sum(map(self.blocks_of, self.running)) + len(self.units) * self.unit_blocks

    def held(self) -> int:
        """The same, without those that only the prefix cache keeps."""
        return self.used() - sum(not users for users in self.units.values()) * self.unit_blocks

    # The prefix cache

    def find_prefix(self, sequence: Sequence) -> None:
        unit = self.settings.prefix_unit_tokens
        if not unit:
            return
        for value in sequence.hashes[: (sequence.prompt_tokens + sequence.generated - 1) // unit]:
            if value not in self.units:
                break
            self.units[value].add(sequence)
            sequence.shared += 1
        sequence.computed = sequence.shared * unit

    def share(self, sequence: Sequence) -> None:
        unit = self.settings.prefix_unit_tokens
        if not unit:
            return
        # The token that decoding adds is known when it is computed, a step later: until then its unit is not full.
        full = sequence.computed // unit
        if sequence.decoding and sequence in self.running:
            return
        for value in sequence.hashes[sequence.shared : full]:
            self.units.setdefault(value, set()).add(sequence)
            sequence.shared += 1

    def leave_units(self, sequence: Sequence) -> None:
        for value in reversed(sequence.hashes[: sequence.shared]):
            users = self.units[value]
            users.discard(sequence)
            if not users:
                self.units[value] = self.units.pop(value)  # now the most recently used one
        sequence.shared = 0
