"""Leaderboards: common requests, paired differences, whole seeds, the command and how it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from sim import leaderboard_command
from sim.cluster_file import read_cluster
from sim.evaluate import Run, evaluate, named_policy
from sim.intervals import paired
from sim.leaderboard import Board, Job, as_json
from sim.leaderboard_command import INTERRUPTED, leaderboard
from sim.leaderboard_plots import write_plots
from sim.leaderboard_table import _table, shown
from sim.traffic import Traffic
from sim.workload import Arrival, Workload
from tests.pages import ROOT
from tests.sim.test_evaluate import CLUSTER, rush

POLICIES = ("least-load", "local-first", "random")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    rows = "".join(
        f"2023-11-16 18:{n // 60:02}:{n % 60:02},{300 + n % 900},{10 + n % 50}\n" for n in range(120)
    )
    (tmp_path / "trace.csv").write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}")
    return tmp_path


def board(folder: Path, workload: Workload | None = None, speeds: tuple[float, ...] = (1.0,)) -> Board:
    cluster = read_cluster(folder / "cluster.yaml")
    return Board(
        cluster, Traffic(workload or rush()), [named_policy(name) for name in POLICIES], (1, 2, 3), speeds
    )


def played(one: Board, workers: int = 1) -> list[tuple[Job, Run]]:
    runs: list[tuple[Job, Run]] = []
    one.play_all(workers, lambda job, run: runs.append((job, run)))
    return runs


def command(folder: Path, *words: str) -> Result:
    app = typer.Typer()
    app.command()(leaderboard)
    files = ["--trace", str(folder / "trace.csv"), "--cluster", str(folder / "cluster.yaml")]
    return CliRunner().invoke(app, [*files, *words])


# Boards


def test_all_policies_of_a_seed_get_the_same_requests(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, set[tuple[Arrival, ...]]] = {}

    def evaluated(cluster: object, policy: object, workload: Workload, seed: int) -> None:
        seen.setdefault(seed, set()).add(tuple(workload))

    monkeypatch.setattr("sim.leaderboard.evaluate", evaluated)
    played(board(folder))
    assert {seed: len(workloads) for seed, workloads in seen.items()} == {1: 1, 2: 1, 3: 1}
    assert len(set.union(*seen.values())) == 3


def test_many_processes_find_what_one_finds(folder: Path) -> None:
    one, many = (board(folder).standings(played(board(folder), workers)) for workers in (1, 2))
    assert json.dumps(as_json(board(folder), one)) == json.dumps(as_json(board(folder), many))


def test_figures_are_means_over_seeds_and_differences_are_by_seed(folder: Path) -> None:
    found = board(folder, speeds=(1.0, 4.0))
    standings = found.standings(played(found))
    assert [one.speed for one in standings] == [1.0] * 3 + [4.0] * 3
    for speed in (1.0, 4.0):
        best, *others = [one for one in standings if one.speed == speed]
        assert best.behind is None
        goodput = best.values("goodput_rps")
        mean = best.of("goodput_rps")
        assert mean is not None
        assert mean.mean == pytest.approx(float(np.mean(goodput)))
        assert mean.half_width == pytest.approx(4.302653 * np.std(goodput, ddof=1) / np.sqrt(3), rel=1e-6)
        for other in others:
            assert other.behind == paired(other.values("goodput_rps"), goodput)
            assert other.behind is not None
            assert other.behind.mean <= 0.0


def test_a_seed_counts_once_all_policies_have_played_it(folder: Path) -> None:
    found = board(folder)
    runs = played(found)
    assert [one.seeds for one in found.standings(runs[:5])] == [(1,)] * 3
    assert found.standings(runs[:2]) == []


def test_a_figure_that_a_seed_lacks_has_no_mean(folder: Path) -> None:
    found = board(folder)
    runs = played(found)
    job, run = runs[0]
    runs[0] = job, run._replace(figures=replace(run.figures, gco2=None))
    lacking = next(one for one in found.standings(runs) if one.policy == POLICIES[job.policy])
    assert lacking.of("gco2") is None
    figures = as_json(found, [lacking])["standings"][0]["figures"]
    assert figures["gco2"]["mean"] is None
    assert [value is None for value in figures["gco2"]["by_seed"]] == [True, False, False]


def test_a_seed_without_requests_is_an_error(folder: Path) -> None:
    traffic = board(folder)
    traffic.traffic.source = Workload("none", [])
    traffic.traffic.resamples = False
    with pytest.raises(ValueError, match="seed 1 has no request"):
        played(traffic)


# The command


def test_the_command_writes_a_table_json_and_pictures(folder: Path) -> None:
    words = [
        "--policy",
        "local-first",
        "least-load",
        "--seeds",
        "2",
        "--speed",
        "1",
        "--speed",
        "6",
        "--jobs",
        "1",
    ]
    done = command(folder, *words, "--json", str(folder / "b.json"), "--plots", str(folder / "plots"))
    assert done.exit_code == 0, done.output
    assert "speed 1: " in done.stdout
    assert "speed 6: " in done.stdout
    assert "means of 2 seeds (12 moving blocks of the trace), ± 95 %" in done.stdout
    assert "context, tokens: here 5000, there 5000" in done.stdout
    assert "cost: here without a price" in done.stdout
    found = json.loads((folder / "b.json").read_text())
    assert found["simulated_requests_per_second"] > 0
    assert found["interrupted"] is False
    assert {(one["policy"], one["speed"]) for one in found["standings"]} == {
        (policy, speed) for policy in ("local-first", "least-load") for speed in (1.0, 6.0)
    }
    pictures = sorted((folder / "plots").iterdir())
    assert [file.name for file in pictures] == ["goodput.png", "spill.png", "ttft.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in pictures)


def test_a_picture_has_the_intervals_of_the_differences(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeds differ by much, policies by little in each: what shows in the table shows in the picture."""
    found = board(folder)
    one = evaluate(found.cluster, found.policies[0], rush(), 1)
    goodput = {0: (10.0, 20.0, 30.0), 1: (9.0, 19.1, 28.9), 2: (10.1, 18.0, 31.0)}
    standings = found.standings(
        (Job(seed, 1.0, policy), one._replace(figures=replace(one.figures, goodput_rps=values[seed - 1])))
        for policy, values in goodput.items()
        for seed in (1, 2, 3)
    )
    drawn: list[tuple[float, float]] = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.bar", lambda _, x, heights, yerr, **more: drawn.append((heights[0], yerr[0]))
    )
    write_plots(found, standings, folder / "plots")
    (best, none), *others = drawn
    assert (best, none) == (20.0, 0.0)
    assert [height + error < best for height, error in others] == [False, True]


