"""docs/security.md names the test that shows each claim; a test that is gone takes its claim with it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")


def test_every_named_test_exists() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    defined = {name for text in sources for name in re.findall(r"def (test_\w+)\(", text)}
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 100
    assert named - defined == set()


def test_every_behaviour_and_hazard_has_its_row() -> None:
    rows = re.findall(r"^\| ((?:H?\d+)(?:, H?\d+)*) \|", PAGE, re.M)
    numbers = [number for row in rows for number in row.split(", ")]
    assert numbers == [*map(str, range(1, 34)), *(f"H{number}" for number in range(1, 41))]
