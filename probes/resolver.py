"""The addresses of backends that are given by name: looked up again and again, never forgotten for a fault.

The system's resolver is asked, which does not say how long an answer holds but keeps that time itself; so it is
asked every few seconds, and what it says is believed at once. When it fails, what it said last goes on. Whoever
connects never waits for it, except for the first time.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from typing import Final, TypeAlias

log = logging.getLogger("tidegate.probes")

MOST_ADDRESSES: Final = 16
"""Of one name; further ones are not used."""

Lookup: TypeAlias = Callable[[str], Awaitable[Sequence[str]]]
"""Addresses of a name, the best first. Raises OSError or UnicodeError."""


def is_address(host: str) -> bool:
    """Whether a host is an address already."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


class SystemLookup:
    """What the system says, by `getaddrinfo` in threads of its own: a lookup can't be cancelled, and one that hangs
    must not keep others from what they do in threads."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(4, "lookup")

    async def __call__(self, host: str) -> Sequence[str]:
        return await asyncio.get_running_loop().run_in_executor(self._threads, _look_up, host)


def _look_up(host: str) -> list[str]:
    return [str(address[0]) for *_, address in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]


class Resolver:
    """The last good answers. `changed` is called, in the loop, when a name has other addresses than before."""

    def __init__(
        self,
        lookup: Lookup | None = None,
        *,
        allowed: Callable[[str], bool] = lambda address: True,
        changed: Callable[[str, frozenset[str]], None] = lambda host, addresses: None,
    ) -> None:
        """`allowed`: whether an address may be connected to at all."""
        self.changed = changed
        self.judges: Mapping[str, Callable[[str], bool]] = {}
        """For some names: which of their addresses may be connected to, besides `allowed`."""
        self._lookup = lookup or SystemLookup()
        self._allowed = allowed
        self._known: dict[str, tuple[str, ...]] = {}
        self._running: dict[str, asyncio.Task[tuple[str, ...]]] = {}
        self._failing: set[str] = set()

    async def addresses(self, host: str) -> tuple[str, ...]:
        """At least one address, the best first; an address is its own. Raises OSError: nothing is known of it."""
        known = self._known.get(host)
        if known is not None:
            return known
        if is_address(host):
            return (host,)
        return await self._asked(host)

    async def look_up(self, host: str) -> Sequence[str]:
        """What is said now, nothing of it judged or kept. Raises OSError or UnicodeError."""
        return await self._lookup(host)

    def judge(self, judges: Mapping[str, Callable[[str], bool]]) -> None:
        """From now on these names are judged in these ways; what is known of them is asked again."""
        for host in judges.keys() - self.judges.keys():
            self._known.pop(host, None)
        self.judges = dict(judges)

    async def refresh(self, hosts: Iterable[str]) -> None:
        """Look these names up again, all at the same time, and forget all others. What fails is told in the log."""
        names = {host for host in hosts if not is_address(host)}
        for gone in self._known.keys() - names:
            del self._known[gone]
        await asyncio.gather(*(self._asked(host) for host in names), return_exceptions=True)

    async def _asked(self, host: str) -> tuple[str, ...]:
        """One lookup per name at a time, however many wait for it, and whoever gives up."""
        task = self._running.get(host)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._ask(host))
            self._running[host] = task
            task.add_done_callback(lambda done: self._done(host, done))
        return await asyncio.shield(task)

    def _done(self, host: str, task: asyncio.Task[tuple[str, ...]]) -> None:
        del self._running[host]
        if not task.cancelled():
            task.exception()  # whoever waits hears of it; perhaps nobody does any more

    async def _ask(self, host: str) -> tuple[str, ...]:
        try:
            found = tuple(dict.fromkeys(await self._lookup(host)))
            judge = self.judges.get(host, self._allowed)
            good = tuple(address for address in found if self._allowed(address) and judge(address))[
                :MOST_ADDRESSES
            ]
            if not good:
                reason = "names addresses that are never connected to" if found else "has no address"
                raise socket.gaierror(socket.EAI_NONAME, reason)
        except (OSError, UnicodeError) as error:
            if host not in self._failing:
                self._failing.add(host)
                goes_on = "its last addresses go on" if host in self._known else "nothing is known of it"
                log.warning("%s cannot be resolved, %s: %s", host, goes_on, _reason(error))
            if isinstance(error, UnicodeError):  # a label that is empty or too long, before anybody is asked
                raise socket.gaierror(socket.EAI_NONAME, "no name of a host") from None
            raise
        if host in self._failing:
            self._failing.remove(host)
            log.info("%s is resolved again", host)
        before = self._known.get(host)
        self._known[host] = good
        if before is not None and set(before) != set(good):
            log.info("%s has moved: %s", host, ", ".join(good))
            self.changed(host, frozenset(good))
        return good

    async def close(self) -> None:
        """Wait for nobody any more."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _reason(error: OSError | UnicodeError) -> str:
    return str(error.strerror or error) if isinstance(error, OSError) else "no name of a host"
