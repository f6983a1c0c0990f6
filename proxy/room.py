"""Room for further clients, when there are as many connections as there may be.

Connections cost nothing to open, so whoever likes can have all of them. Those that wait for no answer make room for
who comes: first those that have never sent a request, the oldest first. Several at a time, or a flood would have
all of them looked at for each of its connections.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from proxy.runtime import Runtime
    from proxy.server import ClientConnection

AT_ONCE: Final = 8
"""One of so many idle connections is closed in one go; one at least."""
PAUSE_S: Final = 0.25
"""When nobody can go, how long nobody is looked for."""


def close_idle(runtime: Runtime) -> None:
    """Close all connections that wait for no answer."""
    for client in list(runtime.clients):
        client.close_if_idle()


def make_room(runtime: Runtime, newcomer: ClientConnection) -> bool:
    """Close connections that are idle. False: there are none to close, so that `newcomer` has to go."""
    now = runtime.now()
    if now < runtime.no_room_until:
        return False
    clients = runtime.clients
    idle = [client for client in clients if client.idle and not client.unsent and client is not newcomer]
    if not idle:
        runtime.no_room_until = now + PAUSE_S
        return False
    idle.sort(key=lambda client: (client.requests > 0, client.opened))
    for client in idle[: max(len(idle) // AT_ONCE, 1)]:
        clients.discard(client)
        if client.transport is not None:
            client.transport.close()
    return True
