"""`tidegate calibrate`: from measured times to a profile."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sim.command_errors import error_text, fail

if TYPE_CHECKING:
    from pydantic import ValidationError
    from rich.table import Table

    from policies.profile import Capacity, Limits
    from sim.calibrate import Calibration, Fitted, Search, SweepCalibration
    from sim.measure.sweep import Report
    from sim.timings import Level, Timing


def calibrate(
    measured: Annotated[
        list[Path],
        typer.Argument(
            help="Requests of one run, or sweeps, also several: JSONL or CSV, or what `bench --json` wrote; "
            "also .gz.",
            dir_okay=False,
        ),
    ],
    card: Annotated[str, typer.Option(help="What it was measured on: H20, L40, cpu.")],
    model: Annotated[str, typer.Option(help="Model that was served.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Profile to write. Default: none, only the tables.", dir_okay=False
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the profile. Default: CARD-MODEL.")] = None,
    cards: Annotated[int, typer.Option(help="Cards that served it together.", min=1)] = 1,
    precision: Annotated[str, typer.Option(help="Precision of the weights: bf16, fp8.")] = "",
    kv_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens in its KV cache, as vLLM logs at start. Default: as the server told bench, or never "
            "full.",
            min=16,
        ),
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(help="vLLM's option of this name. Default: vLLM's, 256.", min=1)
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="vLLM's option of this name. Default: vLLM's, 2048.", min=1)
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            help="Longest prompt plus answer, tokens. Default: as the server told bench, or 8192.", min=1
        ),
    ] = None,
    prefix_cache: Annotated[
        bool | None,
        typer.Option(
            "--prefix-cache/--no-prefix-cache",
            help="Whether it had a prefix cache. Default: as the server told bench, or yes.",
        ),
    ] = None,
    test_half: Annotated[
        bool,
        typer.Option(help="Fit to the first half of the requests and test on the second; not for sweeps."),
    ] = True,
    overhead: Annotated[
        bool | None,
        typer.Option(
            "--overhead/--no-overhead",
            help="Fit the time outside the engine too: for times of a client. Default: for files of bench.",
        ),
    ] = None,
    source: Annotated[
        str, typer.Option(help="Who measured it, and when; stands in the profile beside the file's name.")
    ] = "",
    published: Annotated[
        bool, typer.Option("--published", help="Others have measured it: --source says who.")
    ] = False,
    starts: Annotated[int, typer.Option(help="Independent searches; the best one counts.", min=1)] = 3,
    evaluations: Annotated[int, typer.Option(help="Simulations in each search.", min=1)] = 600,
    seed: Annotated[int, typer.Option(help="Of the search.", min=0)] = 0,
) -> None:
    """Fit what a step of an engine takes to measured times, and write the profile that the simulator reads.

    MEASURED has one row for a request (arrival_s, prompt_tokens, output_tokens, ttft_s, e2e_s) or one for a level
    of a concurrency sweep (concurrency, prompt_tokens, output_tokens, ttft_s, tpot_s), or is a file of bench.
    Levels of several files are fitted together: give it several lengths, which tell the coefficients apart.

    Example: tidegate calibrate short.json long.json --card L40 --model Qwen3-32B -o l40.yaml
    """
    from pydantic import ValidationError
    from rich.console import Console

    from policies.profile import Limits, Origin, Profile, Source
    from sim.calibrate import Calibration, Search
    from sim.measure.fit import limits_in_words
    from sim.profile import dump_profile

    if published and not source:
        fail("--published needs --source: who measured it")
    if output is not None and not output.absolute().parent.is_dir():
        fail(f"{output}: there is no such folder")
    origin = Origin.PUBLISHED if published else Origin.MEASURED
    said = f"{source}; " if source else ""
    try:
        rows, reports = _read(measured)
        asked = {"kv_tokens": kv_tokens, "max_model_len": max_model_len, "prefix_cache": prefix_cache}
        told = _told(reports, asked)
    except (OSError, ValueError) as error:
        fail(error_text(error))
    files = ", ".join(file.name for file in measured)
    asked |= {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
    given = {name: value for name, value in asked.items() if value is not None}
    limits_said = f"{said}options of the engine behind {files}; {limits_in_words(list(told), list(given))}"
    search = Search(starts, evaluations, seed, bool(reports) if overhead is None else overhead)
    try:
        limits = Limits.model_validate(
            {
                **told,
                **given,
                "source": Source(origin=origin, text=limits_said),
            }
        )
    except ValidationError as error:
        fail(_invalid(error))
    try:
        found = _search(rows, limits, search, test_half=test_half)
    except ValueError as error:
        fail(f"{', '.join(map(str, measured))}: {error}")
    console = Console()
    console.print(coefficients(found))
    console.print(errors(found) if isinstance(found, Calibration) else level_errors(found))
    for doubt in _doubts(found, rows, limits):
        typer.echo(doubt, err=True)
    if output is None:
        return
    text = said + in_words(found, files, search) + _left_out(reports)
    try:
        profile = Profile(
            name=name or _profile_name(card, model),
            card=card,
            cards=cards,
            model=model,
            precision=precision,
            overhead_us=round(found.overhead_us, 1),
            step=found.step(Source(origin=origin, text=text)),
            limits=limits,
            capacity=_capacity(reports),
        )
        output.write_text(dump_profile(profile), encoding="utf-8")
    except ValidationError as error:
        fail(_invalid(error))
    except OSError as error:
        fail(error_text(error))
    typer.echo(f"profile {profile.name} written to {output}{_slots(profile.capacity)}", err=True)


def coefficients(found: Fitted) -> Table:
    """What a step takes."""
    from rich.table import Table

    from sim.calibrate import rounded

    table = Table("coefficient", "microseconds", "for", title=f"Step, loss {found.loss:.4f}")
    cost = found.cost
    for name, value, meaning in (
        ("alpha", cost.alpha, "a step"),
        ("beta", cost.beta, "each decoding sequence"),
        ("gamma", cost.gamma, "each token in their contexts"),
        ("delta", cost.delta, "each prompt token computed"),
        ("overhead", found.overhead_us, "a request, outside the engine"),
    ):
        table.add_row(name, f"{rounded(value):,}", meaning)
    table.columns[1].justify = "right"
    table.caption = "From one load they only hold together; several, of several lengths, tell them apart."
    return table


def errors(found: Calibration) -> Table:
    """How far simulated requests are from measured ones, on the fit half and on the test half."""
    from rich.table import Table

    from sim.calibrate import METRICS

    halves = {"fit": found.fit} | ({"test": found.test} if found.test else {})
    table = Table("simulated / measured - 1", title="Errors")
    for name, half in halves.items():
        for figure in ("mean", "p99"):
            table.add_column(f"{name} ({half.count}) {figure}", justify="right")
    for row, metric in enumerate(METRICS):
        cells = [f"{value[row]:+.1%}" for half in halves.values() for value in (half.mean, half.p99)]
        table.add_row(metric, *cells)
    return table


def level_errors(found: SweepCalibration) -> Table:
    """How far simulated levels are from measured ones."""
    from rich.table import Table

    from sim.calibrate import METRICS

    levels = found.errors
    table = Table("|simulated / measured - 1|", title=f"Errors of {levels.count} levels")
    for figure in ("mean", "worst"):
        table.add_column(figure, justify="right")
    for metric, mean, worst in zip(METRICS, levels.mean, levels.worst, strict=True):
        table.add_row(metric, f"{mean:.1%}", f"{worst:.1%}")
    return table


def in_words(found: Calibration | SweepCalibration, files: str, search: Search) -> str:
    """What it was fitted to, how, and how well: the source in a profile."""
    from sim.calibrate import METRICS, SweepCalibration

    terms = "TTFT + " if search.overhead else ""
    how = (
        f"loss: mean |ln(simulated/measured)| of {terms}TPOT + E2E = {found.loss:.4f}; CMA-ES, "
        f"{search.starts} starts of {search.evaluations} simulations, seed {search.seed}"
    )
    if isinstance(found, SweepCalibration):
        return f"fitted to {found.errors.count} levels, of {files}; {how}; {found.errors}"
    if found.test is None:
        return f"fitted to {found.fit.count} requests, of {files}; {how}"
    of = f"{found.fit.count + found.test.count}, the first to arrive"
    means = ", ".join(
        f"{metric} {value:+.1%}" for metric, value in zip(METRICS, found.test.mean, strict=True)
    )
    return (
        f"fitted to {found.fit.count} requests of {of}, of {files}; {how}; error of the means of the other "
        f"{found.test.count}: {means}"
    )


def _read(files: Sequence[Path]) -> tuple[list[Timing] | list[Level], dict[str, Report]]:
    """-> requests, or the levels of all files; and the reports among these, by file. Raises OSError, ValueError."""
    from sim.measure.fit import to_sweep
    from sim.measure.saved import is_report, read_report
    from sim.timings import Level, Timing, looks_like_milliseconds, read_measured

    levels: list[Level] = []
    reports: dict[str, Report] = {}
    for file in files:
        if is_report(file):
            reports[str(file)] = read_report(file)
            found = to_sweep(reports[str(file)])
            if not found:
                raise ValueError(
                    f"{file}: no level is of a cold prefix, without failures, and of answers of two tokens or more"
                )
            levels += found
            continue
        rows = read_measured(file)
        if doubt := looks_like_milliseconds(rows):
            typer.echo(f"{file}: {doubt}", err=True)
        timings = [row for row in rows if isinstance(row, Timing)]
        if timings and len(files) > 1:
            raise ValueError(
                f"{file}: has requests, which are those of one run, in one file; levels are joined"
            )
        if timings:
            return timings, {}
        levels += [row for row in rows if isinstance(row, Level)]
    return levels, reports


def _told(reports: dict[str, Report], given: dict[str, Any]) -> dict[str, Any]:
    """What the servers said of their limits, without what is given. Raises ValueError: the files contradict."""
    models = sorted({report.model for report in reports.values()})
    if len(models) > 1:
        raise ValueError(f"the files are of {' and '.join(models)}: a profile is of one model")
    told: dict[str, Any] = {}
    for name in (name for name, value in given.items() if value is None):
        said = {file: getattr(report.facts, name) for file, report in reports.items()}
        values = {value for value in said.values() if value is not None}
        if len(values) > 1:
            each = ", ".join(f"{value} in {file}" for file, value in said.items())
            raise ValueError(f"{name} is {each}: say which with --{name.replace('_', '-')}")
        if values:
            told[name] = values.pop()
    return told


def _capacity(reports: dict[str, Report]) -> Capacity | None:
    """What the runs with an SLA allow: the fewest users of any; None: none had one."""
    from sim.measure.fit import sla_capacity

    found = {Path(file).name: one for file, report in reports.items() if (one := sla_capacity(report))}
    if not found:
        return None
    fewest = min(found, key=lambda file: found[file].users)
    capacity = found[fewest]
    text = f"{fewest}: {capacity.source.text}"
    if len(found) > 1:
        others = ", ".join(f"{file} {one.users}" for file, one in found.items() if file != fewest)
        text += f"; the fewest users of all runs with an SLA (others: {others})"
    return capacity.model_copy(update={"source": capacity.source.model_copy(update={"text": text})})


def _slots(capacity: Capacity | None) -> str:
    """What a profile is to `slots: auto`, in words."""
    if capacity is None:
        return "; it says no slots: no file of bench in it had an SLA"
    return f"; `slots: auto` takes {capacity.users or 'nothing'} from it"


def _doubts(found: Fitted, rows: list[Timing] | list[Level], limits: Limits) -> list[str]:
    """Why not to believe the profile."""
    from sim.calibrate import Calibration, SweepCalibration
    from sim.measure.fit import doubts
    from sim.timings import Level

    errors: list[float] = []
    if isinstance(found, SweepCalibration):
        errors += found.errors.worst
    elif isinstance(found, Calibration):
        errors += [*found.fit.mean, *(found.test.mean if found.test else ())]
    return doubts([row for row in rows if isinstance(row, Level)], limits, errors)


def _left_out(reports: dict[str, Report]) -> str:
    """In words, for a profile; empty: no level with failures was left out."""
    from sim.measure.fit import left_out

    failed = [
        f"{', '.join(map(str, users))} users of {Path(file).name}"
        for file, report in reports.items()
        if (users := left_out(report))
    ]
    return f"; left out, since requests failed: {'; '.join(failed)}" if failed else ""


def _search(
    rows: list[Timing] | list[Level], limits: Limits, search: Search, *, test_half: bool
) -> Calibration | SweepCalibration:
    from rich.console import Console
    from rich.progress import Progress

    from sim.calibrate import calibrate_sweep, calibrate_timings
    from sim.timings import Level, Timing

    timings = [row for row in rows if isinstance(row, Timing)]
    levels = [row for row in rows if isinstance(row, Level)]
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("simulating", total=search.simulations)

        def progress(done: int) -> None:
            bar.update(task, completed=done)

        if levels:
            return calibrate_sweep(levels, limits, search, progress=progress)
        return calibrate_timings(timings, limits, search, test_half=test_half, progress=progress)


def _profile_name(card: str, model: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", f"{card}-{model}".lower()).strip("-._")


def _invalid(error: ValidationError) -> str:
    """The option that is wrong, and why."""
    problem = error.errors()[0]
    option = str(problem["loc"][0]).replace("_", "-")
    return f"--{option}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"
