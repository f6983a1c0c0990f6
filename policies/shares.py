"""Who holds the slots of one backend, and which of its free ones are kept for others.

A fair queue decides who is next when a slot comes free. It cannot give a light tenant the slot that a flood has
taken just before: the light one waits for an end, every time, and that is many times what it waits for its first
token when it is alone. So a tenant that holds more than an equal share of a backend leaves a few slots free, for
those with less to find when they come: as many as they use on average, and two standard deviations of that (a
number of requests in flight is about Poisson distributed, so its variance is its mean), less what they hold
already. It is at most a quarter of the slots. Nothing is kept for who has used nothing lately, so one tenant alone
has all.

Who comes when even those are taken, and holds less than its share while another holds more, is owed a slot: it is
sent although the backend is full, as far as the rule's `overflow` goes and as its policy chooses, and the other
gets its next one the later.
"""

from __future__ import annotations

from math import ceil, exp, sqrt
from typing import Final

MEAN_TAU_S: Final = 30.0
"""Time constant of the mean number of slots that a tenant holds."""
LEAST_MEAN: Final = 0.02
"""A tenant that holds nothing, and less than this on average, has gone."""
MOST_KEPT: Final = 4
"""At most one slot in so many is kept."""
_SWEPT_FROM: Final = 64


class Use:
    """What one tenant uses of a backend."""

    __slots__ = ("at", "held", "mean", "priority")

    def __init__(self, now: float) -> None:
        self.held = 0
        """Slots it holds now."""
        self.mean = 0.0
        """Mean of `held`, as it was `at`."""
        self.at = now
        self.priority = 0
        """Of its last request."""

    def follow(self, now: float) -> None:
        """Bring the mean to `now`."""
        if now > self.at:
            self.mean = self.held + (self.mean - self.held) * exp((self.at - now) / MEAN_TAU_S)
            self.at = now

    @property
    def gone(self) -> bool:
        return self.held == 0 and self.mean < LEAST_MEAN


class Shares:
    """The tenants of one backend."""

    def __init__(self) -> None:
        self.uses: dict[str, Use] = {}

    def aside(self) -> Shares:
        """A copy."""
        other = Shares()
        for tenant, use in self.uses.items():
            copy = other.uses[tenant] = Use(use.at)
            copy.held, copy.mean, copy.priority = use.held, use.mean, use.priority
        return other

    def take(self, tenant: str, priority: int, now: float) -> None:
        """A request of the tenant gets a slot."""
        use = self.uses.get(tenant)
        if use is None:
            if len(self.uses) >= _SWEPT_FROM:
                self._sweep(now)
            use = self.uses[tenant] = Use(now)
        use.follow(now)
        use.held += 1
        use.priority = priority

    def give_back(self, tenant: str, now: float) -> None:
        """It has ended."""
        use = self.uses[tenant]
        use.follow(now)
        use.held -= 1

    def _sweep(self, now: float) -> None:
        for tenant, use in list(self.uses.items()):
            use.follow(now)
            if use.gone:
                del self.uses[tenant]

    def kept_from(self, tenant: str, priority: int, slots: int, now: float) -> int:
        """Free slots that the tenant has to leave to others; below zero: it need not look at how many are free.

        It need not when it holds less than an equal share, when nobody else uses the backend, or when tenants are
        so many that none has a slot to itself. Tenants whose requests are less urgent do not count.
        """
        mine = self.uses.get(tenant)
        if len(self.uses) < 2 or mine is None or mine.held < 1:
            return -1
        others = [use for use in self._others(tenant, now) if use.priority >= priority]
        share = slots / (len(others) + 1)
        if not others or share < 1.0 or mine.held < share:
            return -1
        mean, held = 0.0, 0
        for use in others:
            if use.held < share:
                mean += use.mean
                held += use.held
        return max(min(ceil(mean + 2.0 * sqrt(mean)) - held, slots // MOST_KEPT), 0)

    def owes(self, tenant: str, priority: int, slots: int, now: float) -> bool:
        """Whether the tenant holds less than an equal share, and one that is no more urgent holds more than it."""
        if not self.uses:
            return False
        others = self._others(tenant, now)
        share = slots / (len(others) + 1)
        mine = self.uses.get(tenant)
        if (0 if mine is None else mine.held) + 1 > share:
            return False
        return any(use.held > share and use.priority <= priority for use in others)

    def _others(self, tenant: str, now: float) -> list[Use]:
        """The other tenants that use the backend, or did lately."""
        others = []
        for name, use in list(self.uses.items()):
            if name != tenant:
                use.follow(now)
                if use.gone:
                    del self.uses[name]
                else:
                    others.append(use)
        return others
