"""What choosers share: whose turn it is, whose weight counts, and a ranking made into an answer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TypeAlias, TypeVar

from policies.base import BackendView, Send

REMEMBERED = 4096
"""Backends a policy remembers something of; of more, those it has used lately."""

Value = TypeVar("Value")

Rank: TypeAlias = tuple[float, float, float, int, str]
"""What counts first, second and third (less is better), then the position among the candidates and the name."""


class Recent(OrderedDict[str, Value]):
    """The last value noted of each backend, bounded: the one noted longest ago is forgotten first."""

    def note(self, name: str, value: Value) -> None:
        self[name] = value
        self.move_to_end(name)
        while len(self) > REMEMBERED:
            self.popitem(last=False)


class Turns(Recent[int]):
    """In which turn each backend was last dispatched to; 0: never, or so long ago that it is forgotten.

    Ordering by turn is fair whoever is a candidate: a backend that comes back is the next one, once.
    """

    turn = 0

    def __missing__(self, name: str) -> int:
        return 0

    def took(self, name: str) -> None:
        """The backend was dispatched to."""
        self.turn += 1
        self.note(name, self.turn)


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
