"""A picture of a workload: arrivals over time, and how long prompts and answers are. Needs matplotlib."""

from __future__ import annotations

from math import ceil, log10
from pathlib import Path

from sim.workload import Workload

_BARS = 120
_UNITS = (("days", 86_400), ("hours", 3600), ("minutes", 60), ("seconds", 1))


def plot_workload(workload: Workload, path: Path) -> None:
    """Draw a workload that has requests into a file; its ending says its form.

    Raises ModuleNotFoundError without matplotlib, OSError, and ValueError for an ending it does not know.
    """
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    figure.suptitle(f"{workload.name}: {len(workload)} requests")
    axes = figure.subplot_mosaic([["time", "time"], ["prompt", "output"]])
    seconds = np.array([arrival.at for arrival in workload]) / 1e6
    end = max(float(seconds[-1]), 1.0)
    unit, width = next((unit, width) for unit, width in _UNITS if end >= 3 * width or width == 1)
    edges = np.linspace(0.0, end, _BARS + 1)
    counts, _ = np.histogram(seconds, edges)
    axes["time"].stairs(counts / np.diff(edges), edges / width, fill=True)
    axes["time"].set(xlabel=f"time, {unit}", ylabel="requests/s")
    lengths = {
        "prompt": [arrival.prompt_tokens for arrival in workload],
        "output": [arrival.output_tokens for arrival in workload],
    }
    for name, values in lengths.items():
        axes[name].hist(values, bins=np.logspace(0, ceil(log10(max(values) + 1)), 50).tolist())
        axes[name].set(xlabel=f"{name}, tokens", ylabel="requests", xscale="log")
    figure.savefig(path, dpi=120)
