"""Case 4.1 in virtual time: the proxy's own deciding in front of simulated engines (`sim/cluster.py`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from benchmarks.case_4_1.figures import Figures, figures_of
from benchmarks.case_4_1.report import BLOCK_TOKENS, SECTIONS, workload
from benchmarks.case_4_1.sites import LOCAL, MODEL, REMOTE, Site, policy
from policies.files import KnownNames, read_policy
from policies.state import Backend
from sim.cluster import Cluster
from sim.engine import EngineSettings
from sim.members import Member
from sim.profile import engine_settings
from sim.trips import Trip

UNLIMITED: Final = 100_000
"""Slots of the appliance where nothing stands before it."""


def appliance() -> EngineSettings:
    """The fitted engine."""
    return engine_settings(LOCAL.load(), BLOCK_TOKENS)


def never_full(engine: EngineSettings) -> EngineSettings:
    """The same with a KV cache that is never full: what is left is that all compute at once."""
    return replace(engine, kv_tokens=None)


def local_only(engine: EngineSettings, users: int, count: int, seed: int) -> Figures:
    """Everybody asks the appliance, `count` reports each."""
    return _run([_member(LOCAL, engine, UNLIMITED)], users, count, seed)


def with_tidegate(users: int, count: int, seed: int) -> Figures:
    """The proxy in front of the appliance and the remote sites."""
    members = [
        _member(site, engine_settings(site.load(), BLOCK_TOKENS), site.slots) for site in (LOCAL, *REMOTE)
    ]
    return _run(members, users, count, seed)


def _member(site: Site, engine: EngineSettings, slots: int) -> Member:
    backend = Backend(site.name, site=site.site, slots=slots, models=frozenset({MODEL}))
    return Member(backend, engine, rtt=round(site.rtt_s * 1e6))


def _run(members: list[Member], users: int, count: int, seed: int) -> Figures:
    backends = [member.backend for member in members]
    known = KnownNames(backends, frozenset(backend.site for backend in backends))
    text = policy()
    if len(members) == 1:  # nothing stands before it that turns anybody away
        text = text.replace("depth: 200", "depth: 200, overflow: 10000%")
    rules = read_policy(text, "policy", known).rules
    cluster = Cluster(members, rules, seed=seed)
    trips = cluster.run(workload(users, count, seed)).trips
    at_appliance = cluster.nodes[LOCAL.name].engine
    return figures_of(
        users,
        list(_report_times(trips)),
        [(trip.backend, trip.arrival.prompt_tokens, trip.cached_tokens) for trip in trips],
        at_appliance.preemptions,
    )


def _report_times(trips: Iterable[Trip]) -> Iterable[float]:
    """Seconds from the first request of each report to the end of its last."""
    by_user: dict[str, list[Trip]] = {}
    for trip in sorted(trips, key=lambda trip: trip.index):
        by_user.setdefault(trip.arrival.session, []).append(trip)
    for turns in by_user.values():
        for at in range(0, len(turns), SECTIONS):
            yield turns[at + SECTIONS - 1].ended - turns[at].arrived
