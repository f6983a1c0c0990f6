"""Which backend a hash belongs to, and who is next when that one has too much to do.

Weighted rendezvous hashing (Thaler and Ravishankar, 1998; weights after Schindelhauer and Schomaker, 2005): each
pair of key and backend has a fixed random number u in (0, 1), and the key belongs to the backend of least
-ln(u) / (weight * slots). When one of n backends goes, only its keys move, and they spread over the others in
proportion; when it returns, so do they. Nothing in the numbers is seeded, so every process and every restart
agrees.

Bounded load (Mirrokni, Thorup and Zadimoghaddam, "Consistent hashing with bounded loads", 2018): a backend whose
in-flight / slots has reached `bound` times the mean of the candidates, this request counted in, is passed over for
the key's next one. A backend that is less than `bound_from` full is never passed over (ours): when there is little
to do, a mean is made of few requests and a lost cache costs more than uneven load.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from math import inf, log
from typing import Annotated, TypeAlias
from zlib import crc32

from policies.base import BackendView, Send, Tunable
from policies.mistakes import Mistakes
from policies.ranking import REMEMBERED, Rank, best_first, only, with_weight

Bound: TypeAlias = Annotated[
    float, "Most load of a backend, as a multiple of the mean; at least 1.", Tunable(1.0, 3.0)
]
BoundFrom: TypeAlias = Annotated[
    float, "In-flight over slots below which a backend is never passed over.", Tunable(0.0, 1.0)
]
"""Parameters of policies that hash."""

_MASK = 2**64 - 1


def check_bounds(bound: float, bound_from: float, wrong: Mistakes) -> None:
    """Say what is wrong with the parameters."""
    if not bound >= 1.0:
        wrong(f"bound must be at least 1, not {bound:g}", "bound")
    if not bound_from >= 0.0:
        wrong(f"bound_from must be at least 0, not {bound_from:g}", "bound_from")


class Rendezvous:
    """Chooses by a key's hash, with bounded load."""

    def __init__(self, bound: float, bound_from: float) -> None:
        self._bound = bound
        self._bound_from = bound_from

    def choose(self, number: int, backends: Sequence[BackendView], whose: str) -> Send:
        """The key's backend or, where that is above the bound, its next one; `whose`: the key, for people."""
        candidates = with_weight(backends)
        if len(candidates) == 1:
            return only(candidates[0])
        in_flight = slots = 0
        for backend in candidates:
            in_flight += backend.in_flight
            slots += backend.slots
        # In-flight is below this level on at least one candidate, since its mean is.
        level = max(self._bound * (in_flight + 1) / slots, self._bound_from)
        home = ""
        least = inf
        scores = {}
        ranking: list[Rank] = []
        for index, backend in enumerate(candidates):
            name = backend.name
            score = -log(_uniform(number, _number_of_backend(name))) / (
                (backend.weight or 1.0) * backend.slots
            )
            scores[name] = score
            if score < least:
                home, least = name, score
            ranking.append((backend.in_flight >= level * backend.slots, score, 0.0, index, name))
        send = best_first(ranking, f"the {whose}'s of {len(ranking)}", scores)
        if send.backend != home:
            send.reason = f"the {whose}'s next: {home} is above {self._bound:g} times the mean load"
        return send


def home(number: int, backends: Sequence[BackendView]) -> str:
    """The backend that a key belongs to, by slots alone."""
    least, name = inf, ""
    for backend in backends:
        score = -log(_uniform(number, _number_of_backend(backend.name))) / backend.slots
        if score < least:
            least, name = score, backend.name
    return name


def number_of_session(session: str) -> int:
    """32 bits; two sessions with the same number are merely served by the same backend.

    Not cached: its text is the client's, so a cache would be as large as clients like. Lone surrogates, which
    JSON can escape, are characters too.
    """
    return crc32(session.encode("utf-8", "surrogatepass"))


@lru_cache(maxsize=REMEMBERED)
def _number_of_backend(name: str) -> int:
    """64 bits."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


def _uniform(key: int, backend: int) -> float:
    """A number strictly between 0 and 1 for a pair, independent of those of all other pairs.

    Multiply, fold, multiply, with the constants of splitmix64 (Steele, Lea and Flood, 2014): a cryptographic
    hash of every pair would cost four times as much. 52 bits and a half, so that neither 0 nor 1 comes out by
    rounding.
    """
    mixed = ((key ^ backend) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ mixed >> 32) * 0x94D049BB133111EB) & _MASK
    return ((mixed >> 12) + 0.5) * 2.0**-52
