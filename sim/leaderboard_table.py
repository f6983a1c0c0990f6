"""A leaderboard as a person reads it at a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite

from rich.console import Console, Group
from rich.table import Table

from sim.intervals import Estimate
from sim.leaderboard import Board, Standing

UNBOUNDED = 10_000
"""Columns that no table needs."""
UNKNOWN = "unknown"
FAILS = "(fails)"
"""Behind a policy in whose stead some choices were made: its figures are not all its own."""
NEVER = "never"
"""For a quantile that stands at a request which was never answered."""

_COLUMNS = (
    *("goodput\nrequests/s", "behind\nthe best", "in SLA"),
    *("TTFT s\np50", "\np95", "\np99"),
    *("TPOT ms\np50", "\np95", "\np99"),
    *("total s\np50", "\np95", "\np99"),
    *("spill", "rejected", "failed", "cost", "gCO2", "fairness"),
)


def shown(board: Board, standings: Sequence[Standing]) -> str:
    """A table for each speed, and under them what has to be known of the figures. As wide as the figures are, even
    where the terminal is not: what is cut off is lost."""
    tables = [_table([one for one in standings if one.speed == speed], speed) for speed in _speeds(standings)]
    wide = Console(width=UNBOUNDED)
    with wide.capture() as captured:
        wide.print(Group(*tables))
    return "".join(f"{line.rstrip()}\n" for line in (*captured.get().splitlines(), *notes(board, standings)))


def _speeds(standings: Sequence[Standing]) -> list[float]:
    return list(dict.fromkeys(one.speed for one in standings))


def _table(standings: Sequence[Standing], speed: float) -> Table:
    figures = [run.figures for run in standings[0].runs]
    requests = sum(one.requests for one in figures) / len(figures)
    load = sum(one.requests / one.seconds for one in figures) / len(figures)
    title = f"speed {speed:g}: {requests:,.0f} requests, {load:.3g} a second"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, collapse_padding=True)
    table.add_column("policy", no_wrap=True)
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for one in standings:
        table.add_row(f"{one.policy} {FAILS}" if _fails(one) else one.policy, *_cells(one))
    return table


def _fails(one: Standing) -> bool:
    failures = one.of("policy_failures")
    return failures is not None and failures.mean > 0.0


def _cells(one: Standing) -> Iterator[str]:
    yield _with_interval(one.of("goodput_rps"), 2)
    yield _with_interval(one.behind, 2) if one.behind is not None else ""
    yield _share(one.of("met"))
    for time, factor, digits in (("ttft_s", 1.0, 2), ("tpot_s", 1e3, 1), ("total_s", 1.0, 1)):
        for share in ("p50", "p95", "p99"):
            yield _mean(one.of(f"{time}.{share}"), digits, factor)
    for name in ("spill", "rejected", "failed"):
        yield _share(one.of(name))
    unpriced = one.of("unpriced")
    cost = _mean(one.of("cost"), 3)
    if unpriced is not None and unpriced.mean > 0.0:
        cost = UNKNOWN if unpriced.mean == 1.0 else f">={cost}"
    yield cost
    yield _mean(one.of("gco2"), 0)
    yield _mean(one.of("fairness"), 3)


def _with_interval(found: Estimate | None, digits: int) -> str:
    text = _mean(found, digits)
    if found is None or found.half_width is None:
        return text
    return f"{text} ±{found.half_width:.{digits}f}"


def _mean(found: Estimate | None, digits: int, factor: float = 1.0) -> str:
    if found is None:
        return UNKNOWN
    return f"{found.mean * factor:.{digits}f}" if isfinite(found.mean) else NEVER


def _share(found: Estimate | None) -> str:
    return UNKNOWN if found is None else f"{found.mean:.1%}"


def notes(board: Board, standings: Sequence[Standing]) -> Iterator[str]:
    """What the figures are, and what they lack."""
    sla, traffic = board.cluster.sla, board.traffic
    level = f"TTFT {sla.ttft:g} s and TPOT {sla.tpot * 1e3:g} ms"
    yield f"goodput: whole answers within {level}; what was rejected or failed is a miss"
    counts = sorted({len(one.seeds) for one in standings})
    seeds = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    many = f"means of {seeds} seeds ({traffic.seeds_in_words}), ± 95 %"
    yield many if counts[-1] > 1 else f"one seed ({traffic.seeds_in_words}): no interval can be told"
    contexts = {one.section.name: one.profile.limits.max_model_len for one in board.cluster.backends}
    yield "context, tokens: " + ", ".join(f"{name} {tokens}" for name, tokens in contexts.items())
    used = [one for one in standings if (found := one.of("unpriced")) is not None and found.mean > 0.0]
    if used:
        without = {one.section.name for one in board.cluster.backends if one.section.price is None}
        yield f"cost: {', '.join(sorted(without))} without a price; what it served is not in it"
    if any(one.of("gco2") is None for one in standings):
        yield f"carbon unknown: {', '.join(_without_carbon(board))}"
    if unmet := {one.policy: one.unmet_rules for one in standings if one.unmet_rules}:
        for policy, rules in unmet.items():
            what = "rule" if len(rules) == 1 else "rules"
            yield f"{policy}: no request met its {what} {', '.join(rules)}"
        yield "tenants, labels, data classes and priorities are the trace's: a workload of your own can have them"
    for one in standings:
        failures = one.of("policy_failures")
        if failures is not None and failures.mean > 0.0:
            said = next(run.last_failure for run in one.runs if run.last_failure)
            yield (
                f"{one.policy} failed in {failures.mean:.0f} calls at speed {one.speed:g}, and the least loaded "
                f"backend was taken instead: {said}"
            )


def _without_carbon(board: Board) -> Iterator[str]:
    for section, one in {one.section.name: one for one in board.cluster.backends}.items():
        missing = [
            what
            for what, value in (
                ("watts", one.watts),
                (f"carbon of site {one.section.site}", one.site.carbon_gco2_kwh),
            )
            if value is None
        ]
        if missing:
            yield f"{section} has no {' and no '.join(missing)}"
