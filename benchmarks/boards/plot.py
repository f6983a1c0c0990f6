"""Leaderboards as one picture: goodput with intervals, and the tail of the first token. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path

from sim.leaderboard import Standing


def plot(shown: Mapping[str, Sequence[Standing]], path: Path) -> None:
    """Standings by name of leaderboard, the best first. Raises ModuleNotFoundError and OSError."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    most = max(len(standings) for standings in shown.values())
    figure = Figure(figsize=(10, max(0.24 * most + 1.2, 2.5) * len(shown)), layout="constrained")
    grid = figure.subplots(len(shown), 2, squeeze=False)
    for (name, standings), (goodput, ttft) in zip(shown.items(), grid, strict=True):
        policies = [one.policy for one in standings]
        places = range(len(standings))
        met = [one.of("met") for one in standings]
        goodput.barh(
            places,
            [100 * one.mean if one else 0.0 for one in met],
            xerr=[100 * (one.half_width or 0.0) if one else 0.0 for one in met],
            color="tab:blue",
            capsize=2,
        )
        goodput.set(xlim=(0, 100), xlabel="requests within the SLA, %; 95 % intervals", title=name)
        for quantile, marker in (("p50", "|"), ("p95", "o"), ("p99", ">")):
            found = [one.of(f"ttft_s.{quantile}") for one in standings]
            points = [(one.mean, at) for at, one in enumerate(found) if one and isfinite(one.mean)]
            if points:
                ttft.plot(*zip(*points, strict=True), marker, label=quantile)
        ttft.set(xscale="log", xlabel="TTFT of all requests, s (none: never)", title=name)
        ttft.xaxis.set_minor_formatter(NullFormatter())
        ttft.legend(fontsize="small")
        for axes in (goodput, ttft):
            axes.set_yticks(places, policies, fontsize="small")
            axes.set_ylim(len(standings) - 0.4, -0.6)
            axes.grid(visible=True, axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
