"""Case 4.2 in virtual time: the proxy's own deciding in front of simulated engines (`sim/cluster.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Final

from benchmarks.case_4_2.policies import BOX_ALONE, Entry
from policies.files import read_policy
from policies.match import LOCAL
from policies.profile import Profile
from sim.cluster import Cluster
from sim.cluster_file import ClusterFile, read_cluster
from sim.evaluate import figures_of as evaluated
from sim.profile import load_profile, with_max_model_len
from sim.router import End
from sim.trips import Trip
from sim.workload import Workload

CLUSTER: Final = Path(__file__).with_name("cluster.yaml")
REMOTE: Final = "e-4-32b"


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one simulation. Seconds, and dollars."""

    requests: int
    rate: float
    """Requests a second that came."""
    mean_s: float
    """From arrival to the last token, of whole answers."""
    p95_s: float
    ttft_p50_s: float
    ttft_p95_s: float
    met: float
    """Share of all that kept the SLA."""
    lost: float
    """Share of all that had no whole answer."""
    spill: float
    """Share of those that were sent anywhere."""
    tokens_per_hour: float
    """Dollars for what the cloud computed."""


def cluster(slots: int, boxes: int = 1, remote: str = REMOTE) -> ClusterFile:
    """The case's cluster with so many boxes of so many slots, and these cards in the cloud."""
    found = read_cluster(CLUSTER)
    placed = []
    for one in found.backends:
        if one.section.site == LOCAL:
            names = [one.name] if boxes == 1 else [f"{one.name}-{number}" for number in range(1, boxes + 1)]
            placed += [one._replace(name=name, slots=slots) for name in names]
        else:
            placed.append(one._replace(profile=_remote_profile(remote, one.profile.limits.max_model_len)))
    return replace(found, backends=tuple(placed))


def _remote_profile(name: str, context: int) -> Profile:
    beside = CLUSTER.with_name(f"{name}.yaml")
    return with_max_model_len(load_profile(beside if beside.is_file() else name), context)


def play(
    entry: Entry, workload: Workload, seconds: float, seed: int, boxes: int = 1, remote: str = REMOTE
) -> Figures:
    """One simulation. Nobody's patience ends: who waits long has a long time, and not none."""
    found = cluster(entry.slots, boxes, remote)
    rules = read_policy(entry.text, entry.name, found.known, seed).rules
    simulation = Cluster(
        found.members(workload.unit_tokens),
        rules,
        seed=seed,
        first_token_s=inf,
        between_tokens_s=inf,
        total_s=inf,
        metrics=entry is not BOX_ALONE,
    )
    return figures_of(simulation.run(workload).trips, found, seconds)


def figures_of(trips: Sequence[Trip], found: ClusterFile, seconds: float) -> Figures:
    """Of the requests that came in so many seconds."""
    figures = evaluated(trips, found, seconds)
    times = [trip.total_s for trip in trips if trip.end is End.OK]
    return Figures(
        requests=len(trips),
        rate=len(trips) / seconds,
        mean_s=sum(times) / len(times) if times else inf,
        p95_s=figures.total_s.p95,
        ttft_p50_s=figures.ttft_s.p50,
        ttft_p95_s=figures.ttft_s.p95,
        met=figures.met,
        lost=figures.rejected + figures.failed,
        spill=figures.spill,
        tokens_per_hour=figures.cost / seconds * 3600,
    )


def alone(workload: Workload, seconds: float, seed: int, boxes: int = 1) -> Figures:
    """Everybody asks the box, or the least loaded of several."""
    return play(BOX_ALONE, workload, seconds, seed, boxes)
