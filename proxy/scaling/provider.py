"""What starts and stops a standby: one small interface for all that can.

Every operation is idempotent and takes the `run` that it is about: asked twice, after a restart or a time-out, it
does its work once. A run that is not the one that is there counts as absent for `status`, and `stop` ends whatever
is there of this standby, of whichever run.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

STATUS_WITHIN_S: Final = 4.0
"""A status is waited for a little longer than this (`keeper.STATUS_S`): by then it is known what is in its way."""


class ProviderError(Exception):
    """An operation failed; the message says why, in words for the admin, without secrets."""


class Presence(StrEnum):
    """What a provider knows of a standby."""

    ABSENT = "absent"
    """Nothing of it runs, and nothing is paid."""
    STARTING = "starting"
    RUNNING = "running"
    """Its engine runs; whether it answers is for the probes to say."""
    UNKNOWN = "unknown"
    """The provider could not be asked, or does not know."""


@dataclass(frozen=True, slots=True)
class Status:
    """A provider's answer."""

    presence: Presence
    run: str = ""
    """Of what is there; empty: unknown."""
    progress: float | None = None
    """Of preparing or starting, 0 to 1."""
    detail: str = ""
    """In words: what it does, or why it died."""


class Provider(Protocol):
    """Starts and stops one standby. Operations raise ProviderError; whoever calls bounds them in time and may
    cancel them at any point."""

    async def prepare(self, run: str) -> None:
        """Bring what must be there first. Returns when it is."""

    async def start(self, run: str) -> None:
        """Have it start. Returns when that was asked for: it may not answer yet."""

    async def stop(self, run: str) -> None:
        """End it gracefully. Returns when nothing of it is left."""

    async def status(self) -> Status:
        """What there is of it now. Never raises: what goes wrong is `UNKNOWN` and its reason."""

    async def close(self) -> None:
        """The proxy stops. What runs goes on."""
