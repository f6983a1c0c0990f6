"""How fast a trace is played: the fastest speed at which the best of the untuned policies copes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Final

from benchmarks.boards.entries import Entry
from benchmarks.boards.setups import COPES, Setup
from benchmarks.boards.tuning import untuned
from benchmarks.summary import print_table
from sim.evaluate import Run
from sim.leaderboard import Board, Job, Standing
from sim.traffic import Traffic

STEP: Final = 0.1
LEAST, MOST = 1, 40
"""In steps."""


def speeds_table(
    setup: Setup, entries: Sequence[Entry], training: Traffic, seeds: int, workers: int
) -> float:
    """Find the speed by bisection on the training part, and print all that were tried. -> it.

    Raises ValueError if nothing copes at the least speed, and as `Board.play_all`.
    """
    tried: dict[int, list[Standing]] = {}

    def copes(step: int) -> bool:
        board = Board(
            setup.cluster(), training, [untuned(one) for one in entries], range(seeds), (step * STEP,)
        )
        runs: list[tuple[Job, Run]] = []
        board.play_all(workers, lambda job, run: runs.append((job, run)))
        tried[step] = sorted(board.standings(runs), key=lambda one: -met(one))
        print(f"{setup.name}: speed {step * STEP:.1f}, best {met(tried[step][0]):.1%}", file=sys.stderr)
        return met(tried[step][0]) >= COPES

    found = fastest(copes, LEAST, MOST)
    rows = [
        (
            f"{step * STEP:.1f}",
            *(f"{one.policy} {met(one):.1%}" for one in (order[0], order[len(order) // 2], order[-1])),
        )
        for step, order in sorted(tried.items())
    ]
    title = f"{setup.name}: share within the SLA, training part; the best copes until {found * STEP:.1f}"
    print_table(title, ("speed", "best", "median", "worst"), rows)
    return found * STEP


def met(standing: Standing) -> float:
    """Share of requests within the SLA, mean over seeds."""
    values = standing.values("met")
    return sum(values) / len(values)


def fastest(copes: Callable[[int], bool], least: int, most: int) -> int:
    """The last whole number for which it holds, if it holds up to one and never after. Raises ValueError."""
    if not copes(least):
        raise ValueError(f"no policy copes with {least * STEP:.1f} times the load: the cluster is too small")
    while most - least > 1:
        middle = (least + most) // 2
        if copes(middle):
            least = middle
        else:
            most = middle
    return least