def test_json_can_go_to_standard_output(folder: Path) -> None:
    words = ["--policy", "least-load", "--seeds", "1", "--users", "3", "--jobs", "1", "--json", "-"]
    found = json.loads(command(folder, *words).stdout)
    assert (found["loop"], found["users"], found["seeds_are"]) == ("closed", 3, "the trace as it is")
    (standing,) = found["standings"]
    assert standing["figures"]["goodput_rps"]["half_width"] is None
    assert standing["figures"]["requests"]["by_seed"] == [120]


def test_what_was_never_answered_is_said_so(folder: Path) -> None:
    (folder / "none.yaml").write_text(
        "rules: [{name: r, prefer: [{backend: here}], queue: {wait: 1s, depth: 0, overflow: 1}}]\n"
    )
    done = command(
        folder, "--policy", str(folder / "none.yaml"), "--speed", "500", "--seeds", "2", "--jobs", "1"
    )
    assert done.exit_code == 0, done.output
    assert "never" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--policy", "lest-load"], "no policy is called 'lest-load'; did you mean 'least-load'?"),
        (["--policy", "a.yaml"], "a.yaml: no such file or directory"),
        (["--policy", "random", "random"], "--policy random is given twice"),
        (["--policy", "random", "--loop", "round"], "--loop is trace, open, closed, not 'round'"),
        (["--policy", "random", "--loop", "closed"], "say how many --users ask"),
        (["--policy", "random", "--loop", "open", "--users", "3"], "--users ask in a closed loop"),
        (["--policy", "random", "--users", "3", "--speed", "2"], "leave --speed out"),
        (["--policy", "random", "--speed", "0"], "--speed is a number above 0, not 0"),
        (["--policy", "random", "--speed", "nan"], "--speed is a number above 0, not nan"),
        (["--policy", "random", "--start", "soon"], "--start: expected a duration"),
        (["--policy", "random", "--start", "3600"], "no request of the trace is in that piece"),
        (["--policy", "random", "--start", "1h"], "no request of the trace is in that piece"),
        (["--policy", "random", "--json", "no/where.json"], "there is no folder no for it"),
        (["--policy", "random", "--plots", "no/where"], "there is no folder no for it"),
        (["--policy", "random", "--trace", "gone.csv"], "gone.csv: no such file or directory"),
        (["--policy", "random", "--cluster", "gone.yaml"], "gone.yaml: no such file or directory"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(folder)
    done = command(folder, *words, "--jobs", "1")
    assert done.exit_code == 2
    assert said in done.stderr
    assert done.stderr.startswith("tidegate: ")
    assert done.stderr.count("tidegate: ") == 1
    assert done.stdout == ""


def test_bad_files_are_shown_where_they_are_bad(folder: Path) -> None:
    (folder / "bad.yaml").write_text("rules:\n  - {name: r, prefer: [{backend: nowhere}]}\n")
    done = command(folder, "--policy", str(folder / "bad.yaml"))
    assert done.exit_code == 2
    assert "bad.yaml:2:" in done.stderr
    (folder / "cluster.yaml").write_text(CLUSTER.replace("rtt: 20ms", "rtt: quick"))
    done = command(folder, "--policy", "random")
    assert done.exit_code == 2
    assert "cluster.yaml:10:10: backends[1].rtt: expected a duration" in done.stderr


def test_plots_without_matplotlib_are_refused_before_anything_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaderboard_command, "find_spec", lambda _: None)
    done = command(folder, "--policy", "random", "--plots", str(folder / "plots"))
    assert done.exit_code == 2
    assert "pip install 'tidegate[plot]'" in done.stderr


