"""Which requests have taken too long: the proxy's timeouts, in virtual time.

As in `proxy/exchange.py`, they are looked at a few times a second, and no request has a timer of its own. All have
the same ones, so whoever is first in a queue is the first to be late: a look costs next to nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from policies.state import Lease
from sim.members import Node
from sim.trips import Trip


class Timeouts:
    """What was sent, and how long it may take. Times are seconds."""

    def __init__(self, first_token_s: float, between_tokens_s: float, total_s: float) -> None:
        self.first_token_s = first_token_s
        self.between_tokens_s = between_tokens_s
        self.total_s = total_s
        self._trips: deque[Trip] = deque()
        """In the order of their arrivals. Those that have ended stay until they come up."""
        self._attempts: deque[tuple[Trip, Lease]] = deque()
        """In the order of their sending; they stay likewise."""

    def arrived(self, trip: Trip) -> None:
        self._trips.append(trip)

    def sent(self, trip: Trip) -> None:
        assert trip.lease is not None
        self._attempts.append((trip, trip.lease))

    def overdue(self, now: float) -> Trip | None:
        """One that takes longer than `total_s`. Those that are held are the valve's to end."""
        trips = self._trips
        while trips and trips[0].end is not None:
            trips.popleft()
        for trip in trips:
            if now - trip.facts.arrived <= self.total_s:
                break
            if trip.lease is not None:
                return trip
        return None

    def silent(self, now: float) -> Trip | None:
        """One whose present attempt has given no first token within `first_token_s`; each is told once."""
        attempts = self._attempts
        while attempts:
            trip, lease = attempts[0]
            waits = trip.lease is lease and trip.first_token < 0.0
            if waits and now - lease.started <= self.first_token_s:
                break
            attempts.popleft()
            if waits:
                return trip
        return None

    def stalled(self, nodes: Iterable[Node], now: float) -> Trip | None:
        """One that got no further token for longer than `between_tokens_s`: its sequence lost its KV blocks, and
        waits for others to leave. No step takes so long, and an engine that dies closes its connections."""
        for node in nodes:
            if not node.engine.stalled:
                continue
            for sequence, since in node.engine.stalled.items():
                if now - since * 1e-6 <= self.between_tokens_s:
                    break
                assert isinstance(sequence.tag, Trip)
                return sequence.tag
        return None
