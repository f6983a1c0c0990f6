"""Budgets of keys over all proxies on one database.

Each proxy counts its own costs at once (`limits.py`). What everybody else has spent this month it works out from
the database: all that the ledger holds, less what this process has put there. Both figures are of one moment:
the ledger's thread inserts and counts under the lock that the reader holds. So a proxy is behind by one pause, by
what others have not moved to the database yet (half a second), and by what their running requests will cost: by so
much can a budget be overshot.

The pause grows with what the sum costs the database, so that it is never more than a twentieth of one of its cores.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable
from datetime import tzinfo
from typing import NamedTuple, Protocol

import sqlalchemy as sa

from proxy.access.keys import KeyStore
from proxy.access.limits import Limits, month_bounds
from proxy.database import said
from proxy.postgres import is_postgres
from proxy.records import COLUMNS, Values
from proxy.reports import spent_by_key

log = logging.getLogger("tidegate")

PAUSE_S = 5.0
SHARE = 20
"""Of the time, the sum may take one part in so many."""
_ARRIVED, _KEY, _COST, _CURRENCY = map(COLUMNS.index, ("arrived_us", "key_id", "cost_nano", "currency"))


class RowCounter(Protocol):
    """Told of the rows that the ledger has got from this process."""

    lock: threading.Lock
    """Held while rows are inserted and counted."""

    def count(self, rows: Iterable[Values]) -> None:
        """These are in the ledger now. The lock is held."""


class Elsewhere(NamedTuple):
    """What others have spent."""

    month_end: float
    """Unix time at which the month ends that it was spent in."""
    nano: dict[str, int]
    """By key id, in the currency that was asked for."""
    others: list[str]
    """Other currencies that there were costs in."""


class SharedBudgets:
    """What others spend from the budgets of keys. `count` and `read` may be called by different threads."""

    def __init__(self, engine: sa.Engine, wall: float, zone: tzinfo) -> None:
        """`wall`: Unix time; `zone` decides when months begin."""
        self._engine = engine
        self._zone = zone
        self._begin, self._end = month_bounds(wall, zone)
        self._own: dict[tuple[str, str], int] = {}
        """Nano-units that this process has put into the ledger this month, by currency and key."""
        self._own_next: dict[tuple[str, str], int] = {}
        """The same of requests that arrived later: the month is over, and nobody has read yet."""
        self.lock = threading.Lock()
        """Held while rows are inserted and counted."""

    def count(self, rows: Iterable[Values]) -> None:
        """These rows of ours are in the ledger now. The lock is held."""
        for row in rows:
            if cost := row[_COST]:
                arrived = row[_ARRIVED] / 1e6
                own = self._own if arrived < self._end else self._own_next
                if arrived >= self._begin:
                    of = row[_CURRENCY], row[_KEY]
                    own[of] = own.get(of, 0) + cost

    def read(self, currency: str, wall: float) -> Elsewhere:
        """Blocks: run it in a thread. Raises SQLAlchemy's errors."""
        with self.lock:
            if wall >= self._end:
                self._begin, self._end = month_bounds(wall, self._zone)
                self._own, self._own_next = self._own_next, {}
            spent, others = spent_by_key(self._engine, self._begin, currency)
            own = self._own
            nano = {key: cost - own.get((currency, key), 0) for key, cost in spent.items()}
            return Elsewhere(self._end, nano, others)

    async def watch(
        self, limits: Limits, keys: KeyStore, currency: Callable[[], str], pause_s: float | None = None
    ) -> None:
        """Tell the limits, again and again, as long as some key has a budget."""
        unread = False
        least = PAUSE_S if pause_s is None else pause_s
        pause = least
        while True:
            await asyncio.sleep(pause)
            if not keys.has_budgets:
                continue
            began = time.monotonic()
            asked = currency()
            try:
                found = await asyncio.to_thread(self.read, asked, time.time())
            except Exception as error:  # whatever it was: the next turn tries again
                if not unread:
                    unread = True
                    log.error("budgets: what other proxies spend cannot be read: %s", said(error))
                continue
            if unread:
                unread = False
                log.warning("budgets: what other proxies spend can be read again")
            if asked == currency():
                limits.spent_elsewhere(found.nano, found.month_end)
            pause = max(least, SHARE * (time.monotonic() - began))


def shared_budgets(engine: sa.Engine, zone: tzinfo) -> SharedBudgets | None:
    """None: the database is a file, which belongs to one proxy."""
    return SharedBudgets(engine, time.time(), zone) if is_postgres(engine.url) else None


def limits_of_this_month(
    engine: sa.Engine, currency: str, zone: tzinfo, budgets: SharedBudgets | None
) -> Limits:
    """Limits that know what each key has spent this month so far, as the ledger has it."""
    wall = time.time()
    if budgets is None:
        others: list[str] = []

        def spent(since: float) -> dict[str, int]:
            nano, found = spent_by_key(engine, since, currency)
            others.extend(found)
            return nano

        limits = Limits(wall, spent, zone)
    else:
        limits = Limits(wall, None, zone)
        elsewhere = budgets.read(currency, wall)
        limits.spent_elsewhere(elsewhere.nano, elsewhere.month_end)
        others = elsewhere.others
    if others:
        log.warning(
            "budgets count %s only; this month there are costs in %s too", currency, ", ".join(others)
        )
    return limits
