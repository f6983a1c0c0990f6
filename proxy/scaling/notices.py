"""Telling an HTTP endpoint of the operator's: signed, tried again for a while, and never in anybody's way."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any, Final

from policies.units import BadValueError
from proxy.scaling.calls import Caller, new_id
from proxy.scaling.provider import ProviderError
from proxy.scaling.sections import NoticeSection
from proxy.scaling.signing import secrets_of

log = logging.getLogger("tidegate")

WITHIN_S: Final = 600.0
"""A notice that cannot be delivered for so long is given up."""
MOST_UNDER_WAY: Final = 100
"""Further ones are dropped, and the log says so: an endpoint that is away must not fill the memory."""


class Notices:
    """Sends what is told to one endpoint."""

    def __init__(
        self,
        section: NoticeSection,
        spawn: Callable[[Coroutine[Any, Any, None], str], object],
        wall: Callable[[], float],
        caller: Caller | None = None,
    ) -> None:
        """`caller`: what sends; None: one that signs as the section says. Raises BadValueError: no secret."""
        self.section = section
        self.secrets = secrets_of(section.secret_env)
        self._caller = caller or Caller(self.secrets)
        self._spawn = spawn
        self._wall = wall
        self._under_way = 0

    def tell(self, kind: str, data: dict[str, Any]) -> None:
        """Send a notice of this `type`, beside everything else."""
        if self._under_way >= MOST_UNDER_WAY:
            log.error("notice %s is not sent: %d others are under way", kind, self._under_way)
            return
        self._under_way += 1
        time = datetime.fromtimestamp(self._wall(), UTC).isoformat(timespec="seconds")
        self._spawn(self._send({"type": kind, "timestamp": time, "data": data}), f"notice {kind}")

    async def _send(self, content: dict[str, Any]) -> None:
        try:
            await self._caller.call("POST", self.section.url, content, id=new_id(), within_s=WITHIN_S)
        except ProviderError as error:
            log.error("notice %s was not delivered: %s", content["type"], error)
        finally:
            self._under_way -= 1

    async def close(self) -> None:
        """Let connections go."""
        await self._caller.close()


def notices(
    section: NoticeSection | None,
    before: Notices | None,
    spawn: Callable[[Coroutine[Any, Any, None], str], object],
    wall: Callable[[], float],
) -> Notices | None:
    """Those that a section asks for: the ones `before`, where it says the same."""
    if before is not None and before.section == section:
        return before
    if before is not None:
        spawn(before.close(), "notices")
    try:
        return None if section is None else Notices(section, spawn, wall)
    except BadValueError as error:
        log.error("notices: %s", error)
        return None
