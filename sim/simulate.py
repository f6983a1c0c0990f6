"""What the past would have been under another policy: one workload, and each policy file simulated over it.

`figures` are few on purpose: those that the ledger has as well, so that what was stands beside what is simulated.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np

from policies.files import KnownNames, read_policy
from policies.profile import Profile
from policies.state import Backend
from sim.cluster import Cluster
from sim.from_ledger import Served
from sim.members import Member
from sim.profile import engine_settings
from sim.router import End
from sim.trips import Trip
from sim.workload import Workload

PERCENTILES: Final = (50, 95, 99)
Cost = Callable[[str, str, int, int, int], int | None]
"""Of a backend, a model, prompt tokens, those that were cached, and answer tokens: nano-units; None: unknown."""

_ENDS: Final = {End.OK: "ok", End.REJECTED: "rejected", End.GONE: "gone"}


@dataclass(frozen=True, slots=True)
class Figures:
    """How a number of requests went. Times are seconds."""

    requests: int
    goodput: float | None
    """Share of the streams, refused and failed ones included, that met the service level; None: none was given."""
    ttft: tuple[float, ...] | None
    """At `PERCENTILES`, from the arrival at the router, of streams; None: there were none."""
    tpot: tuple[float, ...] | None
    sites: Mapping[str, float]
    """Share of the requests that reached a site, by site."""
    spill: float | None
    """Share of them that left `local`."""
    cost_nano: int
    unpriced: int
    """Complete answers without a price: what they cost is missing in `cost_nano`."""
    rejected: int
    failed: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""

        def at(values: tuple[float, ...] | None) -> dict[str, float] | None:
            return None if values is None else {f"p{p}": v for p, v in zip(PERCENTILES, values, strict=True)}

        return {
            "requests": self.requests,
            "goodput": self.goodput,
            "ttft_s": at(self.ttft),
            "tpot_s": at(self.tpot),
            "sites": dict(self.sites),
            "spill_share": self.spill,
            "cost": self.cost_nano / 1e9,
            "unpriced": self.unpriced,
            "rejected": self.rejected,
            "failed": self.failed,
        }


def figures(served: Iterable[Served], ttft_s: float | None = None, tpot_s: float | None = None) -> Figures:
    """`ttft_s`, `tpot_s`: the service level, at most."""
    rows = list(served)
    streams = [one for one in rows if one.stream]
    reached = Counter(one.site for one in rows if one.site)
    there = reached.total()
    has_level = ttft_s is not None or tpot_s is not None
    met = sum(one.outcome == "ok" and _meets(one, ttft_s, tpot_s) for one in streams)
    judged = sum(one.outcome != "gone" for one in streams)
    outcomes = Counter(one.outcome for one in rows)
    return Figures(
        len(rows),
        met / judged if has_level and judged else None,
        _percentiles([one.ttft_s for one in streams if one.ttft_s is not None]),
        _percentiles([one.tpot_s for one in streams if one.tpot_s is not None]),
        {site: count / there for site, count in sorted(reached.items())},
        1.0 - reached["local"] / there if there else None,
        sum(one.cost_nano or 0 for one in rows),
        sum(one.cost_nano is None and one.outcome == "ok" for one in rows),
        outcomes["rejected"],
        outcomes["failed"],
    )


def by_day(served: Sequence[Served]) -> dict[str, list[Served]]:
    """By day of their arrival, UTC: `2026-11-27`."""
    days: defaultdict[str, list[Served]] = defaultdict(list)
    for one in served:
        days[datetime.fromtimestamp(one.at, UTC).date().isoformat()].append(one)
    return dict(sorted(days.items()))


def _meets(one: Served, ttft_s: float | None, tpot_s: float | None) -> bool:
    """An answer of one token has no TPOT to miss."""
    return (ttft_s is None or (one.ttft_s is not None and one.ttft_s <= ttft_s)) and (
        tpot_s is None or one.tpot_s is None or one.tpot_s <= tpot_s
    )


def _percentiles(values: list[float]) -> tuple[float, ...] | None:
    return tuple(np.percentile(values, PERCENTILES).tolist()) if values else None


@dataclass(frozen=True, slots=True)
class Hardware:
    """One backend as it is simulated."""

    profile: Profile
    rtt_s: float


@dataclass(frozen=True, slots=True)
class Run:
    """One policy file over the workload."""

    served: list[Served]
    requests_per_s: float
    """Simulated in a second of this machine's."""


def simulate(
    workload: Workload,
    backends: Sequence[Backend],
    hardware: Mapping[str, Hardware],
    policy: tuple[str, str],
    sites: frozenset[str],
    cost: Cost,
    *,
    epoch: float = 0.0,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Run:
    """`backends`: new ones, with their models and slots. `policy`: name and text of its file. `options`: of
    `sim.cluster.Cluster`. Raises FileProblems for a policy file that is wrong."""
    rules = read_policy(policy[1], policy[0], KnownNames(list(backends), sites), seed).rules
    members = []
    for backend in backends:
        there = hardware[backend.name]
        settings = engine_settings(there.profile, workload.unit_tokens)
        members.append(Member(backend, settings, round(there.rtt_s * 1e6), round(there.profile.overhead_us)))
    cluster = Cluster(members, rules, seed=seed, epoch=epoch, **(options or {}))
    begun = time.perf_counter()
    trips = cluster.run(workload, progress).trips
    seconds = time.perf_counter() - begun
    trips.sort(key=lambda trip: trip.index)
    site_of = {backend.name: backend.site for backend in backends}
    return Run([_served(trip, site_of, cost, epoch) for trip in trips], len(trips) / max(seconds, 1e-9))


def _served(trip: Trip, site_of: Mapping[str, str], cost: Cost, epoch: float) -> Served:
    arrival, ok = trip.arrival, trip.end is End.OK
    assert trip.end is not None
    price = None
    if ok:
        tokens = (arrival.prompt_tokens, trip.cached_tokens, arrival.output_tokens)
        price = cost(trip.backend, trip.facts.model, *tokens)
    return Served(
        epoch + trip.facts.arrived,
        arrival.stream,
        _ENDS.get(trip.end, "failed"),
        site_of.get(trip.backend, ""),
        trip.ttft_s if arrival.stream else None,
        trip.tpot_s if arrival.stream else None,
        price,
    )
