"""From a sweep to a profile: what a step takes, the engine's limits, and how many users its SLA allows.

The coefficients are those of `sim.calibrate.calibrate_sweep`, which simulates each level. They are a first
estimate: levels of one length cannot tell the cost of a sequence from that of its context. `tidegate calibrate`
joins reports of several lengths, which can.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Final

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

POOR: Final = 0.2
"""A fit with a larger error is announced: something that it does not know was at work."""
FLAT: Final = 1.15
FLAT_TPOT: Final = 1.1
LONGER: Final = 1.5
"""Throughput and TPOT that grow no more than so, while TTFT grows at least so: more users only wait."""


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


def to_profile(
    report: Report,
    card: str,
    cards: int,
    progress: Progress | None = None,
    *,
    max_num_seqs: int | None = None,
    warn: Callable[[str], object] | None = None,
) -> Profile:
    """A profile of what was measured, after `SEARCH.simulations` simulations.

    `max_num_seqs`: with which the server was started; None: nobody knows. `warn` is told why not to believe
    it. Raises MeasureError: the levels do not say enough.
    """
    levels = to_sweep(report)
    if len({level.concurrency for level in levels}) < LEAST_LEVELS:
        raise MeasureError(
            "a profile needs three levels with a cold prefix, without failures, and answers of two tokens or more"
        )
    limits, plan = _limits(report, max_num_seqs), report.plan
    try:
        found = calibrate_sweep(levels, limits, SEARCH, progress=progress)
    except ValueError as error:
        raise MeasureError(f"no profile says these levels: {error}") from None
    if warn is not None:
        for doubt in doubts(levels, limits, found.errors.worst):
            warn(doubt)
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
        capacity=sla_capacity(report),
    )


def doubts(levels: Sequence[Level], limits: Limits, errors: Sequence[float]) -> list[str]:
    """Why a profile that was fitted to `levels` may not be believed, in words. `errors`: relative, of the fit."""
    found = []
    for below, above in queues(levels):
        room = limits.max_num_seqs
        if limits.kv_tokens is not None:
            room = min(room, limits.kv_tokens // (above.prompt_tokens + above.output_tokens))
        if room >= above.concurrency:
            found.append(
                f"from {below.concurrency} to {above.concurrency} users throughput and TPOT stay while TTFT grows: "
                f"that looks like a queue before a full engine, and the profile says that {room} run at once; say "
                "with --max-num-seqs what the server was started with"
            )
            break
    if (worst := max(map(abs, errors))) > POOR:
        found.append(
            f"the fit is poor: at worst {worst:.0%} off; if the engine was full, --max-num-seqs, or --kv-tokens of "
            "`tidegate calibrate`, say how many it takes"
        )
    return found


def queues(levels: Sequence[Level]) -> list[tuple[Level, Level]]:
    """Neighbouring levels of one length between which more users only wait."""
    lengths = {(level.prompt_tokens, level.output_tokens) for level in levels}
    found = []
    for length in sorted(lengths):
        alike = [level for level in levels if (level.prompt_tokens, level.output_tokens) == length]
        for below, above in pairwise(sorted(alike, key=lambda level: level.concurrency)):
            if (
                _throughput(above) <= FLAT * _throughput(below)
                and above.tpot <= FLAT_TPOT * below.tpot
                and above.ttft >= LONGER * below.ttft
            ):
                found.append((below, above))
    return found


def _throughput(level: Level) -> float:
    """Requests a microsecond, by Little's law."""
    return level.concurrency / (level.ttft + (level.output_tokens - 1) * level.tpot)


def limits_in_words(told: Sequence[str], given: Sequence[str]) -> str:
    """Where limits come from: the server, whoever ran the command, or nobody."""
    known = {*told, *given}
    defaults = ("max_num_batched_tokens", "max_num_seqs", "prefix_cache")
    parts = (
        ("as the server says", told),
        ("as given", given),
        ("vLLM's default, not measured", [name for name in defaults if name not in known]),
        ("a guess, not measured", [name for name in ("max_model_len",) if name not in known]),
        ("unknown, taken as never full", [name for name in ("kv_tokens",) if name not in known]),
    )
    return "; ".join(f"{', '.join(words)}: {said}" for said, words in parts if words)


def _limits(report: Report, max_num_seqs: int | None) -> Limits:
    facts = report.facts
    told: dict[str, Any] = {
        key: value
        for key, value in (
            ("kv_tokens", facts.kv_tokens),
            ("max_model_len", facts.max_model_len),
            ("prefix_cache", facts.prefix_cache),
        )
        if value is not None
    }
    given = {} if max_num_seqs is None else {"max_num_seqs": max_num_seqs}
    text = limits_in_words(list(told), list(given))
    return Limits.model_validate(told | given | {"source": Source(origin=Origin.MEASURED, text=text)})


def sla_capacity(report: Report) -> Capacity | None:
    """How many users its SLA allows, for a profile; None: no SLA was asked about."""
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
