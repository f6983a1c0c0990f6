from __future__ import annotations

import io
from dataclasses import replace
from math import inf
from pathlib import Path
from random import Random
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks.boards import __main__ as command
from benchmarks.boards.baselines import QueueAndBatch
from benchmarks.boards.claims import ALL, CONTROL, Claim, Verdict, compared, judge, reasons
from benchmarks.boards.conversations import Conversations, with_conversations
from benchmarks.boards.entries import Entry, entries
from benchmarks.boards.meter import Meter
from benchmarks.boards.plot import plot
from benchmarks.boards.runs import Kept, play
from benchmarks.boards.setups import SETUPS, Setup
from benchmarks.boards.speeds import fastest
from benchmarks.boards.tuning import Budget, kept, search, untuned
from policies import names
from policies.base import RequestFacts
from policies.files import read_policy
from policies.state import Backend
from sim.evaluate import Figures, Quantiles, Run
from sim.intervals import Estimate
from sim.leaderboard import Board, Standing
from sim.profile import dump_profile, load_profile
from sim.traffic import Loop, Traffic
from sim.tune import Search
from sim.workload import Arrival, Workload

TRACE = Workload("made up", [Arrival(at * 120_000, 400 + 90 * (at % 7), 20 + at % 11) for at in range(120)])
SETUP = next(one for one in SETUPS if one.name == "azure")


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Setup:
    """Azure's cluster with a trace that is there everywhere."""
    path = tmp_path / "trace.csv"
    path.write_text("made up")
    monkeypatch.setattr(Setup, "trace_path", property(lambda self: path))
    monkeypatch.setattr(Setup, "traffic", lambda self, piece, loop=Loop.OPEN: Traffic(TRACE, loop=loop))
    return SETUP


# Conversations


def test_a_prompt_that_begins_with_an_earlier_one_goes_on_with_it() -> None:
    prompts = [(0, 1, 2, 90), (0, 5, 6, 91), (0, 1, 2, 3, 4, 92), (0, 1, 2, 3, 4, 7, 93), (0, 8), (0, 9)]
    arrivals = [Arrival(at, 512 * len(one), 9, hashes=one) for at, one in enumerate(prompts)]
    found = [one.session for one in with_conversations(Workload("w", arrivals, 512))]
    assert found[0] == found[2] == found[3]
    assert len({found[0], found[1], found[4], found[5]}) == 4


def test_only_a_closed_loop_waits_for_answers_and_samples_do_not_get_longer() -> None:
    arrivals = [
        Arrival(at * 1_000_000, 2048, 9, hashes=(0, *range(at % 3 * 1000 + 1, at % 3 * 1000 + at + 3)))
        for at in range(60)
    ]
    source = Workload("w", arrivals, 512)
    opened = Conversations(source, loop=Loop.OPEN).workload(1, speed=2.0)
    closed = Conversations(source, loop=Loop.CLOSED, ttft_s=0.1, tpot_s=0.01).workload(1)
    assert all(one.think < 0 for one in opened)
    assert opened.span <= source.span / 2 + 1_000_000
    assert any(one.think >= 0 for one in closed)


# Policies


@pytest.mark.parametrize("setup_", SETUPS, ids=lambda one: one.name)
def test_every_policy_of_the_registry_is_there_and_can_be_read(setup_: Setup) -> None:
    cluster = setup_.cluster()
    found = entries(cluster)
    assert set(names()) <= {one.name for one in found}
    for one in found:
        text = untuned(one)
        assert not read_policy(text.text, text.name, cluster.known, 0).warnings
    contexts = (setup_.cluster_path).read_text(encoding="utf-8").count("context: ")
    assert contexts == (setup_.cluster_path).read_text(encoding="utf-8").count("- name:")


def test_what_is_promised_is_told() -> None:
    cluster = SETUP.cluster()
    told = {one.name: dict(one.given) for one in entries(cluster)}
    for name in ("forecast", "mooncake", "cost"):
        assert told[name] == {"ttft": cluster.sla.ttft, "tpot": cluster.sla.tpot}


def test_those_that_wait_count_four_times() -> None:
    policy = QueueAndBatch(Random(1))
    backends = [
        Backend("waits", slots=8, in_flight=2, prefilling=2),
        Backend("runs", slots=8, in_flight=7, prefilling=0),
    ]
    answer: Any = policy.choose(RequestFacts("r", "m"), backends, 0.0)
    assert answer.scores == {"waits": 8.0, "runs": 7.0}
    assert answer.backend == "runs"


# Tuning


