"""Tuned policy files: searched on the training part, kept in `tuned/`, searched anew when what they rest on
changes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, NamedTuple

from benchmarks.boards.entries import Entry
from benchmarks.boards.setups import Setup
from sim.evaluate import PolicyText
from sim.intervals import estimate
from sim.traffic import Traffic
from sim.tune import OBJECTIVES, Search, Space, State, Tuned, policy_file, tune
from sim.workers import Workers

OBJECTIVE: Final = "goodput"
TUNED: Final = Path(__file__).with_name("tuned")
_HEAD: Final = re.compile(r"^# searched: (\w+), (\d+) points$", re.MULTILINE)


class Budget(NamedTuple):
    """Of a search."""

    points: int
    seeds: int


def untuned(entry: Entry) -> PolicyText:
    """A file in which the policy has its defaults, besides what it is told."""
    return PolicyText(entry.name, policy_file(entry.policy, entry.given).text)


def tuned_path(folder: Path, setup: Setup, entry: Entry) -> Path:
    return folder / setup.name / f"{entry.name}.yaml"


def kept(folder: Path, setup: Setup, entry: Entry, budget: Budget) -> PolicyText | None:
    """The file of a search of the same, with as many points at least. Raises OSError."""
    path = tuned_path(folder, setup, entry)
    if not path.exists():
        return None
    text = path.read_text(encoding="utf-8")
    head = _HEAD.search(text)
    if head is None or head[1] != _rests_on(setup, entry, budget) or int(head[2]) < budget.points:
        return None
    return PolicyText(entry.name, text)


def search(
    setup: Setup,
    entry: Entry,
    parts: tuple[Traffic, Traffic],
    budget: Budget,
    workers: int,
    work: Path,
    folder: Path,
    progress: Callable[[int], None],
) -> PolicyText:
    """Search, and write the file. `parts`: training and test. `work`: where the states of searches are kept.

    `progress` hears how many points are done. Raises as `sim.tune.tune`, and OSError.
    """
    given = {**entry.given, **entry.searched_with}
    asked = Search(
        entry.policy,
        setup.cluster(),
        *parts,
        OBJECTIVE,
        budget.seeds,
        evaluations=budget.points,
        speed=setup.speed,
        given=given,
    )
    state = State(work / f"{_rests_on(setup, entry, budget)}-{code_digest()}.state", {"entry": entry.name})
    try:
        with Workers(asked.play, workers) as many:
            found = tune(asked, many, state, lambda done, _: progress(done))
        plain = replace(asked, given=dict(entry.given))
        with Workers(plain.play, workers) as many:
            tasks = [*plain.tasks({}), *plain.tasks({}, test=True)]
            values = dict(many.over(tasks))
    finally:
        state.close()
    defaults = [values[place] for place in range(budget.seeds)]
    on_test = [values[place] for place in range(budget.seeds, 2 * budget.seeds)]
    text = _file(setup, entry, budget, found, defaults, on_test)
    path = tuned_path(folder, setup, entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return PolicyText(entry.name, text)


def _file(
    setup: Setup, entry: Entry, budget: Budget, found: Tuned, defaults: list[float], on_test: list[float]
) -> str:
    """`defaults`, `on_test`: of the untuned policy, by seed."""
    better = sum(found.training) > sum(defaults)
    parameters = {**entry.given, **entry.searched_with, **found.point} if better else dict(entry.given)
    said = OBJECTIVES[OBJECTIVE].words
    lines = [
        f"{entry.name} on {setup.name} at speed {setup.speed:g}, by python -m benchmarks.boards",
        f"searched: {_rests_on(setup, entry, budget)}, {budget.points} points",
        f"{said}, defaults: training {_words(defaults)}, test {_words(on_test)}",
        f"{said}, the best point: training {_words(found.training)}, test {_words(found.test)}",
    ]
    if not better:
        lines.append("No point was better than the defaults in training: they stay.")
    return policy_file(entry.policy, parameters, lines).text


def _words(values: list[float]) -> str:
    found = estimate(values)
    assert found is not None
    mean, half_width = found
    return f"{mean:.4g}" if half_width is None else f"{mean:.4g} ± {half_width:.2g}"


def _rests_on(setup: Setup, entry: Entry, budget: Budget) -> str:
    """A digest of all that a search depends on, but the number of points, which may grow, and the code."""
    space = [[one.name, *tunable] for one, tunable in _bounds(entry)]
    parts: list[Any] = [
        setup.machines,
        _digest(setup.trace_path),
        [*setup.training, setup.speed, budget.seeds, OBJECTIVE],
        [entry.policy, dict(entry.given), dict(entry.searched_with), space],
    ]
    return sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _bounds(entry: Entry) -> list[tuple[Any, tuple[float, float, bool]]]:
    return [
        (one, (bounds.low, bounds.high, bounds.log))
        for one, bounds in Space(entry.policy, {**entry.given, **entry.searched_with}).parameters
    ]


@cache
def _digest(path: Path) -> str:
    """Raises OSError."""
    return sha256(path.read_bytes()).hexdigest()


@cache
def code_digest() -> str:
    """Of all that simulates and decides: what other code has played counts no more."""
    root = Path(__file__).parents[2]
    files = sorted(path for room in ("policies", "probes", "sim") for path in (root / room).rglob("*.py"))
    files += [Path(__file__).with_name(name) for name in ("baselines.py", "conversations.py")]
    return sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
