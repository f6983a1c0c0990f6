"""The picture of case 4.2: cost against latency of each policy, and both over the load. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.case_4_2.verdict import COST_CUT, LATENCY_CUT, Verdict, box_hour


def plot(
    verdicts: Sequence[Verdict],
    boxes: float,
    alone_s: float,
    curves: Mapping[str, Mapping[float, float]],
    path: Path,
) -> None:
    """`curves`: mean seconds by load, a multiple of what the box serves alone, of each of several policies.

    Raises ModuleNotFoundError without matplotlib, and OSError.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    frontier, loads = figure.subplots(1, 2, width_ratios=(3, 2))
    _frontier(figure, frontier, verdicts, boxes, alone_s)
    for name, curve in curves.items():
        loads.plot(list(curve), list(curve.values()), "o-", label=name)
    loads.set(
        xlabel="load in the peak hour, multiples of what the box serves alone",
        ylabel="mean seconds from arrival to last token",
        yscale="log",
    )
    loads.legend(fontsize="small")
    loads.grid(visible=True, alpha=0.3, which="both")
    figure.savefig(path, dpi=120)


def _frontier(figure: Any, axes: Any, verdicts: Sequence[Verdict], boxes: float, alone_s: float) -> None:
    """Colours are spill shares, filled are those that serve the load within the SLA."""
    costs = [box_hour() + one.tokens_per_hour for one in verdicts]
    dots = None
    for marker, within in (("o", True), ("X", False)):
        at = [place for place, one in enumerate(verdicts) if one.keeps_throughput == within]
        if at:
            dots = axes.scatter(
                [verdicts[place].mean_s for place in at],
                [costs[place] for place in at],
                c=[100 * verdicts[place].spill_day for place in at],
                vmin=0, vmax=100, marker=marker, s=60, cmap="viridis",
                label="load within the SLA" if within else "SLA missed",
            )  # fmt: skip
    for one, cost in zip(verdicts, costs, strict=True):
        axes.annotate(one.policy, (one.mean_s, cost), fontsize=7, xytext=(4, 3), textcoords="offset points")
    axes.axhline(
        (1 - COST_CUT) * boxes * box_hour(), linestyle="--", color="tab:red", label="half of the boxes' cost"
    )
    edge = (1 - LATENCY_CUT) * alone_s
    if edge < 2 * max(one.mean_s for one in verdicts):
        axes.axvline(edge, linestyle=":", color="tab:red", label="latency of the box alone -40 %")
    axes.set(
        xlabel="mean seconds from arrival to last token, peak hour",
        ylabel="dollars an hour: the box and paid tokens, over the day",
    )
    axes.legend(fontsize="small")
    axes.grid(visible=True, alpha=0.3)
    if dots is not None:
        figure.colorbar(dots, ax=axes, label="spilled over the day, %")
