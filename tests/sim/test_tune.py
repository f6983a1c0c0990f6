"""Tuning: a search that finds what is there, tests it on other traffic, goes on where it stopped, and says so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import inf
from pathlib import Path
from random import Random
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner, Result

from policies import PolicyError
from policies.base import BackendView, Decision, Policy, RequestFacts, Send, Tunable
from policies.files import read_policy
from sim.cluster_file import read_cluster
from sim.evaluate import named_policy
from sim.generator_spec import WorkloadSpec
from sim.profile import dump_profile, load_profile
from sim.traces import Span
from sim.traffic import Traffic
from sim.tune import OBJECTIVES, OTHER_DRAWS, Search, Space, State, Task, Tuned, policy_file, split, tune
from sim.tune_command import INTERRUPTED
from sim.tune_command import tune as tune_command
from sim.workers import Workers
from sim.workload import Arrival, Workload
from tests.sim.test_evaluate import CLUSTER as SMALL

CLUSTER = SMALL.replace("slots: 4,", "slots: 40,")
"""The slow backend takes more than it can serve."""

SHARE = f"{__name__}:Share"


class Share(Policy):
    """Sends a share of the requests to the first backend; of ours that is the slow one."""

    def __init__(
        self,
        rng: Random,
        *,
        share: Annotated[float, "Of the requests.", Tunable(0.0, 1.0)] = 1.0,
        scale: Annotated[float, "Means nothing.", Tunable(0.01, 100.0, log=True)] = 1.0,
        steps: Annotated[int, "Means nothing.", Tunable(1, 9)] = 3,
        other: Annotated[float, "Is not searched."] = 0.0,
    ) -> None:
        if share < 0.0:
            raise ValueError("a share is zero or more")
        self.share = share

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        first = len(backends) == 1 or int(request.id) * 0.618 % 1.0 < self.share
        return Send(backends[0 if first else 1].name, reason="by share")


class Idle(Share):
    """Its parameter does nothing."""

    def __init__(self, rng: Random, *, idle: Annotated[float, "Nothing.", Tunable(0.0, 1.0)] = 0.5) -> None:
        self.share = 0.5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    rows = "".join(
        f"2023-11-16 18:{n // 60:02}:{n % 60:02},{900 + n % 300},{20 + n % 50}\n" for n in range(200)
    )
    (tmp_path / "trace.csv").write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}")
    return tmp_path


def search(folder: Path, policy: str = SHARE, **values: Any) -> Search:
    rush = Workload("w", [Arrival(n * 250_000, 900 + n % 300, 20 + n % 50) for n in range(160)])
    training, testing = split(Traffic(rush), 0.4)
    given: dict[str, Any] = {"seeds": 2, "evaluations": 20, **values}
    return Search(policy, read_cluster(folder / "cluster.yaml"), training, testing, **given)


def run(one: Search, state: Path, progress: Any = lambda done, least: None) -> Tuned:
    kept = State(state, {"search": "s"})
    try:
        with Workers(one.play, 1) as workers:
            return tune(one, workers, kept, progress)
    finally:
        kept.close()


def command(folder: Path, *words: str) -> Result:
    app = typer.Typer()
    app.command()(tune_command)
    files = ["--trace", str(folder / "trace.csv"), "--cluster", str(folder / "cluster.yaml")]
    return CliRunner().invoke(app, [*files, "-o", str(folder / "tuned.yaml"), "--jobs", "1", *words])


# What is searched


def test_parameters_lie_between_their_bounds_by_difference_or_by_ratio() -> None:
    space = Space(SHARE)
    assert [one.name for one, _ in space.parameters] == ["share", "scale", "steps"]
    assert space.middle == pytest.approx([1.0, 0.5, 0.25])
    assert space.point([0.0, 0.0, 0.0]) == {"share": 0.0, "scale": 0.01, "steps": 1}
    assert space.point([1.0, 1.0, 1.0]) == {"share": 1.0, "scale": 100.0, "steps": 9}
    assert space.point([0.12345678, 0.75, 0.5]) == {"share": 0.1235, "scale": 10.0, "steps": 5}
    assert space.point([-1.0, 2.0, 0.5]) == {"share": 0.0, "scale": 100.0, "steps": 5}


def test_the_values_of_a_map_are_searched_each(folder: Path) -> None:
    space = Space("weighted-scores", {"picker": "softmax"})
    point = space.point(space.middle)
    assert point == {"scorers.prefix": 3.0, "scorers.queue": 2.0, "scorers.kv": 2.0, "temperature": 1.0}
    text = policy_file("weighted-scores", {"scorers": {"load": 1.0, "kv": 9.0}, **point}).text
    picked = read_policy(text, "tuned").file.rules[0].pick
    assert picked is not None
    assert picked.parameters == {
        "scorers": {"load": 1.0, "kv": 2.0, "prefix": 3.0, "queue": 2.0},
        "temperature": 1.0,
    }
    nothing = {**point, "scorers.prefix": 0.0, "scorers.queue": 0.0, "scorers.kv": 0.0}
    one = search(folder, "weighted-scores")
    assert one.play(Task(tuple(nothing.items()), 0, False)) == -inf
    assert one.play(Task(tuple(point.items()), 0, False)) > 0.0


def test_what_does_nothing_is_not_searched() -> None:
    """The temperature is one of `softmax`, and by default the best is taken."""
    names = [
        [one.name for one, _ in Space("weighted-scores", given).parameters]
        for given in ({}, {"picker": "softmax"})
    ]
    assert names[0] == ["scorers.prefix", "scorers.queue", "scorers.kv"]
    assert names[1] == [*names[0], "temperature"]


def test_a_policy_without_any_cannot_be_tuned() -> None:
    with pytest.raises(PolicyError, match="no parameter that says where to search it"):
        Space("round-robin")


def test_a_trace_is_split_by_time() -> None:
    arrivals = [Arrival(n * 1_000_000, n + 1, 1) for n in range(100)]
    training, testing = split(Traffic(Workload("w", arrivals), resamples=False), 0.3)
    assert [one.prompt_tokens for one in training.workload(0)] == list(range(1, 71))
    assert [one.prompt_tokens for one in testing.workload(0)] == list(range(71, 101))
    assert testing.workload(0).arrivals[0].at == 0


def test_servegen_is_split_by_time_and_what_is_made_up_by_seeds(folder: Path) -> None:
    training, testing = split(Traffic(Path("x_rates.csv"), Span(600.0, 1000.0)), 0.3)
    assert training.span == Span(600.0, 700.0)
    assert testing.span == Span(1300.0, 300.0)
    spec = WorkloadSpec.model_validate(
        {"duration": "1m", "clients": [{"name": "a", "rate": 1, "prompt": 10, "output": 5}]}
    )
    both = split(Traffic(spec), 0.3)
    made_up = Search(SHARE, read_cluster(folder / "cluster.yaml"), *both, seeds=2, seed=5)
    assert [task.seed for task in made_up.tasks({})] == [5, 6]
    assert [task.seed for task in made_up.tasks({}, test=True)] == [5 + OTHER_DRAWS, 6 + OTHER_DRAWS]
    assert [task.seed for task in search(folder, seed=5).tasks({}, test=True)] == [5, 6]


# The search


def test_it_finds_what_is_better_and_the_test_part_confirms_it(folder: Path) -> None:
    """Everything to the slow backend is the default, and it is overrun."""
    heard: list[tuple[int, float]] = []
    found = run(search(folder), folder / "state", lambda done, least: heard.append((done, least)))
    assert found.default["share"] == 1.0
    assert 0.0 < found.point["share"] < 0.9
    assert sum(found.training) > sum(found.training_default) * 1.05
    assert found.is_better(OBJECTIVES["goodput"])
    assert [done for done, _ in heard] == list(range(1, 21))
    assert all(after <= before for (_, before), (_, after) in pairwise(heard))


def test_what_it_tells_is_what_the_file_does(folder: Path) -> None:
    one = search(folder, evaluations=6)
    found = run(one, folder / "state")
    text = policy_file(SHARE, found.point, ["why"]).text
    assert text.startswith("# why\nrules:\n")
    picked = read_policy(text, "tuned").file.rules[0].pick
    assert picked is not None
    assert picked.parameters == found.point
    assert [one.play(Task(tuple(found.point.items()), seed, False)) for seed in (0, 1)] == found.training


@pytest.mark.parametrize("stop", [1, 5, 10])
def test_a_search_that_was_stopped_goes_on_to_the_same_end(folder: Path, stop: int) -> None:
    whole = run(search(folder, evaluations=12), folder / "whole")

    def interrupt(done: int, _: float) -> None:
        if done >= stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(search(folder, evaluations=12), folder / "state", interrupt)
    kept = (folder / "state").read_text()
    with (folder / "state").open("a") as file:
        file.write('{"number": 99, "poi')  # it was killed amid a line
    again = search(folder, evaluations=12)
    played: list[Task] = []
    real = Search.play

    def counted(task: Task) -> float:
        played.append(task)
        return real(again, task)

    state = State(folder / "state", {"search": "s"})
    with Workers(counted, 1) as workers:
        found = tune(again, workers, state, lambda done, least: None)
    state.close()
    assert found == whole
    assert (folder / "state").read_text().startswith(kept)
    assert (folder / "state").read_text() == (folder / "whole").read_text()
    trained = {(task.point, task.seed) for task in played if not task.test}
    assert len(trained) <= 2 * (12 - stop)


def test_a_point_that_comes_again_is_not_played_again(folder: Path) -> None:
    one = search(folder, policy=f"{__name__}:Whole", evaluations=30, seeds=1)
    played: list[Task] = []
    state = State(folder / "state", {})

    def counted(task: Task) -> float:
        played.append(task)
        return float(task.point[0][1])

    with Workers(counted, 1) as workers:
        found = tune(one, workers, state, lambda done, least: None)
    state.close()
    assert found.point == {"steps": 3}
    assert len({task.point for task in played}) == 3
    assert len([task for task in played if not task.test]) < 20


class Whole(Share):
    """Three points in all."""

    def __init__(self, rng: Random, *, steps: Annotated[int, "How many.", Tunable(1, 3)] = 1) -> None:
        self.share = 0.5


def test_parameters_that_a_policy_refuses_are_the_worst(folder: Path) -> None:
    refused = Task((("share", -0.5),), 0, False)
    assert search(folder).play(refused) == -inf
    assert search(folder, objective="p95-ttft").play(refused) == inf


def test_what_is_given_holds_for_every_point(folder: Path) -> None:
    task = Task((), 0, False)
    assert search(folder, given={"share": 0.1}).play(task) != search(folder, given={"share": 0.9}).play(task)


def test_an_objective_that_nothing_tells_is_an_error(folder: Path) -> None:
    (folder / "cluster.yaml").write_text(
        CLUSTER.replace("watts: 1000, ", "").replace("watts: 2000", "weight: 1")
    )
    with pytest.raises(ValueError, match=r"carbon .* has no value at any point"):
        run(search(folder, objective="carbon", evaluations=2), folder / "state")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_is_a_figure(folder: Path, objective: str) -> None:
    value = search(folder, objective=objective).play(Task((("share", 0.2),), 0, False))
    assert 0.0 < value < inf
    assert OBJECTIVES[objective].loss(value) == (-value if objective == "goodput" else value)


def test_cost_is_for_what_was_served_in_time(folder: Path) -> None:
    """Refusing everything costs nothing, and is the worst."""
    one = search(folder, objective="cost")
    figures = named_figures(one, 0.2)
    assert one.play(Task((("share", 0.2),), 0, False)) == pytest.approx(
        figures.cost / (figures.goodput_rps * figures.seconds)
    )


def test_refusing_makes_no_token_faster(folder: Path) -> None:
    figures = replace(named_figures(search(folder), 0.2), rejected=0.03, failed=0.02)
    value = OBJECTIVES["p95-tpot"].value
    assert value(figures) == figures.tpot_s.p95 < inf
    assert value(replace(figures, rejected=0.04)) == inf


def named_figures(one: Search, share: float) -> Any:
    from sim.evaluate import evaluate

    policy = policy_file(SHARE, {"share": share})
    return evaluate(one.cluster, policy, one.training.workload(0), 0).figures


# Its state


def test_the_state_of_another_search_is_refused(tmp_path: Path) -> None:
    State(tmp_path / "state", {"policy": "a", "seed": 1}).close()
    with pytest.raises(ValueError, match=r"is the state of another search: its policy, seed differ"):
        State(tmp_path / "state", {"policy": "b", "seed": 2})
    for other in ("rules: []\n{}\n", "[1]\n", '{"at": 1}\n{"at": 2}\n'):
        (tmp_path / "state").write_text(other)
        with pytest.raises(ValueError, match="state:1: not a line of a search"):
            State(tmp_path / "state", {"policy": "a"})
        assert (tmp_path / "state").read_text() == other


PLUGIN = """
from typing import Annotated
from policies.base import Tunable
from policies.simple import LeastLoad

