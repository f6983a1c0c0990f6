"""Waits, at a start, for a database that is not there yet: after a power cut, machines come up in any order."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

from sqlalchemy import Engine

from proxy.database import AwayError, open_database

log = logging.getLogger("tidegate")

WAIT_S = 30.0
PAUSE_S = 0.5


async def opened_in_time(
    target: str | Path, stopping: asyncio.Event, within_s: float = WAIT_S, pause_s: float = PAUSE_S
) -> Engine:
    """As `open_database`, tried again until the time is over or `stopping` is set while nobody answers there.

    What no waiting mends (a wrong password, no such database) is raised at once, as OpenError like everything else.
    """
    deadline = time.monotonic() + within_s
    told = False
    while True:
        try:
            return await asyncio.to_thread(open_database, target)
        except AwayError as error:
            if stopping.is_set() or time.monotonic() >= deadline:
                raise
            if not told:
                told = True
                log.warning("%s; waiting for it for up to %g s", error, within_s)
        try:
            await asyncio.wait_for(stopping.wait(), pause_s)
        except TimeoutError:
            pass
