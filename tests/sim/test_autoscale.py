"""Standbys in a simulated cluster: what they wait for, cost and serve; and the command that shows it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from policies.files import KnownNames, read_policy
from policies.scaling import Controller, Pool, ScalingSettings, Step
from policies.standby import Event, State
from policies.state import Backend
from proxy import cli
from sim.autoscale import Autoscaled, StandbyTerms, totals
from sim.autoscale_command import autoscale
from sim.cluster_file import read_cluster
from sim.engine import EngineSettings, StepCost
from sim.evaluate import named_policy
from sim.members import Member
from sim.router import End
from sim.traces import write_workload
from sim.trips import Trip
from sim.workload import Arrival, Workload
from tests.pages import ROOT

ENGINE = EngineSettings(StepCost(alpha=20_000.0, beta=0.0, gamma=0.0, delta=0.0), max_num_seqs=8)
"""A token takes 20 ms, whatever else runs."""
POLICY = """
rules:
  - name: all
    prefer: [{site: local}, {site: "*"}]
    pick: least-load
    queue: {wait: 30s, depth: 1000, cold_start: 5m}
"""
TERMS = StandbyTerms(
    prepare_s=20.0, cold_start_s=60.0, stop_s=10.0, min_on_s=0.0, min_off_s=0.0, cost_per_hour=36.0
)


class Watched(Autoscaled):
    """Keeps its trips."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.ended: list[Trip] = []
        super().__init__(*args, **kwargs)

    def count(self, trip: Trip) -> None:
        self.ended.append(trip)
        super().count(trip)


class Script:
    """Steps by the second at which they are taken."""

    def __init__(self, *steps: tuple[float, str, Event]) -> None:
        self.steps = list(steps)
        self.asked: list[float] = []

    def decide(self, pools: Sequence[Pool], now: float, wall: float) -> list[Step]:
        self.asked.append(now)
        due = [Step(name, event, "as told") for at, name, event in self.steps if at <= now]
        self.steps = [step for step in self.steps if step[0] > now]
        return due


def arrival(second: float, tokens: int = 50, **values: Any) -> Arrival:
    return Arrival(round(second * 1e6), 100, tokens, **values)


def played(
    arrivals: list[Arrival], scaler: Any, standbys: int = 1, local: int = 0, **options: Any
) -> Watched:
    """`local`: slots of a backend that always runs."""
    names = [f"s{at}" for at in range(standbys)]
    backends = [Backend(name, site="far", slots=4, models=frozenset({"m"})) for name in names]
    if local:
        backends.append(Backend("local", slots=local, models=frozenset({"m"})))
    known = KnownNames(backends, frozenset({"local", "far"}))
    rules = read_policy(POLICY, "test", known).rules
    members = [Member(backend, ENGINE) for backend in backends]
    terms = options.pop("terms", TERMS)
    found = Watched(members, rules, dict.fromkeys(names, terms), scaler, **options)
    found.run(Workload("test", arrivals))
    found.finish()
    return found


def moves(found: Autoscaled, name: str = "s0") -> list[tuple[float, State]]:
    return [(round(move.wall, 3), move.after) for move in found.moves if move.name == name]


def test_a_request_for_a_standby_starts_it_at_once_is_held_and_served() -> None:
    found = played([arrival(3.2)], Controller(ScalingSettings(quantile=0.0)))
    assert moves(found)[:3] == [(3.2, State.PREPARING), (23.2, State.STARTING), (83.2, State.READY)]
    assert found.moves[0].reason == "requests wait that nothing else may serve"
    (trip,) = found.ended
    assert trip.end is End.OK
    assert trip.held_s == pytest.approx(80.0)
    assert trip.ttft_s == pytest.approx(80.02, abs=1e-3)


def test_nothing_is_sent_to_what_does_not_run() -> None:
    """All that comes while nothing runs waits, and nothing fails."""
    found = played([arrival(1 + at / 10) for at in range(100)], Controller(ScalingSettings(quantile=0.0)))
    assert {trip.end for trip in found.ended} == {End.OK}
    assert min(trip.ended - (trip.ttft_s or 0.0) for trip in found.ended) >= 0.0
    assert all(trip.attempts == 1 for trip in found.ended)


