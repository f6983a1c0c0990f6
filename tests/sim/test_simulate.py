"""`tidegate simulate`: its figures, and what it says of one's own traffic under another file."""

from __future__ import annotations

import json
import os
from collections import Counter
from functools import cache
from math import inf
from pathlib import Path
from random import Random
from shutil import copytree
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from proxy import cli
from proxy.access.keys import create_key
from proxy.access.pepper import load_pepper
from proxy.database import open_database
from proxy.ledger import _Insert
from proxy.records import to_values
from sim.calibrate import Search
from sim.from_ledger import Served
from sim.profile import dump_profile, load_profile
from sim.simulate import by_day, figures
from sim.traces import write_workload
from sim.trips import Trip
from sim.workload import Arrival, Workload
from tests.sim.ledgers import EPOCH, PROFILES, SPILLS, STAYS, played, row_of, write

# Figures


def served(**changes: Any) -> Served:
    fields = {"at": EPOCH, "stream": True, "outcome": "ok", "site": "local", "ttft_s": 1.0, "tpot_s": 0.1}
    return Served(**{**fields, "cost_nano": 5, **changes})


def test_figures_of_requests_that_are_known() -> None:
    rows = [
        *(served(ttft_s=float(n), tpot_s=n / 100, cost_nano=n) for n in range(101)),
        served(site="far", stream=False, ttft_s=None, tpot_s=None, cost_nano=None),
        served(outcome="rejected", site="", ttft_s=None, tpot_s=None, cost_nano=None),
        served(outcome="failed", site="far", ttft_s=None, tpot_s=None, cost_nano=None),
        served(outcome="gone", site="far", ttft_s=None, tpot_s=None, cost_nano=3),
    ]
    found = figures(rows, 20.0, 0.10)
    assert found.requests == 105
    # Of 103 streams, two never had an answer; who left says nothing.
    assert found.ttft_s == (51.0, 97.0, inf)
    assert found.tpot_s == pytest.approx((0.5, 0.95, 0.99))
    assert found.as_dict()["ttft_s"] == {"p50": 51.0, "p95": 97.0, "p99": None}
    assert found.sites == {"far": 3 / 104, "local": 101 / 104}
    assert found.spill == pytest.approx(3 / 104)
    assert (found.cost_nano, found.unpriced) == (sum(range(101)) + 3, 1)
    assert (found.rejected, found.failed) == (1, 1)
    # Of 101 complete streams, 11 meet both; one was refused and one failed: misses.
    assert found.goodput == pytest.approx(11 / 103)
    assert figures(rows, 20.0).goodput == pytest.approx(21 / 103)
    assert figures(rows).goodput is None


def test_figures_of_nothing_are_none() -> None:
    found = figures([], 1.0, 1.0)
    assert (found.requests, found.goodput, found.ttft_s, found.tpot_s, found.spill) == (
        0,
        None,
        None,
        None,
        None,
    )


def test_an_answer_of_one_token_has_no_tpot_to_miss() -> None:
    assert figures([served(tpot_s=None)], inf, 0.05).goodput == 1.0


def test_days_are_utc() -> None:
    rows = [served(at=86_400.0 * day + second) for day in (0, 2) for second in (0, 86_399.9)]
    assert {day: len(part) for day, part in by_day(rows).items()} == {"1970-01-01": 2, "1970-01-03": 2}


# The command

CONFIG = """\
state: data
policy: present.yaml
backends:
  - {name: appliance, url: "http://127.0.0.1:8000", slots: 6, profile: appliance.yaml}
  - {name: nj, url: "https://nj.example", site: nanjing, models: [m], slots: 64, profile: nj.yaml,
     price: {input: 1, output: 2, currency: EUR}}
sites: {nanjing: {data_classes: [public]}}
"""


COUNT = 110
EARLY = 30
"""Of them, those of the evening."""


@cache
def history() -> list[Trip]:
    return played(office())


