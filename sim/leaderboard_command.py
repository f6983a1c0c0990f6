"""The command `tidegate leaderboard`."""

from __future__ import annotations

import json
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sim.command_errors import fail
from sim.evaluate_options import cluster_and_traffic, policies_of, readable_errors, show_warnings

if TYPE_CHECKING:
    from rich.console import Console

    from sim.evaluate import Run
    from sim.leaderboard import Board, Job, Standing

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def leaderboard(
    trace: Annotated[
        Path,
        typer.Option(
            help="A trace of any form, or a YAML file for `tidegate workload generate`.", dir_okay=False
        ),
    ],
    cluster: Annotated[
        Path, typer.Option(help="The backends: a YAML file, as examples/cluster.yaml.", dir_okay=False)
    ],
    policy: Annotated[
        list[str],
        typer.Option(
            help="A policy file, a name of the library, or a policy's own name: it chooses among all backends. "
            "Several: --policy a b c."
        ),
    ],
    policies: Annotated[list[str] | None, typer.Argument(help="Further policies.")] = None,
    loop: Annotated[
        str,
        typer.Option(
            help="open: requests come at their times. closed: after the answer before them in their session. "
            "trace: as the trace has it."
        ),
    ] = "trace",
    users: Annotated[
        int | None,
        typer.Option(
            help="Closed loop: so many users ask its requests in turn, each after its answer.", min=1
        ),
    ] = None,
    speed: Annotated[
        list[float] | None, typer.Option(help="Times the load of the trace; repeat for several. Default: 1.")
    ] = None,
    seeds: Annotated[
        int, typer.Option(help="Samples of the traffic; 1 plays a trace as it is.", min=1, max=10_000)
    ] = 5,
    seed: Annotated[int, typer.Option(help="The first of them.", min=0)] = 0,
    start: Annotated[str, typer.Option(help="Where the piece of the trace starts that is played.")] = "0s",
    duration: Annotated[
        str | None, typer.Option(help="How long it is. Default: to the end; of ServeGen, 1h.")
    ] = None,
    form: Annotated[str | None, typer.Option(help="Form of the trace. Default: seen from the file.")] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Processes. Default: one for each core.", min=1, max=1024)
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write all figures into this file, seed by seed; -: show them."),
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for three PNG figures.", file_okay=False)] = None,
) -> None:
    """Compare policies in the simulator: the same requests for all, several seeds, 95 % intervals.

    Example: tidegate leaderboard --trace trace.csv --cluster cluster.yaml --policy local-first least-load mine.yaml
    """
    import time

    from rich.console import Console

    from sim.leaderboard import Board
    from sim.workers import cores

    _check_outputs(json_file, plots)
    speeds = tuple(dict.fromkeys(speed or [1.0]))
    for one in speeds:
        if not (isfinite(one) and one > 0):
            fail(f"--speed is a number above 0, not {one:g}")
    errors = Console(stderr=True)
    with readable_errors(), errors.status("reading ..."):
        board = Board(
            *cluster_and_traffic(cluster, trace, form, start, duration, loop, users, speeds, seeds),
            policies_of([*policy, *(policies or [])]),
            range(seed, seed + seeds),
            speeds,
        )
        show_warnings(board.policies, board.cluster.known)
    runs: list[tuple[Job, Run]] = []
    began = time.perf_counter()
    interrupted = _play(board, cores() if jobs is None else jobs, runs, errors)
    elapsed = time.perf_counter() - began
    standings = board.standings(runs)
    if not standings:
        fail("interrupted before all policies had played one seed: nothing to show", INTERRUPTED)
    _write(board, standings, runs, elapsed, interrupted, json_file, plots)
    if interrupted:
        typer.echo(f"tidegate: interrupted; {len(runs)} of {len(board.jobs)} simulations were done", err=True)
        raise typer.Exit(INTERRUPTED)


# What goes in


def _check_outputs(json_file: Path | None, plots: Path | None) -> None:
    if json_file is not None and str(json_file) != "-":
        if json_file.is_dir():
            fail(f"--json {json_file}: it is a folder")
        if not json_file.absolute().parent.is_dir():
            fail(f"--json {json_file}: there is no folder {json_file.parent} for it")
    if plots is not None:
        if not plots.absolute().parent.is_dir():
            fail(f"--plots {plots}: there is no folder {plots.parent} for it")
        if find_spec("matplotlib") is None:
            fail("--plots needs matplotlib: pip install 'tidegate[plot]'")


# What comes out


def _play(board: Board, workers: int, runs: list[tuple[Job, Run]], errors: Console) -> bool:
    """-> whether Ctrl-C ended it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("simulating"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("", total=len(board.jobs))

        def played(job: Job, run: Run) -> None:
            runs.append((job, run))
            bar.update(task, advance=1, description=f"seed {job.seed}, {board.policies[job.policy].name}")

        try:
            with readable_errors():
                board.play_all(workers, played)
        except KeyboardInterrupt:
            return True
    return False


def _write(
    board: Board,
    standings: list[Standing],
    runs: list[tuple[Job, Run]],
    elapsed: float,
    interrupted: bool,
    json_file: Path | None,
    plots: Path | None,
) -> None:
    from sim.leaderboard import as_json
    from sim.leaderboard_table import shown

    if json_file is not None:
        simulated = sum(run.figures.requests for _, run in runs)
        whole = {
            **as_json(board, standings),
            "interrupted": interrupted,
            "simulated_requests_per_second": round(simulated / elapsed, 1),
        }
        text = json.dumps(whole, indent=2, allow_nan=False)
        with readable_errors():
            if str(json_file) == "-":
                typer.echo(text)
            else:
                json_file.write_text(text + "\n", encoding="utf-8")
    if json_file is None or str(json_file) != "-":
        typer.echo(shown(board, standings), nl=False)
    if plots is not None:
        from sim.leaderboard_plots import write_plots

        with readable_errors():
            for path in write_plots(board, standings, plots):
                typer.echo(f"{path} written", err=True)
