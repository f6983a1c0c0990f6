"""The contract between what decides and what acts.

A policy sees plain values and answers with a plain value. It never awaits, does no I/O, reads no clock and
draws no global randomness: `now` is handed in, a random generator comes by the constructor. So the same
object runs in the proxy, in the simulator and in a test, and one recorded log of events gives the same
decisions in all three.

Times are seconds. `now` and every `*_at` field are monotonic; only `RequestFacts.wall` is Unix time, for
rules on the time of day. Backends are named, never passed around: a name is what a record can hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from policies.values import (
    ENGINE_FIGURES_VALID_S,
    KV_USE_FULL,
    REJECT_CODES,
    BackendView,
    Decision,
    Finished,
    Hold,
    Outcome,
    Reject,
    RequestFacts,
    Send,
    Tunable,
)

__all__ = [
    "ENGINE_FIGURES_VALID_S",
    "KV_USE_FULL",
    "REJECT_CODES",
    "BackendView",
    "Decision",
    "Finished",
    "Hold",
    "Outcome",
    "Policy",
    "Reject",
    "RequestFacts",
    "Send",
    "Tunable",
]


# Never compiled: everybody may inherit from it.
class Policy(Protocol):
    """Decides where a request goes. Parameters and a random generator come by the constructor.

    `choose` gets at least one backend, all of them feasible and in a stable order. It must not change
    anything that another request's decision depends on: what was really leased is told by `dispatched`.

    A class that inherits from this one has to write `choose` only.
    """

    needs: frozenset[str] = frozenset()
    """Facts that are only seen to for policies that name them, since they cost something: `hashes` (of the prompt's
    blocks), `prefix` (these, and what of the prompt each backend has cached), `speed` (`ttft_fit` and `tpot_fit` of
    a backend), `length` (a forecast of the answer's length). And `weight`: a backend of weight 0 is then no
    candidate while another one is available that has a weight."""

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision: ...

    def dispatched(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        """The request was leased to `backend`, chosen or fallback; the view already counts the lease."""
        return

    def first_token(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        """The backend sent its first data event; its averages already hold it."""
        return

    def finished(self, finished: Finished) -> None:
        """The attempt has ended; its lease is already released."""
        return
