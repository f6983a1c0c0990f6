"""`tidegate bench`: the command."""

from __future__ import annotations

import asyncio
import secrets
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from sim.command_errors import error_text, fail
from sim.measure.wire import Api

if TYPE_CHECKING:
    from rich.progress import TaskID

    from sim.measure.prompts import Prefix
    from sim.measure.sweep import Plan, Report
    from sim.measure.verdict import Sla

INTERRUPTED = 130
"""Exit code after Ctrl-C, as a shell's."""


def bench(
    url: Annotated[str, typer.Argument(help="Address of the server, with or without /v1.")],
    model: Annotated[str, typer.Option(help="Model to ask; the server's first one if left out.")] = "",
    key: Annotated[str, typer.Option(help="API key.", envvar="OPENAI_API_KEY", show_envvar=True)] = "",
    api: Annotated[Api, typer.Option(help="Endpoint that is asked.")] = Api.CHAT,
    concurrency: Annotated[
        str,
        typer.Option(
            "--concurrency",
            "--max-concurrency",
            help="Users at once: the levels, as in `1,2,4`.",
            metavar="LIST",
        ),
    ] = "1,2,4,8,16,32",
    prompt_tokens: Annotated[
        int, typer.Option(help="Tokens of each prompt, template included.", min=1)
    ] = 1024,
    output_tokens: Annotated[int, typer.Option(help="Tokens of each answer.", min=1)] = 1024,
    requests: Annotated[
        int | None,
        typer.Option(
            help="Requests of each level, one for each user at least. Default: four for each user.", min=1
        ),
    ] = None,
    cold_prefix: Annotated[
        bool,
        typer.Option("--cold-prefix", help="Prompts that are new from their first words on (the default)."),
    ] = False,
    warm_prefix: Annotated[
        bool, typer.Option("--warm-prefix", help="Prompts whose beginning is in the prefix cache.")
    ] = False,
    both: Annotated[bool, typer.Option("--both", help="Cold, then warm.")] = False,
    ttft: Annotated[float | None, typer.Option(help="SLA: mean TTFT at most, seconds.", min=0)] = None,
    tpot: Annotated[float | None, typer.Option(help="SLA: mean TPOT at most, seconds.", min=0)] = None,
    tokens_per_s: Annotated[
        float | None, typer.Option(help="SLA: output throughput for each user at least.", min=0)
    ] = None,
    search: Annotated[
        bool,
        typer.Option(
            "--search", help="Measure between levels too, until the SLA's limit is known within 5 %."
        ),
    ] = False,
    timeout: Annotated[
        float, typer.Option(help="Seconds without a byte after which a request failed.", min=1)
    ] = 300.0,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the prompts. Default: another one each time, so that none is cached."),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            help="File for all figures and every request; `tidegate calibrate` reads several.",
            dir_okay=False,
        ),
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for four PNG figures.", file_okay=False)] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            help="File for a profile: for simulator, emulator, plan and `slots: auto`.", dir_okay=False
        ),
    ] = None,
    card: Annotated[str, typer.Option(help="Name of the server's cards, for the profile.")] = "unknown",
    cards: Annotated[int, typer.Option(help="How many there are, for the profile.", min=1)] = 1,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(
            help="vLLM's option of this name as the server was started, for the profile. Default: vLLM's, 256.",
            min=1,
        ),
    ] = None,
) -> None:
    """Measure TTFT, TPOT and throughput of an OpenAI-compatible server by concurrency.

    Example: tidegate bench http://127.0.0.1:8000 --concurrency 1,2,4,8 --tokens-per-s 15 --json bench.json
    """
    from rich.console import Console

    from sim.measure.endpoint import MeasureError
    from sim.measure.prompts import Prefix
    from sim.measure.sweep import Plan
    from sim.measure.table import WIDTH, shown

    if not url.startswith(("http://", "https://")):
        fail(f"{url!r} is no address of a server: begin it with http://")
    _check_outputs(json_file, plots, profile)
    cold, warm = both or cold_prefix or not warm_prefix, both or warm_prefix
    if profile is not None and not cold:
        fail("--profile needs a cold prefix: add --cold-prefix")
    try:
        plan = Plan(
            concurrency=_levels(concurrency),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            requests=requests,
            prefixes=(Prefix.COLD,) * cold + (Prefix.WARM,) * warm,
            sla=_sla(ttft, tpot, tokens_per_s),
            search=search,
            seed=secrets.randbits(32) if seed is None else seed,
        )
        if profile is not None:
            _check_levels(plan)
        report = _measured(url, {"model": model, "key": key, "api": api, "timeout_s": timeout}, plan)
    except (ValueError, MeasureError) as error:
        fail(str(error), 1 if isinstance(error, MeasureError) else 2)
    console = Console()
    Console(width=max(console.width, WIDTH)).print(shown(report))
    wanted = _Wanted(json_file, plots, profile, card, cards, max_num_seqs)
    try:
        _write(report, wanted)
    except (OSError, MeasureError) as error:
        fail(error_text(error), INTERRUPTED if report.interrupted else 1)
    if report.interrupted:
        raise typer.Exit(INTERRUPTED)
    if not any(level.completed for level in report.levels):
        fail("every request failed", 1)
    if any(series.never_warmed for series in report.series):
        fail("every warming request failed: these are no figures of a warm prefix", 1)


