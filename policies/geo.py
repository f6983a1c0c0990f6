"""Choosers that go by where backends stand: distance on the map, and measured cost of the way.

Distance needs no measurement and is what law and contracts speak of; the way is what a request feels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from math import asin, cos, exp, inf, radians, sin, sqrt
from random import Random
from types import MappingProxyType
from typing import Annotated, NamedTuple, TypeAlias

from policies.base import ENGINE_FIGURES_VALID_S, BackendView, Decision, Policy, RequestFacts
from policies.lengths import EXPECTED_TOKENS
from policies.mistakes import Mistakes
from policies.ranking import REMEMBERED, Rank, Recent, Turns, best_first, least_first, only

Place: TypeAlias = tuple[float, float]
"""Latitude and longitude, degrees."""

EARTH_RADIUS_KM = 6371.0088
"""Mean radius of the Earth (IUGG)."""

UNKNOWN_KM = 20_040.0
"""Distance of a place that is not known: beyond the antipode, so after all known ones."""

TPOT_S = 0.03
"""Time per output token where no candidate has been measured: waiting for a slot is never free, seconds."""

FADE_S = 60.0
"""Time constant with which the TTFT of a backend that nothing is sent to loses its weight, seconds."""


class Geo(Policy):
    """The nearest, by great-circle distance between the request's place and the backend's.

    The place of a request is its label `location: "lat,lon"` in degrees, else `home`. A label that is no such
    pair counts as none. The place of a backend is that of its site; a local site without one stands at `home`.
    A backend whose place is not known comes after all others. Distance is on a sphere (error below 0.6 %),
    compared in whole kilometres.

    Ties, as between backends of one site, go by saturation, then to the one dispatched to longest ago. So do
    all requests for which no place is known. With `skip_full`, backends without a free slot come after all
    others, the least saturated of them first.

    Scores: kilometres, of the backends for which they are known.
    """

    def __init__(
        self,
        rng: Random,
        *,
        home: Annotated[
            Sequence[float] | None,
            "Latitude and longitude, degrees: where requests without a location come from.",
        ] = None,
        skip_full: Annotated[bool, "Pass over backends without a free slot while another has one."] = True,
    ) -> None:
        self._home: Place | None = None
        if home is not None:
            if len(home) != 2 or not _on_earth(home[0], home[1]):
                with Mistakes() as wrong:
                    wrong(f"home must be [latitude, longitude] in degrees, not {list(home)}", "home")
            self._home = (float(home[0]), float(home[1]))
        self._skip_full = skip_full
        self._turns = Turns()

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        if len(backends) == 1:
            return only(backends[0])
        label = request.labels.get("location")
        here = (parse_place(label) if label else None) or self._home
        skip_full = self._skip_full
        turns = self._turns
        scores = {}
        ranking: list[Rank] = []
        for index, backend in enumerate(backends):
            name = backend.name
            there = backend.location
            if there is None and backend.site == "local":
                there = self._home
            km = UNKNOWN_KM
            if here is not None and there is not None:
                scores[name] = km = distance_km(here, there)
            saturation = backend.saturation(now)
            if skip_full and saturation >= 1.0:
                ranking.append((inf, saturation, km, index, name))
            else:
                ranking.append((km, saturation, turns[name], index, name))
        return best_first(ranking, f"nearest of {len(ranking)}" if scores else "no place known", scores)

    def dispatched(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        self._turns.took(backend.name)


class Weights(NamedTuple):
    """How much a class of business minds each part of the way; 1: as the seconds are."""

    rtt: float = 1.0
    transfer: float = 1.0
    queue: float = 1.0


class ShortestPath(Policy):
    """The least cost of the way to the first token, weighted by class of business, seconds:

        cost  = rtt * RTT + transfer * body_bytes / bandwidth + queue * (first + wait)
        first = max(0, TTFT - RTT)
        wait  = excess / slots * (first + TPOT * expected tokens)
        excess = max(0, in_flight + 1 - slots, requests waiting in the engine while that figure is fresh)

    RTT, TTFT and TPOT are the router's own averages. TTFT holds the round trip, so that is taken off before it
    is counted with its own weight; `wait` is the time until `excess` of the requests ahead have left `slots`
    servers. (Additive costs of this kind: GORGO, arXiv 2602.11688; Mooncake, FAST'25, algorithm 1.) The class
    is the request's label `business`; the class `default` serves requests without one or of unknown class.

    Rules for what is not known, so that every backend gets tried and none is flooded:
    - nothing measured yet and nothing in flight: it counts as instant, so the next request tries it;
    - nothing measured yet, but requests in flight: as slow as the slowest measured candidate;
    - nothing in flight: a measured TTFT fades with exp(-age / 60 s), age since this policy last dispatched to it,
      so that a backend that was slow once is tried again, by one request at a time;
    - costs within 10 % or 1 ms of the least are alike, and the least saturated of them is taken, then the one
      dispatched to longest ago: averages are noisy, and the exact minimum would herd on noise.

    Scores: cost.
    """

    def __init__(
        self,
        rng: Random,
        *,
        classes: Annotated[
            Mapping[str, Mapping[str, float]],
            "Weights `rtt`, `transfer` and `queue` by class of business, 0 or more; those left out are 1.",
        ] = MappingProxyType({}),
    ) -> None:
        with Mistakes() as wrong:
            for name, given in classes.items():
                _check(name, given, wrong)
        self._classes = {name: Weights(**given) for name, given in classes.items()}
        self._default = self._classes.get("default", Weights())
        self._turns = Turns()
        self._used_at: Recent[float] = Recent()

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        if len(backends) == 1:
            return only(backends[0])
        business = request.labels.get("business", "default")
        weights = self._classes.get(business, self._default)
        slowest_first = slowest_tpot = 0.0
        for backend in backends:
            if backend.ttft_s - backend.rtt_s > slowest_first:
                slowest_first = backend.ttft_s - backend.rtt_s
            if backend.tpot_s > slowest_tpot:
                slowest_tpot = backend.tpot_s
        costs = []
        for backend in backends:
            if backend.in_flight and not backend.ttft_s:
                first = slowest_first
            else:
                first = max(0.0, backend.ttft_s - backend.rtt_s)
                if first and not backend.in_flight:
                    first *= exp((self._used_at.get(backend.name, -inf) - now) / FADE_S)
            queue = first
            excess = backend.in_flight + 1 - backend.slots
            if backend.waiting > excess and now - backend.sampled_at <= ENGINE_FIGURES_VALID_S:
                excess = backend.waiting
            if excess > 0:
                tpot = backend.tpot_s or slowest_tpot or TPOT_S
                served = first + tpot * (request.expected_tokens or EXPECTED_TOKENS)
                queue += excess / backend.slots * served
            costs.append(
                weights.rtt * backend.rtt_s
                + weights.transfer * request.body_bytes / backend.bandwidth
                + weights.queue * queue
            )
        return least_first(backends, costs, self._turns, now, f"shortest path of {len(costs)}")

    def dispatched(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        self._turns.took(backend.name)
        self._used_at.note(backend.name, now)


def parse_place(text: str) -> Place | None:
    """`lat,lon` in degrees; None if it is not that."""
    latitude, _, longitude = text.partition(",")
    try:
        place = (float(latitude), float(longitude))
    except ValueError:
        return None
    return place if _on_earth(*place) else None


@lru_cache(maxsize=REMEMBERED)
def distance_km(here: Place, there: Place) -> float:
    """Great-circle distance on a sphere by the haversine formula, in whole kilometres."""
    south, north = radians(here[0]), radians(there[0])
    half_chord_squared = (
        sin((north - south) / 2.0) ** 2
        + cos(south) * cos(north) * sin(radians(there[1] - here[1]) / 2.0) ** 2
    )
    return float(round(2.0 * EARTH_RADIUS_KM * asin(min(1.0, sqrt(half_chord_squared)))))


def _on_earth(latitude: float, longitude: float) -> bool:
    return -90.0 <= latitude <= 90.0 and -180.0 <= longitude <= 180.0


def _check(name: str, given: Mapping[str, float], wrong: Mistakes) -> None:
    for key, weight in given.items():
        at = ("classes", name, key)
        if key not in Weights._fields:
            message = f"class {name} has no weight {key!r}; it has {', '.join(Weights._fields)}"
            wrong(message, *at, at_key=True)
        elif not 0.0 <= weight < inf:
            wrong(f"weight {key} of class {name} must be 0 or more, not {weight:g}", *at)


# Fails type checking when a class stops being a Policy.
_guard: tuple[Callable[[Random], Policy], ...] = (Geo, ShortestPath)
