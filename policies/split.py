"""Shares of a rule's requests for parts of its backends: a canary, a trial, a contract.

Which part a request belongs to follows from its session by hashing alone, or from its id if it has none. So a
conversation stays where it is, every process and every replay agrees, and there is no table to fill or to lose.
Weighted rendezvous hashing as in `prefix.py`: a request and a part have a fixed number u in (0, 1), and the request
asks the part of least -ln(u) / share first, which is each part as often as its share says. When a share grows, only
those requests move that the growth takes; those of a part that is down spread over the others by their shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from math import inf, log

from policies.match import Selector
from policies.values import BackendView, RequestFacts


@dataclass(frozen=True, slots=True)
class Part:
    """Some backends of a rule, and the share of its requests that is theirs."""

    name: str
    share: float
    """0 to 1. 0: it gets what the others have nobody for, and nothing else."""
    selector: Selector
    strict: bool = False
    """Requests that ask this part are refused when none of its backends is available, and go to no other."""


@dataclass(frozen=True, slots=True)
class Split:
    """Parts whose shares make 1. A backend belongs to the first one that selects it."""

    parts: tuple[Part, ...]

    def part_of(self, backend: BackendView) -> int:
        """Index of the backend's part; -1: it has none."""
        for index, part in enumerate(self.parts):
            if part.selector.accepts(backend):
                return index
        return -1

    def order(self, request: RequestFacts) -> list[int]:
        """Indices of all parts, the request's own first."""
        conversation = request.session or request.id
        ranking = []
        for index, part in enumerate(self.parts):
            share = part.share
            rank = -log(_uniform(part.name, conversation)) / share if share > 0.0 else inf
            ranking.append((rank, index))
        ranking.sort()
        return [index for _, index in ranking]


def _uniform(part: str, conversation: str) -> float:
    """A number strictly between 0 and 1 for a pair, of 52 bits and a half. Lone surrogates, which JSON can escape,
    are characters too."""
    text = f"{part}\0{conversation}".encode("utf-8", "surrogatepass")
    return ((int.from_bytes(blake2b(text, digest_size=8).digest(), "little") >> 12) + 0.5) * 2.0**-52
