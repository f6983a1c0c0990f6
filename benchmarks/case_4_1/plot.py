"""The picture of case 4.1: report times by users, and why they are what they are. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PAPER = {
    "local only, white paper": ((1, 60, 100), (42, 72, 300), "tab:red"),
    "remote sites, white paper": ((60, 100), (45, 75), "tab:green"),
}
COLOURS = {"local only": "tab:red", "never-full cache": "tab:grey", "Tidegate": "tab:green"}


def plot(curves: Mapping[str, Sequence[Any]], runs: Mapping[str, Sequence[Any]], path: Path) -> None:
    """`curves`, simulated, and `runs`, measured: `Figures` by what they are of (a key of `COLOURS`).

    Raises ModuleNotFoundError without matplotlib, and OSError.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    times, why = figure.subplots(1, 2)
    for name, curve in curves.items():
        users = [one.users for one in curve]
        times.plot(users, [one.mean_s for one in curve], color=COLOURS[name], label=f"{name}, simulated")
    for name, points in runs.items():
        users = [one.users for one in points]
        means = [one.mean_s for one in points]
        above = [max(one.p95_s - one.mean_s, 0.0) for one in points]
        times.errorbar(
            users, means, yerr=([0.0] * len(points), above), fmt="o", color=COLOURS[name], capsize=3,
            label=f"{name}, measured (bar: to p95)",
        )  # fmt: skip
    for name, (levels, seconds, colour) in PAPER.items():
        times.plot(levels, seconds, "x", color=colour, markersize=9, label=name)
    times.set(xlabel="reports at once", ylabel="seconds a report", yscale="log")
    times.set_yticks([30, 50, 100, 200, 300], ["30", "50", "100", "200", "300"])
    times.minorticks_off()
    times.legend(fontsize="small")
    local = curves["local only"]
    users = [one.users for one in local]
    why.plot(
        users,
        [100 * one.cached for one in local],
        color="tab:blue",
        label="prompt tokens found in the cache, %",
    )
    why.plot(
        users,
        [100 * one.preemptions for one in local],
        color="tab:orange",
        label="preemptions in 100 reports",
    )
    why.set(xlabel="reports at once", ylim=(0, 100), title="the appliance alone, simulated")
    why.legend(fontsize="small")
    figure.savefig(path, dpi=120)
