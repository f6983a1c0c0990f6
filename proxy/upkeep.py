"""What goes on all the time while a proxy serves."""

from __future__ import annotations

import asyncio
import logging

from probes.resolver import Resolver
from proxy.runtime import Runtime

log = logging.getLogger("tidegate")

SWEEP_S = 0.25


async def sweep(runtime: Runtime) -> None:
    """End what has had its time, again and again."""
    while True:
        await asyncio.sleep(SWEEP_S)
        try:
            runtime.sweep(runtime.now())
        except Exception:
            log.exception("sweep failed")


async def look_up(runtime: Runtime, resolver: Resolver) -> None:
    """Ask again where the backends' names lead, again and again."""
    while True:
        await asyncio.sleep(runtime.config.resolve)
        await resolver.refresh([endpoint.host for endpoint in runtime.endpoints.values()])