def test_hours_are_paid_from_its_start_until_it_has_stopped() -> None:
    script = Script((0.0, "s0", Event.START), (200.0, "s0", Event.STOP))
    found = played([arrival(at) for at in (100.0, 400.0)], script, local=4)
    assert found.paid["s0"] == [(20.0, 210.0)]
    assert found.hours("s0") == pytest.approx(190 / 3600)
    assert found.hours("s0", 0.0, 100.0) == pytest.approx(80 / 3600)


def test_what_drains_ends_what_it_has_and_gets_nothing_new() -> None:
    script = Script((0.0, "s0", Event.START), (200.0, "s0", Event.STOP))
    running = [arrival(195.0, 1000, tenant="far") for _ in range(2)]
    found = played([*running, arrival(202.0), arrival(500.0)], script, local=1)
    by_place = [trip.backend for trip in sorted(found.ended, key=lambda trip: trip.index)]
    assert by_place[0] != by_place[1], "one each, since both are least loaded in turn"
    states = {state: at for at, state in moves(found)}
    assert states[State.DRAINING] == 200.0
    assert states[State.STOPPING] >= 215.0, "a thousand tokens take 20 s"
    assert {trip.end for trip in found.ended} == {End.OK}
    assert by_place[2] == "local"


def test_one_that_takes_too_long_to_drain_is_cut_off() -> None:
    script = Script((0.0, "s0", Event.START), (200.0, "s0", Event.STOP))
    terms = StandbyTerms(cold_start_s=60.0, drain_s=5.0)
    found = played([arrival(195.0, 1000), arrival(500.0)], script, terms=terms, local=0)
    cut = min(found.ended, key=lambda trip: trip.index)
    assert cut.end is End.CUT
    assert "1 requests took too long to end" in [move.reason for move in found.moves]


def test_draining_is_taken_back() -> None:
    script = Script((0.0, "s0", Event.START), (200.0, "s0", Event.STOP), (205.0, "s0", Event.START))
    found = played([arrival(195.0, 1000), arrival(206.0), arrival(500.0)], script)
    assert [state for _, state in moves(found)] == [
        State.PREPARING,
        State.STARTING,
        State.READY,
        State.DRAINING,
        State.READY,
    ]
    second = found.ended[0] if found.ended[0].index == 1 else found.ended[1]
    assert second.held_s == 0.0
    assert len(found.paid["s0"]) == 1


def test_what_was_stopped_while_it_started_is_never_ready() -> None:
    script = Script((0.0, "s0", Event.START), (30.0, "s0", Event.STOP), (60.0, "s0", Event.START))
    found = played([arrival(400.0)], script)
    assert moves(found) == [
        (0.0, State.PREPARING),
        (20.0, State.STARTING),
        (30.0, State.STOPPING),
        (40.0, State.STANDBY),
        (60.0, State.PREPARING),
        (80.0, State.STARTING),
        (140.0, State.READY),
    ]


def test_requests_are_counted_by_day_and_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sim.autoscale.DAY_S", 100.0)
    arrivals = [arrival(at * 1.5) for at in range(200)]
    found = played(arrivals, Controller(), sla=(1.0, 0.021))
    assert [found.days[day].requests for day in range(3)] == [67, 67, 66]
    total = totals(found.days.values())
    assert total.requests == len(total.ttft_s) == 200
    assert total.met + sum(ttft > 1.0 for ttft in total.ttft_s) == 200
    assert 0 < total.met < 200


def test_a_refused_request_misses_the_service_level() -> None:
    found = played([arrival(1.0)], Script(), sla=(inf, inf))
    (day,) = found.days.values()
    assert (day.requests, day.met, day.rejected) == (1, 0, 1)
    assert found.ended[0].ended == pytest.approx(301.0, abs=1.0)


def test_one_seed_gives_one_result() -> None:
    def run() -> list[Any]:
        arrivals = [arrival(at * 1.3) for at in range(500)]
        found = played(arrivals, Controller(), standbys=3)
        return [found.moves, found.samples, found.days]

    assert run() == run()


