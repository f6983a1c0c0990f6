"""Several policies over the same requests: every seed, every speed, every policy, on all cores.

The policies of one seed get the same arrivals (common random numbers), so their differences are known better than
their figures: what a seed adds to all of them cancels out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from math import isfinite
from typing import Any, NamedTuple

from sim.cluster_file import ClusterFile
from sim.evaluate import Figures, PolicyText, Run, evaluate
from sim.intervals import Estimate, estimate, paired
from sim.traffic import Traffic
from sim.workers import Workers
from sim.workload import Workload


class Job(NamedTuple):
    """One simulation of a leaderboard."""

    seed: int
    speed: float
    policy: int
    """Its place in the list."""


class Standing(NamedTuple):
    """One policy at one speed, over all seeds."""

    policy: str
    speed: float
    seeds: tuple[int, ...]
    runs: tuple[Run, ...]
    """One for each seed."""
    behind: Estimate | None
    """Its goodput less that of the best policy of this speed, by seeds. None: it is the best."""

    def values(self, name: str) -> list[float]:
        """A figure by its name, `ttft_s.p95` for instance, of the seeds that have it."""
        found = (_figure(run.figures, name) for run in self.runs)
        return [float(value) for value in found if value is not None]

    def of(self, name: str) -> Estimate | None:
        """The mean of a figure. None: not every seed has it."""
        values = self.values(name)
        return estimate(values) if len(values) == len(self.runs) else None

    @property
    def unmet_rules(self) -> list[str]:
        """Those that no request met in any seed."""
        first, *others = (run.unmet_rules for run in self.runs)
        return [name for name in first if all(name in unmet for unmet in others)]

    @property
    def ttft_cdf(self) -> list[float]:
        """Quantiles of the TTFT at equal steps, each the mean over seeds."""
        return [
            sum(points) / len(points) for points in zip(*(run.ttft_cdf for run in self.runs), strict=True)
        ]


class Board:
    """A leaderboard to be played."""

    def __init__(
        self,
        cluster: ClusterFile,
        traffic: Traffic,
        policies: Sequence[PolicyText],
        seeds: Sequence[int],
        speeds: Sequence[float] = (1.0,),
    ) -> None:
        self.cluster = cluster
        self.traffic = traffic
        self.policies = tuple(policies)
        self.seeds = tuple(seeds)
        self.speeds = tuple(speeds)
        self._drawn: tuple[tuple[int, float], Workload] | None = None
        """The last workload: the next job mostly has the same."""

    @property
    def jobs(self) -> list[Job]:
        """In their order: a seed is complete before the next one begins."""
        return [
            Job(seed, speed, policy)
            for seed in self.seeds
            for speed in self.speeds
            for policy in range(len(self.policies))
        ]

    def play(self, job: Job) -> Run:
        """Play one of them. Raises ValueError and FileProblems."""
        drawn = self._drawn
        if drawn is None or drawn[0] != (job.seed, job.speed):
            workload = self.traffic.workload(job.seed, job.speed)
            if not len(workload):
                raise ValueError(f"seed {job.seed} has no request: take a longer piece of the trace")
            self._drawn = drawn = (job.seed, job.speed), workload
        return evaluate(self.cluster, self.policies[job.policy], drawn[1], job.seed)

    def play_all(self, workers: int, played: Callable[[Job, Run], None]) -> None:
        """Play all, on so many processes; `played` hears of each in this one. Raises as `play`, and
        WorkerDiedError. An exception of `played`, or KeyboardInterrupt, ends all processes."""
        jobs = self.jobs
        with Workers(self.play, min(workers, len(jobs))) as many:
            for place, run in many.over(jobs):
                played(jobs[place], run)

    def standings(self, runs: Iterable[tuple[Job, Run]]) -> list[Standing]:
        """Speed by speed, the policy with the most goodput first. A seed counts if all policies have played it."""
        by_seed: dict[tuple[float, int], dict[int, Run]] = defaultdict(dict)
        for job, run in runs:
            by_seed[job.speed, job.seed][job.policy] = run
        found = []
        for speed in self.speeds:
            seeds = tuple(
                seed for seed in self.seeds if len(by_seed.get((speed, seed), ())) == len(self.policies)
            )
            if seeds:
                found += self._at(speed, seeds, [by_seed[speed, seed] for seed in seeds])
        return found

    def _at(self, speed: float, seeds: tuple[int, ...], by_seed: list[dict[int, Run]]) -> list[Standing]:
        runs = {place: tuple(of_seed[place] for of_seed in by_seed) for place in range(len(self.policies))}
        goodput = {place: [run.figures.goodput_rps for run in of] for place, of in runs.items()}
        order = sorted(goodput, key=lambda place: (-sum(goodput[place]), place))
        best = goodput[order[0]]
        return [
            Standing(
                self.policies[place].name,
                speed,
                seeds,
                runs[place],
                paired(goodput[place], best) if place != order[0] else None,
            )
            for place in order
        ]


def _figure(figures: Figures, name: str) -> Any:
    value: Any = figures
    for part in name.split("."):
        value = getattr(value, part)
    return value


FIGURES = tuple(
    field.name for field in fields(Figures) if not field.name.endswith(("ttft_s", "tpot_s", "total_s"))
)
QUANTILES = tuple(
    f"{time}.{share}" for time in ("ttft_s", "tpot_s", "total_s") for share in ("p50", "p95", "p99")
)
"""Names for `Standing.of`."""


def as_json(board: Board, standings: Sequence[Standing]) -> dict[str, Any]:
    """Everything but the simulations' own time; infinite figures and unknown ones are null."""
    cluster, traffic = board.cluster, board.traffic
    return {
        "cluster": cluster.name,
        "model": cluster.model,
        "currency": cluster.currency or None,
        "sla": {"ttft_s": cluster.sla.ttft, "tpot_s": cluster.sla.tpot},
        "loop": traffic.loop.value,
        "users": traffic.users or None,
        "seeds_are": traffic.seeds_in_words,
        "backends": [
            {
                "name": one.name,
                "site": one.section.site,
                "profile": one.profile.name,
                "slots": one.slots,
                "rtt_s": one.section.rtt,
                "context_tokens": one.profile.limits.max_model_len,
                "prefix_cache": one.profile.limits.prefix_cache,
                "watts": one.watts,
                "price": None if one.section.price is None else one.section.price.model_dump(),
            }
            for one in cluster.backends
        ],
        "standings": [
            {
                "policy": one.policy,
                "speed": one.speed,
                "seeds": list(one.seeds),
                "behind_best_rps": _estimate_json(one.behind),
                "unmet_rules": one.unmet_rules,
                "figures": {
                    name: {
                        **(_estimate_json(one.of(name)) or {"mean": None, "half_width": None}),
                        "by_seed": _by_seed(one, name),
                    }
                    for name in (*FIGURES, *QUANTILES)
                },
            }
            for one in standings
        ],
    }


def _by_seed(standing: Standing, name: str) -> list[float | None]:
    return [_number(_figure(run.figures, name)) for run in standing.runs]


def _estimate_json(found: Estimate | None) -> dict[str, float | None] | None:
    return None if found is None else {"mean": _number(found.mean), "half_width": found.half_width}


def _number(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None
