"""The command: tune what is not tuned, play the leaderboards, judge the claims."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import typer

from benchmarks.boards.claims import COLUMNS, Verdict, compared, judge, reasons, rows
from benchmarks.boards.entries import Entry, entries
from benchmarks.boards.meter import Meter
from benchmarks.boards.runs import Kept, play
from benchmarks.boards.setups import DATA, SETUPS, Setup
from benchmarks.boards.speeds import speeds_table
from benchmarks.boards.tuning import TUNED, Budget, kept, search, untuned
from benchmarks.summary import RESULTS, facts_line, print_table, write_result
from policies.yamlfile import FileProblems
from sim.evaluate import PolicyText, Run
from sim.leaderboard import Board, Standing, as_json
from sim.traffic import Loop, Traffic
from sim.workers import WorkerDiedError, cores

WORK: Final = Path(__file__).parents[2] / ".boards"
"""Where a run that was interrupted goes on."""
OVERLOAD: Final = 1.3
"""Times the speed of Azure's leaderboard, where Prequal's claim is judged."""
OVERLOADED: Final = ("prequal", "weighted-qps", "round-robin", "least-load")
BEST, WORST = 0.9, 0.8
"""Promised: the best policy of an open leaderboard answers this share within the SLA, the worst does not answer
that one. So the load tells them apart."""
QUICK_S: Final = 60.0
INTERRUPTED: Final = 130


@dataclass(slots=True)
class Plan:
    """One setup, and what is to be done on it."""

    setup: Setup
    entries: list[Entry]
    parts: tuple[Traffic, Traffic]
    """Training and test."""
    requests: tuple[int, int]
    """In a sample of each."""
    policies: dict[str, PolicyText] = field(default_factory=dict)
    """By entry; those that have still to be tuned are missing."""


@dataclass(slots=True)
class Shown:
    """A leaderboard that was played."""

    name: str
    board: Board
    standings: list[Standing]


def main(
    board: Annotated[
        list[str] | None, typer.Option(help="azure, mooncake, alike, servegen; default: all.")
    ] = None,
    policy: Annotated[list[str] | None, typer.Option(help="Only these; default: all.")] = None,
    points: Annotated[int, typer.Option(help="Points that each search tries.", min=2)] = 8,
    tuning_seeds: Annotated[int, typer.Option(help="Samples that each point is played over.", min=1)] = 1,
    seeds: Annotated[int, typer.Option(help="Samples of the test part.", min=2)] = 4,
    jobs: Annotated[int | None, typer.Option(help="Processes; default: one for each core.", min=1)] = None,
    speeds: Annotated[bool, typer.Option("--speeds", help="Find the speeds, and do nothing else.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A minute of each trace: does it run?")] = False,
    check: Annotated[bool, typer.Option("--check", help="Fail if a promise is not kept.")] = False,
    result: Annotated[bool, typer.Option(help="Write a file and a picture into benchmarks/results.")] = True,
) -> None:
    """Leaderboards of all policies, tuned, on three real traces. What was done is kept: the same command goes on.

    Takes about an hour of CPU.

    Example: python -m benchmarks.boards --board azure --points 20
    """
    if not DATA.is_dir():
        _fail(f"the traces are not at {DATA}", 2)
    workers = 1 if quick else cores() if jobs is None else jobs
    budget = Budget(4, 1) if quick else Budget(points, tuning_seeds)
    samples = 2 if quick else seeds
    with ExitStack() as stack:
        work, tuned = WORK, TUNED
        if quick:
            work = tuned = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tidegate-boards-")))
        work.mkdir(exist_ok=True)
        runs = Kept(work / "runs.jsonl")
        stack.callback(runs.close)
        try:
            plans = [_plan(setup, policy, quick) for setup in _setups(board)]
            plans = [plan for plan in plans if plan.entries]
            if not plans:
                raise ValueError(
                    "the control plays only policies that are compared: " + ", ".join(sorted(compared()))
                )
            if speeds:
                for plan in plans:
                    speeds_table(plan.setup, plan.entries, plan.parts[0], tuning_seeds, workers)
                print(facts_line())
                return
            shown = _play_all(plans, budget, samples, workers, runs, work, tuned)
        except KeyboardInterrupt:
            _fail("interrupted; the same command goes on from there", INTERRUPTED)
        except (OSError, FileProblems, ValueError, WorkerDiedError) as error:
            _fail(str(error), 2)
    verdicts = judge({one.name: one.standings for one in shown})
    _print(shown, verdicts)
    if result and not quick:
        _write(shown, verdicts, plans, budget)
    broken = _broken(shown)
    for line in broken:
        typer.echo(line, err=True)
    if check and broken:
        raise typer.Exit(1)


def _fail(message: str, status: int) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(status)


# What is to be done


def _setups(asked: Sequence[str] | None) -> list[Setup]:
    """Raises ValueError."""
    known = {one.name: one for one in SETUPS}
    for name in asked or ():
        if name not in known:
            raise ValueError(f"--board is {', '.join(known)}, not {name!r}")
    return [one for one in SETUPS if not asked or one.name in asked]


def _plan(setup: Setup, asked: Sequence[str] | None, quick: bool) -> Plan:
    """Raises ValueError, FileProblems and OSError."""
    if quick:
        setup = setup.shortened(QUICK_S)
    known = {one.name: one for one in entries(setup.cluster())}
    for name in asked or ():
        if name not in known:
            raise ValueError(f"--policy is one of {', '.join(known)}, not {name!r}")
    training, test = setup.traffic(setup.training), setup.traffic(setup.test)
    counts = (len(training.workload(0)), len(test.workload(0)))
    chosen = [one for one in known.values() if not asked or one.name in asked]
    if setup.control:
        chosen = [one for one in chosen if one.name in compared()]
    return Plan(setup, chosen, (training, test), counts)


def _play_all(
    plans: Sequence[Plan], budget: Budget, samples: int, workers: int, runs: Kept, work: Path, folder: Path
) -> list[Shown]:
    """Raises what a search and a simulation raise."""
    for plan in plans:
        for entry in plan.entries:
            text = kept(folder, plan.setup, entry, budget) if entry.searched else untuned(entry)
            if text is not None:
                plan.policies[entry.name] = text
    meter = Meter(sum(_requests(plan, budget, samples) for plan in plans))
    shown = []
    try:
        for plan in plans:
            for entry in plan.entries:
                if entry.name not in plan.policies:
                    plan.policies[entry.name] = _search(plan, entry, budget, workers, work, folder, meter)
            for name, board in _boards(plan, samples):
                played = play(plan.setup, board, runs, workers, _heard(meter, name))
                shown.append(Shown(name, board, board.standings(played)))
    finally:
        meter.close()
    return shown


def _requests(plan: Plan, budget: Budget, samples: int) -> int:
    """Roughly how many have to be simulated."""
    searched = sum(entry.name not in plan.policies for entry in plan.entries)
    overloaded = sum(entry.name in OVERLOADED for entry in plan.entries) if plan.setup.name == "azure" else 0
    in_all = len(plan.entries) * len(plan.setup.loops) + overloaded
    training, test = plan.requests
    return searched * budget.points * budget.seeds * training + in_all * samples * test


def _search(
    plan: Plan, entry: Entry, budget: Budget, workers: int, work: Path, folder: Path, meter: Meter
) -> PolicyText:
    a_point = budget.seeds * plan.requests[0]

    def progress(done: int) -> None:
        what = f"{plan.setup.name}: tuning {entry.name}, point {done} of {budget.points}"
        meter.advance(a_point, what)

    return search(plan.setup, entry, plan.parts, budget, workers, work, folder, progress)


def _heard(meter: Meter, name: str) -> Any:
    def heard(run: Run, before: bool) -> None:
        meter.advance(run.figures.requests, f"{name}: playing the test part", before)

    return heard


def _boards(plan: Plan, samples: int) -> list[tuple[str, Board]]:
    """By name."""
    setup, cluster = plan.setup, plan.setup.cluster()
    policies = [plan.policies[entry.name] for entry in plan.entries]
    found = [
        (
            f"{setup.name}, {'control' if setup.control else loop.value}",
            Board(cluster, setup.traffic(setup.test, loop), policies, range(samples), (setup.speed,)),
        )
        for loop in setup.loops
    ]
    few = [one for one in policies if one.name in OVERLOADED]
    if setup.name == "azure" and few:
        traffic = setup.traffic(setup.test, Loop.OPEN)
        speed = setup.speed * OVERLOAD
        found.append((f"{setup.name}, overloaded", Board(cluster, traffic, few, range(samples), (speed,))))
    return found


# What comes out


def _print(shown: Sequence[Shown], verdicts: Sequence[Verdict]) -> None:
    from sim.leaderboard_table import shown as table

    for one in shown:
        print(f"\n{one.name}\n{table(one.board, one.standings)}", end="")
    if verdicts:
        print_table(
            "Published claims: ratio of policy to the other, mean over seeds", COLUMNS, rows(verdicts)
        )
        for line in reasons(verdicts):
            print(f"* {line}")
    print(f"\n{facts_line()}")


def _write(
    shown: Sequence[Shown], verdicts: Sequence[Verdict], plans: Sequence[Plan], budget: Budget
) -> None:
    from benchmarks.boards.plot import plot

    found: Mapping[str, Any] = {
        "budget": budget._asdict(),
        "boards": {one.name: as_json(one.board, one.standings) for one in shown},
        "policies": {
            plan.setup.name: {name: text.text for name, text in plan.policies.items()} for plan in plans
        },
        "claims": [
            {
                "policy": one.claim.policy,
                "against": one.claim.against,
                "on": one.claim.on,
                "ratio_of": one.claim.figure,
                "published": one.claim.published,
                "found": None if one.found is None else one.found._asdict(),
                "verdict": one.word,
            }
            for one in verdicts
        ],
        "notes": reasons(verdicts),
    }
    path = write_result("boards", found)
    plot({one.name: one.standings for one in shown}, path.with_suffix(".png"))
    print(f"written to {path.name} and {path.with_suffix('.png').name} in {RESULTS.name}")


def _broken(shown: Sequence[Shown]) -> list[str]:
    """Promises that were not kept, in words."""
    found = []
    for one in shown:
        met = [standing.of("met") for standing in one.standings]
        shares = [estimate.mean for estimate in met if estimate is not None]
        if one.name.endswith(", open") and max(shares) < BEST:
            found.append(
                f"{one.name}: the best policy answers {max(shares):.1%} within the SLA, not {BEST:.0%}"
            )
        if one.name.endswith(", open") and min(shares) >= WORST:
            found.append(f"{one.name}: the worst policy copes as well, {min(shares):.1%} within the SLA")
        for standing in one.standings:
            failures = standing.of("policy_failures")
            if failures is not None and failures.mean:
                found.append(f"{one.name}: {standing.policy} failed in {failures.mean:g} calls")
    return found


if __name__ == "__main__":
    typer.run(main)
