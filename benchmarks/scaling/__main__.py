"""`python -m benchmarks.scaling`: fewer GPU-hours than an autoscaling rule, and lower cost than static capacity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from math import ceil
from typing import Annotated, Any, Final

import typer

from benchmarks.scaling.bound import lower_bound
from benchmarks.scaling.candidates import (
    COST_PER_HOUR,
    OURS,
    PROFILE,
    RATED,
    RULE,
    SLOTS,
    STATIC,
    TERMS,
    TPOT_S,
    TTFT_S,
    WAIT_S,
    Candidate,
    Trial,
    candidates,
)
from benchmarks.scaling.coarse import Outcome, most_slots
from benchmarks.scaling.exact import Units, play
from benchmarks.scaling.load import DAYS, Demand, demand_of_day, draw, joined, times
from benchmarks.scaling.rules import Static
from benchmarks.summary import print_table, write_result
from sim.profile import load_profile
from sim.workers import Workers, cores

SHARE: Final = 0.05
"""Of ServeGen's requests."""
ATTAINED: Final = 0.99
"""On the days that are tuned on."""
TUNED, TESTED = (0, 7), (7, 7)
"""First day, and how many."""
FEWER_HOURS: Final = 0.25
OF_WHAT_IS_LEFT: Final = 2 / 3
LOWER_COST: Final = 0.5


@dataclass(frozen=True, slots=True)
class Tried:
    """One way to decide, on the days that are tuned on and on those that are tested on."""

    name: str
    tuned: Outcome
    tested: Outcome


def main(
    share: Annotated[float, typer.Option(help="Of ServeGen's requests.", min=1e-4, max=1)] = SHARE,
    seed: Annotated[int, typer.Option(help="Other requests.", min=0)] = 0,
    exact: Annotated[
        bool, typer.Option("--exact", help="Play the first test day request by request, too.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Three settings on four days: does it run?")] = False,
    check: Annotated[bool, typer.Option("--check", help="Fail if a promise is not kept.")] = False,
    result: Annotated[bool, typer.Option(help="Write a file and a picture into benchmarks/results.")] = True,
) -> None:
    """The controller against `ceil(n * metric / target)` and static capacity, on ServeGen's m-small.

    Example: python -m benchmarks.scaling --exact --check
    """
    from rich.console import Console
    from rich.progress import Progress

    tuned_days, tested_days = ((0, 2), (7, 2)) if quick else (TUNED, TESTED)
    share = min(share, 0.001) if quick else share
    with Progress(console=Console(stderr=True)) as bar:
        whole, pace = _load(share, seed, tuned_days, tested_days, bar.track)
        tested = whole.part(tuned_days[1], tested_days[1])
        trial = Trial(whole, max(ceil(1.5 * most_slots(whole) / SLOTS), 2), pace[0])
        peak = ceil(most_slots(tested) / SLOTS)
        each = candidates(quick)
        each.append(Candidate(STATIC, f"static, {peak} units", partial(Static, peak)))
        task = bar.add_task("simulating", total=len(each))
        found: list[Tried | None] = [None] * len(each)
        with Workers(trial.tried, 1 if quick else cores()) as workers:
            for place, outcome in workers.over(each):
                parts = outcome.part(0, tuned_days[1]), outcome.part(tuned_days[1], tested_days[1])
                found[place] = Tried(each[place].name, *parts)
                bar.advance(task)
        rules, rated, ours, (static,) = (
            [one for candidate, one in zip(each, found, strict=True) if one and candidate.kind == kind]
            for kind in (RULE, RATED, OURS, STATIC)
        )
        rule, our = best(rules), best(ours)
        bound = lower_bound(tested, SLOTS, TERMS, our.tested.attainment)
        day = Trial(tested.part(0, 1), trial.units, pace[0])
        exact_found = {}
        for candidate in each if exact else ():
            if candidate.name not in (rule.name, our.name):
                continue
            coarse = day.tried(candidate, ready=0)
            exact_found[f"{candidate.name}, coarse"] = coarse.hours, coarse.attainment
            workload = draw(tested_days[0], share, seed)
            task = bar.add_task(f"request by request, {candidate.name}", total=len(workload))
            hours, attainment, _ = play(
                workload,
                Units(load_profile(PROFILE), trial.units, SLOTS, TERMS, TTFT_S, TPOT_S, WAIT_S),
                candidate.make(),
                lambda done, task=task: bar.update(task, completed=done),  # type: ignore[misc]
            )
            exact_found[candidate.name] = hours, attainment
    verdict = judge(rules, rule, our, static, bound)
    _print([*rules, *rated], ours, rule, our, static, verdict)
    told = judge(rated, best(rated), our, static, bound)
    typer.echo(
        f"told what is offered, the rule would need {told.rule_hours:,.0f}: {told.fewer:.1%} fewer than that"
    )
    for name, (hours, attainment) in exact_found.items():
        typer.echo(f"first test day, request by request, {name}: {hours:.1f} unit-hours, {attainment:.2%}")
    if result and not quick:
        _write(share, seed, [*rules, *rated], ours, rule, our, static, verdict, exact_found)
    if check and not all(kept for kept, _ in verdict.promises()):
        raise typer.Exit(1)


