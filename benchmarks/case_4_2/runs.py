"""What each process plays: the box's capacity, and one policy under one load. A module of its own, since the name
of a package's `__main__` means another one in a process that is spawned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from benchmarks.case_4_2.policies import BOX_ALONE, named
from benchmarks.case_4_2.simulated import Figures, alone, play
from benchmarks.case_4_2.traffic import MOST, PEAK_HOUR, TRAINING_HOUR, Piece, day, peak
from benchmarks.case_4_2.verdict import SHARE, TIMES

STEPS: Final = 7
"""Bisections of the box's capacity."""
MOST_BOXES: Final = 12
QUICK_SECONDS: Final = 600.0
QUICK_HOURS: Final = (TRAINING_HOUR, 10, PEAK_HOUR)


@dataclass(frozen=True, slots=True)
class Basis:
    """What policies are measured against, of one seed."""

    seed: int
    share: float
    """Of the trace, of which the box alone just serves the peak hour within the SLA."""
    at_capacity: Figures
    alone: Figures
    """The box alone under `TIMES` that."""
    boxes: int
    """That serve `TIMES` that."""
    left_out: float


class Job(NamedTuple):
    """One simulation."""

    what: str
    """`peak`, `day`, or `load`: the peak hour under some other load."""
    policy: str
    seed: int
    share: float


class Pieces:
    """The trace's pieces: of every process its own, read once for each seed."""

    def __init__(self, quick: bool) -> None:
        self._quick = quick
        self._read: dict[tuple[str, int], Piece] = {}

    def of(self, what: str, seed: int) -> Piece:
        """`day`, or else the peak hour."""
        key = ("day" if what == "day" else "peak", seed)
        if key not in self._read:
            self._read[key] = self._piece(*key)
        return self._read[key]

    def _piece(self, what: str, seed: int) -> Piece:
        if what == "day":
            return day(seed, QUICK_HOURS) if self._quick else day(seed)
        return peak(seed, QUICK_SECONDS) if self._quick else peak(seed)


def basis(pieces: Pieces, seed: int) -> Basis:
    """The box's capacity by bisection, and how many boxes serve `TIMES` that."""
    piece = pieces.of("peak", seed)
    low, high = 0.0, MOST / TIMES
    at_capacity: Figures | None = None
    for _ in range(STEPS):
        middle = (low + high) / 2
        figures = alone(piece.workload(middle), piece.seconds, seed)
        if figures.met >= SHARE:
            low, at_capacity = middle, figures
        else:
            high = middle
    if at_capacity is None:
        raise RuntimeError("the box alone serves nothing within the SLA")
    loaded = piece.workload(TIMES * low)
    counts = range(1, MOST_BOXES + 1)
    boxes = next((count for count in counts if alone(loaded, piece.seconds, seed, count).met >= SHARE), None)
    if boxes is None:
        raise RuntimeError(f"{MOST_BOXES} boxes do not serve {TIMES:g} times what one does")
    return Basis(seed, low, at_capacity, alone(loaded, piece.seconds, seed), boxes, piece.left_out)


def simulate(pieces: Pieces, remote: str, job: Job) -> Figures:
    """One simulation."""
    piece = pieces.of(job.what, job.seed)
    entry = BOX_ALONE if job.policy == BOX_ALONE.name else named(job.policy)
    return play(entry, piece.workload(job.share), piece.seconds, job.seed, remote=remote)
