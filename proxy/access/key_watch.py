"""Keys that are made or revoked while the proxy runs, by whatever process."""

from __future__ import annotations

import asyncio
import logging

from proxy.access.keys import KeyStore
from proxy.access.limits import Limits
from proxy.database import said

log = logging.getLogger("tidegate")

KEYS_S = 0.5
"""How often the keys are looked at: a revoked one is refused within this time."""


async def watch_keys(keys: KeyStore, limits: Limits) -> None:
    """Read the keys whenever they have changed, for ever.

    What fails (the database, descriptors, memory) is told once, and tried again at the next turn, also if it is
    the same for hours: revoked keys must go on being refused.
    """
    while True:
        await asyncio.sleep(KEYS_S)
        keyless = keys.empty
        try:
            changed = await asyncio.to_thread(keys.refresh)
        except Exception as error:
            if not keys.trouble:
                log.error("keys cannot be read, the known ones go on, no revocation is seen: %s", said(error))
            keys.trouble = said(error)
            continue
        if keys.trouble:
            log.warning("keys can be read again")
        keys.trouble = ""
        if changed:
            limits.keep(keys.ids)
            if keyless and not keys.empty:
                log.info("there are keys now: every request needs one")
