"""Choosers that bring a request to where its prompt may still be cached.

An engine keeps the KV cache of what it has just served, so the next turn of a conversation is cheap on the
backend that served the last one, and dear anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import blake2b
from math import inf, log
from random import Random
from typing import Annotated
from zlib import crc32

from policies import find, load
from policies.base import BackendView, Decision, Finished, Policy, RequestFacts
from policies.ranking import REMEMBERED, Rank, best_first, only, with_weight

_MASK = 2**64 - 1


class SessionAffinity(Policy):
    """The same backend for the same session, by hashing alone: no table of sessions to fill or to lose.

    Weighted rendezvous hashing (Thaler and Ravishankar, 1998; weights after Schindelhauer and Schomaker, 2005):
    each pair of session and backend has a fixed random number u in (0, 1), and the session belongs to the
    backend of least -ln(u) / (weight * slots). When one of n backends goes, only its sessions move, and they
    spread over the others in proportion; when it returns, so do they. Nothing in the
    numbers is seeded, so every process and every restart agrees.

    Bounded load (Mirrokni, Thorup and Zadimoghaddam, "Consistent hashing with bounded loads", 2018): a backend
    whose in-flight / slots has reached `bound` times the mean of the candidates, this request counted in, is
    passed over for the session's next one. A backend that is less than `bound_from` full is never passed over:
    when there is little to do, a mean is made of few requests and a lost cache costs more than uneven load.

    A request without a session is decided by `fallback`. Weight 0 gets nothing, not even as a fallback, unless
    no candidate has a weight: then all are alike.

    Scores: -ln(u) / (weight * slots).
    """

    def __init__(
        self,
        rng: Random,
        *,
        fallback: Annotated[str, "Policy that decides requests without a session."] = "least-load",
        bound: Annotated[float, "Most load of a backend, as a multiple of the mean; at least 1."] = 1.25,
        bound_from: Annotated[
            float, "In-flight over slots below which a backend is never passed over."
        ] = 0.5,
    ) -> None:
        if not bound >= 1.0:
            raise ValueError(f"bound must be at least 1, not {bound:g}")
        if not bound_from >= 0.0:
            raise ValueError(f"bound_from must be at least 0, not {bound_from:g}")
        if issubclass(find(fallback), SessionAffinity):
            raise ValueError("fallback must be another policy than session-affinity")
        self._fallback = load(fallback, rng)
        self._bound = bound
        self._bound_from = bound_from
        self.needs = self._fallback.needs | {"weight"}

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        if not request.session:
            return self._fallback.choose(request, backends, now)
        candidates = with_weight(backends)
        if len(candidates) == 1:
            return only(candidates[0])
        in_flight = slots = 0
        for backend in candidates:
            in_flight += backend.in_flight
            slots += backend.slots
        # In-flight is below this level on at least one candidate, since its mean is.
        level = max(self._bound * (in_flight + 1) / slots, self._bound_from)
        session = _number_of_session(request.session)
        home = ""
        least = inf
        scores = {}
        ranking: list[Rank] = []
        for index, backend in enumerate(candidates):
            name = backend.name
            score = -log(_uniform(session, _number_of_backend(name))) / (
                (backend.weight or 1.0) * backend.slots
            )
            scores[name] = score
            if score < least:
                home, least = name, score
            ranking.append((backend.in_flight >= level * backend.slots, score, 0.0, index, name))
        send = best_first(ranking, f"the session's of {len(ranking)}", scores)
        if send.backend != home:
            send.reason = f"the session's next: {home} is above {self._bound:g} times the mean load"
        return send

    def dispatched(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        self._fallback.dispatched(request, backend, now)

    def first_token(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        self._fallback.first_token(request, backend, now)

    def finished(self, finished: Finished) -> None:
        self._fallback.finished(finished)


def _number_of_session(session: str) -> int:
    """32 bits; two sessions with the same number are merely served by the same backend.

    Not cached: its text is the client's, so a cache would be as large as clients like. Lone surrogates, which
    JSON can escape, are characters too.
    """
    return crc32(session.encode("utf-8", "surrogatepass"))


@lru_cache(maxsize=REMEMBERED)
def _number_of_backend(name: str) -> int:
    """64 bits."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


def _uniform(session: int, backend: int) -> float:
    """A number strictly between 0 and 1 for a pair, independent of those of all other pairs.

    Multiply, fold, multiply, with the constants of splitmix64 (Steele, Lea and Flood, 2014): a cryptographic
    hash of every pair would cost four times as much. 52 bits and a half, so that neither 0 nor 1 comes out by
    rounding.
    """
    mixed = ((session ^ backend) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ mixed >> 32) * 0x94D049BB133111EB) & _MASK
    return ((mixed >> 12) + 0.5) * 2.0**-52


# Fails type checking when a class stops being a Policy.
_guard: tuple[Callable[[Random], Policy], ...] = (SessionAffinity,)
