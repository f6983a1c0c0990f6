"""What the router itself knows of each backend: leases, counts, averages.

Load is counted from the moment a request is sent until its stream has ended, never until the response
head: for a stream of tokens the head says nothing. Every count goes up in `Fleet.lease` and down in
`Fleet.release`, nowhere else, and a lease is released exactly once whatever happens to its request.

Averages are exponentially weighted with a time constant, so that an average ages with time and not with the
number of requests: `average += (1 - exp(-dt / tau)) * (sample - average)` (Finagle's Peak-EWMA form). After a
pause much longer than tau the next sample replaces the average.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import exp, inf
from typing import Final

from policies.adaptive import AdaptiveSlots
from policies.base import BackendView, Finished, Outcome, Policy, RequestFacts
from policies.breaker import Breaker
from policies.health import Health, slots_in_slow_start
from policies.lengths import Lengths
from policies.offered import Offered
from policies.prefixes import ROOM_TOKENS, Prefixes
from policies.shares import Shares
from policies.speeds import Speed

AVERAGE_TAU_S = 10.0
"""Time constant of the TTFT, TPOT and RTT averages, seconds."""


NOT_ASKED: Final = "not asked yet"
"""Why the models of a backend are unknown that no probe has come to."""


@dataclass(slots=True)
class Backend(BackendView):
    """One backend with what changes it. Policies see it as a `BackendView`.

    `slots` follows from `full_slots` with every `Fleet.refresh`; whoever learns how many there are sets the latter.
    """

    full_slots: int = 0
    """All of its slots; 0 at first: as many as `slots`."""
    adaptive: AdaptiveSlots | None = None
    """Takes fewer of them where it would queue."""
    measuring_slots: int = 0
    """While `adaptive` measures it, so many of them are given out; 0: all."""
    starting: bool = False
    """It has fewer of them since it has only just come back."""
    probed_up: bool = True
    """What the active probes say; True until they have said otherwise."""
    connects: bool = True
    """Whether the last probe could connect."""
    silent: bool = False
    """Its last attempt had no answer: refused, not connected in time, or no first token."""
    doubtful: bool = False
    """Not available, for its probes or its breaker alone, and somebody answers there (`policies/panic.py`)."""
    out: bool = False
    """Its probes or its breaker hold it for sick, or it has only just been added."""
    back_at: float = -inf
    """When it was last found well again: from then on its slots come back."""
    draining: bool = False
    """Finishes what it has, gets nothing new."""
    asleep: bool = False
    """A standby that is not ready: gets nothing."""
    standby: bool = False
    """It need not run: what only it may serve is held while it is down, too."""
    over_budget: bool = False
    """A ceiling that it falls under is reached: finishes what it has, gets nothing new."""
    backoff_until: float = -inf
    """It said that it is full (429 or 503 with Retry-After): nothing new before this time."""
    breaker: Breaker = field(default_factory=Breaker)
    shares: Shares = field(default_factory=Shares, compare=False, repr=False)
    """Who holds its slots."""
    prefixes: Prefixes | None = field(default=None, compare=False, repr=False)
    """What its prefix cache has, where a policy needs `prefix`."""
    speed: Speed | None = field(default=None, compare=False, repr=False)
    """Where `ttft_fit` and `tpot_fit` come from."""
    ttft_at: float = -inf
    tpot_at: float = -inf
    rtt_at: float = -inf
    ok_at: float = -inf
    """When an attempt last ended well."""
    ok: int = 0
    failed: int = 0
    ignored: int = 0
    """Attempts by outcome since start."""

    def __post_init__(self) -> None:
        if not self.full_slots:
            self.full_slots = self.slots

    @property
    def awaited(self) -> bool:
        """Whether what nobody else may serve is held for it: a standby that may be started for that, or anew."""
        is_down = self.standby and not self.probed_up and not self.draining
        return (self.asleep or is_down) and not self.over_budget

    def probed(self, up: bool, now: float) -> None:
        """What the active probes say now; call `Fleet.refresh` afterwards.

        Coming up ends the wait of an open breaker: the next request is its trial, and a failed one still
        doubles the wait. Otherwise a backend that is back would stay out for up to five minutes.
        """
        if up and not self.probed_up:
            self.breaker.up_again(now)
            self.silent = False
            if self.prefixes is not None:
                self.prefixes.clear()  # most likely it was started anew
        self.probed_up = up

    def put(self, asleep: bool, draining: bool, now: float) -> bool:
        """Where its standby is, see `Fleet.put`; call `Fleet.refresh` afterwards. True: something changed.

        One that wakes was started anew, whatever went wrong before: no breaker, pause or cache is left of that.
        """
        if (asleep, draining) == (self.asleep, self.draining):
            return False
        if self.asleep and not self.draining and not asleep:
            breaker = self.breaker
            self.breaker = Breaker(breaker.threshold, breaker.base_s, breaker.max_s, moved_at=now)
            self.backoff_until, self.silent = -inf, False
            if self.prefixes is not None:
                self.prefixes.clear()
        self.asleep, self.draining = asleep, draining
        return True

    def observe_ttft(self, seconds: float, now: float) -> None:
        self.ttft_s = _ewma(self.ttft_s, seconds, now - self.ttft_at)
        self.ttft_at = now

    def observe_tpot(self, seconds: float, now: float) -> None:
        self.tpot_s = _ewma(self.tpot_s, seconds, now - self.tpot_at)
        self.tpot_at = now

    def cached_tokens(self, request: RequestFacts) -> int:
        """Prompt tokens of the request that are probably in its prefix cache; never all of them."""
        if self.prefixes is None:
            return 0
        tokens = self.prefixes.matching(request.prefix) * request.prefix_tokens
        return max(min(tokens, request.prompt_tokens - 1), 0)

    def observe_rtt(self, seconds: float, now: float) -> None:
        self.rtt_s = _ewma(self.rtt_s, seconds, now - self.rtt_at)
        self.rtt_at = now


def _ewma(average: float, sample: float, age: float) -> float:
    if age == inf:
        return sample
    # Two samples of one moment still count: each moves the average at least as 50 ms would.
    return average + (1.0 - exp(-max(age, 0.05) / AVERAGE_TAU_S)) * (sample - average)


def cached_in(backends: Iterable[Backend], request: RequestFacts) -> dict[str, int]:
    """What of the request each backend has cached, tokens (`RequestFacts.cached`)."""
    found: dict[str, int] = {}
    if request.prefix:
        first = request.prefix[0]
        for backend in backends:
            prefixes = backend.prefixes
            # Most have not even the first block, and a call for each would cost more than all else here.
            if prefixes is not None and first in prefixes.blocks:
                tokens = backend.cached_tokens(request)
                if tokens:
                    found[backend.name] = tokens
    return found


class Lease:
    """Load that one attempt holds on a backend, from dispatch until its stream has ended."""

    __slots__ = (
        "backend",
        "decided_by",
        "first_token_at",
        "in_flight",
        "others",
        "policy",
        "prefill_ahead",
        "prefill_tokens",
        "released",
        "request",
        "silent",
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
        self.in_flight = backend.in_flight + 1
        """On its backend when it was dispatched, itself included."""
        self.prefill_tokens = request.prompt_tokens
        """Its prompt, less what was probably cached."""
        self.prefill_ahead = 0
        """Prompt tokens to compute until its first token, its own included, when it was dispatched."""
        self.others = 0
        """Others in flight that had their first token when it was dispatched; later, when it had its own."""
        self.released = False
        self.silent = False
        """It failed without an answer; whoever releases it says so before."""


class Fleet:
    """All backends by name, in configured order. The only place that counts load."""

    def __init__(self, backends: Sequence[Backend] = (), health: Health | None = None) -> None:
        self.health = health or Health()
        self.backends: dict[str, Backend] = {backend.name: backend for backend in backends}
        self.version = 0
        """Changes when what a backend is, serves or whether it is available changes: key for caches."""
        self.needs: frozenset[str] = frozenset()
        """Of its policies; see `see_to`."""
        self.lengths: Lengths | None = None
        """How long answers are, where a policy needs `length`."""
        self.offered: dict[str, Offered] = {}
        """The load that is offered, by model; only of those that scaling asks after."""

    def __iter__(self) -> Iterator[Backend]:
        return iter(self.backends.values())

    def __getitem__(self, name: str) -> Backend:
        return self.backends[name]

    def __len__(self) -> int:
        return len(self.backends)

    def aside(self) -> Fleet:
        """The same backends as they stand, copied as far as deciding changes them. Nothing is leased on it: what is
        known of prefixes and speeds is shared."""
        other = Fleet(
            [
                replace(backend, breaker=replace(backend.breaker), shares=backend.shares.aside())
                for backend in self
            ],
            self.health,
        )
        other.needs, other.lengths, other.version = self.needs, self.lengths, self.version
        return other

    def replace(self, backends: Sequence[Backend]) -> None:
        """Take a new set; a backend that stays the same object keeps its counts, a new one starts slowly."""
        if self.backends:
            for backend in backends:
                backend.out = backend.out or self.backends.get(backend.name) is not backend
        self.backends = {backend.name: backend for backend in backends}
        self.version += 1
        self.see_to(self.needs)

    def see_to(self, needs: frozenset[str]) -> None:
        """Learn what policies need that costs something to learn: `prefix`, `speed`, `length` (`Policy.needs`)."""
        self.needs = needs
        for backend in self.backends.values():
            if "prefix" not in needs:
                backend.prefixes = None
            elif backend.prefixes is None:
                backend.prefixes = Prefixes()
            if "speed" not in needs:
                backend.speed, backend.ttft_fit, backend.tpot_fit = None, (), ()
            elif backend.speed is None:
                backend.speed = speed = Speed()
                backend.ttft_fit, backend.tpot_fit = speed.ttft.coefficients, speed.tpot.coefficients
        if "length" not in needs:
            self.lengths = None
        elif self.lengths is None:
            self.lengths = Lengths()

    def refresh(self, now: float) -> bool:
        """Recompute who is available and with how many slots (after a probe, an outcome, or time). True:
        something has changed."""
        changed = False
        slow_start_s = self.health.slow_start_s
        for backend in self.backends.values():
            breaker = backend.breaker
            usable = (
                bool(backend.models)  # one without answers its probes, and no request
                and not backend.draining
                and not backend.over_budget
                and not backend.asleep
                and now >= backend.backoff_until
            )
            allowed = breaker.allows(now)
            available = usable and backend.probed_up and allowed
            doubtful = usable and backend.probed_up != allowed and backend.connects and not backend.silent
            if available != backend.available or doubtful != backend.doubtful:
                backend.available, backend.doubtful = available, doubtful
                changed = True
            out = breaker.is_open or not backend.probed_up or (backend.asleep and not backend.draining)
            if out != backend.out:
                backend.out = out
                if not out:
                    backend.back_at = now
        for backend in self.backends.values():
            slots, few = backend.full_slots, 0
            if backend.adaptive is not None:
                few = backend.adaptive.measuring_slots(slots, now)
                slots = backend.adaptive.slots(slots)
            starting = now - backend.back_at < slow_start_s and self._has_others(backend, now)
            if starting:
                slots = min(
                    slots, slots_in_slow_start(backend.full_slots, now - backend.back_at, slow_start_s)
                )
            if slots != backend.slots or starting != backend.starting or few != backend.measuring_slots:
                backend.slots, backend.starting, backend.measuring_slots = slots, starting, few
                changed = True
        if changed:
            self.version += 1
        return changed

    def _has_others(self, backend: Backend, now: float) -> bool:
        """Whether another one can take what is held back from a backend that starts slowly."""
        for other in self.backends.values():
            if (
                other.available
                and now - other.back_at >= self.health.slow_start_s
                and not other.models.isdisjoint(backend.models)
            ):
                return True
        return False

    def put(self, name: str, now: float, *, asleep: bool, draining: bool = False) -> bool:
        """Say where the standby of this name is. True: something changed.

        `asleep`: it is not ready, and may be when it is needed. `draining`: what runs on it ends. Both: it drains,
        and is taken back if it is needed. Neither: it is ready, and starts slowly as a new one does.
        """
        if not self.backends[name].put(asleep, draining, now):
            return False
        self.version += 1  # who waits for it is looked up with who may serve
        self.refresh(now)
        return True

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
        if backend.prefixes is not None and request.prefix:
            lease.prefill_tokens -= backend.cached_tokens(request)
            backend.prefixes.note(request.prefix, (backend.kv_tokens or ROOM_TOKENS) // request.prefix_tokens)
        lease.others = backend.in_flight - 1 - backend.prefilling
        backend.prefilling += 1
        backend.prefill_tokens += lease.prefill_tokens
        lease.prefill_ahead = backend.prefill_tokens
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
        backend = lease.backend
        backend.silent = False
        backend.prefilling -= 1
        backend.prefill_tokens -= lease.prefill_tokens
        backend.observe_ttft(now - lease.started, now)
        if backend.speed is not None:
            line = backend.speed.ttft
            line.note((1.0, float(lease.prefill_ahead), float(lease.others)), now - lease.started)
            backend.ttft_fit = line.coefficients
            lease.others = backend.in_flight - 1
        moved = backend.breaker.first_token(lease.started, now)
        if backend.adaptive is not None:
            ttft_s, full_slots = now - lease.started, backend.full_slots
            moved |= backend.adaptive.first_token(ttft_s, lease.in_flight, lease.started, full_slots, now)
        if moved:
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
        if lease.first_token_at is None:
            backend.prefilling -= 1
            backend.prefill_tokens -= lease.prefill_tokens
        backend.shares.give_back(lease.request.tenant, now)
        prompt, cached, completion = usage
        ttft = None
        if lease.first_token_at is not None:
            ttft = lease.first_token_at - lease.started
            # A stream that stalled or broke is the breaker's business and no measure of speed.
            if completion > 1 and outcome is not Outcome.FAILED:
                seconds = (now - lease.first_token_at) / (completion - 1)
                backend.observe_tpot(seconds, now)
                if backend.speed is not None:
                    line = backend.speed.tpot
                    line.note((1.0, 0.5 * (lease.others + backend.in_flight)), seconds)
                    backend.tpot_fit = line.coefficients
        if outcome is Outcome.OK:
            if self.offered and (offered := self.offered.get(lease.request.model)) is not None:
                offered.served(lease.tokens, now - lease.started, now)
            if self.lengths is not None and completion:
                self.lengths.note(lease.request.tenant, lease.request.model, completion)
            backend.ok += 1
            backend.ok_at = now
            backend.silent = False
        elif outcome is Outcome.FAILED:
            backend.failed += 1
            backend.silent = lease.silent
        else:
            backend.ignored += 1
        if backend.breaker.record(outcome, lease.started, now) or lease.silent:
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
