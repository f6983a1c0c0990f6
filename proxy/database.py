"""Opens the database: connects, secures, migrates.

SQLite stands in the state directory, in WAL mode so that reports read while the proxy writes, and with
`synchronous=FULL`: with NORMAL, a power loss takes commits with it that were already acknowledged
(https://www.sqlite.org/pragma.html#pragma_synchronous). PostgreSQL comes as a URL; see `postgres.py`.

Python's sqlite3 would begin transactions on its own, late and only before some statements. That is switched
off: a transaction begins where SQLAlchemy begins it. It is deferred, which is right for readers and for
writers whose first statement writes; a writer that must read first uses `writing`, since a deferred
transaction that has read cannot wait for another writer, it fails.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, select, table, text
from sqlalchemy import column as sql_column
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from proxy import postgres
from proxy.masking import database_shown
from proxy.migrations import REVISIONS

DATABASE_FILE = "tidegate.db"
BUSY_TIMEOUT_S = 5.0
PAGE_BYTES = 16384
"""Of new databases. SQLite writes a page to the WAL with two system calls and copies it back with two more: rows
cost a quarter less CPU than with pages of 4 KiB. Larger ones gain little, and a lone row writes four of them."""
WAL_CHECKPOINT_BYTES = 16 * 1024 * 1024
"""The WAL is written back to the database once it has grown by so much."""
WAL_KEEP_BYTES = 64 * 1024 * 1024
"""A WAL that a long reader has made bigger than this is cut to it afterwards."""

_version_table = table("alembic_version", sql_column("version_num"))


class OpenError(RuntimeError):
    """The database cannot be used; the message says why and what to do."""


class AwayError(OpenError):
    """Nobody answers where the database should be, or it only starts: it may be there later."""


def open_database(target: str | Path, *, check: bool = True) -> Engine:
    """Open and migrate. `target`: a directory (SQLite in it, made if missing) or a SQLAlchemy URL.

    `check` reads an SQLite file whole to see that it is sound (a second per gigabyte or so); reports do
    without. Raises OpenError: not reachable (AwayError), damaged, written by a newer version.
    """
    url = _url(target)
    engine = _engine(url)
    try:
        if url.get_backend_name() == "sqlite":
            path = Path(str(url.database))
            _prepare_sqlite(engine, path)
            with _one_at_a_time(path):
                _use_wal(path)
                _migrate(engine)
            if check:
                _quick_check(engine)
        else:
            postgres.set_up_sessions(engine, BUSY_TIMEOUT_S)
            _migrate(engine)
    except (DBAPIError, sqlite3.Error, OSError) as error:
        engine.dispose()
        reason = said(error) if isinstance(error, DBAPIError) else str(error)
        kind = AwayError if postgres.is_postgres(url) and postgres.is_away(error) else OpenError
        raise kind(f"database {database_shown(url)}: {reason}") from error
    except BaseException:
        engine.dispose()
        raise
    return engine


def check_target(target: str | Path) -> None:
    """Raise OpenError for a URL that cannot be used, whoever may answer there. Connects to nobody."""
    _engine(_url(target)).dispose()


def has_keys(target: str | Path) -> bool | None:
    """Whether a key was ever made there; None: it cannot be seen without changing anything.

    Neither makes nor migrates a database. Raises OpenError: `target` is no URL.
    """
    url = _url(target)
    if postgres.is_postgres(url):
        return _postgres_has_keys(url)
    path = Path(str(url.database)).absolute()
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
            return bool(connection.execute("SELECT EXISTS (SELECT 1 FROM keys)").fetchone()[0])
    except sqlite3.Error:
        return None


def said_by_keys(folder: Path) -> list[tuple[str, str, dict[str, str]]]:
    """Tenant, data class and labels of each key in a state directory that is not revoked.

    Empty: there are none, or they cannot be seen without changing anything.
    """
    statement = "SELECT tenant, data_class, labels FROM keys WHERE revoked IS NULL"
    path = (folder / DATABASE_FILE).absolute()
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
            rows = connection.execute(statement).fetchall()
    except sqlite3.Error:
        return []
    return [(tenant, data_class, json.loads(labels)) for tenant, data_class, labels in rows]


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction that will write: it holds SQLite's write lock from its beginning. Commits at the end."""
    with engine.connect().execution_options(tidegate_writing=True) as connection, connection.begin():
        yield connection


def _url(target: str | Path) -> URL:
    if isinstance(target, str) and "://" in target:
        try:
            url = make_url(target)
        except (ArgumentError, ValueError):  # what is wrong may be the password: it is not repeated
            raise OpenError(f"database: {database_shown(target)} is not a SQLAlchemy URL") from None
        return _known(url)
    return URL.create("sqlite", database=str(Path(target) / DATABASE_FILE))


