"""A provider as it may be, with faults of its own: whatever it raises is told in words, and goes no further."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final

from proxy.scaling.provider import Presence, Provider, ProviderError, Status

log = logging.getLogger("tidegate")

STATUS_S: Final = 5.0
"""So long a provider may take to say how a standby is, and as often it is asked about one that does not answer."""


async def attempt(operation: Callable[[], Coroutine[Any, Any, None]], failed: list[str], name: str) -> None:
    """Do one thing; what it fails by is appended to `failed`."""
    try:
        await operation()  # made here: it may be cancelled before it begins
    except ProviderError as error:
        failed.append(str(error))
    except Exception as error:
        log.exception("standby %s: its provider failed in a way that it should not", name)
        failed.append(repr(error))


async def status_of(provider: Provider, name: str) -> Status:
    """Bounded, and never raises."""
    try:
        async with asyncio.timeout(STATUS_S):
            return await provider.status()
    except TimeoutError:
        return Status(Presence.UNKNOWN, detail="the provider does not answer")
    except Exception as error:
        log.exception("standby %s: status failed", name)
        return Status(Presence.UNKNOWN, detail=repr(error))


async def close(provider: Provider, name: str) -> None:
    """Let go of it; what runs goes on."""
    try:
        await provider.close()
    except Exception:
        log.exception("standby %s: its provider could not be closed", name)