class Plugin(LeastLoad):
    def __init__(self, rng, *, idle: Annotated[float, "Nothing.", Tunable(0.0, 1.0)] = 0.5):
        super().__init__(rng)
"""


def test_a_search_does_not_go_on_with_another_profile_or_other_code(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(folder)
    (folder / "plugged_in.py").write_text(PLUGIN)
    (folder / "mine.yaml").write_text(dump_profile(load_profile("l40-2-32b")))
    (folder / "cluster.yaml").write_text(CLUSTER.replace("profile: l40-2-32b", "profile: mine.yaml"))
    words = ("--policy", "plugged_in:Plugin", "--evaluations", "2", "--seeds", "2")
    assert command(folder, *words).exit_code == 1
    (folder / "mine.yaml").write_text(dump_profile(load_profile("l40-4-32b")))
    (folder / "plugged_in.py").write_text(PLUGIN + "# changed\n")
    done = command(folder, *words)
    assert done.exit_code == 2
    assert "is the state of another search: its profiles, code differ" in done.stderr


# The command


def test_the_command_writes_a_policy_that_says_where_it_comes_from(folder: Path) -> None:
    done = command(folder, "--policy", SHARE, "--evaluations", "8", "--seeds", "2", "--speed", "4")
    assert done.exit_code == 0, done.output
    assert "On the test part it is better than the defaults" in done.stdout
    text = (folder / "tuned.yaml").read_text()
    assert "first 70% of the time for training" in text
    assert "# defaults" in text
    assert "# tuned" in text
    assert "seed 0" in text
    picked = read_policy(named_policy(str(folder / "tuned.yaml")).text, "tuned").file.rules[0].pick
    assert picked is not None
    assert picked.policy == SHARE
    assert len((folder / "tuned.yaml.state").read_text().splitlines()) == 9
    again = command(folder, "--policy", SHARE, "--evaluations", "8", "--seeds", "2", "--speed", "4")
    assert again.stdout == done.stdout
    assert (folder / "tuned.yaml").read_text() == text


def test_what_is_no_better_is_said_to_be_no_better(folder: Path) -> None:
    done = command(folder, "--policy", f"{__name__}:Idle", "--evaluations", "5", "--seeds", "2")
    assert done.exit_code == 1
    assert (
        "On the test part it is no better than the defaults (tuned less defaults: 0 ±0): keep those."
        in done.stdout
    )
    assert "no better than the defaults" in (folder / "tuned.yaml").read_text()


def test_a_policy_that_is_there_is_not_replaced_by_mistake(folder: Path) -> None:
    mine, better = folder / "tuned.yaml", ("--policy", SHARE, "--evaluations", "8", "--speed", "4")
    mine.write_text("rules:\n  - name: by hand\n    pick: least-load\n")
    done = command(folder, *better)
    assert done.exit_code == 2
    assert (
        "tuned.yaml is there, and not as `tune` writes it: give another --output, or --force" in done.stderr
    )
    assert "by hand" in mine.read_text()
    assert command(folder, *better, "--force").exit_code == 0
    found = mine.read_text()
    assert "by hand" not in found
    mine.write_text(found + "  - name: added by hand\n    pick: least-load\n")
    assert command(folder, *better).exit_code == 2
    mine.write_text(found)
    idle = ("--policy", f"{__name__}:Idle", "--evaluations", "2", "--state", str(folder / "idle"))
    done = command(folder, *idle, "--force")
    assert done.exit_code == 1
    assert f"{mine} stays as it is." in done.stdout
    assert mine.read_text() == found


def test_one_sample_tells_nothing(folder: Path) -> None:
    done = command(folder, "--policy", SHARE, "--evaluations", "8", "--seeds", "1", "--speed", "4")
    assert done.exit_code == 1
    assert "One sample does not tell whether it is better" in done.stdout
    made = Tuned({}, {}, [1.0], [1.0], [1.0], [inf])
    assert made.is_better(OBJECTIVES["p95-ttft"])
    assert not made.is_better(OBJECTIVES["goodput"])


def test_an_interrupt_keeps_what_was_tried(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, played = Search.play, []

    def play(self: Search, task: Task) -> float:
        played.append(task)
        if len(played) > 3:
            raise KeyboardInterrupt
        return real(self, task)

    monkeypatch.setattr(Search, "play", play)
    done = command(folder, "--policy", SHARE, "--evaluations", "8", "--seeds", "1")
    assert done.exit_code == INTERRUPTED
    assert "3 points are kept" in done.stderr
    assert not (folder / "tuned.yaml").exists()
    assert [
        json.loads(line).get("number") for line in (folder / "tuned.yaml.state").read_text().splitlines()
    ] == [
        None,
        0,
        1,
        2,
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--policy", "round-robin"], "no parameter that says where to search it"),
        (["--policy", "rund-robin"], "did you mean 'round-robin'?"),
        (["--policy", SHARE, "--objective", "speed"], "--objective is goodput, p50-ttft"),
        (["--policy", SHARE, "--speed", "0"], "--speed is a number above 0, not 0"),
        (["--policy", SHARE, "-o", "no/where.yaml"], "there is no folder no for it"),
        (["--policy", SHARE, "--trace", "gone.csv"], "gone.csv: no such file or directory"),
        (["--policy", SHARE, "--state", "cluster.yaml"], "cluster.yaml:1: not a line of a search"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(folder)
    done = command(folder, *words)
    assert done.exit_code == 2
    assert said in done.stderr
    assert (folder / "cluster.yaml").read_text() == CLUSTER
