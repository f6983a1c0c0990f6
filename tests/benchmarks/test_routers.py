from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import routers
from benchmarks.agreement import LATE_MS, Round
from benchmarks.agreement_loads import Load, Outcome, read_loads
from benchmarks.conversations import conversations
from benchmarks.fleets import Served, served, start_emulators
from benchmarks.open_loop import play
from benchmarks.order import LOADS
from benchmarks.processes import Services
from benchmarks.routers import (
    ALIKE,
    PEERS,
    POLICY,
    Played,
    Tried,
    best,
    better,
    candidates,
    complaints,
    met,
    p95_ttft,
    plot,
    report,
    try_out,
)
from policies.files import read_policy
from sim.evaluate import named_policy

REQUESTS = 4
DONE = Served({"here": 3, "there": 1}, 0.5)


def round_of(*ttft_s: float, tpot_s: float = 0.05, late_ms: float = 0.0, client: float = 0.1) -> Round:
    outcome = Outcome(list(ttft_s), [3.0] * len(ttft_s), Counter(), 1.0, [tpot_s] * len(ttft_s))
    cores = {"proxy": 0.1, "emulators": 0.1, "client": client, "others": 0.0}
    return Round(outcome, 1, late_ms, cores)


def router(name: str, *rounds: Round) -> Played:
    return Played(name, PEERS.get(name, ()), list(rounds), [DONE] * len(rounds))


def test_who_is_late_in_either_way_or_unanswered_misses() -> None:
    assert met(round_of(1.0, 1.9, 2.1, 0.1).outcome, REQUESTS) == 0.75
    assert met(round_of(1.0, 1.0, 1.0, 1.0, tpot_s=0.11).outcome, REQUESTS) == 0.0
    assert met(round_of(1.0, 1.0).outcome, REQUESTS) == 0.5
    assert p95_ttft(round_of(1.0, 1.0).outcome, REQUESTS) == float("inf")


def test_ratios_are_of_the_same_round() -> None:
    ours = router("tidegate", round_of(1.0, 1.0, 1.0, 1.0), round_of(0.5, 0.5, 0.5, 0.5))
    theirs = router("round_robin", round_of(1.5, 1.5, 3.0, 3.0), round_of(1.0, 1.0, 1.0, 1.0))
    (found,) = better([ours, theirs], REQUESTS)
    assert found.ttft.median == pytest.approx((3.0 + 2.0) / 2)
    assert found.goodput.median == pytest.approx((2.0 + 1.0) / 2)
    assert complaints([ours, theirs], [found]) == []


def test_what_is_not_better_is_a_complaint() -> None:
    same = round_of(1.0, 1.0, 1.0, 1.0)
    played = [router("tidegate", same), router("cache_aware", same)]
    said = ["tidegate is not better than cache_aware in p95 TTFT and goodput"]
    assert complaints(played, better(played, REQUESTS)) == said


def test_so_is_a_peer_that_answers_more() -> None:
    played = [
        router("tidegate", round_of(0.1, 0.1, 0.1)),
        router("cache_aware", round_of(1.0, 1.0, 1.0, 1.0)),
    ]
    (said,) = complaints(played, better(played, REQUESTS))
    assert said.endswith("p95 TTFT and goodput")


@pytest.mark.parametrize(
    ("spoiled", "why"),
    [
        ({"late_ms": LATE_MS + 1}, "tidegate, round 1 is spoiled: the client was 21 ms late"),
        ({"client": 0.6}, "tidegate, round 1: client used 0.60 of a core"),
    ],
)
def test_a_round_that_measured_something_else_is_one(spoiled: dict[str, float], why: str) -> None:
    played = [
        router("tidegate", round_of(1.0, 1.0, 1.0, 1.0, **spoiled)),
        router("round_robin", round_of(3.0, 3.0, 3.0, 3.0)),
    ]
    (said,) = complaints(played, better(played, REQUESTS))
    assert said.startswith(why)


def test_the_best_candidate_is_the_soonest_of_those_that_keep_the_most() -> None:
    most = Tried("most", "", 0.98, 1.5)
    sooner = replace(most, name="sooner", met=0.98 - ALIKE / 2, ttft_s=1.0)
    soonest = replace(most, name="soonest", met=0.98 - 2 * ALIKE, ttft_s=0.5)
    assert best([most, sooner, soonest]) == sooner


def test_the_file_is_one_of_the_candidates() -> None:
    text = POLICY.read_text(encoding="utf-8")
    rules = [line for line in text.splitlines() if not line.startswith("#")]
    assert [name for name, one in candidates().items() if one.splitlines() == rules]
    for name, one in candidates().items():
        read_policy(one, name)


def test_the_file_is_better_than_the_likes_of_theirs_in_the_simulator() -> None:
    (load,) = read_loads(LOADS)
    ours = try_out(load, "ours", POLICY.read_text(encoding="utf-8"), [201], load.requests)
    for name in ("round-robin", "power-of-two"):
        theirs = try_out(load, name, named_policy(name).text, [201], load.requests)
        assert ours.met > theirs.met + 0.1
        assert ours.ttft_s < theirs.ttft_s / 2


def test_the_report_and_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="NOT RUN: needs the extra `plot`")
    played = [
        router("tidegate", round_of(1.0, 1.0, 1.0, 1.0)),
        router("round_robin", round_of(3.0, 3.0, 3.0)),
    ]
    report(played, better(played, REQUESTS), REQUESTS, 4.0, 1.0)
    printed = capsys.readouterr().out
    assert "not all were answered" in printed
    assert "3 1" in printed
    plot(played, REQUESTS, tmp_path / "routers.png")
    assert (tmp_path / "routers.png").read_bytes().startswith(b"\x89PNG")


def test_without_the_peer_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(routers, "environment", lambda _: tmp_path)
    monkeypatch.setattr("sys.argv", ["routers"])
    assert routers.main() == 2
    assert "install_peers vllm-router" in capsys.readouterr().err


@pytest.mark.e2e
def test_backends_tell_what_they_have_served(tmp_path: Path) -> None:
    """The same prompt twice, with `X-Session-Id`: the second time it is in the cache."""
    (load,) = read_loads(LOADS)
    alone: Load = load.model_copy(update={"backends": load.backends[:1]})
    asked = conversations(2, 4.0, 1)
    first = asked.workload.arrivals[0]
    again, bodies = first._replace(at=first.at + 500_000), asked.bodies()[:1] * 2
    with Services(tmp_path) as services:
        (emulator,) = start_emulators(services, alone, 100.0, "bench")
        answers = asyncio.run(play(emulator.ports[0], [first, again], lambda: None, bodies))
        done = served(alone, [emulator])
    assert [answer.failure for answer in answers] == ["", ""]
    assert done.requests == {"here": 2}
    assert done.cached == pytest.approx(len(first.hashes) * 512 / first.prompt_tokens / 2, abs=0.01)
