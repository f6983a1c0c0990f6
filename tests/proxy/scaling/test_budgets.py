"""Ceilings over real rows of a ledger: what is used, what is told, and that it is told once."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, delete

from proxy.access.shared import SharedBudgets
from proxy.database import writing
from proxy.ledger import _Insert
from proxy.records import Values, to_values
from proxy.scaling.budgets import LEVELS, Budgets, Ceiling, Used, ceilings, nano_of
from proxy.scaling.spending import Span, TokenSpending
from proxy.tables import ledger, usage_hourly
from tests.databases import NewDatabase
from tests.proxy.rows import a_row

NOVEMBER = datetime(2025, 11, 10, 12, tzinfo=UTC).timestamp()
DECEMBER = datetime(2025, 12, 1, 0, 1, tzinfo=UTC).timestamp()


@pytest.fixture
def engine(tmp_path: Path, new_database: NewDatabase) -> Iterator[Engine]:
    engine = new_database(tmp_path)
    yield engine
    engine.dispose()


class Process:
    """One process: what it puts into the ledger, and what it knows of costs."""

    def __init__(self, engine: Engine, wall: float = NOVEMBER, shared: SharedBudgets | None = None) -> None:
        self.insert = _Insert(engine)
        self.spending = TokenSpending(engine, wall, UTC, "CNY", shared)
        self.spending.read(wall)

    def pays(self, nano: int, site: str = "nanjing", wall: float = NOVEMBER, **more: Any) -> None:
        rows: list[Values] = [
            to_values(
                a_row(
                    **{"site": site, "backend": site, "currency": "CNY"} | more, arrived=wall, cost_nano=nano
                )
            )
        ]
        with self.spending.lock:
            self.insert.rows(rows)
            self.spending.count(rows)


def budgets(process: Process, *of: Ceiling, **more: Any) -> Budgets:
    made = Budgets(process.spending, UTC, **more)
    made.ceilings = of
    return made


# What is spent


def test_every_row_counts_once_before_and_after_a_look(engine: Engine) -> None:
    process = Process(engine)
    process.pays(70)
    assert process.spending.site("nanjing") == 70
    process.spending.read(NOVEMBER)
    assert process.spending.site("nanjing") == 70
    process.pays(5)
    process.pays(9, "xian")
    assert process.spending.sites() == {"nanjing": 75, "xian": 9}


def test_a_restart_forgets_nothing_and_others_count_with_the_next_look(engine: Engine) -> None:
    first, second = Process(engine), Process(engine)
    first.pays(70)
    assert second.spending.site("nanjing") == 0
    second.pays(1)
    second.spending.read(NOVEMBER)
    assert second.spending.site("nanjing") == 71
    assert Process(engine).spending.site("nanjing") == 71


def test_a_month_counts_what_arrived_in_it(engine: Engine) -> None:
    process = Process(engine)
    process.pays(70)
    process.pays(3, wall=NOVEMBER - 40 * 86400)
    process.pays(5, wall=DECEMBER)
    assert process.spending.site("nanjing") == 70, "neither the last month nor the next"
    process.spending.read(DECEMBER)
    assert process.spending.site("nanjing") == 5
    process.pays(2, wall=NOVEMBER)
    assert process.spending.site("nanjing") == 5, "one that ended late"


def test_a_zone_says_when_a_month_begins(engine: Engine) -> None:
    in_shanghai = datetime(2025, 12, 1, 0, 30, tzinfo=ZoneInfo("Asia/Shanghai")).timestamp()
    process = Process(engine)
    process.pays(7, wall=in_shanghai)
    there = TokenSpending(engine, in_shanghai, ZoneInfo("Asia/Shanghai"), "CNY")
    there.read(in_shanghai)
    assert (process.spending.site("nanjing"), there.site("nanjing")) == (7, 7)
    assert there.begin > process.spending.begin


def test_a_clock_that_was_in_the_next_month_for_a_while_costs_no_budget(engine: Engine) -> None:
    process = Process(engine)
    process.pays(70)
    process.spending.read(DECEMBER)
    assert process.spending.site("nanjing") == 0
    process.spending.read(NOVEMBER)
    assert process.spending.site("nanjing") == 70
    process.pays(5)
    assert process.spending.site("nanjing") == 75


def test_another_currency_is_not_money(engine: Engine) -> None:
    process = Process(engine)
    process.pays(70, currency="USD")
    assert process.spending.site("nanjing") == 0
    process.spending.read(NOVEMBER)
    assert process.spending.site("nanjing") == 0


def test_an_account_pays_what_its_backends_cost_while_they_run_for_it(engine: Engine) -> None:
    process = Process(engine)
    for minute, nano in enumerate((1, 10, 100, 1000)):
        process.pays(nano, backend="nj", wall=NOVEMBER + 60 * minute)
    process.pays(5000, backend="other", wall=NOVEMBER + 70)
    spans = {"rush": [Span("nj", NOVEMBER + 60, NOVEMBER + 180)], "long": [Span("nj", NOVEMBER + 120)]}
    process.spending.read(NOVEMBER + 300, spans)
    assert process.spending.account("rush") == 110
    assert process.spending.account("long") == 1100
    process.pays(7, backend="nj", wall=NOVEMBER + 301)
    assert process.spending.account("long", ["nj"]) == 1107
    assert process.spending.account("rush") == 110
    assert process.spending.account("nobody") == 0


def test_no_sum_waits_for_the_database(engine: Engine) -> None:
    process = Process(engine)
    process.pays(70, backend="nj")
    found: list[object] = []

    def sums() -> None:
        spending = process.spending
        found.extend((spending.site("nanjing"), spending.sites(), spending.account("rush", ["nj"])))

    with process.spending.lock:  # rows are being inserted
        reader = threading.Thread(target=sums, daemon=True)
        reader.start()
        reader.join(5.0)
        assert found == [70, {"nanjing": 70}, 70]


def test_budgets_of_keys_are_counted_along(engine: Engine) -> None:
    shared = SharedBudgets(engine, NOVEMBER, UTC)
    process = Process(engine, shared=shared)
    process.pays(70, key_id="k1")
    assert shared.read("CNY", NOVEMBER).nano == {"k1": 0}
    assert process.spending.lock is shared.lock


STEPS = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from(["read", "a", "b"]), st.integers(1, 9)), max_size=10
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS)
def test_nobody_ever_knows_of_more_or_less_than_his_own_and_what_he_has_read(
    engine: Engine, steps: list[tuple[int, str, int]]
) -> None:
    with writing(engine) as connection:
        connection.execute(delete(ledger))
        connection.execute(delete(usage_hourly))
    processes = [Process(engine), Process(engine)]
    total: dict[str, int] = {}
    unseen: list[dict[str, int]] = [{}, {}]
    for who, what, nano in steps:
        if what == "read":
            processes[who].spending.read(NOVEMBER)
            unseen[who] = {}
        else:
            processes[who].pays(nano, what)
            total[what] = total.get(what, 0) + nano
            unseen[1 - who][what] = unseen[1 - who].get(what, 0) + nano
    for process, missing in zip(processes, unseen, strict=True):
        for site in "ab":
            assert process.spending.site(site) == total.get(site, 0) - missing.get(site, 0)


# Ceilings


def test_a_ceiling_counts_what_falls_under_it(engine: Engine) -> None:
    process = Process(engine)
    process.pays(40, "nanjing")
    process.pays(30, "xian")
    process.pays(900, "local")
    hours = {("nanjing", ""): 5, ("local", ""): 100, ("", "rush"): 7, ("", ""): 115}
    of = budgets(
        process,
        Ceiling("month", "", 1000),
        Ceiling("site", "nanjing", 100),
        Ceiling("template", "rush", 50),
        capacity=lambda site, template, begin: hours.get((site, template), 0),
    )
    assert [used.nano for used in of.used()] == [85, 45, 7]
    assert of.left("nanjing") == 55
    assert of.left("nanjing", "rush") == 43
    assert of.left("xian") == 915
    assert of.left("local") is None


def test_at_the_ceiling_and_not_before(engine: Engine) -> None:
    process = Process(engine)
    of = budgets(process, Ceiling("site", "nanjing", 100))
    process.pays(99)
    assert of.reached("nanjing") is None
    assert of.refuses([("nanjing", 1)]) is None
    assert of.refuses([("nanjing", 2)]) is not None
    assert of.refuses([("nanjing", 1), ("xian", 9), ("nanjing", 1)]) is not None, "both together"
    process.pays(1)
    assert of.reached("nanjing") is not None
    assert of.refuses([("nanjing", 0)]) is not None, "a budget that is used up allows nothing"
    assert of.reached("xian") is None
    assert budgets(process, Ceiling("site", "xian", 0)).reached("xian") is not None


@given(st.integers(1, 10**15), st.integers(0, 2 * 10**15))
def test_a_level_is_exact(ceiling: int, nano: int) -> None:
    used = Used(Ceiling("site", "a", ceiling), nano, 0)
    assert used.level == max((level for level in LEVELS if nano * 100 >= level * ceiling), default=0)
    assert used.reached == (used.level == 100)
    assert used.left == max(ceiling - nano, 0)


def test_money_is_what_was_written() -> None:
    assert nano_of(0.1) == 100_000_000
    assert nano_of(1e6) == 10**15
    assert ceilings(12.5, {"a": 0.3}, {"t": None, "u": 2.0}) == [
        Ceiling("month", "", 12_500_000_000),
        Ceiling("site", "a", 300_000_000),
        Ceiling("template", "u", 2_000_000_000),
    ]


# Telling


def test_each_level_is_told_once_a_month_also_over_restarts(
    engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process, file = Process(engine), tmp_path / "budgets.json"
    said: list[str] = []

    def restarted() -> Budgets:
        return budgets(
            process,
            Ceiling("site", "nanjing", 10_000_000_000),
            file=file,
            tell=lambda words, _: said.append(words),
        )

    of = restarted()
    with caplog.at_level(logging.WARNING):
        for nano in (4_999_999_999, 1, 1, 2_999_999_999, 3_000_000_000):
            process.pays(nano)
            of.turn()
            of.turn()
            of = restarted()
            of.turn()
    assert [words.rpartition("(")[2] for words in said] == [
        "50 % of this month)",
        "80 % of this month)",
        "100 % of this month); nothing new is sent or started there",
    ]
    assert said[0].startswith("the budget of site nanjing: 5.0000 of 10.0000 CNY used")
    assert [record.message for record in caplog.records] == said
    process.spending.read(DECEMBER)
    assert of.turn() == [], "a new month"
    process.pays(6_000_000_000, wall=DECEMBER)
    assert [used.level for used in of.turn()] == [50]


def test_what_jumps_over_levels_tells_the_last(engine: Engine) -> None:
    process = Process(engine)
    of = budgets(process, Ceiling("site", "nanjing", 100))
    process.pays(85)
    assert [used.level for used in of.turn()] == [80]


def test_a_ceiling_that_was_changed_tells_anew(engine: Engine) -> None:
    process = Process(engine)
    of = budgets(process, Ceiling("site", "nanjing", 100))
    process.pays(100)
    assert of.turn()
    of.ceilings = (Ceiling("site", "nanjing", 150),)
    assert [used.level for used in of.turn()] == [50]


def test_what_cannot_be_noted_is_not_told_and_tried_again(engine: Engine, tmp_path: Path) -> None:
    process = Process(engine)
    of = budgets(process, Ceiling("site", "nanjing", 100), file=tmp_path / "none" / "budgets.json")
    process.pays(60)
    assert of.turn() == []
    (tmp_path / "none").mkdir()
    assert [used.level for used in of.turn()] == [50]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"month": "2025-11", "told": {"a": 1}}', "\xff"])
def test_a_damaged_note_tells_twice_and_stops_nobody(engine: Engine, tmp_path: Path, text: str) -> None:
    process, file = Process(engine), tmp_path / "budgets.json"
    file.write_bytes(text.encode("latin-1"))
    of = budgets(process, Ceiling("site", "nanjing", 100), file=file)
    process.pays(60)
    assert of.turn()
    assert json.loads(file.read_text())["month"] == "2025-11"
