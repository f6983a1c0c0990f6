"""Candidate sets: who may serve a kind of request under a rule, tier by tier, and who of them is available.

They change only when the fleet does, so they are worked out once per rule, model, data class and length
bucket, and kept until `fleet.version` moves. Length buckets are cut at the context limits known for the
model: all requests between two limits have the same candidates.

A backend of weight 0 is to be empty, if the policy of its tier goes by weight: it is taken out here, from all
tiers, fallbacks and ends of waits alike, as long as another one may serve the request, is available and has a
weight (or a policy that asks for none).

A backend that looks sick counts as available where too few others are left (`panic.py`).

Under a rule with `split` each part has sets of its own; the request's own part comes first, and its backends alone
are its candidates. Under a rule that goes by round trips (`rtt`) there is a set for every way in which these lie
inside or outside of the rule's bounds: they are looked at with every decision, and only there.

The spill flags live here too, since they outlast a change of the fleet: a flag belongs to a tier and the
feasible backends in it, and goes when one of them leaves the fleet.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Final

from policies.base import BackendView, Reject, RequestFacts
from policies.constraints import feasible, least_context
from policies.host import HostBounds
from policies.panic import in_spite
from policies.rule import Rule, Spill
from policies.split import Split
from policies.state import Backend, Fleet


@dataclass(slots=True)
class SpillState:
    """The flag of one tier for one set of feasible backends."""

    rule: str
    tier: int
    backends: frozenset[str]
    """Those that are in the tier; under a rule with `rtts`, as it is for the latest request."""
    spill: Spill
    open: bool = False
    openings: int = 0
    """Since start."""
    moved_at: float = -inf
    """Monotonic time of the last opening or closing."""
    saturation: float = 0.0
    """As last seen; inf: no backend of the tier was available."""
    in_spite: frozenset[str] = frozenset()
    """Those that were last used although they look sick."""

    def move(self, saturation: float, now: float) -> None:
        """Take a new figure, and open or close by it."""
        self.saturation = saturation
        if self.open:
            if saturation >= self.spill.leave:
                return
        elif saturation < self.spill.enter:
            return
        else:
            self.openings += 1
        self.open = not self.open
        self.moved_at = now


WHOLE: Final = -1
"""Instead of the index of a part: all backends of the rule."""
OWN: Final = -2
"""Instead of the index of a part: the one that a request belongs to, all of them if there is none."""

NOTHING: frozenset[str] = frozenset()

MOST_DISTANCES = 1000
"""Candidate sets are forgotten at so many when round trips make more of them."""

KNOWN_FALLBACKS = 256
"""Orders of fallbacks kept for one kind of request."""


@dataclass(frozen=True, slots=True)
class AvailableTier:
    """One tier as a kind of request finds it."""

    tier: int
    backends: tuple[Backend, ...]
    """Available ones; may be empty."""
    spill: SpillState | None
    host: HostBounds | None = None


@dataclass(frozen=True, slots=True)
class Candidates:
    """Everything about the backends of a kind of request that holds until the fleet changes."""

    rule: Rule
    key: tuple[str, frozenset[str]]
    """Rule and the backends in its tiers, available or not: requests with the same key wait for the same
    things."""
    tiers: tuple[AvailableTier, ...]
    """Tiers with feasible backends that are not to be empty, in order."""
    order: tuple[str, ...]
    """Available backends in the order of their tiers."""
    tier_of: Mapping[str, int]
    """Tier by name of available backend."""
    removed: Mapping[str, str]
    """Backends that may not serve it, or are to be empty, with the reason."""
    refusal: Reject | None
    """Set when nothing is feasible."""
    known_fallbacks: dict[tuple[int, str, tuple[str, ...]], tuple[str, ...]]
    """What `fallbacks` has answered: a policy proposes the same few orders over and over."""
    part: str = ""
    """Name of the part of the rule's split; empty: it has none, or all parts are meant."""
    moving: tuple[tuple[SpillState, frozenset[str]], ...] = ()
    """Flags of tiers whose backends change with round trips, and who they are."""
    asleep: tuple[str, ...] = ()
    """Standbys among them that are not there, in the order of their tiers; empty of what has been tried."""

    def without(self, tried: frozenset[str]) -> Candidates:
        """The same, less the backends in `tried`."""
        tiers = [
            AvailableTier(
                tier.tier, tuple(b for b in tier.backends if b.name not in tried), tier.spill, tier.host
            )
            for tier in self.tiers
        ]
        return Candidates(
            self.rule,
            self.key,
            tuple(tiers),
            tuple(name for name in self.order if name not in tried),
            self.tier_of,
            self.removed,
            self.refusal,
            {},
            self.part,
        )

    def only(self, name: str) -> Candidates:
        """The same with one backend at most: what the request is about is nowhere else."""
        refusal = self.refusal
        if refusal is None and name not in self.key[1]:
            reason = self.removed.get(name, "it is not a backend any more")
            refusal = Reject("model_not_found", f"only backend {name} could serve this: {reason}")
        others = frozenset(self.tier_of) - {name}
        found = self.without(others)
        return Candidates(
            found.rule,
            (self.key[0], frozenset(self.key[1] & {name})),
            tuple(tier for tier in found.tiers if tier.backends),
            found.order,
            found.tier_of,
            found.removed,
            refusal,
            {},
            found.part,
        )

    def fallbacks(self, tier: int, chosen: str, proposed: tuple[str, ...]) -> tuple[str, ...]:
        """Where to go after `chosen` has failed: as the policy proposed, then on through this tier and
        later."""
        key = (tier, chosen, proposed)
        found = self.known_fallbacks.get(key)
        if found is None:
            if len(self.known_fallbacks) >= KNOWN_FALLBACKS:
                self.known_fallbacks.clear()
            found = self.known_fallbacks[key] = self._fallbacks(tier, chosen, proposed)
        return found

    def _fallbacks(self, tier: int, chosen: str, proposed: tuple[str, ...]) -> tuple[str, ...]:
        names = self.order
        tier_of = self.tier_of
        rest = [name for name in names if name != chosen and tier_of[name] >= tier]
        if not proposed:
            return tuple(rest)
        known = [name for name in dict.fromkeys(proposed) if name in names and name != chosen]
        return (*known, *(name for name in rest if name not in known))


