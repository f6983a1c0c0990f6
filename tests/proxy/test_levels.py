from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.levels import bar, called, levels


@given(st.floats(0, 50), st.integers(1, 30))
def test_a_bar_keeps_its_width(saturation: float, cells: int) -> None:
    assert len(bar(saturation, cells).plain.split(" ")[0]) == cells


def test_a_backend_is_called_by_its_site_too_where_that_differs() -> None:
    assert called({"name": "nanjing", "site": "nanjing"}) == "nanjing"
    assert called({"name": "appliance", "site": "local"}) == "appliance (local)"


def test_all_levels_in_a_line() -> None:
    rows = [{"name": name, "saturation": 0.5, "in_flight": 2, "slots": 4} for name in "ab"]
    assert levels(rows) == "a 0.50 (2/4)  b 0.50 (2/4)"
