"""A day request by request: the proxy's own valve and policies, simulated engines, and standbys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from benchmarks.scaling.coarse import EPOCH
from policies.files import KnownNames, read_policy
from policies.profile import Profile
from policies.state import Backend
from sim.autoscale import Autoscaled, Scaler, StandbyTerms, totals
from sim.members import Member
from sim.workload import Workload

MODEL: Final = "m-small"
POLICY: Final = """
rules:
  - name: all
    pick: least-load
    queue: {{wait: {wait_s}s, depth: 100000, cold_start: 5m}}
"""


@dataclass(frozen=True, slots=True)
class Units:
    """Standbys that are all alike."""

    profile: Profile
    count: int
    slots: int
    terms: StandbyTerms
    ttft_s: float
    """Of the service level."""
    tpot_s: float
    wait_s: float
    """That the valve has requests wait."""


def play(
    workload: Workload, units: Units, scaler: Scaler, progress: Callable[[int], None] | None = None
) -> tuple[float, float, Autoscaled]:
    """-> unit-hours, share within the service level, and the simulation."""
    names = [f"unit-{at:03d}" for at in range(units.count)]
    backends = [Backend(name, site="remote", slots=units.slots, models=frozenset({MODEL})) for name in names]
    known = KnownNames(backends, frozenset({"local", "remote"}))
    rules = read_policy(POLICY.format(wait_s=units.wait_s), "policy", known).rules
    members = [Member.of(backend, units.profile, 0.0, 0) for backend in backends]
    found = Autoscaled(
        members,
        rules,
        dict.fromkeys(names, units.terms),
        scaler,
        sla=(units.ttft_s, units.tpot_s),
        every_s=15.0,
        epoch=EPOCH,
        total_s=600.0,
    )
    found.run(workload, progress)
    found.finish()
    return sum(map(found.hours, names)), totals(found.days.values()).attainment, found
