"""The end of what runs, when the proxy stops: it may end by itself for a while, then it is ended with an error."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from proxy.runtime import Runtime

log = logging.getLogger("tidegate")

FLUSH_S = 1.0
"""At least so long clients may take to read the ends of their answers."""
SETTLE_S = 0.1
"""After a hand-over, how long connections may take to appear that had been accepted."""


async def let_end(runtime: Runtime, until: Callable[[], float], *, handed_over: bool) -> None:
    """Return when nothing runs any more. `until`: when what runs is ended, which may come sooner meanwhile."""
    clients = runtime.clients
    if running := sum(client.exchange is not None for client in clients):
        log.info("draining: up to %.3g s for what runs, %d requests", until() - runtime.now(), running)
    if handed_over:
        await asyncio.sleep(SETTLE_S)
        await _while(lambda: clients and runtime.now() < until())
    for client in list(clients):
        if client.idle and client.transport is not None:
            client.transport.close()
    await _while(
        lambda: (
            runtime.now() < until()
            and any(client.exchange is not None or client.receiving for client in clients)
        )
    )
    # Who waits goes first: the places of those who run would be given to them.
    rest = [client.exchange for client in clients if client.exchange is not None]
    for exchange in sorted(rest, key=lambda exchange: exchange in runtime.exchanges):
        exchange.stop()
    deadline = max(until(), runtime.now() + FLUSH_S)
    await _while(lambda: any(client.unsent for client in clients) and runtime.now() < deadline)


async def _while(condition: Callable[[], object]) -> None:
    """Return when the condition is false."""
    while condition():  # noqa: ASYNC110
        await asyncio.sleep(0.02)
