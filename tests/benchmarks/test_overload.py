from __future__ import annotations

from dataclasses import replace

from benchmarks.overload import MOST_GROWTH, Figures, broken

ONCE = Figures(1, 12.0, 11.5, 0, 0.0, 80 * 2**20, ())
TWICE = Figures(2, 24.0, 11.0, 240, 3.0, 84 * 2**20, ())


def test_what_is_kept_is_not_complained_of() -> None:
    assert broken([ONCE, TWICE]) == []


def test_each_promise_that_is_broken_is_named() -> None:
    assert broken([ONCE, replace(TWICE, goodput=10.0)]) == [
        "2 times the capacity: goodput 10.0/s, 87% of the peak"
    ]
    assert broken([ONCE, replace(TWICE, shed_p99_ms=51.0)]) == [
        "2 times the capacity: who was turned away waited 51 ms (p99)"
    ]
    assert broken([ONCE, replace(TWICE, memory=ONCE.memory + MOST_GROWTH + 1)]) == [
        "2 times the capacity: 32 MB more memory"
    ]
    assert broken([ONCE, replace(TWICE, failures=("status 502",))]) == ["2 times the capacity: status 502"]
