"""Hours of capacity: counted by the monotonic clock, booked by the wall clock, written as often as one likes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from policies.standby import Standby, State
from proxy.database import open_database
from proxy.scaling.hours import Hours, spent
from proxy.scaling.journal import Kept
from tests.proxy.scaling.engines import section

NANO = 10**9
ON_THE_HOUR = 1_700_000_000.0 // 3600 * 3600


def kept(paid_since: float) -> Kept:
    return Kept(Standby("a", State.READY, "a-1-1", plan="p"), paid_since=paid_since)


def total(hours: Hours) -> float:
    assert hours.engine is not None
    return spent(hours.engine, None, 0.0, 1e12) / NANO


def test_an_hour_costs_what_an_hour_costs_however_often_it_is_written(tmp_path: Path) -> None:
    async def whole() -> None:
        hours, wall = Hours(open_database(tmp_path), "CNY"), ON_THE_HOUR + 1800.0
        hours.open(kept(wall), section("a"), "t", wall, 0.0)
        for minute in range(1, 61):
            await hours.write(wall + minute * 60, minute * 60.0)
        assert total(hours) == pytest.approx(36.0)
        await hours.write(wall + 3600, 3600.0)
        hours.close("a-1-1", wall + 3600, 3600.0)
        await hours.write(wall + 3600, 3600.0)
        await hours.write(wall + 9000, 9000.0)
        assert total(hours) == pytest.approx(36.0)
        assert hours.cost["a"] / NANO == pytest.approx(36.0)
        engine = hours.engine
        assert engine is not None
        assert spent(engine, "local", ON_THE_HOUR, ON_THE_HOUR + 3600) / NANO == pytest.approx(18.0)
        assert spent(engine, "elsewhere", 0.0, 1e12) == 0
        assert spent(engine, None, 0.0, 1e12, "t") / NANO == pytest.approx(36.0)
        assert spent(engine, None, 0.0, 1e12, currency="CNY") / NANO == pytest.approx(36.0)
        assert spent(engine, None, 0.0, 1e12, currency="USD") == 0, "a ledger that once counted in another"
        engine.dispose()

    asyncio.run(whole())


def test_a_run_that_goes_on_while_no_proxy_runs_is_counted_once(tmp_path: Path) -> None:
    async def whole() -> None:
        engine, wall = open_database(tmp_path), ON_THE_HOUR + 600.0
        first = Hours(engine, "CNY")
        first.open(kept(wall), section("a"), "t", wall, 0.0)
        await first.write(wall + 600, 600.0)
        second = Hours(engine, "CNY")
        await second.begin([(kept(wall), section("a"), "t")], wall + 3600, 50.0)
        await second.write(wall + 7200, 3650.0)
        assert total(second) == pytest.approx(72.0)
        third = Hours(engine, "CNY")
        await third.begin([(kept(wall), section("a"), "t")], wall - 86_400, 9.0)
        await third.write(wall - 86_400 + 60, 69.0)
        assert total(third) == pytest.approx(72.6), "a clock that was set back takes nothing back"
        engine.dispose()

    asyncio.run(whole())


def test_a_template_pays_for_a_run_that_a_crash_found_unwritten(tmp_path: Path) -> None:
    async def whole() -> None:
        engine, wall = open_database(tmp_path), ON_THE_HOUR
        hours = Hours(engine, "CNY")
        await hours.begin([(kept(wall), section("a"), "rush")], wall + 30, 0.0)
        await hours.write(wall + 60, 30.0)
        assert spent(engine, None, 0.0, 1e12, "rush") / NANO == pytest.approx(0.6)
        engine.dispose()

    asyncio.run(whole())


def test_what_cannot_be_written_is_written_later(tmp_path: Path) -> None:
    async def whole() -> None:
        hours, wall = Hours(open_database(tmp_path), "CNY"), ON_THE_HOUR
        engine = hours.engine
        hours.engine = open_database(tmp_path / "other")
        with hours.engine.begin() as connection:
            connection.exec_driver_sql("DROP TABLE capacity_hourly")
        hours.open(kept(wall), section("a"), "t", wall, 0.0)
        hours.close("a-1-1", wall + 60, 60.0)
        await hours.write(wall + 60, 60.0)
        assert hours.trouble
        hours.engine.dispose()
        hours.engine = engine
        await hours.write(wall + 120, 120.0)
        assert not hours.trouble
        assert total(hours) == pytest.approx(0.6)
        assert engine is not None
        engine.dispose()

    asyncio.run(whole())
