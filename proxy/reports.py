"""Usage and export: what the ledger says, summed or row by row.

Sums come from the hourly table for the whole hours of a span and from the rows themselves for the pieces at
its two ends, in one statement, so they are exact to the microsecond and cheap over a year. Reports read while
the proxy writes.

Money is summed in integer nano-units. It is rounded once, where it is printed: a table shows 4 decimals (half
to even), and less than these as `<0.0001`; JSON and CSV show all 9.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import orjson
from sqlalchemy import BigInteger, ColumnElement, Engine, Select, Text, cast, func, select, tuple_, union_all
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from proxy.prices import amount
from proxy.records import COLUMNS, DETAIL, FIELDS, Row, as_json, from_values
from proxy.tables import HOUR_US, HOURLY_GROUPS, HOURLY_SUMS, ledger, usage_hourly

if TYPE_CHECKING:
    from rich.table import Table

NANO = 10**9


class _Code(FunctionElement[str]):
    """The error code of a row of the ledger: an element of its JSON array, or empty."""

    type = Text()
    inherit_cache = True


@compiles(_Code, "sqlite")
def _code_in_sqlite(element: _Code, compiler: Any, **options: Any) -> str:
    return f"coalesce(json_extract({ledger.name}.detail, '$[{DETAIL.index('code')}]'), '')"


@compiles(_Code, "postgresql")
def _code_in_postgresql(element: _Code, compiler: Any, **options: Any) -> str:
    # A client may have called a model \u0000, which no text can hold: JSON with it is not read at all.
    detail = rf"replace({ledger.name}.detail, E'\\u0000', E'\\ufffd')"
    return f"coalesce({detail}::json ->> {DETAIL.index('code')}, '')"


GROUPS: dict[str, tuple[ColumnElement[Any] | None, ColumnElement[Any]]] = {
    "tenant": (usage_hourly.c.tenant, ledger.c.tenant),
    "model": (usage_hourly.c.model, HOURLY_GROUPS["model"]),
    "backend": (usage_hourly.c.backend, ledger.c.backend),
    "key": (usage_hourly.c.key_id, ledger.c.key_id),
    "site": (usage_hourly.c.site, ledger.c.site),
    "day": (usage_hourly.c.hour // 86_400, ledger.c.arrived_us // (24 * HOUR_US)),
    "code": (None, _Code()),
}
"""What usage can be summed by, in the hourly table and in the rows. Days are UTC. None: the hours do not tell it
apart, so that all rows of the span are read."""

_FOLDED_CELLS = 10
"""To so few columns of a terminal a name is folded."""

PAGE_ROWS = 1000
"""Rows that an export reads at once: no read is long, so the write-ahead log can be recycled meanwhile."""

SUMS = tuple(HOURLY_SUMS)

_DURATION = re.compile(r"([0-9]{1,6})([smhdw])").fullmatch
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@dataclass(slots=True)
class Usage:
    """One line of a statement."""

    group: dict[str, str]
    """What it is summed by -> its value here; an empty value: requests that never got so far."""
    currency: str
    requests: int = 0
    errors: int = 0
    """Those that ended neither `ok` nor with the client leaving: refused and failed ones."""
    unpriced: int = 0
    """Requests with tokens whose price was not known: what they cost is missing in `cost_nano`."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    overhead_prompt_tokens: int = 0
    overhead_completion_tokens: int = 0
    cost_nano: int = 0
    failed: int = 0
    """Lost by backends or by the proxy."""

    @property
    def refused(self) -> int:
        """Refused by a limit or a policy, or for the client's own mistake."""
        return self.errors - self.failed

    def add(self, other: Usage) -> None:
        """Add another line's sums to this one."""
        for name in SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def as_dict(self) -> dict[str, Any]:
        """With the keys of `usage --json`, which scripts rely on."""
        return {
            **self.group,
            "requests": self.requests,
            "errors": self.errors,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "overhead_prompt_tokens": self.overhead_prompt_tokens,
            "overhead_completion_tokens": self.overhead_completion_tokens,
            "cost": self.cost_nano / NANO,
            "cost_nano": self.cost_nano,
            "currency": self.currency,
            "unpriced": self.unpriced,
            "refused": self.refused,
            "failed": self.failed,
        }


