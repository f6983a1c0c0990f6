"""What a valve would decide over a request now, without its being sent: nothing is counted, leased or held, no flag
of a spill moves, and no policy hears of it or draws a number.

It is the valve's own `submit`, over a copy of whatever deciding changes, the policies among it. What it only reads
is shared: the queues, and what is known of prefixes, speeds and lengths.
"""

from __future__ import annotations

from policies.base import Hold, RequestFacts
from policies.candidates import Candidates
from policies.eventlog import RecordedValve
from policies.fairness import FairQueue
from policies.routing import Routing
from policies.valve import Valve


class DryRun(Valve):
    """Decides once as another valve would."""

    def __init__(self, valve: Valve) -> None:
        """Raises whatever a policy raises that cannot be copied."""
        super().__init__(valve.rules.aside(), valve.fleet.aside())
        self._held, self._queues = valve._held, valve._queues  # to be read only
        self._version, self._back_at = valve._version, valve._back_at  # time is looked at when it would do so
        self._salted = valve.log.salted if isinstance(valve, RecordedValve) else None
        self.waiting = 0
        """Those that wait in the queue that the request would be put into."""

    def decide(self, request: RequestFacts, now: float) -> Routing:
        """As `submit`, without a lease; a `Hold` puts the request into no queue. `request` is changed as `submit`
        changes it."""
        if self._salted is not None and request.session:
            request.session = self._salted(request.session)  # while it is recorded, policies see it so
        return self.submit(request, now)

    def _lease(self, routing: Routing, now: float) -> None:
        pass

    def _enqueue(self, routing: Routing, candidates: Candidates, now: float) -> Routing:
        assert type(routing.decision) is Hold
        queue = self._queues.get(candidates.key) or FairQueue(candidates.key)
        self.waiting = len(queue)
        return self._no_place(routing.request, candidates, queue, now) or routing

    def _follow_fleet(self, now: float) -> None:
        self.fleet.refresh(now)
