"""A leaderboard as pictures. Needs the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from sim.leaderboard import Board, Standing


def write_plots(board: Board, standings: Sequence[Standing], folder: Path) -> list[Path]:
    """Write three PNG files into a folder, which is made. -> their paths. Raises ImportError and OSError."""
    folder.mkdir(exist_ok=True)
    return [
        _goodput(standings, folder / "goodput.png"),
        _ttft(board, standings, folder / "ttft.png"),
        _spill(standings, folder / "spill.png"),
    ]


def _axes(title: str, xlabel: str, ylabel: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(visible=True, alpha=0.3)
    return figure, axes


def _by_policy(standings: Sequence[Standing]) -> dict[str, list[Standing]]:
    """Of each policy, those of its speeds, the slowest first."""
    found: dict[str, list[Standing]] = {}
    for one in sorted(standings, key=lambda one: one.speed):
        found.setdefault(one.policy, []).append(one)
    return found


def _load(one: Standing) -> float:
    """Requests a second that came, the mean over seeds."""
    return sum(run.figures.requests / run.figures.seconds for run in one.runs) / len(one.runs)


def _half_width(one: Standing) -> float:
    """Of the interval of its difference from the best; 0: it is the best, or has no interval."""
    return (one.behind.half_width if one.behind is not None else None) or 0.0


def _goodput(standings: Sequence[Standing], path: Path) -> Path:
    """Bars at one speed, lines over the load at several. The intervals are of the difference from the best, seed by
    seed: those of the figures themselves overlap where seeds differ by more than policies do."""
    several = len({one.speed for one in standings}) > 1
    title = "Goodput, and 95 % intervals of the difference from the best"
    came = "requests/s that came" if several else ""
    figure, axes = _axes(title, came, "requests/s within the SLA")
    for place, (policy, of) in enumerate(_by_policy(standings).items()):
        heights = [estimate.mean for one in of if (estimate := one.of("goodput_rps")) is not None]
        errors = [_half_width(one) for one in of]
        if several:
            axes.errorbar([_load(one) for one in of], heights, errors, marker="o", capsize=3, label=policy)
        else:
            axes.bar([place], heights, yerr=errors, capsize=4)
    if several:
        axes.legend()
        axes.set(xlim=(0, None))
    else:
        policies = list(_by_policy(standings))
        best = next(one for one in standings if one.behind is None).of("goodput_rps")
        assert best is not None
        axes.axhline(best.mean, color="grey", linestyle="--")
        axes.set_xticks(range(len(policies)), policies, rotation=30, ha="right")
    axes.set(ylim=(0, None))
    figure.savefig(path, dpi=120)
    return path


def _ttft(board: Board, standings: Sequence[Standing], path: Path) -> Path:
    """At the highest speed; a line that ends below 1 is of a policy whose other requests were never answered."""
    speed = max(one.speed for one in standings)
    figure, axes = _axes(f"Time to the first token, speed {speed:g}", "TTFT, s", "share of all requests")
    for policy, of in _by_policy(standings).items():
        points = of[-1].ttft_cdf
        known = [(value, step / (len(points) - 1)) for step, value in enumerate(points) if isfinite(value)]
        axes.step([value for value, _ in known], [share for _, share in known], where="post", label=policy)
    axes.axvline(board.cluster.sla.ttft, color="grey", linestyle="--", label="SLA")
    axes.set(xscale="log", ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=120)
    return path


def _spill(standings: Sequence[Standing], path: Path) -> Path:
    """Over the load."""
    figure, axes = _axes("Spill", "requests/s that came", "share of requests to remote sites")
    for policy, of in _by_policy(standings).items():
        found = [estimate.mean for one in of if (estimate := one.of("spill")) is not None]
        axes.plot([_load(one) for one in of], found, marker="o", label=policy)
    axes.set(xlim=(0, None), ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=120)
    return path
