"""Choosers that go by turns, chance, load and weights.

They answer from the views they are given and from what `dispatched` told them. `choose` moves nothing but the
random generator: a decision that is held, retried elsewhere or never carried out leaves no trace, and ten
decisions before one dispatch are ten times the same.

Fallbacks are all other candidates, the best first.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Mapping, Sequence
from math import inf
from random import Random
from types import MappingProxyType
from typing import Annotated, Any

from policies.base import BackendView, Decision, Hold, Policy, RequestFacts, Send
from policies.mistakes import Mistakes
from policies.ranking import Rank, Recent, Turns, best_first, only, with_weight


class RoundRobin(Policy):
    """Each in turn: the candidate that was dispatched to longest ago.

    By last use and not by an index modulo the number of candidates (nginx, HAProxy and most LLM routers), since
    the candidates differ from request to request: with an index, two rules of different size, or a backend that
    comes and goes, make some backends be hit twice and others be left out. A retry uses up the turn of the
    backend that it went to. Backends that were never used come first, in their configured order.
    """

    def __init__(self, rng: Random) -> None:
        self._turns = Turns()

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        if len(backends) == 1:
            return only(backends[0])
        names = [backend.name for backend in backends]
        names.sort(key=self._turns.__getitem__)
        return Send(names[0], tuple(names[1:]), f"next in turn of {len(names)}")

    def dispatched(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        self._turns.took(backend.name)


class RandomChoice(Policy):
    """By chance, in proportion to `weight`.

    P(i) = w_i / sum of w over the candidates. Weight 0 gets nothing, not even as a fallback, unless no
    candidate has a weight: then all are alike. Blind to load; its use is as a baseline and, because every
    candidate has a known chance, to gather decisions for off-policy estimates.
    """

    def __init__(self, rng: Random) -> None:
        self.needs = frozenset({"weight"})
        self._rng = rng

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        candidates = with_weight(backends)
        if len(candidates) == 1:
            return only(candidates[0])
        weights = [backend.weight or 1.0 for backend in candidates]
        total = sum(weights)
        point = self._rng.random() * total
        for index, weight in enumerate(weights):  # noqa: B007  the index is the answer
            point -= weight
            if point < 0.0:
                break
        names = [backend.name for backend in candidates]
        fallbacks = (*names[index + 1 :], *names[:index])
        return Send(
            names[index], fallbacks, f"drawn from {len(names)} by weight", propensity=weights[index] / total
        )


class LeastLoad(Policy):
    """The emptiest: least saturation, so that large and small backends compare.

    Saturation is in-flight over slots, corrected upwards by what the engine said of itself less than 2 s ago
    (`BackendView.saturation`). Ties go by expected tokens in flight over slots, then to the candidate that was
    dispatched to longest ago; the first in the list, as many routers have it, would get everything that arrives
    while all are idle. This is JSQ ("join the shortest queue") made fair to different sizes.
    """

    def __init__(self, rng: Random) -> None:
        self._turns = Turns()

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        if len(backends) == 1:
            return only(backends[0])
        turns = self._turns
        scores = {}
        ranking: list[Rank] = []
        for index, backend in enumerate(backends):
            name = backend.name
            scores[name] = saturation = backend.saturation(now)
            ranking.append((saturation, backend.in_flight_tokens / backend.slots, turns[name], index, name))
        return best_first(ranking, f"least saturation of {len(ranking)}", scores)

    def dispatched(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        self._turns.took(backend.name)


class PowerOfTwo(Policy):
    """The emptier of two candidates drawn by chance.

    Draws two distinct candidates uniformly and takes the one of less saturation, then of fewer expected tokens
    in flight over slots, then the first drawn (Mitzenmacher, "The power of two choices in randomized load
    balancing", 2001; tower's p2c). Where several routers share backends and see each other's load late, it does
    not herd as the exact minimum does.

    Propensity: of n candidates, P(i) = (busier + alike / 2) / (n (n - 1) / 2), with the numbers of candidates
    that are busier than i and, besides i, as busy as i.
    """

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        count = len(backends)
        if count == 1:
            return only(backends[0])
        random = self._rng.random
        chosen = int(random() * count)
        other = int(random() * (count - 1))
        if other >= chosen:
            other += 1
        loads = [(backend.saturation(now), backend.in_flight_tokens / backend.slots) for backend in backends]
        if loads[other] < loads[chosen]:
            chosen, other = other, chosen
        load = loads[chosen]
        wins = -0.5  # it is as busy as itself
        for another in loads:
            if another > load:
                wins += 1.0
            elif another == load:
                wins += 0.5
        name, second = backends[chosen].name, backends[other].name
        fallbacks: tuple[str, ...] = (second,)
        if count > 2:
            rest = sorted(range(count), key=loads.__getitem__)
            fallbacks += tuple([backends[i].name for i in rest if i != chosen and i != other])
        return Send(
            name,
            fallbacks,
            "emptier of two drawn",
            {name: load[0], second: loads[other][0]},
            wins / (count * (count - 1) / 2),
        )


class WeightedQps(Policy):
    """Requests per second in proportion to `weight`, each backend below its own limit.

    Smooth weighted round robin (nginx) on what was really sent: a request gives each of its candidates a credit
    of w_i and takes the sum of them from the backend that it went to; the candidate with the most credit, its
    own w_i included, is next. Weights 5, 1, 1 give a a b a c a a. A request that went elsewhere as a fallback
    is charged where it went. Who is no candidate keeps its credit as it is: a backend that is new or was away
    gets its share from now on and makes up for nothing. Weight 0 gets nothing, not even as a fallback, unless
    no candidate has a weight: then all are alike.

    `max_qps` is a token bucket that holds one second's worth, and one request at least (GCRA, the leaky bucket
    of ITU-T I.371): in t seconds this policy sends a backend at most max_qps * t + max(max_qps, 1) requests.
    Backends at their limit are left out, as fallbacks too; when all are, it asks to wait until the first has room.
    What goes to a backend after a failed attempt, or because its wait was over, is booked but not held back.

    Scores: credit with w_i; more is better.
    """

    def __init__(
        self,
        rng: Random,
        *,
        max_qps: Annotated[
            Mapping[str, float], "Most requests per second by backend name; others have no limit."
        ] = MappingProxyType({}),
    ) -> None:
        with Mistakes() as wrong:
            for name, qps in max_qps.items():
                if not 0.0 < qps < inf:
                    wrong(f"max_qps of {name} must be above 0, not {qps:g}", "max_qps", name)
        self.needs = frozenset({"weight"})
        self._spacing = {name: 1.0 / qps for name, qps in max_qps.items()}
        self._booked_until: dict[str, float] = {}
        """Monotonic time up to which a backend's requests use up its limit (GCRA's theoretical arrival)."""
        self._credits: Recent[float] = Recent()
        """How far each backend is behind its share."""
        self._decided: tuple[str, Sequence[tuple[str, float]]] = ("", ())
        """The last decision: request, and the credits that each dispatch of it gives."""
        self._price = 1.0
        """Sum of weights at the last decision: what a request costs its backend."""

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        candidates = with_weight(backends)
        if self._spacing:
            with_room = [backend for backend in candidates if now >= self._room_at(backend.name)]
            if not with_room:
                until = min([self._room_at(backend.name) for backend in candidates])
                return Hold(until, "every backend is at its max_qps")
            candidates = with_room
        credits = self._credits
        gifts = []
        scores = {}
        ranking: list[Rank] = []
        price = 0.0
        for index, backend in enumerate(candidates):
            name = backend.name
            weight = backend.weight or 1.0
            price += weight
            gifts.append((name, weight))
            scores[name] = credit = credits.get(name, 0.0) + weight
            ranking.append((-credit, 0.0, 0.0, index, name))
        if len(ranking) == 1:
            send = only(candidates[0])
        else:
            send = best_first(
                ranking, f"furthest below its share by weight, of {len(ranking)} backends", scores
            )
        self._decided = (request.id, gifts)
        self._price = price
        return send

    def dispatched(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        name = backend.name
        credits = self._credits
        decided, gifts = self._decided
        if request.id == decided:
            for candidate, gift in gifts:
                credits.change(candidate, credits.get(candidate, 0.0) + gift)
        # A late fallback comes without credits for anybody: without a floor, debts would only grow.
        credits.note(name, max(credits.get(name, 0.0) - self._price, -self._price))
        spacing = self._spacing.get(name)
        if spacing is not None:
            self._booked_until[name] = max(self._booked_until.get(name, -inf), now) + spacing

    def _room_at(self, name: str) -> float:
        """Monotonic time from which the backend's limit allows one more request."""
        spacing = self._spacing.get(name)
        if spacing is None:
            return -inf
        return self._booked_until.get(name, -inf) - max(1.0 - spacing, 0.0)


# Fails type checking when a class stops being a Policy.
_guard: tuple[Callable[[Random], Policy], ...] = (
    RoundRobin,
    RandomChoice,
    LeastLoad,
    PowerOfTwo,
    WeightedQps,
)


def _made(kind: Callable[[Random], Policy]) -> Policy:
    return kind(Random())  # noqa: S311  it gets the state of the one that is copied


def _reduced(policy: Policy) -> tuple[Any, ...]:
    """How `copy` and `deepcopy` make another one: what is compiled is not made without its arguments."""
    return _made, (type(policy),), object.__reduce_ex__(policy, 4)[2]


for _kind in (RoundRobin, RandomChoice, LeastLoad, PowerOfTwo, WeightedQps):
    copyreg.pickle(_kind, _reduced)
