"""kill -9, and what is there afterwards."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from pathlib import Path

import pytest

from proxy.database import open_database
from proxy.journal import Journal
from proxy.ledger import Ledger
from tests.proxy.rows import PRICES
from tests.proxy.test_ledger import added_up, hourly, rows_of


def run_and_kill(directory: Path, lines: int) -> dict[str, tuple[str, int]]:
    """Let a writer acknowledge so many lines, kill it: operation -> what was last acknowledged of it."""
    command = [sys.executable, "-m", "tests.proxy.writer", str(directory)]
    acknowledged: dict[str, tuple[str, int]] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for count, line in enumerate(process.stdout):
            if count == lines:
                process.kill()
            if line.endswith("\n"):
                kind, op, tokens = line.split()
                acknowledged[op] = (kind, int(tokens))
    assert process.returncode == -9
    assert len(acknowledged) > 2
    return acknowledged


@pytest.mark.parametrize("seed", range(10))
async def test_nothing_acknowledged_is_missing_and_nothing_is_double(tmp_path: Path, seed: int) -> None:
    acknowledged = run_and_kill(tmp_path, lines=random.Random(seed).randrange(5, 2000))
    engine = open_database(tmp_path)
    ledger = Ledger(engine, Journal(tmp_path / "journal"), PRICES)
    replayed = ledger.start(asyncio.get_running_loop(), print)
    await asyncio.to_thread(ledger.stop)
    rows = rows_of(engine)
    engine.dispose()
    by_op = {row.op: row for row in rows}
    assert len(by_op) == len(rows)
    assert hourly(engine) == added_up(rows)
    for op, (kind, tokens) in acknowledged.items():
        row = by_op[op]
        if kind == "close":
            assert (row.outcome, row.completion_tokens) == ("ok", tokens)
        else:
            assert row.completion_tokens >= tokens
    # What was not acknowledged may be there or not, but is never more than the writer counted.
    most = max(tokens for _, tokens in acknowledged.values())
    assert all(row.completion_tokens <= most + 100 for row in rows)
    assert replayed.lost <= 10
    assert len(rows) <= len(acknowledged) + 10
    engine.dispose()
