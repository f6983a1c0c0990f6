"""Calibration finds what made the times, keeps its hands off the test half, and writes a profile of it."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from policies.profile import Limits, Origin, Source
from sim.calibrate import (
    Calibration,
    LevelErrors,
    Search,
    calibrate_sweep,
    calibrate_timings,
    loop_times,
    loss_of,
    measured_times,
    replay,
)
from sim.calibrate_command import calibrate
from sim.engine import EngineSettings, StepCost
from sim.profile import load_profile
from sim.timings import Level, Timing, read_measured

TRUTH = StepCost(alpha=14_000.0, beta=40.0, gamma=0.062, delta=55.0)
SOURCE = Source(origin=Origin.MEASURED, text="a test")
LIMITS = Limits(max_num_seqs=64, source=SOURCE)
QUICK = Search(starts=1, evaluations=400)


def engine(cost: StepCost = TRUTH, limits: Limits = LIMITS) -> EngineSettings:
    return EngineSettings(cost, limits.max_num_batched_tokens, limits.max_num_seqs, limits.kv_tokens)


def requests(count: int, seed: int = 1) -> list[Timing]:
    """Of three loads, one after the other and again: alone, some at once, a crowd."""
    rng = random.Random(seed)
    at = 0
    arrivals = []
    for index in range(count):
        at += round(rng.expovariate(1.0) * (4_000_000, 400_000, 20_000)[index // 20 % 3])
        arrivals.append(Timing(at, rng.randint(20, 3000), rng.randint(20, 400), 1.0, 2.0))
    return arrivals


def measured(settings: EngineSettings, arrivals: list[Timing], overhead_us: float = 0.0) -> list[Timing]:
    """The requests with the times that an engine gives them."""
    ttft, _, e2e = replay(settings, arrivals, len(arrivals)).tolist()
    return [
        one._replace(ttft=first + overhead_us, e2e=last + overhead_us)
        for one, first, last in zip(arrivals, ttft, e2e, strict=True)
    ]


@pytest.fixture(scope="module")
def timings() -> list[Timing]:
    return measured(engine(), requests(120))


@pytest.fixture(scope="module")
def found(timings: list[Timing]) -> Calibration:
    return calibrate_timings(timings, LIMITS, QUICK)


def steps(cost: StepCost) -> list[float]:
    """What steps take that tell the coefficients apart as far as the loads do: few and many decodes with contexts
    as long as the prompts are, and prompt tokens with them."""
    return [cost.of(*step) for step in ((1, 1600, 0), (12, 19_000, 0), (48, 77_000, 0), (12, 19_000, 2000))]


# The law: what made the times is found


def test_coefficients_are_found_from_several_loads(found: Calibration) -> None:
    assert found.cost.alpha == pytest.approx(TRUTH.alpha, rel=0.02)
    assert found.cost.delta == pytest.approx(TRUTH.delta, rel=0.02)
    assert steps(found.cost) == pytest.approx(steps(TRUTH), rel=0.01)
    assert found.overhead_us == 0.0


def test_requests_that_the_fit_did_not_see_are_foretold(found: Calibration) -> None:
    assert found.test is not None
    assert found.fit.count == found.test.count == 60
    for errors in (found.fit, found.test):
        assert errors.mean == pytest.approx((0, 0, 0), abs=0.02)
        assert errors.p99 == pytest.approx((0, 0, 0), abs=0.02)


def test_other_loads_are_foretold(found: Calibration) -> None:
    for level in (Level(1, 500, 200, 1, 1), Level(16, 2000, 100, 1, 1), Level(60, 1000, 300, 1, 1)):
        assert loop_times(engine(found.cost), level) == pytest.approx(loop_times(engine(), level), rel=0.02)


def test_coefficients_are_found_from_a_sweep() -> None:
    levels = []
    for users, prompt, output in (
        (1, 500, 100),
        (8, 500, 100),
        (48, 500, 100),
        (8, 4000, 50),
        (32, 2000, 150),
    ):
        level = Level(users, prompt, output, 1, 1)
        ttft, tpot, _ = loop_times(engine(), level)
        levels.append(level._replace(ttft=ttft, tpot=tpot))
    found = calibrate_sweep(levels, LIMITS, QUICK)
    assert found.cost.alpha == pytest.approx(TRUTH.alpha, rel=0.02)
    assert found.cost.delta == pytest.approx(TRUTH.delta, rel=0.02)
    assert steps(found.cost) == pytest.approx(steps(TRUTH), rel=0.02)
    assert found.errors.count == 5
    assert max(found.errors.worst) < 0.02


def test_an_overhead_is_found_where_it_is_asked_for() -> None:
    timings = measured(engine(), requests(120), overhead_us=30_000.0)
    found = calibrate_timings(timings, LIMITS, Search(starts=1, evaluations=500, overhead=True))
    assert found.overhead_us == pytest.approx(30_000, rel=0.1)
    assert steps(found.cost) == pytest.approx(steps(TRUTH), rel=0.02)


def test_preempted_sequences_are_replayed_with_what_the_prefix_cache_still_holds() -> None:
    limits = Limits(max_num_seqs=64, kv_tokens=12_000, source=SOURCE)
    arrivals = requests(60)
    resuming = EngineSettings(TRUTH, 2048, 64, 12_000, prefix_unit_tokens=64)
    assert replay(resuming, arrivals, 60)[2].mean() < replay(engine(limits=limits), arrivals, 60)[2].mean()
    timings = measured(resuming, arrivals)
    found = calibrate_timings(timings, limits, Search(starts=1, evaluations=150), test_half=False)
    assert found.test is None
    assert found.fit.mean == pytest.approx((0, 0, 0), abs=0.02)


# The test half


def test_no_time_of_the_test_half_is_seen(timings: list[Timing], found: Calibration) -> None:
    lied = timings[:60] + [one._replace(ttft=one.ttft * 3, e2e=one.e2e * 3) for one in timings[60:]]
    again = calibrate_timings(lied, LIMITS, QUICK)
    assert (again.cost, again.loss, again.fit) == (found.cost, found.loss, found.fit)
    assert again.test is not None
    assert found.test is not None
    assert again.test.mean == pytest.approx([(1 + one) / 3 - 1 for one in found.test.mean])


def test_the_fit_half_meets_the_requests_that_came_after_it() -> None:
    arrivals = [Timing(0, 100, 200, 1, 2), Timing(1000, 2000, 200, 1, 2)]
    alone, both = replay(engine(), arrivals[:1], 1), replay(engine(), arrivals, 1)
    assert both.shape == (3, 1)
    assert both[2, 0] > alone[2, 0]


# Replay, closed loop and loss, by hand


def test_times_of_a_request_alone() -> None:
    cost = StepCost(alpha=1000.0, beta=100.0, gamma=0.0, delta=10.0)
    times = replay(engine(cost), [Timing(0, 50, 3, 1, 2)], 1)
    assert times[:, 0].tolist() == [1500.0, 1100.0, 3700.0]
    assert loop_times(engine(cost), Level(1, 50, 3, 1, 1)) == (1500.0, 1100.0, 3700.0)
    assert loop_times(engine(cost), Level(1, 50, 3, 1, 1), 70.0) == (1570.0, 1100.0, 3770.0)


def test_a_closed_loop_keeps_as_many_as_it_has_users() -> None:
    """Little's law: users = requests a second times the time of each."""
    cost = StepCost(alpha=1000.0, beta=100.0, gamma=0.0, delta=0.0)
    _, tpot, _ = loop_times(engine(cost), Level(10, 10, 101, 1, 1))
    assert tpot == pytest.approx(1000 + 100 * 10, rel=0.02)


