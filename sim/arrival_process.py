"""When requests come: a renewal process, stretched by a rate that changes.

Gaps of mean 1 are drawn in operational time; the integral of the rate maps it to seconds (time rescaling:
Cox and Isham, "Point Processes", 1980). With a constant rate the gaps keep their distribution; a changing one
stretches them, so that the coefficient of variation is the local one.

The process is in equilibrium from its beginning: the first gap is what is left of a gap that was under way
(Cox, "Renewal Theory", 1962), so that the expected number of arrivals is the integral of the rate exactly.
"""

from __future__ import annotations

from enum import StrEnum
from math import ceil, exp, lgamma, sqrt
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

LEAST_CV = 0.05
MOST_CV = 20.0


class Process(StrEnum):
    """Distribution of the gaps."""

    POISSON = "poisson"
    """Exponential gaps: coefficient of variation 1."""
    GAMMA = "gamma"
    WEIBULL = "weibull"


class Rate(NamedTuple):
    """A rate that is constant between its edges."""

    edges: np.ndarray
    """Seconds, rising; the first is the beginning, the last the end."""
    levels: np.ndarray
    """Requests per second; one less than edges."""

    @property
    def expected(self) -> float:
        """Requests from the beginning to the end."""
        import numpy as np

        return float(np.sum(np.diff(self.edges) * self.levels))


def arrival_times(random: np.random.Generator, process: Process, cv: float, rate: Rate) -> np.ndarray:
    """Times of arrivals, seconds, rising. `cv`: coefficient of variation of the gaps; 1 for Poisson."""
    import numpy as np

    integral = np.concatenate(([0.0], np.cumsum(np.diff(rate.edges) * rate.levels)))
    end = float(integral[-1])
    times = np.cumsum([_rest_of_a_gap(random, process, cv)])
    while times[-1] < end:
        missing = end - float(times[-1])
        count = ceil(missing + 4.0 * cv * sqrt(missing)) + 16
        times = np.concatenate((times, times[-1] + np.cumsum(_gaps(random, process, cv, count))))
    found: np.ndarray = np.interp(times[times < end], integral, rate.edges)
    return found


def _gaps(random: np.random.Generator, process: Process, cv: float, count: int) -> np.ndarray:
    """Of mean 1."""
    if process is Process.POISSON:
        return random.standard_exponential(count)
    if process is Process.GAMMA:
        return random.standard_gamma(cv**-2, count) * cv**2
    shape = weibull_shape(cv)
    return random.weibull(shape, count) / _weibull_mean(shape)


def _rest_of_a_gap(random: np.random.Generator, process: Process, cv: float) -> float:
    """A uniform share of a gap that was chosen in proportion to its length."""
    if process is Process.POISSON:
        return float(random.standard_exponential())
    if process is Process.GAMMA:
        gap = random.standard_gamma(cv**-2 + 1.0) * cv**2
    else:
        shape = weibull_shape(cv)
        gap = random.standard_gamma(1.0 + 1.0 / shape) ** (1.0 / shape) / _weibull_mean(shape)
    return float(random.random() * gap)


def weibull_shape(cv: float) -> float:
    """The shape of the Weibull distribution with this coefficient of variation, by bisection."""
    low, high = 0.1, 100.0
    for _ in range(60):
        middle = sqrt(low * high)
        square = exp(lgamma(1.0 + 2.0 / middle) - 2.0 * lgamma(1.0 + 1.0 / middle)) - 1.0
        low, high = (middle, high) if square > cv**2 else (low, middle)
    return sqrt(low * high)


def _weibull_mean(shape: float) -> float:
    """With scale 1."""
    return exp(lgamma(1.0 + 1.0 / shape))