_COUNTS: tuple[tuple[str, Callable[[Usage], int], bool], ...] = (
    ("requests", lambda line: line.requests, False),
    ("refused", lambda line: line.refused, True),
    ("failed", lambda line: line.failed, True),
    ("prompt", lambda line: line.prompt_tokens, False),
    ("cached", lambda line: line.cached_tokens, False),
    ("completion", lambda line: line.completion_tokens, False),
    ("overhead", lambda line: line.overhead_prompt_tokens + line.overhead_completion_tokens, True),
)
"""Columns of the table, and whether one is left out where there is nothing in it."""


def usage(
    engine: Engine,
    by: str,
    since: float | None = None,
    until: float | None = None,
    currency: str = "",
) -> list[Usage]:
    """What was used by requests that arrived from `since` until before `until` (Unix times; None: open).

    `by`: one of `GROUPS`, or several joined by commas. `currency` is shown where no request had a price.
    A ledger has one currency; should an older one be in it, its sums are lines of their own. Raises
    ValueError naming an unknown group, or one given twice.
    """
    groups = by.split(",")
    for group in groups:
        if group not in GROUPS:
            raise ValueError(f"cannot sum by {group!r}; there are {', '.join(GROUPS)}")
        if groups.count(group) > 1:
            raise ValueError(f"{group!r} is named twice")
    lines: dict[tuple[Any, ...], dict[str, Usage]] = {}
    with engine.connect() as connection:
        for row in connection.execute(_sums(groups, since, until)):
            values = tuple(row[: len(groups)])
            paid_in, *sums = row[len(groups) :]
            names = [
                _day(value) if group == "day" else value for group, value in zip(groups, values, strict=True)
            ]
            line = Usage(dict(zip(groups, names, strict=True)), paid_in, *map(int, sums))
            lines.setdefault(values, {})[paid_in] = line
    return [line for by_currency in lines.values() for line in _joined(by_currency, currency)]


def spent_by_key(engine: Engine, since: float, currency: str) -> tuple[dict[str, int], list[str]]:
    """What each key has cost in a currency since a Unix time, nano-units by key id.

    And the other currencies that there were costs in: no budget counts them.
    """
    totals: dict[str, int] = {}
    others: set[str] = set()
    for line in usage(engine, "key", since):
        if line.currency == currency:
            totals[line.group["key"]] = line.cost_nano
        elif line.cost_nano:
            others.add(line.currency)
    return totals, sorted(others)


def latest_currency(engine: Engine) -> str:
    """What the ledger last counted in; empty: nothing in it had a price."""
    column = usage_hourly.c.currency
    statement = select(column).where(column != "").order_by(usage_hourly.c.hour.desc()).limit(1)
    with engine.connect() as connection:
        return connection.execute(statement).scalar() or ""


def usage_table(lines: list[Usage], width: int | None = None) -> Table:
    """For people: money with 4 decimals, and totals if there is more than one line.

    Refused and failed requests and tokens of failed attempts have a column when there are any. In fewer columns of
    the terminal (`width`) than the figures need, they stand one below the other: none is ever cut or left out.
    """
    currencies = sorted({line.currency for line in lines} - {""})
    one_currency = len(currencies) <= 1
    counts = [
        (name, count)
        for name, count, is_optional in _COUNTS
        if not is_optional or any(count(line) for line in lines)
    ]
    groups = list(lines[0].group) if lines else []
    cost = " ".join(["cost", *currencies]) if one_currency else "cost"
    names = [*groups, *(name for name, _ in counts), cost]

    def cells(line: Usage) -> list[str]:
        figures = [f"{count(line):,}" for _, count in counts]
        if line.unpriced and not line.cost_nano:
            return [*figures, "unpriced"]
        cost = amount(line.cost_nano)
        return [*figures, cost if one_currency else f"{cost} {line.currency}"]

    totals: dict[str, Usage] = {}
    rows = []
    for line in lines:
        rows.append([*(line.group[name] or "-" for name in groups), *cells(line)])
        totals.setdefault(line.currency, Usage({}, line.currency)).add(line)
    sums = [["total", *[""] * (len(groups) - 1), *cells(total)] for total in totals.values()]
    table = _table(names, len(groups), rows, sums if len(lines) > 1 else [], width)
    unpriced = sum(line.unpriced for line in lines)
    if unpriced:
        requests = "1 request" if unpriced == 1 else f"{unpriced:,} requests"
        table.caption = f"{requests} had no price: what they cost is not in here"
        table.caption_justify = "left"
    return table


