from __future__ import annotations

import asyncio
import csv
import io
import random
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from sqlalchemy import Engine

import proxy.reports
from proxy.database import open_database
from proxy.journal import Journal
from proxy.ledger import Ledger, _Insert
from proxy.records import FIELDS, OUTCOMES, USAGE_SOURCES, Row, to_values
from proxy.reports import (
    GROUPS,
    Usage,
    export,
    latest_currency,
    money,
    parse_time,
    rows,
    spent_by_key,
    usage,
    usage_csv,
    usage_json,
    usage_table,
)
from tests.databases import NewDatabase, url_of
from tests.proxy.rows import PRICES, a_row, eventually

BEGIN = 1_700_000_000.0
HOURS = 60.0 * 60


def put(engine: Engine, *rows: Row) -> None:
    _Insert(engine).rows([to_values(row) for row in rows])


@pytest.fixture
def engine(tmp_path: Path, new_database: NewDatabase) -> Iterator[Engine]:
    engine = new_database(tmp_path)
    yield engine
    engine.dispose()


def random_rows(count: int) -> list[Row]:
    draw = random.Random(7)
    rows = []
    for _ in range(count):
        backend = draw.choice(["", "appliance", "nanjing"])
        rows.append(
            a_row(
                # Some exactly on the hour, where the hourly table and the rows meet.
                arrived=BEGIN // HOURS * HOURS
                + draw.choice([draw.randrange(72) * HOURS, round(draw.random() * 72 * HOURS, 6)]),
                tenant=draw.choice(["acme", "globex"]),
                key_id=draw.choice(["k1", "k2", ""]),
                backend=backend,
                site=backend and draw.choice(["local", "nj"]),
                served_model=draw.choice(["small", "big"]),
                outcome=draw.choice(["ok", "client_gone", "rejected", "cut"]),
                code=draw.choice(["", "queue_full", "rate_limit_tokens"]),
                prompt_tokens=draw.randrange(3) * 100,
                completion_tokens=draw.randrange(3),
                currency="CNY" if backend == "nanjing" else "",
                cost_nano=draw.randrange(10**6) if backend == "nanjing" else 0,
            )
        )
    return rows


@pytest.fixture(scope="module")
def many(
    tmp_path_factory: pytest.TempPathFactory, new_database: NewDatabase
) -> Iterator[tuple[Engine, list[Row]]]:
    engine = new_database(tmp_path_factory.mktemp("many"))
    rows = random_rows(400)
    put(engine, *rows)
    yield engine, rows
    engine.dispose()


