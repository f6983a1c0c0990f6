"""The provider `scheduler`: a placement of the scheduling platform, which runs when we say so.

Resources were bound when the platform pushed the placement; tunnel, model files and image are its business, and
`prepare` waits until it says that they are there. `start` and `stop` name the run, which the platform takes as
idempotency key.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final

from policies.units import BadValueError
from proxy.scaling.calls import Caller, RefusedError, new_id
from proxy.scaling.facts import Facts
from proxy.scaling.messages import PRESENCE, MessageError, PlacementStatus, Run, read_message
from proxy.scaling.platform import caller_of
from proxy.scaling.provider import STATUS_WITHIN_S, Presence, ProviderError, Status
from proxy.scaling.sections import StandbySection

FIRST_LOOK_S: Final = 0.5
LONGEST_LOOK_S: Final = 10.0
GONE: Final = frozenset({404, 410})


class SchedulerProvider:
    """Starts and stops one placement."""

    def __init__(
        self,
        section: StandbySection,
        facts: Facts,
        caller: Caller | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        """`caller`: default: one of its own. Raises BadValueError: the secret is not there."""
        platform = facts.platform
        if section.scheduler is None or platform is None:
            raise ValueError("not a standby of a scheduler")
        self._section = section
        self._facts = facts
        self._placement = section.scheduler.placement
        self._url = f"{platform.url}/v1/placements/{self._placement}"
        self._caller = caller or caller_of(platform)
        self._clock, self._sleep = clock, sleep
        self._ordered = ""
        """Our last order."""

    @staticmethod
    def check(section: StandbySection, facts: Facts) -> Iterator[BadValueError]:
        """What cannot work."""
        if facts.platform is None:
            yield BadValueError(
                "a placement of which platform? Give `scaling.scheduler` too", at=("scheduler",)
            )

    async def prepare(self, run: str) -> None:
        """Raises ProviderError."""
        await self._until(
            lambda status: status.state != "preparing", self._section.prepare_timeout, "prepared"
        )

    async def start(self, run: str) -> None:
        """Raises ProviderError."""
        await self._order("start", run, f"{run}:start", self._section.start_timeout)

    async def stop(self, run: str) -> None:
        """Raises ProviderError. A placement that the platform does not have any more does not run."""
        within_s = self._section.stop_timeout
        deadline = self._clock() + within_s
        try:
            await self._order("stop", run, new_id(), within_s)
            await self._until(
                lambda found: self._presence(found) is Presence.ABSENT,
                deadline - self._clock(),
                "stopped",
            )
        except RefusedError as error:
            if error.status not in GONE:
                raise

    async def status(self) -> Status:
        """What the platform says. `UNKNOWN`: it could not be asked."""
        try:
            found = await self._look(STATUS_WITHIN_S)
        except RefusedError as error:
            presence = Presence.ABSENT if error.status in GONE else Presence.UNKNOWN
            return Status(presence, detail=str(error))
        except ProviderError as error:
            return Status(Presence.UNKNOWN, detail=str(error))
        return Status(self._presence(found), found.run, found.progress, found.detail)

    async def close(self) -> None:
        """Let connections go."""
        await self._caller.close()

    def _presence(self, found: PlacementStatus) -> Presence:
        if found.state == "preparing" and (found.run or self._ordered == "start"):
            return Presence.STARTING  # what a start needs is brought only now
        return PRESENCE[found.state]

    async def _order(self, operation: str, run: str, id: str, within_s: float) -> None:
        self._ordered = operation
        order: dict[str, Any] = {"operation": operation, "placement": self._placement, "run": run}
        if operation == "start" and (launch := self._facts.launch()) is not None:
            order["launch"] = launch.as_dict()
        content = Run.model_validate(order).model_dump(mode="json", exclude_none=True)
        await self._caller.call("POST", f"{self._url}/{operation}", content, id=id, within_s=within_s)

    async def _look(self, within_s: float) -> PlacementStatus:
        answer = await self._caller.call("GET", self._url, id=new_id(), within_s=within_s)
        try:
            return read_message(answer.body, PlacementStatus)
        except MessageError as error:
            raise ProviderError(f"{error.field or 'its answer'}: {error.message}") from None

    async def _until(self, done: Callable[[PlacementStatus], bool], within_s: float, what: str) -> None:
        deadline = self._clock() + within_s
        pause_s = FIRST_LOOK_S
        while True:
            found = await self._look(max(deadline - self._clock(), 0.0))
            if found.state == "failed" and what == "prepared":
                raise ProviderError(
                    f"the platform says that it failed: {found.detail or 'it does not say why'}"
                )
            if done(found):
                return
            if self._clock() + pause_s >= deadline:
                raise ProviderError(f"the platform has not {what} it within {within_s:g} s")
            await self._sleep(pause_s)
            pause_s = min(2.0 * pause_s, LONGEST_LOOK_S)