def test_what_was_tuned_is_kept_until_something_changes(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = next(one for one in entries(setup.cluster()) if one.name == "prequal")
    budget = Budget(3, 1)
    parts = (Traffic(TRACE), Traffic(TRACE))
    heard: list[int] = []
    found = search(setup, entry, parts, budget, 1, tmp_path, tmp_path / "tuned", heard.append)
    assert heard == [1, 2, 3]
    assert "# searched: " in found.text
    folder = tmp_path / "tuned"
    assert kept(folder, setup, entry, budget) == found
    assert kept(folder, setup, entry, Budget(2, 1)) == found
    assert kept(folder, setup, entry, Budget(4, 1)) is None
    assert kept(folder, setup, entry, Budget(3, 2)) is None
    assert kept(folder, replace(setup, speed=9.0), entry, budget) is None
    assert kept(folder, setup, replace(entry, given={"quantile": 0.5}), budget) is None
    monkeypatch.setattr(Setup, "machines", property(lambda self: "others"))
    assert kept(folder, setup, entry, budget) is None


def test_other_profiles_are_other_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = SETUP.cluster_path.read_text(encoding="utf-8").replace("l40-4-32b", "./mine.yaml")
    path = tmp_path / "azure.yaml"
    path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(Setup, "cluster_path", property(lambda self: path))
    profile = load_profile("l40-4-32b")
    found = []
    for overhead_us in (0.0, 50.0):
        changed = profile.model_copy(update={"overhead_us": overhead_us})
        (tmp_path / "mine.yaml").write_text(dump_profile(changed), encoding="utf-8")
        found.append(SETUP.machines)
    assert found[0] != found[1]


def test_defaults_stay_where_nothing_is_better(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_good(self: Search, task: Any) -> float:
        return 1.0 if "picker" in self.given else 2.0

    monkeypatch.setattr(Search, "play", as_good)
    entry = next(one for one in entries(setup.cluster()) if one.name == "weighted-scores")
    parts = (Traffic(TRACE), Traffic(TRACE))
    found = search(setup, entry, parts, Budget(3, 1), 1, tmp_path, tmp_path, lambda done: None)
    assert "picker" not in found.text
    assert "they stay" in found.text


# Playing


def test_what_was_played_is_not_played_again(setup: Setup, tmp_path: Path) -> None:
    entry = Entry("least-load", "least-load")
    board = Board(setup.cluster(), Traffic(TRACE), [untuned(entry)], range(2), (1.0,))
    path = tmp_path / "runs.jsonl"

    def played() -> tuple[list[bool], list[Any]]:
        heard: list[bool] = []
        runs = Kept(path)
        found = play(setup, board, runs, 1, lambda run, before: heard.append(before))
        runs.close()
        return heard, found

    first, second = played(), played()
    assert first[0] == [False, False]
    assert second[0] == [True, True]
    assert first[1] == second[1]
    path.write_bytes(path.read_bytes()[:-20])  # killed amid a line
    assert played()[0] == [True, False]
    assert played()[0] == [True, True]


def test_time_left_is_told_by_what_was_played() -> None:
    meter = Meter(1000, io.StringIO())
    meter.advance(500, "kept", kept=True)
    meter._began = 0.0
    meter.advance(100, "played")
    assert meter.line("now", 60.0) == "60%, 4 min left, now"


def test_the_fastest_speed_is_found() -> None:
    asked: list[int] = []

    def copes(step: int) -> bool:
        asked.append(step)
        return step <= 17

    assert fastest(copes, 1, 40) == 17
    assert len(asked) < 8
    with pytest.raises(ValueError, match="too small"):
        fastest(lambda step: False, 1, 40)


# Claims


FIGURES = Figures(
    requests=9,
    seconds=1.0,
    goodput_rps=9.0,
    met=1.0,
    ttft_s=Quantiles(1.0, 1.0, 1.0),
    tpot_s=Quantiles(0.1, 0.1, 0.1),
    total_s=Quantiles(2.0, 2.0, 2.0),
    spill=0.5,
    rejected=0.0,
    failed=0.0,
    cost=1.0,
    unpriced=0.0,
    gco2=1.0,
    fairness=1.0,
    cached=0.0,
    policy_failures=0,
)


def standing(policy: str, *medians: float, **figures: Any) -> Standing:
    """With these TTFT p50, one for each seed."""
    runs = [
        Run(replace(FIGURES, ttft_s=Quantiles(one, one, inf), **figures), (one,) * 101, 1.0)
        for one in medians
    ]
    return Standing(policy, 1.0, tuple(range(len(runs))), tuple(runs), None)


CLAIM = Claim("new", "old", "ttft_s.p50", 0.8, "its paper", "mooncake, open", "other machines")


@pytest.mark.parametrize(
    ("medians", "word"),
    [
        ((1.0, 1.0, 1.02), "shown"),
        ((1.8, 1.8, 1.81), "in part"),
        ((1.0, 3.0, 2.0), "not shown"),
        ((3.0, 3.0, 3.1), "worse"),
        ((1.0, 1.0, inf), "worse"),
    ],
)
def test_a_claim_is_judged_by_the_interval_of_its_ratio(medians: tuple[float, ...], word: str) -> None:
    shown = {CLAIM.on: [standing("new", *medians), standing("old", 2.0, 2.0, 2.0)]}
    assert [one.word for one in judge(shown, [CLAIM])] == [word]


def test_more_may_be_better() -> None:
    claim = replace(CLAIM, published=1.12)
    assert [Verdict(claim, Estimate(mean, 0.01)).word for mean in (1.2, 1.05, 1.0, 0.8)] == [
        "shown",
        "in part",
        "not shown",
        "worse",
    ]


def test_one_that_the_other_never_answered_says_nothing() -> None:
    shown = {CLAIM.on: [standing("new", 1.0, 1.0), standing("old", 2.0, inf)]}
    assert judge(shown, [CLAIM])[0].found is None
    assert judge(shown, [CLAIM])[0].word == "unknown"
    neither = {CLAIM.on: [standing("new", 1.0, inf), standing("old", 2.0, inf)]}
    assert judge(neither, [CLAIM])[0].word == "unknown"
    assert judge({CLAIM.on: [standing("new", 1.0, 1.0)]}, [CLAIM]) == []


def test_what_is_not_shown_is_said_and_why() -> None:
    control = replace(CLAIM, on=CONTROL)
    shown = {
        CLAIM.on: [standing("new", 2.5, 2.5), standing("old", 2.0, 2.0)],
        CONTROL: [standing("new", 1.0, 1.0), standing("old", 2.0, 2.0)],
    }
    line = reasons(judge(shown, [CLAIM, control]))[0]
    assert line == (
        "new (its paper): other machines; ttft_s.p50 over old is worse, with alike backends in one place shown "
        "(0.50 ± 0.00)"
    )
    assert "new" not in str(reasons(judge({CLAIM.on: shown[CONTROL]}, [CLAIM])))


def test_claims_are_of_policies_and_leaderboards_that_are_there() -> None:
    known = {one.name for one in entries(SETUP.cluster())}
    boards = {f"{one.name}, {'control' if one.control else loop}" for one in SETUPS for loop in one.loops}
    for claim in ALL:
        assert {claim.policy, claim.against} <= known
        assert claim.on in {*boards, "azure, overloaded"}
        assert standing("a", 1.0).of(claim.figure) is not None
    assert compared() <= known
    assert set(command.OVERLOADED) <= known


def test_a_load_that_tells_nothing_apart_breaks_a_promise() -> None:
    def broken(best: float, worst: float, failures: int = 0) -> list[str]:
        standings = [standing("a", 1.0, met=best), standing("b", 1.0, met=worst, policy_failures=failures)]
        board = Board(SETUP.cluster(), Traffic(TRACE), [], range(1))
        return command._broken([command.Shown("azure, open", board, standings)])

    assert broken(0.95, 0.5) == []
    assert "the best policy answers 85.0%" in broken(0.85, 0.5)[0]
    assert "the worst policy copes as well" in broken(0.95, 0.85)[0]
    assert broken(0.95, 0.5, failures=3) == ["azure, open: b failed in 3 calls"]


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="NOT RUN: needs the extra `plot`")
    path = tmp_path / "boards.png"
    plot({"azure, open": [standing("a", 1.0, 1.2), standing("b", 2.0, inf)]}, path)
    assert path.read_bytes().startswith(b"\x89PNG")


# The command


@pytest.fixture
def app() -> Typer:
    app = Typer()
    app.command()(command.main)
    return app


def test_the_command_tunes_plays_and_judges(
    setup: Setup, app: Typer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "DATA", Path(__file__).parent)
    words = ["--quick", "--board", "azure"]
    for one in ("prequal", "weighted-qps", "random"):
        words += ["--policy", one]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "azure, open" in done.output
    assert "azure, overloaded" in done.output
    assert "prequal (Prequal, NSDI'24" in done.output
    assert "appliance 16384" in done.output


def test_the_control_plays_only_what_is_compared(
    setup: Setup, app: Typer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "DATA", Path(__file__).parent)
    done = CliRunner().invoke(app, ["--quick", "--board", "alike", "--policy", "forecast"])
    assert done.exit_code == 2
    assert "only policies that are compared: 4q+r, " in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--board", "moon"], "not 'moon'"), (["--policy", "sky"], "not 'sky'")],
)
def test_what_is_not_there_is_said(
    setup: Setup, app: Typer, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setattr(command, "DATA", Path(__file__).parent)
    done = CliRunner().invoke(app, ["--quick", *words])
    assert done.exit_code == 2
    assert message in done.output
