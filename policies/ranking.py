"""What choosers share: whose turn it is, whose weight counts, and a ranking made into an answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from typing import Generic, TypeAlias, TypeVar

from policies.base import BackendView, Send

REMEMBERED = 4096
"""Backends a policy remembers something of; of more, those it has used lately."""

ALIKE = 0.10
"""Costs that differ by less than this share (and 1 ms) are alike: averages are no more exact than that."""

Value = TypeVar("Value")

Rank: TypeAlias = tuple[float, float, float, int, str]
"""What counts first, second and third (less is better), then the position among the candidates and the name."""


class Recent(Generic[Value]):
    """The last value noted of each backend, bounded: the one noted longest ago is forgotten first."""

    def __init__(self) -> None:
        self._values: dict[str, Value] = {}
        """The one noted longest ago first."""

    def get(self, name: str, default: Value) -> Value:
        return self._values.get(name, default)

    @property
    def lookup(self) -> Callable[[str, Value], Value]:
        """`get`, for loops over many backends."""
        return self._values.get

    def note(self, name: str, value: Value) -> None:
        values = self._values
        values.pop(name, None)
        values[name] = value
        while len(values) > REMEMBERED:
            del values[next(iter(values))]

    def change(self, name: str, value: Value) -> None:
        """As `note`, but a backend that is known keeps its place in the order of forgetting."""
        self._values[name] = value

    def __len__(self) -> int:
        return len(self._values)


class Turns:
    """In which turn each backend was last dispatched to; 0: never, or so long ago that it is forgotten.

    Ordering by turn is fair whoever is a candidate: a backend that comes back is the next one, once.
    """

    def __init__(self) -> None:
        self._turn = 0
        self._last: Recent[int] = Recent()

    def __getitem__(self, name: str) -> int:
        return self._last.get(name, 0)

    @property
    def get(self) -> Callable[[str, int], int]:
        """The same of a name, with 0 as the second argument: for loops over many backends."""
        return self._last.lookup

    def __len__(self) -> int:
        return len(self._last)

    def took(self, name: str) -> None:
        """The backend was dispatched to."""
        self._turn += 1
        self._last.note(name, self._turn)


def with_weight(backends: Sequence[BackendView]) -> Sequence[BackendView]:
    """The backends that have a weight; all of them if none has, and then they are all alike.

    Use `backend.weight or 1.0` on the result.
    """
    return [backend for backend in backends if backend.weight > 0.0] or backends


def only(backend: BackendView) -> Send:
    """The answer when there is nothing to choose."""
    return Send(backend.name, reason="only candidate")


def best_first(ranking: list[Rank], reason: str, scores: Mapping[str, float]) -> Send:
    """The best of a ranking, the others as fallbacks in its order. Sorts the ranking in place."""
    ranking.sort()
    return Send(ranking[0][4], tuple([rank[4] for rank in ranking[1:]]), reason, scores)


def least_first(
    backends: Sequence[BackendView],
    costs: Sequence[float],
    turns: Turns,
    now: float,
    reason: str,
    last: Sequence[bool] | None = None,
) -> Send:
    """The backend of least cost, where costs are measured: they are noisy, and the exact order would herd on noise.

    So those that are alike go by saturation, then to the one dispatched to longest ago: all that are alike to the
    least, then all that are alike to the least of the rest, and so on. `last`: who comes after all others, whatever
    the cost.
    """
    order = sorted(zip(last or repeat(False), costs, range(len(costs)), strict=False))
    turn = turns.get
    scores = {}
    ranking: list[Rank] = []
    count = len(order)
    begin = 0
    while begin < count:
        group, cost, index = order[begin]
        alike = cost * (1.0 + ALIKE) + 0.001
        end = begin + 1
        while end < count and order[end][1] <= alike and order[end][0] == group:
            end += 1
        if end == begin + 1:
            scores[backends[index].name] = cost
            ranking.append((float(begin), 0.0, 0.0, index, backends[index].name))
        else:
            place = float(begin)
            for _, cost, index in order[begin:end]:
                backend = backends[index]
                name = backend.name
                scores[name] = cost
                ranking.append((place, backend.saturation(now), turn(name, 0), index, name))
        begin = end
    return best_first(ranking, reason, scores)
