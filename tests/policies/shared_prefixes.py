"""A small cluster with prefix caches, and prompts that begin alike: what policies that go by caches are for."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

from policies.files import KnownNames, read_policy
from policies.state import Backend
from sim.cluster import SECOND, Cluster
from sim.engine import EngineSettings, StepCost
from sim.members import Incident, Member
from sim.trips import Trip
from sim.workload import Arrival, Workload, in_order

UNIT = 512
ENGINE = EngineSettings(
    StepCost(15_000.0, 100.0, 0.03, 100.0), max_num_seqs=64, kv_tokens=80_000, prefix_unit_tokens=UNIT
)
"""Computes 10,000 prompt tokens a second; its cache has room for a good dozen of the beginnings below."""


def members(*slots: int, site: str = "", rtt: int = 0, engine: EngineSettings = ENGINE) -> list[Member]:
    """One for each number of slots, `b0`, `b1`, ...; each a site of its own, or all of one."""
    names = [f"b{index}" for index in range(len(slots))]
    return [
        Member(Backend(name, site=site or name, slots=count, models=frozenset("m")), engine, rtt=rtt)
        for name, count in zip(names, slots, strict=True)
    ]


def shared_prefixes(
    rate: float, seconds: float = 60.0, beginnings: int = 40, units: int = 8, seed: int = 1
) -> Workload:
    """Poisson arrivals; each prompt is one of so many beginnings of `units` units, and 200 tokens of its own."""
    rng = Random(f"prefixes {seed}")
    arrivals = []
    at = rng.expovariate(rate)
    while at < seconds:
        start = units * rng.randrange(beginnings)
        hashes = tuple(range(start, start + units))
        output = max(round(rng.lognormvariate(0.0, 0.5) * 60), 2)
        arrivals.append(Arrival(round(at * SECOND), units * UNIT + 200, output, hashes))
        at += rng.expovariate(rate)
    return Workload("beginnings", in_order(arrivals), UNIT)


class Run:
    """A workload played under a `pick` (YAML) over all members."""

    def __init__(
        self, pick: str, workload: Workload, cluster: list[Member], incidents: Iterable[Incident] = ()
    ) -> None:
        sites = frozenset({"local", *(member.backend.site for member in cluster)})
        known = KnownNames([member.backend for member in cluster], sites)
        text = f"rules: [{{name: all, pick: {pick}, queue: {{wait: 10s, depth: 1000}}}}]"
        self.cluster = Cluster(
            cluster, read_policy(text, "test", known, 1).rules, seed=1, incidents=incidents
        )
        self.trips: list[Trip] = self.cluster.run(workload).trips

    @property
    def hit_share(self) -> float:
        """Of all prompt tokens, those that came out of a cache."""
        return sum(trip.cached_tokens for trip in self.trips) / sum(
            trip.arrival.prompt_tokens for trip in self.trips
        )

    def ttft_s(self, quantile: float) -> float:
        times = sorted(trip.ttft_s for trip in self.trips if trip.ttft_s is not None)
        return times[int(quantile * (len(times) - 1))]
