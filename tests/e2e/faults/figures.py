"""Figures that tests measure: noted in a file of lines of JSON, if somebody asks for them."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import pytest

from tests.e2e.faults.matrix import NUMBERS

VARIABLE = "TIDEGATE_FIGURES"
"""Of the environment: the file."""


class Figure(Protocol):
    def __call__(self, row: str, value: float, unit: str) -> None:
        """Note a figure of a row of the matrix: `figure("F1", 0, "of 12 failed")`."""


@pytest.fixture
def figure() -> Figure:
    """Notes what a test has measured, for the table of `docs/reliability.md`."""

    def note(row: str, value: float, unit: str) -> None:
        assert row in NUMBERS, f"the matrix has no row {row}"
        if file := os.environ.get(VARIABLE):
            with Path(file).open("a") as lines:
                lines.write(json.dumps([row, value, unit]) + "\n")

    return note


def read_figures(file: Path) -> Mapping[str, list[str]]:
    """The figures of each row as text, without repeats, in the order in which they were noted."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for line in file.read_text().splitlines():
        row, value, unit = json.loads(line)
        text = f"{_shown(value)} {unit}"
        if text not in found[row]:
            found[row].append(text)
    return found


def _shown(value: float) -> str:
    """Three digits are enough of what is no count."""
    return str(value) if isinstance(value, int) else f"{value:.3g}"
