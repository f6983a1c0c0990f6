"""A chooser that is put together in the policy file: filters, then a weighted sum of scorers, then a picker.

The form is that of the Gateway API's Inference Extension and of llm-d's router, whose scorers are the models of
those here. A scorer gives each candidate a number between 0 and 1, more is better; a filter leaves some of the
candidates, and all of them if it would leave nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from math import exp, inf
from random import Random
from types import MappingProxyType
from typing import Annotated, Final, Literal, TypeAlias

from policies.base import (
    ENGINE_FIGURES_VALID_S,
    BackendView,
    Decision,
    Policy,
    RequestFacts,
    Tunable,
)
from policies.geo import FADE_S
from policies.lengths import EXPECTED_TOKENS
from policies.mistakes import Mistakes
from policies.pushing import kv_uses
from policies.ranking import ALIKE, Rank, Recent, Turns, best_first, only
from policies.rendezvous import home, number_of_session
from policies.speeds import TTFT
from policies.values import WAITING_FULL

Views: TypeAlias = Sequence[BackendView]
Filter: TypeAlias = Callable[[RequestFacts, Views, float], list[BackendView]]

KV_SATURATED: Final = 0.8
"""KV use at which the Inference Extension's detector takes an engine for saturated; its queue is `WAITING_FULL`."""
STICKY: Final = 0.8
"""Share of a prompt that is cached from which llm-d's filter keeps to it ..."""
STICKY_PENALTY_S: Final = 5.0
"""... unless the first token would come so much later than elsewhere."""


class Uses:
    """Who was dispatched to when, by one policy."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.cold_turns = Turns()
        """Of prompts that nobody had cached."""
        self.at: Recent[float] = Recent()


Scorer: TypeAlias = Callable[[RequestFacts, Views, float, Uses], list[float]]

# Scorers


def _prefix(request: RequestFacts, backends: Views, now: float, uses: Uses) -> list[float]:
    """The share of the prompt that is cached."""
    cached = request.cached
    if not cached or request.prompt_tokens < 1:
        return [0.0] * len(backends)
    tokens = request.prompt_tokens
    return [cached.get(backend.name, 0) / tokens for backend in backends]


def _queue(request: RequestFacts, backends: Views, now: float, uses: Uses) -> list[float]:
    """(longest - own) / (longest - shortest); 1 if all are alike."""
    queues = _queues(backends, now)
    longest, shortest = max(queues), min(queues)
    if longest == shortest:
        return [1.0] * len(queues)
    span = longest - shortest
    return [(longest - queue) / span for queue in queues]


def _load(request: RequestFacts, backends: Views, now: float, uses: Uses) -> list[float]:
    """The share of its slots that is free."""
    return [max(1.0 - backend.in_flight / backend.slots, 0.0) for backend in backends]


def _kv(request: RequestFacts, backends: Views, now: float, uses: Uses) -> list[float]:
    """The share of its KV cache that is free."""
    return [1.0 - use if use < 1.0 else 0.0 for use in kv_uses(backends, now)]


def _latency(request: RequestFacts, backends: Views, now: float, uses: Uses) -> list[float]:
    """The shortest expected time to the first token over its own; times within a tenth of it are alike.

    That of a backend without requests fades, so that one that was slow once is tried again.
    """
    times = _first_tokens(request, backends)
    for index, backend in enumerate(backends):
        if not backend.in_flight and times[index] > backend.rtt_s:
            age = now - uses.at.get(backend.name, -inf)
            times[index] = backend.rtt_s + (times[index] - backend.rtt_s) * exp(-age / FADE_S)
    alike = min(times) * (1.0 + ALIKE) + 0.001
    return [alike / time if time > alike else 1.0 for time in times]


def _cost(request: RequestFacts, backends: Views, now: float, uses: Uses) -> list[float]:
    """The least price of this request over its own; 0 if its price is not known."""
    prompt, answer = request.prompt_tokens, request.expected_tokens or EXPECTED_TOKENS
    return _least_over_own(
        [
            inf
            if backend.price_input is None or backend.price_output is None
            else backend.price_input * prompt + backend.price_output * answer
            for backend in backends
        ]
    )


def _carbon(request: RequestFacts, backends: Views, now: float, uses: Uses) -> list[float]:
    """The least carbon intensity over its own; 0 if it is not known."""
    return _least_over_own(
        [inf if backend.carbon_gco2_kwh is None else backend.carbon_gco2_kwh for backend in backends]
    )


def _session(request: RequestFacts, backends: Views, now: float, uses: Uses) -> list[float]:
    """1 for the backend that the session belongs to by rendezvous hashing, 0 for others."""
    if not request.session:
        return [0.0] * len(backends)
    name = home(number_of_session(request.session), backends)
    return [1.0 if backend.name == name else 0.0 for backend in backends]


def _least_recent(request: RequestFacts, backends: Views, now: float, uses: Uses) -> list[float]:
    """Of a prompt that nobody has cached: from 1 for whoever got such a one longest ago down to 0; else 0.5."""
    if request.cached or len(backends) < 2:
        return [0.5] * len(backends)
    turn = uses.cold_turns.get
    order = sorted(range(len(backends)), key=[turn(backend.name, 0) for backend in backends].__getitem__)
    scores = [0.0] * len(backends)
    for place, index in enumerate(order):
        scores[index] = 1.0 - place / (len(order) - 1)
    return scores


SCORERS: Final[Mapping[str, Scorer]] = {
    "prefix": _prefix,
    "queue": _queue,
    "load": _load,
    "kv": _kv,
    "latency": _latency,
    "cost": _cost,
    "carbon": _carbon,
    "session": _session,
    "least-recent": _least_recent,
}

# Filters


def _not_saturated(request: RequestFacts, backends: Views, now: float) -> list[BackendView]:
    """Those with fewer than 5 requests in their engine's queue and KV use below 0.8."""
    kv, queues = kv_uses(backends, now), _queues(backends, now)
    return [
        backend
        for backend, use, queue in zip(backends, kv, queues, strict=True)
        if queue < WAITING_FULL and use < KV_SATURATED
    ]


