"""What is in a workload, in figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from sim.workload import Workload


class Lengths(NamedTuple):
    """Of prompts or answers, tokens."""

    mean: float
    p50: float
    p95: float
    p99: float
    max: int


class PrefixShare(NamedTuple):
    """What a prefix cache without bounds would serve, if every request found all that came before it."""

    blocks: float
    """Share of the blocks of all prompts; a piece at the end of a prompt is a block, too, and never served."""
    tokens: float
    """Share of the tokens of all prompts."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of a workload that has requests."""

    name: str
    requests: int
    span_s: float
    """From the first arrival to the last."""
    rate_rps: float
    """Requests per second: one over the mean gap; 0: all come at once."""
    gap_cv: float
    """Coefficient of variation of the gaps between arrivals."""
    prompt_tokens: Lengths
    output_tokens: Lengths
    tenants: dict[str, int]
    """Requests by tenant, most first."""
    models: dict[str, int]
    data_classes: dict[str, int]
    sessions: int
    closed_loop: int
    """Requests that wait for the answer to the one before them."""
    unit_tokens: int
    prefix: PrefixShare
    left_out: int
    """Lines that could not be read."""
    missing: int
    """Requests that those lines stood for, where they say how many (ServeGen)."""
    missing_share: float
    """Of the requests that there would be with them."""
    problems: list[str]
    """The first few lines that were left out."""


def summarize(workload: Workload) -> Summary:
    """Raises ValueError for a workload without requests."""
    import numpy as np

    arrivals = workload.arrivals
    if not arrivals:
        raise ValueError("the workload has no requests")
    gaps = np.diff([arrival.at for arrival in arrivals]) / 1e6
    mean_gap = float(gaps.mean()) if len(gaps) else 0.0
    return Summary(
        name=workload.name,
        requests=len(arrivals),
        span_s=workload.span / 1e6,
        rate_rps=1.0 / mean_gap if mean_gap else 0.0,
        gap_cv=float(gaps.std()) / mean_gap if mean_gap else 0.0,
        prompt_tokens=_lengths([arrival.prompt_tokens for arrival in arrivals]),
        output_tokens=_lengths([arrival.output_tokens for arrival in arrivals]),
        tenants=_counts(arrival.tenant for arrival in arrivals),
        models=_counts(arrival.model for arrival in arrivals),
        data_classes=_counts(arrival.data_class for arrival in arrivals),
        sessions=len({arrival.session for arrival in arrivals if arrival.session}),
        closed_loop=sum(arrival.think >= 0 for arrival in arrivals),
        unit_tokens=workload.unit_tokens,
        prefix=prefix_share(workload),
        left_out=workload.left_out,
        missing=workload.missing,
        missing_share=workload.missing_share,
        problems=[str(problem) for problem in workload.problems],
    )


def _lengths(values: list[int]) -> Lengths:
    import numpy as np

    p50, p95, p99 = (float(one) for one in np.percentile(values, (50, 95, 99)))
    return Lengths(float(np.mean(values)), p50, p95, p99, max(values))


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def prefix_share(workload: Workload) -> PrefixShare:
    """In order of arrival; an answer is there for the next request, whenever that comes."""
    unit = workload.unit_tokens
    if not unit:
        return PrefixShare(0.0, 0.0)
    known: set[int] = set()
    blocks = tokens = served = 0
    for arrival in workload:
        blocks += -(-arrival.prompt_tokens // unit)
        tokens += arrival.prompt_tokens
        for value in arrival.hashes[: arrival.prompt_tokens // unit]:
            if value not in known:
                break
            served += 1
        known.update(arrival.hashes)
    return PrefixShare(served / max(1, blocks), served * unit / max(1, tokens))
