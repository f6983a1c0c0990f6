"""What a run of case 4.1 is told by, simulated or measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.summary import quantile


@dataclass(frozen=True, slots=True)
class Figures:
    """One closed loop, over all of its reports. Times are seconds, of emulated time where that is faster."""

    users: int
    reports: int
    mean_s: float
    p95_s: float
    away: float
    """Share of requests that remote sites served."""
    cached: float
    """Share of the prompt tokens at the appliance that were in its prefix cache."""
    preemptions: float
    """At the appliance, for each report of the run."""


def figures_of(
    users: int, seconds: Sequence[float], requests: Sequence[tuple[str, int, int]], preemptions: int
) -> Figures:
    """`seconds`: of each report. `requests`: (backend, prompt tokens, of them cached) of each; the appliance
    is called `appliance`."""
    local = [(prompt, cached) for backend, prompt, cached in requests if backend == "appliance"]
    prompts = sum(prompt for prompt, _ in local)
    return Figures(
        users=users,
        reports=len(seconds),
        mean_s=sum(seconds) / len(seconds),
        p95_s=quantile(seconds, 0.95),
        away=1 - len(local) / len(requests),
        cached=sum(cached for _, cached in local) / prompts if prompts else 0.0,
        preemptions=preemptions / len(seconds),
    )