def _least_queue(request: RequestFacts, backends: Views, now: float) -> list[BackendView]:
    """Those with a queue in the first n-th part of the range of queues, n their number."""
    queues = _queues(backends, now)
    shortest = min(queues)
    level = shortest + (max(queues) - shortest) / len(queues)
    return [backend for backend, queue in zip(backends, queues, strict=True) if queue <= level]


def _prefix_affinity(request: RequestFacts, backends: Views, now: float) -> list[BackendView]:
    """Those that have 0.8 of the prompt; all if the first token would come 5 s later there than elsewhere."""
    cached, level = request.cached, STICKY * request.prompt_tokens
    sticky = [backend for backend in backends if cached.get(backend.name, 0) >= level] if cached else []
    if sticky and len(sticky) < len(backends):
        penalty = min(_first_tokens(request, sticky)) - min(_first_tokens(request, backends))
        if penalty > STICKY_PENALTY_S:
            return []
    return sticky


FILTERS: Final[Mapping[str, Filter]] = {
    "not-saturated": _not_saturated,
    "least-queue": _least_queue,
    "prefix-affinity": _prefix_affinity,
}

NEEDS: Final[Mapping[str, frozenset[str]]] = {
    "prefix": frozenset({"prefix"}),
    "latency": frozenset({"prefix", "speed"}),
    "cost": frozenset({"length"}),
    "least-recent": frozenset({"prefix"}),
    "prefix-affinity": frozenset({"prefix", "speed"}),
}
"""Of scorers and filters; those that are not here need nothing."""


