from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import agreement
from benchmarks.agreement import LATE_MS, Compared, Round, compare, complaints, read_trace, seen
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


def test_what_prompts_share_is_computed_once_where_there_is_a_cache() -> None:
    shared = Workload("one prompt", [Arrival(at * 5_000_000, 1024, 10, (1, 2)) for at in range(9)], 512)
    (member,) = LOAD.backends
    with_cache = LOAD.model_copy(update={"backends": [member.model_copy(update={"prefix_cache": True})]})
    without, found = (simulate(load, shared, 1.0).ttft_s for load in (LOAD, with_cache))
    assert found[0] == pytest.approx(without[0])
    assert max(found[1:]) < 0.6 * min(without[1:])


def test_a_member_may_have_a_longer_context_than_its_profile() -> None:
    (member,) = LOAD.backends
    assert member.load().limits.max_model_len == 5000
    assert member.model_copy(update={"context": 16_000}).load().limits.max_model_len == 16_000


def test_what_was_heard_becomes_emulated_seconds() -> None:
    workload = Workload("two", [Arrival(0, 50, 10), Arrival(1, 50, 10)])
    right = Answer(due_at=1.0, began_at=1.0, sent_at=1.0, first_at=1.1, ended_at=1.5, backend="one")
    wrong = Answer(due_at=1.2, began_at=1.202, sent_at=1.202, ended_at=2.0, failure="status 429")
    found = seen([right, wrong], workload, 4.0, {"others": 0.1})
    assert found.outcome.ttft_s == [pytest.approx(0.4)]
    assert found.outcome.total_s == [pytest.approx(2.0)]
    assert found.outcome.decisions == Counter({"one": 1, "status 429": 1})
    assert found.tokens_per_s == pytest.approx(10)
    assert not found.spoiled_by


def test_times_count_from_when_a_request_is_due() -> None:
    """Whether the client was late or the proxy slow to accept."""
    workload = Workload("two", [Arrival(0, 50, 10), Arrival(0, 50, 10)])
    late = Answer(due_at=1.0, began_at=1.3, sent_at=1.3, first_at=1.4, ended_at=2.0, backend="one")
    slow = Answer(due_at=1.0, began_at=1.0, sent_at=1.3, first_at=1.4, ended_at=2.0, backend="one")
    rounds = [seen([answer, answer], workload, 2.0, {"others": 0.0}) for answer in (late, slow)]
    for one in rounds:
        assert one.outcome.ttft_s == [pytest.approx(0.8)] * 2
        assert one.outcome.total_s == [pytest.approx(2.0)] * 2
        assert one.outcome.seconds == pytest.approx(1.0)
    assert [one.late_ms for one in rounds] == [pytest.approx(300), 0.0]
    assert [bool(one.spoiled_by) for one in rounds] == [True, False]


def test_a_request_that_found_nobody_is_not_taken_for_early() -> None:
    alone = Answer(due_at=100.0, began_at=100.0, failure="cannot connect")
    right = Answer(due_at=100.0, began_at=100.0, sent_at=100.0, first_at=100.1, ended_at=101.0, backend="one")
    workload = Workload("two", [Arrival(0, 50, 10), Arrival(0, 50, 10)])
    found = seen([alone, right], workload, 1.0, {"others": 0.0})
    assert (found.outcome.seconds, found.late_ms) == (pytest.approx(1.0), 0.0)


EVERY = Outcome([1.0, 1.0], [2.0, 2.0], Counter(one=2), 1.0)
QUIET = Round(EVERY, 1, 0.0, {"others": 0.0})


@pytest.mark.parametrize(
    ("spoiled", "why"),
    [
        (replace(QUIET, cores={"others": 0.3}), "round 2 is spoiled: other processes used 0.30 of a core"),
        (replace(QUIET, late_ms=LATE_MS + 1), "round 2 is spoiled: the client was 21 ms late"),
    ],
)
def test_the_check_fails_on_what_was_spoiled_and_not_repeated(spoiled: Round, why: str) -> None:
    assert complaints([Compared(LOAD, [EVERY], [QUIET])]) == []
    (complaint,) = complaints([Compared(LOAD, [EVERY], [QUIET, spoiled])])
    assert why in complaint
    assert not replace(spoiled, ahead=True, late_ms=0.0).spoiled_by


def test_a_spoiled_round_is_repeated_as_often_as_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    late = replace(QUIET, late_ms=LATE_MS + 1)
    played = iter([late, QUIET, late, late])
    monkeypatch.setattr(agreement, "SIMULATIONS", 1)
    monkeypatch.setattr(agreement, "emulate", lambda *_: next(played))
    found = compare(LOAD, TRACE, 1.0, 2, lambda: None, repeats=2)
    assert (found.rounds, found.repeated) == ([QUIET, late], 2)


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
    fewer = Outcome([1.0], [2.0], Counter({"one": 1, "queue_full": 1}), 1.0)
    simulated, emulated = (fewer, EVERY) if refused_by == "simulator" else (EVERY, fewer)
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
