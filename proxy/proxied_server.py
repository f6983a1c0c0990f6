"""How clients' connections come in.

Ordinarily the loop accepts and hands over. Where load balancers begin their connections with a PROXY header
(`proxy_protocol`), that header has to be read before anything else, TLS included: `ProxiedServer` accepts itself,
reads the header of those that are trusted to send one, and only then gives the socket to the loop.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from proxy.certificates import ServerCertificates
from proxy.client_address import Network, is_in
from proxy.config import Config
from proxy.listeners import Accept, Server, by_loop
from proxy.proxy_protocol import missing, source
from proxy.runtime import Runtime
from proxy.server import LINGER_S, ClientConnection

log = logging.getLogger("tidegate")

ACCEPT_PAUSE_S: Final = 0.1
"""After an accept that failed, most likely for want of file descriptors."""


def accepting(runtime: Runtime, config: Config, certificates: ServerCertificates | None) -> Accept:
    """What accepts clients, as the configuration wants it; behind TLS, if there are certificates."""
    tls: dict[str, Any] = {}
    if certificates is not None:
        tls = {"ssl_handshake_timeout": config.timeouts.head, "ssl_shutdown_timeout": LINGER_S}
    front = certificates.front if certificates is not None else None
    if not config.proxy_protocol:
        return by_loop(lambda: _new_client(runtime), front, **tls)

    async def accept(sock: socket.socket) -> Server:
        return ProxiedServer(runtime, sock, config.proxy_protocol, {"ssl": front, **tls})

    return accept


def _new_client(runtime: Runtime, client: str = "") -> asyncio.Protocol:
    """The protocol of a connection; `client`: its address, if a PROXY header told it."""
    return cast("asyncio.Protocol", ClientConnection(runtime, client))


class ProxiedServer:
    """Accepts connections that begin with a PROXY header if they come from the networks of the balancers.

    From there they must: a connection without a header, or with a malformed one, is closed. Any other is what it
    is, and bytes that look like a header are no HTTP.
    """

    def __init__(
        self,
        runtime: Runtime,
        listening: socket.socket,
        balancers: Sequence[Network],
        tls: Mapping[str, Any],
    ) -> None:
        listening.setblocking(False)
        self.refused = 0
        """Connections of balancers without a good header."""
        self._listening = listening
        self._runtime = runtime
        self._balancers = tuple(balancers)
        self._tls = tls
        self._beginning = 0
        """Connections that are not a client's yet."""
        self._accepting = runtime.tasks.spawn(self._accept(listening), "accept")

    def close(self) -> None:
        """Accept nothing new; connections whose header is still being read go on."""
        self._accepting.cancel()
        self._listening.close()

    async def _accept(self, listening: socket.socket) -> None:
        loop = self._runtime.loop
        told = ""
        while True:
            try:
                connection, peer = await loop.sock_accept(listening)
            except OSError as error:
                reason = error.strerror or str(error)
                if reason != told:  # it may last
                    told = reason
                    log.warning("a connection could not be accepted: %s", reason)
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            if self._beginning >= self._runtime.most_clients:
                connection.close()
                continue
            self._beginning += 1
            self._runtime.tasks.spawn(self._begin(connection, peer[0]), "begin a connection")

    async def _begin(self, connection: socket.socket, peer: str) -> None:
        runtime = self._runtime
        client = ""
        kept = False
        try:
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if is_in(peer, self._balancers):
                async with asyncio.timeout(runtime.timeouts.head):
                    client = source(await self._header(connection))
            await runtime.loop.connect_accepted_socket(
                lambda: _new_client(runtime, client), connection, **self._tls
            )
            kept = True
        except OSError:
            pass  # it left, took too long, or failed in TLS, as any connection may
        except ValueError as error:
            self.refused += 1
            if self.refused == 1:
                log.warning("a balancer at %s was cut off: %s (said once)", peer, error)
        finally:
            self._beginning -= 1
            if not kept:
                connection.close()

    async def _header(self, connection: socket.socket) -> bytes:
        data = b""
        while size := missing(data):
            more = await self._runtime.loop.sock_recv(connection, size)
            if not more:
                raise ConnectionResetError
            data += more
        return data