def _known(url: URL) -> URL:
    """The URL of a database that we know, with our driver."""
    if postgres.is_postgres(url):
        if url.drivername not in postgres.NAMES:
            raise OpenError(f"database: write postgresql://…, not {url.drivername}://…")
        return postgres.with_defaults(url)
    if url.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise OpenError(
            f"database {database_shown(url)}: the ledger is kept in SQLite or PostgreSQL; "
            "write sqlite:///PATH or postgresql://USER:PASSWORD@HOST/NAME"
        )
    if url.database in (None, "", ":memory:"):
        raise OpenError("database: SQLite needs a file, since what is in memory survives nothing")
    return url


def _engine(url: URL) -> Engine:
    try:
        engine = create_engine(url)
    except ImportError as error:
        if postgres.is_postgres(url):
            raise OpenError(
                f"database {database_shown(url)}: PostgreSQL needs a driver: pip install 'tidegate[postgres]', "
                "or '.[postgres]' in a checkout"
            ) from None
        raise OpenError(f"database {database_shown(url)}: {error}") from None
    except ArgumentError as error:
        raise OpenError(f"database {database_shown(url)}: {error}") from None
    if postgres.is_postgres(url) and (unknown := postgres.unknown_parameter(url)):
        raise OpenError(f"database {database_shown(url)}: its driver knows no parameter {unknown}")
    return engine


def _postgres_has_keys(url: URL) -> bool | None:
    engine = _engine(url)
    try:
        with engine.connect() as connection:
            return bool(connection.execute(text("SELECT EXISTS (SELECT FROM keys)")).scalar())
    except DBAPIError:
        return None
    finally:
        engine.dispose()


def _prepare_sqlite(engine: Engine, path: Path) -> None:
    """Make directory and file, for their owner alone, and set up every connection."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))

    @event.listens_for(engine, "connect")
    def connected(dbapi: PoolProxiedConnection, _: ConnectionPoolEntry) -> None:
        dbapi.isolation_level = None  # type: ignore[attr-defined]
        cursor = dbapi.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}")
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute("PRAGMA foreign_keys = ON")
        (page_bytes,) = cursor.execute("PRAGMA page_size").fetchone()
        cursor.execute(f"PRAGMA wal_autocheckpoint = {WAL_CHECKPOINT_BYTES // page_bytes}")
        cursor.execute(f"PRAGMA journal_size_limit = {WAL_KEEP_BYTES}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        immediate = connection.get_execution_options().get("tidegate_writing", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Keep other processes out while the mode or the schema of an SQLite file may change."""
    lock = os.open(path.with_name(path.name + ".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _migrate(engine: Engine) -> None:
    is_postgres = postgres.is_postgres(engine.url)
    with engine.connect() as connection:
        revision = _revision(connection)
        if is_postgres and (encoding := postgres.encoding(connection)) != "UTF8":
            raise OpenError(
                f"database {database_shown(engine.url)} keeps text in {encoding}, which has not every character: "
                "make one with CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0"
            )
    if revision is None or _is_old(revision):
        with writing(engine) as connection:
            if is_postgres:
                postgres.lock_migrations(connection)
            revision = _revision(connection)  # another process may have been faster
            if revision is None or _is_old(revision):
                _upgrade(connection)


def _use_wal(path: Path) -> None:
    """The mode is kept in the file; it cannot be changed inside a transaction, so not through the engine."""
    with closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")  # of an empty file; others keep theirs
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise OpenError(
            f"database {path}: its file system cannot do write-ahead logging (SQLite stays in mode {mode}); "
            "put the state directory on a local disk"
        )


def _revision(connection: Connection) -> str | None:
    """The schema's revision; None: the database is empty."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.execute(select(_version_table.c.version_num)).scalar()
    return revision


def _is_old(revision: str) -> bool:
    if revision not in REVISIONS:
        raise OpenError(
            f"the database has schema {revision}, this version of tidegate knows them up to {REVISIONS[-1]}: "
            "it was written by a newer tidegate; install that one, or restore a backup"
        )
    return revision != REVISIONS[-1]


def _upgrade(connection: Connection) -> None:
    # Imported here: it is a tenth of a second that only a changed schema is worth.
    from alembic.command import upgrade
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    config.attributes["connection"] = connection
    upgrade(config, "head")


def _quick_check(engine: Engine) -> None:
    with engine.connect() as connection:
        problem = connection.execute(text("PRAGMA quick_check(1)")).scalar()
    if problem != "ok":
        raise OpenError(f"database {engine.url.database} is damaged: {problem}; restore it from a backup")


def said(error: Exception) -> str:
    """What the driver said, in one line and without SQLAlchemy's frame; of other errors, what they are."""
    return " ".join(str(error.orig).split()) if isinstance(error, DBAPIError) else repr(error)
