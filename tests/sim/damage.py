"""Event logs that somebody has changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from policies.eventlog import UNKNOWN

Records = list[dict[str, Any]]
Path = tuple[str | int, ...]

NEVER = {"?": [UNKNOWN]}
"""What no field of any record may hold."""
DROP = object()


def kind_of(record: dict[str, Any]) -> str:
    """Its event, or what a decision says."""
    return record.get("event") or next(said for said in ("send", "hold", "reject") if said in record)


def places(records: Records) -> Iterator[tuple[int, Path]]:
    """Of every kind of record, and every set of fields that one has: its place, and the path of each field, at any
    depth."""
    seen = set()
    for place, record in enumerate(records):
        paths = list(paths_in(record))
        if (kind := (kind_of(record), *paths)) not in seen:
            seen.add(kind)
            yield from ((place, path) for path in paths)


def paths_in(value: Any) -> Iterator[Path]:
    """Of everything that a record holds."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, one in inside:
        yield (step,)
        yield from ((step, *path) for path in paths_in(one))


def changed(records: Records, place: int, path: Path, value: Any) -> Records:
    """The log with another value, or none (`DROP`), in one field of one record."""
    record = copy.deepcopy(records[place])
    held: Any = record
    for step in path[:-1]:
        held = held[step]
    if value is DROP:
        del held[path[-1]]
    else:
        held[path[-1]] = value
    return [*records[:place], record, *records[place + 1 :]]
