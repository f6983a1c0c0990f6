"""Hours of capacity: what each run of a standby costs, from the first state that is paid to its end.

Seconds are counted by a clock that nobody sets, and booked to the hour that the wall clock shows: so they can be
summed by any calendar month. They are written every minute and at the end, each row as a whole, so that writing
twice changes nothing. A run that goes on while no proxy runs is counted from where the last row ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Engine, func, insert, select, update

from proxy.config import BackendConfig
from proxy.database import said, writing
from proxy.scaling.journal import Kept
from proxy.tables import capacity_hourly

log = logging.getLogger("tidegate")

WRITE_S: Final = 60.0
HOUR_S: Final = 3600
NANO: Final = 10**9


@dataclass(slots=True)
class Booked:
    """What a run has taken within an hour."""

    seconds: float = 0.0
    cost: float = 0.0
    """Nano-units, not rounded."""


@dataclass(slots=True)
class Run:
    """A run that is counted, or that has ended and is not written yet."""

    run: str
    standby: str
    site: str
    model: str
    plan: str
    template: str
    started: float
    """Unix time."""
    until: float
    """Unix time up to which it is counted."""
    counted_at: float
    """The same moment, monotonic."""
    price: float | None
    """Per hour."""
    currency: str
    hours: dict[int, Booked] = field(default_factory=dict)
    """Those that are not written, or may change still."""
    open: bool = True

    def advance(self, wall: float, now: float) -> None:
        """Count up to now."""
        if self.open:
            self.book(wall, max(now - self.counted_at, 0.0))
            self.counted_at = now

    def book(self, wall: float, seconds: float) -> None:
        """Count `seconds` that end at `wall`."""
        price, at = (self.price or 0.0) * NANO / HOUR_S, wall - seconds
        self.until = wall
        while seconds > 0.0:
            hour = int(at // HOUR_S) * HOUR_S
            piece = min(seconds, hour + HOUR_S - at)
            booked = self.hours.setdefault(hour, Booked())
            booked.seconds += piece
            booked.cost += piece * price
            seconds, at = seconds - piece, hour + HOUR_S


class Hours:
    """The runs of one proxy. All but `write` and `begin` only count."""

    def __init__(self, engine: Engine | None, currency: str = "") -> None:
        """`engine`: where rows go; None: nowhere."""
        self.engine = engine
        self.currency = currency
        self.cost: dict[str, float] = {}
        """Nano-units by standby, since the start of the proxy."""
        self.trouble = ""
        self._runs: dict[str, Run] = {}
        self._write_at = 0.0
        self._writing = asyncio.Lock()

    def open(self, kept: Kept, section: BackendConfig, template: str, wall: float, now: float) -> None:
        """A run is in a state that is paid; again: its price may have changed."""
        standby = kept.standby
        run = self._runs.get(standby.run)
        price = section.standby.cost_per_hour if section.standby is not None else None
        if run is None:
            run = self._runs[standby.run] = Run(
                standby.run,
                standby.name,
                section.site,
                ",".join(section.models) if section.models != "auto" else "",
                standby.plan,
                template,
                kept.paid_since or wall,
                wall,
                now,
                price,
                self.currency if price is not None else "",
            )
        self._count(run, wall, now)
        run.price = price if price is not None else run.price

    def close(self, run: str, wall: float, now: float) -> None:
        """Nothing of it runs any more."""
        found = self._runs.get(run)
        if found is not None:
            self._count(found, wall, now)
            found.open = False
            self._write_at = 0.0  # what it has cost is to be seen, and no crash is to lose it

    def advance(self, wall: float, now: float) -> None:
        """Count all that run."""
        for run in self._runs.values():
            self._count(run, wall, now)

    def due(self, now: float) -> bool:
        """Whether it is time to write."""
        if self.engine is None or not self._runs or now < self._write_at:
            return False
        self._write_at = now + WRITE_S
        return True

    async def begin(self, runs: Iterable[tuple[Kept, BackendConfig, str]], wall: float, now: float) -> None:
        """Take up the runs that went on while no proxy ran, each with the template that it is on the account of."""
        for each, section, template in runs:
            standby = each.standby
            if not each.paid_since:
                continue
            self.open(each, section, template, wall, now)
            run = self._runs[standby.run]
            rows = await self._in_thread(self._read, standby.run) or []
            until = run.started
            for row in rows:
                run.hours[row["hour"]] = Booked(row["seconds"], float(row["cost_nano"]))
                run.template = row["template"] or template
                until = max(until, row["until"])
            gap_s = max(wall - until, 0.0)
            run.book(wall, gap_s)
            self.cost[run.standby] = (
                self.cost.get(run.standby, 0.0) + gap_s * (run.price or 0.0) * NANO / HOUR_S
            )

    async def write(self, wall: float, now: float) -> None:
        """Write what there is; what cannot be written is kept, and written the next time."""
        async with self._writing:
            self.advance(wall, now)
            runs = list(self._runs.values())
            rows = [row for run in runs for row in _rows(run)]
            ended = [run for run in runs if not run.open]
            if rows and self.engine is not None and await self._in_thread(self._upsert, rows) is None:
                return
            for run in ended:
                if not run.open:
                    del self._runs[run.run]
            this_hour = int(wall // HOUR_S) * HOUR_S
            for run in self._runs.values():
                for hour in [hour for hour in run.hours if hour < this_hour - HOUR_S]:
                    del run.hours[hour]

    def _count(self, run: Run, wall: float, now: float) -> None:
        if not run.open:
            return
        seconds = max(now - run.counted_at, 0.0)
        run.advance(wall, now)
        self.cost[run.standby] = (
            self.cost.get(run.standby, 0.0) + seconds * (run.price or 0.0) * NANO / HOUR_S
        )

    async def _in_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """None: it failed, and was told."""
        if self.engine is None:
            return []
        try:
            found = await asyncio.to_thread(work, *arguments)
        except Exception as error:
            if (words := said(error)) != self.trouble:
                log.error("hours of capacity cannot be kept, it is tried again: %s", words)
            self.trouble = words
            return None
        self.trouble = ""
        return found

    def _read(self, run: str) -> list[dict[str, Any]]:
        assert self.engine is not None
        statement = select(capacity_hourly).where(capacity_hourly.c.run == run)
        with self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(statement).mappings()]

    def _upsert(self, rows: list[dict[str, Any]]) -> int:
        assert self.engine is not None
        table = capacity_hourly.c
        with writing(self.engine) as connection:
            for row in rows:
                same = (table.hour == row["hour"]) & (table.run == row["run"])
                if not connection.execute(update(capacity_hourly).where(same).values(row)).rowcount:
                    connection.execute(insert(capacity_hourly).values(row))
        return len(rows)


def _rows(run: Run) -> list[dict[str, Any]]:
    names = ("run", "standby", "site", "model", "plan", "template", "started", "until", "currency")
    same = {name: getattr(run, name) for name in names}
    return [
        {**same, "hour": hour, "seconds": booked.seconds, "cost_nano": round(booked.cost)}
        for hour, booked in run.hours.items()
    ]


def spent(
    engine: Engine,
    site: str | None,
    since: float,
    until: float,
    template: str | None = None,
    currency: str | None = None,
) -> int:
    """What runs have cost from `since` until before `until` (Unix times at the start of an hour), nano-units.

    `site`, `template` and `currency` None: of all. At most a minute old.
    """
    table = capacity_hourly.c
    statement = select(func.sum(table.cost_nano)).where(table.hour >= since, table.hour < until)
    if site is not None:
        statement = statement.where(table.site == site)
    if template is not None:
        statement = statement.where(table.template == template)
    if currency is not None:
        statement = statement.where(table.currency == currency)
    with engine.connect() as connection:
        return int(connection.execute(statement).scalar() or 0)
