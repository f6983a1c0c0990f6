"""The table of `docs/reliability.md`: the rows of the matrix with what was last measured."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from tests.e2e.faults.matrix import ROOT, ROWS, Row

PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- faults: measured -->", "<!-- end of faults -->"
NOTHING = "–"
_TABLE = re.compile(rf"{BEGIN}\n(.*?)\n\n(.*?)\n{END}", re.S)


Measured: TypeAlias = Mapping[str, tuple[str, str]]
"""By row: figures as they stand in its cell, and their date."""


def table(measured: Measured, facts: str) -> str:
    """`facts`: the machine of the last run, with date and commit."""
    lines = ["| | fault | how it is made | promised | measured | on | shown by |", "| --- " * 7 + "|"]
    lines += [_line(row, *measured.get(row.number, (NOTHING, NOTHING))) for row in ROWS]
    return "\n".join([BEGIN, *lines, "", facts, END])


def _line(row: Row, figures: str, date: str) -> str:
    shown = [f"`{test.rpartition('::')[2]}`" for test in row.tests]
    shown += [f"`{row.command}`"] if row.command else []
    cells = (row.number, row.fault, row.how, row.promised, figures, date, ", ".join(shown))
    return f"| {' | '.join(cells)} |"


def cell(figures: Sequence[str]) -> str:
    """What a row has measured, in one cell."""
    return "; ".join(figures).replace("|", "\\|")


def found(text: str) -> tuple[dict[str, tuple[str, str]], str]:
    """What a page says was measured, and its facts. AssertionError: it has no table."""
    match = _TABLE.search(text)
    assert match is not None, f"{PAGE} has no table between {BEGIN} and {END}"
    rows = [[one.strip() for one in re.split(r"(?<!\\)\|", line)[1:-1]] for line in match[1].splitlines()[2:]]
    return {row[0]: (row[4], row[5]) for row in rows}, match[2]


def renewed(text: str, measured: Measured, facts: str) -> str:
    """A page with another table."""
    return _TABLE.sub(lambda _: table(measured, facts), text)


def write(figures: Mapping[str, Sequence[str]], facts: str, path: Path = PAGE) -> None:
    """Put what was measured into the page; rows of which nothing was keep what they have."""
    text, today = path.read_text(encoding="utf-8"), time.strftime("%Y-%m-%d")
    before, _ = found(text)
    path.write_text(
        renewed(text, before | {row: (cell(texts), today) for row, texts in figures.items()}, facts),
        encoding="utf-8",
    )
