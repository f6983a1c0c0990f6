"""Intervals against numpy, and against what they promise."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest

from sim.intervals import estimate, paired, t_quantile


@pytest.mark.parametrize(
    ("freedom", "value"),
    [
        (1, 12.7062),
        (2, 4.3027),
        (3, 3.1824),
        (4, 2.7764),
        (5, 2.5706),
        (9, 2.2622),
        (30, 2.0423),
        (120, 1.9799),
    ],
)
def test_the_quantiles_are_those_of_the_tables(freedom: int, value: float) -> None:
    assert t_quantile(freedom) == pytest.approx(value, abs=5e-5)


@pytest.mark.parametrize("freedom", [1, 2, 3, 6, 19])
def test_the_quantiles_are_those_of_numpys_own_draws(freedom: int) -> None:
    draws = np.abs(np.random.default_rng(1).standard_t(freedom, 400_000))
    assert np.mean(draws <= t_quantile(freedom)) == pytest.approx(
        0.95, abs=5 * np.sqrt(0.05 * 0.95 / 400_000)
    )


def test_a_mean_and_its_interval_are_numpys() -> None:
    values = np.random.default_rng(2).normal(3, 2, 7)
    found = estimate(values.tolist())
    assert found is not None
    assert found.mean == pytest.approx(float(np.mean(values)))
    assert found.half_width == pytest.approx(2.446912 * float(np.std(values, ddof=1)) / np.sqrt(7), rel=1e-6)


def test_intervals_hold_the_truth_in_95_of_100_cases() -> None:
    random = np.random.default_rng(3)
    samples, cases = 4, 4000
    held = 0
    for _ in range(cases):
        found = estimate(random.normal(5, 1, samples).tolist())
        assert found is not None
        assert found.half_width is not None
        held += abs(found.mean - 5) <= found.half_width
    assert held / cases == pytest.approx(0.95, abs=5 * np.sqrt(0.05 * 0.95 / cases))


def test_what_seeds_have_in_common_cancels_out() -> None:
    ours, theirs = [101.0, 51.5, 11.0], [100.0, 50.0, 10.0]
    found, apart = paired(ours, theirs), estimate(ours)
    assert found is not None
    assert apart is not None
    assert found == estimate([1.0, 1.5, 1.0])
    assert found.half_width is not None
    assert apart.half_width is not None
    assert found.half_width < apart.half_width / 50
    with pytest.raises(ValueError, match="zip"):
        paired([1.0], [1.0, 2.0])


def test_what_cannot_be_told_is_not_told() -> None:
    assert estimate([]) is None
    assert estimate([2.0]) == (2.0, None)
    assert estimate([1.0, inf]) == (inf, None)
