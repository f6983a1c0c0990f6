"""The matrix, its tests and its page belong together."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.e2e.faults import page
from tests.e2e.faults.figures import VARIABLE, Figure, read_figures
from tests.e2e.faults.matrix import E2E, HERE, NUMBERS, ROOT, ROWS, Row

each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.number)
TEXT = page.PAGE.read_text(encoding="utf-8")


def test_there_is_every_row() -> None:
    assert tuple(f"F{number}" for number in range(1, 36) if number != 34) == NUMBERS


@each_row
def test_what_shows_a_row_exists(row: Row) -> None:
    for test in row.tests:
        file, _, name = test.partition("::")
        defined = re.findall(r"^(?:async )?def (test_\w+)\(", (ROOT / file).read_text(encoding="utf-8"), re.M)
        assert name in defined, test
    assert row.tests or row.command
    if row.command:
        module = row.command.split()[2]
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), row.command


def test_every_test_here_belongs_to_its_row() -> None:
    named = {test: row.number for row in ROWS for test in row.tests}
    for file in (ROOT / HERE).glob("test_*.py"):
        for name in re.findall(r"^(?:async )?def (test_f\d\d_\w+)\(", file.read_text(encoding="utf-8"), re.M):
            test = f"{HERE}/{file.name}::{name}"
            assert named.get(test) == f"F{int(name[6:8])}", test


def test_the_page_has_the_table_of_the_matrix_and_what_was_measured() -> None:
    rows, facts = page.found(TEXT)
    assert page.renewed(TEXT, rows, facts) == TEXT, "`python -m tests.e2e.faults` writes it anew"
    assert tuple(rows) == NUMBERS
    measured = {row.number for row in ROWS if any(test.startswith(E2E) for test in row.tests)}
    assert {number for number in measured if page.NOTHING in rows[number]} == set()
    assert re.search(r"\d cores, Linux .*, \d{4}-\d\d-\d\d", facts)


def test_figures_are_noted_where_somebody_asks_for_them(
    tmp_path: Path, figure: Figure, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "figures"
    monkeypatch.setenv(VARIABLE, str(file))
    with pytest.raises(AssertionError, match="no row F34"):
        figure("F34", 1, "")
    figure("F1", 0, "of 12 failed")
    figure("F6", 0.123456, "s")
    figure("F1", 0, "of 12 failed")
    figure("F1", 1500, "tokens | words")
    found = read_figures(file)
    assert found == {"F1": ["0 of 12 failed", "1500 tokens | words"], "F6": ["0.123 s"]}
    copy = tmp_path / "page.md"
    copy.write_text(TEXT)
    page.write(found, "a machine", copy)
    rows, facts = page.found(copy.read_text())
    assert facts == "a machine"
    assert (rows["F1"][0], rows["F6"][0]) == ("0 of 12 failed; 1500 tokens \\| words", "0.123 s")
    assert rows["F2"] == page.found(TEXT)[0]["F2"]
