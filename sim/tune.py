"""The search for a policy's parameters in the simulator: trained on one part of the traffic, tested on another.

CMA-ES (Hansen, "The CMA evolution strategy: a tutorial", arXiv:1604.00772) draws a generation of points around
its mean, ranks them, and moves mean and covariance towards the better ones; it needs no gradients and only the
ranks, so noise that all points share does no harm. Every point is played over the same seeds. Parameters are
searched between the bounds of their `Tunable`, by ratio where it says so.

The search depends on its seed and on the values that it is told, nothing else. So it is resumed by telling it again
what a state file has of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp, inf, isfinite, log
from pathlib import Path
from typing import Any, Final, NamedTuple, TextIO, get_args

from policies import Parameter, PolicyError, parameters
from policies.base import Tunable
from policies.yamlfile import FileProblems
from sim.cluster_file import ClusterFile
from sim.evaluate import Figures, PolicyText, evaluate
from sim.generator_spec import WorkloadSpec
from sim.intervals import Estimate, paired
from sim.traces import Span
from sim.traffic import Traffic, cut, period
from sim.workers import Workers
from sim.workload import Workload

STEP: Final = 0.3
"""Of the first generation, as a share of the bounds."""
DIGITS: Final = 4
"""Of a parameter: what is written is what was played."""
OTHER_DRAWS: Final = 1_000_000
"""So far are the seeds of the test from those of the training, where traffic is drawn and has no end to cut off."""
_WORST: Final = 1e30
"""Told in place of an infinite loss."""

Point = dict[str, float | int]
"""Parameters by name."""


class Objective(NamedTuple):
    """What is searched for."""

    words: str
    value: Callable[[Figures], float]
    """As it is reported; infinite: there is none."""
    more_is_better: bool = False

    def loss(self, value: float) -> float:
        """What is made as small as can be."""
        return -value if self.more_is_better else value


def _per_met(amount: float | None, figures: Figures) -> float:
    met = figures.met * figures.requests
    return amount / met if amount is not None and met else inf


def _p95_tpot(figures: Figures) -> float:
    """Of whole answers; none where so many others have none that the p95 of TTFT would be one of theirs."""
    return figures.tpot_s.p95 if figures.rejected + figures.failed <= 0.05 + 1e-9 else inf


OBJECTIVES: Final[Mapping[str, Objective]] = {
    "goodput": Objective("requests/s within the SLA", lambda one: one.goodput_rps, True),
    "p50-ttft": Objective("median TTFT, s", lambda one: one.ttft_s.p50),
    "p95-ttft": Objective("p95 of TTFT, s", lambda one: one.ttft_s.p95),
    "p99-ttft": Objective("p99 of TTFT, s", lambda one: one.ttft_s.p99),
    "p95-tpot": Objective("p95 of TPOT, s", _p95_tpot),
    "p95-total": Objective("p95 of the time to the end, s", lambda one: one.total_s.p95),
    "cost": Objective(
        "cost for each request within the SLA",
        lambda one: inf if one.unpriced == 1.0 else _per_met(one.cost, one),
    ),
    "carbon": Objective("gCO2 for each request within the SLA", lambda one: _per_met(one.gco2, one)),
}


class Task(NamedTuple):
    """One simulation."""

    point: tuple[tuple[str, float | int], ...]
    """Parameters; the others have their defaults."""
    seed: int
    test: bool
    """On the part that is kept from the search."""


@dataclass(slots=True)
class Search:
    """What is tuned, and on what."""

    policy: str
    cluster: ClusterFile
    training: Traffic
    testing: Traffic
    objective: str = "goodput"
    seeds: int = 3
    """Samples of the traffic that each point is played over."""
    seed: int = 0
    evaluations: int = 120
    """Points that are tried, the defaults among them."""
    speed: float = 1.0
    given: Mapping[str, Any] = field(default_factory=dict)
    """Parameters that every point has, and that are not searched."""
    _drawn: dict[tuple[int, bool], Workload] = field(default_factory=dict, repr=False)

    def play(self, task: Task) -> float:
        """The objective's value in one simulation; infinite where the policy refuses its parameters."""
        key = task.seed, task.test
        if key not in self._drawn:
            traffic = self.testing if task.test else self.training
            self._drawn[key] = traffic.workload(task.seed, self.speed)
        policy = policy_file(self.policy, {**self.given, **dict(task.point)})
        try:
            run = evaluate(self.cluster, policy, self._drawn[key], task.seed)
        except FileProblems:
            return inf * (-1 if OBJECTIVES[self.objective].more_is_better else 1)
        return OBJECTIVES[self.objective].value(run.figures)

    def tasks(self, point: Point, test: bool = False) -> list[Task]:
        """Its simulations, seed by seed."""
        apart = OTHER_DRAWS if test and not isinstance(self.testing.source, Workload) else 0
        return [Task(tuple(point.items()), self.seed + number + apart, test) for number in range(self.seeds)]


