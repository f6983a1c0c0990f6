"""`tidegate simulate --autoscale`: standbys over days of traffic, their hours, costs and answers in time."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer

from sim.command_errors import fail
from sim.evaluate_options import policies_of, readable_errors, show_warnings

if TYPE_CHECKING:
    from policies.scaling import Controller
    from sim.autoscale import Autoscaled, Scaler, Tally
    from sim.cluster_file import ClusterFile
    from sim.evaluate import PolicyText
    from sim.workload import Workload

LEAST_WIDTH: Final = 110
"""Characters of the table."""


def show(
    file: Path, trace: Path, policy: str, seed: int, plot: Path | None = None, *, as_json: bool = False
) -> None:
    """Simulate, and print what it was like."""
    from rich.console import Console
    from rich.progress import Progress

    from sim.cluster_file import read_cluster
    from sim.traffic import read_traffic

    if plot is not None:
        if not plot.absolute().parent.is_dir():
            fail(f"--plot {plot}: there is no folder {plot.parent} for it")
        if find_spec("matplotlib") is None:
            fail("--plot needs matplotlib: pip install 'tidegate[plot]'")
    console = Console(stderr=True)
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    with readable_errors(), bar:
        cluster = read_cluster(file)
        if all(one.section.standby is None for one in cluster.backends):
            fail(f"{file}: no backend has a `standby` section, so there is nothing to start and stop")
        (text,) = policies_of([policy])
        show_warnings([text], cluster.known)
        traffic = read_traffic(trace)
        traffic.resamples = False
        workload = traffic.workload(seed)
        task = bar.add_task(f"simulating {workload.name}", total=len(workload))
        found = autoscale(
            cluster, text, workload, seed=seed, progress=lambda done: bar.update(task, completed=done)
        )
    if as_json:
        typer.echo(json.dumps(as_dict(found, cluster), indent=2, allow_nan=False))
    else:
        _print(found, cluster)
    if plot is not None:
        from sim.autoscale_plot import plot_capacity

        with readable_errors():
            plot_capacity(found.samples, plot, workload.name)


def autoscale(
    cluster: ClusterFile,
    policy: PolicyText,
    workload: Workload,
    *,
    seed: int = 0,
    scaler: Scaler | None = None,
    epoch: float = 0.0,
    progress: Callable[[int], None] | None = None,
) -> Autoscaled:
    """Play a workload on a cluster with standbys. `scaler`: in place of the controller that its file describes.

    Raises FileProblems for the policy, ValueError for the workload.
    """
    from policies.files import read_policy
    from sim.autoscale import Autoscaled, StandbyTerms

    terms = {}
    prices = {}
    for one in cluster.backends:
        section = one.section.standby
        if section is not None:
            terms[one.name] = StandbyTerms(
                section.prepare,
                section.cold_start,
                section.stop,
                section.drain,
                section.min_on,
                section.min_off,
                section.cost_per_hour,
            )
        prices[one.name] = one.section.price

    def cost(name: str, prompt: int, cached: int, completion: int) -> float | None:
        price = prices[name]
        if price is None:
            return None
        of_cached = price.input if price.cached_input is None else price.cached_input
        return ((prompt - cached) * price.input + cached * of_cached + completion * price.output) / 1e6

    rules = read_policy(policy.text, policy.name, cluster.known, seed).rules
    found = Autoscaled(
        cluster.members(workload.unit_tokens),
        rules,
        terms,
        scaler or controller_of(cluster),
        sla=(cluster.sla.ttft, cluster.sla.tpot),
        cost=cost,
        seed=seed,
        epoch=epoch,
    )
    found.run(workload, progress)
    found.finish()
    return found


def controller_of(cluster: ClusterFile) -> Controller:
    """As its file describes it."""
    from policies.scaling import Controller

    return Controller(cluster.scaling.settings)


def as_dict(found: Autoscaled, cluster: ClusterFile) -> dict[str, Any]:
    """For JSON."""
    from sim.autoscale import totals

    end = found.now / 1e6
    return {
        "currency": cluster.currency,
        "total": _figures(found, cluster, totals(found.days.values()), 0.0, inf),
        "days": [
            {"day": day + 1, **_figures(found, cluster, tally, day * 86400.0, (day + 1) * 86400.0)}
            for day, tally in sorted(found.days.items())
        ],
        "standbys": [
            {"name": name, "hours": found.hours(name), "runs": standby.runs}
            for name, standby in found.standbys.items()
        ],
        "moves": [
            {
                "at_s": move.wall - found.began,
                "name": move.name,
                "before": move.before,
                "event": move.event,
                "after": move.after,
                "reason": move.reason,
            }
            for move in found.moves
        ],
        "seconds": end,
    }


def _figures(
    found: Autoscaled, cluster: ClusterFile, tally: Tally, first_s: float, end_s: float
) -> dict[str, Any]:
    from sim.evaluate import quantiles

    hours = gpu_hours = hour_cost = 0.0
    unpriced = 0.0
    for one in cluster.backends:
        if one.section.standby is None:
            continue
        on = found.hours(one.name, first_s, end_s)
        hours += on
        gpu_hours += on * one.profile.cards
        if one.section.standby.cost_per_hour is None:
            unpriced += on
        else:
            hour_cost += on * one.section.standby.cost_per_hour
    ttft = quantiles(tally.ttft_s)
    return {
        "requests": tally.requests,
        "within_sla": tally.attainment,
        "ttft_s": {name: value if isfinite(value) else None for name, value in ttft._asdict().items()},
        "rejected": tally.rejected,
        "failed": tally.failed,
        "hours": hours,
        "gpu_hours": gpu_hours,
        "hours_without_a_price": unpriced,
        "cost_of_hours": hour_cost,
        "cost_of_tokens": tally.token_cost,
        "cost": hour_cost + tally.token_cost,
        "answers_without_a_price": tally.unpriced,
    }


def _print(found: Autoscaled, cluster: ClusterFile) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sim.leaderboard_table import NEVER

    shown = as_dict(found, cluster)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    currency = f" {cluster.currency}" if cluster.currency else ""
    for title in (
        "day",
        "requests",
        "within SLA",
        "TTFT p50 s",
        "p99",
        "rejected",
        "failed",
        "GPU-hours",
        f"hours{currency}",
        f"tokens{currency}",
        f"cost{currency}",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for row in [*shown["days"], {"day": "all", **shown["total"]}]:
        ttft = [
            NEVER if row["ttft_s"][name] is None else f"{row['ttft_s'][name]:.3g}" for name in ("p50", "p99")
        ]
        table.add_row(
            str(row["day"]),
            f"{row['requests']:,}",
            f"{row['within_sla']:.2%}",
            *ttft,
            f"{row['rejected']:,}",
            f"{row['failed']:,}",
            f"{row['gpu_hours']:,.1f}",
            *(f"{row[name]:,.2f}" for name in ("cost_of_hours", "cost_of_tokens", "cost")),
        )
    console = Console()
    console.width = max(console.width, LEAST_WIDTH)  # a figure that is cut says nothing
    console.print(table)
    total = shown["total"]
    if total["hours_without_a_price"]:
        console.print(
            Text(f"note: {total['hours_without_a_price']:,.1f} hours have no price: give `cost_per_hour`")
        )
    if total["answers_without_a_price"]:
        count = total["answers_without_a_price"]
        console.print(Text(f"note: {count:,} answers came from backends without a price"))
