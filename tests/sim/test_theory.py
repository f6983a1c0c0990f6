"""Law 6: an engine that is set up as a queue of the textbook has that queue's waiting times.

Each figure is the mean over independent runs, with a Student confidence interval over them; seeds are fixed, so a
test that passes passes always.
"""

from __future__ import annotations

from math import ceil, factorial, inf, log, sqrt
from random import Random
from statistics import mean, stdev

import pytest

from sim.engine import Engine, EngineSettings, Sequence, StepCost

RUNS = 12
T_99_9 = 4.437
"""Student's t for 11 degrees of freedom, 99.9 % on both sides."""
STEP = 100.0
"""Microseconds of a step."""
MEAN_TOKENS = 400


def sojourn(settings: EngineSettings, rate: float, count: int, seed: int) -> float:
    """Mean time in the system, microseconds; Poisson arrivals at `rate` per microsecond, geometric lengths."""
    draw = Random(seed)
    engine = Engine(settings)
    at = 0.0
    sequences = []
    for _ in range(count):
        at += draw.expovariate(rate)
        tokens = 1 + int(log(1.0 - draw.random()) / log(1.0 - 1.0 / MEAN_TOKENS))
        sequence = Sequence(1, tokens)
        sequences.append(sequence)
        engine.advance(ceil(at))
        engine.submit(sequence, ceil(at))
    while engine.next_at < inf:
        engine.advance(engine.next_at)
    settled = sequences[count // 10 : -count // 10]  # neither the empty beginning nor the end
    return mean(sequence.finished - sequence.arrived for sequence in settled)


def check(settings: EngineSettings, rate: float, expected: float, count: int = 4_000) -> None:
    runs = [sojourn(settings, rate, count, seed) for seed in range(RUNS)]
    half = T_99_9 * stdev(runs) / sqrt(RUNS)
    assert half < 0.15 * expected  # an interval that would admit anything proves nothing
    assert mean(runs) == pytest.approx(expected, abs=half + STEP)  # who comes amid a step waits for its end


def erlang_c(servers: int, offered: float) -> float:
    """The share that waits in M/M/c; Erlang 1917."""
    last = offered**servers / factorial(servers) * servers / (servers - offered)
    return last / (sum(offered**k / factorial(k) for k in range(servers)) + last)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_at_a_time_is_m_m_1(load: float) -> None:
    service = MEAN_TOKENS * STEP
    alone = EngineSettings(StepCost(STEP, 0.0, 0.0, 0.0), max_num_seqs=1)
    check(alone, load / service, service / (1.0 - load), count=8_000)


@pytest.mark.parametrize(("servers", "load"), [(2, 0.7), (8, 0.5), (8, 0.85)])
def test_several_that_do_not_slow_each_other_are_m_m_c(servers: int, load: float) -> None:
    service = MEAN_TOKENS * STEP
    settings = EngineSettings(StepCost(STEP, 0.0, 0.0, 0.0), max_num_seqs=servers)
    offered = servers * load
    wait = erlang_c(servers, offered) * service / (servers - offered)
    check(settings, offered / service, service + wait, count=8_000)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_all_at_once_is_processor_sharing(load: float) -> None:
    """A step costs a share for each: the mean is that of M/G/1 processor sharing, S / (1 - load)."""
    shared = EngineSettings(StepCost(1e-6, STEP, 0.0, STEP), max_num_seqs=2000)
    service = MEAN_TOKENS * STEP
    check(shared, load / service, service / (1.0 - load), count=6_000)
