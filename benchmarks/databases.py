"""The database of a benchmark: one that is there, or a PostgreSQL started for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.postgres import PostgresServer, server_programs
from benchmarks.processes import StartError

NEW = "new"


@contextmanager
def database_of(given: str) -> Iterator[str]:
    """The URL to use: as given, or for `new` that of a server which syncs every commit and is gone afterwards.

    Raises StartError: there is no PostgreSQL to start.
    """
    if given != NEW:
        yield given
        return
    programs = server_programs()
    if programs is None:
        raise StartError("there is no PostgreSQL server here: apt-get install postgresql")
    with PostgresServer(programs, durable=True) as server:
        yield server.url(server.create())