class Space:
    """The parameters that are searched, as coordinates from 0 to 1."""

    def __init__(self, policy: str, given: Mapping[str, Any] | None = None) -> None:
        """`given`: parameters that are not searched. Raises PolicyError for no such policy, and for one that has
        nothing to search."""
        all_ = parameters(policy)
        values = {**{one.name: one.default for one in all_}, **(given or {})}
        self.parameters: list[tuple[Parameter, Tunable]] = [
            (part, one.tunable)
            for one in all_
            if one.tunable is not None and _does_something(one.tunable, values)
            for part in _parts(one)
        ]
        if not self.parameters:
            raise PolicyError(f"policy {policy} has no parameter that says where to search it (a Tunable)")

    @property
    def middle(self) -> list[float]:
        """Where the search begins: the defaults, or the middle where there is none."""
        return [
            _unit(one.default, tunable) if isinstance(one.default, int | float) else 0.5
            for one, tunable in self.parameters
        ]

    def point(self, coordinates: Sequence[float]) -> Point:
        """Parameters, rounded as a file has them."""
        found: Point = {}
        for (one, tunable), at in zip(self.parameters, coordinates, strict=False):
            value = _value(min(max(at, 0.0), 1.0), tunable)
            found[one.name] = round(value) if one.annotation is int else float(f"{value:.{DIGITS}g}")
        return found


def _does_something(tunable: Tunable, values: Mapping[str, Any]) -> bool:
    if tunable.only_with is None:
        return True
    name, value = tunable.only_with
    return bool(values[name] == value)


def _parts(parameter: Parameter) -> list[Parameter]:
    """Of a map, each value that its default has, as `NAME.KEY`."""
    if not isinstance(parameter.default, Mapping):
        return [parameter]
    kind = get_args(parameter.annotation)[1]
    return [
        replace(parameter, name=f"{parameter.name}.{key}", annotation=kind, default=value)
        for key, value in parameter.default.items()
    ]


def _value(at: float, tunable: Tunable) -> float:
    low, high = tunable.low, tunable.high
    if tunable.log:
        return exp(log(low) + at * (log(high) - log(low)))
    return low + at * (high - low)


def _unit(value: float, tunable: Tunable) -> float:
    low, high = tunable.low, tunable.high
    value = min(max(value, low), high)
    if tunable.log:
        return (log(value) - log(low)) / (log(high) - log(low))
    return (value - low) / (high - low)


def split(traffic: Traffic, test: float) -> tuple[Traffic, Traffic]:
    """Training and test part, in this order in time; `test`: share of the time. What is made up has no time to be
    cut: its test part is other draws. Raises ValueError if a part has no request."""
    source = traffic.source
    if isinstance(source, WorkloadSpec):
        return traffic, traffic
    if isinstance(source, Path):
        span = traffic.span or Span()
        at = span.duration_s * (1.0 - test)
        first = replace(span, duration_s=at)
        second = replace(span, start_s=span.start_s + at, duration_s=span.duration_s - at)
        return replace(traffic, span=first), replace(traffic, span=second)
    at = (source.arrivals[0].at + period(source) * (1.0 - test)) / 1e6
    return replace(traffic, source=cut(source, 0.0, at)), replace(traffic, source=cut(source, at, None))


def policy_file(policy: str, point: Mapping[str, Any], comments: Sequence[str] = ()) -> PolicyText:
    """A policy file in which the policy chooses among all backends, with these parameters; `NAME.KEY` is a value
    of a map."""
    name = json.dumps(policy)
    given: dict[str, Any] = {}
    for whole, value in point.items():
        key, of_map, part = whole.partition(".")
        given[key] = {**given.get(key, {}), part: value} if of_map else value
    lines = [*(f"# {line}".rstrip() for line in comments), "rules:", f"  - name: {name}", "    pick:"]
    lines += [f"      policy: {name}", *(f"      {key}: {json.dumps(value)}" for key, value in given.items())]
    return PolicyText(policy, "\n".join(lines) + "\n")


class State:
    """What a search has found so far, in a file: a head that says which search it is, then a line for a point."""

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        """Reads what is there. Raises OSError, and ValueError for a file of another search."""
        self.path = path
        self.found: dict[int, tuple[Point, list[float]]] = {}
        """By number of the point: parameters, and values by seed."""
        self._head = json.loads(json.dumps(head))
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for place, line in enumerate(lines):
            try:
                record = json.loads(line)
                if place == 0:
                    self._check(record)
                else:
                    self.found[record["number"]] = record["point"], record["values"]
            except (json.JSONDecodeError, AttributeError, KeyError, TypeError):
                if place == 0 or place + 1 < len(lines):
                    raise ValueError(
                        f"{path}:{place + 1}: not a line of a search; give another --state"
                    ) from None
        # The last line may be torn, if the process was killed amid it: the file is written anew without it.
        anew = path.with_name(f"{path.name}.new")
        self._file: TextIO = anew.open("w", encoding="utf-8")
        self._write(self._head)
        for number, (point, values) in self.found.items():
            self._write({"number": number, "point": point, "values": values})
        anew.replace(path)

    def note(self, number: int, point: Point, values: list[float]) -> None:
        """A point has been played."""
        self.found[number] = point, values
        self._write({"number": number, "point": point, "values": values})

    def close(self) -> None:
        self._file.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def _check(self, head: Mapping[str, Any]) -> None:
        if not head.keys() & self._head.keys():
            raise KeyError("a file of something else")
        other = [key for key, value in self._head.items() if head.get(key) != value]
        if other:
            raise ValueError(
                f"{self.path} is the state of another search: its {', '.join(other)} differ; give another --state, "
                "or remove it"
            )


