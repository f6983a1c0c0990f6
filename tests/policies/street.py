"""Backends whose service times are known, under a policy that is not told them."""

from __future__ import annotations

from collections import Counter
from heapq import heappop, heappush
from random import Random
from typing import NamedTuple

from policies.base import Outcome, Policy, Send
from policies.state import Backend, Fleet, Lease
from tests.policies.driver import request


class Made(NamedTuple):
    """What a backend is made of: seconds to a first token, more for each prompt token, for each token after."""

    slots: int
    first: float
    prompt: float
    token: float
    rtt: float = 0.0

    def mu(self, prompt: float, answer: float) -> float:
        """Requests a second with all slots taken."""
        return self.slots / (self.first + self.prompt * prompt + self.token * (answer - 1))


class Street:
    """Poisson arrivals, prompts of 100 to 900 and answers of 50 to 150 tokens, on a clock of its own."""

    PROMPT, ANSWER = 500.0, 100.0

    def __init__(self, policy: Policy, made: dict[str, Made], seed: int = 1, noise: float = 0.03) -> None:
        self.policy = policy
        self.made = made
        self.noise = noise
        self.fleet = Fleet(
            [
                Backend(name, slots=one.slots, rtt_s=one.rtt, models=frozenset({"m"}))
                for name, one in made.items()
            ]
        )
        self.fleet.see_to(policy.needs)
        self.rng = Random(seed)
        self.now = 1000.0
        self.count = 0
        self.wait_s = 0.0
        """Sum of the times that requests took."""
        self.prompt_tokens: Counter[str] = Counter()
        self.answer_tokens: Counter[str] = Counter()
        """Reported by each backend."""
        self._events: list[tuple[float, int, Lease, float]] = []

    def run(self, count: int, rate: float, without: str = "") -> Counter[str]:
        """So many more requests at so many a second, to all but one; how many each backend got."""
        sent: Counter[str] = Counter()
        candidates = [one for one in self.fleet if one.name != without]
        rng = self.rng
        for _ in range(count):
            self.settle(self.now + rng.expovariate(rate))
            self.count += 1
            facts = request(f"r{self.count}", prompt_tokens=rng.randint(100, 900))
            answer = rng.randint(50, 150)
            facts.expected_tokens = 100
            decision = self.policy.choose(facts, candidates, self.now)
            assert isinstance(decision, Send)
            name = decision.backend
            sent[name] += 1
            lease = self.fleet.lease(facts, name, self.now, self.policy)
            one = self.made[name]
            late = rng.uniform(1.0 - self.noise, 1.0 + self.noise)
            first = (one.first + one.prompt * lease.prefill_ahead) * late
            rest = one.token * (answer - 1) * rng.uniform(1.0 - self.noise, 1.0 + self.noise)
            self.wait_s += first + rest
            heappush(self._events, (self.now + first, 2 * self.count, lease, rest))
        return sent

    def settle(self, until: float) -> None:
        """Let everything happen that happens until then."""
        while self._events and self._events[0][0] <= until:
            at, number, lease, rest = heappop(self._events)
            if number % 2:
                prompt = lease.request.prompt_tokens
                answer = 1 + round(rest / self.made[lease.backend.name].token)
                self.prompt_tokens[lease.backend.name] += prompt
                self.answer_tokens[lease.backend.name] += answer
                self.fleet.release(lease, Outcome.OK, at, (prompt, 0, answer))
            else:
                self.fleet.first_token(lease, at)
                heappush(self._events, (at + rest, number + 1, lease, rest))
        self.now = until
