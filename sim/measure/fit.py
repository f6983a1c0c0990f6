"""From a sweep to a profile: what a step takes, the engine's limits, and how many users its SLA allows.

The coefficients are those of `sim.calibrate.calibrate_sweep`, which simulates each level. They are a first
estimate: levels of one length cannot tell the cost of a sequence from that of its context. `tidegate calibrate`
joins reports of several lengths, which can.
"""

from __future__ import annotations

import re

from policies.profile import Capacity, Limits, Origin, Profile, Source
from sim.calibrate import LEAST_LEVELS, Progress, Search, calibrate_sweep
from sim.closed_loop import SECOND
from sim.measure import verdict
from sim.measure.endpoint import MeasureError
from sim.measure.prompts import Prefix
from sim.measure.sweep import Report
from sim.timings import Level

SEARCH = Search(starts=2, evaluations=400, overhead=True)
"""A client's times have HTTP and tokenising in them."""


def to_sweep(report: Report) -> list[Level]:
    """Its levels with cold prompts in which every request was answered."""
    return [
        Level(
            level.concurrency,
            round(level.prompt_tokens / level.completed),
            round(level.output_tokens / level.completed),
            level.ttft_s.mean * SECOND,
            level.tpot_s.mean * SECOND,
            level.completed,
        )
        for series in report.series
        if series.prefix is Prefix.COLD
        for level in series.complete
        if not level.failed and level.ttft_s and level.tpot_s and level.tpot_s.mean > 0
    ]


def left_out(report: Report) -> list[int]:
    """Concurrencies that `to_sweep` leaves out because requests failed."""
    return [
        level.concurrency
        for series in report.series
        if series.prefix is Prefix.COLD
        for level in series.complete
        if level.failed
    ]


def cold_capacity(report: Report) -> verdict.Capacity | None:
    """How many users the SLA allows with cold prompts; None: it was not asked about, or nothing was measured."""
    return next((series.capacity for series in report.series if series.prefix is Prefix.COLD), None)


def to_profile(report: Report, card: str, cards: int, progress: Progress | None = None) -> Profile:
    """A profile of what was measured, after `SEARCH.simulations` simulations.

    Raises MeasureError: the levels do not say enough.
    """
    levels = to_sweep(report)
    if len({level.concurrency for level in levels}) < LEAST_LEVELS:
        raise MeasureError(
            "a profile needs three levels with a cold prefix, without failures, and answers of two tokens or more"
        )
    limits, plan = _limits(report), report.plan
    try:
        found = calibrate_sweep(levels, limits, SEARCH, progress=progress)
    except ValueError as error:
        raise MeasureError(f"no profile says these levels: {error}") from None
    span = f"{levels[0].concurrency} to {levels[-1].concurrency}"
    failed = ", ".join(map(str, left_out(report)))
    source = Source(
        origin=Origin.MEASURED,
        text=(
            f"{_measured(report)}: {len(levels)} levels of {span} users, cold prompts of {plan.prompt_tokens} "
            f"and answers of {plan.output_tokens} tokens"
            + (f", without those of {failed} users, where requests failed" if failed else "")
            + f"; fitted by simulating them: {found.errors}; beta and gamma hold together only"
        ),
    )
    return Profile(
        name=re.sub(r"[^a-z0-9._-]+", "-", f"{report.model}-{card}x{cards}".lower()).strip("-._"),
        card=card,
        cards=cards,
        model=report.model,
        overhead_us=round(found.overhead_us, 1),
        step=found.step(source),
        limits=limits,
        capacity=_capacity(report),
    )


def _limits(report: Report) -> Limits:
    facts = report.facts
    told: dict[str, object] = {
        key: value
        for key, value in (
            ("kv_tokens", facts.kv_tokens),
            ("max_model_len", facts.max_model_len),
            ("prefix_cache", facts.prefix_cache),
        )
        if value is not None
    }
    text = (
        f"the server says {', '.join(told) or 'nothing'}; what it does not say is vLLM's default, or left out"
    )
    return Limits.model_validate(told | {"source": Source(origin=Origin.MEASURED, text=text)})


def _capacity(report: Report) -> Capacity | None:
    """None: no SLA was asked about."""
    plan, found = report.plan, cold_capacity(report)
    if plan.sla is None or found is None:
        return None
    above = f"{found.first_above} are too many" if found.first_above is not None else "more were not tried"
    return Capacity(
        users=found.users,
        prompt_tokens=plan.prompt_tokens,
        output_tokens=plan.output_tokens,
        tokens_per_s=plan.sla.tokens_per_s,
        ttft_s=plan.sla.ttft_s,
        tpot_s=plan.sla.tpot_s,
        source=Source(origin=Origin.MEASURED, text=f"{_measured(report)}; {above}"),
    )


def _measured(report: Report) -> str:
    version = report.facts.version
    server = f"vLLM {version}" if version else "a server of unknown version"
    return f"tidegate bench, {report.began[:10]}, {server}"