def office() -> Workload:
    """An evening whose requests fit locally, and after midnight a rush that does not."""
    draw = Random(5)
    at, arrivals = 0.0, []
    for number in range(COUNT):
        rush = number >= EARLY
        at += draw.expovariate(2.0 if rush else 0.15)
        if number == EARLY:
            at += 600.0
        tenant = "vip" if number % 3 == 0 else "acme"
        prompt = 300 + draw.randrange(600)
        arrivals.append(
            Arrival(round(at * 1e6), prompt, 30 + draw.randrange(80), tenant=tenant, model="m", session="s")
        )
    return Workload("office", arrivals, 512)


def prepared(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """A folder with a configuration, in which commands run from here on."""
    patch.chdir(folder)
    (folder / "tidegate.yaml").write_text(CONFIG)
    (folder / "present.yaml").write_text(SPILLS)
    (folder / "stays.yaml").write_text(STAYS)
    for name, profile in PROFILES.items():
        (folder / f"{name}.yaml").write_text(dump_profile(load_profile(profile)))
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return prepared(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("written") / "data"
    write(data, [row_of(trip, cost_nano=1, currency="EUR") for trip in history()])
    return data


@pytest.fixture
def ledger(folder: Path, written: Path) -> Path:
    copytree(written, folder / "data")
    return folder


def simulate(*arguments: str) -> Result:
    app = typer.Typer()
    app.callback()(cli._root)
    cli.register(app, "simulate")
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, ["simulate", *arguments])


def runs(*arguments: str) -> Any:
    found = simulate(*arguments, "--json")
    assert found.exit_code == 0, found.stderr
    return json.loads(found.stdout)


SINCE = ("--from-ledger", "2023-11-01")


@pytest.fixture(scope="module")
def played_again(tmp_path_factory: pytest.TempPathFactory, written: Path) -> Any:
    """By day, the present file and one that stays at home."""
    with pytest.MonkeyPatch.context() as patch:
        home = prepared(tmp_path_factory.mktemp("home"), patch)
        copytree(written, home / "data")
        return runs(*SINCE, "--policy", "stays.yaml", "--ttft", "2", "--tpot", "0.2", "--by", "day")


def test_the_present_file_simulated_is_what_was_and_one_that_stays_is_not(played_again: Any) -> None:
    """The ledger was written by the same cluster, so that simulating the present file meets it exactly."""
    found = played_again
    was, present, new = found["runs"]
    assert [run["kind"] for run in found["runs"]] == ["ledger", "present", "new"]
    assert [Path(run["policy"]).name for run in found["runs"][1:]] == ["present.yaml", "stays.yaml"]
    assert found["requests"] == was["requests"] == present["requests"] == new["requests"] == COUNT
    for name in ("goodput", "spill_share", "sites", "rejected", "failed"):
        assert present[name] == was[name], name
    for name in ("ttft_s", "tpot_s"):
        assert present[name] == pytest.approx(was[name], rel=0.02), name
    assert new["ttft_s"]["p99"] is None  # so many were refused
    assert was["spill_share"] > 0.2
    assert new["spill_share"] == 0.0
    assert new["sites"] == {"local": 1.0}
    assert new["rejected"] > was["rejected"] == 0
    assert new["goodput"] < was["goodput"]
    assert was["cost"] == pytest.approx(COUNT * 1e-9)
    assert present["cost"] > new["cost"] == 0.0  # the appliance has no price, so nothing is known of it
    assert new["unpriced"] == COUNT - new["rejected"]
    assert present["simulated_requests_per_second"] > 0
    assert was["simulated_requests_per_second"] is None


def test_by_day(played_again: Any) -> None:
    found = played_again
    days = found["runs"][0]["by_day"]
    assert Counter({day: one["requests"] for day, one in days.items()}).total() == COUNT
    first, *_, last = days
    for run in found["runs"]:
        assert run["by_day"].keys() == days.keys()
        assert run["by_day"][first]["spill_share"] == 0.0
    assert found["runs"][0]["by_day"][last]["spill_share"] > 0.2


def test_the_table_sets_all_beside_each_other(ledger: Path) -> None:
    found = simulate(*SINCE, "--policy", "stays.yaml", "local-first", "--ttft", "2", "--by", "day")
    assert found.exit_code == 0, found.stderr
    lines = [line.split() for line in found.stdout.splitlines()]
    assert ["requests", *[f"{COUNT}"] * 4] in lines
    spill, *_ = (line for line in lines if line[:1] == ["spill"])
    first, *_, last = (line for line in lines if line[:1] and line[0].startswith("2023-11-"))
    assert first < last
    ttft = next(line[3:] for line in lines if line[:2] == ["TTFT", "p99"])
    assert ttft[2] == "never" not in (ttft[0], ttft[1])
    assert spill[1] == spill[2] != spill[3] == "0.0%"
    assert "note: requests come when they came" in found.stdout
    for row in ("goodput", "TTFT p95 s", "TPOT p99 ms", "at local", "at nanjing", "rejected", "cost EUR"):
        assert any(line.strip().startswith(row) for line in found.stdout.splitlines()), row


def test_rules_meet_the_times_that_were_and_the_labels_of_keys(folder: Path) -> None:
    trips = history()
    write(folder / "data", [])
    engine = open_database(folder / "data")
    _, key = create_key(engine, load_pepper(folder / "data"), tenant="vip", labels={"kind": "batch"})
    _Insert(engine).rows(
        [to_values(row_of(trip, key_id=key.id if trip.arrival.tenant == "vip" else "")) for trip in trips]
    )
    engine.dispose()
    batch = sum(trip.arrival.tenant == "vip" for trip in trips)
    away = "prefer: [{site: nanjing}]"
    (folder / "labels.yaml").write_text(
        f"rules: [{{name: batch, when: {{labels: {{kind: batch}}}}, {away}}}, {{name: others, sites: [local]}}]"
    )
    (folder / "night.yaml").write_text(
        f"rules: [{{name: night, when: {{time: '00:00-06:00'}}, {away}}}, {{name: others, sites: [local]}}]"
    )
    late = sum(trip.facts.wall % 86_400 < 6 * 3600 for trip in trips)
    assert late == COUNT - EARLY
    *_, by_label, by_night = runs(*SINCE, "--policy", "labels.yaml", "night.yaml")["runs"]
    for new, count in ((by_label, batch), (by_night, late)):
        assert new["sites"]["nanjing"] * (COUNT - new["rejected"]) == pytest.approx(count)


def test_a_policy_file_that_was_changed_meanwhile_is_noted(ledger: Path) -> None:
    early = history()[EARLY]
    os.utime(ledger / "present.yaml", (0, EPOCH + early.arrival.at / 1e6))
    (note,) = (
        note
        for note in runs(*SINCE, "--policy", "stays.yaml")["notes"]
        if "policy file was last changed" in note
    )
    assert note.startswith(f"{EARLY} of {COUNT} requests came before")


def test_until_ends_the_span(ledger: Path) -> None:
    assert runs(*SINCE, "--until", "2023-11-15", "--policy", "stays.yaml")["requests"] == EARLY


def test_a_trace_is_played_in_place_of_the_ledger(folder: Path) -> None:
    with (folder / "trace.jsonl").open("wb") as file:
        write_workload(office(), file)
    found = runs("--trace", "trace.jsonl", "--policy", "stays.yaml")
    present, new = found["runs"]
    assert (present["kind"], new["kind"]) == ("present", "new")
    assert present["spill_share"] > 0.2 > new["spill_share"] == 0.0
    (folder / "tidegate.yaml").write_text(
        CONFIG.replace("models: [m]", "models: [x]").replace("slots: 6,", "slots: 6, models: [x],")
    )
    found = runs("--trace", "trace.jsonl", "--policy", "stays.yaml")
    assert "no backend serves a model of the trace: each request may go anywhere" in found["notes"]
    assert found["runs"][0]["spill_share"] == present["spill_share"]


def test_a_backend_without_a_profile_is_fitted_or_named(
    ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sim.ledger_speed.LEAST", 40)
    monkeypatch.setattr("sim.ledger_speed.SEARCH", Search(starts=1, evaluations=80))
    without = CONFIG.replace(", profile: appliance.yaml", "")
    (ledger / "tidegate.yaml").write_text(without)
    found = runs(*SINCE, "--policy", "stays.yaml")
    was, present, _ = found["runs"]
    told = {one["name"]: one["speed"] for one in found["backends"]}
    assert told["appliance"].startswith("fitted to the ledger's own times of ")
    assert present["tpot_s"]["p50"] == pytest.approx(was["tpot_s"]["p50"], rel=0.15)
    assert any(note.startswith("appliance: no `profile:`, so fitted") for note in found["notes"])
    (ledger / "tidegate.yaml").write_text(without.replace(", profile: nj.yaml", ""))
    failed = simulate(*SINCE, "--until", "2023-11-15", "--policy", "stays.yaml")
    assert (failed.exit_code, failed.stdout) == (2, "")
    for said in (
        "how fast is appliance (",
        "nj (0 complete answers in the ledger, 40 are the least)",
        "`profile:`",
    ):
        assert said in failed.stderr


def test_with_a_trace_nothing_is_said_of_a_ledger_that_is_not_read(ledger: Path) -> None:
    (ledger / "tidegate.yaml").write_text(CONFIG.replace(", profile: appliance.yaml", ""))
    with (ledger / "trace.jsonl").open("wb") as file:
        write_workload(office(), file)
    failed = simulate("--trace", "trace.jsonl", "--policy", "stays.yaml")
    assert (failed.exit_code, failed.stdout) == (2, "")
    assert "how fast is appliance (with --trace no ledger is read)?" in failed.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--policy", "stays.yaml"), "give --from-ledger 7d or --trace FILE"),
        (
            (*SINCE, "--trace", "t", "--policy", "stays.yaml"),
            "give --from-ledger 7d or --trace FILE, not both",
        ),
        (("--trace", "t", "--until", "1d", "--policy", "stays.yaml"), "--until is for --from-ledger"),
        ((*SINCE, "--by", "hour", "--policy", "stays.yaml"), "--by is day, not 'hour'"),
        ((*SINCE, "--policy", "none.yaml"), "none.yaml: no such file or directory"),
        ((*SINCE, "--policy", "local-frist"), "did you mean 'local-first'?"),
        ((*SINCE, "--policy", "wrong.yaml"), "wrong.yaml:1:"),
        (("--from-ledger", "soon", "--policy", "stays.yaml"), "--from-ledger: 'soon' is neither a duration"),
        ((*SINCE, "--until", "2023-10-01", "--policy", "stays.yaml"), "is not before --until 2023-10-01"),
        (
            ("--from-ledger", "1d", "--policy", "stays.yaml"),
            "no request for text is in this part of the ledger",
        ),
        (("--trace", "none.csv", "--policy", "stays.yaml"), "none.csv: no such file or directory"),
        (
            (*SINCE, "--policy", "stays.yaml", "--config", "other.yaml"),
            "other.yaml: no such file or directory",
        ),
    ],
)
def test_what_is_wrong_is_told(ledger: Path, arguments: tuple[str, ...], said: str) -> None:
    (ledger / "wrong.yaml").write_text("rules: [{nam: x}]")
    found = simulate(*arguments)
    assert (found.exit_code, found.stdout) == (2, "")
    assert said in found.stderr


def test_without_a_ledger_or_a_configuration(folder: Path) -> None:
    assert "there is no ledger in" in simulate(*SINCE, "--policy", "stays.yaml").stderr
    (folder / "tidegate.yaml").unlink()
    found = simulate(*SINCE, "--policy", "stays.yaml")
    assert found.exit_code == 2
    assert "there is no tidegate.yaml here" in found.stderr
