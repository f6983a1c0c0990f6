"""A picture of capacity against demand, over days. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sim.autoscale import Sample

_POINTS = 2000


def plot_capacity(samples: Sequence[Sample], path: Path, title: str) -> None:
    """Draw them into a file; its ending says its form.

    Raises ModuleNotFoundError without matplotlib, OSError, and ValueError for an ending it does not know.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots()
    stride = max(len(samples) // _POINTS, 1)
    parts = [samples[at : at + stride] for at in range(0, len(samples), stride)]
    unit, width = ("days", 86400.0) if samples and samples[-1].at_s > 2 * 86400.0 else ("hours", 3600.0)
    at = [part[0].at_s / width for part in parts]
    ready = [max(one.capacity for one in part) for part in parts]
    coming = [max(one.capacity + one.coming for one in part) for part in parts]
    axes.fill_between(at, coming, step="post", color="tab:orange", alpha=0.35, label="starting", linewidth=0)
    axes.fill_between(at, ready, step="post", color="tab:blue", alpha=0.35, label="capacity", linewidth=0)
    demand = [max(one.demand for one in part) for part in parts]
    axes.plot(at, demand, color="black", linewidth=0.8, label="demand")
    axes.set(xlabel=unit, ylabel="tokens", title=title, ylim=(0, None))
    axes.margins(x=0)
    axes.legend(loc="upper left", fontsize="small")
    figure.savefig(path, dpi=120)
