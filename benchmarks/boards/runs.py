"""Simulations that are kept: a leaderboard goes on where it was interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from benchmarks.boards.setups import Setup
from benchmarks.boards.tuning import code_digest
from sim.evaluate import Figures, Quantiles, Run
from sim.leaderboard import Board, Job
from sim.workers import Workers


class Kept:
    """Runs in a file, one a line, by a digest of what was played."""

    def __init__(self, path: Path) -> None:
        """Reads what is there; a last line that is torn is left out. Raises OSError."""
        self._runs: dict[str, Run] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # the process was killed amid it
            self._runs[record["key"]] = _run(record)
        torn = path.exists() and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a", encoding="utf-8")
        if torn:
            self._file.write("\n")

    def get(self, key: str) -> Run | None:
        return self._runs.get(key)

    def add(self, key: str, run: Run) -> None:
        """Raises OSError."""
        self._runs[key] = run
        record = {"key": key, **run._asdict(), "figures": asdict(run.figures)}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _run(record: dict[str, Any]) -> Run:
    times = ("ttft_s", "tpot_s", "total_s")
    figures: dict[str, Any] = {
        name: Quantiles(*value) if name in times else value for name, value in record["figures"].items()
    }
    return Run(Figures(**figures), tuple(record["ttft_cdf"]), record["elapsed_s"], record["last_failure"])


def play(
    setup: Setup, board: Board, kept: Kept, workers: int, played: Callable[[Run, bool], None]
) -> list[tuple[Job, Run]]:
    """All jobs of a board, those that are kept not again; `played` hears of each, and
    whether it was kept. Raises as `Board.play_all`."""
    runs: list[tuple[Job, Run]] = []
    missing: list[tuple[Job, str]] = []
    machines = setup.machines
    for job in board.jobs:
        key = _key(setup, machines, board, job)
        run = kept.get(key)
        if run is None:
            missing.append((job, key))
        else:
            runs.append((job, run))
            played(run, True)
    with Workers(board.play, min(workers, len(missing))) as many:
        for place, run in many.over([job for job, _ in missing]):
            job, key = missing[place]
            kept.add(key, run)
            runs.append((job, run))
            played(run, False)
    return runs


def _key(setup: Setup, machines: str, board: Board, job: Job) -> str:
    policy = board.policies[job.policy]
    rules = "\n".join(line for line in policy.text.splitlines() if not line.startswith("#"))
    parts = [
        machines,
        [setup.trace, *setup.test, board.traffic.loop.value, board.traffic.resamples],
        [job.seed, job.speed, rules, code_digest()],
    ]
    return sha256(json.dumps(parts).encode()).hexdigest()[:24]
