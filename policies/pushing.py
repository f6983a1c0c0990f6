"""Choosers that push a request only to where it starts at once: by the engine's queue, and by its KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from random import Random
from typing import Annotated, Final

from policies.base import (
    ENGINE_FIGURES_VALID_S,
    BackendView,
    Decision,
    Hold,
    Policy,
    RequestFacts,
    Send,
    Tunable,
)
from policies.mistakes import Mistakes
from policies.ranking import Rank, Turns, best_first, only

ASK_AGAIN_S: Final = 0.05
"""After which a request that is held is looked at again: a first token makes room, and is no end of a request."""


class SkyLB(Policy):
    """Of those whose engine has no queue, the one with the most of the prompt cached; while there is none, wait.

    Selective pushing of SkyLB (arXiv 2505.24095): a request that waits in an engine is bound to it, one that waits
    at the router goes to whoever is ready first. A backend is available if the router has fewer requests in flight
    there than it has slots and its engine has no queue; where the engine has told nothing in the last 2 s, if
    they are fewer than `unprobed`, too. Of these the longest match, then the least in-flight over slots, then the
    one dispatched to longest ago. If none is available the request is held.

    Ours: an engine has a queue if more than `queued` requests wait in it, where theirs is 0. A prompt waits there
    for the next step; taken for a queue, near saturation that sends prompts away from where they are cached, to be
    computed elsewhere and to push out what is cached there. Their balancer asks engines ten times a second, the
    probes ask once; so a queue that was seen counts only while more than `queued` requests there have no first
    token, which the router knows exactly. Slots are a limit beside the queue. Their second level, balancers that
    push to each other over regions, is the tiers of a rule; their FCFS queue is the valve's, which is fair between
    tenants.

    Scores: prompt tokens that are cached, of those available; more is better.
    """

    def __init__(
        self,
        rng: Random,
        *,
        unprobed: Annotated[
            int,
            "Most requests in flight where the engine does not tell its queue, at least 1.",
            Tunable(1, 64, log=True),
        ] = 10,
        queued: Annotated[
            int, "Most requests in an engine's queue that are taken for none, 0 or more.", Tunable(0, 4)
        ] = 2,
    ) -> None:
        with Mistakes() as wrong:
            if unprobed < 1:
                wrong(f"unprobed must be at least 1, not {unprobed}", "unprobed")
            if queued < 0:
                wrong(f"queued must be 0 or more, not {queued}", "queued")
        self.needs = frozenset({"prefix"})
        self._unprobed = unprobed
        self._queued = queued
        self._turns = Turns()

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        cached, turn, unprobed, queued = request.cached, self._turns.get, self._unprobed, self._queued
        since = now - ENGINE_FIGURES_VALID_S
        scores: dict[str, float] = {}
        ranking: list[Rank] = []
        rest: list[Rank] = []
        for index, backend in enumerate(backends):
            name, in_flight, slots = backend.name, backend.in_flight, backend.slots
            if backend.sampled_at >= since:
                available = in_flight < slots and (backend.waiting <= queued or backend.prefilling <= queued)
            else:
                available = in_flight < slots and in_flight < unprobed
            if available:
                scores[name] = tokens = cached.get(name, 0)
                ranking.append((-tokens, in_flight / slots, turn(name, 0), index, name))
            else:
                rest.append((in_flight / slots, 0.0, 0.0, index, name))
        if not ranking:
            return Hold(now + ASK_AGAIN_S, f"none of {len(rest)} would start it at once")
        if len(backends) == 1:
            return only(backends[0])
        send = best_first(ranking, f"longest match of {len(ranking)} that are ready", scores)
        if rest:
            rest.sort()
            send.fallbacks += tuple([rank[4] for rank in rest])
        return send

    def dispatched(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        self._turns.took(backend.name)


class KvThreshold(Policy):
    """The first site of a list whose KV caches have room, and in it the backend with the fewest tokens to do.

    The global router of SageServe (arXiv 2502.14617):

        site:    the first in order of preference with KV use < threshold; if there is none, the one of least KV use
        backend: of that site, the fewest pending tokens

    KV use of a site is the mean of its backends, by slots. Of a backend it is what its engine said less than 2 s
    ago; else the router's tokens in flight over the room that the engine has (`kv_tokens`); where nobody has told
    that either, requests in flight over slots.

    Sites that `prefer` does not name come after those that it does: the local one first, then by RTT, those not
    measured last.

    Ours: pending tokens (those in flight: prompts and expected answers) are divided by slots, as backends of one
    site may differ; the estimates for KV use that is not known; the default order. Ties go by in-flight over slots,
    then to the one dispatched to longest ago.

    Scores: KV use of its site.
    """

    def __init__(
        self,
        rng: Random,
        *,
        threshold: Annotated[
            float, "KV use at which a site is passed over, above 0 and up to 1.", Tunable(0.3, 1.0)
        ] = 0.7,
        prefer: Annotated[Sequence[str], "Sites in order of preference; others come after them."] = (),
    ) -> None:
        with Mistakes() as wrong:
            if not 0.0 < threshold <= 1.0:
                wrong(f"threshold must be above 0 and at most 1, not {threshold:g}", "threshold")
            for index, site in enumerate(prefer):
                if site in prefer[:index]:
                    wrong(f"prefer names site {site} twice", "prefer", index)
        self._threshold = threshold
        self._preferred = {site: index for index, site in enumerate(prefer)}
        self._turns = Turns()

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        if len(backends) == 1:
            return only(backends[0])
        turn = self._turns.get
        members: dict[str, list[Rank]] = {}
        used: dict[str, float] = {}
        slots_of: dict[str, int] = {}
        rtt: dict[str, float] = {}
        for index, (backend, use) in enumerate(zip(backends, kv_uses(backends, now), strict=True)):
            site, name, slots = backend.site, backend.name, backend.slots
            if site not in members:
                members[site] = []
                used[site], slots_of[site], rtt[site] = 0.0, 0, inf
            used[site] += use * slots
            slots_of[site] += slots
            if 0.0 < backend.rtt_s < rtt[site]:
                rtt[site] = backend.rtt_s
            members[site].append(
                (backend.in_flight_tokens / slots, backend.in_flight / slots, turn(name, 0), index, name)
            )
        preferred, last, threshold = self._preferred, len(self._preferred), self._threshold
        # The list is walked as a ranking: those with room in order of preference, then the others by KV use.
        walk: list[tuple[bool, float, int, bool, float, int, str]] = []
        scores = {}
        for index, (site, ranking) in enumerate(members.items()):
            use = used[site] / slots_of[site]
            for rank in ranking:
                scores[rank[4]] = use
            place = (preferred.get(site, last), site != "local", rtt[site], index, site)
            full = use >= threshold
            walk.append((full, use if full else 0.0, *place))
        walk.sort()
        names: list[str] = []
        for entry in walk:
            members[entry[6]].sort()
            names += [rank[4] for rank in members[entry[6]]]
        site, full = walk[0][6], walk[0][0]
        why = "least KV use of all sites" if full else "first site with room in its KV cache"
        return Send(names[0], tuple(names[1:]), f"{why}: {site}", scores)

    def dispatched(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        self._turns.took(backend.name)


def kv_uses(backends: Sequence[BackendView], now: float) -> list[float]:
    """How full the KV cache of each backend is, 0 and up; see `KvThreshold` for where the figure comes from."""
    since = now - ENGINE_FIGURES_VALID_S
    uses = []
    for backend in backends:
        if backend.sampled_at >= since and backend.kv_use >= 0.0:  # NaN is not
            uses.append(backend.kv_use)
        elif backend.kv_tokens:
            uses.append(backend.in_flight_tokens / backend.kv_tokens)
        else:
            uses.append(backend.in_flight / backend.slots)
    return uses


# Fails type checking when a class stops being a Policy.
_guard: tuple[Callable[[Random], Policy], ...] = (SkyLB, KvThreshold)
