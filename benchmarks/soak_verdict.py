"""What a soak must show: answers whole or honestly broken, every token in the ledger once, and no growth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

MOST_MB_PER_10_MIN = 1.0
"""Growth of memory, over ten minutes and more."""
MOST_MB = 4.0
"""In a shorter time, which says nothing of ten minutes: pools and caches breathe."""
WARM_UP_S = 75.0
"""At least: limits look back for a minute, and what is kept of recent requests has its size by then."""
MOST_WARMING_MB = 16.0
"""Of a process that is no older than that."""
MOST_MORE = {"files": 4, "threads": 6}
"""Beyond those at the beginning: a probe and a connection of the database come and go, and the pool of threads
has its size when that many were needed at once."""
_POINTS = 200
_SHOWN = 10
"""Of the problems of one kind."""


@dataclass(slots=True)
class Asked:
    """One request, as its client knows it."""

    kind: str
    op: str = ""
    """The operation, from the head of the answer; empty: there was none, or it has no row."""
    status: int = 0
    tokens: tuple[int, int] | None = None
    """Prompt and answer, as last reported to the client."""
    running: bool = False
    """Every event reported them: so what a client has seen is what was delivered."""
    complete: bool = False
    """The answer came to its end, good or bad."""
    cut: bool = False
    """It ended in an error event."""
    left: bool = False
    """The client went away before the end."""
    recorded: bool = True
    """It has a row if it was read whole: all have but those that are refused for their head."""
    failure: str = ""
    """What must not be; empty: nothing."""


@dataclass
class Books:
    """What the ledger says against what clients and backends counted."""

    rows: int = 0
    missing: int = 0
    """Answers without a row."""
    twice: int = 0
    """Operations with more than one row."""
    unknown: int = 0
    """Rows that no client can have asked for."""
    wrong: int = 0
    """Rows that say something else than their clients."""
    excess: int = 0
    """Tokens beyond what a backend generated."""
    problems: list[str] = field(default_factory=list)


def check_books(
    asked: Sequence[Asked], rows: Sequence[Mapping[str, Any]], generated: Mapping[str, tuple[float, float]]
) -> Books:
    """Compare.

    `rows`: those of `tidegate export`. `generated`: prompt and completion tokens by backend, of those backends that
    have counted from the beginning to the end.
    """
    books = Books(rows=len(rows))
    by_op = {row["op"]: row for row in rows}
    books.twice = len(rows) - len(by_op)
    heard = set()
    for one in asked:
        if not one.op or not one.recorded:
            continue
        heard.add(one.op)
        row = by_op.get(one.op)
        if row is None:
            books.missing += 1
            books.problems.append(f"{one.kind} {one.op}: answered with {one.status}, no row")
        elif wrong := _difference(one, row):
            books.wrong += 1
            books.problems.append(f"{one.kind} {one.op}: {wrong}")
    # Who left before a head came cannot know its operation.
    silent = sum(one.recorded and not one.op for one in asked)
    books.unknown = max(len(by_op.keys() - heard) - silent, 0)
    for backend, counted in generated.items():
        reported = [row for row in rows if row["backend"] == backend and row["usage_source"] == "reported"]
        for name, most in zip(("prompt_tokens", "completion_tokens"), counted, strict=True):
            billed = sum(row[name] for row in reported)
            if billed > most:
                books.excess += round(billed - most)
                books.problems.append(f"{backend}: {billed} {name} in the ledger, {most:.0f} generated")
    return books


def _difference(one: Asked, row: Mapping[str, Any]) -> str:
    """What a row says otherwise than its client; empty: nothing."""
    billed = row["prompt_tokens"], row["completion_tokens"]
    if row["status"] != one.status and not (one.left and row["status"] == 0):
        return f"status {row['status']} in the ledger, {one.status} for the client"
    if one.complete and not one.cut and one.status == 200:
        if row["outcome"] != "ok":
            return f"outcome {row['outcome']} of a complete answer"
        if one.tokens is not None and billed != one.tokens:
            return f"{billed} tokens in the ledger, {one.tokens} reported to the client"
    if one.cut:
        if row["outcome"] not in ("cut", "shutdown"):
            return f"outcome {row['outcome']} of an answer that was cut"
        if one.running and one.tokens is not None and billed != one.tokens:
            return f"{billed} tokens in the ledger of a cut stream, {one.tokens} delivered"
    if one.left and one.tokens is not None and billed < one.tokens:
        return f"{billed} tokens in the ledger, {one.tokens} read before the client left"
    return ""


@dataclass(frozen=True, slots=True)
class Held:
    """What a process holds while nothing runs."""

    files: int
    threads: int
    tasks: int
    connections: int = 0
    """Of clients."""
    exchanges: int = 0
    queued: int = 0

    def beyond(self, base: Held) -> list[str]:
        """What is more than at the beginning."""
        return [
            f"{name}: {getattr(self, name)} at the end, {getattr(base, name)} at the beginning"
            for name in Held.__slots__
            if getattr(self, name) > getattr(base, name) + MOST_MORE.get(name, 0)
        ]


@dataclass(frozen=True, slots=True)
class Growth:
    """Memory of one process after its warm-up; or during it, if it is no older."""

    warm: bool
    seconds: float
    first_mb: float
    last_mb: float
    mb_per_10_min: float
    """The median of the slopes between all pairs of readings (Theil and Sen): a peak moves it little."""

    @classmethod
    def of(cls, samples: Sequence[tuple[float, float]]) -> Growth:
        """Of readings as (seconds, MB); the first third warms up. Raises ValueError with fewer than 6."""
        if len(samples) < 6:
            raise ValueError("too few readings of memory")
        begin, end = samples[0][0], samples[-1][0]
        warm_at = begin + max((end - begin) / 3, WARM_UP_S)
        warm = [reading for reading in samples if reading[0] >= warm_at]
        is_warm = len(warm) >= 6
        points = (warm if is_warm else samples)[:: max(len(samples) // _POINTS, 1)]
        slopes = [
            (late[1] - early[1]) / (late[0] - early[0])
            for number, early in enumerate(points)
            for late in points[number + 1 :]
            if late[0] > early[0]
        ]
        (first_at, first), (last_at, last) = points[0], points[-1]
        return cls(is_warm, last_at - first_at, first, last, median(slopes) * 600)

    @property
    def is_flat(self) -> bool:
        """Whether it is as promised."""
        if self.seconds >= 600:
            return self.mb_per_10_min <= MOST_MB_PER_10_MIN
        return self.mb_per_10_min * self.seconds / 600 <= (MOST_MB if self.warm else MOST_WARMING_MB)


def failures_of(asked: Iterable[Asked]) -> list[str]:
    """What clients met that must not be, and how often."""
    counts = Counter(f"{one.kind}: {one.failure}" for one in asked if one.failure)
    return [f"{count} x {what}" for what, count in counts.most_common()]


def broken(
    asked: Sequence[Asked], books: Books, growths: Sequence[Growth], base: Held, end: Held
) -> list[str]:
    """Which promises were not kept."""
    problems = failures_of(asked)[:_SHOWN]
    for name in ("missing", "twice", "unknown", "wrong", "excess"):
        if count := getattr(books, name):
            problems.append(f"ledger: {count} {name}")
    problems += books.problems[:_SHOWN]
    problems += [
        f"memory of process {number}: {growth.mb_per_10_min:+.1f} MB in 10 min, over {growth.seconds:.0f} s"
        for number, growth in enumerate(growths, 1)
        if not growth.is_flat
    ]
    problems += end.beyond(base)
    if not any(one.complete and one.status == 200 for one in asked):
        problems.append("nothing was answered")
    return problems
