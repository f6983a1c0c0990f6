"""Quantiles, spreads and ratios against values worked out by hand and by numpy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.summary import Spread, print_table, quantile, ratio, write_result

numbers = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50)


@given(numbers, st.floats(0, 1))
def test_quantile_is_the_interpolated_one(values: list[float], part: float) -> None:
    assert quantile(values, part) == pytest.approx(float(np.quantile(values, part)), rel=1e-9, abs=1e-6)


def test_quantile_needs_values_and_a_part() -> None:
    with pytest.raises(ValueError, match="no values"):
        quantile([], 0.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        quantile([1.0], 50)


def test_a_spread_is_median_and_quartiles() -> None:
    spread = Spread.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (spread.median, spread.low, spread.high, spread.rounds) == (3.0, 2.0, 4.0, 5)
    assert spread.text() == "3.0 (2.0-4.0)"
    assert Spread.of([7.0]).text(2) == "7.00"


def test_a_ratio_is_taken_within_its_round() -> None:
    # The machine was twice as slow in the last round: ratios of medians would say 30/80, each round says 1/2.
    spread = ratio([10.0, 40.0, 30.0], [20.0, 80.0, 60.0])
    assert spread is not None
    assert (spread.median, spread.low, spread.high) == (0.5, 0.5, 0.5)


def test_a_ratio_leaves_out_rounds_without_both() -> None:
    assert ratio([1.0, None, 3.0], [2.0, 2.0, None]) == Spread(0.5, 0.5, 0.5, 1)
    assert ratio([None], [1.0]) is None


def test_a_result_has_the_facts_of_its_machine(tmp_path: Path) -> None:
    path = write_result("compare", {"rounds": [1]}, tmp_path)
    written = json.loads(path.read_text())
    assert written["rounds"] == [1]
    assert set(written["machine"]) == {"cpu", "cores", "memory_gib", "kernel", "python", "date", "commit"}
    assert path.name.endswith("-compare.json")


def test_a_table_lines_up(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("Title", ("proxy", "µs"), [["a", "1.0"], ["longer", "12.5 (1-2)"]])
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == "Title"
    assert lines[2:] == [
        "| proxy  | µs         |",
        "| ------ | ---------- |",
        "| a      |        1.0 |",
        "| longer | 12.5 (1-2) |",
    ]
