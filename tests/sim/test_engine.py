"""The fast engine tells what the plain one tells, and both obey the laws of `sim/README.md`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.engine import FINISHED, FIRST_TOKEN, Engine, EngineSettings, Sequence, StepCost
from sim.reference import ReferenceEngine

COST = StepCost(alpha=10_000.0, beta=50.0, gamma=0.031, delta=55.0)


@dataclass(frozen=True)
class Arrival:
    """A sequence, when it comes, and after how long its client leaves."""

    at: int
    prompt: int
    output: int
    hashes: tuple[int, ...] = ()
    patience: int | None = None


def play(engine: Engine | ReferenceEngine, arrivals: list[Arrival]) -> list[Sequence]:
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
        told += engine.advance(ceil(engine.next_at))
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
@settings(max_examples=600)
def test_the_fast_engine_tells_what_the_plain_one_tells(case: tuple[EngineSettings, list[Arrival]]) -> None:
    config, arrivals = case
    fast, plain = Engine(config), ReferenceEngine(config)
    for one, other in zip(play(fast, arrivals), play(plain, arrivals), strict=True):
        for name in ("first_token", "finished", "admitted"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1.0), name
        for name in ("cached_tokens", "preemptions", "cancelled"):
            assert getattr(one, name) == getattr(other, name), name
    assert fast.preemptions == plain.preemptions
    assert fast.prefill_tokens == plain.prefill_tokens
    assert fast.running == fast.waiting == 0
    assert fast.kv_use(1e12) == 0.0
