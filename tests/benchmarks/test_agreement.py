from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks import agreement
from benchmarks.agreement import Compared, Round, read_trace, seen
from benchmarks.agreement_loads import FleetMember, Load, Outcome, arrivals, policy_text, read_loads, simulate
from benchmarks.open_loop import LEAST_PROMPT, Answer
from sim.workload import Arrival, Workload

LOAD = Load(
    name="small",
    requests=40,
    rate=1.0,
    policy="local-first",
    backends=[FleetMember(name="one", profile="h20-2-32b", slots=64, rtt=0.02)],
)
TRACE = Workload("made up", [Arrival(at * 400_000, 50 + 37 * at, 10 + at) for at in range(60)])


def test_requests_come_at_the_rate_of_the_load() -> None:
    taken = arrivals(LOAD, TRACE, speed=4.0)
    assert len(taken) == 40
    assert taken.arrivals[0].at == 0
    assert taken.span == pytest.approx(39e6 / 4)


def test_what_no_backend_takes_is_left_out_and_what_is_shorter_than_a_chat_lengthened() -> None:
    trace = Workload("odd", [Arrival(0, 4900, 101), Arrival(1, 2, 5, hashes=(1,)), Arrival(2, 4900, 100)])
    taken = arrivals(LOAD.model_copy(update={"requests": 2}), trace, 1.0)
    assert [(one.prompt_tokens, one.hashes) for one in taken] == [(LEAST_PROMPT, ()), (4900, ())]
    with pytest.raises(ValueError, match="wants 40 requests, odd has 2"):
        arrivals(LOAD, trace, 1.0)


def test_speed_leaves_emulated_times_as_they_are() -> None:
    slow, fast = (simulate(LOAD, arrivals(LOAD, TRACE, speed), speed) for speed in (1.0, 8.0))
    assert fast.ttft_s == pytest.approx(slow.ttft_s, abs=1e-3)
    assert fast.total_s == pytest.approx(slow.total_s, abs=1e-3)
    assert fast.seconds == pytest.approx(slow.seconds / 8, rel=1e-3)
    assert slow.decisions == fast.decisions == Counter(one=40)
    assert min(slow.ttft_s) > 0.02


def test_what_was_heard_becomes_emulated_seconds() -> None:
    workload = Workload("two", [Arrival(0, 50, 10), Arrival(1, 50, 10)])
    right = Answer(due_at=1.0, sent_at=1.0, first_at=1.1, ended_at=1.5, backend="one")
    wrong = Answer(due_at=1.2, sent_at=1.202, ended_at=2.0, failure="status 429")
    found = seen([right, wrong], workload, 4.0, {"others": 0.1})
    assert found.outcome.ttft_s == [pytest.approx(0.4)]
    assert found.outcome.total_s == [pytest.approx(2.0)]
    assert found.outcome.decisions == Counter({"one": 1, "status 429": 1})
    assert found.tokens_per_s == pytest.approx(10)
    assert not found.disturbed


@pytest.mark.parametrize(
    ("ttft", "total", "agrees"), [(1.04, 0.96, True), (1.06, 1.0, False), (1.0, 0.94, False)]
)
def test_means_may_be_five_per_cent_apart(ttft: float, total: float, agrees: bool) -> None:
    simulated = Outcome([1.0, 3.0], [10.0, 30.0], seconds=1.0)
    emulated = Outcome([ttft, 3 * ttft], [10 * total, 30 * total], seconds=1.0)
    compared = Compared(LOAD, [simulated], [Round(emulated, 1, 0.0, {"others": 0.0})])
    assert compared.agrees is agrees


@pytest.mark.parametrize("refused_by", ["simulator", "emulator"])
def test_who_answers_fewer_does_not_agree(refused_by: str) -> None:
    every = Outcome([1.0, 1.0], [2.0, 2.0], Counter(one=2), 1.0)
    fewer = Outcome([1.0], [2.0], Counter({"one": 1, "queue_full": 1}), 1.0)
    simulated, emulated = (fewer, every) if refused_by == "simulator" else (every, fewer)
    assert not Compared(LOAD, [simulated], [Round(emulated, 1, 0.0, {"others": 0.0})]).agrees


def test_the_loads_of_the_benchmark_can_be_played() -> None:
    loads = read_loads(agreement.LOADS)
    assert {load.name for load in loads} == {"light", "knee", "spill", "queue", "many"}
    assert all("rules" in policy_text(load) for load in loads)


def test_files_of_a_load_stand_beside_it(tmp_path: Path) -> None:
    (tmp_path / "loads.yaml").write_text(
        "loads:\n- {name: a, requests: 1, rate: 1, policy: p.yaml, "
        "backends: [{name: b, profile: c.yaml, slots: 1}]}"
    )
    (load,) = read_loads(tmp_path / "loads.yaml")
    assert load.policy == str(tmp_path / "p.yaml")
    assert load.backends[0].profile == str(tmp_path / "c.yaml")


def test_a_trace_is_made_up_where_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(agreement, "TRACE", tmp_path / "absent")
    assert len(read_trace(None)) > 2000


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--loads", "absent.yaml"], "absent.yaml"),
        (["--trace", "absent.csv"], "absent.csv"),
        (["--only", "light", "--speed", "1000"], "choose a lower --speed"),
    ],
)
def test_bad_input_is_told_in_a_line(
    arguments: list[str],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("sys.argv", ["agreement", *arguments])
    monkeypatch.setattr(agreement, "TRACE", tmp_path / "absent")
    assert agreement.main() == 2
    assert complaint in capsys.readouterr().err
