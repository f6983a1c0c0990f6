"""The compiled policy file: which backends a request may go to, in which order they are asked, and who chooses.

The first rule that matches a request applies. Its tiers are asked in order, and only when none of them takes the
request it is held: spilling comes before waiting.

A tier with `spill` is open or closed, with hysteresis: it opens when the capacity-weighted mean saturation of its
available backends passes `enter` and closes below `leave`. While closed, the tier takes every request, on its
backends with a free slot if there are any (so `enter` above 1 lets the engine queue a little). While open, it still
takes a request whenever one of its backends has a free slot. A tier without `spill` takes a request only with a free
slot. The flag itself is what sessions, waking and alerts go by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from policies.base import BackendView, Policy

EMPTY: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Hours:
    """A daily window of local time, on some weekdays.

    Local time is Unix time plus a fixed offset: a zone that moves its clocks has to be given twice.
    """

    start_minute: int = 0
    """Minutes after local midnight; inclusive."""
    end_minute: int = 1440
    """Minutes after local midnight; exclusive. Not after `start_minute`: the window passes midnight."""
    weekdays: frozenset[int] = frozenset(range(7))
    """Days on which the window starts; 0 is Monday."""
    utc_offset_s: int = 0


@dataclass(frozen=True, slots=True)
class Match:
    """Conditions on a request; what is given must hold, all of it. Without conditions it matches everything."""

    models: tuple[str, ...] = ()
    """Shell patterns (`qwen*`), any of which may match."""
    tenants: frozenset[str] = frozenset()
    data_classes: frozenset[str] = frozenset()
    endpoints: frozenset[str] = frozenset()
    min_priority: int | None = None
    max_priority: int | None = None
    """Inclusive, both."""
    min_prompt_tokens: int | None = None
    max_prompt_tokens: int | None = None
    """Inclusive, both; of the estimate."""
    stream: bool | None = None
    labels: Mapping[str, str] = field(default_factory=lambda: EMPTY)
    """Labels the request must carry, with these values."""
    hours: Hours | None = None


@dataclass(frozen=True, slots=True)
class Selector:
    """A set of backends; what is given must hold, all of it. Without conditions it is every backend."""

    sites: frozenset[str] = frozenset()
    """Site names; empty, or with `*` among them: any site."""
    backends: frozenset[str] = frozenset()
    """Backend names; empty: any."""
    labels: Mapping[str, str] = field(default_factory=lambda: EMPTY)
    """Labels the backend must carry, with these values."""

    def accepts(self, backend: BackendView) -> bool:
        if self.sites and "*" not in self.sites and backend.site not in self.sites:
            return False
        if self.backends and backend.name not in self.backends:
            return False
        return all(backend.labels.get(key) == value for key, value in self.labels.items())


@dataclass(frozen=True, slots=True)
class Spill:
    """Saturation at which a tier opens to the next one, and below which it closes. 0 < leave <= enter."""

    enter: float
    leave: float


@dataclass(frozen=True, slots=True)
class Tier:
    """Backends that are asked together. A backend belongs to the first tier of its rule that selects it."""

    selector: Selector = field(default_factory=Selector)
    spill: Spill | None = None


@dataclass(frozen=True, slots=True)
class Queue:
    """How long a request of a rule may be held, and how many may be at once (per set of candidates)."""

    wait_s: float = 10.0
    depth: int = 200


@dataclass(slots=True)
class Rule:
    """One rule of the file: for the requests it matches, on the backends of `require`, by tiers, `policy` chooses.

    Each rule has its own policy object, so policies keep their state per rule.
    """

    name: str
    policy: Policy
    policy_name: str
    match: Match = field(default_factory=Match)
    require: Selector = field(default_factory=Selector)
    """What every backend of this rule must satisfy (`sites: [local]`)."""
    tiers: tuple[Tier, ...] = (Tier(),)
    """Asked in order; without `prefer` in the file there is one that takes every backend."""
    queue: Queue = field(default_factory=Queue)
