"""A circuit breaker: outcomes in, open or closed out.

Closed until `threshold` attempts in a row have failed; then open for `base_s`; then half-open: one trial
attempt decides, by its first token or its end. A failed trial opens it for twice as long, up to `max_s`. The
doubling is forgotten only when it has stayed closed for as long as it was last open, so that a backend which
flaps is tried less and less often.

`ignored` outcomes (the client left, the client's own 4xx) say nothing about a backend and move nothing,
except that an ignored trial makes room for another. Nor does an attempt that began before the breaker last
moved: a stream that was already running when the backend broke must not close it, and requests that hung on a
backend while it was dead must not open it after it has come back.

An open one may be overruled (`policies/panic.py`). What goes through it then closes it by its first token or a good
end, as a trial does, and by failing changes nothing.

Time comes in with every call; nothing here reads a clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from policies.base import Outcome


@dataclass(slots=True)
class Breaker:
    """Closed (`not is_open`), open (until `opened_until`) or half-open (from then on)."""

    threshold: int = 5
    base_s: float = 10.0
    max_s: float = 300.0
    failures: int = 0
    """Failures in a row."""
    is_open: bool = False
    opened_until: float = -inf
    backoff_s: float = 0.0
    """How long it was last open; 0: never."""
    trial_running: bool = False
    moved_at: float = -inf
    """When it last opened, closed, began a trial or heard that the backend is up again."""

    def allows(self, now: float) -> bool:
        """Whether a request may be sent."""
        return not self.is_open or (now >= self.opened_until and not self.trial_running)

    def state(self, now: float) -> str:
        """`closed`, `open` or `half-open`."""
        if not self.is_open:
            return "closed"
        return "half-open" if now >= self.opened_until else "open"

    def dispatched(self, now: float) -> bool:
        """A request is being sent. True: this is the half-open trial, so nothing else may follow it."""
        if not self.is_open or self.trial_running or now < self.opened_until:
            return False
        self.trial_running = True
        self.moved_at = now
        return True

    def first_token(self, started: float, now: float) -> bool:
        """An attempt that began at `started` got its first token. True: it was sent while this was open, the
        trial for one, and closed it.

        A trial's stream may last for minutes. Others are not judged this early, because a backend that breaks
        every stream after the first token is as broken as one that refuses.
        """
        if not self._was_sent_while_open(started):
            return False
        self._close(now)
        return True

    def record(self, outcome: Outcome, started: float, now: float) -> bool:
        """An attempt that began at `started` has ended. True: what `allows` says may have changed."""
        if started < self.moved_at:
            return False
        if outcome is Outcome.IGNORED:
            was_trial, self.trial_running = self.trial_running, False
            return was_trial
        if outcome is Outcome.OK:
            self.failures = 0
            if not self._was_sent_while_open(started):
                return False
            self._close(now)
            return True
        self.failures += 1
        if not self.trial_running and (self.is_open or self.failures < self.threshold):
            return False
        self._open(now)
        return True

    def up_again(self, now: float) -> None:
        """A probe that had said down says up: the past counts no more, and an open breaker tries at once."""
        self.moved_at = now
        self.failures = 0
        self.trial_running = False
        self.opened_until = min(self.opened_until, now)

    def _was_sent_while_open(self, started: float) -> bool:
        # A trial begins at the very time of the move; what began at that of the opening was sent before it.
        return self.is_open and (started > self.moved_at or (self.trial_running and started == self.moved_at))

    def _open(self, now: float) -> None:
        if not self.is_open and now - self.moved_at >= self.backoff_s:
            self.backoff_s = 0.0
        self.backoff_s = min(max(2.0 * self.backoff_s, self.base_s), self.max_s)
        self.opened_until = now + self.backoff_s
        self.moved_at = now
        self.is_open = True
        self.trial_running = False

    def _close(self, now: float) -> None:
        self.is_open = False
        self.opened_until = -inf
        self.failures = 0
        self.trial_running = False
        self.moved_at = now