def _check_outputs(json_file: Path | None, plots: Path | None, profile: Path | None) -> None:
    """Before an hour of measuring, not after it."""
    for file in (json_file, profile):
        if file is not None and not file.absolute().parent.is_dir():
            fail(f"{file}: there is no such folder")
    if plots is not None and not plots.absolute().parent.is_dir():
        fail(f"{plots}: there is no folder {plots.parent} for it")
    if plots is not None and find_spec("matplotlib") is None:
        fail("--plots needs matplotlib: install tidegate[plot]")


def _check_levels(plan: Plan) -> None:
    """Whether they can be enough for a profile."""
    from sim.calibrate import LEAST_LEVELS

    if len(set(plan.concurrency)) < LEAST_LEVELS and not plan.search:
        fail(
            "--profile needs three levels at least: name more with --concurrency, or add --search and an SLA"
        )
    if plan.output_tokens < 2:
        fail("--profile needs answers of two tokens at least: --output-tokens")


class _Wanted(NamedTuple):
    """What to write, and what is said for a profile."""

    json_file: Path | None
    plots: Path | None
    profile: Path | None
    card: str
    cards: int
    max_num_seqs: int | None


def _levels(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--concurrency is a list of numbers, as in 1,2,4, not {text!r}") from None


def _sla(ttft_s: float | None, tpot_s: float | None, tokens_per_s: float | None) -> Sla | None:
    from sim.measure.verdict import Sla

    promised = (ttft_s, tpot_s, tokens_per_s)
    return None if promised == (None, None, None) else Sla(*promised)


def _measured(url: str, server: dict[str, Any], plan: Plan) -> Report:
    """With a progress bar, until the end or Ctrl-C. Raises MeasureError."""
    import uvloop
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from sim.measure.sweep import measure

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[tuple[Prefix, int], TaskID] = {}

        def progress(prefix: Prefix, concurrency: int, done: int, total: int) -> None:
            level = (prefix, concurrency)
            if level not in tasks:
                tasks[level] = bar.add_task(f"{prefix}, {concurrency} users", total=total)
            bar.update(tasks[level], completed=done)

        try:
            return uvloop.run(measure(url, server, plan, progress))
        except (KeyboardInterrupt, asyncio.CancelledError):
            raise typer.Exit(INTERRUPTED) from None  # before there was anything to tell


def _write(report: Report, wanted: _Wanted) -> None:
    """The files that were asked for. Raises OSError, and MeasureError: the levels are too few for a profile.

    After Ctrl-C it says what was written, and leaves older files alone if no level was measured to its end.
    """
    complete = sum(len(series.complete) for series in report.series)
    if report.interrupted and not complete:
        files = [file for file in (wanted.json_file, wanted.plots, wanted.profile) if file is not None]
        if files:
            said = f"interrupted before a level was measured to its end: {', '.join(map(str, files))} not written"
            typer.echo(said, err=True)
        return
    if wanted.json_file is not None:
        import orjson

        wanted.json_file.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))
        if report.interrupted:
            typer.echo(
                f"interrupted: {wanted.json_file} has {complete} whole level{'s' * (complete > 1)}", err=True
            )
    if wanted.plots is not None:
        from sim.measure.plots import write_plots

        write_plots(report, wanted.plots)
    if wanted.profile is not None:
        try:
            _write_profile(report, wanted.profile, wanted)
        except KeyboardInterrupt:
            file = wanted.json_file or "FILE.json"
            how = f"tidegate calibrate {file} --card {wanted.card} --model {report.model} -o {wanted.profile}"
            after = "" if wanted.json_file else ", after a run with --json FILE.json"
            fail(
                f"{wanted.profile} not written: the fit was interrupted; `{how}` fits it{after}", INTERRUPTED
            )


def _write_profile(report: Report, file: Path, wanted: _Wanted) -> None:
    """With a progress bar; then what is in it for `slots: auto`, and why not to believe it."""
    from rich.console import Console
    from rich.progress import Progress

    from sim.measure.fit import SEARCH, cold_capacity, to_profile
    from sim.measure.table import slots
    from sim.profile import dump_profile

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("fitting a profile", total=SEARCH.simulations)
        doubts: list[str] = []
        profile = to_profile(
            report,
            wanted.card,
            wanted.cards,
            lambda done: bar.update(task, completed=done),
            max_num_seqs=wanted.max_num_seqs,
            warn=doubts.append,
        )
    file.write_text(dump_profile(profile), encoding="utf-8")
    for doubt in doubts:
        typer.echo(doubt, err=True)
    found = cold_capacity(report)
    said = slots(found) if found else "it says no slots: measure with --ttft, --tpot or --tokens-per-s"
    typer.echo(f"profile {profile.name} written to {file}; {said}", err=True)