def group_of(row: Row, by: str) -> str:
    if by == "day":
        return datetime.fromtimestamp(round(row.arrived * 1e6) // 10**6, UTC).date().isoformat()
    if by == "model":
        return row.served_model if row.backend else ""
    return str(getattr(row, {"key": "key_id"}.get(by, by)))


def expected(
    rows: list[Row], by: list[str], since: float | None, until: float | None
) -> dict[Any, list[int]]:
    sums: dict[Any, list[int]] = {}
    for row in rows:
        if (since is None or row.arrived >= since) and (until is None or row.arrived < until):
            amounts = [
                1,
                row.outcome not in ("ok", "client_gone"),
                row.prompt_tokens,
                row.completion_tokens,
                row.cost_nano,
                not row.currency and row.prompt_tokens + row.completion_tokens > 0,
            ]
            group = tuple(group_of(row, name) for name in by)
            sums[group] = [a + b for a, b in zip(sums.get(group, [0] * 6), amounts, strict=True)]
    return sums


# Whole microseconds, as rows have them; within the rows' span, before and after it.
moments = st.one_of(
    st.none(),
    st.integers(-2 * 3600 * 10**6, 74 * 3600 * 10**6).map(
        lambda us: (BEGIN // HOURS * HOURS * 1e6 + us) / 1e6
    ),
    st.integers(-2, 74).map(lambda hours: BEGIN // HOURS * HOURS + hours * HOURS),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(sorted(GROUPS)), min_size=1, max_size=3, unique=True), moments, moments)
def test_usage_is_the_sum_of_the_rows_in_the_span(
    many: tuple[Engine, list[Row]], by: list[str], since: float | None, until: float | None
) -> None:
    engine, rows = many
    lines = usage(engine, ",".join(by), since, until)
    found = {
        tuple(line.group.values()): [
            line.requests,
            line.errors,
            line.prompt_tokens,
            line.completion_tokens,
            line.cost_nano,
            line.unpriced,
        ]
        for line in lines
    }
    assert found == expected(rows, by, since, until)
    assert len(found) == len(lines)
    assert [list(line.group) for line in lines] == [by] * len(lines)


@pytest.fixture(scope="module")
def mixed(
    tmp_path_factory: pytest.TempPathFactory, new_database: NewDatabase
) -> Iterator[tuple[Engine, list[Row]]]:
    """A ledger whose currency was changed, and changed back."""
    engine = new_database(tmp_path_factory.mktemp("mixed"))
    rows = random_rows(200)
    for row in rows[::3]:
        row.currency = row.currency and "USD"
    put(engine, *rows)
    yield engine, rows
    engine.dispose()


@settings(max_examples=50, deadline=None)
@given(moments.filter(lambda moment: moment is not None), st.sampled_from(["CNY", "USD"]))
def test_spent_is_the_sum_of_a_keys_costs_in_one_currency(
    mixed: tuple[Engine, list[Row]], since: float, currency: str
) -> None:
    engine, rows = mixed
    spent, others = spent_by_key(engine, since, currency)
    later = [row for row in rows if row.arrived >= since and row.currency]
    for key in ("k1", "k2", ""):
        assert spent.get(key, 0) == sum(
            row.cost_nano for row in later if row.key_id == key and row.currency == currency
        )
    assert others == sorted({row.currency for row in later if row.cost_nano} - {currency})


def test_the_currency_of_a_ledger_is_that_of_its_last_cost(engine: Engine) -> None:
    assert latest_currency(engine) == ""
    rows = [a_row(arrived=3600.0 * hour, currency=one) for hour, one in enumerate(("CNY", "USD", ""))]
    put(engine, *rows)
    assert latest_currency(engine) == "USD"


def test_days_are_utc(engine: Engine) -> None:
    midnight = datetime(2026, 3, 1, tzinfo=UTC).timestamp()
    put(engine, a_row(arrived=midnight - 0.000001), a_row(arrived=midnight))
    assert [line.group["day"] for line in usage(engine, "day")] == ["2026-02-28", "2026-03-01"]
    assert [line.group["day"] for line in usage(engine, "day", midnight - 1, midnight + 1)] == [
        "2026-02-28",
        "2026-03-01",
    ]


def test_requests_without_a_price_join_the_line_of_those_with_one(engine: Engine) -> None:
    put(
        engine,
        a_row(tenant="a", currency="", cost_nano=0),
        a_row(tenant="a", currency="", cost_nano=0, prompt_tokens=0, completion_tokens=0),
        a_row(tenant="a", currency="CNY", cost_nano=5),
        a_row(tenant="b", currency="", cost_nano=0),
    )
    a, b = usage(engine, "tenant", currency="CNY")
    assert (a.requests, a.unpriced, a.cost_nano, a.currency) == (3, 1, 5, "CNY")
    assert (b.requests, b.unpriced, b.cost_nano, b.currency) == (1, 1, 0, "CNY")


def test_two_currencies_are_never_added(engine: Engine) -> None:
    put(engine, a_row(currency="CNY", cost_nano=5), a_row(currency="USD", cost_nano=7))
    assert [(line.currency, line.cost_nano) for line in usage(engine, "tenant")] == [("CNY", 5), ("USD", 7)]


def test_an_unknown_group_lists_the_known_ones(engine: Engine) -> None:
    with pytest.raises(ValueError, match="'colour'; there are tenant, model, backend, key, site, day"):
        usage(engine, "tenant,colour")


LINES = [
    Usage({"tenant": "acme", "day": "2026-03-01"}, "CNY", 12, 1, 2, 9000, 512, 700, 7, 3, 1_234_567_890_123),
    Usage({"tenant": "", "day": "2026-03-02"}, "CNY", 1, 1, 0, 0, 0, 0, 0, 0, 50_000),
]
KEYS = ["tenant", "day", "requests", "errors", "prompt_tokens", "cached_tokens", "completion_tokens"]
KEYS += ["overhead_prompt_tokens", "overhead_completion_tokens", "cost", "cost_nano", "currency", "unpriced"]
KEYS += ["refused", "failed"]


def test_usage_as_json() -> None:
    first, second = orjson.loads(usage_json(LINES))
    assert list(first) == KEYS
    assert first == LINES[0].as_dict()
    assert (first["cost"], first["cost_nano"], first["requests"]) == (1234.567890123, 1_234_567_890_123, 12)
    assert second["cost"] == 0.00005
    assert orjson.loads(usage_json([])) == []


def test_usage_as_csv() -> None:
    first, second = csv.DictReader(io.StringIO(usage_csv(LINES).decode(), newline=""))
    assert list(first) == KEYS
    assert (first["cost"], first["prompt_tokens"], second["cost"]) == (
        "1234.567890123",
        "9000",
        "0.000050000",
    )
    assert usage_csv([]).decode().startswith("requests,errors,")


def shown(lines: list[Usage]) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(usage_table(lines))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


def test_usage_as_a_table_has_totals_that_are_rounded_once() -> None:
    text = shown(LINES)
    assert "cost CNY" in text
    assert " 1,234.5679" in text
    assert " <0.0001" in text, "half of the last decimal goes to the even one, which would be nothing"
    total = next(line for line in text.splitlines() if "total" in line)
    assert " 1,234.5679" in total
    assert "9,000" in total
    assert "2 requests had no price" in text
    assert "overhead" in text
    assert "overhead" not in shown(LINES[1:])
    assert shown([]).strip() != ""


def test_what_had_no_price_is_not_shown_as_a_figure() -> None:
    free, unpriced, nothing = (
        Usage({"tenant": tenant}, "CNY", 1, unpriced=int(tenant == "unknown"))
        for tenant in ["free", "unknown", "idle"]
    )
    cells = filter(None, map(str.split, shown([free, unpriced, nothing]).splitlines()))
    rows = {row[0]: row[-1] for row in cells}
    assert (rows["free"], rows["unknown"], rows["idle"]) == ("0.0000", "unpriced", "0.0000")


def test_what_failed_is_told_apart_from_what_was_refused(engine: Engine) -> None:
    for outcome in OUTCOMES:
        put(engine, a_row(tenant="a" if outcome == "ok" else "b", outcome=outcome))
    healthy, other = usage(engine, "tenant")
    assert (healthy.errors, healthy.refused, healthy.failed) == (0, 0, 0)
    assert (other.errors, other.refused, other.failed) == (6, 2, 4)
    assert "refused failed" in " ".join(shown([healthy, other]).split())
    assert "failed" not in shown([healthy])
    begin = a_row().arrived
    assert usage(engine, "tenant", begin - 1, begin + 1) == [healthy, other], "of the rows as of the hours"


def test_two_currencies_in_a_table_are_told_apart() -> None:
    other = Usage({"tenant": "acme", "day": "2026-03-02"}, "USD", 1, cost_nano=10**9)
    text = shown([LINES[0], other])
    totals = text[text.index("total") :]
    assert "1,234.5679 CNY" in totals
    assert "1.0000 USD" in totals


def test_two_groups_fit_a_terminal() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(
        usage_table([replace(line, overhead_prompt_tokens=0, overhead_completion_tokens=0) for line in LINES])
    )
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1,234.5679" in text
    assert "2026-03-01" in text


@given(st.lists(st.text("ab 月", min_size=1, max_size=40), min_size=1, max_size=3), st.integers(24, 140))
@settings(deadline=None, max_examples=50)
def test_no_column_is_ever_left_out_or_cut(tenants: list[str], width: int) -> None:
    lines = [
        replace(LINES[0], group={"tenant": name.strip() or "a", "day": "2026-03-01"}) for name in tenants
    ]
    console = Console(file=io.StringIO(), width=width)
    console.print(usage_table(lines, width))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    for letter in "b月":  # in no heading
        assert text.count(letter) == sum(line.group["tenant"].count(letter) for line in lines)
    for cell in ("tenant", "day", "requests", "completion", "cost CNY", "1,234.5679", "9,000", "512"):
        assert cell in text
    assert all(cell_len(row) <= width for row in text.splitlines())


def test_why_requests_were_refused_is_told_by_their_codes(engine: Engine) -> None:
    put(
        engine,
        a_row(),
        a_row(outcome="rejected", code="queue_full"),
        a_row(outcome="rejected", code="budget"),
    )
    put(engine, a_row(outcome="client_error", code="model_not_found", model="\0\\u0000", backend=""))
    found = {line.group["code"]: (line.requests, line.refused) for line in usage(engine, "code")}
    assert found == {"": (1, 0), "queue_full": (1, 1), "budget": (1, 1), "model_not_found": (1, 1)}


@given(st.integers(-(2**70), 2**70), st.integers(0, 9))
def test_money_is_rounded_half_to_even(nano: int, decimals: int) -> None:
    exact = Decimal(nano).scaleb(-9)
    rounded = exact.quantize(Decimal(1).scaleb(-decimals), ROUND_HALF_EVEN)
    text = money(nano, decimals)
    assert Decimal(text) == rounded
    assert len(text.partition(".")[2]) == decimals
    assert text not in ("-0", "-0.0")


def test_the_documentation_names_every_field() -> None:
    page = (Path(__file__).parents[2] / "docs" / "metering.md").read_text()
    for name in (*FIELDS, *GROUPS, *KEYS, *OUTCOMES, *USAGE_SOURCES):
        assert f"`{name}`" in page, name


NOW = datetime(2026, 3, 10, 12, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("45s", NOW - 45),
        ("90m", NOW - 5400),
        ("24h", NOW - 86_400),
        ("7d", NOW - 7 * 86_400),
        ("2w", NOW - 14 * 86_400),
        ("2026-03-10T12:00:00", NOW),
        ("2026-03-10T20:00:00+08:00", NOW),
        ("2026-03-10", NOW - 43_200),
    ],
)
def test_times_that_people_write(text: str, moment: float) -> None:
    assert parse_time(text, NOW) == moment


@pytest.mark.parametrize(
    "text", ["", "7", "d", "7 d", "-7d", "yesterday", "1.5h", "2026-13-01", "9" * 30 + "w"]
)
def test_times_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="7d"):
        parse_time(text, NOW)


def exported(engine: Engine, *span: float | None, **options: Any) -> bytes:
    file = io.BytesIO()
    export(engine, file, *span, **options)
    return file.getvalue()


def test_export_has_everything_in_order_of_arrival(
    many: tuple[Engine, list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, rows = many
    monkeypatch.setattr(proxy.reports, "PAGE_ROWS", 7)
    found = [Row(**orjson.loads(line)) for line in exported(engine).splitlines()]
    assert [row.arrived for row in found] == sorted(row.arrived for row in found)
    assert sorted(found, key=lambda row: row.op) == [
        Row(**orjson.loads(orjson.dumps(row))) for row in sorted(rows, key=lambda row: row.op)
    ]


@settings(max_examples=30, deadline=None)
@given(moments, moments)
def test_export_of_a_span(many: tuple[Engine, list[Row]], since: float | None, until: float | None) -> None:
    engine, rows = many
    found = {orjson.loads(line)["op"] for line in exported(engine, since, until).splitlines()}
    assert found == {
        row.op
        for row in rows
        if (since is None or row.arrived >= since) and (until is None or row.arrived < until)
    }


def test_export_as_csv(many: tuple[Engine, list[Row]], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, rows = many
    monkeypatch.setattr(proxy.reports, "PAGE_ROWS", 100)
    lines = list(csv.DictReader(io.StringIO(exported(engine, form="csv").decode(), newline="")))
    assert [line["op"] for line in lines] == [
        orjson.loads(line)["op"] for line in exported(engine).splitlines()
    ]
    assert tuple(lines[0]) == FIELDS
    assert orjson.loads(lines[0]["candidates"]) == rows[0].candidates
    assert lines[0]["stream"] == "true"


def test_export_of_nothing(engine: Engine) -> None:
    assert exported(engine) == b""
    assert exported(engine, form="csv").decode().strip() == ",".join(FIELDS)


def test_export_tells_its_progress(many: tuple[Engine, list[Row]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy.reports, "PAGE_ROWS", 150)
    told: list[tuple[int, int]] = []
    file = io.BytesIO()
    assert export(many[0], file, progress=lambda done, total: told.append((done, total))) == 400
    assert told == [(150, 400), (300, 400), (400, 400)]


class Nowhere(io.BytesIO):
    def write(self, data: Any) -> int:
        return len(data)


def test_export_needs_the_memory_of_a_page(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy.reports, "PAGE_ROWS", 200)

    def peak() -> int:
        tracemalloc.start()
        export(engine, Nowhere())
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    put(engine, *(a_row() for _ in range(500)))
    peak()  # fills caches
    few = peak()
    put(engine, *(a_row() for _ in range(4500)))
    assert peak() < 1.5 * few


async def test_usage_and_export_while_the_proxy_writes(engine: Engine, tmp_path: Path) -> None:
    moved = Ledger(engine, Journal(tmp_path / "journal"), PRICES, interval_s=0.0)
    moved.start(asyncio.get_running_loop(), print)
    reader = open_database(url_of(engine), check=False)
    seen = 0
    for _ in range(40):
        for _ in range(25):
            moved.journal.close(a_row(cost_nano=3))
        await moved.journal.synced()
        for line in usage(reader, "tenant", BEGIN - 90, BEGIN + 90):
            assert line.requests >= seen, "nothing disappears"
            seen = line.requests
            assert (line.prompt_tokens, line.cost_nano) == (800 * seen, 3 * seen), "never half a transaction"
        assert exported(reader).count(b"\n") >= seen
    eventually(lambda: moved.lag == 0)
    assert usage(reader, "tenant")[0].requests == 1000
    await asyncio.to_thread(moved.stop)
    reader.dispose()


def test_rows_are_those_of_an_export(engine: Engine) -> None:
    put(engine, *random_rows(2500))
    told: list[tuple[int, int]] = []
    since, until = BEGIN + HOURS, BEGIN + 60 * HOURS
    found = list(rows(engine, since, until, lambda done, total: told.append((done, total))))
    file = io.BytesIO()
    assert export(engine, file, since, until) == len(found)
    assert [row.op for row in found] == [orjson.loads(line)["op"] for line in file.getvalue().splitlines()]
    assert told[-1] == (len(found), len(found))