def test_the_loss_is_the_mean_of_what_each_request_is_off() -> None:
    real = measured_times([Timing(0, 10, 1, 100, 100), Timing(0, 10, 11, 100, 1100)])
    assert np.isnan(real[1, 0])
    assert real[:, 1].tolist() == [100.0, 100.0, 1100.0]
    off = real * np.exp([[0.5, 0.5], [0.2, -0.2], [0.1, -0.3]])
    assert loss_of(off, real) == pytest.approx(0.2 + 0.2)
    assert loss_of(off, real, ttft=True) == pytest.approx(0.5 + 0.2 + 0.2)


def test_levels_that_are_too_fast_make_up_for_none_that_are_too_slow() -> None:
    """Twice and half: the error of a level is 75 %, not their 25 %, and not none."""
    real = np.array([[100.0, 100.0], [10.0, 10.0], [200.0, 1000.0]])
    off = LevelErrors.between(real * [[2.0, 0.5], [1.1, 0.8], [1.0, 1.0]], real)
    assert off.mean == pytest.approx((0.75, 0.15, 0.0))
    assert off.worst == pytest.approx((1.0, 0.2, 0.0))
    assert str(off).endswith("(at worst): TTFT 75.0% (100.0%), TPOT 15.0% (20.0%), E2E 0.0% (0.0%)")


def test_answers_of_one_token_are_in_no_error_of_tpot() -> None:
    real = np.array([[100.0, 100.0], [np.nan, 10.0], [200.0, 1000.0]])
    assert LevelErrors.between(real * 1.5, real).mean == pytest.approx((0.5, 0.5, 0.5))


def test_one_seed_one_result(timings: list[Timing]) -> None:
    short = Search(starts=2, evaluations=24, seed=5)
    told: list[int] = []
    first = calibrate_timings(timings, LIMITS, short, progress=told.append)
    assert calibrate_timings(timings, LIMITS, short) == first
    assert told == sorted(told)
    assert told[-1] == short.simulations


