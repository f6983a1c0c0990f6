"""Both databases that the ledger is kept in, by one fixture: what a test says of one holds of the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import psycopg
import pytest
from sqlalchemy import Engine, event

from benchmarks.postgres import PostgresServer, server_programs
from proxy.database import open_database
from tests.proxy.rows import empty_database

EMPTY = "TRUNCATE ledger, usage_hourly, keys, settings RESTART IDENTITY"
SQLITE, POSTGRESQL = "sqlite", "postgresql"


class NewDatabase(Protocol):
    """Makes a database of its own, migrated and empty; `directory`: where one that is a file stands.

    Whoever disposes of the engine gives the database back.
    """

    def __call__(self, directory: Path) -> Engine: ...


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL for all tests; who stops it starts one of his own."""
    with running_postgres() as server:
        yield server


def running_postgres() -> PostgresServer:
    """A server of one's own, started by `with`. Skips the test where there is no PostgreSQL."""
    programs = server_programs()
    if programs is None:
        pytest.skip("NOT RUN: there is no PostgreSQL server here; `apt-get install postgresql` installs one")
    return PostgresServer(programs)


@pytest.fixture(scope="session", params=[SQLITE, POSTGRESQL])
def new_database(request: pytest.FixtureRequest) -> Iterator[NewDatabase]:
    """Every test that uses this runs over SQLite and over PostgreSQL."""
    if request.param == SQLITE:
        yield empty_database
        return
    server: PostgresServer = request.getfixturevalue("postgres")
    template = server.create()
    open_database(server.url(template)).dispose()
    free: list[str] = []
    with ExitStack() as engines:

        def emptied() -> str | None:
            """One that was given back, unless its test took tables away."""
            while free:
                name = free.pop()
                try:
                    server.sql(EMPTY, name)
                except psycopg.errors.UndefinedTable:
                    continue
                return name
            return None

        def new_postgres(directory: Path) -> Engine:
            name = emptied() or server.create(template)
            engine = open_database(server.url(name))
            event.listen(engine, "engine_disposed", lambda _: free.append(name), once=True)
            engines.callback(engine.dispose)
            return engine

        yield new_postgres


def url_of(engine: Engine) -> str:
    """What opens the same database again."""
    return engine.url.render_as_string(hide_password=False)
