"""The fast engine tells what the plain one tells, and both obey the laws of `sim/README.md`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.engine import FINISHED, FIRST_TOKEN, Engine, EngineSettings, Event, Sequence, StepCost
from sim.reference import ReferenceEngine
from tests.patience import examples

COST = StepCost(alpha=10_000.0, beta=50.0, gamma=0.031, delta=55.0)


@dataclass(frozen=True)
class Arrival:
    """A sequence, when it comes, and after how long its client leaves."""

    at: int
    prompt: int
    output: int
    hashes: tuple[int, ...] = ()
    patience: int | None = None


class Both:
    """Both engines as if they were one. What they say of themselves is compared at the end of every step."""

    def __init__(self, config: EngineSettings) -> None:
        self.fast, self.plain = Engine(config), ReferenceEngine(config)
        self.twins: dict[Sequence, Sequence] = {}
        """Of each sequence of the fast engine, that of the plain one."""

    @property
    def next_at(self) -> float:
        return self.plain.next_at

    def submit(self, sequence: Sequence, now: int) -> None:
        twin = Sequence(sequence.prompt_tokens, sequence.output_tokens, sequence.hashes, sequence.tag)
        self.twins[sequence] = twin
        self.fast.submit(sequence, now)
        self.plain.submit(twin, now)

    def cancel(self, sequence: Sequence, now: int) -> None:
        self.fast.cancel(sequence, now)
        self.plain.cancel(self.twins[sequence], now)

    def advance(self, now: int) -> list[Event]:
        events = []
        while self.plain.next_at <= now - 1:
            # A microsecond later, since their clocks differ in the last bits.
            after = ceil(self.plain.next_at) + 1
            events += self.fast.advance(after)
            self.plain.advance(after)
            self.compare(after)
        events += self.fast.advance(now)
        self.plain.advance(now)
        return events

    def compare(self, now: int) -> None:
        fast, plain = self.fast, self.plain
        assert abs(fast.kv_use(now) - plain.kv_use()) < 1e-9
        assert (fast.running, fast.waiting) == (len(plain.running), len(plain.waiting))
        assert {one.tag for one in fast.stalled} == {one.tag for one in plain.stalled}
        for one, other in self.twins.items():
            assert fast.tokens(one, now) == other.generated


def play(engine: Engine | ReferenceEngine | Both, arrivals: list[Arrival]) -> list[Sequence]:
    """Drive an engine through arrivals and leavings until it is idle."""
    sequences = [
        Sequence(one.prompt, one.output, one.hashes, tag=index) for index, one in enumerate(arrivals)
    ]
    actions = sorted(
        [(one.at, index, 0) for index, one in enumerate(arrivals)]
        + [
            (one.at + one.patience, index, 1)
            for index, one in enumerate(arrivals)
            if one.patience is not None
        ]
    )
    told = []
    last = 0
    for at, index, leaves in actions:
        told += engine.advance(at)
        if leaves:
            engine.cancel(sequences[index], at)
        else:
            engine.submit(sequences[index], at)
    while engine.next_at < inf:
        told += engine.advance(ceil(engine.next_at) + 1)
    for event in told:
        assert event.at >= last
        last = event.at
        assert event.at == (
            event.sequence.first_token if event.kind == FIRST_TOKEN else event.sequence.finished
        )
    for kind in (FIRST_TOKEN, FINISHED):
        ends = [event.sequence.tag for event in told if event.kind == kind]
        assert len(ends) == len(set(ends))
    return sequences


@st.composite
def workloads(draw: st.DrawFn) -> tuple[EngineSettings, list[Arrival]]:
    block = draw(st.sampled_from([1, 2, 16]))
    unit = draw(st.sampled_from([0, 0, 1, 2])) * block
    most_seqs = draw(st.integers(1, 6))
    longest = draw(st.sampled_from([20, 200]))
    config = EngineSettings(
        cost=draw(
            st.sampled_from(
                [COST, StepCost(alpha=1000.0, beta=0.0, gamma=0.0, delta=0.0), replace(COST, gamma=30.0)]
            )
        ),
        max_num_batched_tokens=draw(st.integers(most_seqs, most_seqs + longest)),
        max_num_seqs=most_seqs,
        kv_tokens=draw(st.one_of(st.none(), st.integers(2 * longest + block, 6 * longest + block))),
        block_tokens=block,
        prefix_unit_tokens=unit,
    )
    arrivals = []
    at = 0
    for _ in range(draw(st.integers(1, 14))):
        at += draw(st.sampled_from([0, 1, 900, 10_000, 123_456, 3_000_000]))
        prompt, output = draw(st.integers(1, longest)), draw(st.integers(1, longest))
        hashes: tuple[int, ...] = ()
        if unit:
            # Beginnings shared with others, then its own; of the answer as well.
            shared = draw(st.integers(0, 4))
            own = 1000 * (len(arrivals) + 1)
            full = (prompt + output - 1) // unit
            hashes = tuple(index if index < shared else own + index for index in range(full))
            hashes = hashes[: draw(st.sampled_from([full, prompt // unit]))]
        patience = draw(st.one_of(st.none(), st.sampled_from([0, 5_000, 200_000, 2_000_000])))
        arrivals.append(Arrival(at, prompt, output, hashes, patience))
    return config, arrivals


@given(workloads())
@settings(max_examples=examples(600))
def test_the_fast_engine_tells_what_the_plain_one_tells(case: tuple[EngineSettings, list[Arrival]]) -> None:
    config, arrivals = case
    both = Both(config)
    for one in play(both, arrivals):
        other = both.twins[one]
        for name in ("first_token", "finished", "admitted"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1.0), name
        for name in ("cached_tokens", "preemptions", "cancelled"):
            assert getattr(one, name) == getattr(other, name), name
    fast, plain = both.fast, both.plain
    assert fast.preemptions == plain.preemptions
    assert fast.prefill_tokens == plain.prefill_tokens
    assert fast.idle
    assert fast.running == fast.waiting == 0
    assert fast.kv_use(1e12) == 0.0


def test_the_blocks_that_an_ended_run_took_are_not_counted_again() -> None:
    engine = Engine(EngineSettings(COST, max_num_seqs=1, kv_tokens=8, block_tokens=1))
    for _ in range(2):
        engine.submit(Sequence(3, 2), 0)
    used = []
    while engine.next_at < inf:
        used.append(engine.kv_use(engine.next_at - 1.0))
        engine.advance(engine.next_at)
    # A prompt of three tokens, then one more; and again.
    assert used == [0.375, 0.5, 0.375, 0.5]
    assert engine.kv_use(1e12) == 0.0


def test_who_is_preempted_amid_its_answer_stalls_until_it_decodes_again() -> None:
    engine = Engine(EngineSettings(COST, kv_tokens=24, block_tokens=1))
    first, second = Sequence(10, 12), Sequence(10, 12)
    for sequence in (first, second):
        engine.submit(sequence, 0)
    while not engine.stalled:
        assert engine.next_at < inf
        engine.advance(engine.next_at)
    assert list(engine.stalled) == [second]
    assert (
        second.generated == 2
    )  # with 12 and 11 tokens in the cache there is one block left, and both need one
    since = engine.stalled[second]
    while second in engine.stalled:
        assert engine.stalled[second] == since
        assert engine.next_at < inf
        engine.advance(engine.next_at)
    assert first.finished >= 0
    assert second.decoding
