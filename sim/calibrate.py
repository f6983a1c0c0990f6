"""Fits the coefficients of `sim.engine.StepCost` to measured serving times, by simulating what was measured.

The engine meets the same requests at the same times (`Timing`), or the same closed loop at each level
(`Level`), and the coefficients are those whose times come nearest to the measured ones.

*What the fit sees.* With a test half, the loss looks at the first half of the requests by arrival, at no time
of a later one. The simulation queues later requests too, as they came, because the first half met them in the
batch: of these it knows arrival and lengths, which are inputs, and not how long they took.

*Loss*: mean |ln(TPOT / measured)| + mean |ln(E2E / measured)| over the requests, or the levels. Ratios of each
request, since means alone are met by coefficients that foretell nothing. TTFT is left out of it, because in a
light load it hangs on the moment of the step in which a request happens to come, and in a heavy one E2E has
it; only if an overhead is fitted, which little else shows, is mean |ln(TTFT / measured)| added. It was chosen
knowing that another loss, on the means, had missed the second half of a real run in `benchmarks/calibration.py`:
the figures there are not those of a method that never met the test halves.

*Search*: CMA-ES (Hansen, "The CMA Evolution Strategy: A Tutorial", arXiv:1604.00772) over the logarithms of the
coefficients, from several starts with a fixed seed. It uses only the order of the losses, which jump where one
more preemption happens, and learns that coefficients make up for each other: from one run they are not
identifiable one by one, only what they predict together. Several load levels tell them apart.

Prompts are taken to share nothing with one another. Where the engine has a prefix cache, a preempted sequence
finds in it what nobody needed meanwhile, as vLLM's does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from policies.profile import Limits, Step
from sim.closed_loop import SECOND, closed_loop, own_hashes
from sim.engine import FINISHED, Engine, EngineSettings, StepCost
from sim.engine import Sequence as EngineSequence
from sim.timings import Level, Timing

if TYPE_CHECKING:
    from policies.profile import Source

Floats: TypeAlias = NDArray[np.float64]
Progress: TypeAlias = Callable[[int], None]
"""Is told how many simulations have been made."""

METRICS: Final = ("TTFT", "TPOT", "E2E")
"""Rows of all arrays of times: to the first token, for each one after it, to the last. Microseconds."""

UNIT_TOKENS: Final = 64
"""Of the prefix cache, for preempted sequences: smaller units change nothing and take longer."""

LEAST_REQUESTS: Final = 8
LEAST_LEVELS: Final = 3
WARM_ROUNDS: Final = 1
MEASURED_ROUNDS: Final = 2
MOST_ROUNDS: Final = 8
"""Of a closed loop; a round is one request of each user."""

POPULATION: Final = 12
FIRST_STEP: Final = 0.5
START_SPREAD: Final = 0.7
WIDEST: Final = np.log(1000.0)
"""Logarithms: the first step of a search, between starts, and the farthest from the first guess. A coefficient
that is a thousandth of its guess is as good as zero."""


@dataclass(frozen=True, slots=True)
class Search:
    """How the coefficients are searched. Raises ValueError."""

    starts: int = 3
    evaluations: int = 600
    """Simulations from each start."""
    seed: int = 0
    overhead: bool = False
    """Fit `Profile.overhead_us` too; else it is zero, as behind times from the engine's own clock."""

    def __post_init__(self) -> None:
        if self.starts < 1 or self.evaluations < 1:
            raise ValueError("a search needs at least one start and one evaluation")

    @property
    def simulations(self) -> int:
        """At most."""
        return self.starts * self.evaluations


@dataclass(frozen=True, slots=True)
class Errors:
    """How far simulated requests are from measured ones: simulated / measured - 1, one for each of `METRICS`."""

    mean: tuple[float, ...]
    """Of the means."""
    p99: tuple[float, ...]
    """Of the 99th percentiles."""
    count: int
    """Requests behind them."""

    @classmethod
    def between(cls, simulated: Floats, measured: Floats) -> Errors:
        """Of two arrays of shape (3, n)."""
        return cls(
            mean=_relative(np.nanmean(simulated, axis=1), np.nanmean(measured, axis=1)),
            p99=_relative(np.nanpercentile(simulated, 99, axis=1), np.nanpercentile(measured, 99, axis=1)),
            count=measured.shape[1],
        )


@dataclass(frozen=True, slots=True)
class LevelErrors:
    """How far simulated levels are from measured ones: |simulated / measured - 1|, one for each of `METRICS`.

    Without a sign, so that a level that is too fast makes up for none that is too slow.
    """

    mean: tuple[float, ...]
    """Over the levels."""
    worst: tuple[float, ...]
    count: int

    @classmethod
    def between(cls, simulated: Floats, measured: Floats) -> LevelErrors:
        """Of two arrays of means, of shape (3, n)."""
        errors = np.abs(simulated / measured - 1)
        return cls(
            mean=tuple(np.nanmean(errors, axis=1).tolist()),
            worst=tuple(np.nanmax(errors, axis=1).tolist()),
            count=measured.shape[1],
        )

    def __str__(self) -> str:
        """In words, for a profile."""
        told = (
            f"{metric} {mean:.1%} ({worst:.1%})"
            for metric, mean, worst in zip(METRICS, self.mean, self.worst, strict=True)
        )
        return f"error of a level on average (at worst): {', '.join(told)}"


