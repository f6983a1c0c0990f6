"""The command `tidegate tune`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from hashlib import file_digest, sha256
from importlib import metadata
from inspect import getfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from sim.command_errors import fail
from sim.evaluate_options import cluster_and_traffic, readable_errors

if TYPE_CHECKING:
    from rich.console import Console

    from sim.intervals import Estimate
    from sim.traffic import Traffic
    from sim.tune import Search, State, Tuned

INTERRUPTED = 130
WRITTEN: Final = re.compile(
    r"# .*, tuned by `tidegate tune`: .*\n(#.*\n)*rules:\n  - name: .*\n    pick:\n( {6}.*\n)+"
)
"""What `tune` writes, nothing added to it."""


def tune(
    trace: Annotated[
        Path,
        typer.Option(
            help="A trace of any form, or a YAML file for `tidegate workload generate`.", dir_okay=False
        ),
    ],
    cluster: Annotated[
        Path, typer.Option(help="The backends: a YAML file, as examples/cluster.yaml.", dir_okay=False)
    ],
    policy: Annotated[str, typer.Option(help="The policy whose parameters are searched.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Policy file to write.", dir_okay=False)],
    objective: Annotated[
        str,
        typer.Option(
            help="goodput, p50-ttft, p95-ttft, p99-ttft, p95-tpot, p95-total; or cost or carbon, for each request "
            "within the SLA."
        ),
    ] = "goodput",
    evaluations: Annotated[int, typer.Option(help="Points that are tried.", min=2)] = 120,
    seeds: Annotated[
        int, typer.Option(help="Samples of the traffic that each point is played over.", min=1, max=10_000)
    ] = 3,
    seed: Annotated[int, typer.Option(help="Of the search, and the first of the samples.", min=0)] = 0,
    test: Annotated[
        float,
        typer.Option(
            help="Share of the trace's time, at its end, that is kept to test on.", min=0.05, max=0.95
        ),
    ] = 0.3,
    loop: Annotated[str, typer.Option(help="trace, open or closed, as for `leaderboard`.")] = "trace",
    users: Annotated[
        int | None, typer.Option(help="Closed loop of so many users, as for `leaderboard`.", min=1)
    ] = None,
    speed: Annotated[float, typer.Option(help="Times the load of the trace.")] = 1.0,
    start: Annotated[str, typer.Option(help="Where the piece of the trace starts that is played.")] = "0s",
    duration: Annotated[
        str | None, typer.Option(help="How long it is. Default: to the end; of ServeGen, 1h.")
    ] = None,
    form: Annotated[str | None, typer.Option(help="Form of the trace. Default: seen from the file.")] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            help="File that keeps what was tried: the same command goes on from it. Default: OUTPUT.state.",
            dir_okay=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace OUTPUT though it is no policy that `tune` has written.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(help="Processes. Default: one for each core.", min=1, max=1024)
    ] = None,
) -> None:
    """Search a policy's parameters in the simulator, test what was found, and write it as a policy file.

    Example: tidegate tune --trace trace.csv --cluster cluster.yaml --policy prequal -o tuned.yaml
    """
    from rich.console import Console

    from sim.tune import OBJECTIVES, Search, Space, State, split
    from sim.workers import cores

    if objective not in OBJECTIVES:
        fail(f"--objective is {', '.join(OBJECTIVES)}, not {objective!r}")
    if not 0 < speed < float("inf"):
        fail(f"--speed is a number above 0, not {speed:g}")
    if not output.absolute().parent.is_dir():
        fail(f"{output}: there is no folder {output.parent} for it")
    errors = Console(stderr=True)
    with readable_errors(), errors.status("reading ..."):
        _check_output(output, force)
        space = Space(policy)
        found, traffic = cluster_and_traffic(
            cluster, trace, form, start, duration, loop, users, (speed,), seeds
        )
        training, testing = split(traffic, test)
        search = Search(policy, found, training, testing, objective, seeds, seed, evaluations, speed)
        head = {
            "policy": policy,
            "parameters": [[one.name, *_bounds(tunable)] for one, tunable in space.parameters],
            "defaults": space.point(space.middle),
            "objective": objective,
            "seeds": seeds,
            "seed": seed,
            "test": test,
            "loop": [loop, users or 0],
            "speed": speed,
            "piece": [start, duration],
            "form": form,
            "cluster": _digest(cluster),
            "profiles": [
                sha256(one.profile.model_dump_json().encode()).hexdigest() for one in found.backends
            ],
            "trace": [_digest(file) for file in _files(traffic, trace)],
            "code": [metadata.version("tidegate"), _digest(_source(policy))],
        }
        kept = State(state or output.with_name(f"{output.name}.state"), head)
    tuned = _search(search, kept, cores() if jobs is None else jobs, errors)
    if tuned is None:
        done = f"{len(kept.found)} points are kept in {kept.path}"
        fail(f"interrupted; {done}: the same command goes on from there", INTERRUPTED)
    _write(search, tuned, output, f"{trace} on {cluster}", _parts(search, test))


def _check_output(output: Path, force: bool) -> None:
    """A policy that somebody has written by hand, and that a proxy may follow, is not replaced by mistake."""
    if output.is_file() and not force and not WRITTEN.fullmatch(output.read_text("utf-8", "replace")):
        fail(
            f"{output} is there, and not as `tune` writes it: give another --output, or --force to replace it"
        )


def _bounds(tunable: Any) -> list[Any]:
    return [tunable.low, tunable.high, tunable.log]


def _files(traffic: Traffic, trace: Path) -> list[Path]:
    """All that the traffic is read from."""
    from sim.traces.servegen import lengths_file

    return [trace, lengths_file(trace)] if isinstance(traffic.source, Path) else [trace]


def _source(policy: str) -> Path:
    """Where the policy's own code stands."""
    from policies import find

    return Path(getfile(sys.modules[find(policy).__module__]))


