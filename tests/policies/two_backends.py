"""Two unequal backends, simulated: what a policy makes of them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from random import Random
from typing import NamedTuple

from policies.files import KnownNames, read_policy
from policies.state import Backend
from sim.cluster import Cluster
from sim.members import Member
from sim.profile import engine_settings, load_profile
from sim.router import End
from sim.workload import Arrival, Workload

UNIT = 256
"""Prompt tokens that one hash stands for."""
TTFT_S, TPOT_S = 2.0, 0.1
"""What is promised."""


class Figures(NamedTuple):
    p95_ttft: float
    """Seconds, of the requests that were answered."""
    kept: float
    """Share of all requests that were answered within `TTFT_S` and `TPOT_S`."""
    refused: float
    """Share of all requests."""


def p95_ttft(pick: str) -> float:
    """Seconds, over 60 conversations; mean of two runs."""
    return sum(_conversations(pick, seed).p95_ttft for seed in (1, 2)) / 2


def share_kept(pick: str) -> float:
    """Of what is promised to the same conversations."""
    return sum(_conversations(pick, seed).kept for seed in (1, 2)) / 2


@cache
def _conversations(pick: str, seed: int) -> Figures:
    return simulate(pick, rate=3.0, seed=seed, sessions=60)


def simulate(pick: str, rate: float, seed: int = 1, sessions: int = 0, count: int = 600) -> Figures:
    """A near backend that is slow and a fast one 30 ms away, each with 32 slots and a prefix cache.

    `rate`: of Poisson arrivals, a second. `sessions`: conversations that they belong to, each with a beginning of
    its own of 2000 tokens and more; 0: no prompt has anything in common with another.
    """
    members = [
        Member(
            Backend(name, site=name, slots=32, models=frozenset({"m"})),
            replace(engine_settings(load_profile(profile)), prefix_unit_tokens=UNIT),
            rtt=rtt,
        )
        for name, profile, rtt in (("near", "l40-2-32b", 0), ("far", "h20-4-32b", 30_000))
    ]
    known = KnownNames([member.backend for member in members], frozenset({"near", "far"}))
    text = f"rules:\n  - {{name: all, pick: {pick}, queue: {{wait: 60s, depth: 1000}}}}\n"
    cluster = Cluster(members, read_policy(text, "test", known, seed=seed).rules, seed=seed)
    trips = cluster.run(_workload(rate, seed, sessions, count)).trips
    times = sorted(trip.ttft_s for trip in trips if trip.ttft_s is not None)
    kept = sum(
        trip.ttft_s is not None and trip.ttft_s <= TTFT_S and (trip.tpot_s or 0.0) <= TPOT_S for trip in trips
    )
    refused = sum(trip.end is End.REJECTED for trip in trips)
    return Figures(times[int(0.95 * len(times))], kept / len(trips), refused / len(trips))


def _workload(rate: float, seed: int, sessions: int, count: int) -> Workload:
    rng = Random(f"{seed}/arrivals")
    at = 0.0
    arrivals = []
    for _ in range(count):
        at += rng.expovariate(rate)
        prompt = min(max(int(rng.lognormvariate(6.0, 0.9)), 16), 3000)
        output = min(max(int(rng.lognormvariate(5.0, 0.7)), 2), 900)
        arrival = Arrival(round(at * 1e6), prompt, output)
        if sessions:
            session = rng.randrange(sessions)
            beginning = tuple([1000 * (session + 1) + block for block in range(8)])
            arrival = arrival._replace(
                prompt_tokens=8 * UNIT + prompt // 4, hashes=beginning, session=f"s{session}"
            )
        arrivals.append(arrival)
    return Workload("two backends", arrivals, unit_tokens=UNIT if sessions else 0)
