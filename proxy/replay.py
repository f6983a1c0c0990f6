"""Takes what earlier runs left in the journal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from proxy.prices import Prices
from proxy.records import LOST, Head, Row, Values, from_head, to_values
from proxy.segments import Damage, list_segments, read_segment, sync_directory

BATCH_ROWS = 1024
"""Rows handed over at once, or a few more."""


@dataclass(slots=True)
class Replayed:
    """What was there."""

    rows: int = 0
    """Finished rows, those included that the ledger already had."""
    lost: int = 0
    """Requests that were open when the process died."""
    damages: list[Damage] = field(default_factory=list)


def replay(directory: Path, take: Callable[[list[Values]], None], prices: Prices) -> Replayed:
    """Hand over the rows in a journal's directory, then delete its segments. The directory must be locked.

    `take` gets finished rows in order and at last those that were lost: opened and never closed, with the
    tokens last heard of, at today's prices. Rows may have been taken before. When `take` returns they must be
    durable. Raises JournalError, OSError and whatever `take` raises; nothing is deleted then.
    """
    replayed = Replayed()
    live: dict[str, Row] = {}
    rows: list[Values] = []

    def flush() -> None:
        if rows:
            take(rows)
            rows.clear()

    segments = list_segments(directory)
    for path in segments:
        for payload in read_segment(path):
            if isinstance(payload, Damage):
                replayed.damages.append(payload)
                continue
            opened, progress, closed = orjson.loads(payload)
            for head in opened:
                live[head[0]] = _lost(head)
            for op, *figures in progress:
                if op in live:
                    _advance(live[op], *figures)
            for values in closed:
                live.pop(values[0], None)
                rows.append(tuple(values))
            replayed.rows += len(closed)
            if len(rows) >= BATCH_ROWS:
                flush()
    for row in live.values():
        row.cost_nano, row.currency = prices.cost(
            row.backend, row.served_model, row.prompt_tokens, row.cached_tokens, row.completion_tokens
        )
        rows.append(to_values(row))
    replayed.lost = len(live)
    flush()
    for path in segments:
        path.unlink()
    sync_directory(directory)
    return replayed


def _lost(head: Head) -> Row:
    """What is known of a request of which only the beginning was written."""
    row = from_head(head)
    row.outcome = LOST
    row.usage_source = "estimated"
    return row


def _advance(row: Row, backend: str, prompt: int, cached: int, completion: int, source: str) -> None:
    if backend != row.backend:
        row.backend, row.site = backend, ""
    row.prompt_tokens, row.cached_tokens, row.completion_tokens = prompt, cached, completion
    row.usage_source = source
