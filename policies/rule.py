"""One rule of a policy file, compiled: what it matches, which backends it allows, and its tiers in order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy, deepcopy
from dataclasses import dataclass, field

from policies.base import BackendView, Policy
from policies.guarded import Guarded
from policies.host import HostBounds
from policies.match import Between, Match, Selector
from policies.split import Split


@dataclass(frozen=True, slots=True)
class Spill:
    """Saturation at which a tier opens to the next, and below which it closes: 0 < leave <= enter."""

    enter: float
    leave: float


@dataclass(frozen=True, slots=True)
class Tier:
    """Backends that are asked together. A backend belongs to the first tier of its rule that selects it."""

    selector: Selector = field(default_factory=Selector)
    spill: Spill | None = None
    policy: Policy | None = None
    """Chooses in this tier instead of the rule's policy."""
    policy_name: str = ""
    host: HostBounds | None = None
    """A backend whose host is outside of them has no free slot here."""


@dataclass(frozen=True, slots=True)
class Queue:
    """How long a request of a rule may be held, and how many may be at once (per set of feasible
    backends)."""

    wait_s: float = 10.0
    depth: int = 200
    overflow: float = 1.5
    """Saturation from which a backend is not sent even requests whose wait is over."""
    cold_start_s: float = 300.0
    """How long a request may be held while nothing but a standby may serve it."""


@dataclass(slots=True, eq=False)
class Rule:
    """One rule of the file: for the requests it matches, on the backends of `require`, tier by tier.

    Each rule has a policy object of its own, so policies keep their state per rule.
    """

    name: str
    policy: Policy
    policy_name: str
    match: Match = field(default_factory=Match)
    require: Selector = field(default_factory=Selector)
    """What every backend of this rule must satisfy (`sites: [local]`), whatever happens."""
    tiers: tuple[Tier, ...] = (Tier(),)
    """Asked in order; without `prefer` in the file there is one that takes every backend. With `avoid`, one more
    comes after them."""
    queue: Queue = field(default_factory=Queue)
    weights: Mapping[str, float] = field(default_factory=dict)
    """By name of backend, in place of the configuration's."""
    avoid: tuple[Selector, ...] = ()
    """Backends of the tiers that are asked after all others, whichever tier they are of."""
    split: Split | None = None
    """Parts of its backends, each for a fixed share of its requests."""
    guarded: Guarded = field(init=False)
    """The policy, unable to take a request down; counts its failures."""
    choosers: tuple[Guarded, ...] = field(init=False)
    """By tier: the tier's own policy, guarded, or `guarded`."""
    matches_all: bool = field(init=False)
    rtts: tuple[Between, ...] = field(init=False)
    """All bounds on round trips: who its backends are changes when one of them comes to lie inside or outside."""

    def __post_init__(self) -> None:
        if self.avoid:
            self.tiers = (*self.tiers, Tier())
        self.guarded = Guarded(self.policy, self.policy_name)
        self.choosers = tuple(
            Guarded(tier.policy, tier.policy_name) if tier.policy is not None else self.guarded
            for tier in self.tiers
        )
        self.matches_all = self.match == Match()
        selectors = (self.require, *(tier.selector for tier in self.tiers), *self.avoid)
        self.rtts = tuple(dict.fromkeys(one.rtt for one in selectors if one.rtt is not None))

    def aside(self) -> Rule:
        """The same rule with policies of its own, as they stand: neither hears of the other.

        Raises whatever a policy raises that cannot be copied.
        """
        other = copy(self)
        other.guarded, other.choosers = deepcopy((self.guarded, self.choosers))
        return other

    def tier_of(self, backend: BackendView) -> int:
        """Index of the first tier that selects the backend now, of the last if it is to be avoided; -1: none."""
        last = len(self.tiers) - 1
        for index, tier in enumerate(self.tiers):
            if self.avoid and index == last:
                break
            if tier.selector.accepts(backend):
                avoided = any(selector.accepts(backend) for selector in self.avoid)
                return last if avoided else index
        return -1

    def weight_in(self, tier: int, backend: BackendView) -> float:
        """The backend's weight for the policy of a tier; 1 for one that does not go by weight."""
        if "weight" not in self.choosers[tier].needs:
            return 1.0
        return self.weights.get(backend.name, backend.weight)

    def allows(self, backend: BackendView) -> bool:
        """Whether the rule lets the backend serve at all, whatever its round trip."""
        tiers = self.tiers[:-1] if self.avoid else self.tiers
        return (
            self.require.fits(backend)
            and any(tier.selector.fits(backend) for tier in tiers)
            and (self.split is None or self.split.part_of(backend) >= 0)
        )

    def reaches(self, backend: BackendView) -> bool:
        """Whether the rule lets a backend that it `allows` serve now."""
        return not self.rtts or (self.require.accepts(backend) and self.tier_of(backend) >= 0)

    def distances(self, backends: Iterable[BackendView]) -> tuple[bool, ...]:
        """For each of `rtts` and each backend, whether its round trip is inside: `is_between`, without calls."""
        round_trips = [backend.rtt_s for backend in backends]
        inside: list[bool] = []
        for rtt in self.rtts:
            low, high = rtt.low, rtt.high
            inside += [0.0 < seconds <= high and low <= seconds for seconds in round_trips]
        return tuple(inside)
