"""What tokens have cost this month, by site and by backend, as the ledger has it.

The database knows all that has ever been written into it, by whichever process; what this one has put there since
the last look is counted on the way. Both are of one moment, since rows are inserted and counted under the lock that
a look holds. So the sum is right after every restart, and behind only by what is not in the database yet: half a
second of finished requests, and those that still run.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import tzinfo

import sqlalchemy as sa

from proxy.access.limits import month_bounds
from proxy.access.shared import SharedBudgets
from proxy.records import COLUMNS, Values
from proxy.reports import usage
from proxy.tables import ledger

_ARRIVED, _BACKEND, _SITE, _COST, _CURRENCY = map(
    COLUMNS.index, ("arrived_us", "backend", "site", "cost_nano", "currency")
)


@dataclass(frozen=True, slots=True)
class Span:
    """Time that a backend ran on somebody's account, Unix seconds."""

    backend: str
    began: float
    ended: float | None = None
    """None: it still does."""


class TokenSpending:
    """Costs of this month, nano-units. `count` and `read` may be called by different threads, the sums by any: none
    of these waits for the database."""

    def __init__(
        self, engine: sa.Engine, wall: float, zone: tzinfo, currency: str, shared: SharedBudgets | None = None
    ) -> None:
        """`shared`: counts the same rows for the budgets of keys, under the same lock."""
        self._engine = engine
        self._zone = zone
        self._shared = shared
        self.currency = currency
        self.begin, self.end = month_bounds(wall, zone)
        self._sites: dict[str, int] = {}
        """In the database, when it was last read."""
        self._accounts: dict[str, int] = {}
        self._since: dict[tuple[str, str], int] = {}
        """What this process has put there since, by site and backend."""
        self._early: dict[tuple[str, str], int] = {}
        """The same of the next month, before anybody has read."""
        self.lock = shared.lock if shared is not None else threading.Lock()
        """Held while rows are inserted and counted, for as long as a database takes: not for the event loop."""
        self._figures = threading.Lock()
        """Held while figures change, or are summed."""

    def count(self, rows: Iterable[Values]) -> None:
        """These rows of ours are in the ledger now. The lock is held."""
        rows = list(rows)
        if self._shared is not None:
            self._shared.count(rows)
        with self._figures:
            for row in rows:
                cost = row[_COST]
                if not cost or row[_CURRENCY] != self.currency:
                    continue
                arrived = row[_ARRIVED] / 1e6
                if arrived >= self.begin:
                    since = self._since if arrived < self.end else self._early
                    of = row[_SITE], row[_BACKEND]
                    since[of] = since.get(of, 0) + cost

    def read(self, wall: float, accounts: dict[str, Sequence[Span]] | None = None) -> None:
        """Look into the database. Blocks: run it in a thread. Raises SQLAlchemy's errors; all is then as before.

        `accounts`: when which backends ran on whose account.
        """
        with self.lock:
            begin, end = self.begin, self.end
            if not begin <= wall < end:  # also where a clock had been set forward, and was put right
                begin, end = month_bounds(wall, self._zone)
            sites: dict[str, int] = {}
            for line in usage(self._engine, "site", begin):
                if line.currency == self.currency:
                    site = line.group["site"]
                    sites[site] = sites.get(site, 0) + line.cost_nano
            found = {name: self._of_spans(begin, spans) for name, spans in (accounts or {}).items()}
            with self._figures:
                self._sites, self._accounts, self._since, self._early = sites, found, {}, {}
                self.begin, self.end = begin, end

    def site(self, name: str) -> int:
        """Of all its backends."""
        with self._figures:
            since = sum(cost for (site, _), cost in self._since.items() if site == name)
            return self._sites.get(name, 0) + since

    def sites(self) -> dict[str, int]:
        """By site, those with costs."""
        with self._figures:
            found = dict(self._sites)
            for (site, _), cost in self._since.items():
                found[site] = found.get(site, 0) + cost
            return found

    def account(self, name: str, running: Iterable[str] = ()) -> int:
        """Of one of the accounts at the last `read`, and since then of the backends that run on it."""
        backends = frozenset(running)
        with self._figures:
            since = sum(cost for (_, backend), cost in self._since.items() if backend in backends)
            return self._accounts.get(name, 0) + since

    def _of_spans(self, begin: float, spans: Sequence[Span]) -> int:
        total = 0
        with self._engine.connect() as connection:
            for span in spans:
                if span.ended is not None and span.ended <= begin:
                    continue
                statement = sa.select(sa.func.sum(ledger.c.cost_nano)).where(
                    ledger.c.backend == span.backend,
                    ledger.c.currency == self.currency,
                    ledger.c.arrived_us >= int(max(span.began, begin) * 1e6),
                )
                if span.ended is not None:
                    statement = statement.where(ledger.c.arrived_us < int(span.ended * 1e6))
                total += int(connection.execute(statement).scalar() or 0)
        return total
