"""The listening sockets: bound here, given by systemd, or taken over from the process before.

A socket that is given has been listening all the time: connections that nobody has accepted yet wait in its queue,
and are accepted by whoever has it next. It keeps the address it has, whatever the configuration says.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from proxy.build import ConfigError
from proxy.config_values import split_address

BACKLOG = 2048
NAMES = ("listen", "admin")
"""The ports, by their keys in the configuration."""
FIRST_DESCRIPTOR = 3
"""Of those that systemd passes (sd_listen_fds(3))."""

Listeners: TypeAlias = dict[str, list[socket.socket]]
"""Port to its sockets: several where a name has several addresses."""


def bind(name: str, address: str) -> list[socket.socket]:
    """Sockets that listen on `HOST:PORT`, the value of the key `name`. Raises ConfigError, which names the key."""
    host, port = split_address(address)
    bound: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, where in dict.fromkeys(found):
            bound.append(_bind(family, where))
    except OSError as error:
        for sock in bound:
            sock.close()
        reason = os.strerror(error.errno).lower() if error.errno and error.errno > 0 else "no such host"
        raise ConfigError(
            f"cannot listen on {address}: {reason}; "
            f"give another address with --{name} HOST:PORT, or `{name}` in the configuration"
        ) from None
    return bound


def _bind(family: int, where: Any) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(where)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def from_systemd(environment: MutableMapping[str, str]) -> Listeners:
    """The sockets of socket activation; none: it was not started that way.

    Those that a unit calls `FileDescriptorName=admin` are the admin port's, all others the API's. The variables are
    taken out of `environment`: they are meant for this process alone. Raises ConfigError: one is no listening
    TCP socket.
    """
    pid, count = environment.pop("LISTEN_PID", ""), environment.pop("LISTEN_FDS", "0")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdigit():
        return {}
    given: Listeners = {}
    for number in range(int(count)):
        name = "admin" if names[number : number + 1] == ["admin"] else "listen"
        given.setdefault(name, []).append(_adopt(FIRST_DESCRIPTOR + number))
    return given


def _adopt(descriptor: int) -> socket.socket:
    os.set_inheritable(descriptor, False)
    sock = socket.socket(fileno=descriptor)
    listening = sock.type == socket.SOCK_STREAM and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if not listening or sock.family not in (socket.AF_INET, socket.AF_INET6):
        sock.close()
        raise ConfigError(
            f"systemd passed descriptor {descriptor}, which is no listening TCP socket: see the .socket unit"
        )
    return sock


def host_port(sock: socket.socket) -> str:
    """`127.0.0.1:8080` or `[::1]:8080`."""
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Server(Protocol):
    """Accepts the connections of its sockets."""

    def close(self) -> None:
        """Accept no more, and close the socket."""


Accept: TypeAlias = Callable[[socket.socket], Awaitable[Server]]
"""Begin to accept the connections of a socket."""


def by_loop(factory: Callable[[], Any], front: ssl.SSLContext | None = None, **options: Any) -> Accept:
    """As a loop accepts them: `factory` makes their protocols, behind TLS with `front`."""

    async def accept(sock: socket.socket) -> Server:
        loop = asyncio.get_running_loop()
        return await loop.create_server(factory, sock=sock, backlog=BACKLOG, ssl=front, **options)

    return accept


@dataclass(slots=True)
class Ports:
    """Where the proxy listens, with real port numbers."""

    listen: str
    admin: str
    admin_tls: bool = False
    certificates: list[str] = field(default_factory=list)
    """Fingerprints of those that clients are shown."""

    @property
    def admin_url(self) -> str:
        """As `tidegate status --admin` takes it: HOST:PORT, with `https://` in front if that is spoken."""
        return ("https://" if self.admin_tls else "") + self.admin

    def write(self, path: Path) -> None:
        """Into a file, for scripts that let the system choose the ports. Raises OSError."""
        temporary = path.with_suffix(".tmp")
        told: dict[str, Any] = {"listen": self.listen, "admin": self.admin_url, "pid": os.getpid()}
        if self.admin_tls:
            told["certificates"] = self.certificates
        temporary.write_text(json.dumps(told), encoding="utf-8")
        temporary.replace(path)


@dataclass(slots=True, eq=False)
class _Place:
    """One listening socket. Who accepts has a copy, so that the queue stays while nobody accepts."""

    kept: socket.socket
    accept: Accept
    server: Server | None = None
    """None: nobody accepts."""

    async def serve(self) -> None:
        """Accept. Raises OSError, most likely for want of descriptors."""
        copy = self.kept.dup()
        try:
            self.server = await self.accept(copy)
        except BaseException:
            copy.close()
            raise

    def pause(self) -> None:
        if self.server is not None:
            self.server.close()
            self.server = None


class Listening:
    """The ports of one process."""

    def __init__(self) -> None:
        self.addresses: dict[str, str] = {}
        """With real port numbers."""
        self._places: dict[str, list[_Place]] = {name: [] for name in NAMES}

    async def open(self, name: str, address: str, given: Sequence[socket.socket], accept: Accept) -> None:
        """Accept connections on what is given, else on `address`. Raises ConfigError."""
        sockets = given or bind(name, address)
        self.addresses[name] = host_port(sockets[0])
        places = self._places[name] = [_Place(sock, accept) for sock in sockets]
        for place in places:
            await place.serve()

    def pause(self, name: str) -> None:
        """Accept nothing for now: connections wait in the queue of the socket."""
        for place in self._places[name]:
            place.pause()

    async def resume(self, name: str) -> None:
        """Accept again. Raises OSError, most likely for want of descriptors."""
        for place in self._places[name]:
            if place.server is None:
                await place.serve()
                if place not in self._places[name]:  # closed meanwhile
                    place.pause()

    def close(self, name: str) -> None:
        """Accept nothing more there. Connections that nobody has accepted stay to whoever else has the socket."""
        for place in self._places[name]:
            place.pause()
            place.kept.close()
        self._places[name] = []

    def descriptors(self) -> list[tuple[str, int]]:
        """Port and descriptor of each socket."""
        return [(name, place.kept.fileno()) for name, places in self._places.items() for place in places]
