"""What the benchmarks make of their figures: costs, promises, tables."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import delay, memory
from benchmarks.compare import Figures, Load, as_json, keeps_promise, print_report, ratio_of
from benchmarks.load import BODY_BYTES
from benchmarks.peers import PEERS, WORK


def figures(peer: str, per_request: float, per_token: float) -> Figures:
    """The figures of one proxy in one round."""
    return Figures(
        peer=peer,
        us_per_request=per_request,
        us_per_token=per_token,
        us_per_token_net=per_token,
        requests_per_s=1000.0,
        p50_ms=1.0,
        p99_ms=2.0,
        first_token_p50_ms=1.0,
        first_token_p99_ms=2.0,
        gap_p99_ms=21.0,
        memory_mb=30.0,
        core_busy=(0.9, 0.2),
        others=0.0,
        failures={},
    )


def rounds(*pairs: tuple[float, float]) -> list[dict[str, Figures]]:
    """Rounds in which vllm-router took 100 and 20 µs times a factor, and Tidegate a share of that."""
    return [
        {
            "tidegate": figures("tidegate", 100 * factor * share, 20 * factor * share),
            "vllm-router": figures("vllm-router", 100 * factor, 20 * factor),
        }
        for factor, share in pairs
    ]


def test_the_ratio_is_that_of_the_same_round() -> None:
    spread = ratio_of(rounds((1.0, 0.5), (3.0, 0.5), (2.0, 0.6)), "us_per_request")
    assert spread is not None
    assert spread.median == 0.5
    assert ratio_of([{}], "us_per_request") is None


@pytest.mark.parametrize(("share", "kept"), [(0.7, True), (0.8, False)])
def test_the_promise_is_about_the_ratios(share: float, kept: bool) -> None:
    assert keeps_promise(rounds((1.0, share))) is kept
    assert not keeps_promise([{"tidegate": figures("tidegate", 1, 1)}])


def test_the_report_names_the_work_behind_each_row(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(["tidegate", "vllm-router", "envoy"], rounds((1.0, 0.5)))
    printed = capsys.readouterr().out
    [row] = [line for line in printed.splitlines() if line.startswith("| tidegate")]
    assert "50.0" in row
    assert row.endswith("key, body, meter, strip, ledger, metrics |")
    assert "| envoy" not in printed
    assert "CPU per request: 0.50, promised at most 0.75" in printed


def test_the_result_holds_every_round() -> None:
    result: dict[str, Any] = as_json(rounds((1.0, 0.5), (2.0, 0.5)), Load(), {"envoy": "not there"})
    assert len(result["rounds"]) == 2
    assert result["tidegate_over_vllm_router"]["us_per_token"]["median"] == 0.5
    assert result["not_measured"] == {"envoy": "not there"}


def test_every_peer_says_what_it_does() -> None:
    assert all(peer.work <= set(WORK) for peer in PEERS.values())
    assert PEERS["tidegate"].work == set(WORK)


def test_added_delay_is_the_difference_of_quantiles() -> None:
    direct = [0.001] * 99 + [0.002]
    base, added = delay.compare(direct, [time + 0.0003 for time in direct])
    assert base["p50"] == pytest.approx(1.0)
    assert added["p50"] == pytest.approx(0.3)
    assert added["p99"] == pytest.approx(0.3)


@pytest.mark.parametrize(("p99", "failures", "kept"), [(1.9, 0, True), (2.1, 0, False), (1.9, 1, False)])
def test_the_promise_of_delay(p99: float, failures: int, kept: bool) -> None:
    good, tried = {"p50": 0.2, "p99": 1.0}, {"p50": 0.2, "p99": p99}
    added = delay.Added("tidegate", BODY_BYTES, 0.5, 100, failures, good, good, good, tried)
    assert delay.keeps_promise([added]) is kept
    assert not delay.keeps_promise([])


def test_the_promise_of_memory() -> None:
    streams = memory.StreamMemory("tidegate", 1000, 20.0, 55.0, 30.0, {})
    assert streams.kb_per_stream == 35.0
    flat = memory.RequestMemory("tidegate", tuple(range(20)), (25.0, 21.0, 25.0, *([26.0] * 17)), {})
    assert flat.growth_mb == 1.0
    assert memory.keeps_promise([streams], [flat])
    leaking = memory.RequestMemory("tidegate", tuple(range(20)), tuple(20.0 + step for step in range(20)), {})
    assert not memory.keeps_promise([streams], [leaking])
    assert not memory.keeps_promise([memory.StreamMemory("tidegate", 1000, 20.0, 70.0, 30.0, {})], [flat])
    assert not memory.keeps_promise([], [])