def test_the_table_says_which_policy_failed(folder: Path) -> None:
    failing = board(folder)
    failing.policies = (named_policy("tests.sim.test_evaluate:Broken"),)
    assert "test_evaluate:Broken failed in" in shown(failing, failing.standings(played(failing)))


def test_rules_that_no_request_met_are_named(folder: Path) -> None:
    (folder / "vip.yaml").write_text(
        "rules: [{name: vip, when: {tenant: vip}}, {name: batch, when: {labels: {kind: batch}}}, {name: others}]\n"
    )
    rules = named_policy(str(folder / "vip.yaml"))._replace(name="vip")
    found = board(folder)
    found.policies = (rules, named_policy("random"))
    standings = found.standings(played(found))
    assert {one.policy: one.unmet_rules for one in standings} == {"vip": ["vip", "batch"], "random": []}
    text = shown(found, standings)
    assert text.count("vip: no request met its rules vip, batch\n") == 1
    assert "random: no request" not in text
    assert as_json(found, standings)["standings"][0]["unmet_rules"] == standings[0].unmet_rules
    assert "a workload of your own can have them" in text
    late = Workload("w", [Arrival(n * 1000, 10, 5, tenant="vip" if n == 90 else "") for n in range(91)])
    found = board(folder, late)
    found.policies, found.traffic.resamples = (rules,), False
    assert "vip: no request met its rule batch\n" in shown(found, found.standings(played(found)))


def test_no_figure_is_cut_off_whatever_the_width(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = "a-policy-with-" + "a-long-name-" * 8
    found = board(folder, speeds=(2.0,))
    found.policies = (found.policies[0]._replace(name=name),)
    lines = shown(found, found.standings(played(found))).splitlines()
    assert not any("…" in line for line in lines)
    assert [line for line in lines if line != line.rstrip()] == []
    (row,) = (line for line in lines if line.startswith(name))
    assert len(row.split()) == 19


def test_a_policy_that_failed_is_marked_where_it_ranks(folder: Path) -> None:
    mixed = board(folder)
    mixed.policies = (named_policy("tests.sim.test_evaluate:Broken"), named_policy("random"))
    standings = mixed.standings(played(mixed))
    speed = standings[0].speed
    names = _table([one for one in standings if one.speed == speed], speed).columns[0]
    assert sorted(map(str, names.cells)) == ["random", "tests.sim.test_evaluate:Broken (fails)"]


# Ctrl-C


def test_an_interrupt_shows_what_was_done(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Board.play

    def play(self: Board, job: Job) -> Run:
        if job.seed == 1:
            raise KeyboardInterrupt
        return real(self, job)

    monkeypatch.setattr(Board, "play", play)
    words = ["--policy", "local-first", "random", "--jobs", "1", "--json", str(folder / "b.json")]
    done = command(folder, *words)
    assert done.exit_code == INTERRUPTED
    assert "interrupted; 2 of 10 simulations were done" in done.stderr
    assert "one seed" in done.stdout
    found: dict[str, Any] = json.loads((folder / "b.json").read_text())
    assert found["interrupted"] is True
    assert [one["seeds"] for one in found["standings"]] == [[0], [0]]
    none = command(folder, *words, "--seed", "1")
    assert none.exit_code == INTERRUPTED
    assert "nothing to show" in none.stderr


TELLING = """
import os
from policies.simple import LeastLoad

class Telling(LeastLoad):
    def __init__(self, rng):
        super().__init__(rng)
        with open(os.environ["TOLD"], "wb") as file:
            file.write(b".")
"""


@pytest.mark.e2e
def test_ctrl_c_ends_all_processes(folder: Path) -> None:
    """The policy tells of each simulation; the key is pressed as a terminal does it, for the whole group."""
    (folder / "telling.py").write_text(TELLING)
    os.mkfifo(folder / "told")
    told = os.open(folder / "told", os.O_RDWR)
    words = [
        "leaderboard",
        "--trace",
        "trace.csv",
        "--cluster",
        "cluster.yaml",
        "--policy",
        "telling:Telling",
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "proxy.cli", *words, "--seeds", "10000", "--jobs", "2"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "TOLD": str(folder / "told")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        for _ in range(8):
            os.read(told, 1)
        os.killpg(process.pid, signal.SIGINT)
        shown, said = process.communicate()  # which ends once no process has these pipes any more
    os.close(told)
    assert process.returncode == INTERRUPTED, said
    assert "telling:Telling" in shown
    assert "interrupted; " in said
    assert "Traceback" not in said
