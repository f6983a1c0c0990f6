"""The provider `webhook`: an HTTP endpoint that starts and stops a standby.

Each operation is a signed POST (`signing.py`) of `{operation, standby, run, url, models, site}`, and of `launch`
where it is known what is to run. The endpoint answers 2xx when it is done, 202 when it has begun (it is asked for
`status` until it has ended), 409 while it is busy with this standby, another 4xx to refuse for good. `webhook-id`
is the idempotency key: the same for each `prepare` and `start` of one run, also after a restart; `stop` and
`status` are always meant anew.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final

from policies.standby import Work
from policies.units import BadValueError
from proxy.scaling.calls import Answer, Caller, new_id
from proxy.scaling.facts import Facts
from proxy.scaling.provider import Presence, ProviderError, Status
from proxy.scaling.sections import StandbySection
from proxy.scaling.signing import secrets_of
from proxy.scaling.statusbody import StatusBody, status_of

FIRST_LOOK_S: Final = 0.5
"""After a 202, until status is asked for the first time; doubled up to `LONGEST_LOOK_S`."""
LONGEST_LOOK_S: Final = 10.0
ACCEPTED: Final = 202


class WebhookProvider:
    """Starts and stops one standby by an HTTP endpoint."""

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
        if section.webhook is None:
            raise ValueError("not a standby with a webhook")
        self._section = section
        self._webhook = webhook = section.webhook
        self._facts = facts
        if caller is None:
            secrets = secrets_of(webhook.secret_env, ("webhook", "secret_env")) if webhook.secret_env else ()
            caller = Caller(secrets, timeout_s=webhook.timeout)
        self._caller = caller
        self._clock, self._sleep = clock, sleep

    @staticmethod
    def check(section: StandbySection, facts: Facts) -> Iterator[BadValueError]:
        """What cannot work: its secret is not there."""
        try:
            if section.webhook is not None and section.webhook.secret_env:
                secrets_of(section.webhook.secret_env, ("webhook", "secret_env"))
        except BadValueError as error:
            yield error

    async def prepare(self, run: str) -> None:
        """Raises ProviderError."""
        await self._operation(Work.PREPARE, run, f"{run}:prepare", self._section.prepare_timeout)

    async def start(self, run: str) -> None:
        """Raises ProviderError."""
        await self._operation(Work.START, run, f"{run}:start", self._section.start_timeout)

    async def stop(self, run: str) -> None:
        """Raises ProviderError."""
        await self._operation(Work.STOP, run, new_id(), self._section.stop_timeout)

    async def status(self) -> Status:
        """What the endpoint says. `UNKNOWN`: it could not be asked."""
        try:
            return (await self._status("", self._webhook.timeout)).status()
        except ProviderError as error:
            return Status(Presence.UNKNOWN, detail=str(error))

    async def close(self) -> None:
        """Let connections go."""
        await self._caller.close()

    async def _operation(self, work: Work, run: str, id: str, within_s: float) -> None:
        deadline = self._clock() + within_s
        answer = await self._post(work.value, run, id, within_s)
        if answer.status != ACCEPTED:
            return
        pause_s = FIRST_LOOK_S
        while True:
            left_s = deadline - self._clock()
            if pause_s >= left_s:
                raise ProviderError(f"{work.value} was accepted, and has not ended after {within_s:g} s")
            await self._sleep(pause_s)
            status = await self._status(run, left_s - pause_s)
            if status.error:
                raise ProviderError(f"{work.value} failed: {status.error}")
            if ended(work, status):
                return
            pause_s = min(2.0 * pause_s, LONGEST_LOOK_S)

    async def _status(self, run: str, within_s: float) -> StatusBody:
        answer = await self._post("status", run, new_id(), within_s)
        return status_of(answer.json())

    async def _post(self, operation: str, run: str, id: str, within_s: float) -> Answer:
        content: dict[str, Any] = {
            "operation": operation,
            "standby": self._facts.name,
            "run": run,
            "url": self._facts.url,
            "models": list(self._facts.models),
            "site": self._facts.site,
        }
        if (launch := self._facts.launch) is not None:
            content["launch"] = {
                "image": launch.image or None,
                "command": list(launch.command),
                "arguments": list(launch.arguments),
                "environment": dict(launch.environment),
            }
        return await self._caller.call("POST", self._webhook.url, content, id=id, within_s=within_s)


def ended(work: Work, status: StatusBody) -> bool:
    """Whether what was accepted is done, by what status says."""
    if status.pending == work.value:
        return False
    absent = status.status().presence is Presence.ABSENT
    return True if work is Work.PREPARE else absent if work is Work.STOP else not absent
