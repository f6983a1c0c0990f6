"""`tidegate calibrate`: from measured times to a profile."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from policies.profile import Limits
    from sim.calibrate import Calibration, Search
    from sim.timings import Level, Timing


def calibrate(
    measured: Annotated[
        Path, typer.Argument(help="Measured requests, or a sweep: JSONL or CSV, also .gz.", dir_okay=False)
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
        typer.Option(help="Tokens in its KV cache, as vLLM logs at start. Default: never full.", min=16),
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(help="vLLM's option of this name.", min=1)] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option(help="vLLM's option of this name.", min=1)] = 2048,
    max_model_len: Annotated[int, typer.Option(help="Longest prompt plus answer, tokens.", min=1)] = 8192,
    prefix_cache: Annotated[bool, typer.Option(help="Whether it had a prefix cache.")] = True,
    test_half: Annotated[
        bool,
        typer.Option(help="Fit to the first half of the requests and test on the second; not for sweeps."),
    ] = True,
    overhead: Annotated[
        bool, typer.Option("--overhead", help="Fit the time outside the engine too: for times of a client.")
    ] = False,
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
    of a concurrency sweep (concurrency, prompt_tokens, output_tokens, ttft_s, tpot_s).

    Example: tidegate calibrate timings.csv --card L40 --model Qwen3-32B --kv-tokens 41408 -o l40.yaml
    """
    from pydantic import ValidationError
    from rich.console import Console

    from policies.profile import Limits, Origin, Profile, Source
    from sim.calibrate import Search
    from sim.profile import dump_profile
    from sim.timings import read_measured

    if published and not source:
        _fail("--published needs --source: who measured it")
    origin = Origin.PUBLISHED if published else Origin.MEASURED
    said = f"{source}; " if source else ""
    search = Search(starts, evaluations, seed, overhead)
    limits = Limits(
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        kv_tokens=kv_tokens,
        max_model_len=max_model_len,
        prefix_cache=prefix_cache,
        source=Source(origin=origin, text=f"{said}options of the engine behind {measured.name}"),
    )
    try:
        rows = read_measured(measured)
    except (OSError, ValueError) as error:
        _fail(_in_words(error))
    try:
        found = _search(rows, limits, search, test_half=test_half)
    except ValueError as error:
        _fail(f"{measured}: {error}")
    console = Console()
    console.print(coefficients(found))
    console.print(errors(found))
    if output is None:
        return
    text = said + in_words(found, measured.name, search)
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
        )
        output.write_text(dump_profile(profile), encoding="utf-8")
    except ValidationError as error:
        problem = error.errors()[0]
        _fail(f"--{problem['loc'][0]}: {problem['msg'][:1].lower()}{problem['msg'][1:]}")
    except OSError as error:
        _fail(_in_words(error))
    typer.echo(f"profile {profile.name} written to {output}", err=True)


def coefficients(found: Calibration) -> Table:
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
    table.caption = "From one load they only hold together; several load levels tell them apart."
    return table


def errors(found: Calibration) -> Table:
    """How far the simulation is from what was measured, on the fit half and on the test half."""
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


def in_words(found: Calibration, file: str, search: Search) -> str:
    """What it was fitted to, how, and how well: the source in a profile."""
    from sim.calibrate import METRICS

    of = f" of {found.fit.count + found.test.count}, the first to arrive" if found.test else ""
    terms = "TTFT + " if search.overhead else ""
    told = (
        f"fitted to {found.fit.count} rows{of}, of {file}; loss: mean |ln(simulated/measured)| of "
        f"{terms}TPOT + E2E = {found.loss:.4f}; CMA-ES, {search.starts} starts of {search.evaluations} "
        f"simulations, seed {search.seed}"
    )
    if found.test is None:
        return told
    means = ", ".join(
        f"{metric} {value:+.1%}" for metric, value in zip(METRICS, found.test.mean, strict=True)
    )
    return f"{told}; error of the means of the other {found.test.count}: {means}"


def _search(
    rows: list[Timing] | list[Level], limits: Limits, search: Search, *, test_half: bool
) -> Calibration:
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


def _in_words(error: OSError | ValueError) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror[:1].lower()}{error.strerror[1:]}"
    return str(error)


def _fail(message: str) -> NoReturn:
    typer.echo(f"tidegate: {message}", err=True)
    raise typer.Exit(2)
