"""How many connections the system lets this process have, and what to do when there are no more files for them."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
from math import inf
from typing import TYPE_CHECKING

from proxy.room import close_idle

if TYPE_CHECKING:
    from proxy.listeners import Listening
    from proxy.runtime import Runtime

log = logging.getLogger("tidegate")

OWN_FILES = 100
"""Open files besides those of clients and backends: journal, ledger, log, probes, admin port, and connections that
are being refused."""
RESERVED = 8
"""Open files that are kept for what is not a client's."""
LOOK_S = 0.25
SAID_AGAIN_S = 60.0
"""How often the log has it at most that files are short."""


def most_clients(wanted: int, before: int = 0, *, told: bool = False) -> int:
    """Client connections that the open files suffice for, after the limit was raised as far as it goes.

    Fewer than `wanted` are told in the log, unless it was so `before`, or another process has `told` it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard == resource.RLIM_INFINITY or hard >= 2 * wanted + OWN_FILES:
        return wanted
    possible = max((hard - OWN_FILES) // 2, 8)
    if possible != before and not told:
        log.warning(
            "%d open files are allowed: %d client connections instead of %d; raise `ulimit -Hn`",
            hard,
            possible,
            wanted,
        )
    return possible


class Reserve:
    """A few open files. They are given up when there are no others, for the admin port, backends and the ledger."""

    def __init__(self, size: int = RESERVED) -> None:
        self._size = size
        self._files: list[int] = []

    def look(self) -> bool:
        """Whether there are files for further clients. False: the reserve is given up, until twice as many are
        free: or with each that comes free all would begin anew."""
        fresh: list[int] = []
        try:
            for _ in range(1 if self._files else 2 * self._size):
                fresh.append(os.open("/", os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            self._files += fresh
            self.close()
            return False
        if not self._files:
            self._files, fresh = fresh[: self._size], fresh[self._size :]
        for file in fresh:
            os.close(file)
        return True

    def close(self) -> None:
        """Give all up."""
        for file in self._files:
            os.close(file)
        self._files.clear()


async def watch_open_files(listening: Listening, reserve: Reserve, runtime: Runtime) -> None:
    """While no more files can be opened, leave new clients in the queue of their socket, and let those go that wait
    for no answer. A loop that goes on accepting turns in circles, and closes what it cannot take."""
    paused, said_at = False, -inf
    try:
        while True:
            if not reserve.look():
                if not paused:
                    paused = True
                    listening.pause("listen")
                    close_idle(runtime)
                    if runtime.now() - said_at >= SAID_AGAIN_S:
                        said_at = runtime.now()
                        log.error("no more files can be opened: new clients wait; raise `ulimit -Hn`")
            elif paused:
                try:
                    await listening.resume("listen")
                    paused = False
                except OSError:
                    listening.pause("listen")
            await asyncio.sleep(LOOK_S)
    finally:
        reserve.close()
