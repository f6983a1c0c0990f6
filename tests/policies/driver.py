"""Drives a policy as proxy and simulator do: choose, lease, first token, release, on a clock of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from heapq import heappop, heappush
from random import Random
from typing import Any

from policies.base import BackendView, Hold, Outcome, Policy, RequestFacts, Send
from policies.state import Backend, Fleet, Lease, cached_in


def request(id: str = "r", **facts: Any) -> RequestFacts:
    return RequestFacts(**{"id": id, "model": "m", "prompt_tokens": 100, "expected_tokens": 100, **facts})


def views(count: int, **facts: Any) -> list[BackendView]:
    """`b0`, `b1`, ... all alike."""
    return [BackendView(**{"name": f"b{index}", "site": "remote", **facts}) for index in range(count)]


def loaded(*in_flight: int, **facts: Any) -> list[BackendView]:
    """One backend for each number of requests in flight."""
    return [
        BackendView(name=f"b{index}", in_flight=load, in_flight_tokens=200 * load, **facts)
        for index, load in enumerate(in_flight)
    ]


class Driver:
    """A fleet of equal backends under one policy.

    One request arrives every `every` seconds and takes 1 to 2 s: with `every=3` all are idle at each decision.
    Holds are waited for.
    """

    def __init__(self, policy: Policy, count: int, every: float = 0.05, seed: int = 7, **facts: Any) -> None:
        self.policy = policy
        self.fleet = Fleet(
            [Backend(**{"name": f"b{index}", "site": "remote", **facts}) for index in range(count)]
        )
        self.fleet.see_to(policy.needs)
        self.every = every
        self.rng = Random(seed)
        self.now = 100.0
        self.requests = 0
        self.chosen: list[str] = []
        self._events: list[tuple[float, int, Lease, bool]] = []

    @property
    def names(self) -> list[str]:
        return list(self.fleet.backends)

    def next_request(self) -> RequestFacts:
        """The next to arrive, each of a session of its own."""
        self.now += self.every
        self.requests += 1
        self._settle()
        prefix = (4 * self.requests, 4 * self.requests + 1)
        session = f"tenant/s{self.requests}"
        return request(f"r{self.requests}", session=session, body_bytes=2000, prefix=prefix, prefix_tokens=50)

    def decide(self, facts: RequestFacts, candidates: Sequence[Backend]) -> Send:
        facts.cached = cached_in(candidates, facts)
        decision = self.policy.choose(facts, candidates, self.now)
        while isinstance(decision, Hold):
            assert decision.until > self.now
            self.now = decision.until
            self._settle()
            decision = self.policy.choose(facts, candidates, self.now)
        assert isinstance(decision, Send)
        return decision

    def lease(self, facts: RequestFacts, name: str) -> None:
        lease = self.fleet.lease(facts, name, self.now, self.policy)
        first = self.now + self.rng.uniform(0.2, 0.3)
        heappush(self._events, (first, 2 * self.requests, lease, True))
        heappush(self._events, (first + self.rng.uniform(0.8, 1.7), 2 * self.requests + 1, lease, False))

    def run(self, count: int, names: Sequence[str] | None = None) -> Counter[str]:
        """Send `count` requests to the fleet or the named part of it; how many each backend got."""
        candidates = [self.fleet[name] for name in names or self.names]
        chosen = []
        for _ in range(count):
            facts = self.next_request()
            send = self.decide(facts, candidates)
            chosen.append(send.backend)
            self.lease(facts, send.backend)
        self.chosen += chosen
        return Counter(chosen)

    def _settle(self) -> None:
        while self._events and self._events[0][0] <= self.now:
            at, _, lease, is_first_token = heappop(self._events)
            if is_first_token:
                self.fleet.first_token(lease, at)
            else:
                self.fleet.release(lease, Outcome.OK, at, (100, 0, 100))
