"""Sockets that are bound, given, and passed on."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

from proxy import listeners
from proxy.build import ConfigError
from proxy.listeners import Listening, bind, by_loop, from_systemd, host_port


@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:0"])
def test_an_address_is_bound_as_it_is_written(address: str) -> None:
    (sock,) = bind("listen", address)
    with sock:
        assert host_port(sock).rpartition(":")[0] == address.rpartition(":")[0]
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


def test_a_name_without_an_address_is_an_error() -> None:
    with pytest.raises(
        ConfigError, match=r"cannot listen on no\.such\.host\.invalid:1: no such host; .*--admin"
    ):
        bind("admin", "no.such.host.invalid:1")


class Greeter(asyncio.Protocol):
    def __init__(self, greeting: bytes) -> None:
        self._greeting = greeting

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._greeting)
        transport.close()


async def test_connections_that_nobody_has_accepted_go_to_who_has_the_socket_then() -> None:
    (sock,) = bind("listen", "127.0.0.1:0")
    copy = socket.socket(fileno=os.dup(sock.fileno()))
    clients = [socket.create_connection(sock.getsockname()) for _ in range(20)]  # the loop has not turned
    first, second = Listening(), Listening()
    await first.open("listen", "", [sock], by_loop(lambda: Greeter(b"first")))
    first.close("listen")
    await second.open("listen", "", [copy], by_loop(lambda: Greeter(b"second")))
    for client in clients:
        reader, writer = await asyncio.open_connection(sock=client)
        assert await reader.read() == b"second"
        writer.close()
        await writer.wait_closed()
    second.close("listen")


def test_systemd_names_what_it_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    addresses = [host_port(sock) for sock in sockets]
    base = 700  # descriptors one after the other
    for number, sock in enumerate(sockets):
        os.dup2(sock.fileno(), base + number)
        sock.close()
    monkeypatch.setattr(listeners, "FIRST_DESCRIPTOR", base)
    environment = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "3", "LISTEN_FDNAMES": "x.socket:admin:"}
    given = from_systemd(environment)
    assert {name: [host_port(sock) for sock in found] for name, found in given.items()} == {
        "listen": [addresses[0], addresses[2]],
        "admin": [addresses[1]],
    }
    assert environment == {}  # a process that this one starts has none of them
    for found in given.values():
        for sock in found:
            assert not sock.get_inheritable()
            sock.close()


@pytest.mark.parametrize(
    "environment", [{}, {"LISTEN_PID": "1", "LISTEN_FDS": "1"}, {"LISTEN_PID": str(os.getpid())}]
)
def test_what_systemd_gives_to_others_is_not_taken(environment: dict[str, str]) -> None:
    assert from_systemd(environment) == {}


def test_what_is_no_listening_socket_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as sock:
        monkeypatch.setattr(listeners, "FIRST_DESCRIPTOR", os.dup(sock.fileno()))
    with pytest.raises(ConfigError, match="no listening TCP socket"):
        from_systemd({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"})
