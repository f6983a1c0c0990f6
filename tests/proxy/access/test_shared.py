"""Budgets over several proxies: each knows its own costs at once, those of the others when it last read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, delete

from proxy.access.keys import Key
from proxy.access.limits import Limits, Refusal, Reservation
from proxy.access.shared import SharedBudgets, limits_of_this_month
from proxy.database import writing
from proxy.ledger import _Insert
from proxy.records import to_values
from proxy.tables import ledger, usage_hourly
from tests.databases import NewDatabase
from tests.proxy.rows import a_row

NOVEMBER = datetime(2025, 11, 10, 12, tzinfo=UTC).timestamp()
OCTOBER = datetime(2025, 10, 31, 23, 59, tzinfo=UTC).timestamp()
DECEMBER = datetime(2025, 12, 1, 0, 1, tzinfo=UTC).timestamp()
KEY = Key("k1", "acme", budget_nano=100)


class Proxy:
    """One of several on a database: its limits, and its share of the ledger's thread."""

    def __init__(self, engine: Engine, wall: float = NOVEMBER) -> None:
        self.insert = _Insert(engine)
        self.budgets = SharedBudgets(engine, wall, UTC)
        self.limits = Limits(wall, None, UTC)
        self.read(wall)

    def spend(self, nano: int, wall: float = NOVEMBER) -> bool:
        """One request with this cost; it is in the database at once. False: refused."""
        found = self.limits.admit(KEY, 0, nano, 0.0, wall)
        if isinstance(found, Refusal):
            return False
        self.limits.settle(found, 0, nano, 0.0)
        self.move(nano, wall)
        return True

    def move(self, nano: int, wall: float = NOVEMBER, currency: str = "CNY") -> None:
        """Put a row into the ledger."""
        rows = [to_values(a_row(key_id="k1", arrived=wall, cost_nano=nano, currency=currency))]
        with self.budgets.lock:
            self.insert.rows(rows)
            self.budgets.count(rows)

    def read(self, wall: float = NOVEMBER) -> None:
        found = self.budgets.read("CNY", wall)
        self.limits.spent_elsewhere(found.nano, found.month_end)

    @property
    def committed(self) -> int:
        month = self.limits.usage(KEY, NOVEMBER).month
        return month.spent + month.elsewhere


@pytest.fixture
def engine(tmp_path: Path, new_database: NewDatabase) -> Iterator[Engine]:
    engine = new_database(tmp_path)
    yield engine
    engine.dispose()


STEPS = st.lists(st.tuples(st.integers(0, 2), st.one_of(st.just("read"), st.integers(1, 40))), max_size=12)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS)
def test_a_budget_is_overshot_by_no_more_than_others_spent_since_the_last_reading(
    engine: Engine, steps: list[tuple[int, int | str]]
) -> None:
    with writing(engine) as connection:
        connection.execute(delete(ledger))
        connection.execute(delete(usage_hourly))
    proxies = [Proxy(engine) for _ in range(3)]
    total = 0
    unseen = [0, 0, 0]
    for who, what in steps:
        if what == "read":
            proxies[who].read()
            unseen[who] = 0
        else:
            assert isinstance(what, int)
            known = total - unseen[who]
            if proxies[who].spend(what):
                total += what
                assert total <= 100 + unseen[who]
                unseen = [amount + (what if number != who else 0) for number, amount in enumerate(unseen)]
            else:
                assert known + what > 100, "refused too early"
        assert proxies[who].committed == total - unseen[who]


def test_a_restart_and_what_was_there_before_count_once(engine: Engine) -> None:
    first = Proxy(engine)
    first.move(10, OCTOBER)
    assert first.spend(60)
    first.move(99, currency="USD")
    second = Proxy(engine)
    assert second.committed == 60
    assert not second.spend(41)
    assert second.spend(40)
    first.read()
    assert (first.committed, second.committed) == (100, 100)
    assert not first.spend(1)


def test_a_new_month_begins_for_all(engine: Engine) -> None:
    one, other = Proxy(engine), Proxy(engine)
    assert one.spend(100)
    other.read()
    assert not other.spend(1)
    assert one.spend(30, DECEMBER), "before anything of the new month was read"
    other.read(DECEMBER)
    one.read(DECEMBER)
    for proxy in (one, other):
        month = proxy.limits.usage(KEY, DECEMBER).month
        assert month.spent + month.elsewhere == 30
    assert not other.spend(71, DECEMBER)
    assert other.spend(70, DECEMBER)
    late = one.budgets.read("CNY", DECEMBER)
    assert late.nano == {"k1": 70}


def test_a_reading_of_a_month_that_is_over_changes_nothing() -> None:
    limits = Limits(DECEMBER, None, UTC)
    limits.spent_elsewhere({"k1": 1000}, NOVEMBER)
    assert isinstance(limits.admit(KEY, 0, 100, 0.0, DECEMBER), Reservation)


async def test_limits_are_told_again_and_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also after the database could not be read for a while; and nobody is asked while no key has a budget."""
    now = time.time()
    one, other = Proxy(engine, now), Proxy(engine, now)
    keys: Any = SimpleNamespace(has_budgets=False)
    told: list[dict[str, int]] = []
    enough = asyncio.Event()

    def tell(nano: dict[str, int], month_end: float) -> None:
        told.append(nano)
        enough.set()

    failing = 0
    read = one.budgets.read

    def sometimes(currency: str, wall: float) -> Any:
        nonlocal failing
        assert keys.has_budgets
        failing += 1
        if failing <= 3:
            raise OSError("no more descriptors")
        return read(currency, wall)

    monkeypatch.setattr(one.budgets, "read", sometimes)
    monkeypatch.setattr(one.limits, "spent_elsewhere", tell)
    other.move(7, now)
    watch = asyncio.ensure_future(  # noqa: TID251
        one.budgets.watch(one.limits, keys, lambda: "CNY", pause_s=0.0)
    )
    await asyncio.sleep(0)
    keys.has_budgets = True
    await enough.wait()
    watch.cancel()
    assert told[0] == {"k1": 7}
    assert caplog.text.count("cannot be read") == 1
    assert caplog.text.count("can be read again") == 1


@pytest.mark.parametrize("shared", [False, True])
def test_a_start_knows_what_was_spent(engine: Engine, shared: bool, caplog: pytest.LogCaptureFixture) -> None:
    now = time.time()
    before = Proxy(engine, now)
    before.move(70, now)
    before.move(5, now, currency="USD")
    budgets = SharedBudgets(engine, now, UTC) if shared else None
    limits = limits_of_this_month(engine, "CNY", UTC, budgets)
    assert isinstance(limits.admit(KEY, 0, 31, 0.0, now), Refusal)
    assert isinstance(limits.admit(KEY, 0, 30, 0.0, now), Reservation)
    assert "there are costs in USD too" in caplog.text
