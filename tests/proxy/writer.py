"""A process that journals requests for as long as it lives, and tells what is durable.

python -m tests.proxy.writer DIRECTORY

Each line on its output was acknowledged: `close OP TOKENS` or `progress OP TOKENS`.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from proxy.journal import Journal
from proxy.ledger import Ledger
from tests.proxy.rows import PRICES, a_row, empty_database


async def main(directory: Path) -> None:
    engine = empty_database(directory)
    # Small segments and a quick mover: a kill shall hit rotations, deletions and commits as well.
    ledger = Ledger(engine, Journal(directory / "journal", segment_bytes=8192), PRICES, interval_s=0.001)
    journal = ledger.journal
    ledger.start(asyncio.get_running_loop(), print)
    running = []
    tokens = 0
    while True:
        for _ in range(3):
            running.append(row := a_row(completion_tokens=0))
            journal.open(row)
        told = []
        for row in running:
            tokens += 1
            row.completion_tokens = tokens
            journal.progress(row.op, "nanjing", 800, 512, tokens)
            told.append(f"progress {row.op} {tokens}\n")
        for row in running[:-2]:
            journal.close(row)
            told.append(f"close {row.op} {row.completion_tokens}\n")
        del running[:-2]
        await journal.synced()
        sys.stdout.write("".join(told))
        sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
