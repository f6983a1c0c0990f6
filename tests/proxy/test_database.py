from __future__ import annotations

import fcntl
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, insert, select, text
from sqlalchemy.exc import IntegrityError

import proxy.database
import proxy.migrations
from proxy.database import DATABASE_FILE, OpenError, open_database, writing
from proxy.ledger import _Insert
from proxy.migrations import REVISIONS
from proxy.records import OUTCOMES, to_values
from proxy.tables import keys, metadata, settings, usage_hourly
from tests.proxy.rows import a_row

Open = Callable[..., Engine]


@pytest.fixture
def opened() -> Iterator[Open]:
    engines: list[Engine] = []

    def open_and_keep(target: str | Path) -> Engine:
        engines.append(open_database(target))
        return engines[-1]

    yield open_and_keep
    for engine in engines:
        engine.dispose()


def pragma(engine: Engine, name: str) -> object:
    with engine.connect() as connection:
        return connection.execute(text(f"PRAGMA {name}")).scalar()


def test_migrations_make_the_tables_that_the_code_describes(tmp_path: Path, opened: Open) -> None:
    with opened(tmp_path).connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, metadata) == []


def test_the_listed_revisions_are_those_there_are() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(proxy.migrations.__file__).parent))
    scripts = ScriptDirectory.from_config(config)
    assert tuple(script.revision for script in reversed(list(scripts.walk_revisions()))) == REVISIONS


def test_what_failed_before_the_upgrade_is_counted_from_its_rows(tmp_path: Path, opened: Open) -> None:
    engine = opened(tmp_path)
    insert_rows = _Insert(engine).rows
    insert_rows(
        [to_values(a_row(outcome=outcome, arrived=3600.0 * hour)) for outcome in OUTCOMES for hour in (1, 2)]
    )
    insert_rows([to_values(a_row(outcome="cut", backend="", arrived=3600.0))])
    sums = select(usage_hourly).order_by(*usage_hourly.primary_key)
    with engine.connect() as connection:
        before = connection.execute(sums).all()
    with writing(engine) as connection:
        connection.execute(text("ALTER TABLE usage_hourly DROP COLUMN failed"))
        connection.execute(text("DROP TABLE capacity_hourly"))
        connection.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    engine.dispose()
    with opened(tmp_path).connect() as connection:
        assert connection.execute(sums).all() == before
    assert [row.failed for row in before] == [1, 4, 4]


def test_a_directory_becomes_a_safe_sqlite_file(tmp_path: Path, opened: Open) -> None:
    engine = opened(tmp_path / "new" / "state")
    assert pragma(engine, "journal_mode") == "wal"
    assert pragma(engine, "synchronous") == 2, "FULL"
    assert pragma(engine, "foreign_keys") == 1
    state = tmp_path / "new" / "state"
    assert state.stat().st_mode & 0o077 == 0
    assert (state / DATABASE_FILE).stat().st_mode & 0o077 == 0


def test_an_older_file_keeps_its_small_pages(tmp_path: Path, opened: Open) -> None:
    assert pragma(opened(tmp_path / "new"), "page_size") == 16384
    assert pragma(opened(tmp_path / "new"), "wal_autocheckpoint") == 1024
    with closing(sqlite3.connect(tmp_path / DATABASE_FILE)) as old:
        old.execute("PRAGMA page_size = 4096")
        old.execute("CREATE TABLE something (x)")
    engine = opened(tmp_path)
    assert pragma(engine, "page_size") == 4096
    assert pragma(engine, "wal_autocheckpoint") == 4096, "16 MiB as well"
    assert pragma(engine, "journal_mode") == "wal"


def test_what_is_written_is_there_the_next_time(tmp_path: Path, opened: Open) -> None:
    with writing(opened(tmp_path)) as connection:
        connection.execute(insert(settings).values(name="salt", value="ab"))
    for target in (tmp_path, str(tmp_path), f"sqlite:///{tmp_path / DATABASE_FILE}"):
        with opened(target).connect() as connection:
            assert connection.execute(select(settings.c.value)).scalar_one() == "ab"


def test_a_transaction_that_fails_leaves_nothing(tmp_path: Path, opened: Open) -> None:
    engine = opened(tmp_path)

    def write_twice() -> None:
        with writing(engine) as connection:
            for _ in range(2):
                connection.execute(insert(settings).values(name="salt", value="ab"))

    with pytest.raises(IntegrityError):
        write_twice()
    with engine.connect() as connection:
        assert connection.execute(select(settings)).all() == []


