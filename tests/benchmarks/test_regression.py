"""What is said of two versions."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import pytest

from benchmarks import regression
from benchmarks.compare import QUICK, Figures

BEFORE = "tidegate-0123456"


def figures(peer: str, request: float, token: float) -> Figures:
    return Figures(
        peer, request, token, token, 100.0, 1.0, 2.0, 1.0, 2.0, 1.0, 50.0, (0.5, 0.5), others=0.0, failures={}
    )


def rounds(*ratios: float) -> list[dict[str, Figures]]:
    """The machine is in another mood each time."""
    found = []
    for mood, ratio in enumerate(ratios, 1):
        now = figures("tidegate", 100.0 * mood * ratio, 10.0 * mood)
        found.append({"tidegate": now, BEFORE: figures(BEFORE, 100.0 * mood, 10.0 * mood)})
    return found


@pytest.mark.parametrize(
    ("ratios", "failed"), [((1.0, 1.04, 1.5), False), ((1.0, 1.06, 1.1), True), ((), True)]
)
def test_the_median_of_the_rounds_ratios_decides(
    ratios: Sequence[float], failed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    options = argparse.Namespace(check=True, no_result=True)
    assert regression.report(BEFORE, "0" * 40, rounds(*ratios), {}, QUICK, options) == failed
    assert not ratios or f"{sorted(ratios)[1]:.3f}" in capsys.readouterr().out


def test_a_commit_is_found_by_its_name() -> None:
    assert regression.full_hash("no-such-commit") == ""
