"""What is PostgreSQL's own: how it is reached, migrated, locked, stopped, and shared."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest
import trustme
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import JSON, Column, Engine, event, func, select, text
from sqlalchemy.exc import OperationalError

import proxy.database
from benchmarks.postgres import PostgresServer
from policies.standby import Standby
from policies.standby import State as StandbyState
from proxy.access.keys import create_key
from proxy.check import _has_keys
from proxy.config import Config
from proxy.database import AwayError, OpenError, has_keys, open_database, writing
from proxy.journal import Journal
from proxy.ledger import Ledger, _Insert
from proxy.migrations import REVISIONS
from proxy.records import OUTCOMES, Row, to_values
from proxy.scaling.hours import Hours, spent
from proxy.scaling.journal import Kept
from proxy.tables import ledger, metadata, usage_hourly
from proxy.waiting import opened_in_time
from tests.databases import running_postgres
from tests.proxy.rows import PRICES, a_row, eventually
from tests.proxy.scaling.engines import section
from tests.proxy.test_ledger import State, added_up, hourly, rows_of, using

Open = Callable[..., Engine]


@pytest.fixture
def opened() -> Iterator[Open]:
    with ExitStack() as engines:

        def open_and_keep(url: str) -> Engine:
            engine = open_database(url)
            engines.callback(engine.dispose)
            return engine

        yield open_and_keep


@pytest.fixture(scope="module")
def own_server() -> Iterator[PostgresServer]:
    """One that the tests of this file may stop."""
    with running_postgres() as server:
        yield server


@pytest.fixture
def state(tmp_path: Path, own_server: PostgresServer) -> Iterator[State]:
    own_server.start_if_stopped()
    engine = open_database(own_server.url(own_server.create()))
    with using(State(tmp_path, engine)) as state:
        yield state
        own_server.start_if_stopped()


# Opening


def not_as_described(engine: Engine) -> list[Any]:
    """What of its tables is not as `proxy.tables` has it."""

    def compare(_: Any, __: Any, column: Column[Any], *___: Any) -> bool | None:
        return False if isinstance(column.type, JSON) else None  # PostgreSQL has no `=` for json

    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": compare})
        return list(compare_metadata(context, metadata))


def test_migrations_make_the_tables_that_the_code_describes(postgres: PostgresServer, opened: Open) -> None:
    assert not_as_described(opened(postgres.url(postgres.create()))) == []


def test_what_failed_before_the_upgrade_is_counted_from_its_rows(
    postgres: PostgresServer, opened: Open
) -> None:
    url = postgres.url(postgres.create())
    engine = opened(url)
    _Insert(engine).rows([to_values(a_row(outcome=outcome)) for outcome in OUTCOMES])
    before = hourly(engine)
    with writing(engine) as connection:
        connection.execute(text("ALTER TABLE usage_hourly DROP COLUMN failed"))
        connection.execute(text("DROP TABLE capacity_hourly"))
        connection.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    assert hourly(opened(url)) == before
    assert before[0][-1] == 4


def test_a_database_of_before_gets_hours_of_capacity_and_keeps_what_it_has(
    postgres: PostgresServer, opened: Open
) -> None:
    url = postgres.url(postgres.create())
    engine = opened(url)
    _Insert(engine).rows([to_values(a_row())])
    before = hourly(engine)
    with writing(engine) as connection:
        connection.execute(text("DROP TABLE capacity_hourly"))
        connection.execute(text("UPDATE alembic_version SET version_num = '0002'"))
    engine = opened(url)
    assert (hourly(engine), not_as_described(engine)) == (before, [])
    hours = Hours(engine, "CNY")
    run = Kept(Standby("a", StandbyState.READY, "a-1-1"), paid_since=3600.0)
    hours.open(run, section("a"), "rush", 3600.0, 0.0)
    for _ in range(2):
        asyncio.run(hours.write(7200.0, 3600.0))
    assert spent(engine, "local", 3600.0, 7200.0, "rush", "CNY") == 36 * 10**9


def test_several_processes_may_open_a_new_database_at_once(postgres: PostgresServer, opened: Open) -> None:
    url = postgres.url(postgres.create())
    code = f"from proxy.database import open_database; open_database({url!r}).dispose()"
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(4)]
    for process in processes:
        _, errors = process.communicate(timeout=50)
        assert (process.returncode, errors) == (0, b"")
    with opened(url).connect() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).all() == [(REVISIONS[-1],)]


def test_who_migrates_is_waited_for_longer_than_for_other_locks(
    postgres: PostgresServer, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy.database, "BUSY_TIMEOUT_S", 0.01)
    url = postgres.url(postgres.create())
    waiting = threading.Thread(target=opened, args=(url,))

    def waits() -> bool:
        query = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'advisory'"
        return bool(postgres.sql(query))

    upgrade = proxy.database._upgrade

    def while_another_waits(connection: Any) -> None:
        if threading.current_thread() is not waiting:
            waiting.start()
            eventually(waits)
            connection.execute(text("SELECT pg_sleep(0.1)"))  # ten times the timeout
        upgrade(connection)

    monkeypatch.setattr(proxy.database, "_upgrade", while_another_waits)
    opened(url)
    waiting.join()
    with opened(url).connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM ledger")).scalar_one() == 0


@pytest.mark.parametrize("name", ["postgresql", "postgres", "postgresql+psycopg"])
def test_a_url_by_each_of_its_names(postgres: PostgresServer, opened: Open, name: str) -> None:
    url = postgres.tcp_url(postgres.create()).replace("postgresql", name)
    engine = opened(url)
    with engine.connect() as connection:
        assert connection.execute(select(func.count()).select_from(ledger)).scalar_one() == 0


@pytest.mark.parametrize(
    ("url", "instead"),
    [
        ("postgresql+psycopg2://tidegate:secret@db/tidegate", "write postgresql://"),
        ("mysql://tidegate:secret@db/tidegate", "postgresql://USER:PASSWORD@HOST/NAME"),
    ],
)
def test_another_driver_or_database_is_refused(url: str, instead: str) -> None:
    with pytest.raises(OpenError, match=instead) as raised:
        open_database(url)
    assert "secret" not in str(raised.value)


def test_a_missing_driver_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(OpenError, match=r"pip install 'tidegate\[postgres\]'"):
        open_database("postgresql://tidegate@db/tidegate")


def test_a_database_that_has_not_every_character_is_refused(postgres: PostgresServer) -> None:
    with pytest.raises(OpenError, match=r"LATIN1.*ENCODING 'UTF8'"):
        open_database(postgres.url(postgres.create(encoding="LATIN1")))


def test_a_newer_schema_is_refused(postgres: PostgresServer, opened: Open) -> None:
    url = postgres.url(postgres.create())
    with writing(opened(url)) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(OpenError, match=r"schema 9999.*newer tidegate"):
        open_database(url)


def test_sessions_wait_briefly_and_commit_for_good(postgres: PostgresServer, opened: Open) -> None:
    name = postgres.create()
    postgres.sql(f"ALTER DATABASE {name} SET synchronous_commit = off")
    with opened(postgres.url(name)).connect() as connection:
        shown = {
            setting: connection.execute(text(f"SHOW {setting}")).scalar_one()
            for setting in ("lock_timeout", "synchronous_commit", "application_name", "client_encoding")
        }
    assert shown == {
        "lock_timeout": "5s",
        "synchronous_commit": "on",
        "application_name": "tidegate",
        "client_encoding": "UTF8",
    }
    postgres.sql(f"ALTER DATABASE {name} SET synchronous_commit = remote_apply")
    with opened(postgres.url(name, application_name="north")).connect() as connection:
        assert connection.execute(text("SHOW synchronous_commit")).scalar_one() == "remote_apply"
        assert connection.execute(text("SHOW application_name")).scalar_one() == "north"


# Who is not let in


def test_nobody_there_is_told_in_one_line(own_server: PostgresServer) -> None:
    own_server.start_if_stopped()
    name = own_server.create()
    own_server.stop()
    for url in (own_server.url(name), own_server.tcp_url(name, user="tidegate:secret")):
        with pytest.raises(AwayError, match=rf"database postgresql.*{name}.*failed") as raised:
            open_database(url)
        assert "\n" not in str(raised.value)
        assert "secret" not in str(raised.value)


def test_a_wrong_password_and_an_unknown_database_are_not_waited_for(postgres: PostgresServer) -> None:
    postgres.sql("DO $$ BEGIN CREATE ROLE guarded LOGIN PASSWORD 'right'; EXCEPTION WHEN OTHERS THEN END $$")
    name = postgres.create()
    for url in (
        postgres.tcp_url(name, user="guarded:wr0ng-secret"),
        postgres.tcp_url("nowhere", user="tidegate:wr0ng-secret"),
        postgres.tcp_url(name, user="guarded:wr0ng-secret", sslmode="what"),
        postgres.tcp_url(name, user="guarded:wr0ng-secret", sslmode="verify-full", sslrootcert="/none"),
        postgres.tcp_url(name, user="guarded:wr0ng-secret", nosuchoption="1"),
    ):
        with pytest.raises(OpenError) as raised:
            open_database(url)
        assert not isinstance(raised.value, AwayError), raised.value
        assert "wr0ng-secret" not in repr(raised.value)


async def test_a_server_that_comes_late_is_waited_for(
    own_server: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    own_server.start_if_stopped()
    url = own_server.tcp_url(own_server.create(), user="tidegate:secret")
    own_server.stop()
    waiting = asyncio.create_task(opened_in_time(url, asyncio.Event(), pause_s=0.01))  # noqa: TID251
    while "waiting for it for up to 30 s" not in caplog.text:  # noqa: ASYNC110 - a log has no event
        await asyncio.sleep(0.01)
    await asyncio.to_thread(own_server.start)
    (await waiting).dispose()
    assert caplog.text.count("waiting for it") == 1, "once"
    assert "secret" not in caplog.text


@pytest.mark.parametrize("stopping", [False, True])
async def test_waiting_ends(own_server: PostgresServer, stopping: bool) -> None:
    own_server.start_if_stopped()
    url = own_server.url(own_server.create())
    own_server.stop()
    stop = asyncio.Event()
    if stopping:
        stop.set()
    with pytest.raises(AwayError):
        await opened_in_time(url, stop, within_s=1e9 if stopping else 0.0)


def test_tls_is_as_the_url_says(tmp_path: Path, opened: Open) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    with running_postgres() as server:
        server.use_tls(certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes())
        server.restart()
        name = server.create()
        strict = server.tcp_url(name, sslmode="verify-full", sslrootcert=str(tmp_path / "ca.pem"))
        engine = opened(strict)
        with engine.connect() as connection:
            row = text("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
            assert connection.execute(row).scalar_one() is True
        engine.dispose()
        with pytest.raises(OpenError, match="certificate verify failed"):
            open_database(strict.replace("ca.pem", "other.pem"))


def test_keys_are_seen_without_a_proxy(postgres: PostgresServer, opened: Open) -> None:
    url = postgres.url(postgres.create())
    assert has_keys(url) is None, "no tables yet, and none are made"
    assert postgres.sql("SELECT to_regclass('keys')", url.partition("?")[0].rpartition("/")[2]) == [(None,)]
    engine = opened(url)
    assert has_keys(url) is False
    create_key(engine, bytes(32), tenant="acme")
    config = Config.model_validate(
        {"database": url, "backends": [{"name": "a", "url": "http://127.0.0.1:1"}]}
    )
    assert _has_keys(config) is True


# Rows


def test_text_that_postgresql_has_not_is_replaced(state: State) -> None:
    odd = a_row(served_model="a\0b", model="a\0b", reason="\\u0000", tenant="\U0001f30a", backend="")
    rows = [a_row(), odd, a_row()]
    _Insert(state.engine).rows([to_values(row) for row in rows])
    rows[1].served_model = "a\ufffdb"
    assert state.rows() == rows, "what was asked for stands in the detail as it came"
    assert hourly(state.engine) == added_up(rows)


def test_numbers_come_back_as_they_were(state: State) -> None:
    rows = [
        a_row(cost_nano=2**50 - 1, prompt_tokens=2**31 - 1, arrived=1_700_000_000.123456, total_s=1e-6),
        a_row(ttft_s=None, total_s=86_400.000001, status=0, arrived=0.0),
        a_row(ttft_s=0.1 + 0.2, total_s=1 / 3),
    ]
    values = [to_values(row) for row in rows]
    _Insert(state.engine).rows(values)
    columns = [column for column in ledger.columns if column.name != "id"]
    with state.engine.connect() as connection:
        found = connection.execute(select(*columns).order_by(ledger.c.id)).all()
    assert [tuple(row) for row in found] == values


async def test_rows_wait_while_a_table_is_locked(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy.database, "BUSY_TIMEOUT_S", 0.01)
    engine = open_database(state.engine.url.render_as_string(hide_password=False))
    state.engine.dispose()
    state.engine = engine
    moved = state.start()
    rows = [a_row() for _ in range(100)]
    with psycopg.connect(**_parameters(engine)) as other:
        other.execute("LOCK TABLE usage_hourly IN ACCESS EXCLUSIVE MODE")
        for row in rows:
            moved.journal.close(row)
        eventually(lambda: "lock timeout" in moved.trouble)
        assert (moved.failed, moved.refused) == ("", 0), "requests go on"
    eventually(lambda: moved.lag == 0)
    assert state.rows() == rows
    assert hourly(engine) == added_up(rows)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_rows_wait_while_the_server_is_stopped(
    state: State, own_server: PostgresServer, mode: str
) -> None:
    moved = state.start(most_waiting=150)
    rows = [a_row() for _ in range(200)]
    for row in rows[:50]:
        moved.journal.close(row)
    eventually(lambda: len(state.rows()) == 50 and moved.lag == 0)
    own_server.stop(mode)
    for row in rows[50:]:
        moved.journal.close(row)
    await moved.journal.synced()
    eventually(lambda: moved.lag == 150 and moved.trouble != "")
    assert moved.failed == ""
    own_server.start()
    eventually(lambda: moved.lag == 0)
    assert (moved.failed, moved.trouble, moved.refused) == ("", "", 0)
    assert state.rows() == rows
    assert hourly(state.engine) == added_up(rows)


async def test_what_a_stopped_server_never_took_is_there_after_a_restart(
    state: State, own_server: PostgresServer
) -> None:
    moved = state.start()
    own_server.stop()
    rows = [a_row() for _ in range(100)]
    for row in rows:
        moved.journal.close(row)
    state.stop(timeout_s=0.2)
    assert moved.lag == 100
    own_server.start()
    state.engine.dispose()
    state.start()
    assert state.replayed.rows == 100
    assert state.rows() == rows


async def test_a_commit_that_nobody_confirmed_is_not_made_twice(state: State) -> None:
    """The connection breaks after the server has committed: the same rows come again."""
    moved = state.start()
    broken: list[str] = []

    @event.listens_for(state.engine, "commit")
    def commit_and_break(connection: Any) -> None:
        if not broken:
            connection.connection.dbapi_connection.commit()
            broken.append("once")
            raise OperationalError("COMMIT", {}, psycopg.OperationalError("server closed the connection"))

    rows = [a_row() for _ in range(50)]
    moved.take([to_values(row) for row in rows])
    eventually(lambda: moved.lag == 0)
    assert broken == ["once"]
    assert state.rows() == rows
    assert hourly(state.engine) == added_up(rows)


@pytest.mark.parametrize(
    ("before", "after", "trouble"),
    [
        (
            "ALTER TABLE ledger RENAME TO elsewhere",
            "ALTER TABLE elsewhere RENAME TO ledger",
            "does not exist",
        ),
        (
            "ALTER DATABASE {0} SET default_transaction_read_only = on",
            "ALTER DATABASE {0} RESET default_transaction_read_only",
            "read-only",
        ),
    ],
    ids=["no table", "read-only"],
)
async def test_what_can_be_mended_costs_no_rows(
    state: State, own_server: PostgresServer, before: str, after: str, trouble: str
) -> None:
    moved = state.start()
    name = str(state.engine.url.database)
    rows = [a_row() for _ in range(20)]
    own_server.sql(before.format(name), name)
    state.engine.dispose()  # settings of a database hold for new connections
    for row in rows:
        moved.journal.close(row)
    eventually(lambda: trouble in moved.trouble)
    assert moved.refused == 0
    own_server.sql(after.format(name), name if "TABLE" in after else "postgres")
    state.engine.dispose()
    eventually(lambda: moved.lag == 0)
    assert (moved.refused, state.rows()) == (0, rows)


async def test_several_ledgers_on_one_database_lose_and_double_nothing(
    tmp_path: Path, postgres: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    """All add to the same hours, in orders of their own."""
    url = postgres.url(postgres.create())
    engines = [open_database(url) for _ in range(3)]
    ledgers: list[Ledger] = []
    rows: list[Row] = []
    for number, engine in enumerate(engines):
        moved = Ledger(engine, Journal(tmp_path / str(number)), PRICES, interval_s=0.0)
        moved.start(asyncio.get_running_loop(), print)
        ledgers.append(moved)
    for turn in range(40):
        for number, moved in enumerate(ledgers):
            tenants = range(12) if number % 2 else reversed(range(12))
            batch = [a_row(tenant=f"t{i}", instance=moved.journal.instance, cost_nano=turn) for i in tenants]
            rows += batch
            moved.take([to_values(row) for row in batch])
    for moved in ledgers:
        await asyncio.to_thread(moved.stop)
    assert len({moved.journal.instance for moved in ledgers}) == 3
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []
    found = rows_of(engines[0])
    assert sorted(row.op for row in found) == sorted(row.op for row in rows)
    assert hourly(engines[0]) == added_up(rows)
    for engine in engines:
        engine.dispose()


def test_sums_are_locked_in_one_order(state: State) -> None:
    """Two that lock the same hours crosswise would wait for each other until one is cancelled."""
    seen: list[str] = []

    @event.listens_for(state.engine, "before_cursor_execute")
    def note(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        if statement.startswith(f"INSERT INTO {usage_hourly.name}"):
            seen.append(parameters[0])

    for tenants in ("abc", "cab"):
        _Insert(state.engine).rows([to_values(a_row(tenant=tenant)) for tenant in tenants])
    assert seen[0] == seen[1]


def _parameters(engine: Engine) -> dict[str, Any]:
    url = engine.url
    return {
        "host": url.query["host"],
        "port": url.query["port"],
        "user": url.username,
        "dbname": url.database,
    }