def test_an_unknown_standby_is_named() -> None:
    backend = Backend("a", slots=1, models=frozenset({"m"}))
    rules = read_policy(POLICY, "test", KnownNames([backend], frozenset({"local"}))).rules
    with pytest.raises(ValueError, match="a standby is named 'b', the members are a"):
        Autoscaled([Member(backend, ENGINE)], rules, {"b": TERMS}, Script())


# The command and its file

CLUSTER = """
model: m
sla: {ttft: 5s, tpot: 100ms}
backends:
  - name: far
    site: far
    profile: h20-2-32b
    count: 2
    slots: 4
    price: {input: 1, output: 2}
    standby: {cold_start: 60s, cost_per_hour: 3.6, process: {command: [sh]}}
sites: {far: {}}
"""


def simulate(tmp_path: Path, *options: str, cluster: str = CLUSTER) -> Result:
    file, trace = tmp_path / "cluster.yaml", tmp_path / "trace.jsonl"
    file.write_text(cluster)
    with trace.open("wb") as out:
        write_workload(Workload("test", [arrival(at * 2.0, 20) for at in range(100)]), out)
    app = typer.Typer()
    app.callback()(cli._root)
    cli.register(app, "simulate")
    arguments = ["simulate", "--trace", str(trace), "--autoscale", str(file), *options]
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)


def test_the_command_shows_hours_costs_and_the_service_level_by_day(tmp_path: Path) -> None:
    shown = json.loads(simulate(tmp_path, "--json").stdout)
    (day,) = shown["days"]
    assert {key: value for key, value in day.items() if key != "day"} == shown["total"]
    assert day["requests"] == 100
    assert 0.5 < day["within_sla"] < 1.0
    assert day["hours"] == pytest.approx(sum(one["hours"] for one in shown["standbys"]))
    assert day["gpu_hours"] == pytest.approx(2 * day["hours"])
    assert day["cost_of_hours"] == pytest.approx(3.6 * day["hours"])
    whole = 100 - day["rejected"] - day["failed"]
    assert day["cost_of_tokens"] == pytest.approx(whole * (100 * 1 + 20 * 2) / 1e6)
    assert shown["moves"][0] | {"reason": ""} == {
        "at_s": 0.0, "name": "far-1", "before": "standby", "event": "start", "after": "preparing", "reason": "",
    }  # fmt: skip
    table = simulate(tmp_path)
    assert table.exit_code == 0
    assert "GPU-hours" in table.stdout


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "capacity.png"
    assert simulate(tmp_path, "--plot", str(picture)).exit_code == 0
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ttft", "1"], "without --ttft: SLA and backends stand in its cluster file"),
        (["--policy", "least-load", "local-first"], "--autoscale goes with one policy"),
        (["--plot", "nowhere/a.png"], "there is no folder nowhere for it"),
    ],
)
def test_what_does_not_go_together_is_said(tmp_path: Path, options: list[str], said: str) -> None:
    result = simulate(tmp_path, *options)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())


def test_a_cluster_without_standbys_has_nothing_to_start(tmp_path: Path) -> None:
    plain = CLUSTER.replace(
        "    standby: {cold_start: 60s, cost_per_hour: 3.6, process: {command: [sh]}}\n", ""
    )
    result = simulate(tmp_path, cluster=plain)
    assert result.exit_code == 2
    assert "no backend has a `standby` section" in result.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("scaling: {up: 30%}", "down must be below up"),
        ("scaling: {down: 30%, quantile: 1}", "quantile"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    result = simulate(tmp_path, cluster=f"{CLUSTER}{text}\n")
    assert result.exit_code == 2
    assert said in result.stderr


def test_the_example_wakes_its_standbys_and_lets_them_go() -> None:
    cluster = read_cluster(ROOT / "examples" / "autoscale.yaml")
    # Sixty requests a minute for a quarter of an hour, then hardly any.
    busy = [arrival(at, 300) for at in range(900)]
    calm = [arrival(900.0 + at * 60, 300) for at in range(60)]
    found = autoscale(cluster, named_policy("local-first"), Workload("test", [*busy, *calm]))
    after = {move.after for move in found.moves}
    assert after == {
        State.PREPARING,
        State.STARTING,
        State.READY,
        State.DRAINING,
        State.STOPPING,
        State.STANDBY,
    }
    assert all(standby.state is State.STANDBY for standby in found.standbys.values())
