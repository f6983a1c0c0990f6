"""The statistics of the benchmarks, and the facts that a figure is worth nothing without.

Rounds of one machine differ by more than most effects worth knowing, so a figure is the median over rounds with its
quartiles, and a ratio of two peers is taken inside each round, where both met the same machine, before its median.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def quantile(values: Iterable[float], part: float) -> float:
    """The value below which `part` (0 to 1) of the values lie, interpolated; raises ValueError without values."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values")
    if not 0 <= part <= 1:
        raise ValueError(f"{part} is not between 0 and 1")
    position = part * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of one figure over the rounds."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of these values; raises ValueError if there are none."""
        return cls(quantile(values, 0.5), quantile(values, 0.25), quantile(values, 0.75), len(values))

    def text(self, digits: int = 1) -> str:
        """`29.4 (28.8-30.1)`: the median and, with more than one round, the quartiles."""
        if self.rounds == 1:
            return f"{self.median:.{digits}f}"
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


def ratio(over: Sequence[float | None], under: Sequence[float | None]) -> Spread | None:
    """The spread of `over / under` of the same round; rounds that lack either are left out, None if all do."""
    ratios = [a / b for a, b in zip(over, under, strict=True) if a is not None and b]
    return Spread.of(ratios) if ratios else None


def machine_facts() -> dict[str, Any]:
    """What a reader needs to judge a figure: processor, cores, memory, kernel, Python, date, commit."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "commit": commit(),
    }


def facts_line() -> str:
    """The facts of this machine in one line, for the end of a report."""
    facts = machine_facts()
    return (
        f"{facts['cpu']}, {facts['cores']} cores, Linux {facts['kernel']}, {facts['date']}, {facts['commit']}"
    )


def commit() -> str:
    """The commit that was measured, with a plus sign if the tree had changes; empty outside a checkout."""
    folder = Path(__file__).resolve().parent
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10)
    except OSError:
        return ""
    return done.stdout.strip()


def write_result(name: str, result: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write a result with the facts of this machine to `results/DATE-NAME.json`; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{time.strftime('%Y-%m-%d-%H%M%S')}-{name}.json"
    path.write_text(json.dumps({"machine": machine_facts(), **result}, indent=1) + "\n")
    return path


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table that reads the same in a terminal, a log and Markdown; figures are aligned right."""
    widths = [max(len(row[at]) for row in (columns, *rows)) for at in range(len(columns))]
    print(f"\n{title}\n")
    for at, row in enumerate((columns, ["-" * width for width in widths], *rows)):
        cells = [
            cell.ljust(width) if column == 0 or at == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("| " + " | ".join(cells) + " |")
    print(flush=True)
