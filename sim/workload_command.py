"""`tidegate workload`: what is in a trace, and workloads that are made up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from sim.command_errors import error_text, fail

if TYPE_CHECKING:
    from rich.table import Table

    from sim.traces import Span
    from sim.workload import Workload
    from sim.workload_summary import Lengths, Summary

_SHOWN = 8
"""Tenants and models in the table."""


class _ShowByDefault(TyperGroup):
    """`workload FILE` is `workload show FILE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["show", *args]
        return super().parse_args(ctx, args)


workload_app = typer.Typer(
    help="Traces and made-up workloads: show what is in one (`workload FILE`), generate one.",
    cls=_ShowByDefault,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@workload_app.command("show")
def show(
    file: Annotated[Path, typer.Argument(help="A trace, plain or compressed with gzip.", dir_okay=False)],
    form: Annotated[
        str | None,
        typer.Option(
            help="azure, burstgpt, mooncake, export, servegen or workload. Default: seen from the file."
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="End at the first line that cannot be read.")
    ] = False,
    start: Annotated[str, typer.Option(help="ServeGen: where the span that is drawn starts.")] = "0s",
    duration: Annotated[str, typer.Option(help="ServeGen: how long it is.")] = "1h",
    seed: Annotated[int, typer.Option(help="ServeGen: other requests.")] = 0,
    borrow_lengths: Annotated[
        bool, typer.Option("--borrow-lengths", help="ServeGen: clients without lengths take others'.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the workload in Tidegate's own form.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw arrivals and lengths into this file: .png, .svg or .pdf.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Show what is in a trace: rate, lengths, tenants, and what a prefix cache could serve of it.

    Example: tidegate workload show trace.csv.gz --plot trace.png
    """
    from sim.traces import read_workload

    _refuse_own(file, output, plot)
    with _readable_errors(), _working("reading"):
        workload = read_workload(file, form, strict=strict, span=_span(start, duration, seed, borrow_lengths))
    if output is not None:
        _write(workload, output)
    if plot is not None:
        _plot(workload, plot)
    _print(workload, json_output)


@workload_app.command("generate")
def generate(
    spec: Annotated[
        Path, typer.Argument(help="What it is like: a YAML file, as examples/workload.yaml.", dir_okay=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write, JSON lines.")],
    seed: Annotated[int, typer.Option(help="One seed, one workload.")] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Make up a workload and show what is in it.

    Example: tidegate workload generate examples/workload.yaml -o workload.jsonl --seed 1
    """
    from rich.console import Console
    from rich.progress import Progress

    from sim.generator import generate as generated
    from sim.generator_spec import load_spec

    _refuse_own(spec, output)
    _refuse_workload(spec)
    with _readable_errors(), Progress(console=Console(stderr=True), transient=True) as bar:
        loaded = load_spec(spec)
        task = bar.add_task("generating", total=len(loaded.clients))
        workload = generated(loaded, seed, lambda done, _: bar.update(task, completed=done))
    if not len(workload):
        fail("no request came: take a higher rate or a longer duration", 1)
    _write(workload, output)
    _print(workload, json_output)


# Errors


def _refuse_workload(file: Path) -> None:
    """It is made already."""
    from sim.traces.forms import VERSION_KEY
    from sim.traces.lines import open_trace

    with _readable_errors(), open_trace(file) as lines:
        if lines.readline(256).lstrip().startswith(b'{"%s"' % VERSION_KEY.encode()):
            fail(f"{file} is a workload already: `tidegate workload show {file}` shows it")


def _refuse_own(file: Path, *outputs: Path | None) -> None:
    """What is read must not be written over."""
    for output in outputs:
        if output is not None and output.exists() and file.exists() and output.samefile(file):
            fail(f"{output} is the file that is read: give another one to write")


@contextmanager
def _readable_errors() -> Iterator[None]:
    """What a person can mend, in one line."""
    from policies.yamlfile import FileProblems

    try:
        yield
    except (OSError, FileProblems, ValueError) as error:
        fail(error_text(error))


def _span(start: str, duration: str, seed: int, borrow_lengths: bool) -> Span:
    from policies.units import typed_duration
    from sim.traces import Span

    return Span(typed_duration(start), typed_duration(duration), seed, borrow_lengths)


# What comes out


@contextmanager
def _working(what: str) -> Iterator[None]:
    """Shows on a terminal that something goes on."""
    from rich.console import Console

    with Console(stderr=True).status(f"{what} ..."):
        yield


def _write(workload: Workload, path: Path) -> None:
    from sim.traces import write_workload

    with _readable_errors(), _working("writing"), path.open("wb") as file:
        write_workload(workload, file)


def _plot(workload: Workload, path: Path) -> None:
    from sim.workload_plot import plot_workload

    try:
        with _readable_errors(), _working("drawing"):
            plot_workload(workload, path)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("matplotlib"):
            raise
        fail("--plot needs matplotlib: pip install 'tidegate[plot]'")


def _print(workload: Workload, json_output: bool) -> None:
    from rich.console import Console

    from sim.workload_summary import summarize

    summary = summarize(workload)
    if json_output:
        typer.echo(json.dumps(as_json(summary), indent=2))
        return
    Console().print(_table(summary))
    for line in summary.problems:
        typer.echo(f"left out: {line}")
    if summary.left_out > len(summary.problems):
        typer.echo(f"and {summary.left_out - len(summary.problems)} more lines that were left out")


def as_json(summary: Summary) -> dict[str, Any]:
    """Its figures under their names."""
    return {
        **asdict(summary),
        "prompt_tokens": summary.prompt_tokens._asdict(),
        "output_tokens": summary.output_tokens._asdict(),
        "prefix": summary.prefix._asdict(),
    }


def _table(summary: Summary) -> Table:
    from rich.table import Table

    table = Table(title=summary.name or None, show_header=False)
    rows = {
        "requests": f"{summary.requests:,}",
        "span": f"{summary.span_s:,.1f} s",
        "rate": f"{summary.rate_rps:.3g} requests/s",
        "CV of gaps": f"{summary.gap_cv:.2f}" if summary.requests > 2 else "needs three requests",
        "prompt tokens": _lengths(summary.prompt_tokens),
        "output tokens": _lengths(summary.output_tokens),
        "tenants": _counted(summary.tenants),
        "models": _counted(summary.models),
        "data classes": _counted(summary.data_classes),
        "sessions": f"{summary.sessions:,}",
        "closed loop": f"{summary.closed_loop:,} requests wait for an answer; here it takes no time",
        "prefix cache": f"could serve {summary.prefix.blocks:.1%} of the blocks of {summary.unit_tokens} tokens, "
        f"{summary.prefix.tokens:.1%} of the tokens"
        if summary.unit_tokens
        else "nothing is known of shared prompts",
        "lines left out": f"{summary.left_out:,}" + _missing(summary),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _missing(summary: Summary) -> str:
    share = f", and with them about {summary.missing:,} requests, {summary.missing_share:.0%} of the load"
    return share if summary.missing else ""


def _lengths(lengths: Lengths) -> str:
    return (
        f"mean {lengths.mean:,.0f}, p50 {lengths.p50:,.0f}, p95 {lengths.p95:,.0f}, p99 {lengths.p99:,.0f}, "
        f"max {lengths.max:,}"
    )


def _counted(counts: dict[str, int]) -> str:
    named = [f"{name or 'any'} {count:,}" for name, count in list(counts.items())[:_SHOWN]]
    more = len(counts) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")
