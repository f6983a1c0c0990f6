from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import fairness
from benchmarks.fairness import Figures, broken, measure

KEPT = Figures(2, 16, 6.0, 100.0, 118.0, 0.0, 0.02, 116.0)


def test_what_is_kept_or_the_engines_is_not_complained_of() -> None:
    assert broken([KEPT, replace(KEPT, flooded=140.0, engine=139.0)]) == []


def test_what_the_valve_adds_is() -> None:
    assert broken([replace(KEPT, flooded=140.0)]) == [
        "2 x 16: 1.40 times as long as alone, the engine's part is 1.16"
    ]


def test_the_parts_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness, "SECONDS", 60)
    found = measure(1, 8, 1)
    assert found.capacity > 1.0
    assert 0.0 < found.engine <= found.flooded
    assert 0.0 <= found.waited < 1.0
