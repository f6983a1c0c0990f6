"""What PostgreSQL needs beyond what it shares with SQLite: its URLs, its sessions, and how rows are put into it.

Rows go over as one JSON text to a block and are taken apart by the database: the driver would have to convert a
parameter per column, in the interpreter that serves requests, and its statement would be another one for every
number of rows and every size of their integers, so that none stayed prepared.

Sessions wait for a lock no longer than SQLite would, so that whoever is locked out says so and tries again. They
never commit asynchronously: the journal gives up what the database has called committed. `jsonb` and `text` have no
NUL, which is in nothing but names of models that clients made up; it becomes U+FFFD.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from sqlalchemy import URL, Connection, Engine, event, text
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from policies.yamlproblems import closest
from proxy.records import COLUMNS, Values
from proxy.tables import HOURLY_GROUPS, HOURLY_SUMS, ledger, usage_hourly

NAMES = ("postgresql", "postgres", "postgresql+psycopg")
"""What a URL may begin with."""
DRIVER = "postgresql+psycopg"
SESSION = {
    "connect_timeout": "5",
    "client_encoding": "utf8",
    "application_name": "tidegate",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "20000",
}
"""libpq's parameters where the URL does not give them: a server that is gone without a word is noticed within
half a minute (https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS)."""
MIGRATION_LOCK = 0x7469646567617465
"""Key of the advisory lock that whoever migrates holds: `tidegate` in ASCII."""
UNFIT = ("22", "23")
"""Classes of SQLSTATE that blame the row: data exceptions and violated constraints."""
_AWAY = re.compile(
    r"refused|timeout|timed out|socket \S+ failed: No such file|unreachable|No route|reset by peer|server closed|"
    r"not translate host name|not resolve|the database system is|connection slots|too many (?:clients|connections)"
)
"""In what libpq says of a server that is not there, not there yet, or full."""

_PSYCOPG = ("autocommit", "prepare_threshold")
"""Parameters that are not libpq's but the driver's own."""

Sums = Mapping[tuple[Any, ...], Sequence[int]]


def is_postgres(url: URL) -> bool:
    """Whether a URL means PostgreSQL, by any name or driver."""
    return url.drivername.partition("+")[0] in ("postgresql", "postgres")


def with_defaults(url: URL) -> URL:
    """The URL with our driver, and parameters where it says nothing of them."""
    missing = {name: value for name, value in SESSION.items() if name not in url.query}
    return url.set(drivername=DRIVER).update_query_dict(missing)


def unknown_parameter(url: URL) -> str:
    """A parameter of the URL that libpq does not know, and what may be meant; empty: it knows them all."""
    # Imported here: the driver is not always there.
    from psycopg.pq import Conninfo

    known = [option.keyword.decode() for option in Conninfo.get_defaults()]
    for name in url.query:
        if name not in known and name not in _PSYCOPG:
            meant = closest(name, known)
            return f"'{name}'" + (f" (did you mean '{meant}'?)" if meant else "")
    return ""


def set_up_sessions(engine: Engine, lock_timeout_s: float) -> None:
    """Set up every connection that the engine opens."""

    @event.listens_for(engine, "connect")
    def connected(dbapi: PoolProxiedConnection, _: ConnectionPoolEntry) -> None:
        cursor = dbapi.cursor()
        cursor.execute(
            "SELECT set_config('lock_timeout', %s, false), set_config('synchronous_commit', "
            "coalesce(nullif(current_setting('synchronous_commit'), 'off'), 'on'), false)",
            (f"{int(lock_timeout_s * 1000)}ms",),
        )
        cursor.close()
        dbapi.commit()


def encoding(connection: Connection) -> str:
    """In which the database keeps text: `UTF8`, unless somebody chose another one."""
    name: str = connection.execute(text("SHOW server_encoding")).scalar_one()
    return name


def lock_migrations(connection: Connection) -> None:
    """Keep others from migrating until this transaction ends, however long one that already does so takes."""
    connection.execute(text("SET LOCAL lock_timeout = 0"))
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})


def is_away(error: Exception) -> bool:
    """Whether a connection could not be made, or broke, for a reason that may pass by itself: nobody listens, or it
    starts; not: no such user or database, a wrong password."""
    return isinstance(error, OperationalError) and _AWAY.search(str(error.orig)) is not None


def may_pass(error: Exception) -> bool:
    """Whether the same insert may succeed later: all but what is wrong with a row.

    So also a server that only reads (as after a failover), an I/O error (a server that cannot sync crashes and
    recovers what it had committed), a table that somebody took away: they can be mended, and the rows wait.
    """
    if not isinstance(error, DBAPIError):
        return isinstance(error, MemoryError)
    code = getattr(error.orig, "sqlstate", None)
    if code is None:  # it is the driver's own
        return isinstance(error, OperationalError | InterfaceError)
    return str(code)[:2] not in UNFIT


def storable(rows: list[Values]) -> tuple[str, list[Values]]:
    """-> rows as JSON, and as they will be stored."""
    document = orjson.dumps(rows)
    if rb"\u0000" in document:
        rows = [
            tuple(value.replace("\0", "\ufffd") if isinstance(value, str) else value for value in row)
            for row in rows
        ]
        document = orjson.dumps(rows)
    return document.decode(), rows


def insert_rows(connection: Connection, document: str) -> int:
    """Insert rows that are not there yet. -> how many those were."""
    return connection.exec_driver_sql(_INSERT, (document,)).rowcount


def add_sums(connection: Connection, sums: Sums) -> None:
    """Add sums to their hours, always in the same order: two proxies that each had its own could wait for each
    other."""
    rows = [(*group, *figures) for group, figures in sorted(sums.items(), key=lambda item: item[0])]
    connection.exec_driver_sql(_ADD_UP, (orjson.dumps(rows).decode(),))


def _elements(table: Any, names: Sequence[str]) -> str:
    """`SELECT` of a JSON array's arrays as columns."""
    dialect: Any = PGDialect_psycopg
    columns = ", ".join(
        f"(row ->> {place})::{table.c[name].type.compile(dialect())}" for place, name in enumerate(names)
    )
    # Only names of columns go into it.
    return f"({', '.join(names)}) SELECT {columns} FROM jsonb_array_elements(%s::jsonb) AS row"  # noqa: S608


_INSERT = f"INSERT INTO {ledger.name} {_elements(ledger, (*COLUMNS, 'detail'))} ON CONFLICT (op) DO NOTHING"
_ADD_UP = (
    f"INSERT INTO {usage_hourly.name} {_elements(usage_hourly, (*HOURLY_GROUPS, *HOURLY_SUMS))} "
    f"ON CONFLICT ({', '.join(HOURLY_GROUPS)}) DO UPDATE SET "
    + ", ".join(f"{name} = {usage_hourly.name}.{name} + excluded.{name}" for name in HOURLY_SUMS)
)
