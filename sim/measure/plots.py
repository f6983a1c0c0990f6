"""The report as figures: those of the white paper's chapter 3, over concurrency. Needs the extra `plot`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from sim.measure.level import Level
from sim.measure.sweep import Report

PAPER_TOKENS_PER_S = 15.0
"""For each user: the SLA of the white paper's table 3-2."""


class _Plot(NamedTuple):
    file: str
    title: str
    unit: str
    value: Callable[[Level], float | None]


_PLOTS = (
    _Plot("throughput.png", "Output throughput", "tokens/s", lambda level: level.output_tokens_per_s),
    _Plot(
        "throughput_per_user.png",
        "Output throughput for each user",
        "tokens/s",
        lambda level: level.output_tokens_per_s_per_user,
    ),
    _Plot("ttft.png", "Mean TTFT", "s", lambda level: level.ttft_s.mean if level.ttft_s else None),
    _Plot("tpot.png", "Mean TPOT", "ms", lambda level: 1000 * level.tpot_s.mean if level.tpot_s else None),
)


def write_plots(report: Report, folder: Path) -> list[Path]:
    """Write four PNG files into a folder,, which is made. -> their paths. Raises ImportError and OSError."""
    from matplotlib.figure import Figure

    folder.mkdir(exist_ok=True)
    written = []
    for plot in _PLOTS:
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for series in report.series:
            points = [(level.concurrency, plot.value(level)) for level in series.complete if level.completed]
            known = [(users, value) for users, value in points if value is not None]
            axes.plot(
                [users for users, _ in known],
                [value for _, value in known],
                marker="o",
                label=str(series.prefix),
            )
        if plot.file == "throughput_per_user.png":
            sla = report.plan.sla
            least = sla.tokens_per_s if sla and sla.tokens_per_s else PAPER_TOKENS_PER_S
            axes.axhline(least, color="grey", linestyle="--", label=f"{least:g} tokens/s")
        axes.set(
            title=f"{plot.title}: {report.model}",
            xlabel="concurrency",
            ylabel=plot.unit,
            xlim=(0, None),
            ylim=(0, None),
        )
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
        path = folder / plot.file
        figure.savefig(path, dpi=120)
        written.append(path)
    return written