@pytest.mark.parametrize("test_half", [True, False])
def test_too_little_to_fit_to_is_refused(timings: list[Timing], test_half: bool) -> None:
    with pytest.raises(ValueError, match="7 requests are too few"):
        calibrate_timings(timings[: 14 if test_half else 7], LIMITS, QUICK, test_half=test_half)
    with pytest.raises(ValueError, match="2 levels are too few"):
        calibrate_sweep([Level(1, 1, 2, 1, 1)] * 2, LIMITS, QUICK)
    with pytest.raises(ValueError, match="nothing to fit to"):
        calibrate_sweep([Level(users, 10, 1, 1, 1) for users in (1, 2, 4)], LIMITS, QUICK)
    with pytest.raises(ValueError, match="nothing to fit to"):
        calibrate_timings([one._replace(output_tokens=1) for one in timings], LIMITS, QUICK)


# The command


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(calibrate)
    return app


@pytest.fixture
def file(tmp_path: Path, timings: list[Timing]) -> Path:
    path = tmp_path / "timings.csv"
    lines = ["arrival_s,prompt_tokens,output_tokens,ttft_s,e2e_s"]
    for one in timings:
        lines.append(
            f"{one.at / 1e6},{one.prompt_tokens},{one.output_tokens},{one.ttft / 1e6},{one.e2e / 1e6}"
        )
    path.write_text("\n".join(lines))
    return path


WHAT = ["--card", "H20", "--model", "Qwen/Qwen3-32B"]


def test_the_command_writes_a_profile_that_says_where_it_comes_from(app: typer.Typer, file: Path) -> None:
    output = file.with_name("h20.yaml")
    options = ["--max-num-seqs", "64", "--starts", "1", "--evaluations", "60", "--source", "us, today"]
    done = CliRunner().invoke(app, [str(file), *WHAT, *options, "-o", str(output)])
    assert done.exit_code == 0, done.output
    assert "test" in done.stdout
    profile = load_profile(output)
    assert profile.name == "h20-qwen-qwen3-32b"
    assert profile.limits.max_num_seqs == 64
    assert profile.step.source.origin is Origin.MEASURED
    said = profile.step.source.text
    for part in (
        "us, today",
        "60 requests of 120",
        "timings.csv",
        "TPOT + E2E",
        "seed 0",
        "the other 60: TTFT",
    ):
        assert part in said


def test_the_command_fits_a_sweep(app: typer.Typer, tmp_path: Path) -> None:
    path = tmp_path / "sweep.csv"
    lines = ["concurrency,prompt_tokens,output_tokens,ttft_s,tpot_s"]
    lines += [f"{users},500,50,0.1,{0.02 + users / 1000}" for users in (1, 4, 8)]
    path.write_text("\n".join(lines))
    output = tmp_path / "out.yaml"
    short = ["--starts", "1", "--evaluations", "24"]
    done = CliRunner().invoke(app, [str(path), *WHAT, *short, "-o", str(output)])
    assert done.exit_code == 0, done.output
    assert "Errors of 3 levels" in done.stdout
    assert "worst" in done.stdout
    assert "p99" not in done.stdout
    said = load_profile(output).step.source.text
    assert "fitted to 3 levels, of sweep.csv" in said
    assert "error of a level on average (at worst): TTFT " in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kv-tokens", "1024"], "does not fit into 64 blocks"),
        (["--max-num-seqs", "512", "--max-num-batched-tokens", "256"], "must be at least max_num_seqs"),
        (["--published"], "--published needs --source"),
        (["--name", "No Name", "-o", "x.yaml"], "--name: string should match"),
        (["-o", "missing/x.yaml"], "missing/x.yaml: there is no such folder"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    app: typer.Typer, file: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(file.parent)
    done = CliRunner().invoke(app, [str(file), *WHAT, "--starts", "1", "--evaluations", "12", *options])
    assert done.exit_code == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("tidegate: ")]
    assert message in line
    assert ("Errors" in done.stdout) is ("--name" in options)


def test_a_bad_row_is_named(app: typer.Typer, file: Path) -> None:
    file.write_text(file.read_text() + "\n1,2,3,soon,5\n")
    done = CliRunner().invoke(app, [str(file), *WHAT])
    assert done.exit_code == 2
    assert f"tidegate: {file}, line 122, ttft_s: must be a number, not 'soon'" in done.stderr
    done = CliRunner().invoke(app, [str(file.with_name("other.csv")), *WHAT])
    assert done.exit_code == 2
    assert "other.csv: no such file or directory" in done.stderr


# Real runs


@pytest.mark.shared
def test_a_real_run_is_foretold_from_its_first_half(shared: Path) -> None:
    """The figures with a full search are those of `python -m benchmarks.calibration`."""
    folder = shared / "data" / "llmservingsim_vllm_groundtruth"
    rows = read_measured(folder / "RTXPRO6000_Llama-3.1-8B.requests.jsonl.gz")
    timings = [row for row in rows if isinstance(row, Timing)]
    assert len(timings) == 300
    limits = Limits(max_num_seqs=128, source=SOURCE)
    found = calibrate_timings(timings, limits, Search(starts=1, evaluations=300))
    assert found.test is not None
    assert max(map(abs, found.test.mean)) <= 0.06
    assert max(map(abs, found.test.p99)) <= 0.15
