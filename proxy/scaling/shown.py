"""Standbys as `/state`, `GET /standbys` and the metrics show them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from policies.standby import State
from proxy.scaling.journal import UNTIL_STOPPED
from proxy.scaling.manager import Scaling


def standbys(scaling: Scaling) -> list[dict[str, Any]]:
    """One object for each, in the order of the configuration; those last that are no longer in it."""
    return [standby(scaling, name) for name in scaling.names]


def standby(scaling: Scaling, name: str) -> dict[str, Any]:
    """One of them: as its keeper has it, or as it was written, while this process does not act."""
    keeper = scaling.keepers.get(name)
    kept, section = scaling.known(name)
    one, pin, wall = kept.standby, kept.pin, scaling.around.wall()
    backend = scaling.around.fleet.backends.get(name)
    terms = section.standby
    assert terms is not None
    pinned = keeper.pinned if keeper is not None else pin == UNTIL_STOPPED or pin > wall
    return {
        "name": name,
        "site": section.site,
        "models": list(section.models),
        "provider": terms.kind,
        "state": str(one.state),
        "since_s": round(keeper.in_state_s if keeper is not None else max(wall - one.since, 0.0), 3),
        "reason": one.reason,
        "trouble": keeper.trouble if keeper is not None else scaling.idle,
        "detail": keeper.detail if keeper is not None else "",
        "progress": keeper.progress if keeper is not None else None,
        "run": one.run,
        "plan": one.plan,
        "failures": one.failures,
        "pause_s": round(keeper.pause_s if keeper is not None else one.pause_left(wall), 3),
        "pinned": pinned,
        "pinned_until": pin if pinned and pin != UNTIL_STOPPED else None,
        "in_flight": backend.in_flight if backend is not None else 0,
        "cold_start_s": round(kept.cold_start_s, 3) or None,
        "cost_per_hour": terms.cost_per_hour,
        "cost": scaling.hours.cost.get(name, 0.0) / 1e9,
    }


def moves(scaling: Scaling, name: str) -> list[dict[str, Any]]:
    """What has become of one, oldest first."""
    return [asdict(move) for move in tuple(scaling.journal.moves) if move.name == name]


def families(scaling: Scaling | None) -> Iterator[Metric]:
    """Its metrics; empty ones without standbys."""
    states = GaugeMetricFamily(
        "tidegate_standby_state", "1: the standby is in this state.", labels=["standby", "state"]
    )
    cost = CounterMetricFamily(
        "tidegate_capacity_cost", "Cost of hours of capacity, in the ledger's currency.", labels=["standby"]
    )
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
        for name in scaling.names:
            now = scaling.known(name)[0].standby.state
            for state in State:
                states.add_metric([name, str(state)], float(now is state))
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
