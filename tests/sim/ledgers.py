"""A ledger of what a simulated cluster has served: rows whose arrivals, lengths and times are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from policies.files import read_policy
from policies.state import Backend
from proxy.ledger import _Insert
from proxy.records import OperationIds, Row, to_values
from sim.cluster import Cluster
from sim.members import Member
from sim.profile import engine_settings, load_profile
from sim.router import End
from sim.trips import Trip
from sim.workload import Workload
from tests.proxy.rows import empty_database

EPOCH = 1_700_006_000.0
"""A few minutes before midnight."""
UNIT = 512
SPILLS = """\
rules:
  - name: all
    prefer: [{site: local, spill: {enter: 85%, leave: 70%}}, {site: "*"}]
    pick: least-load
    queue: {wait: 5s, depth: 10}
"""
STAYS = SPILLS.replace(', {site: "*"}', "")
SLOTS = {"appliance": 6, "nj": 64}
RTT = {"appliance": 0, "nj": 40_000}
PROFILES = {"appliance": "l40-2-32b", "nj": "h20-4-32b"}

_OUTCOMES = {End.OK: "ok", End.REJECTED: "rejected"}
_IDS = OperationIds()


def backends() -> list[Backend]:
    """`appliance` at the local site, `nj` at another."""
    return [
        Backend(
            name, site="local" if name == "appliance" else "nanjing", slots=slots, models=frozenset({"m"})
        )
        for name, slots in SLOTS.items()
    ]


def played(workload: Workload, policy: str = SPILLS) -> list[Trip]:
    """What a cluster does with it."""
    members = [
        Member(backend, engine_settings(load_profile(PROFILES[backend.name]), UNIT), RTT[backend.name])
        for backend in backends()
    ]
    return Cluster(members, read_policy(policy, "played").rules, epoch=EPOCH).run(workload).trips


def row_of(trip: Trip, **changes: object) -> Row:
    """The row that a proxy would have written."""
    arrival, ok = trip.arrival, trip.end is End.OK
    row = Row(
        _IDS.mint(),
        "test",
        EPOCH + arrival.at / 1e6,
        arrival.tenant,
        "k" if arrival.priority else "",
        arrival.endpoint,
        arrival.model or "m",
        "m" if ok else "",
        arrival.data_class,
        arrival.session,
        arrival.hashes,
        arrival.stream,
        200 if ok else 429,
        _OUTCOMES.get(trip.end, "backend_failed") if trip.end else "lost",
        "" if ok else trip.reason,
        trip.backend,
    )
    row.site = {"appliance": "local", "nj": "nanjing"}.get(trip.backend, "")
    row.attempts = trip.attempts
    row.expected_tokens, row.body_bytes = 256, 4 * arrival.prompt_tokens
    row.queue_s, row.total_s = trip.held_s, trip.total_s
    if ok:
        row.prompt_tokens, row.completion_tokens = arrival.prompt_tokens, arrival.output_tokens
        row.cached_tokens, row.usage_source = trip.cached_tokens, "reported"
        row.ttft_s = trip.ttft_s if arrival.stream else None
        figures = ["nj", 0.1, 1, 2, SLOTS["nj"], 0.0, 0.0, RTT["nj"] / 1e6, 0, 0, 0.0, 0.0, 0, 0, [], []]
        row.candidates = [figures] if trip.backend == "nj" else []
    for name, value in changes.items():
        setattr(row, name, value)
    return row


def write(folder: Path, rows: Sequence[Row]) -> None:
    """Into the ledger of a state directory."""
    folder.mkdir(exist_ok=True)
    engine = empty_database(folder)
    try:
        _Insert(engine).rows([to_values(row) for row in rows])
    finally:
        engine.dispose()
