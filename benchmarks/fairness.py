"""What a light tenant notices of a flood, and how much of that is the wait and how much the engine.

    python -m benchmarks.fairness
    python -m benchmarks.fairness --check --no-result

Simulated, for several set-ups of backends and slots: tenant B sends 0.3 of an equal share of the capacity, once
alone and once while tenant A sends ten times the capacity. Compared are the 95th percentiles of B's times to the
first token. What the valve adds is B's wait in its queue. The rest is the engine's: the same request meets a batch
that is full, whose steps are longer and hold prompts of A's. No order of requests takes that away.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from random import Random

from benchmarks.summary import facts_line, print_table, quantile, write_result
from policies.files import KnownNames, read_policy
from policies.state import Backend
from sim.cluster import SECOND, Cluster
from sim.engine import EngineSettings, StepCost
from sim.members import Member
from sim.router import End
from sim.trips import Trip
from sim.workload import Arrival, Workload, in_order

ENGINE = EngineSettings(StepCost(20_000.0, 100.0, 0.005, 50.0), max_num_seqs=128, kv_tokens=200_000)
PROMPT, OUTPUT = 500, 200
"""Mean tokens; log-normal, sigma 0.5."""
POLICY = "rules: [{name: all, pick: least-load, queue: {wait: 10s, depth: 200}}]"
SET_UPS = ((4, 8), (2, 16), (1, 32), (2, 32), (4, 32), (1, 64))
"""Backends, slots of each."""
SECONDS, WARM_UP = 120, 30
SEEDS = 5
FLOOD = 10.0
LIGHT = 0.3
PROMISED = 1.2
"""B's time to the first token, over what it is alone, as far as the valve has a part in it."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one set-up. Times are 95th percentiles, milliseconds."""

    backends: int
    slots: int
    capacity: float
    """Requests a second."""
    alone: float
    flooded: float
    held: float
    """Of B's waits in the valve."""
    waited: float
    """Share of B's requests that waited at all."""
    engine: float
    """From the dispatch of B's requests on."""

    @property
    def ratio(self) -> float:
        return self.flooded / self.alone

    @property
    def engine_ratio(self) -> float:
        return self.engine / self.alone


def arrivals(tenant: str, rate: float, seed: int) -> Iterator[Arrival]:
    """Poisson, of one tenant."""
    rng = Random(f"{seed} {tenant}")
    at = rng.expovariate(rate)
    while at < SECONDS:
        prompt, output = (max(round(rng.lognormvariate(0.0, 0.5) * mean), 2) for mean in (PROMPT, OUTPUT))
        yield Arrival(round(at * SECOND), prompt, output, tenant=tenant)
        at += rng.expovariate(rate)


def run(backends: int, slots: int, seed: int, **rates: float) -> list[Trip]:
    """What became of the requests of tenants with these rates, without those of the warm-up."""
    members = [
        Member(Backend(f"b{number}", slots=slots, models=frozenset("m")), ENGINE)
        for number in range(backends)
    ]
    known = KnownNames([member.backend for member in members], frozenset({"local"}))
    cluster = Cluster(members, read_policy(POLICY, "benchmark", known, 1).rules, seed=seed)
    flows = [arrivals(tenant, rate, seed) for tenant, rate in rates.items()]
    trips = cluster.run(Workload("fairness", in_order(arrival for flow in flows for arrival in flow))).trips
    return [trip for trip in trips if trip.arrived >= WARM_UP and trip.end is End.OK]


def measure(backends: int, slots: int, seeds: int) -> Figures:
    """One set-up, all seeds together."""
    most = 2.0 * backends * slots / (OUTPUT * ENGINE.cost.alpha / SECOND)
    capacity = len(run(backends, slots, 0, a=most)) / (SECONDS - WARM_UP)
    light = LIGHT * capacity / 2
    alone = [trip for seed in range(seeds) for trip in run(backends, slots, seed, b=light)]
    both = [
        trip
        for seed in range(seeds)
        for trip in run(backends, slots, seed, a=FLOOD * capacity, b=light)
        if trip.facts.tenant == "b"
    ]
    return Figures(
        backends,
        slots,
        capacity,
        _p95_ms([trip.ttft_s or 0.0 for trip in alone]),
        _p95_ms([trip.ttft_s or 0.0 for trip in both]),
        _p95_ms([trip.held_s for trip in both]),
        sum(trip.held_s > 0.0 for trip in both) / len(both),
        _p95_ms([(trip.ttft_s or 0.0) - trip.held_s for trip in both]),
    )


def _p95_ms(seconds: Sequence[float]) -> float:
    return quantile(seconds, 0.95) * 1000


def broken(found: Sequence[Figures]) -> list[str]:
    """Where B waits for longer than promised, and longer than the engine alone would have it wait."""
    return [
        f"{one.backends} x {one.slots}: {one.ratio:.2f} times as long as alone, the engine's part is "
        f"{one.engine_ratio:.2f}"
        for one in found
        if one.ratio > max(PROMISED, 1.05 * one.engine_ratio)
    ]


def main() -> int:
    """The command line; returns 1 with `--check` if a promise is not kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"runs of each set-up; default {SEEDS}")
    parser.add_argument("--check", action="store_true", help="fail when a promise is not kept")
    parser.add_argument("--no-result", action="store_true", help="write no file into benchmarks/results")
    options = parser.parse_args()
    found = [measure(backends, slots, options.seeds) for backends, slots in SET_UPS]
    columns = ("backends x slots", "requests/s", "alone, ms", "flooded", "over alone", "held", "waited")
    rows = [
        (
            f"{one.backends} x {one.slots}",
            f"{one.capacity:.1f}",
            f"{one.alone:.0f}",
            f"{one.flooded:.0f}",
            f"{one.ratio:.2f}",
            f"{one.held:.0f}",
            f"{one.waited:.1%}",
            f"{one.engine:.0f}",
            f"{one.engine_ratio:.2f}",
        )
        for one in found
    ]
    print_table("A light tenant under a flood, p95", (*columns, "in the engine", "over alone"), rows)
    print(facts_line())
    if not options.no_result:
        name = write_result("fairness", {"set_ups": [asdict(one) for one in found]}).name
        print(f"written to {name} in benchmarks/results")
    problems = broken(found)
    for problem in problems:
        print(f"NOT KEPT: {problem}")
    return 1 if options.check and problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
