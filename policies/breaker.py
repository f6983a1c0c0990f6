"""A circuit breaker: outcomes in, open or closed out.

Closed until `threshold` attempts in a row have failed; then open for `base_s`, doubling with every reopening up
to `max_s`; then half-open: one trial attempt decides. `ignored` outcomes (the client left, the client's own 4xx)
say nothing about a backend and move nothing, except that an ignored trial makes room for another.

Time comes in with every call; nothing here reads a clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from policies.base import Outcome


@dataclass(slots=True)
class Breaker:
    """States: closed (`opened_until == 0`), open (`now < opened_until`), half-open (afterwards)."""

    threshold: int = 5
    base_s: float = 10.0
    max_s: float = 300.0
    failures: int = 0
    """Failures in a row."""
    openings: int = 0
    """Openings since the last success: the exponent of the back-off."""
    opened_until: float = 0.0
    trial_running: bool = False

    def allows(self, now: float) -> bool:
        """Whether a request may be sent."""
        if self.opened_until == 0.0:
            return True
        return now >= self.opened_until and not self.trial_running

    def state(self, now: float) -> str:
        """`closed`, `open` or `half-open`."""
        if self.opened_until == 0.0:
            return "closed"
        return "half-open" if now >= self.opened_until else "open"

    def dispatched(self, now: float) -> bool:
        """A request is being sent. True: this is the half-open trial, so nothing else may follow it."""
        if self.opened_until == 0.0 or self.trial_running or now < self.opened_until:
            return False
        self.trial_running = True
        return True

    def record(self, outcome: Outcome, now: float) -> bool:
        """An attempt ended. True: what `allows` says may have changed."""
        if outcome is Outcome.OK:
            if self.failures == 0 and self.opened_until == 0.0:
                return False
            changed = self.opened_until != 0.0
            self.failures = self.openings = 0
            self.opened_until = 0.0
            self.trial_running = False
            return changed
        if outcome is Outcome.IGNORED:
            was_trial, self.trial_running = self.trial_running, False
            return was_trial
        self.failures += 1
        if self.opened_until != 0.0 and not self.trial_running and now < self.opened_until:
            return False  # a straggler that was sent before it opened
        if self.failures < self.threshold and self.opened_until == 0.0:
            return False
        self.trial_running = False
        self.opened_until = now + min(self.base_s * 2.0**self.openings, self.max_s)
        self.openings += 1
        return True
