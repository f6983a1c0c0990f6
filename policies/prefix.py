"""Choosers that bring a request to where its prompt may still be cached, by hashing alone.

An engine keeps the KV cache of what it has just served, so the next turn of a conversation is cheap on the
backend that served the last one, and dear anywhere else; so is the next prompt that begins like others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Annotated

from policies import PolicyError, find, load
from policies.base import BackendView, Decision, Finished, Policy, RequestFacts, Tunable
from policies.mistakes import Mistakes
from policies.rendezvous import Bound, BoundFrom, Rendezvous, check_bounds, number_of_session


class _OrFallback(Policy):
    """A policy with another one that decides, and hears of, what it does not decide itself."""

    def __init__(self, rng: Random, fallback: str, bound: float, bound_from: float, wrong: Mistakes) -> None:
        check_bounds(bound, bound_from, wrong)
        self._homes = Rendezvous(bound, bound_from)
        try:
            if issubclass(find(fallback), type(self)):
                wrong(f"fallback must be another policy than {self._own_name}", "fallback")
                return
            self._fallback = load(fallback, rng)
        except PolicyError as error:
            wrong(str(error), "fallback")
            return
        self.needs = self._fallback.needs | {"weight"}

    _own_name = ""

    def dispatched(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        self._fallback.dispatched(request, backend, now)

    def first_token(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        self._fallback.first_token(request, backend, now)

    def finished(self, finished: Finished) -> None:
        self._fallback.finished(finished)


class SessionAffinity(_OrFallback):
    """The same backend for the same session, by hashing alone: no table of sessions to fill or to lose.

    Weighted rendezvous hashing with bounded load, as `policies/rendezvous.py` tells with its sources: a session
    belongs to the backend of least -ln(u) / (weight * slots), u a fixed random number in (0, 1) for each pair of
    session and backend. One whose in-flight / slots has reached `bound` times the mean, and which is at least
    `bound_from` full, is passed over for the session's next one.

    A request without a session is decided by `fallback`. Weight 0 gets nothing, not even as a fallback, unless
    no candidate has a weight: then all are alike.

    Scores: -ln(u) / (weight * slots).
    """

    _own_name = "session-affinity"

    def __init__(
        self,
        rng: Random,
        *,
        fallback: Annotated[str, "Policy that decides requests without a session."] = "least-load",
        bound: Bound = 1.25,
        bound_from: BoundFrom = 0.5,
    ) -> None:
        with Mistakes() as wrong:
            super().__init__(rng, fallback, bound, bound_from, wrong)

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        if not request.session:
            return self._fallback.choose(request, backends, now)
        return self._homes.choose(number_of_session(request.session), backends, "session")


class PrefixAffinity(_OrFallback):
    """The same backend for prompts that begin alike, by hashing alone: no record of what is cached where.

    As `session-affinity`, weighted rendezvous hashing with bounded load (Mirrokni et al. 2018); the key is the
    prompt's first `blocks` blocks of 512 tokens, or as many full ones as it has. KubeAI's `PrefixHash` and SMG's
    `prefix_hash` go by such a key, with the same bound. It takes no notice of sessions: for those first,
    `pick: {policy: session-affinity, fallback: prefix-affinity}`.

    Few blocks bring together all prompts that share a system prompt, and the bound spreads them over as many
    backends as they need; more tell conversations apart under it, but a prompt that grows past `blocks` for the
    first time may move. A prompt without one full block is decided by `fallback`, as there is little to save.

    Ours: backends by weight and slots, a load that is in-flight over slots, and `bound_from`. Scores:
    -ln(u) / (weight * slots).
    """

    _own_name = "prefix-affinity"

    def __init__(
        self,
        rng: Random,
        *,
        blocks: Annotated[
            int, "Blocks of 512 tokens that have to be alike, at least 1.", Tunable(1, 16, log=True)
        ] = 1,
        fallback: Annotated[str, "Policy that decides prompts of less than one block."] = "least-load",
        bound: Bound = 1.25,
        bound_from: BoundFrom = 0.5,
    ) -> None:
        with Mistakes() as wrong:
            if blocks < 1:
                wrong(f"blocks must be at least 1, not {blocks}", "blocks")
            super().__init__(rng, fallback, bound, bound_from, wrong)
        self.needs |= {"hashes"}
        self._blocks = blocks

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        prefix = request.prefix
        if not prefix:
            return self._fallback.choose(request, backends, now)
        return self._homes.choose(prefix[min(self._blocks, len(prefix)) - 1], backends, "prompt")


# Fails type checking when a class stops being a Policy.
_guard: tuple[Callable[[Random], Policy], ...] = (SessionAffinity, PrefixAffinity)
