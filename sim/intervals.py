"""Means over seeds, with 95 % intervals by Student's t."""

from __future__ import annotations

from collections.abc import Sequence
from math import atan, cos, isfinite, pi, sin, sqrt
from typing import NamedTuple

LEVEL = 0.95


class Estimate(NamedTuple):
    """A mean, and how far from it the true one may be."""

    mean: float
    half_width: float | None
    """Of the interval that holds the true mean in 95 % of all cases; None: one seed, or not all have a figure."""


def estimate(values: Sequence[float]) -> Estimate | None:
    """Of figures of independent seeds; infinite ones make an infinite mean. None: there are none."""
    if not values:
        return None
    count = len(values)
    mean = sum(values) / count
    if count < 2 or not isfinite(mean):
        return Estimate(mean, None)
    deviation = sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    return Estimate(mean, t_quantile(count - 1) * deviation / sqrt(count))


def paired(values: Sequence[float], others: Sequence[float]) -> Estimate | None:
    """Of the differences, seed by seed: what both have in common cancels out."""
    return estimate([value - other for value, other in zip(values, others, strict=True)])


def t_quantile(freedom: int) -> float:
    """Which value Student's t exceeds in size in 5 % of all cases, with so many degrees of freedom, 1 or more."""
    low, high = 0.0, 13.0
    while (middle := (low + high) / 2) not in (low, high):
        if _within(middle, freedom) < LEVEL:
            low = middle
        else:
            high = middle
    return high


def _within(t: float, freedom: int) -> float:
    """Probability that Student's t is no larger in size: the finite sums of Abramowitz and Stegun, 26.7.3 and
    26.7.4."""
    angle = atan(t / sqrt(freedom))
    square = cos(angle) ** 2
    odd = freedom % 2
    term = total = cos(angle) if odd else 1.0
    for step in range(2 + odd, freedom - 1, 2):
        term *= square * (step - 1) / step
        total += term
    if not odd:
        return sin(angle) * total
    return 2.0 / pi * (angle + (sin(angle) * total if freedom > 1 else 0.0))
