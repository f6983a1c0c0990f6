"""The two ports: how they are opened, and how connections come in.

Ordinarily the loop accepts and hands over. Where load balancers begin their connections with a PROXY header
(`proxy_protocol`), that header has to be read before anything else, TLS included: `ProxiedServer` accepts itself,
reads the header of those that are trusted to send one, and only then gives the socket to the loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from aiohttp import web

from proxy.build import ConfigError
from proxy.certificates import ServerCertificates
from proxy.client_address import Network, is_in
from proxy.config import Config
from proxy.config_values import split_address
from proxy.proxy_protocol import missing, source
from proxy.runtime import Runtime
from proxy.server import LINGER_S, ClientConnection

log = logging.getLogger("tidegate")

BACKLOG: Final = 2048
ACCEPT_PAUSE_S: Final = 0.1
"""After an accept that failed, most likely for want of file descriptors."""


@dataclass(slots=True)
class Ports:
    """Where the proxy listens, with real port numbers."""

    listen: str
    admin: str
    admin_tls: bool = False

    @property
    def admin_url(self) -> str:
        """As `tidegate status --admin` takes it: HOST:PORT, with `https://` in front if that is spoken."""
        return ("https://" if self.admin_tls else "") + self.admin


def new_client(runtime: Runtime, client: str = "") -> asyncio.Protocol:
    """The protocol of a connection; `client`: its address, if a PROXY header told it."""
    return cast("asyncio.Protocol", ClientConnection(runtime, client))


async def open_listener(
    runtime: Runtime, config: Config, certificates: ServerCertificates | None
) -> asyncio.Server | ProxiedServer:
    """Begin to accept clients. Raises ConfigError."""
    host, port = split_address(config.listen)
    tls: dict[str, Any] = {}
    if certificates is not None:
        tls = {
            "ssl": certificates.front,
            "ssl_handshake_timeout": config.timeouts.head,
            "ssl_shutdown_timeout": LINGER_S,
        }
    try:
        if config.proxy_protocol:
            listening = [_listening(info) for info in await _addresses(host, port)]
            return ProxiedServer(runtime, listening, config.proxy_protocol, tls)
        return await runtime.loop.create_server(
            lambda: new_client(runtime), host, port, backlog=BACKLOG, reuse_address=True, **tls
        )
    except OSError as error:
        raise _cannot_listen("listen", config.listen, error) from None


async def open_admin(app: web.Application, config: Config, front: Any) -> web.AppRunner:
    """Serve the admin port; `front`: its TLS context, None for plain HTTP. Raises ConfigError."""
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    host, port = split_address(config.admin)
    try:
        await web.TCPSite(runner, host, port, ssl_context=front).start()
    except OSError as error:
        await runner.cleanup()
        raise _cannot_listen("admin", config.admin, error) from None
    return runner


def address_of(name: Any) -> str:
    """HOST:PORT of what `getsockname` says."""
    host, port = name[0], name[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def _addresses(host: str, port: int) -> Sequence[Any]:
    return await asyncio.get_running_loop().getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )


def _listening(info: Any) -> socket.socket:
    family, kind, protocol, _, address = info
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
        listening.setblocking(False)
    except OSError:
        listening.close()
        raise
    return listening


def _cannot_listen(key: str, address: str, error: OSError) -> ConfigError:
    reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or "no such host"
    return ConfigError(
        f"cannot listen on {address}: {reason.lower()}; "
        f"give another address with --{key} HOST:PORT, or `{key}` in the configuration"
    )


class ProxiedServer:
    """Accepts connections that begin with a PROXY header if they come from the networks of the balancers.

    From there they must: a connection without a header, or with a malformed one, is closed. Any other is what it
    is, and bytes that look like a header are no HTTP. `sockets` and `close` are those of `asyncio.Server`.
    """

    def __init__(
        self,
        runtime: Runtime,
        listening: Sequence[socket.socket],
        balancers: Sequence[Network],
        tls: dict[str, Any],
    ) -> None:
        self.sockets = tuple(listening)
        self.refused = 0
        """Connections of balancers without a good header."""
        self._runtime = runtime
        self._balancers = tuple(balancers)
        self._tls = tls
        self._beginning = 0
        """Connections that are not a client's yet."""
        self._accepting = [runtime.tasks.spawn(self._accept(one), "accept") for one in listening]

    def close(self) -> None:
        """Accept nothing new; connections whose header is still being read go on."""
        for task in self._accepting:
            task.cancel()
        for one in self.sockets:
            one.close()

    async def _accept(self, listening: socket.socket) -> None:
        loop = self._runtime.loop
        while True:
            try:
                connection, peer = await loop.sock_accept(listening)
            except OSError as error:
                log.warning("a connection could not be accepted: %s", error.strerror or error)
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
                lambda: new_client(runtime, client), connection, **self._tls
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
