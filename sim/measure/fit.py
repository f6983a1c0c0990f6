"""From a sweep to a profile: the step's four coefficients from mean TTFT and TPOT of its levels.

In the steady state of a closed loop of c users, with prompts of p and answers of o tokens, requests come at a
rate X = c / (TTFT + (o-1) TPOT). By Little's law n = X (o-1) TPOT of the users are decoding: where none queues
nearly all are. A step computes prompts for a time of delta p X TPOT besides its decodes, so

    TPOT (1 - delta p X) = alpha + beta n + gamma n (p + o/2)

For each delta of a grid the rest is least squares, weighted by 1/TPOT so that errors are relative, with no
coefficient below zero; the delta with the smallest mean relative error of TPOT is taken. It is a first estimate:
levels of one length cannot tell beta from gamma, and then all that grows with users counts as gamma.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from sim.engine import StepCost
from sim.measure.endpoint import MeasureError
from sim.measure.prompts import Prefix
from sim.measure.sweep import Report
from sim.profile import Limits, Origin, Profile, Source, Step

DELTAS: Final = 401
"""Of the grid, from zero to where prompts alone would fill the time."""

ROUNDING: Final = 1e-9
"""Errors that differ by less are the same: the smaller delta, and fewer coefficients, are taken."""

Floats = npt.NDArray[np.float64]


class SweepRow(NamedTuple):
    """One level, as calibration wants it."""

    concurrency: int
    prompt_tokens: float
    """Mean of its requests; so are all that follow."""
    output_tokens: float
    ttft_s: float
    tpot_s: float


class Fit(NamedTuple):
    """Coefficients and how well they say what was measured."""

    cost: StepCost
    error: float
    """Mean relative error of TPOT, 0 to 1."""
    rows: int


def to_sweep(report: Report) -> list[SweepRow]:
    """Its levels with cold prompts that were not interrupted and have figures."""
    return [
        SweepRow(
            level.concurrency,
            level.prompt_tokens / level.completed,
            level.output_tokens / level.completed,
            level.ttft_s.mean,
            level.tpot_s.mean,
        )
        for series in report.series
        if series.prefix is Prefix.COLD
        for level in series.complete
        if level.ttft_s is not None and level.tpot_s is not None and level.tpot_s.mean > 0
    ]


def fit(rows: Iterable[SweepRow]) -> Fit:
    """By the equation above. Raises MeasureError: there are too few levels."""
    used = list(rows)
    if len({row.concurrency for row in used}) < 3:
        raise MeasureError(
            "a profile needs three levels with a cold prefix and answers of two tokens or more"
        )
    users, prompt, output, ttft, tpot = np.array(used, dtype=np.float64).T
    context = prompt + output / 2
    requests_per_s = users / (ttft + (output - 1) * tpot)
    prompt_tokens_per_s = requests_per_s * prompt
    decodes = requests_per_s * (output - 1) * tpot
    several = np.ptp(context) > 0.05 * context.mean()
    columns = np.stack([np.ones_like(users), decodes * several, decodes * context], axis=1)
    deltas = np.linspace(0.0, 1 / prompt_tokens_per_s.max(), DELTAS, endpoint=False)
    for_decodes = 1 - np.outer(prompt_tokens_per_s, deltas)
    found = not_negative_least_squares(columns / tpot[:, None], for_decodes)
    errors = np.abs(columns @ found / for_decodes / tpot[:, None] - 1).mean(axis=0)
    errors[found[0] <= 0] = np.inf  # no step is free
    best = int(np.argmax(errors <= errors.min() + ROUNDING))
    if not np.isfinite(errors[best]):
        raise MeasureError("no profile says these levels: TPOT grows faster than the number of users")
    coefficients = [1e6 * float(value) for value in (*found[:, best], deltas[best])]
    return Fit(StepCost(*coefficients), float(errors[best]), len(used))


def not_negative_least_squares(matrix: Floats, wanted: Floats) -> Floats:
    """The x >= 0 with the least |matrix x - w| for each column w of `wanted`: the best of all sets of columns.

    `matrix`: n rows, few columns; `wanted`: n rows, k columns -> as many rows as the matrix has columns, k columns.
    """
    width, count = matrix.shape[1], wanted.shape[1]
    best, least = np.zeros((width, count)), np.sum(wanted**2, axis=0)
    for size in range(1, width + 1):
        for chosen in combinations(range(width), size):
            part = matrix[:, chosen]
            solution = np.linalg.lstsq(part, wanted, rcond=None)[0]
            residual = np.sum((part @ solution - wanted) ** 2, axis=0)
            better = (solution.min(axis=0) >= 0) & (residual < least * (1 - ROUNDING))
            best[:, better] = 0.0
            best[np.ix_(chosen, better)] = solution[:, better]
            least[better] = residual[better]
    return best


def to_profile(report: Report, card: str, cards: int) -> Profile:
    """A profile of what was measured. Raises MeasureError: the levels do not say enough."""
    found = fit(to_sweep(report))
    plan, facts = report.plan, report.facts
    name = re.sub(r"[^a-z0-9._-]+", "-", f"{report.model}-{card}x{cards}".lower()).strip("-._")
    limits: dict[str, object] = {
        key: value
        for key, value in (
            ("kv_tokens", facts.kv_tokens),
            ("max_model_len", facts.max_model_len),
            ("prefix_cache", facts.prefix_cache),
        )
        if value is not None
    }
    told = ", ".join(limits) or "nothing"
    server = f"vLLM {facts.version}" if facts.version else "a server of unknown version"
    measured = (
        f"tidegate bench, {report.began[:10]}, {server}: {found.rows} levels of {_span(report)} users, cold "
        f"prompts of {plan.prompt_tokens} and answers of {plan.output_tokens} tokens; weighted least squares on "
        f"mean TPOT in the steady state of a closed loop, mean error {found.error:.1%}; gamma includes beta"
    )
    return Profile(
        name=name,
        card=card,
        cards=cards,
        model=report.model,
        step=Step(
            alpha_us=_rounded(found.cost.alpha),
            beta_us=_rounded(found.cost.beta),
            gamma_us=_rounded(found.cost.gamma),
            delta_us=_rounded(found.cost.delta),
            source=Source(origin=Origin.MEASURED, text=measured),
        ),
        limits=Limits.model_validate(
            limits
            | {
                "source": Source(
                    origin=Origin.MEASURED,
                    text=f"the server says {told}; what it does not say is vLLM's default, or left out",
                )
            }
        ),
    )


def _rounded(value: float) -> float:
    """To the four digits that can be meant at all."""
    return float(f"{value:.4g}")


def _span(report: Report) -> str:
    users: Sequence[int] = [row.concurrency for row in to_sweep(report)]
    return f"{min(users)} to {max(users)}"
