"""What the past would have been under another policy: one workload, and each policy file simulated over it.

`figures` are few on purpose: those that the ledger has as well, so that what was stands beside what is simulated.
They mean what they do in `evaluate.py`: who has no whole answer misses the service level, and has a first token
that never came.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import inf, isfinite
from typing import Any, Final

from policies.files import KnownNames, read_policy
from policies.profile import Profile
from policies.state import Backend
from sim.cluster import Cluster
from sim.evaluate import PolicyText, Quantiles, away, failures_of, quantiles, within
from sim.from_ledger import Served
from sim.members import Member
from sim.router import End
from sim.trips import Trip
from sim.workload import Workload

Cost = Callable[[str, str, int, int, int], int | None]
"""Of a backend, a model, prompt tokens, those that were cached, and answer tokens: nano-units; None: unknown."""

_ENDS: Final = {End.OK: "ok", End.REJECTED: "rejected", End.GONE: "gone"}


@dataclass(frozen=True, slots=True)
class Figures:
    """How a number of requests went. Times are seconds."""

    requests: int
    goodput: float | None
    """Share of the streams, refused and failed ones included, that met the service level; None: none was given.
    Those whose client left say nothing, and are left out."""
    ttft_s: Quantiles | None
    """Of the same streams, from the arrival at the router; infinite: of one that had no whole answer. None: there
    were none."""
    tpot_s: Quantiles | None
    """Of whole answers of two tokens or more."""
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

        def shown(times: Quantiles | None) -> dict[str, float | None] | None:
            if times is None:
                return None
            return {name: value if isfinite(value) else None for name, value in times._asdict().items()}

        return {
            "requests": self.requests,
            "goodput": self.goodput,
            "ttft_s": shown(self.ttft_s),
            "tpot_s": shown(self.tpot_s),
            "sites": dict(self.sites),
            "spill_share": self.spill,
            "cost": self.cost_nano / 1e9,
            "unpriced": self.unpriced,
            "rejected": self.rejected,
            "failed": self.failed,
        }


def figures(served: Iterable[Served], ttft_s: float = inf, tpot_s: float = inf) -> Figures:
    """`ttft_s`, `tpot_s`: the service level, at most; both infinite: there is none."""
    rows = list(served)
    streams = [one for one in rows if one.stream and one.outcome != "gone"]
    whole = [one for one in streams if one.outcome == "ok"]
    has_level = min(ttft_s, tpot_s) < inf
    met = sum(within(one.ttft_s, one.tpot_s, ttft_s, tpot_s) for one in whole)
    tpots = [one.tpot_s for one in whole if one.tpot_s is not None]
    never = [inf] * (len(streams) - len(whole))
    ttfts = [inf if one.ttft_s is None else one.ttft_s for one in whole] + never
    sites = [one.site for one in rows if one.site]
    outcomes = Counter(one.outcome for one in rows)
    return Figures(
        len(rows),
        met / len(streams) if has_level and streams else None,
        quantiles(ttfts) if ttfts else None,
        quantiles(tpots) if tpots else None,
        {site: count / len(sites) for site, count in sorted(Counter(sites).items())},
        away(sites),
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
    policy_failures: int
    """Calls of a policy that raised or gave no answer."""
    last_failure: str


def simulate(
    workload: Workload,
    backends: Sequence[Backend],
    hardware: Mapping[str, Hardware],
    policy: PolicyText,
    known: KnownNames,
    cost: Cost,
    *,
    epoch: float = 0.0,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Run:
    """`backends`: new ones, with their models and slots. `known`: what policy files may name. `options`: of
    `sim.cluster.Cluster`. Raises FileProblems for a policy file that is wrong."""
    rules = read_policy(policy.text, policy.name, known, seed).rules
    members = [
        Member.of(one, hardware[one.name].profile, hardware[one.name].rtt_s, workload.unit_tokens)
        for one in backends
    ]
    cluster = Cluster(members, rules, seed=seed, epoch=epoch, **(options or {}))
    begun = time.perf_counter()
    trips = cluster.run(workload, progress).trips
    seconds = time.perf_counter() - begun
    trips.sort(key=lambda trip: trip.index)
    site_of = {backend.name: backend.site for backend in backends}
    served = [_served(trip, site_of, cost, epoch) for trip in trips]
    return Run(served, len(trips) / max(seconds, 1e-9), *failures_of(rules))


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
