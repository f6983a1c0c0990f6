"""Takes what earlier runs left in the journal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Final

import orjson

from proxy.prices import Prices
from proxy.records import COLUMNS, LOST, Head, Row, Values, from_head, to_values
from proxy.segments import Damage, JournalError, list_segments, read_segment, sync_directory

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
            try:
                found = _take(payload, live)
            except (ValueError, TypeError, LookupError) as error:
                # Its checksum is right, so this is no accident of the disk: somebody else wrote it.
                raise JournalError(f"{path}: a frame holds no records: {error}") from None
            rows += found
            replayed.rows += len(found)
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


def _take(payload: bytes, live: dict[str, Row]) -> list[Values]:
    """The rows that a frame closes; `live`, the requests that are open, follows.

    Raises ValueError, TypeError or LookupError: it is no frame of ours.
    """
    opened, progress, closed = orjson.loads(payload)
    for head in opened:
        _check(head, 1)
        live[head[0]] = row = _lost(head)
        if not isinstance(row.arrived, float | int):
            raise TypeError("a request has come at no time")
    for figures in progress:
        if list(map(type, figures)) != _PROGRESS:
            raise TypeError("these are no figures of a request")
        op, *figures = figures
        if op in live:
            _advance(live[op], *figures)
    for values in closed:
        _check(values, len(COLUMNS) + 1)
        live.pop(values[0], None)
    return list(map(tuple, closed))


_PROGRESS: Final = [str, str, int, int, int, str]
_PLAIN: Final = frozenset((str, int, float, bool, NoneType))


def _check(values: Any, least: int) -> None:
    """Whether it is a record: a list of plain values, so many at least, an operation id the first of them."""
    if type(values) is not list or len(values) < least or type(values[0]) is not str:
        raise TypeError("this is no record of a request")
    if not _PLAIN.issuperset(map(type, values)):
        raise TypeError("a record holds no lists or objects")


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
