"""The idle connections of one backend."""

from __future__ import annotations

import asyncio
from collections import deque
from math import inf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from proxy.upstream import BackendConnection


class Pool:
    """Idle connections of one backend, the last used first."""

    def __init__(
        self,
        idle_s: float,
        clock: asyncio.AbstractEventLoop,
        age_s: float = inf,
        most_requests: int = 1_000_000_000,
    ) -> None:
        self.idle_s = idle_s
        """Seconds after which an idle connection is closed."""
        self.age_s = age_s
        """Seconds after which a connection is not kept any more."""
        self.most_requests = most_requests
        self._idle: deque[BackendConnection] = deque()
        self._loop = clock
        self._closed = False
        self._addresses: frozenset[str] | None = None
        """Those that the backend's name stands for; None: they never changed."""

    def __len__(self) -> int:
        return len(self._idle)

    def now(self) -> float:
        """Seconds of the loop's clock."""
        return self._loop.time()

    def take(self) -> BackendConnection | None:
        """An idle connection that is not known to be closed."""
        while self._idle:
            connection = self._idle.pop()
            if connection.transport is not None and not connection.transport.is_closing():
                return connection
        return None

    def give(self, connection: BackendConnection) -> None:
        """Keep a connection for the next request."""
        if self._closed or (self._addresses is not None and connection.address not in self._addresses):
            connection.abort()
            return
        now = self._loop.time()
        if now - connection.opened >= self.age_s or connection.requests >= self.most_requests:
            connection.abort()
            return
        connection.idle_since = now
        self._idle.append(connection)

    def forget(self, connection: BackendConnection) -> None:
        """It closed, or must not be used again."""
        try:
            self._idle.remove(connection)
        except ValueError:
            pass

    def sweep(self, now: float) -> None:
        """Close what has been idle too long: sooner than the backend would, so that none dies in our hands."""
        while self._idle and now - self._idle[0].idle_since >= self.idle_s:
            self._idle.popleft().abort()

    def keep_to(self, addresses: frozenset[str]) -> None:
        """Keep idle connections to these addresses only, now and from now on."""
        self._addresses = addresses
        for connection in list(self._idle):
            if connection.address not in addresses:
                self._idle.remove(connection)
                connection.abort()

    def close(self) -> None:
        """Close all, and whatever comes back later."""
        self._closed = True
        while self._idle:
            self._idle.pop().abort()