def _table(
    names: list[str], groups: int, rows: list[list[str]], sums: list[list[str]], width: int | None
) -> Table:
    """Side by side, or a line to each cell where that is too wide. The first `groups` columns may be folded."""
    from rich import box  # not above: the ledger needs this module, and `serve` no tables
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    needed = [max(map(cell_len, column)) for column in zip(names, *rows, *sums, strict=True)]
    needed[:groups] = [min(cells, _FOLDED_CELLS) for cells in needed[:groups]]
    if width is not None and sum(needed) + len(needed) + 1 > width:
        table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for row in [*rows, *sums]:
            for name, cell in zip(names, row, strict=True):
                if cell:
                    table.add_row(name, Text(cell))
            table.add_row()
        return table
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for name, cells in zip(names[:groups], needed, strict=False):
        table.add_column(name, overflow="fold", min_width=max(cells, len(name)))
    for name in names[groups:]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    if sums:
        table.add_section()
    for row in sums:
        table.add_row(*map(Text, row))
    return table


def usage_json(lines: list[Usage]) -> bytes:
    """A JSON array of objects, see `Usage.as_dict`."""
    return orjson.dumps(
        [line.as_dict() for line in lines], option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
    )


def usage_csv(lines: list[Usage]) -> bytes:
    """The same columns as JSON, with a header; RFC 4180."""
    text = io.StringIO()
    rows = [line.as_dict() | {"cost": money(line.cost_nano, 9)} for line in lines]
    writer = csv.DictWriter(text, fieldnames=list(rows[0] if rows else Usage({}, "").as_dict()))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def export(
    engine: Engine,
    file: BinaryIO,
    since: float | None = None,
    until: float | None = None,
    *,
    form: Literal["jsonl", "csv"] = "jsonl",
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write one row per request, in order of arrival, with every field of `Row`. Returns how many.

    Needs the memory of one page, whatever the span. `progress` is called after every page with the rows
    written and those there were at the beginning. A request that ends while this runs is in it if it arrived
    later than what has been written so far.
    """
    write = _write_csv if form == "csv" else _write_jsonl
    span = _arrived(since, until)
    total = _count(engine, span)
    written = 0
    for page in _pages(engine, span):
        write(file, page, with_header=written == 0)
        written += len(page)
        if progress is not None:
            progress(written, max(total, written))
    if written == 0:
        write(file, [], with_header=True)
    return written


def rows(
    engine: Engine, since: float | None, until: float | None, progress: Callable[[int, int], None]
) -> Iterator[Row]:
    """The rows that `export` writes, in its order and with its memory; `progress` likewise."""
    span = _arrived(since, until)
    total, read = _count(engine, span), 0
    for page in _pages(engine, span):
        yield from page
        read += len(page)
        progress(read, max(total, read))


def parse_time(text: str, now: float) -> float:
    """Unix time of `7d`, `24h`, `90m` ago, or of an ISO 8601 date or time (UTC unless it says otherwise).

    Raises ValueError, also for times outside the years 1 to 9999 (UTC), which no report can name.
    """
    length = parse_duration(text)
    try:
        if length is not None:
            moment = datetime.fromtimestamp(now, UTC) - timedelta(seconds=length)
        else:
            moment = datetime.fromisoformat(text)
            moment = moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except OverflowError:
        raise ValueError(f"{text!r} lies outside the calendar, the years 1 to 9999") from None
    except ValueError:
        raise ValueError(f"{text!r} is neither a duration such as 7d nor a date such as 2026-01-31") from None
    return moment.timestamp()


def parse_duration(text: str) -> float | None:
    """Seconds of `7d`, `24h`, `90m`; None: the text is no duration."""
    match = _DURATION(text)
    return timedelta(**{_UNITS[match[2]]: int(match[1])}).total_seconds() if match else None


def span_in_words(since: float | None, until: float | None) -> str:
    """`from 2026-11-01 00:00 to 2026-11-08 00:00 UTC`, of the Unix times that bound a report."""
    begin, end = (
        None if time is None else f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M}"
        for time in (since, until)
    )
    if begin is None and end is None:
        return "in this ledger"
    words = [*([f"from {begin}"] if begin else []), *([f"to {end}"] if end else [])]
    return f"{' '.join(words)} UTC{'' if end else ' until now'}"


def money(nano: int, decimals: int) -> str:
    """Nano-units as a decimal number, rounded once, half to even. At most 9 decimals."""
    unit = 10 ** (9 - decimals)
    whole, rest = divmod(abs(nano), unit)
    whole += 2 * rest > unit or (2 * rest == unit and whole & 1)
    digits = str(whole).rjust(decimals + 1, "0")
    sign = "-" if nano < 0 and whole else ""
    return f"{sign}{digits[:-decimals]}.{digits[-decimals:]}" if decimals else sign + digits


def _sums(groups: list[str], since: float | None, until: float | None) -> Select[tuple[Any, ...]]:
    """Sums by group and currency: whole hours from the hourly table, the ends of the span from the rows."""
    if any(GROUPS[name][0] is None for name in groups):
        return _of_rows(groups, *_arrived(since, until))
    first = 0 if since is None else -(-_us(since) // HOUR_US)
    last = None if until is None else _us(until) // HOUR_US
    if last is not None and last <= first:
        pieces = [_of_rows(groups, *_arrived(since, until))]
    else:
        hours = [usage_hourly.c.hour >= first * 3600]
        pieces = []
        if since is not None and _us(since) % HOUR_US:
            pieces.append(_of_rows(groups, *_arrived(since, None), ledger.c.arrived_us < first * HOUR_US))
        if last is not None:
            hours.append(usage_hourly.c.hour < last * 3600)
            pieces.append(_of_rows(groups, ledger.c.arrived_us >= last * HOUR_US, *_arrived(None, until)))
        pieces.append(_of_hours(groups, *hours))
    parts = union_all(*pieces).subquery()
    keys = [parts.c[name] for name in (*groups, "currency")]
    totals = [cast(func.sum(parts.c[name]), BigInteger).label(name) for name in SUMS]
    return select(*keys, *totals).group_by(*keys).order_by(*keys)


def _of_hours(groups: list[str], *where: ColumnElement[bool]) -> Select[tuple[Any, ...]]:
    columns = [column.label(name) for name in groups if (column := GROUPS[name][0]) is not None]
    sums = [usage_hourly.c[name] for name in SUMS]
    return select(*columns, usage_hourly.c.currency, *sums).where(*where)


def _of_rows(groups: list[str], *where: ColumnElement[bool]) -> Select[tuple[Any, ...]]:
    columns = [GROUPS[name][1].label(name) for name in groups]
    sums = [total.label(name) for name, total in HOURLY_SUMS.items()]
    return select(*columns, ledger.c.currency, *sums).where(*where).group_by(*groups, "currency")


def _joined(by_currency: dict[str, Usage], currency: str) -> list[Usage]:
    """Requests without a price have no currency either: they join the line of those that have."""
    without = by_currency.pop("", None)
    lines = list(by_currency.values())
    if without is not None:
        if lines:
            lines[0].add(without)
        else:
            without.currency = currency
            lines.append(without)
    return lines


def _count(engine: Engine, span: list[ColumnElement[bool]]) -> int:
    with engine.connect() as connection:
        return int(connection.execute(select(func.count()).select_from(ledger).where(*span)).scalar_one())


def _pages(engine: Engine, span: list[ColumnElement[bool]]) -> Iterator[list[Row]]:
    position = tuple_(ledger.c.arrived_us, ledger.c.id)
    columns = [ledger.c[name] for name in (*COLUMNS, "detail")]
    page = (
        select(ledger.c.id, *columns).where(*span).order_by(ledger.c.arrived_us, ledger.c.id).limit(PAGE_ROWS)
    )
    statement = page
    while True:
        with engine.connect() as connection:
            rows = connection.execute(statement).all()
        if rows:
            yield [from_values(row[1:]) for row in rows]
        if len(rows) < PAGE_ROWS:
            return
        statement = page.where(position > (rows[-1].arrived_us, rows[-1].id))


def _write_jsonl(file: BinaryIO, rows: list[Row], *, with_header: bool) -> None:
    for row in rows:
        file.write(as_json(row) + b"\n")


def _write_csv(file: BinaryIO, rows: list[Row], *, with_header: bool) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    if with_header:
        writer.writerow(FIELDS)
    for row in rows:
        values = (getattr(row, name) for name in FIELDS)
        # Lists and truth values as JSON has them.
        writer.writerow(
            orjson.dumps(value).decode() if isinstance(value, list | tuple | bool) else value
            for value in values
        )
    file.write(text.getvalue().encode())


def _arrived(since: float | None, until: float | None) -> list[ColumnElement[bool]]:
    bounds: list[ColumnElement[bool]] = []
    if since is not None:
        bounds.append(ledger.c.arrived_us >= _us(since))
    if until is not None:
        bounds.append(ledger.c.arrived_us < _us(until))
    return bounds


def _us(seconds: float) -> int:
    return round(seconds * 1e6)


def _day(days: int) -> str:
    return (datetime.fromtimestamp(0, UTC) + timedelta(days=days)).date().isoformat()