def _digest(path: Path) -> str:
    """Raises OSError."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _search(search: Search, state: State, jobs: int, errors: Console) -> Tuned | None:
    """-> None: Ctrl-C ended it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from sim.tune import OBJECTIVES, tune
    from sim.workers import Workers

    objective = OBJECTIVES[search.objective]
    columns = (
        TextColumn("tuning"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("", total=search.evaluations)

        def progress(done: int, least: float) -> None:
            best = f"best {objective.loss(least):.4g} {objective.words}"
            bar.update(task, completed=done, description=best)

        try:
            with readable_errors(), Workers(search.play, jobs) as workers:
                return tune(search, workers, state, progress)
        except KeyboardInterrupt:
            return None
        finally:
            state.close()


# What comes out


def _parts(search: Search, test: float) -> str:
    from sim.workload import Workload

    drawn = not isinstance(search.training.source, Workload)
    if drawn and search.training == search.testing:
        return f"{search.seeds} draws for training, {search.seeds} others for testing"
    return (
        f"first {1 - test:.0%} of the time for training, the rest for testing, {search.seeds} samples of each"
    )


def _write(search: Search, tuned: Tuned, output: Path, what: str, parts: str) -> None:
    from sim.tune import OBJECTIVES, policy_file

    objective = OBJECTIVES[search.objective]
    better = tuned.is_better(objective)
    lines = [
        f"{search.policy}, tuned by `tidegate tune`: {objective.words}",
        f"{what}, speed {search.speed:g}, seed {search.seed}; {parts}",
        *_table(tuned),
        _verdict(tuned, better),
    ]
    kept = output.is_file() and not better
    with readable_errors():
        if not kept:
            output.write_text(policy_file(search.policy, tuned.point, lines).text, encoding="utf-8")
    for line in lines:
        typer.echo(line)
    for name, value in tuned.point.items():
        typer.echo(f"{name}: {value:g} (default {tuned.default[name]:g})")
    if kept:
        typer.echo(f"{output} stays as it is.")
    if not better:
        raise typer.Exit(1)


def _table(tuned: Tuned) -> Iterator[str]:
    from sim.intervals import estimate

    yield f"{'':10}{'training':>20}{'test':>20}"
    rows = {
        "defaults": (tuned.training_default, tuned.test_default),
        "tuned": (tuned.training, tuned.test),
    }
    for name, both in rows.items():
        yield f"{name:10}" + "".join(f"{_figure(estimate(values)):>20}" for values in both)


def _figure(found: Estimate | None) -> str:
    assert found is not None
    width = "" if found.half_width is None else f" ±{found.half_width:.2g}"
    return f"{found.mean:.4g}{width}"


def _verdict(tuned: Tuned, better: bool) -> str:
    difference = f"tuned less defaults: {_figure(tuned.gain)}"
    if better:
        return f"On the test part it is better than the defaults ({difference})."
    if len(tuned.test) == 1:
        return f"One sample does not tell whether it is better than the defaults ({difference}): give more --seeds."
    return f"On the test part it is no better than the defaults ({difference}): keep those."
