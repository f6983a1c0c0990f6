"""`python -m benchmarks.case_4_1`: the white paper's case 4.1, simulated and measured (`benchmarks/case_4_1/`)."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final

import typer

from benchmarks.case_4_1.client import RunError
from benchmarks.case_4_1.figures import Figures
from benchmarks.case_4_1.measured import measure, speed_for
from benchmarks.case_4_1.simulated import appliance, local_only, never_full, with_tidegate
from benchmarks.compare import MOST_FAVOURED
from benchmarks.processes import StartError
from benchmarks.summary import RESULTS, facts_line, print_table, write_result

LOW: Final = 3
LEVELS: Final = (60, 100)
PROMISED_S: Final = {60: 45.0, 100: 50.0}
"""Mean with Tidegate, at most."""
CURVE: Final = (1, 3, 10, 20, 30, 40, 50, 60, 65, 70, 75, 80, 90, 100)
REPORTS: Final = 4


def main(
    seeds: Annotated[int, typer.Option(help="Runs with Tidegate of each level.", min=1)] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="Few users, one report each: does it run?")] = False,
    check: Annotated[bool, typer.Option("--check", help="Fail if a promise is not kept.")] = False,
    undisturbed: Annotated[
        bool, typer.Option("--undisturbed", help="Go before other processes, on a machine that is not quiet.")
    ] = False,
    result: Annotated[bool, typer.Option(help="Write a file and a picture into benchmarks/results.")] = True,
) -> None:
    """Reports written on an appliance, alone and with two remote sites behind Tidegate: simulated and measured.

    Example: python -m benchmarks.case_4_1 --seeds 3 --check
    """
    from rich.console import Console
    from rich.progress import Progress

    low, levels, count = (2, (8,), 1) if quick else (LOW, LEVELS, REPORTS)
    niceness = MOST_FAVOURED if undisturbed else 0
    if undisturbed:
        with contextlib.suppress(PermissionError):
            os.nice(niceness)
    plan = [("local only", users, 1) for users in (low, *levels)]
    plan += [("Tidegate", users, seed) for seed in range(1, seeds + 1) for users in levels]
    engine = appliance()
    simulated: list[Figures] = []
    measured: list[Figures] = []
    speeds: list[float] = []
    with Progress(console=Console(stderr=True)) as bar:
        for name, users, seed in plan:
            task = bar.add_task(f"{name}, {users} users, seed {seed}", total=users * count)
            tidegate = name == "Tidegate"
            expected = (
                with_tidegate(users, count, seed) if tidegate else local_only(engine, users, count, seed)
            )
            simulated.append(expected)
            speeds.append(speed_for(users, expected.mean_s))
            try:
                with tempfile.TemporaryDirectory(prefix="tidegate-case-") as folder:
                    progress: Callable[[], None] = lambda task=task: bar.advance(task)  # type: ignore[misc]  # noqa: E731
                    measured.append(
                        measure(Path(folder), users, count, seed, speeds[-1], tidegate, progress, niceness)
                    )
            except (StartError, RunError, OSError) as error:
                typer.echo(f"{name}, {users} users: {error}", err=True)
                raise typer.Exit(1) from None
    unlimited = local_only(never_full(engine), levels[-1], count, 1)
    _print(plan, simulated, measured, speeds, unlimited)
    if result and not quick:
        _write(plan, simulated, measured, speeds, unlimited)
    late = [
        f"{users} users took {figures.mean_s:.1f} s a report, promised are {PROMISED_S[users]:.0f}"
        for (name, users, _), figures in zip(plan, measured, strict=True)
        if name == "Tidegate" and figures.mean_s > PROMISED_S.get(users, figures.mean_s)
    ]
    if check and late:
        typer.echo("; ".join(late), err=True)
        raise typer.Exit(1)


Plan = list[tuple[str, int, int]]
"""(what, users, seed) of each run."""


def _print(
    plan: Plan, simulated: list[Figures], measured: list[Figures], speeds: list[float], unlimited: Figures
) -> None:
    rows = [
        [
            f"{name}, {users} users, seed {seed}",
            f"{found.mean_s:.1f}",
            f"{found.p95_s:.1f}",
            f"{expected.mean_s:.1f}",
            f"{expected.p95_s:.1f}",
            f"{found.away:.0%}",
            f"{found.cached:.0%}",
            f"{found.preemptions:.2f}",
            f"{speed:.1f}",
        ]
        for (name, users, seed), found, expected, speed in zip(plan, measured, simulated, speeds, strict=True)
    ]
    columns = (
        "run",
        "mean s",
        "p95 s",
        "simulated",
        "its p95",
        "flowed over",
        "cached",
        "preempted",
        "speed",
    )
    print_table(
        "Seconds a report; of the requests at the appliance: cached prompt tokens, preemptions", columns, rows
    )
    print(
        f"with a KV cache that is never full, {unlimited.users} users at the appliance alone would take "
        f"{unlimited.mean_s:.1f} s a report (simulated)"
    )
    print(facts_line())


def _write(
    plan: Plan, simulated: list[Figures], measured: list[Figures], speeds: list[float], unlimited: Figures
) -> None:
    from benchmarks.case_4_1.plot import plot

    engine = appliance()
    curves = {
        "local only": [local_only(engine, users, REPORTS, 1) for users in CURVE],
        "never-full cache": [local_only(never_full(engine), users, REPORTS, 1) for users in CURVE],
        "Tidegate": [with_tidegate(users, REPORTS, 1) for users in CURVE],
    }
    runs = [
        {"what": name, "seed": seed, "speed": speed, "measured": asdict(found), "simulated": asdict(expected)}
        for (name, _, seed), speed, found, expected in zip(plan, speeds, measured, simulated, strict=True)
    ]
    shown = {name: [asdict(figures) for figures in curve] for name, curve in curves.items()}
    path = write_result("case-4-1", {"runs": runs, "never_full": asdict(unlimited), "curves": shown})
    by_name = {
        what: [found for (name, _, _), found in zip(plan, measured, strict=True) if name == what]
        for what in ("local only", "Tidegate")
    }
    plot(curves, by_name, path.with_suffix(".png"))
    print(f"written to {path.name} and {path.with_suffix('.png').name} in {RESULTS.name}")


if __name__ == "__main__":
    typer.run(main)
