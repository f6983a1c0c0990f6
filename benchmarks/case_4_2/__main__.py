"""`python -m benchmarks.case_4_2`: the white paper's case 4.2, simulated (`benchmarks/case_4_2/`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from math import isfinite
from statistics import fmean
from typing import Annotated, Any, Final

import typer

from benchmarks.case_4_2.policies import BOX_ALONE, POLICIES, QUICK
from benchmarks.case_4_2.runs import Basis, Job, Pieces, basis, simulate
from benchmarks.case_4_2.simulated import REMOTE, Figures
from benchmarks.case_4_2.traffic import FIRST_SHOWN, TRAINING_SEED
from benchmarks.case_4_2.verdict import (
    CARD_HOURS,
    SHARE,
    TIMES,
    TOKEN_FACTORS,
    Verdict,
    box_hour,
    most_token_factor,
    nearest,
    sensitivity,
    verdict,
    words,
)
from benchmarks.summary import RESULTS, facts_line, print_table, write_result
from sim.workers import Workers, cores

LOADS: Final = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
"""Of the curve, multiples of what the box serves alone."""


def main(
    seeds: Annotated[int, typer.Option(help="Days that are drawn.", min=1)] = 3,
    jobs: Annotated[int, typer.Option(help="Processes.", min=1)] = cores(),
    remote: Annotated[str, typer.Option(help="Profile of the cloud's backends.")] = REMOTE,
    quick: Annotated[bool, typer.Option("--quick", help="Minutes instead of hours: does it run?")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Fail if the policy chosen in training misses a claim.")
    ] = False,
    result: Annotated[bool, typer.Option(help="Write a file and a picture into benchmarks/results.")] = True,
) -> None:
    """A medical institute's box and the cloud behind it: latency, throughput and cost of many policies.

    Takes about 20 minutes of CPU for three days; `--quick` one.

    Example: python -m benchmarks.case_4_2 --check
    """
    from rich.console import Console
    from rich.progress import Progress

    numbers = [TRAINING_SEED, *range(FIRST_SHOWN, FIRST_SHOWN + (1 if quick else seeds))]
    pieces = Pieces(quick)
    policies = QUICK if quick else tuple(entry.name for entry in POLICIES)
    with Progress(console=Console(stderr=True)) as bar:
        bases: list[Basis] = []
        with Workers(partial(basis, pieces), min(jobs, len(numbers))) as workers:
            task = bar.add_task("the box alone", total=len(numbers))
            for _, found in workers.over(numbers):
                bases.append(found)
                bar.advance(task)
        bases.sort(key=lambda one: one.seed)
        plan = [
            Job(what, policy, one.seed, TIMES * one.share)
            for one in bases
            for policy in policies
            for what in ("peak", "day")
        ]
        with Workers(partial(simulate, pieces, remote), jobs) as workers:
            task = bar.add_task("policies", total=len(plan))
            runs: dict[Job, Figures] = {}
            for place, figures in workers.over(plan):
                runs[plan[place]] = figures
                bar.advance(task)
            training, *shown = bases
            trained = [_verdict(policy, [training], runs) for policy in policies]
            verdicts = [_verdict(policy, shown, runs) for policy in policies]
            chosen = verdicts[trained.index(nearest(trained))]
            curve = [
                Job("load", policy, shown[0].seed, load * shown[0].share)
                for policy in (BOX_ALONE.name, chosen.policy)
                for load in LOADS
            ]
            task = bar.add_task("loads", total=len(curve))
            loads: dict[Job, Figures] = {}
            for place, figures in workers.over(curve):
                loads[curve[place]] = figures
                bar.advance(task)
    curves = {
        policy: {load: loads[Job("load", policy, shown[0].seed, load * shown[0].share)] for load in LOADS}
        for policy in dict.fromkeys(job.policy for job in curve)
    }
    _print(bases, trained, verdicts, chosen, curves)
    print(facts_line())
    if result and not quick:
        _write(bases, trained, verdicts, chosen, runs, curves, remote)
    if check and chosen.missed:
        typer.echo(f"{chosen.policy} does not keep the claim of {' and '.join(chosen.missed)}", err=True)
        raise typer.Exit(1)


def _verdict(policy: str, bases: Sequence[Basis], runs: dict[Job, Figures]) -> Verdict:
    peaks, days = (
        [runs[Job(what, policy, one.seed, TIMES * one.share)] for one in bases] for what in ("peak", "day")
    )
    return verdict(
        policy,
        peaks,
        days,
        [one.boxes for one in bases],
        [one.alone for one in bases],
        [one.at_capacity for one in bases],
    )


Curves = dict[str, dict[float, Figures]]


def _print(
    bases: Sequence[Basis],
    trained: Sequence[Verdict],
    verdicts: Sequence[Verdict],
    chosen: Verdict,
    curves: Curves,
) -> None:
    rows = [
        [
            f"seed {one.seed}" if one.seed != TRAINING_SEED else "training",
            f"{one.at_capacity.rate:.2f}",
            f"{one.at_capacity.mean_s:.1f}",
            f"{one.alone.rate:.2f}",
            f"{one.alone.mean_s:.0f}",
            f"{one.alone.met:.1%}",
            str(one.boxes),
            f"{one.left_out:.1%}",
        ]
        for one in bases
    ]
    columns: tuple[str, ...] = (
        "box alone",
        "serves rps",
        "mean s",
        "x3 rps",
        "mean s",
        "in SLA",
        "boxes for it",
        "left out",
    )
    print_table(f"What the box serves in the peak hour, {SHARE:.0%} of it within the SLA", columns, rows)
    rows = [
        [
            one.policy,
            f"{one.spill_peak:.0%}",
            f"{one.spill_day:.0%}",
            f"{one.mean_s:.1f}",
            f"{one.ttft_p95_s:.2f}",
            f"{one.met_peak:.1%}",
            f"{one.met_day:.1%}",
            f"{one.lost:.1%}",
            f"{one.latency_cut:+.0%}",
            f"{one.at_capacity_cut:+.0%}",
            f"{box_hour() + one.tokens_per_hour:.2f}",
            f"{one.cost_cut:+.0%}",
            "yes" if one.keeps_all else "no",
            "yes" if before.keeps_all else "no",
        ]
        for one, before in zip(verdicts, trained, strict=True)
    ]
    columns = (
        "policy", "spill peak", "day", "mean s", "TTFT p95", "in SLA peak", "day", "lost",
        "latency cut", "at capacity", "$/h", "cost cut", "all", "in training",
    )  # fmt: skip
    print_table(f"{TIMES:g} times what the box serves alone: the peak hour, and the day", columns, rows)
    rows = [
        [
            f"{load:g}",
            *(f"{curve[load].mean_s:.1f}" for curve in curves.values()),
            f"{_cut(curves, load):+.0%}",
        ]
        for load in LOADS
    ]
    print_table("Mean seconds by load of the peak hour", ("times", *curves, "cut"), rows)
    boxes = _boxes(bases)
    rows = [
        [f"{price:g}", *(f"{cut:+.0%}" for cut in row)]
        for price, row in zip(CARD_HOURS, sensitivity(chosen.tokens_per_hour, boxes), strict=True)
    ]
    names = ("$ per card hour", *(f"tokens x{factor:g}" for factor in TOKEN_FACTORS))
    print_table(f"Cost cut of {chosen.policy} by prices, against {boxes:g} boxes", names, rows)
    print(
        f"{chosen.policy} halves the cost up to {most_token_factor(chosen.tokens_per_hour, boxes):.1f} times the "
        "price of tokens"
    )
    for line in words(chosen, verdicts):
        print(line)


def _boxes(bases: Sequence[Basis]) -> float:
    """Mean over the days that are shown."""
    return fmean(one.boxes for one in bases if one.seed != TRAINING_SEED)


def _cut(curves: Curves, load: float) -> float:
    alone_s, with_cloud_s = (curve[load].mean_s for curve in curves.values())
    return 1 - with_cloud_s / alone_s


def _write(
    bases: Sequence[Basis],
    trained: Sequence[Verdict],
    verdicts: Sequence[Verdict],
    chosen: Verdict,
    runs: dict[Job, Figures],
    curves: Curves,
    remote: str,
) -> None:
    from benchmarks.case_4_2.plot import plot

    shown: dict[str, Any] = {
        "remote": remote,
        "bases": [asdict(one) for one in bases],
        "chosen_in_training": chosen.policy,
        "training": [asdict(one) for one in trained],
        "verdicts": [asdict(one) for one in verdicts],
        "runs": [{**job._asdict(), **asdict(figures)} for job, figures in runs.items()],
        "curves": {
            policy: [{"load": load, **asdict(figures)} for load, figures in curve.items()]
            for policy, curve in curves.items()
        },
    }
    path = write_result("case-4-2", _finite(shown))
    means = {policy: {load: one.mean_s for load, one in curve.items()} for policy, curve in curves.items()}
    alone_s = fmean(one.alone.mean_s for one in bases if one.seed != TRAINING_SEED)
    plot(verdicts, _boxes(bases), alone_s, means, path.with_suffix(".png"))
    print(f"written to {path.name} and {path.with_suffix('.png').name} in {RESULTS.name}")


def _finite(value: Any) -> Any:
    """JSON knows no infinity: null is what never came."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not isfinite(value) else value


if __name__ == "__main__":
    typer.run(main)
