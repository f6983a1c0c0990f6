"""Which database a proxy keeps its ledger in, noted in its state directory.

A command that is given the directory alone (`--state`) must not read an SQLite file there, or make one, while the
proxy has its keys elsewhere: a key revoked in the one goes on being accepted by the other.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from sqlalchemy import make_url

from proxy.database import DATABASE_FILE
from proxy.masking import database_shown

NOTE_FILE = "database.json"


def note_database(state: Path, database: str | None) -> None:
    """Note the URL of the database, without its password and parameters; one that stands in the state directory
    itself needs no note. Raises OSError."""
    path = state / NOTE_FILE
    if database is None or _is_the_usual(database, state):
        path.unlink(missing_ok=True)
        return
    temporary = path.with_suffix(".tmp")
    handle = os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(handle, "w", encoding="utf-8") as file:
        json.dump({"database": database_shown(database)}, file)
    temporary.replace(path)


def noted_database(state: Path) -> str | None:
    """The URL that was noted, as it is shown; None: the ledger is in the state directory, or no proxy has run."""
    try:
        return str(json.loads((state / NOTE_FILE).read_text(encoding="utf-8"))["database"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_the_usual(database: str, state: Path) -> bool:
    url = make_url(database)
    if url.get_backend_name() != "sqlite" or url.database is None:
        return False
    return Path(url.database).absolute() == (state / DATABASE_FILE).absolute()
