"""Whether a request or a token costs more than it did: these sources against those of an earlier commit.

    python -m benchmarks.regression COMMIT --rounds 7 --check

Both are installed as for production (`.peers/`), and measured in turn as `benchmarks.compare` measures peers: in
each round one after the other, the other one first in every second round. A ratio is taken inside each round.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial

from benchmarks.compare import (
    MOST_FAVOURED,
    QUICK,
    Figures,
    Load,
    ratio_of,
    run_rounds,
    spread_of,
)
from benchmarks.install_peers import ROOT, environment, install_commit, install_tidegate
from benchmarks.peers import PEERS, start_tidegate
from benchmarks.processes import raise_open_files
from benchmarks.summary import facts_line, print_table, write_result

FIGURES = {"request": "us_per_request", "streamed token": "us_per_token"}
PROMISED = 1.05
"""CPU of now over CPU of then, at most."""


def full_hash(commit: str) -> str:
    """Of a branch, a tag or the beginning of a hash; empty: there is none such."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> int:
    """The command line; returns 1 if the versions cannot be measured, or with `--check` if a ratio is too large."""
    parser = argparse.ArgumentParser(description="CPU per request and per token against an earlier commit.")
    parser.add_argument("commit", help="the earlier version, such as a tag or a hash")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="short loads: to see that it works")
    parser.add_argument(
        "--undisturbed", action="store_true", help="go before other processes, on a machine that is not quiet"
    )
    parser.add_argument("--check", action="store_true", help=f"fail if a ratio is above {PROMISED}")
    parser.add_argument("--no-result", action="store_true", help="write no file into benchmarks/results")
    arguments = parser.parse_args()
    commit = full_hash(arguments.commit)
    if not commit:
        parser.error(f"no such commit: {arguments.commit}")
    for name, error in (("these sources", install_tidegate()), (arguments.commit, install_commit(commit))):
        if error:
            print(f"{name} cannot be installed: {error}", file=sys.stderr)
            return 1
    raise_open_files(20_000)
    before = f"tidegate-{commit[:7]}"
    command = (str(environment(f"tidegate-{commit}") / "bin" / "tidegate"),)
    PEERS[before] = replace(PEERS["tidegate"], name=before, start=partial(start_tidegate, command=command))
    load = QUICK if arguments.quick else Load()
    niceness = MOST_FAVOURED if arguments.undisturbed else 0
    rounds: list[dict[str, Figures]] = []
    errors: dict[str, str] = {}
    for number in range(arguments.rounds):
        names = ["tidegate", before] if number % 2 else [before, "tidegate"]
        found, failed = run_rounds(names, 1, load, niceness)
        rounds += found
        errors |= failed
    return report(before, commit, rounds, errors, load, arguments)


def report(
    before: str,
    commit: str,
    rounds: list[dict[str, Figures]],
    errors: dict[str, str],
    load: Load,
    arguments: argparse.Namespace,
) -> int:
    """Print and write what was found; returns the exit status."""
    ratios = {title: ratio_of(rounds, figure, before) for title, figure in FIGURES.items()}
    rows = []
    for title, figure in FIGURES.items():
        spreads = (spread_of(rounds, before, figure), spread_of(rounds, "tidegate", figure), ratios[title])
        digits = (1, 1, 3)
        cells = [spread.text(n) if spread else "" for spread, n in zip(spreads, digits, strict=True)]
        rows.append([title, *cells])
    print_table(
        f"CPU in µs: median and quartiles of {len(rounds)} rounds", ("", before, "now", "now / then"), rows
    )
    for name, error in errors.items():
        print(f"\n{name}: {error}")
    others = max((figures.others for result in rounds for figures in result.values()), default=0.0)
    if others > 0.1:
        print(f"other processes used up to {others:.2f} cores meanwhile: run this again on a quiet machine")
    print(f"\n{facts_line()}")
    if not arguments.no_result:
        found = {
            "benchmark": "regression",
            "before": commit,
            "load": asdict(load),
            "rounds": [{name: asdict(figures) for name, figures in result.items()} for result in rounds],
            "ratios": {title: asdict(spread) if spread else None for title, spread in ratios.items()},
            "not_measured": errors,
        }
        print(f"written to {write_result('regression', found).name} in benchmarks/results")
    kept = all(spread is not None and spread.median <= PROMISED for spread in ratios.values())
    return 1 if arguments.check and not kept else 0


if __name__ == "__main__":
    sys.exit(main())
