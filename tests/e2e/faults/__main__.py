"""Runs the tests of the fault matrix and writes what they measure into `docs/reliability.md`.

    python -m tests.e2e.faults              # all rows, as in CI
    python -m tests.e2e.faults --slow       # the long forms too: a quarter of an hour
    python -m tests.e2e.faults F6 F24       # these, and nothing is written

A row that a command shows is measured by that command. The exit status is pytest's.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.summary import facts_line
from tests.e2e.faults import page
from tests.e2e.faults.figures import VARIABLE, read_figures
from tests.e2e.faults.matrix import NUMBERS, ROOT, ROWS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="of the matrix; default: all")
    parser.add_argument("--slow", action="store_true", help="run the long forms too")
    options = parser.parse_args()
    unknown = set(options.rows) - set(NUMBERS)
    if unknown:
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(NUMBERS)}")
    rows = [row for row in ROWS if not options.rows or row.number in options.rows]
    tests = list(dict.fromkeys(test for row in rows for test in row.tests))
    with tempfile.TemporaryDirectory(prefix="tidegate-faults-") as folder:
        file = Path(folder) / "figures.jsonl"
        file.touch()
        marks = () if options.slow else ("-m", "not slow")
        status = 0
        if tests:
            status = subprocess.run(
                [sys.executable, "-m", "pytest", "-p", "no:randomly", *marks, *tests],
                cwd=ROOT,
                env={**os.environ, VARIABLE: str(file)},
            ).returncode
        figures = read_figures(file)
    for row in rows:
        print(f"{row.number:4} {row.fault}: {page.cell(figures.get(row.number, ())) or page.NOTHING}")
    print(facts_line())
    if status == 0 and not options.rows:
        page.write(figures, facts_line())
        print(f"written to {page.PAGE.relative_to(ROOT)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