class WeightedScores(Policy):
    """The highest weighted sum of scorers, each between 0 and 1, after filters; composed in the policy file.

    The scheduler of the Gateway API's Inference Extension and of llm-d:

        score = sum of weight * scorer, over `scorers`

    scorer          1 is best
    `prefix`        share of the prompt that is cached
    `queue`         (longest - own) / (longest - shortest) over requests that wait; all alike: 1
    `load`          1 - in-flight / slots
    `kv`            1 - KV use (as `kv-threshold` has it)
    `latency`       least / own expected time to the first token; within a tenth of the least: 1
    `cost`          least / own price of this request; unknown: 0
    `carbon`        least / own gCO2 per kWh; unknown: 0
    `session`       1 for the session's own backend (as `session-affinity` has it, by slots), else 0
    `least-recent`  of a prompt that nobody has cached, from 1 for who got one longest ago down to 0; else 0.5

    filter             leaves, if that is anybody
    `not-saturated`    a queue below 5 and KV use below 0.8 (the extension's saturation detector)
    `least-queue`      queues in the first n-th part of their range (the extension's first filter)
    `prefix-affinity`  0.8 of the prompt cached, unless a first token comes 5 s later there (llm-d's)

    picker             chooses
    `best`             the highest score, then the least in-flight over slots, then by turns
    `weighted-random`  by chance, P = score / sum of scores
    `softmax`          by chance, P = exp(score / temperature) / sum of these

    Ours: a queue is the engine's, if that figure is fresh, or the requests there that have no first token, which
    the router knows exactly, whichever is more; `latency`, `cost` and `carbon` are ratios to the least, since over
    their range a difference of a per cent would count as much as one of a hundred; times to a first token are by
    the speed that is learnt, where llm-d has a peak rate, and fade as those of `shortest-path` while a backend has
    nothing to do. Those that a filter leaves out are the last fallbacks, the emptiest first.

    Scores: the weighted sum; more is better. The reason tells its parts.
    """

    def __init__(
        self,
        rng: Random,
        *,
        scorers: Annotated[
            Mapping[str, float],
            "Weights by scorer, 0 or more. Default: prefix 3, queue 2, kv 2.",
            Tunable(0.0, 10.0),
        ] = MappingProxyType({"prefix": 3.0, "queue": 2.0, "kv": 2.0}),
        filters: Annotated[Sequence[str], "Filters in order."] = (),
        picker: Annotated[
            Literal["best", "weighted-random", "softmax"], "How one is chosen by score."
        ] = "best",
        temperature: Annotated[
            float,
            "Of `softmax`, in units of the score, above 0.",
            Tunable(0.05, 10.0, log=True, only_with=("picker", "softmax")),
        ] = 1.0,
    ) -> None:
        with Mistakes() as wrong:
            for name, weight in scorers.items():
                if name not in SCORERS:
                    wrong(_unknown("scorer", name, SCORERS), "scorers", name, at_key=True)
                if not 0.0 <= weight < inf:
                    wrong(f"the weight of scorer {name} must be 0 or more, not {weight:g}", "scorers", name)
            if not any(scorers.values()):
                wrong("scorers needs one with a weight above 0", "scorers")
            for place, name in enumerate(filters):
                if name not in FILTERS:
                    wrong(_unknown("filter", name, FILTERS), "filters", place)
            if not 0.0 < temperature < inf:
                wrong(f"temperature must be above 0, not {temperature:g}", "temperature")
        self._scorers = [
            (f"{name} {weight:g} x", weight, SCORERS[name]) for name, weight in scorers.items() if weight
        ]
        self._filters = [FILTERS[name] for name in filters]
        used = [name for name, weight in scorers.items() if weight]
        self.needs = frozenset().union(*[NEEDS.get(name, frozenset()) for name in (*used, *filters)])
        self._picker = picker
        self._temperature = temperature
        self._rng = rng
        self._uses = Uses()

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        if len(backends) == 1:
            return only(backends[0])
        kept = backends
        for leave in self._filters:
            kept = leave(request, kept, now) or kept
        totals: list[float] = []
        parts = []
        for label, weight, score in self._scorers:
            values = score(request, kept, now, self._uses)
            parts.append((label, values))
            if totals:
                totals = [total + weight * value for total, value in zip(totals, values, strict=True)]
            else:
                totals = [weight * value for value in values]
        turn = self._uses.turns.get
        scores = {}
        ranking: list[Rank] = []
        for index, backend in enumerate(kept):
            name = backend.name
            scores[name] = total = totals[index]
            ranking.append((-total, backend.in_flight / backend.slots, turn(name, 0), index, name))
        send = best_first(ranking, "", scores)
        chosen = ranking[0][3]
        if self._picker != "best":
            chosen, send.propensity = self._draw(totals)
            send.backend = kept[chosen].name
            send.fallbacks = tuple([rank[4] for rank in ranking if rank[3] != chosen])
        if len(kept) < len(backends):
            rest: list[Rank] = []
            for index, backend in enumerate(backends):
                name = backend.name
                if name not in scores:
                    rest.append((backend.in_flight / backend.slots, turn(name, 0), 0.0, index, name))
            rest.sort()
            send.fallbacks += tuple([rank[4] for rank in rest])
        told = ", ".join([f"{label} {values[chosen]:.2f}" for label, values in parts])
        how = "best" if self._picker == "best" else "drawn"
        send.reason = f"{how} of {len(kept)}: {told}"
        return send

    def _draw(self, totals: list[float]) -> tuple[int, float]:
        """-> the place of one drawn by score, and the probability of that."""
        if self._picker == "softmax":
            most = max(totals)
            weights = [exp((total - most) / self._temperature) for total in totals]
        else:
            weights = totals if any(totals) else [1.0] * len(totals)
        whole = sum(weights)
        point = self._rng.random() * whole
        chosen = 0
        for index, weight in enumerate(weights):
            if weight > 0.0:  # by rounding, the point may lie behind the last one
                chosen = index
                point -= weight
                if point < 0.0:
                    break
        return chosen, weights[chosen] / whole

    def dispatched(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        uses = self._uses
        uses.turns.took(backend.name)
        uses.at.note(backend.name, now)
        if not request.cached:
            uses.cold_turns.took(backend.name)


def _queues(backends: Views, now: float) -> list[int]:
    """Requests that wait for their first token on each backend."""
    since = now - ENGINE_FIGURES_VALID_S
    return [
        backend.waiting
        if backend.waiting > backend.prefilling and backend.sampled_at >= since
        else backend.prefilling
        for backend in backends
    ]


def _first_tokens(request: RequestFacts, backends: Views) -> list[float]:
    """Expected seconds to the first token (`speeds.ttft_s`, in one loop)."""
    cached, prompt = request.cached, request.prompt_tokens
    times = []
    for backend in backends:
        fit = backend.ttft_fit or TTFT
        tokens = prompt - cached.get(backend.name, 0)
        tokens = backend.prefill_tokens + (tokens if tokens > 1 else 1)
        times.append(fit[0] + fit[1] * tokens + fit[2] * (backend.in_flight - backend.prefilling))
    return times


def _least_over_own(figures: list[float]) -> list[float]:
    """inf: unknown."""
    least = min(figures)
    if least == inf:
        return [0.0] * len(figures)
    return [least / figure if figure > least else 1.0 for figure in figures]


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, known, n=1)
    meant = f"; did you mean {close[0]!r}?" if close else "."
    return f"no {kind} {name!r}{meant} There are {', '.join(known)}"


# Fails type checking when a class stops being a Policy.
_guard: tuple[Callable[[Random], Policy], ...] = (WeightedScores,)
