"""The provider `sleep`: a vLLM that runs all the time, and whose GPU memory is given back while nobody needs it.

vLLM has these endpoints in its development mode alone: `VLLM_SERVER_DEV_MODE=1`, and `--enable-sleep-mode` for the
memory. At level 2 the weights are dropped, and waking has three steps: memory for the weights, the weights
themselves, memory for the KV cache. vLLM calls itself awake after the last one only, so whatever was interrupted is
begun again. https://docs.vllm.ai/en/latest/features/sleep_mode/
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final

import aiohttp

from policies.units import BadValueError
from probes.active import fetch, new_session
from probes.base import ProbeError, Target
from proxy.scaling.facts import Facts
from proxy.scaling.provider import Presence, ProviderError, Status
from proxy.scaling.sections import StandbySection

MOST_BYTES: Final = 4 << 20
"""Of an answer."""
HOW: Final = "start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment and with --enable-sleep-mode"
_DROPPED: Final = re.compile(
    r'^vllm:engine_sleep_state\{[^}]*sleep_state="discard_all"[^}]*\} 1', re.MULTILINE
)


class SleepProvider:
    """Puts one vLLM to sleep and wakes it."""

    def __init__(self, section: StandbySection, facts: Facts) -> None:
        if section.sleep is None:
            raise ValueError("not a standby that sleeps")
        self._level = section.sleep.level
        headers = {} if facts.key is None else {"Authorization": f"Bearer {facts.key}"}
        self._target = Target(
            facts.name, facts.url, headers=headers, tls=facts.tls, server_name=facts.server_name
        )
        self._session: aiohttp.ClientSession | None = None
        self._half_awake = False
        """A waking at level 2 was begun and has not ended: some of the memory is taken."""

    @staticmethod
    def check(section: StandbySection, facts: Facts) -> Iterator[BadValueError]:
        """Nothing can be seen from outside."""
        return iter(())

    async def prepare(self, run: str) -> None:
        """See that it can sleep at all. Raises ProviderError."""
        await self._is_sleeping()

    async def start(self, run: str) -> None:
        """Wake it; returns when it is awake. Raises ProviderError."""
        if not await self._is_sleeping():
            return
        # It may have been put to sleep by an earlier configuration, or by hand: without its weights it would
        # answer, and with nonsense.
        if self._level == 1 and not await self._has_dropped_weights():
            await self._ask("/wake_up", b"")
        else:
            self._half_awake = True
            await self._ask("/wake_up?tags=weights", b"")
            await self._ask("/collective_rpc", json.dumps({"method": "reload_weights"}).encode())
            await self._ask("/reset_prefix_cache", b"")  # whatever it remembers was made by other weights
            await self._ask("/wake_up?tags=kv_cache", b"")
            self._half_awake = False
        if await self._is_sleeping():
            raise ProviderError("it was told to wake up, and still sleeps")

    async def stop(self, run: str) -> None:
        """Put it to sleep; returns when it sleeps. Raises ProviderError."""
        if self._half_awake:
            await self._ask("/wake_up?tags=weights", b"")
            await self._ask("/wake_up?tags=kv_cache", b"")
        elif await self._is_sleeping():
            return
        await self._ask(f"/sleep?level={self._level}", b"")
        self._half_awake = False
        if not await self._is_sleeping():
            raise ProviderError("it was told to sleep, and does not")

    async def status(self) -> Status:
        """Asleep is absent."""
        try:
            sleeping = await self._is_sleeping()
        except ProviderError as error:
            return Status(Presence.UNKNOWN, detail=str(error))
        if sleeping and self._half_awake:
            return Status(Presence.STARTING, detail="it is being woken")
        return Status(Presence.ABSENT if sleeping else Presence.RUNNING)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _is_sleeping(self) -> bool:
        answer = await self._ask("/is_sleeping")
        try:
            found: Any = json.loads(answer)["is_sleeping"]
        except (ValueError, KeyError, TypeError):
            found = None
        if not isinstance(found, bool):
            raise ProviderError("/is_sleeping answers something else than a vLLM does")
        return found

    async def _has_dropped_weights(self) -> bool:
        return _DROPPED.search((await self._ask("/metrics")).decode(errors="replace")) is not None

    async def _ask(self, path: str, body: bytes | None = None) -> bytes:
        if self._session is None:
            self._session = new_session()
        try:
            return await fetch(
                self._session, self._target, path, MOST_BYTES, headers=self._target.headers, body=body
            )
        except ProbeError as error:
            shown = path.partition("?")[0]
            if error.status in (404, 405):
                raise ProviderError(f"it has no {shown}: {HOW}") from None
            raise ProviderError(f"{shown}: {error}") from None
