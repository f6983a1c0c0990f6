"""The table: what it says, and that it hides nothing."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from sim.measure.endpoint import Facts
from sim.measure.level import Level
from sim.measure.prompts import Prefix
from sim.measure.sweep import Plan, Report, Series
from sim.measure.table import WIDTH, cache, notes, shown, slots, verdicts
from sim.measure.verdict import Capacity, Sla
from sim.measure.wire import Api
from tests.sim.measure.fake_server import record

PLAN = Plan((1, 2), 100, 10, sla=Sla(tokens_per_s=15.0))


def text(*series: Series) -> str:
    report = Report("http://x", "m", Api.CHAT, True, Facts(), PLAN, series=list(series))
    out = StringIO()
    Console(file=out, width=WIDTH).print(shown(report))
    return out.getvalue()


def test_every_figure_is_in_its_place() -> None:
    level = Level.of(1, [record(ttft=0.25, e2e=2.05, tokens=10)], 2.5)
    row = text(Series(Prefix.COLD, [level])).splitlines()[3].split()
    assert row == ["1", "1", "0", *["0.250"] * 4, *["200.00"] * 4, "4.0", "4.0", "0.40"]


def test_the_widest_row_is_whole() -> None:
    slow = [record(ttft=123.456, e2e=123.456 + 9 * 1.2345, tokens=10)] * 4096
    level = Level.of(1024, slow, 4.0, cpu_s=3.9)
    shown_text = text(Series(Prefix.WARM, [level]))
    assert "…" not in shown_text
    assert "1024 users: measuring took 98% of a core" in " ".join(shown_text.split())


def test_a_level_without_figures_shows_none() -> None:
    shown_text = text(Series(Prefix.COLD, [Level.of(1, [record(error="timeout")], 1.0)]))
    assert shown_text.splitlines()[3].split()[3:11] == ["-"] * 8
    assert "1 user: 1 failed: timeout" in shown_text


@pytest.mark.parametrize(
    ("level", "said"),
    [
        (Level.of(2, [record(), record()], 1.0, cpu_s=0.8), []),
        (
            Level.of(2, [record()], 1.0, cpu_s=0.9),
            ["2 users: measuring took 90% of a core: the times are those of this client"],
        ),
        (
            Level.of(2, [record()], 1.0, interrupted=True),
            ["2 users: interrupted; what was under way is not counted"],
        ),
        (
            Level.of(1, [record(tokens=3), record(tokens=10)], 1.0),
            ["1 user: answers had 3 to 10 tokens, not 10"],
        ),
        (Level.of(1, [record(prompt=99)], 1.0), ["1 user: prompts had 99 tokens, not 100"]),
        (
            Level.of(2, [record()], 1.0, warm_up_error="status 503: full"),
            ["2 users: its prompts may be cold, the warming request failed: status 503: full"],
        ),
    ],
)
def test_notes(level: Level, said: list[str]) -> None:
    assert list(notes(level, PLAN)) == said


@pytest.mark.parametrize(
    ("capacity", "said"),
    [
        (Capacity(8, None), "8 users or more"),
        (Capacity(1, 2), "1 user (2 are too many)"),
        (Capacity(0, 1), "not even 1 user"),
        (Capacity(0, 4), "fewer than 4 users"),
    ],
)
def test_verdicts(capacity: Capacity, said: str) -> None:
    levels = [Level.of(users, [record()], 1.0) for users in (1, 2)]
    series = Series(Prefix.COLD, levels, knee=1, capacity=capacity)
    assert list(verdicts(series, PLAN)) == [
        "knee: at 1 user (95 % of the highest throughput)",
        f"SLA, at least 15 tokens/s for each user: {said}",
    ]


def test_a_knee_that_was_not_reached_is_said_so() -> None:
    levels = [Level.of(users, [record()], 1.0) for users in (1, 2)]
    assert next(verdicts(Series(Prefix.COLD, levels), PLAN)).startswith("knee: not reached with 2 users")


SILENT = "prefix cache: the server does not report hits (a vLLM does with --enable-prompt-tokens-details)"


@pytest.mark.parametrize(
    ("cached", "said"),
    [
        ([None, None], [SILENT]),
        ([0, 0], ["prefix cache: 0 % of the prompt tokens were found in it"]),
        ([96, 84], ["prefix cache: 90 % of the prompt tokens were found in it"]),
        (
            [None, 90],
            ["prefix cache: 45 % of the prompt tokens were found in it"],
        ),  # an older vLLM tells no zero
        ([], []),
    ],
)
def test_what_was_found_in_the_prefix_cache(cached: list[int | None], said: list[str]) -> None:
    requests = [replace(record(prompt=100), cached_tokens=count) for count in cached]
    broken = replace(record(error="timeout"), cached_tokens=100)
    series = Series(Prefix.WARM, [Level.of(2, [*requests, broken], 1.0)])
    assert list(cache(series)) == said
    assert all(line in text(series) for line in said)


@pytest.mark.parametrize(
    ("capacity", "said"),
    [
        (Capacity(8, 16), "`slots: auto` takes 8 from it"),
        (Capacity(16, None), "`slots: auto` takes 16 from it (16 or more: no level was too many)"),
        (Capacity(0, 1), "not even one user is inside the SLA: `slots: auto` takes nothing from it"),
        (Capacity(0, 4), "fewer than 4 users are inside the SLA: `slots: auto` takes nothing from it"),
    ],
)
def test_what_slots_auto_takes(capacity: Capacity, said: str) -> None:
    assert slots(capacity) == said
