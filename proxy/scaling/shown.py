"""Standbys as `/state`, `GET /standbys` and the metrics show them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from policies.standby import State
from proxy.scaling.journal import UNTIL_STOPPED
from proxy.scaling.keeper import Keeper
from proxy.scaling.manager import Scaling


def standbys(scaling: Scaling) -> list[dict[str, Any]]:
    """One object for each, in the order of the configuration; those last that are no longer in it."""
    return [_standby(scaling, keeper) for keeper in scaling.keepers.values()]


def _standby(scaling: Scaling, keeper: Keeper) -> dict[str, Any]:
    standby, pin = keeper.standby, keeper.kept.pin
    backend = scaling.around.fleet.backends.get(keeper.name)
    return {
        "name": keeper.name,
        "site": keeper.config.site,
        "models": list(keeper.config.models),
        "provider": keeper.terms.kind,
        "state": str(keeper.state),
        "since_s": round(keeper.in_state_s, 3),
        "reason": standby.reason,
        "trouble": keeper.trouble,
        "detail": keeper.detail,
        "progress": keeper.progress,
        "run": standby.run,
        "plan": standby.plan,
        "failures": standby.failures,
        "pause_s": round(keeper.pause_s, 3),
        "pinned": keeper.pinned,
        "pinned_until": pin if keeper.pinned and pin != UNTIL_STOPPED else None,
        "in_flight": backend.in_flight if backend is not None else 0,
        "cold_start_s": round(keeper.kept.cold_start_s, 3) or None,
        "cost_per_hour": keeper.terms.cost_per_hour,
        "cost": scaling.hours.cost.get(keeper.name, 0.0) / 1e9,
    }


def moves(scaling: Scaling, name: str) -> list[dict[str, Any]]:
    """What has become of one, oldest first."""
    return [asdict(move) for move in tuple(scaling.journal.moves) if move.name == name]


def families(scaling: Scaling | None) -> Iterator[Metric]:
    """Its metrics; empty ones without standbys."""
    keepers = [] if scaling is None else list(scaling.keepers.values())
    states = GaugeMetricFamily(
        "tidegate_standby_state", "1: the standby is in this state.", labels=["standby", "state"]
    )
    cost = CounterMetricFamily(
        "tidegate_capacity_cost", "Cost of hours of capacity, in the ledger's currency.", labels=["standby"]
    )
    for keeper in keepers:
        for state in State:
            states.add_metric([keeper.name, str(state)], float(keeper.state is state))
    counts = CounterMetricFamily(
        "tidegate_standby_moves", "Moves of standbys between states.", labels=["standby", "event"]
    )
    starts = HistogramMetricFamily(
        "tidegate_standby_start_seconds",
        "From the start of a standby to its first answer.",
        labels=["standby"],
    )
    held = 0
    if scaling is not None:
        for key, count in scaling.moves.items():
            counts.add_metric(list(key), count)
        for name, histogram in scaling.starts.items():
            starts.add_metric([name], histogram.buckets(), histogram.sum)
        for name, nano in scaling.hours.cost.items():
            cost.add_metric([name], nano / 1e9)
        held = sum(count for _, count, _ in scaling.around.valve.waiting_for_standbys())
    yield states
    yield counts
    yield starts
    yield cost
    yield GaugeMetricFamily(
        "tidegate_held_for_standby", "Requests that wait and that only a standby may serve.", value=held
    )
    yield GaugeMetricFamily(
        "tidegate_standby_journal_failed",
        "1: moves of standbys cannot be written, so that none is started or stopped.",
        value=float(scaling is not None and bool(scaling.trouble)),
    )