def test_writing_holds_the_lock_from_its_beginning(tmp_path: Path, opened: Open) -> None:
    engine = opened(tmp_path)
    with closing(sqlite3.connect(tmp_path / DATABASE_FILE, timeout=0, isolation_level=None)) as other:
        with writing(engine), pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        with engine.connect() as reader, reader.begin():
            reader.execute(select(settings)).all()
            other.execute("BEGIN IMMEDIATE")
            other.execute("ROLLBACK")


def test_a_key_can_be_kept(tmp_path: Path, opened: Open) -> None:
    engine = opened(tmp_path)
    row = {
        "id": "k1",
        "tenant": "acme",
        "name": "",
        "digest": b"\0\1",
        "created": 1.5,
        "data_class": "public",
    }
    with writing(engine) as connection:
        connection.execute(insert(keys).values(**row, models=["a", "b"], labels={"team": "x"}))
        connection.execute(insert(keys).values(**(row | {"id": "k2"})))
    with engine.connect() as connection:
        first, second = connection.execute(select(keys).order_by(keys.c.id)).all()
    assert (first.models, first.labels, first.digest, first.priority) == (
        ["a", "b"],
        {"team": "x"},
        b"\0\1",
        0,
    )
    assert (second.models, second.labels, second.budget_nano) == (None, {}, None)


def test_several_processes_may_open_a_new_state_at_once(tmp_path: Path, opened: Open) -> None:
    code = f"from proxy.database import open_database; open_database({str(tmp_path)!r}).dispose()"
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(4)]
    for process in processes:
        _, errors = process.communicate(timeout=50)
        assert (process.returncode, errors) == (0, b"")
    with opened(tmp_path).connect() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).all() == [(REVISIONS[-1],)]


def test_only_one_process_migrates_at_a_time(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def others_must_wait(connection: Connection) -> None:
        with (tmp_path / f"{DATABASE_FILE}.lock").open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        upgrade(connection)
        upgraded.append(True)

    upgraded: list[bool] = []
    upgrade = proxy.database._upgrade
    monkeypatch.setattr(proxy.database, "_upgrade", others_must_wait)
    opened(tmp_path)
    opened(tmp_path)
    assert upgraded == [True]


def test_a_newer_schema_is_refused(tmp_path: Path, opened: Open) -> None:
    with writing(opened(tmp_path)) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(OpenError, match=rf"schema 9999.*up to {REVISIONS[-1]}.*newer tidegate"):
        open_database(tmp_path)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / DATABASE_FILE).write_bytes(b"something else entirely" * 100)
    with pytest.raises(OpenError, match="not a database"):
        open_database(tmp_path)


def test_a_damaged_database_is_refused(tmp_path: Path, opened: Open) -> None:
    engine = opened(tmp_path)
    with writing(engine) as connection:
        connection.execute(insert(settings), [{"name": f"n{i}", "value": "x" * 500} for i in range(200)])
    engine.dispose()
    file = tmp_path / DATABASE_FILE
    data = bytearray(file.read_bytes())
    for page in range(12, len(data) // 4096):
        data[page * 4096 : page * 4096 + 64] = b"\xff" * 64
    file.write_bytes(data)
    with pytest.raises(OpenError, match=r"damaged|malformed"):
        open_database(tmp_path)
    open_database(tmp_path, check=False).dispose()


@pytest.mark.parametrize("target", ["sqlite://", "sqlite:///:memory:"])
def test_a_database_in_memory_is_refused(target: str) -> None:
    with pytest.raises(OpenError, match="needs a file"):
        open_database(target)


@pytest.mark.parametrize("target", ["://", "what is this://", "nosuchdatabase://host/x"])
def test_a_bad_url_is_refused(target: str) -> None:
    with pytest.raises(OpenError, match="database"):
        open_database(target)


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OpenError, match="file"):
        open_database(tmp_path / "file" / "state")


def test_an_error_tells_no_password(tmp_path: Path) -> None:
    with pytest.raises(OpenError) as raised:
        open_database(f"sqlite://user:secret@/{tmp_path}/none/there/x.db?mode=ro&uri=true")
    assert "secret" not in str(raised.value)
