"""`tidegate calibrate` with files of `tidegate bench --json`: levels of several lengths, fitted together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
import typer
from typer.testing import CliRunner, Result

from sim.calibrate_command import calibrate
from sim.closed_loop import closed_loop
from sim.engine import EngineSettings, StepCost
from sim.measure import fit
from sim.measure.endpoint import Facts
from sim.measure.level import Level
from sim.measure.prompts import Prefix
from sim.measure.sweep import Plan, Report, Series
from sim.measure.verdict import Capacity, Sla
from sim.measure.wire import Api
from sim.profile import load_profile
from tests.sim.measure.fake_server import record

TRUTH = StepCost(alpha=14_000.0, beta=300.0, gamma=0.5, delta=50.0)
OVERHEAD = 4_000.0
USERS = (1, 3, 8)
ROUNDS = 1
APP = typer.Typer(pretty_exceptions_enable=False)
APP.command()(calibrate)


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(APP, [*map(str, words), "--card", "H20", "--model", "m"])


def bench(
    file: Path,
    prompt: int,
    *,
    failing: Sequence[int] = (),
    facts: Facts | None = None,
    prefix: Prefix = Prefix.COLD,
    model: str = "m",
    allowed: int | None = None,
) -> Path:
    """A file as bench would have written it of this engine. `failing`: users of whom a request failed.
    `allowed`: users that its SLA allows; None: it had none."""
    levels = []
    for users in (*USERS, *failing):
        figures = closed_loop(EngineSettings(TRUTH), users, prompt, 20, overhead_us=OVERHEAD, rounds=ROUNDS)
        answer = record(ttft=figures.ttft_mean, e2e=figures.total_mean, tokens=20, prompt=prompt)
        answers = [answer] * (ROUNDS * users)
        levels.append(Level.of(users, answers + [record(error="timeout")] * (users in failing), 1.0))
    report = Report("http://x", model, Api.CHAT, True, facts or Facts(), Plan(USERS, prompt, 20))
    report.series = [Series(prefix, levels)]
    if allowed is not None:
        report.plan = replace(report.plan, sla=Sla(ttft_s=2.0))
        report.series[0].capacity = Capacity(allowed, allowed + 1)
    file.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))
    return file


def test_two_lengths_tell_the_cost_of_a_sequence_from_that_of_its_context(tmp_path: Path) -> None:
    files = [bench(tmp_path / "short.json", 50), bench(tmp_path / "long.json", 1000)]
    output = tmp_path / "out.yaml"
    done = run(*files, "--starts", "1", "--evaluations", "800", "-o", output)
    assert done.exit_code == 0, done.output
    assert "Errors of 6 levels" in done.stdout
    profile = load_profile(output)
    step = profile.step
    assert (step.beta_us, step.gamma_us) == pytest.approx((TRUTH.beta, TRUTH.gamma), rel=0.1)
    assert (step.alpha_us, step.delta_us) == pytest.approx((TRUTH.alpha, TRUTH.delta), rel=0.05)
    assert profile.overhead_us == pytest.approx(OVERHEAD, rel=0.2)
    assert "fitted to 6 levels, of short.json, long.json" in step.source.text
    assert "TTFT + TPOT + E2E" in step.source.text


QUICK = ("--starts", "1", "--evaluations", "12")


def test_what_the_server_told_bench_is_in_the_profile(tmp_path: Path) -> None:
    facts = Facts("0.32.0", 5000, 65536, False)
    files = [bench(tmp_path / "a.json", 50, facts=facts), bench(tmp_path / "b.json", 60)]
    output = tmp_path / "out.yaml"
    assert run(*files, *QUICK, "-o", output).exit_code == 0
    limits = load_profile(output).limits
    assert (limits.kv_tokens, limits.max_model_len, limits.prefix_cache) == (65536, 5000, False)
    assert "kv_tokens, max_model_len, prefix_cache: as the server says" in limits.source.text
    assert run(*files, *QUICK, "--kv-tokens", "9999", "--prefix-cache", "-o", output).exit_code == 0
    limits = load_profile(output).limits
    assert (limits.kv_tokens, limits.max_model_len, limits.prefix_cache) == (9999, 5000, True)


def test_levels_with_failures_are_left_out_and_named(tmp_path: Path) -> None:
    output = tmp_path / "out.yaml"
    file = bench(tmp_path / "a.json", 50, failing=[20, 24])
    assert run(file, *QUICK, "--no-overhead", "-o", output).exit_code == 0
    profile = load_profile(output)
    assert "fitted to 3 levels, of a.json" in profile.step.source.text
    assert "left out, since requests failed: 20, 24 users of a.json" in profile.step.source.text
    assert profile.overhead_us == 0.0


def test_levels_of_other_tools_are_joined(tmp_path: Path) -> None:
    other = tmp_path / "sweep.csv"
    other.write_text("concurrency,prompt_tokens,output_tokens,ttft_s,tpot_s,requests\n8,50,20,0.1,0.02,16\n")
    done = run(bench(tmp_path / "a.json", 50), other, *QUICK)
    assert done.exit_code == 0, done.output
    assert "Errors of 4 levels" in done.stdout


def test_the_capacity_that_bench_measured_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "out.yaml"
    plain = bench(tmp_path / "a.json", 50)
    done = run(plain, *QUICK, "-o", output)
    assert load_profile(output).capacity is None
    assert "it says no slots: no file of bench in it had an SLA" in done.stderr
    long, short = bench(tmp_path / "b.json", 60, allowed=5), bench(tmp_path / "c.json", 40, allowed=7)
    done = run(plain, short, *QUICK, "-o", output)
    assert "`slots: auto` takes 7 from it" in done.stderr
    one = load_profile(output).capacity
    assert one is not None
    assert (one.users, one.prompt_tokens, one.ttft_s) == (7, 40, 2.0)
    assert one.source.text.startswith("c.json: tidegate bench, ")
    assert run(short, plain, long, *QUICK, "-o", output).exit_code == 0
    fewest = load_profile(output).capacity
    assert fewest is not None
    assert (fewest.users, fewest.prompt_tokens) == (5, 60)
    assert fewest.source.text.startswith("b.json: ")
    assert "the fewest users of all runs with an SLA (others: c.json 7)" in fewest.source.text


def test_doubts_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = bench(tmp_path / "a.json", 50)
    monkeypatch.setattr(fit, "POOR", -1.0)
    assert "the fit is poor: at worst" in run(file, *QUICK).stderr
    monkeypatch.setattr(fit, "POOR", 1e9)
    assert "the fit is poor" not in run(file, *QUICK).stderr


def test_limits_that_nobody_knows_are_said_to_be_defaults(tmp_path: Path) -> None:
    output = tmp_path / "out.yaml"
    file = bench(tmp_path / "a.json", 50)
    assert run(file, *QUICK, "-o", output).exit_code == 0
    said = load_profile(output).limits.source.text
    assert "max_num_batched_tokens, max_num_seqs, prefix_cache: vLLM's default, not measured" in said
    assert run(file, *QUICK, "--max-num-seqs", "99", "-o", output).exit_code == 0
    limits = load_profile(output).limits
    assert limits.max_num_seqs == 99
    assert "max_num_seqs: as given" in limits.source.text


def test_milliseconds_are_asked_about(tmp_path: Path) -> None:
    file = tmp_path / "sweep.csv"
    lines = "".join(f"{users},50,20,100,20,16\n" for users in (2, 4, 8))
    file.write_text(f"concurrency,prompt_tokens,output_tokens,ttft_s,tpot_s,requests\n{lines}")
    done = run(file, *QUICK)
    assert done.exit_code == 0
    assert f"{file}: the level of 2 users has 20 s for each token: are these milliseconds?" in done.stderr


def refusal(*words: str | Path) -> str:
    done = run(*words, *QUICK)
    assert done.exit_code == 2, done.output
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("tidegate: ")]
    return line


def test_files_that_contradict_are_refused(tmp_path: Path) -> None:
    first = bench(tmp_path / "a.json", 50, facts=Facts(kv_tokens=1000))
    second = bench(tmp_path / "b.json", 50, facts=Facts(kv_tokens=2000))
    other = bench(tmp_path / "c.json", 50, model="n")
    assert f"kv_tokens is 1000 in {first}, 2000 in {second}: say which with --kv-tokens" in refusal(
        first, second
    )
    assert run(first, second, *QUICK, "--kv-tokens", "1500").exit_code == 0
    assert "the files are of m and n: a profile is of one model" in refusal(first, other)


def test_files_without_a_level_to_fit_to_are_refused(tmp_path: Path) -> None:
    warm = bench(tmp_path / "warm.json", 50, prefix=Prefix.WARM)
    assert "warm.json: no level is of a cold prefix" in refusal(bench(tmp_path / "a.json", 50), warm)


def test_requests_of_two_runs_are_not_joined(tmp_path: Path) -> None:
    file = tmp_path / "requests.csv"
    file.write_text("arrival_s,prompt_tokens,output_tokens,ttft_s,e2e_s\n1,2,3,0.1,0.2\n")
    assert "requests.csv: has requests, which are those of one run" in refusal(
        file, bench(tmp_path / "a.json", 50)
    )


def test_a_file_that_is_none_of_them_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("{")
    assert f"{file}, line 1: is not one JSON document" in refusal(file)
    assert "b.json: no such file or directory" in refusal(tmp_path / "b.json")


def test_a_limit_that_cannot_be_is_named(tmp_path: Path) -> None:
    file = bench(tmp_path / "a.json", 50, facts=Facts(kv_tokens=1))
    assert "--kv-tokens: input should be greater than or equal to 16" in refusal(file)
