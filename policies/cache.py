"""A chooser that goes by what each backend has probably cached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from random import Random
from typing import Annotated, Final

from policies.base import BackendView, Decision, Policy, RequestFacts, Send, Tunable
from policies.mistakes import Mistakes
from policies.prefixes import ROOM_TOKENS
from policies.ranking import Rank, Recent, Turns, best_first, only

BATCH: Final = 256
"""Sequences that an engine batches at most by default (vLLM's `max_num_seqs`): what the published difference of 64
requests is a quarter of."""


class CacheAware(Policy):
    """The backend with the most of the prompt cached, as long as their loads are alike.

    The rule of SGLang's router and of SMG, `cache_aware`, with their parameters and defaults:

        imbalanced: most - least > balance_abs_threshold and most > balance_rel_threshold * least
        imbalanced                          -> the shortest queue
        else, cached > cache_threshold      -> the best match
        else                                -> the one with the most room in its cache

    `cached`: the share of the prompt that the best match has.

    Ours: queues are in-flight over slots, since backends differ, so `balance_abs_threshold` is counted as if each
    had 256 slots, which an engine has by default: 64 is a quarter of them. Room: theirs is the smallest tree, which
    evictions make smallest where most is going on; here it is what was to compute there, prompt tokens over the
    room of its KV cache, counted from what the least of those present had at the last such choice, if that is more
    (the virtual time of start-time fair queueing, Goyal et al. 1996): who was away makes up for nothing, and is not
    flooded. Ties go by load, then to the one dispatched to longest ago.

    Scores: in-flight over slots; or the share that is cached, more is better; or what was to compute over the room.
    """

    def __init__(
        self,
        rng: Random,
        *,
        cache_threshold: Annotated[
            float, "Share of the prompt above which the best match is taken.", Tunable(0.0, 1.0)
        ] = 0.3,
        balance_abs_threshold: Annotated[
            float,
            "Most difference of requests in flight, as if each backend had 256 slots.",
            Tunable(8.0, 256.0, log=True),
        ] = 64.0,
        balance_rel_threshold: Annotated[
            float, "Most load as a multiple of the least; at least 1.", Tunable(1.0, 4.0)
        ] = 1.5,
    ) -> None:
        with Mistakes() as wrong:
            if not 0.0 <= cache_threshold <= 1.0:
                wrong(f"cache_threshold must be between 0 and 1, not {cache_threshold:g}", "cache_threshold")
            for name, value, least in (
                ("balance_abs_threshold", balance_abs_threshold, 0.0),
                ("balance_rel_threshold", balance_rel_threshold, 1.0),
            ):
                if not value >= least:
                    wrong(f"{name} must be at least {least:g}, not {value:g}", name)
        self.needs = frozenset({"prefix"})
        self._cache_threshold = cache_threshold
        self._difference = balance_abs_threshold / BATCH
        self._ratio = balance_rel_threshold
        self._turns = Turns()
        self._filled: Recent[float] = Recent()
        """What was to compute on each backend over the room of its cache."""
        self._level = 0.0
        """What the least of those present had when room was last chosen by."""
        self._decided = ("", 0.0)
        """The last decision by room: request, and what the chosen one had."""

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        if len(backends) == 1:
            return only(backends[0])
        cached = request.cached
        least, most, match = inf, 0.0, 0
        for backend in backends:
            load = backend.in_flight / backend.slots
            if load < least:
                least = load
            if load > most:
                most = load
            if cached and (tokens := cached.get(backend.name, 0)) > match:
                match = tokens
        if most - least > self._difference and most > self._ratio * least:
            return self._shortest_queue(backends)
        if match > self._cache_threshold * request.prompt_tokens:
            return self._best_match(request, backends, match)
        return self._most_room(request, backends)

    def _shortest_queue(self, backends: Sequence[BackendView]) -> Send:
        turn = self._turns.get
        scores = {}
        ranking: list[Rank] = []
        for index, backend in enumerate(backends):
            name = backend.name
            scores[name] = load = backend.in_flight / backend.slots
            ranking.append((load, turn(name, 0), 0.0, index, name))
        return best_first(ranking, f"imbalanced: shortest queue of {len(ranking)}", scores)

    def _best_match(self, request: RequestFacts, backends: Sequence[BackendView], match: int) -> Send:
        cached, tokens, turn = request.cached, request.prompt_tokens, self._turns.get
        scores = {}
        ranking: list[Rank] = []
        for index, backend in enumerate(backends):
            name = backend.name
            scores[name] = share = cached.get(name, 0) / tokens
            ranking.append((-share, backend.in_flight / backend.slots, turn(name, 0), index, name))
        return best_first(ranking, f"has {match / tokens:.0%} of the prompt cached", scores)

    def _most_room(self, request: RequestFacts, backends: Sequence[BackendView]) -> Send:
        turn, filled_of = self._turns.get, self._filled.lookup
        scores = {}
        ranking: list[Rank] = []
        for index, backend in enumerate(backends):
            name = backend.name
            scores[name] = filled = filled_of(name, 0.0)
            ranking.append((filled, backend.in_flight / backend.slots, turn(name, 0), index, name))
        send = best_first(ranking, f"most room in its cache, of {len(ranking)}", scores)
        self._decided = (request.id, ranking[0][0])
        return send

    def dispatched(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        name = backend.name
        self._turns.took(name)
        decided, least = self._decided
        if request.id == decided and least > self._level:
            self._level = least
        share = request.new_tokens(name) / (backend.kv_tokens or ROOM_TOKENS)
        self._filled.note(name, max(self._filled.get(name, 0.0), self._level) + share)


# Fails type checking when a class stops being a Policy.
_guard: tuple[Callable[[Random], Policy], ...] = (CacheAware,)
