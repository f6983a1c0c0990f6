"""Ceilings of a calendar month: what sites, templates and all remote sites together may cost, tokens and hours.

A ceiling is hard. What is at it gets nothing new, whoever asks: its backends take no further requests, its plans
are not executed, and what runs there ends as it would have. A ceiling can be overshot by what is under way when it
is reached: running requests, and rows that the ledger has not got yet (`spending.py`).

Each ceiling tells at 50, 80 and 100 %, once in its month, also over restarts: what was told is on the disk before
it is said.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, tzinfo
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, Protocol

from policies.match import LOCAL
from proxy.prices import amount
from proxy.scaling.spending import TokenSpending

log = logging.getLogger("tidegate")

LEVELS: Final = (50, 80, 100)
"""Per cent at which a ceiling tells."""
TOLD_FILE: Final = "budgets.json"
NANO: Final = 10**9
MONTH, SITE, TEMPLATE = "month", "site", "template"


class CapacityCost(Protocol):
    """What hours of capacity have cost; empty names: whatever site, whatever template."""

    def __call__(self, site: str, template: str, month_begin: float) -> int:
        """Nano-units since a Unix time."""


def no_capacity(site: str, template: str, month_begin: float) -> int:
    """Where nobody counts hours."""
    return 0


@dataclass(frozen=True, slots=True)
class Ceiling:
    """One of them."""

    scope: str
    """`month`, `site` or `template`."""
    name: str
    """Of the site or template; empty for `month`."""
    nano: int

    def __str__(self) -> str:
        return f"the budget of {self.scope} {self.name}" if self.name else "the budget of all remote sites"

    @property
    def key(self) -> str:
        """Where it stands: `scaling.budgets.sites.nanjing`."""
        if self.scope == MONTH:
            return "scaling.budgets.month"
        return f"scaling.budgets.sites.{self.name}" if self.scope == SITE else f"templates.{self.name}.budget"


@dataclass(frozen=True, slots=True)
class Used:
    """How far a ceiling is used up."""

    ceiling: Ceiling
    tokens_nano: int
    capacity_nano: int

    @property
    def nano(self) -> int:
        """Both together."""
        return self.tokens_nano + self.capacity_nano

    @property
    def left(self) -> int:
        """Nano-units; not below 0."""
        return max(self.ceiling.nano - self.nano, 0)

    @property
    def reached(self) -> bool:
        """Whether nothing is left. A ceiling of 0 is reached from the beginning."""
        return self.nano >= self.ceiling.nano

    @property
    def ratio(self) -> float:
        """1: used up."""
        return self.nano / self.ceiling.nano if self.ceiling.nano else 1.0

    @property
    def level(self) -> int:
        """The highest of `LEVELS` that it has come to, in whole numbers; 0: none."""
        return max((level for level in LEVELS if self.nano * 100 >= level * self.ceiling.nano), default=0)

    def in_words(self, currency: str) -> str:
        """`the budget of site nanjing: 80.00 of 100.00 CNY used`."""
        return f"{self.ceiling}: {amount(self.nano)} of {amount(self.ceiling.nano)} {currency} used"


def nano_of(money: float) -> int:
    """Nano-units of an amount as it was written in a file: the shortest text that reads back as it."""
    return round(Decimal(repr(money)) * NANO)


def ceilings(
    month: float | None, sites: Mapping[str, float], templates: Mapping[str, float | None]
) -> list[Ceiling]:
    """Those of the configuration and of templates."""
    found = [] if month is None else [Ceiling(MONTH, "", nano_of(month))]
    found += [Ceiling(SITE, site, nano_of(money)) for site, money in sites.items()]
    found += [
        Ceiling(TEMPLATE, name, nano_of(money)) for name, money in templates.items() if money is not None
    ]
    return found


class Budgets:
    """All ceilings and what is used of them. Belongs to the event loop."""

    def __init__(
        self,
        spending: TokenSpending,
        zone: tzinfo,
        file: Path | None = None,
        capacity: CapacityCost = no_capacity,
        tell: Callable[[str, dict[str, Any]], None] | None = None,
    ) -> None:
        """`file`: where it is kept what was told; None: nowhere. `tell`: gets words and figures."""
        self.spending = spending
        self.capacity = capacity
        self.ceilings: Sequence[Ceiling] = ()
        self.running: Callable[[str], Iterable[str]] = lambda _: ()
        """Backends that run on the account of a template."""
        self._zone = zone
        self._file = file
        self._tell = tell
        self._month = ""
        self._told: dict[str, list[int]] = {}
        """By ceiling: its nano-units, and the level that was told."""
        self._trouble = ""
        self._read()

    def used(self) -> list[Used]:
        """Of each ceiling, now."""
        return [self._used(ceiling) for ceiling in self.ceilings]

    def under(self, site: str, template: str = "") -> list[Used]:
        """Of the ceilings that a backend at this site, on the account of this template, falls under."""
        return [self._used(ceiling) for ceiling in self.ceilings if _covers(ceiling, site, template)]

    def reached(self, site: str, template: str = "") -> Used | None:
        """The first of them that is reached."""
        return next((used for used in self.under(site, template) if used.reached), None)

    def refuses(self, costs: Iterable[tuple[str, int]], template: str = "") -> Used | None:
        """The first ceiling that has no room for these further costs, nano-units by site."""
        costs = list(costs)
        for used in self.used():
            nano = [nano for site, nano in costs if _covers(used.ceiling, site, template)]
            if nano and (used.reached or used.nano + sum(nano) > used.ceiling.nano):
                return used
        return None

    def left(self, site: str, template: str = "") -> int | None:
        """Of the tightest of them, nano-units; None: there is none."""
        return min((used.left for used in self.under(site, template)), default=None)

    def turn(self) -> list[Used]:
        """Tell what has come to a further level. Returns those."""
        month = datetime.fromtimestamp(self.spending.begin, self._zone).strftime("%Y-%m")
        told = self._told if month == self._month else {}
        news, now = [], {}
        for used in self.used():
            nano, level = told.get(used.ceiling.key, [used.ceiling.nano, 0])
            if nano != used.ceiling.nano:  # it was changed: it tells anew what it comes to
                level = 0
            if used.level > level:
                news.append(used)
                level = used.level
            now[used.ceiling.key] = [used.ceiling.nano, level]
        if (month, now) != (self._month, self._told):
            if news and not self._write(month, now):
                return []
            self._month, self._told = month, now
        for used in news:
            words = f"{used.in_words(self.spending.currency)} ({used.level} % of this month)"
            if used.level >= 100:
                words += "; nothing new is sent or started there"
            log.warning("%s", words)
            if self._tell is not None:
                self._tell(words, self.shown(used))
        return news

    def shown(self, used: Used) -> dict[str, Any]:
        """As the admin port and notices show it."""
        return {
            "scope": used.ceiling.scope,
            "name": used.ceiling.name,
            "budget": used.ceiling.nano / NANO,
            "tokens": used.tokens_nano / NANO,
            "capacity": used.capacity_nano / NANO,
            "used": used.nano / NANO,
            "ratio": round(used.ratio, 6),
            "currency": self.spending.currency,
            "reached": used.reached,
        }

    def _used(self, ceiling: Ceiling) -> Used:
        spending, begin = self.spending, self.spending.begin
        if ceiling.scope == TEMPLATE:
            tokens = spending.account(ceiling.name, self.running(ceiling.name))
            return Used(ceiling, tokens, self.capacity("", ceiling.name, begin))
        if ceiling.scope == SITE:
            return Used(ceiling, spending.site(ceiling.name), self.capacity(ceiling.name, "", begin))
        tokens = sum(cost for site, cost in spending.sites().items() if site not in (LOCAL, ""))
        return Used(ceiling, tokens, self.capacity("", "", begin) - self.capacity(LOCAL, "", begin))

    def _read(self) -> None:
        if self._file is None:
            return
        try:
            written = json.loads(self._file.read_text(encoding="utf-8"))
            self._month = str(written["month"])
            self._told = {str(key): [int(nano), int(level)] for key, (nano, level) in written["told"].items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s cannot be read: budgets tell anew what they have come to (%s)", self._file, error)

    def _write(self, month: str, told: Mapping[str, list[int]]) -> bool:
        """Whole or not at all. False: it is not on the disk, and is tried again."""
        if self._file is None:
            return True
        new = self._file.with_suffix(".new")
        try:
            with new.open("w", encoding="utf-8") as file:
                json.dump({"month": month, "told": told}, file)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._file)
        except OSError as error:
            reason = error.strerror or str(error)
            if reason != self._trouble:
                log.error("%s cannot be written: %s", self._file, reason)
            self._trouble = reason
            return False
        self._trouble = ""
        return True


def _covers(ceiling: Ceiling, site: str, template: str) -> bool:
    if ceiling.scope == MONTH:
        return site != LOCAL
    return ceiling.name == (site if ceiling.scope == SITE else template)