@dataclass(frozen=True, slots=True)
class Fitted:
    """Coefficients that were found."""

    cost: StepCost
    overhead_us: float
    loss: float
    """Of what was fitted to."""

    def step(self, source: Source) -> Step:
        """For a profile."""
        cost = self.cost
        return Step(
            alpha_us=rounded(cost.alpha),
            beta_us=rounded(cost.beta),
            gamma_us=rounded(cost.gamma),
            delta_us=rounded(cost.delta),
            source=source,
        )


@dataclass(frozen=True, slots=True)
class Calibration(Fitted):
    """Found from single requests."""

    fit: Errors
    test: Errors | None
    """None: nothing was kept back."""


@dataclass(frozen=True, slots=True)
class SweepCalibration(Fitted):
    """Found from the levels of sweeps."""

    errors: LevelErrors


def rounded(coefficient: float) -> float:
    """To four digits, which is more than a fit is sure of."""
    return float(f"{coefficient:.4g}")


def calibrate_timings(
    timings: Sequence[Timing],
    limits: Limits,
    search: Search,
    *,
    test_half: bool = True,
    progress: Progress | None = None,
) -> Calibration:
    """Fit to single requests, in order of arrival: to the first half of them, and test on the second; or to
    all. Raises ValueError for too few requests, or one that the KV cache cannot hold."""
    seen = len(timings) // 2 if test_half else len(timings)
    if seen < LEAST_REQUESTS:
        raise ValueError(f"{seen} requests are too few to fit to, {LEAST_REQUESTS} are the least")
    measured = measured_times(timings)

    def simulate(cost: StepCost, overhead_us: float, count: int) -> Floats:
        return replay(_engine(limits, cost), timings, count) + _everywhere(overhead_us)

    cost, overhead_us, loss = _fit(
        lambda cost, overhead_us: simulate(cost, overhead_us, seen), measured[:, :seen], search, progress
    )
    simulated = simulate(cost, overhead_us, len(timings))
    return Calibration(
        cost=cost,
        overhead_us=overhead_us,
        loss=loss,
        fit=Errors.between(simulated[:, :seen], measured[:, :seen]),
        test=Errors.between(simulated[:, seen:], measured[:, seen:]) if test_half else None,
    )


def calibrate_sweep(
    levels: Sequence[Level], limits: Limits, search: Search, *, progress: Progress | None = None
) -> SweepCalibration:
    """Fit to the levels of one sweep or several. Raises ValueError for too few levels, or a request that the KV
    cache cannot hold."""
    if len(levels) < LEAST_LEVELS:
        raise ValueError(f"{len(levels)} levels are too few to fit to, {LEAST_LEVELS} are the least")
    measured = np.array([_level_times(one) for one in levels]).T

    def simulate(cost: StepCost, overhead_us: float) -> Floats:
        settings = _engine(limits, cost)
        return np.array([loop_times(settings, level, overhead_us) for level in levels]).T

    cost, overhead_us, loss = _fit(simulate, measured, search, progress)
    errors = LevelErrors.between(simulate(cost, overhead_us), measured)
    return SweepCalibration(cost, overhead_us, loss, errors)


# What is simulated


def measured_times(timings: Iterable[Timing]) -> Floats:
    """-> (3, n), microseconds; TPOT is NaN for a request of one token."""
    return np.array([(one.ttft, _tpot(one.ttft, one.e2e, one.output_tokens), one.e2e) for one in timings]).T


def replay(settings: EngineSettings, timings: Sequence[Timing], count: int) -> Floats:
    """Times of the first `count` requests when all come as they came -> (3, count), microseconds.

    Ends when these have ended.
    """
    engine = Engine(settings)
    sequences = []
    left = count
    for index, timing in enumerate(timings):
        left -= _finished(engine, timing.at, count)
        if not left:
            break
        prompt, output = timing.prompt_tokens, timing.output_tokens
        sequence = EngineSequence(prompt, output, own_hashes(settings, prompt, output, index), index)
        sequences.append(sequence)
        engine.submit(sequence, timing.at)
    while left:
        left -= _finished(engine, engine.next_at, count)
    return np.array([_times(sequence) for sequence in sequences[:count]]).T


