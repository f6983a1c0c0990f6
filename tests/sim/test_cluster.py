"""The laws of a simulated cluster (`sim/README.md`), and what its router does when things go wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.adaptive import AdaptiveSlots
from policies.eventlog import EventLog, PolicySource
from policies.files import KnownNames, read_policy
from policies.rules import RuleSet
from policies.state import Backend
from sim.cluster import SECOND, SWEEP, Cluster
from sim.engine import EngineSettings, StepCost
from sim.members import Change, Incident, Member
from sim.router import End, Request
from sim.trips import Result
from sim.workload import Arrival, Workload
from tests.patience import examples

ENGINE = EngineSettings(
    StepCost(alpha=20_000.0, beta=100.0, gamma=0.05, delta=50.0), max_num_seqs=8, kv_tokens=40_000
)
SMALL = replace(ENGINE, kv_tokens=2_000)
"""Does not hold every prompt, and seldom two."""
LOCAL_FIRST = """
rules:
  - name: local first
    prefer:
      - site: local
        spill: {enter: 100%, leave: 70%}
      - site: "*"
    pick: least-load
    queue: {wait: 5s, depth: 20}
"""


def member(
    name: str, site: str = "local", slots: int = 4, adaptive: bool = False, **values: object
) -> Member:
    limit = AdaptiveSlots.of(name) if adaptive else None
    backend = Backend(name, site=site, slots=slots, models=frozenset({"m"}), adaptive=limit)
    return replace(Member(backend, ENGINE), **values)  # type: ignore[arg-type]


def rules(members: list[Member], policy: str = LOCAL_FIRST) -> RuleSet:
    sites = frozenset(member.backend.site for member in members)
    return read_policy(policy, "test", KnownNames([member.backend for member in members], sites), 1).rules


def simulate(members: list[Member], arrivals: list[Arrival], **options: object) -> tuple[Cluster, Result]:
    cluster = Cluster(members, rules(members), **options)  # type: ignore[arg-type]
    return cluster, cluster.run(Workload("test", arrivals))


def every(seconds: float, count: int, prompt: int = 200, output: int = 50) -> list[Arrival]:
    return [Arrival(round(index * seconds * SECOND), prompt, output) for index in range(count)]


def ends(result: Result) -> Counter[End | None]:
    return Counter(trip.end for trip in result.trips)


# Laws


@st.composite
def scenes(draw: st.DrawFn) -> dict[str, object]:
    names = ["a", "b", "c"][: draw(st.integers(1, 3))]
    members = [
        {
            "name": name,
            "site": draw(st.sampled_from(["local", "away"])),
            "slots": draw(st.integers(1, 5)),
            "adaptive": draw(st.booleans()),
            "rtt": draw(st.sampled_from([0, 1, 30_000])),
            "overhead": draw(st.sampled_from([0, 2_000])),
            "starts": draw(st.sampled_from([0, 0, 4 * SECOND])),
            "settings": draw(st.sampled_from([ENGINE, ENGINE, SMALL])),
        }
        for name in names
    ]
    at = 0
    arrivals = []
    for index in range(draw(st.integers(1, 40))):
        at += draw(st.sampled_from([0, 10_000, 400_000, 2 * SECOND]))
        session = draw(st.sampled_from(["", "s", "t"]))
        arrivals.append(
            Arrival(
                at,
                draw(st.integers(1, 3000)),
                draw(st.integers(1, 100)),
                model=draw(st.sampled_from(["", "", "m", "unknown"])),
                tenant=draw(st.sampled_from(["x", "y"])),
                session=session,
                think=draw(st.sampled_from([-1, 0, SECOND])) if session else -1,
                hashes=tuple(range(index % 3)),
            )
        )
    incidents = [
        Incident(
            draw(st.integers(0, 30)) * SECOND, draw(st.sampled_from(names)), draw(st.sampled_from(Change))
        )
        for _ in range(draw(st.integers(0, 4)))
    ]
    return {
        "members": members,
        "arrivals": arrivals,
        "incidents": incidents,
        "patience_s": draw(st.sampled_from([float("inf"), 0.5, 3.0])),
        "first_token_s": draw(st.sampled_from([120.0, 120.0, 0.4])),
        "between_tokens_s": draw(st.sampled_from([30.0, 0.3])),
        "total_s": draw(st.sampled_from([3600.0, 3600.0, 2.0])),
    }


def play(scene: dict[str, object]) -> tuple[Cluster, Result]:
    options = dict(scene)
    members = [member(**values) for values in options.pop("members")]  # type: ignore[attr-defined]
    arrivals = options.pop("arrivals")
    return simulate(members, arrivals, seed=7, **options)  # type: ignore[arg-type]


@given(scenes())
@settings(max_examples=examples(150))
def test_nothing_is_lost_and_nothing_is_left(scene: dict[str, object]) -> None:
    """Laws 1 to 4."""
    cluster, result = play(scene)
    trips = result.trips
    assert sorted(trip.index for trip in trips) == list(range(len(scene["arrivals"])))  # type: ignore[arg-type]
    for trip in trips:
        assert trip.end is not None
        assert trip.lease is None
        assert trip.ended >= trip.facts.arrived
        if trip.first_token >= 0:
            assert trip.facts.arrived <= trip.first_token <= trip.ended
            rtt = cluster.nodes[trip.backend].member.rtt / SECOND
            assert trip.first_token - trip.facts.arrived >= rtt * 0.99
        if trip.end is End.OK:
            assert trip.sequence is not None
            assert trip.sequence.generated == trip.arrival.output_tokens
        if trip.attempts == 0:
            assert trip.end in (End.REJECTED, End.GONE)
    for backend in cluster.fleet:
        assert backend.in_flight == backend.in_flight_tokens == 0
    assert cluster.valve.queued == len(cluster.held) == 0
    for node in cluster.nodes.values():
        if node.up:
            node.engine.advance(float("1e18"))
            assert node.engine.running == node.engine.waiting == 0
            assert not node.engine.stalled
            assert node.engine.kv_use(1e18) == 0.0


@given(scenes())
@settings(max_examples=30)
def test_the_same_seed_gives_the_same_bytes(scene: dict[str, object]) -> None:
    """Law 5."""

    def record() -> str:
        _, result = play(scene)
        return repr(
            [(t.backend, t.end, t.facts.arrived, t.first_token, t.ended, t.attempts) for t in result.trips]
        )

    assert record() == record()


def rush() -> str:
    """Everything that became of a rush hour with a failure in it."""
    members = [member("b"), member("a"), member("c", site="away", rtt=20_000)]
    arrivals = [Arrival(at * 50_000, 300, 40, tenant=f"t{at % 3}", session=f"s{at % 5}") for at in range(200)]
    down = [Incident(3 * SECOND, "a", Change.DOWN), Incident(8 * SECOND, "a", Change.UP)]
    _, result = simulate(members, arrivals, seed=7, incidents=down)
    return repr([(trip.backend, trip.end, trip.first_token, trip.ended) for trip in result.trips])


def test_another_process_gives_the_same_bytes_too() -> None:
    """Law 5: strings hash otherwise in every process, and no order may hang on it."""
    script = "from tests.sim.test_cluster import rush; print(rush())"
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == rush()


# What the router does


def test_what_fits_stays_local_and_the_rest_flows_over() -> None:
    members = [member("local"), member("away", site="away", rtt=20_000)]
    _, result = simulate(members, every(5.0, 10))
    assert {trip.backend for trip in result.trips} == {"local"}
    members = [member("local"), member("away", site="away", rtt=20_000)]
    _, result = simulate(members, every(0.1, 40))
    assert ends(result) == {End.OK: 40}
    assert {trip.backend for trip in result.trips} == {"local", "away"}


def test_a_backend_that_dies_cuts_what_has_begun_and_its_requests_go_elsewhere() -> None:
    members = [member("local"), member("away", site="away", rtt=20_000)]
    down = [Incident(2 * SECOND, "local", Change.DOWN)]
    _, result = simulate(members, every(0.5, 40), incidents=down)
    assert ends(result)[End.CUT] >= 1
    assert ends(result)[End.OK] + ends(result)[End.CUT] == 40
    assert any(trip.attempts == 2 and trip.backend == "away" for trip in result.trips)
    away = [at for at, name, available in result.moves if name == "local" and not available]
    assert away
    assert all(
        trip.backend == "away" for trip in result.trips if trip.facts.arrived > away[0] / SECOND + 0.01
    )


def test_a_backend_that_comes_back_is_used_again() -> None:
    members = [member("local"), member("away", site="away", rtt=20_000)]
    incidents = [Incident(2 * SECOND, "local", Change.DOWN), Incident(12 * SECOND, "local", Change.UP)]
    _, result = simulate(members, every(0.5, 80), incidents=incidents)
    assert result.trips[-1].backend == "local"


def test_a_cold_start_is_waited_for() -> None:
    members = [member("local", starts=3 * SECOND)]
    _, result = simulate(members, every(1.0, 20))
    assert result.trips[-1].end is End.OK
    assert result.trips[0].end is not End.OK


def test_errors_open_the_breaker_and_full_backends_get_their_pause() -> None:
    members = [member("local"), member("away", site="away")]
    fails = [Incident(5 * SECOND, "local", Change.FAIL)]
    cluster, result = simulate(members, every(2.0, 15), incidents=fails)
    assert ends(result) == {End.OK: 15}
    failed = sum(trip.attempts == 2 for trip in result.trips)
    assert failed == cluster.fleet["local"].breaker.threshold + 1  # and one trial, ten seconds later
    members = [member("local"), member("away", site="away")]
    full = [Incident(SECOND, "local", Change.FULL, retry_after_s=4.0)]
    _, result = simulate(members, every(0.5, 16), incidents=full)
    assert ends(result) == {End.OK: 16}
    assert sum(trip.attempts == 2 for trip in result.trips) == 2


def test_who_finds_no_room_waits_and_is_refused_when_the_queue_is_full() -> None:
    members = [member("local", slots=1)]
    _, result = simulate(members, every(0.0, 30))
    refused = [trip for trip in result.trips if trip.end is End.REJECTED]
    assert sum(trip.held_s == 0.0 for trip in refused) == 9  # one is sent, twenty wait
    assert {trip.reason for trip in refused if trip.held_s == 0.0} == {"queue_full"}
    late = [trip for trip in refused if trip.held_s > 0.0]
    assert {(trip.reason, trip.held_s) for trip in late} == {("queue_timeout", 5.0)}
    assert max(trip.held_s for trip in result.trips if trip.end is End.OK) > 1.0


def test_clients_that_lose_patience_free_the_engine() -> None:
    members = [member("local", slots=50)]
    _, result = simulate(members, every(0.0, 20, prompt=4000), patience_s=2.0)
    assert ends(result)[End.GONE] > 0
    assert ends(result)[End.GONE] + ends(result)[End.OK] == 20
    waited = [trip.ended - trip.facts.arrived for trip in result.trips if trip.end is End.GONE]
    assert waited == pytest.approx([2.0] * len(waited))


def test_a_closed_loop_asks_again_only_after_the_answer() -> None:
    turns = [Arrival(0, 100, 20, session="s", think=SECOND) for _ in range(5)]
    _, result = simulate([member("local")], turns)
    assert ends(result) == {End.OK: 5}
    for before, after in zip(result.trips, result.trips[1:], strict=False):
        assert after.facts.arrived == pytest.approx(before.ended + 1.0)


def test_the_network_is_in_every_first_token() -> None:
    near, far = ({"rtt": rtt} for rtt in (0, 80_000))
    first = [simulate([member("local", **values)], every(5.0, 3))[1].trips[0] for values in (near, far)]
    assert first[1].first_token - first[0].first_token == pytest.approx(0.08, abs=1e-6)


def test_clients_that_limit_their_answers_are_forecast_by_that() -> None:
    arrivals = [Arrival(0, 10, 40), Arrival(1, 10, 900)]
    facts = [trip.facts for trip in simulate([member("a")], arrivals, limited=True)[1].trips]
    assert [(one.max_tokens, one.expected_tokens) for one in facts] == [(40, 40), (900, 256)]
    facts = [trip.facts for trip in simulate([member("a")], arrivals)[1].trips]
    assert [(one.max_tokens, one.expected_tokens) for one in facts] == [(0, 256), (0, 256)]


@pytest.mark.parametrize("pause", [0, 4, 60])
def test_an_engine_that_begins_to_work_is_asked_for_its_figures_at_once(pause: int) -> None:
    ages: list[float] = []

    class Watched(Cluster):
        def decided(self, request: Request, now: float) -> None:
            if now >= pause + 1:
                ages.append(now - self.fleet["a"].sampled_at)

    members = [member("a", slots=100)]
    late = [arrival._replace(at=arrival.at + pause * SECOND) for arrival in every(0.3, 30)]
    Watched(members, rules(members)).run(Workload("test", [Arrival(0, 10, 10), *late]))
    assert len(ages) == 26
    # As in probes/runner.py: a second, stretched by up to a tenth, and then the next of four looks a second.
    assert max(ages) <= 1.1 + 0.25


def test_without_metrics_nobody_asks_an_engine() -> None:
    members = [member("a")]
    simulate(members, every(0.3, 30), metrics=False)
    assert members[0].backend.sampled_at < 0


def test_what_an_engine_can_never_hold_ends_at_once_and_nobody_is_to_blame() -> None:
    members = [member("local", slots=50, settings=SMALL, rtt=20_000), member("away", site="away")]
    cluster, result = simulate(members, [Arrival(0, 3000, 10)] * 10, retries_per_s=0.0, retry_ratio=1.0)
    assert ends(result) == {End.CLIENT_ERROR: 10}
    assert {(trip.backend, trip.attempts, trip.reason) for trip in result.trips} == {
        ("local", 1, "status 400")
    }
    assert {trip.ended for trip in result.trips} == {0.02}
    local = cluster.fleet["local"]
    assert (local.failed, local.ignored, local.breaker.failures) == (0, 10, 0)
    assert cluster.retry_budget.balance(0.02) == 10.0


def test_a_client_that_gives_up_while_it_is_held_has_gone() -> None:
    """How long it will wait is nothing that a router knows."""
    _, result = simulate(
        [member("local", slots=1)], [Arrival(0, 100, 200), Arrival(1, 100, 1)], patience_s=2.0
    )
    first, second = result.trips
    assert (first.end, second.end, second.attempts, second.reason) == (End.OK, End.GONE, 0, "")
    assert second.ended == pytest.approx(2.0, abs=1e-5)
    assert [trip.facts.deadline - trip.facts.arrived for trip in result.trips] == pytest.approx([3600.0] * 2)


def polls(members: list[Member], arrivals: list[Arrival], **options: object) -> tuple[Cluster, list[int]]:
    """-> when the valve was polled otherwise than by the sweep, microseconds."""
    records: list[dict[str, object]] = []
    log = EventLog(records.append, PolicySource("test", LOCAL_FIRST, 1))
    cluster, _ = simulate(members, arrivals, log=log, **options)
    times = [round(record["at"] * SECOND) for record in records if record.get("event") == "poll"]  # type: ignore[operator]
    assert any(at % SWEEP == 0 for at in times)
    return cluster, [at for at in times if at % SWEEP]


def test_a_hold_that_has_ended_wakes_nobody() -> None:
    """They are held for five seconds at most; the first of them is sent after two."""
    running, first = Arrival(0, 100, 100), Arrival(110_000, 100, 400)
    _, times = polls([member("a", slots=1)], [running, first])
    assert times == []
    _, times = polls([member("a", slots=1)], [running, first, Arrival(130_000, 100, 400)])
    assert times == pytest.approx([5_130_000], abs=2)


def test_a_backend_that_a_probe_finds_gets_what_is_held_at_once() -> None:
    members = [member("a", slots=1), member("b", slots=1, starts=SECOND)]
    cluster, times = polls(members, [Arrival(0, 100, 400), Arrival(100_000, 100, 1)])
    (up,) = [at for at, name, available in cluster.result.moves if (name, available) == ("b", True)]
    assert up % SWEEP
    assert up in times
    held = cluster.result.trips[1]
    assert (held.backend, held.held_s) == ("b", pytest.approx(up / SECOND - 0.1))


def test_an_incident_of_a_backend_that_there_is_not_is_refused() -> None:
    members = [member("a"), member("b")]
    with pytest.raises(ValueError, match=r"'c'.* a, b$"):
        Cluster(members, rules(members), incidents=[Incident(0, "c", Change.DOWN)])


def test_sessions_of_two_tenants_do_not_wait_for_each_other() -> None:
    turns = [
        Arrival(0, 100, output, tenant=tenant, session="s", think=0)
        for tenant, output in [("x", 200), ("y", 10), ("y", 10), ("x", 10)]
    ]
    _, result = simulate([member("local")], turns)
    by_index = sorted(result.trips, key=lambda trip: trip.index)
    slow, quick, next_quick, next_slow = by_index
    assert quick.facts.arrived == slow.facts.arrived == 0.0
    assert next_quick.facts.arrived == pytest.approx(quick.ended)
    assert next_slow.facts.arrived == pytest.approx(slow.ended)
    assert next_quick.ended < slow.ended


# What cannot be


def test_a_cluster_runs_once() -> None:
    members = [member("a")]
    cluster = Cluster(members, rules(members))
    first = cluster.run(Workload("w", [Arrival(0, 10, 5)]))
    with pytest.raises(RuntimeError, match="a cluster runs once: make a new one"):
        cluster.run(Workload("w", [Arrival(0, 10, 5)]))
    assert len(first.trips) == 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rtt": -5}, "backend a: rtt is microseconds, zero or more, not -5"),
        ({"overhead": -1}, "overhead is microseconds"),
        ({"starts": -1}, "starts is microseconds"),
        ({"slots": -4}, "backend a: slots are one or more, not -4"),
    ],
)
def test_a_member_that_cannot_be_is_refused(values: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        member("a", **values)


def test_a_member_without_models_is_refused() -> None:
    with pytest.raises(ValueError, match="backend a: it serves no model"):
        Member(Backend("a", slots=4), ENGINE)


def test_a_cluster_has_members_of_different_names() -> None:
    members = [member("a"), member("a")]
    with pytest.raises(ValueError, match="two members are named a"):
        Cluster(members, rules(members))
    with pytest.raises(ValueError, match="one member at least"):
        Cluster([], rules(members))


def test_times_before_the_beginning_are_refused() -> None:
    with pytest.raises(ValueError, match="an incident of a is at -1"):
        Incident(-1, "a", Change.DOWN)
    members = [member("a")]
    for wrong in (Arrival(-1, 1, 5), Arrival(0, 0, 5), Arrival(0, 5, 0)):
        with pytest.raises(ValueError, match="arrival 1 comes at"):
            Cluster(members, rules(members)).run(Workload("w", [Arrival(0, 1, 1), wrong]))


def test_a_trip_says_what_became_of_it() -> None:
    members = [member("a")]
    cluster = Cluster(members, rules(members))
    (trip,) = cluster.run(Workload("w", [Arrival(0, 10, 5)])).trips
    assert repr(trip) == f"<Trip 0: ok at a, ttft_s {trip.ttft_s:.3f}, tpot_s {trip.tpot_s:.3f}>"
    (refused,) = (
        Cluster(members, rules(members), incidents=[Incident(0, "a", Change.DOWN)])
        .run(Workload("w", [Arrival(SECOND, 10, 5)]))
        .trips
    )
    assert re.fullmatch(r"<Trip 0: \w+ \(.+\).*>", repr(refused))
