"""`tidegate usage --capacity`: hours of capacity and what they cost, as `scaling/hours.py` has written them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import orjson
from sqlalchemy import ColumnElement, Engine, func, select

from proxy.prices import amount
from proxy.tables import capacity_hourly

if TYPE_CHECKING:
    from rich.table import Table

NANO: Final = 10**9
_table = capacity_hourly.c
GROUPS: Final[dict[str, ColumnElement[Any]]] = {
    "standby": _table.standby,
    "site": _table.site,
    "model": _table.model,
    "plan": _table.plan,
    "template": _table.template,
    "run": _table.run,
    "day": _table.hour // 86_400,
}
"""What it can be summed by. Days are UTC."""


@dataclass(slots=True)
class Capacity:
    """One line."""

    group: dict[str, str]
    runs: int
    seconds: float
    cost_nano: int
    currency: str
    """Empty: what an hour costs is not known."""

    def as_dict(self) -> dict[str, Any]:
        """With the keys of `usage --capacity --json`, which scripts rely on."""
        line = asdict(self)
        return {**line.pop("group"), **line, "cost": self.cost_nano / NANO}


def capacity(
    engine: Engine, by: str, since: float | None = None, until: float | None = None
) -> list[Capacity]:
    """What standbys took from `since` until before `until` (Unix times; None: open), in whole hours that begin
    there. Raises ValueError naming an unknown group."""
    if by not in GROUPS:
        raise ValueError(f"cannot sum capacity by {by!r}; there are {', '.join(GROUPS)}")
    group = GROUPS[by]
    sums = (func.count(_table.run.distinct()), func.sum(_table.seconds), func.sum(_table.cost_nano))
    statement = select(group, *sums, _table.currency).group_by(group, _table.currency).order_by(group)
    if since is not None:
        statement = statement.where(_table.hour > since - 3600)
    if until is not None:
        statement = statement.where(_table.hour < until)
    with engine.connect() as connection:
        return [
            Capacity({by: _named(by, value)}, runs, float(seconds), int(cost), currency)
            for value, runs, seconds, cost, currency in connection.execute(statement)
        ]


def _named(by: str, value: Any) -> str:
    return f"{datetime.fromtimestamp(value * 86_400, UTC):%Y-%m-%d}" if by == "day" else str(value)


def capacity_json(lines: list[Capacity]) -> bytes:
    """A JSON array of objects, see `Capacity.as_dict`."""
    return orjson.dumps(
        [line.as_dict() for line in lines], option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
    )


def capacity_table(lines: list[Capacity]) -> Table:
    """For people."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in lines[0].group:
        table.add_column(name, overflow="fold")
    for name in ("runs", "hours", "cost"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        cost = f"{amount(line.cost_nano)} {line.currency}" if line.currency else "unpriced"
        table.add_row(
            *(value or "-" for value in line.group.values()),
            f"{line.runs:,}",
            f"{line.seconds / 3600:,.2f}",
            cost,
        )
    return table