def loop_times(
    settings: EngineSettings, level: Level, overhead_us: float = 0.0
) -> tuple[float, float, float]:
    """Mean times of one level, microseconds: as they were measured, `Level.requests`."""
    rounds, warm_rounds = WARM_ROUNDS + MEASURED_ROUNDS, WARM_ROUNDS
    if level.requests:
        rounds, warm_rounds = min(max(1, round(level.requests / level.concurrency)), MOST_ROUNDS), 0
    figures = closed_loop(
        settings,
        level.concurrency,
        level.prompt_tokens,
        level.output_tokens,
        overhead_us=overhead_us,
        rounds=rounds,
        warm_rounds=warm_rounds,
    )
    tpot = figures.tpot_mean * SECOND if level.output_tokens > 1 else nan
    return figures.ttft_mean * SECOND, tpot, figures.total_mean * SECOND


def _level_times(level: Level) -> tuple[float, float, float]:
    """As they were measured, microseconds; TPOT is NaN for answers of one token."""
    tpot = level.tpot if level.output_tokens > 1 else nan
    return level.ttft, tpot, level.ttft + (level.output_tokens - 1) * level.tpot


def _engine(limits: Limits, cost: StepCost) -> EngineSettings:
    return EngineSettings(
        cost=cost,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_num_seqs=limits.max_num_seqs,
        kv_tokens=limits.kv_tokens,
        prefix_unit_tokens=UNIT_TOKENS if limits.prefix_cache and limits.kv_tokens is not None else 0,
    )


def _finished(engine: Engine, now: float, count: int) -> int:
    """Let time pass. -> how many of the first `count` sequences have ended."""
    return sum(
        event.kind == FINISHED and event.sequence.tag < count  # type: ignore[operator]
        for event in engine.advance(now)
    )


def _times(sequence: EngineSequence) -> tuple[float, float, float]:
    ttft = float(sequence.first_token - sequence.arrived)
    e2e = float(sequence.finished - sequence.arrived)
    return ttft, _tpot(ttft, e2e, sequence.output_tokens), e2e


def _tpot(ttft: float, e2e: float, output_tokens: int) -> float:
    return (e2e - ttft) / (output_tokens - 1) if output_tokens > 1 else nan


def _everywhere(overhead_us: float) -> Floats:
    """What an overhead adds to the three times."""
    return np.array([[overhead_us], [0.0], [overhead_us]])


def _relative(simulated: Floats, measured: Floats) -> tuple[float, ...]:
    return tuple((simulated / measured - 1).tolist())


# The search


def loss_of(simulated: Floats, measured: Floats, *, ttft: bool = False) -> float:
    """Of two arrays of shape (3, n): see the top of this module."""
    ratios = np.abs(np.log(simulated / measured))
    return float(np.nanmean(ratios, axis=1)[0 if ttft else 1 :].sum())


def _fit(
    simulate: Callable[[StepCost, float], Floats], measured: Floats, search: Search, progress: Progress | None
) -> tuple[StepCost, float, float]:
    """-> cost, overhead, loss. `simulate` gives times of the shape of `measured`."""
    from cmaes import CMA

    if not np.isfinite(measured[1]).any():
        raise ValueError("no request has more than one token of output: there is nothing to fit to")
    begin = _first_guess(measured, overhead=search.overhead)
    random = np.random.default_rng(search.seed)
    best_loss, best = float("inf"), begin
    done = 0
    for start in range(search.starts):
        mean = begin + (random.normal(0, START_SPREAD, begin.size) if start else 0)
        strategy = CMA(
            mean=mean,
            sigma=FIRST_STEP,
            bounds=np.stack([begin - WIDEST, begin + WIDEST], axis=1),
            seed=search.seed + start,
            population_size=POPULATION,
        )
        last = (start + 1) * search.evaluations
        while done < last and not strategy.should_stop():
            told = []
            for _ in range(strategy.population_size):
                point = strategy.ask()
                loss = loss_of(simulate(*_read(point)), measured, ttft=search.overhead)
                told.append((point, loss))
                if loss < best_loss:
                    best_loss, best = loss, point
            strategy.tell(told)
            done += len(told)
            if progress is not None:
                progress(min(done, last))
        done = last
    if progress is not None:
        progress(search.simulations)
    if not isfinite(best_loss):
        raise ValueError("no coefficients give times that can be compared with the measured ones")
    return *_read(best), best_loss


def _first_guess(measured: Floats, *, overhead: bool) -> Floats:
    """Logarithms of the coefficients, from the fastest decoding seen.

    The others stand to alpha as in fits to vLLM with dense models of 32 and 70 billion parameters on H100
    (published with AIConfigurator, arXiv:2601.06288): 1/250, 4e-6, 1/250.
    """
    alpha = 0.8 * float(np.nanmin(measured[1]))
    guess = [alpha, alpha / 250, alpha * 4e-6, alpha / 250]
    if overhead:
        guess.append(0.5 * float(np.nanmin(measured[0])))
    logarithms: Floats = np.log(np.array(guess))
    return logarithms


def _read(point: Floats) -> tuple[StepCost, float]:
    alpha, beta, gamma, delta, *overhead = np.exp(point).tolist()
    return StepCost(alpha, beta, gamma, delta), overhead[0] if overhead else 0.0
