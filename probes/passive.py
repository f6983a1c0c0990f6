"""What real attempts say of a backend: which endings count against it, and when it asks for a rest.

`Fleet.release` feeds the breaker; this decides with what. The rule: only what the backend or the way to it
did wrong is FAILED. A client's mistake must never take a backend out (five bad requests in a row would take
out the whole fleet), and neither must a client that leaves, nor a backend that is well enough to say that
it is full.

| how the attempt ended | outcome | besides |
|---|---|---|
| complete answer, 2xx | OK | |
| refused, unreachable, reset, TLS failure, cut short, malformed framing | FAILED | |
| no first token, or no further one, in time | FAILED | |
| an error event in a stream | FAILED | |
| 5xx, except the next two | FAILED | |
| 503 with Retry-After, 429 | IGNORED | back off: `backoff_s` |
| 501 | IGNORED | what the request asks for, this engine can't do |
| 1xx as a final status, 3xx, 4xx | IGNORED | |
| a pooled connection had been closed before it was used again | IGNORED | try again on a fresh one |
| the client left or stopped reading, its deadline passed, we are shutting down | IGNORED | |
"""

from __future__ import annotations

from email.utils import parsedate_to_datetime
from enum import Enum
from typing import Final

from policies.base import Outcome


class AttemptError(Enum):
    """Ways in which an attempt on a backend ends without a complete answer."""

    CONNECT = "connect"
    """Refused, unreachable, name not resolved, or not connected in time."""
    TLS = "tls"
    RESET = "reset"
    """Closed or reset before the answer was complete."""
    STALE_CONNECTION = "stale_connection"
    """A reused connection closed before any byte of an answer: it had been idle too long, no more."""
    FIRST_TOKEN_TIMEOUT = "first_token_timeout"  # noqa: S105
    STALLED = "stalled"
    """Too long between two tokens."""
    MALFORMED = "malformed"
    """Not HTTP, or framing that can be read in two ways."""
    ERROR_EVENT = "error_event"
    """An error object inside a stream that had begun with 200 (vLLM: the engine died)."""
    CLIENT_GONE = "client_gone"
    CLIENT_SLOW = "client_slow"
    """It stopped reading."""
    DEADLINE = "deadline"
    """The time for the whole request was over: a long answer, not a sick backend."""
    SHUTDOWN = "shutdown"


_BLAMELESS: Final = frozenset(
    {
        AttemptError.STALE_CONNECTION,
        AttemptError.CLIENT_GONE,
        AttemptError.CLIENT_SLOW,
        AttemptError.DEADLINE,
        AttemptError.SHUTDOWN,
    }
)

_SILENT: Final = frozenset({AttemptError.CONNECT, AttemptError.TLS, AttemptError.FIRST_TOKEN_TIMEOUT})

BACKOFF_DEFAULT_S: Final = 1.0
BACKOFF_MAX_S: Final = 30.0
"""A backend may ask for more; a probe of its own would be the only other way to find out that it lied."""


def outcome_of(ended: AttemptError | int, retry_after: bool = False) -> Outcome:
    """What one attempt says of its backend.

    `ended` is the status of a complete answer, or why there is none; `retry_after`: it had that field.
    """
    if isinstance(ended, AttemptError):
        return Outcome.IGNORED if ended in _BLAMELESS else Outcome.FAILED
    if 200 <= ended < 300:
        return Outcome.OK
    if ended < 500 or ended == 501 or (ended == 503 and retry_after):
        return Outcome.IGNORED
    return Outcome.FAILED


def tried_elsewhere(status: int) -> bool:
    """Whether a complete answer with this status ends its attempt alone: another backend may do better.

    Any other is the answer, good or bad: what one backend finds wrong with a request, so would the next. 401 and
    403 are about our key, not the client's; 408 and 429 about this backend's time.
    """
    return status >= 500 or 300 <= status < 400 or status in (401, 403, 408, 429)


def is_silent(ended: AttemptError | int) -> bool:
    """Whether an attempt failed without any answer: nothing speaks for trying this backend in spite of it."""
    return isinstance(ended, AttemptError) and ended in _SILENT


def backoff_s(status: int, retry_after: str | None, wall: float) -> float:
    """How long to send a backend nothing new after this answer, for `Fleet.back_off`; 0: no reason to.

    `retry_after` is the field's value, seconds or a date (RFC 9110 section 10.2.3), None if it is missing;
    `wall` is Unix time. At most 30 s; a value that can't be read counts as one second.
    """
    if status != 429 and not (status == 503 and retry_after is not None):
        return 0.0
    if retry_after is None:
        return BACKOFF_DEFAULT_S
    text = retry_after.strip()
    if text.isascii() and text.isdigit():
        # Cut before converting: Python refuses to read thousands of digits, and 30 s need two.
        return min(float(text[:9]), BACKOFF_MAX_S)
    try:
        seconds = parsedate_to_datetime(text).timestamp() - wall
    except (ValueError, TypeError, IndexError, OverflowError):
        return BACKOFF_DEFAULT_S
    return min(max(seconds, 0.0), BACKOFF_MAX_S)
