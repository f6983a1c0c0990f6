"""`tidegate workload`: figures, pictures, files, and errors in one line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from sim.traces import read_workload
from sim.workload import Arrival, Problem, Workload
from sim.workload_command import workload_app
from sim.workload_summary import prefix_share, summarize

SPEC = """
name: small
duration: 10m
clients:
  - {name: a, rate: 1, prompt: {mean: 100}, output: 20, sessions: {turns: 3, think: 5}}
  - {name: b, model: m, rate: 0.5, prompt: 300, output: 20}
"""
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,374,44\nx,1,1\n2023-11-16 18:15:50,400,4\n"
)


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(workload_app, [str(word) for word in words])


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(AZURE)
    return path


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC)
    return path


@pytest.mark.parametrize("name", ["trace.csv", "./trace.csv", "link.csv"])
def test_what_is_read_is_not_written_over(trace: Path, spec: Path, name: str) -> None:
    (trace.parent / "link.csv").symlink_to(trace)
    (spec.parent / "link.yaml").symlink_to(spec)
    for command, file in (("show", trace), ("generate", spec)):
        output = f"{file.parent}/{name.replace('trace.csv', file.name).replace('.csv', file.suffix)}"
        done = run(command, file, "-o", output)
        assert done.exit_code == 2
        assert "is the file that is read: give another one to write" in done.stderr
    assert (trace.read_text(), spec.read_text()) == (AZURE, SPEC)
    assert run("show", trace, "--plot", trace).exit_code == 2
    assert trace.read_text() == AZURE


def test_a_workload_is_not_taken_for_a_specification(spec: Path) -> None:
    made = spec.with_name("made.jsonl")
    assert run("generate", spec, "-o", made).exit_code == 0
    done = run("generate", made, "-o", spec.with_name("other.jsonl"))
    assert done.exit_code == 2
    assert done.stderr.endswith(f"{made} is a workload already: `tidegate workload show {made}` shows it\n")


# Figures


def arrivals(*rows: tuple[Any, ...]) -> Workload:
    return Workload("x", [Arrival(*row) for row in rows], 10)


def test_figures_are_those_that_are_worked_out_by_hand() -> None:
    workload = Workload(
        "by hand",
        [
            Arrival(0, 10, 1, tenant="a", session="s"),
            Arrival(1_000_000, 20, 2, tenant="b"),
            Arrival(4_000_000, 60, 9, tenant="b", session="s", think=0, model="m"),
        ],
        problems=[Problem("f", 3, "c", "is missing")],
        left_out=7,
    )
    figures = summarize(workload)
    assert (figures.requests, figures.span_s, figures.rate_rps, figures.gap_cv) == (3, 4.0, 0.5, 0.5)
    assert figures.prompt_tokens == (30.0, 20.0, 56.0, pytest.approx(59.2), 60)
    assert (figures.output_tokens.mean, figures.output_tokens.max) == (4.0, 9)
    assert list(figures.tenants.items()) == [("b", 2), ("a", 1)]
    assert figures.models == {"": 2, "m": 1}
    assert (figures.sessions, figures.closed_loop, figures.left_out) == (1, 1, 7)
    assert figures.problems == ["f, line 3, c: is missing"]
    with pytest.raises(ValueError, match="no requests"):
        summarize(Workload("empty", []))


def test_one_request_alone_has_no_rate() -> None:
    figures = summarize(arrivals((0, 5, 5)))
    assert (figures.rate_rps, figures.gap_cv, figures.span_s) == (0.0, 0.0, 0.0)


def test_a_prefix_cache_serves_leading_units_that_came_before() -> None:
    workload = arrivals(
        (0, 25, 30, (1, 2, 3)),  # the third unit ends in the answer
        (1, 35, 1, (1, 2, 3)),  # all found
        (2, 20, 1, (1, 9)),  # one found
        (3, 30, 1, (8, 2, 3)),  # nothing, since the beginning differs
        (4, 15, 1, (1, 2)),  # one full unit, one beyond the prompt
    )
    share = prefix_share(workload)
    assert share.blocks == (3 + 1 + 1) / (3 + 4 + 2 + 3 + 2)
    assert share.tokens == 50 / (25 + 35 + 20 + 30 + 15)
    assert prefix_share(Workload("none", workload.arrivals)) == (0.0, 0.0)


# Show


def test_show_may_be_left_out(trace: Path) -> None:
    shown = run("show", trace)
    assert shown.exit_code == 0
    assert run(trace).output == run("--form", "azure", trace).output == shown.output
    assert "requests" in shown.output
    assert "0.25 requests/s" in shown.output
    assert f"left out: {trace}, line 3, TIMESTAMP: expected a date and time, got 'x'" in shown.output


def test_only_the_first_problems_are_listed(trace: Path) -> None:
    trace.write_text(AZURE + "x,1,1\n" * 29)
    shown = run(trace).output
    assert shown.count("left out: ") == 20
    assert "and 10 more lines that were left out" in shown


def test_what_is_missing_of_the_load_is_told(tmp_path: Path) -> None:
    rates = tmp_path / "some_rates.csv"
    rates.write_text(
        "client,window_start_s,rate_rps,cv,pattern,p1,p2\n0,0,1,1,Gamma,1,1\n5,0,2,1,Gamma,1,1\n"
    )
    lengths = {"c": 0, "t": 0, "input_tokens": [1, 1], "output_tokens": [1, 1]}
    (tmp_path / "some_lengths.jsonl").write_text(f'{{"quantiles": [0, 1]}}\n{json.dumps(lengths)}\n')
    assert "1, and with them about 1,200 requests, 67% of the load" in run(rates).output
    figures = json.loads(run(rates, "--json").stdout)
    assert (figures["missing"], figures["missing_share"]) == (1200, pytest.approx(2 / 3))


def test_json_has_every_figure(trace: Path) -> None:
    figures = json.loads(run(trace, "--json").stdout)
    assert figures["prompt_tokens"] == {
        "mean": 387.0,
        "p50": 387.0,
        "p95": pytest.approx(398.7),
        "p99": pytest.approx(399.74),
        "max": 400,
    }
    assert (figures["requests"], figures["left_out"], len(figures["problems"])) == (2, 1, 1)
    assert figures["prefix"] == {"blocks": 0.0, "tokens": 0.0}
    assert set(figures) == set(summarize(read_workload(trace)).__dataclass_fields__)


def test_any_trace_becomes_one_of_our_own(trace: Path, tmp_path: Path) -> None:
    assert run(trace, "-o", tmp_path / "own.jsonl").exit_code == 0
    assert read_workload(tmp_path / "own.jsonl", "workload").arrivals == read_workload(trace).arrivals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.csv"], "nowhere.csv: no such file or directory"),
        (["--strict"], "trace.csv, line 3, TIMESTAMP: expected a date and time"),
        (["--form", "vidur"], "there is no form 'vidur': azure, "),
        (["--duration", "long"], "expected a duration such as 10s"),
        (["--duration", "0s"], "lasts longer than zero seconds"),
        (["-o", "nowhere/x.jsonl"], "nowhere/x.jsonl: no such file or directory"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    trace: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(trace.parent)
    file = [] if words == ["nowhere.csv"] else ["trace.csv"]
    done = run("show", *words, *file)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.startswith("tidegate: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


# Generate


def test_what_is_generated_can_be_shown(spec: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    made = run("generate", spec, "-o", output, "--seed", "1", "--json")
    assert made.exit_code == 0
    figures = json.loads(made.stdout)
    assert set(figures["tenants"]) == {"a", "b"}
    assert figures["prefix"]["tokens"] > 0.2
    assert json.loads(run(output, "--json").stdout) == figures
    first = output.read_bytes()
    assert run("generate", spec, "-o", output, "--seed", "1").exit_code == 0
    assert output.read_bytes() == first
    assert run("generate", spec, "-o", output, "--seed", "2").exit_code == 0
    assert output.read_bytes() != first


@pytest.mark.parametrize(
    ("old", "new", "status", "message"),
    [
        ("rate: 1,", "rate: 0,", 2, "clients[0].rate"),
        ("name: small", "name: [", 2, "spec.yaml:"),
        (
            "duration: 10m",
            "duration: 300d",
            2,
            "about 38880000 requests, more than 5000000, 25920000 of them from a: ",
        ),
        ("duration: 10m", "duration: 1ms", 1, "no request came"),
    ],
)
def test_a_specification_that_cannot_be_used(
    spec: Path, tmp_path: Path, old: str, new: str, status: int, message: str
) -> None:
    spec.write_text(SPEC.replace(old, new))
    done = run("generate", spec, "-o", tmp_path / "out.jsonl")
    assert done.exit_code == status
    assert message in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


# Pictures


def test_without_matplotlib_it_says_what_to_install(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    done = run(trace, "--plot", tmp_path / "out.png")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == "tidegate: --plot needs matplotlib: pip install 'tidegate[plot]'\n"


def test_a_picture_is_drawn(trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="NOT RUN: matplotlib is absent; `make test` installs it")
    done = run(trace, "--plot", tmp_path / "out.png")
    assert done.exit_code == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    wrong = run(trace, "--plot", tmp_path / "out.txt")
    assert (wrong.exit_code, wrong.stderr.count("\n")) == (2, 1)


def test_two_requests_have_no_variation(trace: Path) -> None:
    assert "needs three requests" in run("show", trace).stdout
    trace.write_text(AZURE + "2023-11-16 18:15:51,4,4\n")
    assert "needs three requests" not in run("show", trace).stdout


def test_a_line_that_is_no_json_is_named_once(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    row = '{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": [1]}'
    path.write_text(f'{row}\n{{"timestamp": }}\n')
    (line,) = [line for line in run("show", path).stdout.splitlines() if line.startswith("left out: ")]
    assert len(re.findall(r"\bline\b", line)) == 1
    assert "trace.jsonl, line 2: not JSON: " in line
    assert line.endswith(", at character 15")