class CandidateSets:
    """Finds the candidates of a request; holds the spill flags."""

    def __init__(self) -> None:
        self.spills: dict[tuple[str, int, frozenset[str]], SpillState] = {}
        self.in_spite: set[str] = set()
        """Backends that some request of late might use although they look sick."""
        self._fleet: Fleet | None = None
        self._version = -1
        self._found: dict[tuple[str, str, str, int, int, tuple[bool, ...]], Candidates] = {}
        self._limits: dict[str, tuple[int, ...]] = {}

    def aside(self) -> CandidateSets:
        """Another one, its flags as they stand here."""
        other = CandidateSets()
        other.spills = {key: replace(state) for key, state in self.spills.items()}
        return other

    def find(
        self,
        rule: Rule,
        request: RequestFacts,
        fleet: Fleet,
        failed: frozenset[str] = NOTHING,
        part: int = OWN,
    ) -> Candidates:
        """The candidates of `request` under `rule`, among the backends of its own part, of another, or of all.

        If nobody is available in its own part but those in `failed`, the next one is its own, unless the part is
        strict.
        """
        if fleet.version != self._version or fleet is not self._fleet:
            self._forget(fleet)
        if part == OWN and rule.split is not None:
            return self._of_own_part(rule, rule.split, request, fleet, failed)
        limits = self._limits.get(request.model)
        if limits is None:  # nobody serves it: not kept, or clients could fill the memory with invented names
            return self._build(rule, part, request, fleet)
        bucket = bisect_left(limits, least_context(request)) if limits else 0
        distances = rule.distances(fleet.backends.values()) if rule.rtts else ()
        key = (rule.name, request.model, request.data_class, bucket, part, distances)
        found = self._found.get(key)
        if found is None:
            if distances and len(self._found) >= MOST_DISTANCES:
                self._found.clear()
            found = self._found[key] = self._build(rule, part, request, fleet)
        if found.moving:
            for state, names in found.moving:
                state.backends = names
        if request.backend:
            return found.only(request.backend)
        return found

    def _of_own_part(
        self, rule: Rule, split: Split, request: RequestFacts, fleet: Fleet, failed: frozenset[str]
    ) -> Candidates:
        own: Candidates | None = None
        for part in split.order(request):
            found = self.find(rule, request, fleet, failed, part)
            if found.refusal is not None:
                continue  # nobody there could ever serve it, or has what it asks for
            if found.order if not failed else not failed.issuperset(found.order):
                return found
            if own is None:
                if split.parts[part].strict:
                    return found
                own = found
            elif found.asleep and not own.asleep:
                own = found
        return own or self.find(rule, request, fleet, failed, WHOLE)

    def move_spills(self, fleet: Fleet, now: float) -> None:
        """Take a new figure for every flag."""
        for state in self.spills.values():
            backends = [fleet[name] for name in state.backends if name in fleet.backends]
            available = [
                backend
                for backend in backends
                if backend.available or (backend.doubtful and backend.name in state.in_spite)
            ]
            state.move(mean_saturation(available, now), now)

    def _forget(self, fleet: Fleet) -> None:
        self._fleet, self._version = fleet, fleet.version
        self._found.clear()
        self.in_spite.clear()
        limits: dict[str, set[int]] = {}
        for backend in fleet:
            for model in backend.models:
                known = limits.setdefault(model, set())
                if model in backend.context_tokens:
                    known.add(backend.context_tokens[model])
        self._limits = {model: tuple(sorted(known)) for model, known in limits.items()}
        names = fleet.backends.keys()
        for key in [key for key in self.spills if not key[2] <= names]:
            del self.spills[key]

    def _build(self, rule: Rule, part: int, request: RequestFacts, fleet: Fleet) -> Candidates:
        found = feasible(request, fleet, rule.allows, rule.name)
        possible, refusal = found.backends, found.refusal
        if part >= 0:
            possible = _of_part(rule, part, possible, found.removed)
            if refusal is None and not possible:
                refusal = Reject("model_not_found", "nothing in this part")  # `find` asks the next one
        inside = possible
        if rule.rtts:
            inside = [backend for backend in possible if rule.reaches(backend)]
            for backend in possible:
                if backend not in inside:
                    found.removed[backend.name] = f"rule {rule.name!r} does not take its round trip"
        spared = frozenset(backend.name for backend in in_spite(inside, fleet.health))
        self.in_spite |= spared
        places = [rule.tier_of(backend) for backend in inside]
        weights = [rule.weight_in(tier, backend) for tier, backend in zip(places, inside, strict=True)]
        emptying = any(
            (backend.available or backend.name in spared) and weight > 0.0
            for backend, weight in zip(inside, weights, strict=True)
        )
        members: list[list[Backend]] = [[] for _ in rule.tiers]
        for backend, tier, weight in zip(inside, places, weights, strict=True):
            if emptying and weight == 0.0:
                found.removed[backend.name] = "weight 0, and another backend is available"
            else:
                members[tier].append(backend)
        known = frozenset(backend.name for backend in possible) if rule.rtts else NOTHING
        spills = [self._spill(rule, index, tier, spared, known) for index, tier in enumerate(members)]
        tiers = tuple(
            AvailableTier(
                index,
                tuple(backend for backend in tier if backend.available or backend.name in spared),
                spills[index],
                rule.tiers[index].host,
            )
            for index, tier in enumerate(members)
            if tier
        )
        tier_of = {backend.name: tier.tier for tier in tiers for backend in tier.backends}
        moving = [
            (state, frozenset(backend.name for backend in tier))
            for state, tier in zip(spills, members, strict=True)
            if state is not None and rule.rtts
        ]
        return Candidates(
            rule,
            (rule.name, known or frozenset(backend.name for tier in members for backend in tier)),
            tiers,
            tuple(tier_of),
            tier_of,
            found.removed,
            refusal,
            {},
            rule.split.parts[part].name if rule.split is not None and part >= 0 else "",
            tuple(moving),
            tuple(backend.name for tier in members for backend in tier if backend.awaited),
        )

    def _spill(
        self, rule: Rule, tier: int, backends: list[Backend], in_spite: frozenset[str], known: frozenset[str]
    ) -> SpillState | None:
        """The flag of a tier. With `known`, its backends come and go among those, and the flag stays."""
        spill = rule.tiers[tier].spill
        if spill is None or not (backends or known):
            return None
        key = (rule.name, tier, known or frozenset(backend.name for backend in backends))
        state = self.spills.get(key)
        if state is None:
            state = self.spills[key] = SpillState(*key, spill)
        state.in_spite = in_spite
        return state


def _of_part(rule: Rule, part: int, backends: list[Backend], removed: dict[str, str]) -> list[Backend]:
    """Those of a rule's backends that are in a part of its split; notes why the others are not."""
    assert rule.split is not None
    inside = []
    for backend in backends:
        home = rule.split.part_of(backend)
        if home == part:
            inside.append(backend)
        else:
            parts = rule.split.parts
            removed[backend.name] = (
                f"of part {parts[home].name!r}, and the request is for {parts[part].name!r}"
            )
    return inside


def mean_saturation(backends: Sequence[BackendView], now: float) -> float:
    """Capacity-weighted mean saturation; inf of no backends."""
    slots = sum(backend.slots for backend in backends)
    return sum(backend.saturation(now) * backend.slots for backend in backends) / slots if slots else inf
