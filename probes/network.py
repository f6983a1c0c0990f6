"""How far away a backend is: the time a TCP handshake takes.

A handshake is answered by the other side's kernel, so it measures the path and not the load; a loopback
backend is measured like any other. What is added to it comes from our side (the event loop was busy), is
never negative and often zero: the least of a few recent values is near the truth, where their mean is not.
That minimum feeds the backend's RTT average (`policies.state.Backend.observe_rtt`).
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any, Final, TypeAlias

from probes.base import ProbeError, Target, os_reason
from probes.resolver import Resolver

WINDOW: Final = 5
"""Handshakes whose least counts: ten seconds at the usual interval."""

AddressInfo: TypeAlias = tuple[int, int, int, str, Any]
"""What `socket.getaddrinfo` gives: family, kind, protocol, canonical name, address."""


class Connect:
    """Opens a connection and closes it; learns the seconds the handshake took."""

    asks = "TCP connect"

    def __init__(self, resolver: Resolver | None = None) -> None:
        """Without a `resolver` the system is asked each time."""
        self._resolver = resolver
        self._lookups: dict[tuple[str, int], asyncio.Future[Sequence[AddressInfo]]] = {}

    async def __call__(self, target: Target) -> float:
        reason = "no address"
        for family, kind, protocol, _, address in await self._addresses(target):
            with socket.socket(family, kind, protocol) as connection:
                connection.setblocking(False)
                # Not the loop's clock: uvloop's counts whole milliseconds.
                started = perf_counter()
                try:
                    await asyncio.get_running_loop().sock_connect(connection, address)
                except OSError as error:
                    reason = os_reason(error)
                else:
                    return perf_counter() - started
        raise ProbeError(reason)

    async def _addresses(self, target: Target) -> Sequence[AddressInfo]:
        if target.socket_path:
            return [(socket.AF_UNIX, socket.SOCK_STREAM, 0, "", target.socket_path)]
        host, port = target.address
        if self._resolver is None:
            return await self._resolve(host, port)
        try:
            found = await self._resolver.addresses(host)
        except OSError as error:
            raise ProbeError("name not resolved") from error
        return [
            (
                socket.AF_INET6 if ":" in address else socket.AF_INET,
                socket.SOCK_STREAM,
                0,
                "",
                (address, port),
            )
            for address in found
        ]

    async def _resolve(self, host: str, port: int) -> Sequence[AddressInfo]:
        find: Callable[..., Sequence[AddressInfo]] = partial(
            socket.getaddrinfo, host, port, type=socket.SOCK_STREAM
        )
        try:
            return find(flags=socket.AI_NUMERICHOST)
        except OSError:
            pass  # a name
        # A lookup can't be cancelled and holds one of the loop's few threads: at most one per name.
        lookup = self._lookups.get((host, port))
        if lookup is None:
            lookup = asyncio.get_running_loop().run_in_executor(None, find)
            lookup.add_done_callback(lambda _: self._lookups.pop((host, port)))
            self._lookups[host, port] = lookup
        try:
            return await asyncio.shield(lookup)
        except (OSError, UnicodeError) as error:
            raise ProbeError("name not resolved") from error


class MinFilter:
    """The least of the last few values."""

    def __init__(self, window: int = WINDOW) -> None:
        self._values: deque[float] = deque(maxlen=window)

    def add(self, value: float) -> float:
        """Take a value; the least of those that count now."""
        self._values.append(value)
        return min(self._values)