def _load(
    share: float, seed: int, tuned: tuple[int, int], tested: tuple[int, int], track: Callable[..., Any]
) -> tuple[Demand, tuple[float, float]]:
    """All days, and seconds to the first token and for each further one."""
    days = [*range(tuned[0], sum(tuned)), *range(tested[0], sum(tested))]
    assert days[-1] < DAYS
    first = draw(days[0], share, seed, 3600.0)
    prompt = sum(one.prompt_tokens for one in first) / len(first)
    output = sum(one.output_tokens for one in first) / len(first)
    pace = times(load_profile(PROFILE), SLOTS, prompt, output)
    drawn = track(days, description="drawing requests")
    return joined(demand_of_day(day, share, seed, *pace) for day in drawn), pace


def best(tried: Sequence[Tried]) -> Tried:
    """That with the fewest hours on the days that are tuned on, of those that attain what is asked; if none does,
    the one that attains most."""
    enough = [one for one in tried if one.tuned.attainment >= ATTAINED]
    if not enough:
        return max(tried, key=lambda one: one.tuned.attainment)
    return min(enough, key=lambda one: one.tuned.hours)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the days that are tested on say."""

    rule_hours: float
    """Of the rule where it attains as much as the controller did: between two of its targets, if need be."""
    hours: float
    bound: float
    static_hours: float

    @property
    def fewer(self) -> float:
        return 1.0 - self.hours / self.rule_hours

    @property
    def left(self) -> float:
        """What the bound leaves: so many fewer hours nobody exceeds."""
        return 1.0 - self.bound / self.rule_hours

    @property
    def asked(self) -> float:
        return FEWER_HOURS if self.left >= FEWER_HOURS else OF_WHAT_IS_LEFT * self.left

    @property
    def lower(self) -> float:
        return 1.0 - self.hours / self.static_hours

    def promises(self) -> list[tuple[bool, str]]:
        """Kept or not, and in words."""
        return [
            (
                self.fewer >= self.asked,
                f"{self.fewer:.1%} fewer unit-hours than the rule at equal attainment; {self.asked:.1%} are "
                f"promised, and {self.left:.1%} are possible for one who knows what comes",
            ),
            (
                self.lower >= LOWER_COST,
                f"{self.lower:.1%} lower cost than static capacity for the peak; {LOWER_COST:.0%} are promised",
            ),
        ]


def judge(rules: Sequence[Tried], rule: Tried, our: Tried, static: Tried, bound: float) -> Verdict:
    """The rule gets the target that suits the test days best, which nobody knows before: what it would take to
    attain what the controller did. Only if none attains that much, its most generous target stands."""
    needed = hours_at([(one.tested.attainment, one.tested.hours) for one in rules], our.tested.attainment)
    return Verdict(needed, our.tested.hours, bound, static.tested.hours)


def hours_at(points: Sequence[tuple[float, float]], attainment: float) -> float:
    """Hours for an attainment, between the points (attainment, hours) of settings that attain more for more hours;
    outside them, those of the nearest."""
    kept: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: (point[1], -point[0])):
        if not kept or point[0] > kept[-1][0]:
            kept.append(point)
    if attainment <= kept[0][0]:
        return kept[0][1]
    for (low, cheap), (high, dear) in pairwise(kept):
        if attainment <= high:
            return cheap + (dear - cheap) * (attainment - low) / (high - low)
    return kept[-1][1]


def _print(
    rules: Sequence[Tried],
    ours: Sequence[Tried],
    rule: Tried,
    our: Tried,
    static: Tried,
    verdict: Verdict,
) -> None:
    rows = []
    for one in (*rules, *ours, static):
        mark = "*" if one in (rule, our) else ""
        rows.append(
            [
                one.name + mark,
                f"{one.tuned.attainment:.2%}",
                f"{one.tuned.hours:,.0f}",
                f"{one.tested.attainment:.2%}",
                f"{one.tested.hours:,.0f}",
                f"{one.tested.hours * COST_PER_HOUR:,.0f}",
            ]
        )
    rows.append(["who knows what comes", "", "", f"{our.tested.attainment:.2%}", f"{verdict.bound:,.0f}", ""])
    columns = ["", "days 1-7", "unit-hours", "days 8-14", "unit-hours", "USD"]
    print_table("share within the SLA, and hours of units of four cards; *: best on days 1-7", columns, rows)
    for kept, said in verdict.promises():
        typer.echo(f"{'kept' if kept else 'not kept'}: {said}")


def _write(
    share: float,
    seed: int,
    rules: Sequence[Tried],
    ours: Sequence[Tried],
    rule: Tried,
    our: Tried,
    static: Tried,
    verdict: Verdict,
    exact: dict[str, tuple[float, float]],
) -> None:
    from sim.autoscale_plot import plot_capacity

    def row(one: Tried) -> dict[str, Any]:
        parts = {"tuned": one.tuned, "tested": one.tested}
        return {
            "name": one.name,
            **{
                key: {
                    **asdict(replace(part, samples=[])),
                    "hours": part.hours,
                    "attainment": part.attainment,
                }
                for key, part in parts.items()
            },
        }

    path = write_result(
        "scaling",
        {
            "share": share,
            "seed": seed,
            "units": {"profile": PROFILE, "slots": SLOTS, "terms": asdict(TERMS)},
            "sla": {"ttft_s": TTFT_S, "attained_on_tuned_days": ATTAINED},
            "rules": [row(one) for one in rules],
            "ours": [row(one) for one in ours],
            "static": row(static),
            "best": {"rule": rule.name, "ours": our.name},
            "verdict": {
                **asdict(verdict),
                "fewer": verdict.fewer,
                "left": verdict.left,
                "lower": verdict.lower,
            },
            "exact": exact,
        },
    )
    plot_capacity(our.tested.samples, path.with_suffix(".png"), f"ServeGen m-small x {share:g}, days 8-14")


if __name__ == "__main__":
    typer.run(main)
