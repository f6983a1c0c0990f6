"""What the router itself knows of each backend: leases, counts, averages.

Load is counted from the moment a request is sent until its stream has ended, never until the response
head: for a stream of tokens the head says nothing. Every count goes up in `Fleet.lease` and down in
`Fleet.release`, nowhere else, and a lease is released exactly once whatever happens to its request.

Averages are exponentially weighted with a time constant, so that an average ages with time and not with the
number of requests: `average += (1 - exp(-dt / tau)) * (sample - average)` (Finagle's Peak-EWMA form). After a
pause much longer than tau the next sample replaces the average.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import exp, inf
from typing import Final

from policies.base import BackendView, Finished, Outcome, Policy, RequestFacts
from policies.breaker import Breaker
from policies.shares import Shares

AVERAGE_TAU_S = 10.0
"""Time constant of the TTFT, TPOT and RTT averages, seconds."""


NOT_ASKED: Final = "not asked yet"
"""Why the models of a backend are unknown that no probe has come to."""


@dataclass(slots=True)
class Backend(BackendView):
    """One backend with what changes it. Policies see it as a `BackendView`."""

    probed_up: bool = True
    """What the active probes say; True until they have said otherwise."""
    draining: bool = False
    """Removed from the configuration: finishes what it has, gets nothing new."""
    backoff_until: float = -inf
    """It said that it is full (429 or 503 with Retry-After): nothing new before this time."""
    breaker: Breaker = field(default_factory=Breaker)
    shares: Shares = field(default_factory=Shares, compare=False, repr=False)
    """Who holds its slots."""
    ttft_at: float = -inf
    tpot_at: float = -inf
    rtt_at: float = -inf
    ok: int = 0
    failed: int = 0
    ignored: int = 0
    """Attempts by outcome since start."""

    def probed(self, up: bool, now: float) -> None:
        """What the active probes say now; call `Fleet.refresh` afterwards.

        Coming up ends the wait of an open breaker: the next request is its trial, and a failed one still
        doubles the wait. Otherwise a backend that is back would stay out for up to five minutes.
        """
        if up and not self.probed_up:
            self.breaker.up_again(now)
        self.probed_up = up

    def observe_ttft(self, seconds: float, now: float) -> None:
        self.ttft_s = _ewma(self.ttft_s, seconds, now - self.ttft_at)
        self.ttft_at = now

    def observe_tpot(self, seconds: float, now: float) -> None:
        self.tpot_s = _ewma(self.tpot_s, seconds, now - self.tpot_at)
        self.tpot_at = now

    def observe_rtt(self, seconds: float, now: float) -> None:
        self.rtt_s = _ewma(self.rtt_s, seconds, now - self.rtt_at)
        self.rtt_at = now


def _ewma(average: float, sample: float, age: float) -> float:
    if age == inf:
        return sample
    # Two samples of one moment still count: each moves the average at least as 50 ms would.
    return average + (1.0 - exp(-max(age, 0.05) / AVERAGE_TAU_S)) * (sample - average)


class Lease:
    """Load that one attempt holds on a backend, from dispatch until its stream has ended."""

    __slots__ = (
        "backend",
        "decided_by",
        "first_token_at",
        "policy",
        "released",
        "request",
        "started",
        "tokens",
    )

    def __init__(
        self, request: RequestFacts, backend: Backend, policy: Policy | None, decided_by: str, now: float
    ) -> None:
        self.request = request
        self.backend = backend
        self.policy = policy
        self.decided_by = decided_by
        self.started = now
        self.first_token_at: float | None = None
        self.tokens = request.tokens
        self.released = False


class Fleet:
    """All backends by name, in configured order. The only place that counts load."""

    def __init__(self, backends: Sequence[Backend] = ()) -> None:
        self.backends: dict[str, Backend] = {backend.name: backend for backend in backends}
        self.version = 0
        """Changes when what a backend is, serves or whether it is available changes: key for caches."""

    def __iter__(self) -> Iterator[Backend]:
        return iter(self.backends.values())

    def __getitem__(self, name: str) -> Backend:
        return self.backends[name]

    def __len__(self) -> int:
        return len(self.backends)

    def replace(self, backends: Sequence[Backend]) -> None:
        """Take a new set; a backend that stays the same object keeps its counts."""
        self.backends = {backend.name: backend for backend in backends}
        self.version += 1

    def refresh(self, now: float) -> bool:
        """Recompute who is available (after a probe, an outcome, or time). True: something has changed."""
        changed = False
        for backend in self.backends.values():
            available = (
                backend.probed_up
                and bool(backend.models)  # one without answers its probes, and no request
                and not backend.draining
                and now >= backend.backoff_until
                and backend.breaker.allows(now)
            )
            if available != backend.available:
                backend.available = available
                changed = True
        if changed:
            self.version += 1
        return changed

    def back_off(self, name: str, seconds: float, now: float) -> bool:
        """Send a backend nothing new for a while, because it said that it is full. True: something changed.

        It comes back with the first `refresh` after that; a shorter back-off never cuts a longer one.
        """
        backend = self.backends[name]
        backend.backoff_until = max(backend.backoff_until, now + seconds)
        return self.refresh(now)

    def lease(
        self, request: RequestFacts, name: str, now: float, policy: Policy | None = None, decided_by: str = ""
    ) -> Lease:
        """Count a request onto a backend; the policy that chose it hears of it."""
        backend = self.backends[name]
        lease = Lease(request, backend, policy, decided_by, now)
        backend.in_flight += 1
        backend.in_flight_tokens += lease.tokens
        backend.shares.take(request.tenant, request.priority, now)
        if backend.breaker.dispatched(now):
            self.refresh(now)
        if policy is not None:
            policy.dispatched(request, backend, now)
        return lease

    def first_token(self, lease: Lease, now: float) -> None:
        """The first data event of an attempt arrived."""
        if lease.first_token_at is not None:
            return
        lease.first_token_at = now
        lease.backend.observe_ttft(now - lease.started, now)
        if lease.backend.breaker.first_token(lease.started, now):
            self.refresh(now)
        if lease.policy is not None:
            lease.policy.first_token(lease.request, lease.backend, now)

    def release(
        self,
        lease: Lease,
        outcome: Outcome,
        now: float,
        usage: tuple[int, int, int] = (0, 0, 0),
    ) -> Finished | None:
        """Count an attempt off its backend, once; a second call does nothing and returns None.

        `usage` is (prompt, cached, completion) tokens as last reported.
        """
        if lease.released:
            return None
        lease.released = True
        backend = lease.backend
        backend.in_flight -= 1
        backend.in_flight_tokens -= lease.tokens
        backend.shares.give_back(lease.request.tenant, now)
        prompt, cached, completion = usage
        ttft = None
        if lease.first_token_at is not None:
            ttft = lease.first_token_at - lease.started
            # A stream that stalled or broke is the breaker's business and no measure of speed.
            if completion > 1 and outcome is not Outcome.FAILED:
                backend.observe_tpot((now - lease.first_token_at) / (completion - 1), now)
        if outcome is Outcome.OK:
            backend.ok += 1
        elif outcome is Outcome.FAILED:
            backend.failed += 1
        else:
            backend.ignored += 1
        if backend.breaker.record(outcome, lease.started, now):
            self.refresh(now)
        finished = Finished(
            request=lease.request,
            backend=backend.name,
            outcome=outcome,
            ended=now,
            started=lease.started,
            ttft_s=ttft,
            prompt_tokens=prompt,
            cached_tokens=cached,
            completion_tokens=completion,
            decided_by=lease.decided_by,
        )
        if lease.policy is not None:
            lease.policy.finished(finished)
        return finished
