"""The report as a person reads it at a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group
from rich.table import Table
from rich.text import Text

from sim.measure.level import Level, Summary
from sim.measure.sweep import Plan, Report, Series
from sim.measure.verdict import Capacity

BUSY_CPU = 0.8
"""Above this share of a core the measuring itself is what is slow."""
WIDTH = 112
"""Columns that the table needs."""

_COLUMNS = (
    *("users", "ok", "failed"),
    *("TTFT s\nmean", "\np50", "\np90", "\np99"),
    *("TPOT ms\nmean", "\np50", "\np90", "\np99"),
    *("tokens/s\nall", "tokens/s\na user", "requests\n/s"),
)


def shown(report: Report) -> Group:
    """A table for each series, with what it says under it."""
    return Group(
        *(part for series in report.series if series.levels for part in _series(series, report.plan))
    )


def _series(series: Series, plan: Plan) -> Iterator[Table | Text]:
    table = Table(
        title=f"{series.prefix} prefix, {plan.prompt_tokens} prompt tokens, {plan.output_tokens} output tokens",
        title_justify="left",
        box=None,
        pad_edge=False,
        collapse_padding=True,
    )
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for level in series.levels:
        table.add_row(*_row(level))
    yield table
    of_levels = (note for level in series.levels for note in notes(level, plan))
    for line in (*verdicts(series, plan), *cache(series), *of_levels):
        yield Text(line)
    yield Text()


def _row(level: Level) -> tuple[str, ...]:
    return (
        f"{level.concurrency}",
        f"{level.completed}",
        f"{level.failed}",
        *_cells(level.ttft_s, 1.0, 3),
        *_cells(level.tpot_s, 1000.0, 2),
        f"{level.output_tokens_per_s:.1f}",
        f"{level.output_tokens_per_s_per_user:.1f}",
        f"{level.requests_per_s:.2f}",
    )


def _cells(summary: Summary | None, factor: float, digits: int) -> tuple[str, ...]:
    if summary is None:
        return ("-",) * 4
    return tuple(
        f"{factor * value:.{digits}f}" for value in (summary.mean, summary.p50, summary.p90, summary.p99)
    )


def verdicts(series: Series, plan: Plan) -> Iterator[str]:
    """Knee and capacity, in words."""
    complete = series.complete
    if len(complete) > 1:
        last = complete[-1].concurrency
        found = f"at {_users(series.knee)}" if series.knee is not None else f"not reached with {_users(last)}"
        yield f"knee: {found} (95 % of the highest throughput)"
    if series.capacity is not None and complete:
        users, above = series.capacity.users, series.capacity.first_above
        if above is None:
            said = f"{_users(users)} or more"
        elif users:
            said = f"{_users(users)} ({above} are too many)"
        else:
            said = "not even 1 user" if above == 1 else f"fewer than {above} users"
        yield f"SLA, {plan.sla}: {said}"


def cache(series: Series) -> Iterator[str]:
    """Whether its prompts were as cold or warm as they are called."""
    share = series.cached_share
    if share is not None:
        yield f"prefix cache: {100 * share:.0f} % of the prompt tokens were found in it"
    elif any(level.completed for level in series.levels):
        yield "prefix cache: the server does not report hits (a vLLM does with --enable-prompt-tokens-details)"


def slots(found: Capacity) -> str:
    """What a capacity that stands in a profile is to `slots: auto`."""
    taken = f"`slots: auto` takes {found.users} from it"
    if found.first_above is None:
        return f"{taken} ({found.users} or more: no level was too many)"
    if found.users:
        return taken
    few = "not even one user is" if found.first_above == 1 else f"fewer than {found.first_above} users are"
    return f"{few} inside the SLA: `slots: auto` takes nothing from it"


def _users(count: int) -> str:
    return "1 user" if count == 1 else f"{count} users"


def notes(level: Level, plan: Plan) -> Iterator[str]:
    """What a reader of a level's figures has to know."""
    where = f"{_users(level.concurrency)}:"
    if level.warm_up_error:
        yield f"{where} its prompts may be cold, the warming request failed: {level.warm_up_error}"
    for message, count in level.errors.items():
        yield f"{where} {count} failed: {message}"
    if level.interrupted:
        yield f"{where} interrupted; what was under way is not counted"
    if level.client_cpu > BUSY_CPU:
        yield f"{where} measuring took {level.client_cpu:.0%} of a core: the times are those of this client"
    whole = [request for request in level.requests if not request.error]
    for name, wanted, found in (
        ("prompts", plan.prompt_tokens, {request.prompt_tokens or 0 for request in whole}),
        ("answers", plan.output_tokens, {request.output_tokens or 0 for request in whole}),
    ):
        if found - {wanted}:
            span = f"{min(found)}" if len(found) == 1 else f"{min(found)} to {max(found)}"
            yield f"{where} {name} had {span} tokens, not {wanted}"