class Tuned(NamedTuple):
    """What a search has found. Values are by seed, the same seeds for both."""

    point: Point
    default: Point
    training: list[float]
    training_default: list[float]
    test: list[float]
    test_default: list[float]

    @property
    def gain(self) -> Estimate:
        """What was tuned less the defaults, on the test part, seed by seed."""
        found = paired(self.test, self.test_default)
        assert found is not None
        return found

    def is_better(self, objective: Objective) -> bool:
        """Whether the test part shows it: by more than the interval of the difference. One seed has none, so it
        shows only that the defaults have no value where the point has one."""
        mean, half_width = self.gain
        if half_width is None:
            return objective.loss(mean) == -inf
        return objective.loss(mean) + half_width < 0.0


def tune(
    search: Search, workers: Workers[Task, float], state: State, progress: Callable[[int, float], None]
) -> Tuned:
    """Search, then play the best point and the defaults on the test part.

    `progress` hears of each point: how many are done, and the least mean loss so far. Raises as `Search.play`, and
    ValueError where the objective has no value at all.
    """
    space, objective = Space(search.policy, search.given), OBJECTIVES[search.objective]
    default = space.point(space.middle)
    tried: list[tuple[float, Point, list[float]]] = []

    def played(points: Sequence[Point]) -> list[float]:
        losses = []
        for point, values in _values(search, workers, state, len(tried), points):
            loss = _mean_loss(objective, values)
            tried.append((loss, point, values))
            losses.append(loss)
            progress(len(tried), min(tried, key=lambda one: one[0])[0])
        return losses

    played([default])
    for points, tell in _generations(space, search.seed):
        missing = search.evaluations - len(tried)
        if missing <= 0:
            break
        losses = played(points[:missing])
        if len(losses) < len(points):
            break
        tell(losses)
    loss, best, training = min(tried, key=lambda one: one[0])
    if not isfinite(loss):
        raise ValueError(
            f"the objective {search.objective} ({objective.words}) has no value at any point: are all requests "
            "missed, or prices, watts or carbon unknown in the cluster file?"
        )
    test, test_default = _test(search, workers, best), _test(search, workers, default)
    return Tuned(best, default, training, tried[0][2], test, test_default)


def _generations(space: Space, seed: int) -> Iterator[tuple[list[Point], Callable[[Sequence[float]], None]]]:
    """Points, and how to tell their losses."""
    from cmaes import CMA
    from numpy import array

    middle = space.middle
    middle += [0.5] * (2 - len(middle))  # the library wants two coordinates at least; one more means nothing
    strategy = CMA(mean=array(middle), sigma=STEP, bounds=array([[0.0, 1.0]] * len(middle)), seed=seed)
    while True:
        drawn = [strategy.ask() for _ in range(strategy.population_size)]

        def tell(losses: Sequence[float], drawn: list[Any] = drawn) -> None:
            strategy.tell([(at, min(loss, _WORST)) for at, loss in zip(drawn, losses, strict=True)])

        yield [space.point(at.tolist()) for at in drawn], tell
        if strategy.should_stop():
            return


def _values(
    search: Search, workers: Workers[Task, float], state: State, first: int, points: Sequence[Point]
) -> Iterator[tuple[Point, list[float]]]:
    """Each point with its values by seed, in order; those that the state has are not played. Raises ValueError for
    a state that has another point there."""
    new = []
    played = {tuple(point.items()): values for point, values in state.found.values()}
    for place, point in enumerate(points):
        known = state.found.get(first + place)
        if known is None and (values := played.get(tuple(point.items()))) is not None:
            state.note(first + place, point, values)  # whole numbers and bounds are met again
        elif known is None:
            new.append(place)
        elif known[0] != point:
            raise ValueError(
                f"{state.path} is not of this search: its point {first + place} is another; remove it"
            )
    got: dict[int, dict[int, float]] = {place: {} for place in new}
    tasks = [
        (place, number, task) for place in new for number, task in enumerate(search.tasks(points[place]))
    ]
    for at, value in workers.over([task for _, _, task in tasks]):
        place, number, _ = tasks[at]
        got[place][number] = value
        if len(got[place]) == search.seeds:
            state.note(first + place, points[place], [got[place][one] for one in range(search.seeds)])
    for place, point in enumerate(points):
        yield point, state.found[first + place][1]


def _test(search: Search, workers: Workers[Task, float], point: Point) -> list[float]:
    values = dict(workers.over(search.tasks(point, test=True)))
    return [values[place] for place in range(search.seeds)]


def _mean_loss(objective: Objective, values: Sequence[float]) -> float:
    return objective.loss(sum(values) / len(values))
