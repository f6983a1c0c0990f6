"""How many rows a second the ledger takes, and what a row costs this process.

    python -m benchmarks.ledger                       # SQLite
    python -m benchmarks.ledger --database new        # a PostgreSQL started for it, which syncs every commit
    python -m benchmarks.ledger --database postgresql://tidegate@db/bench

Whole batches of the ledger's thread, of 16 tenants and 2 backends, each in one transaction with its sums. CPU time
is that of the inserting thread: what an event loop beside it may have to wait for. A database that is given must be
empty.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass

from benchmarks.databases import database_of
from benchmarks.processes import StartError
from benchmarks.rows import a_row
from benchmarks.summary import Spread, facts_line
from proxy.database import open_database
from proxy.ledger import BATCH_ROWS, _Insert
from proxy.records import Values, to_values

ROUNDS = 5
BATCHES = 5
"""Of one round."""


@dataclass
class Figures:
    """Of each round."""

    rows_per_s: list[float]
    cpu_us: list[float]
    """Microseconds of this process per row."""


def batch() -> list[Values]:
    """As many rows as go into one transaction."""
    return [
        to_values(a_row(tenant=f"tenant-{n % 16}", backend=("nanjing", "xian")[n // 16 % 2]))
        for n in range(BATCH_ROWS)
    ]


def measure(target: str, rounds: int) -> Figures:
    """Insert, and time it. `target` as for `open_database`."""
    engine = open_database(target)
    insert = _Insert(engine)
    figures = Figures([], [])
    insert.rows(batch())  # statements are prepared, pages are there
    for _ in range(rounds):
        batches = [batch() for _ in range(BATCHES)]
        began, cpu = time.perf_counter(), time.thread_time()
        for rows in batches:
            insert.rows(rows)
        took, used = time.perf_counter() - began, time.thread_time() - cpu
        count = BATCHES * BATCH_ROWS
        figures.rows_per_s.append(count / took)
        figures.cpu_us.append(used / count * 1e6)
    engine.dispose()
    return figures


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Rows a second into the ledger.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    parser.add_argument(
        "--database", default="", metavar="URL", help="default: SQLite; `new`: a PostgreSQL started for this"
    )
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder, database_of(arguments.database) as database:
            figures = measure(database or folder, arguments.rounds)
    except StartError as error:
        print(error)
        return 2
    print(f"{Spread.of(figures.rows_per_s).text(0)} rows/s")
    print(f"{Spread.of(figures.cpu_us).text(1)} us of CPU per row")
    print(facts_line())
    return 0


if __name__ == "__main__":
    sys.exit(main())
