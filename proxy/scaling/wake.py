"""What the data path asks of whoever starts standbys, and what it offers.

Whoever starts them says where each is by `Fleet.put`, followed by `Runtime.poll`: it sleeps in every state but
ready, and while it drains it is `draining` besides. One that will not be started whatever comes, since a budget is
spent, is `draining` without sleeping: then nobody is held for it. `Prober.watch` has it asked while it starts.
"""

from __future__ import annotations

from typing import Protocol


class Waker(Protocol):
    """Starts standbys, and knows how they are."""

    def wanted(self) -> None:
        """A request is held that only standbys may serve; `Valve.waiting_for_standbys` says which. It is called for
        every such request, maybe amid a poll of the valve: it returns at once and never raises."""

    def answered(self, name: str) -> None:
        """The probes have had the first good answer of a standby that they were told to `watch`."""

    def condition(self, name: str) -> str:
        """How a standby that is not ready is, in words that follow its name: `starting for 12 s`."""
