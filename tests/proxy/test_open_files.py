"""What happens when there are no more files: new clients wait, and what is not theirs goes on."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from proxy import open_files
from proxy.listeners import Listening, by_loop
from proxy.open_files import RESERVED, SAID_AGAIN_S, Reserve, most_clients, watch_open_files
from proxy.tasks import Tasks
from tests.proxy.fakes import World
from tests.proxy.test_server import Peer


def used() -> int:
    return len(os.listdir("/proc/self/fd")) - 1


@contextmanager
def no_more_than(free: int) -> Iterator[None]:
    """Let this process open so many files more, and none beyond."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(map(int, os.listdir("/proc/self/fd"))) + 1 + free
    missing = limit - free - used()  # numbers below the highest one that nobody has
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    fill: list[int] = []
    try:
        fill += [os.dup(0) for _ in range(missing)]
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for file in fill:
            os.close(file)


def test_the_reserve_is_there_for_others_when_files_are_short_and_taken_back_when_they_are_not() -> None:
    reserve, before = Reserve(), used()
    assert reserve.look()
    assert used() == before + RESERVED
    with no_more_than(1):
        assert reserve.look()
    with no_more_than(0):
        assert not reserve.look()
        others = [os.dup(0) for _ in range(RESERVED)]
        assert not reserve.look()
        for file in others:
            os.close(file)
        assert not reserve.look()  # no others are free than its own
    assert reserve.look()
    assert used() == before + RESERVED
    reserve.close()
    assert used() == before


class Looks(Reserve):
    """A reserve that says what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.suffices = True

    def look(self) -> bool:
        return self.suffices


class Greeter(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(b"hello")
        transport.close()


async def greeting(address: tuple[str, int]) -> bytes:
    reader, writer = await asyncio.open_connection(*address)
    try:
        return await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()


async def test_clients_wait_while_files_are_short_and_nobody_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(open_files, "LOOK_S", 0.001)
    world = World("a")

    async def idle_closed(peer: Peer) -> None:
        async with asyncio.timeout(10):
            while not peer.transport.closed:  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    listening, reserve, tasks = Listening(), Looks(), Tasks()
    await listening.open("listen", "127.0.0.1:0", (), by_loop(Greeter))
    host, port = listening.addresses["listen"].split(":")
    address = (host, int(port))
    tasks.spawn(watch_open_files(listening, reserve, world.runtime), "watch")
    try:
        assert await greeting(address) == b"hello"
        for _ in range(3):
            idle = Peer(world)
            reserve.suffices = False
            await idle_closed(idle)
            waiting = tasks.spawn(greeting(address), "client")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await asyncio.shield(waiting)
            reserve.suffices = True
            assert await waiting == b"hello"
            world.loop.now += SAID_AGAIN_S / 2
        told = [record.message for record in caplog.records if record.levelno == logging.ERROR]
        assert len(told) == 2  # of three shortages: once a minute
    finally:
        await tasks.cancel_all()
        listening.close("listen")
    with pytest.raises(ConnectionRefusedError), socket.create_connection(address):
        pass


async def test_what_was_closed_while_it_was_paused_stays_closed() -> None:
    listening = Listening()
    await listening.open("listen", "127.0.0.1:0", (), by_loop(Greeter))
    host, port = listening.addresses["listen"].split(":")
    listening.pause("listen")
    assert len(listening.descriptors()) == 1  # there to be handed over
    listening.close("listen")
    await listening.resume("listen")
    with pytest.raises(ConnectionRefusedError), socket.create_connection((host, int(port))):
        pass


def test_fewer_clients_than_wanted_are_told_when_that_changes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every reload asks again."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (20_000, 20_000))
    possible = most_clients(10_000)
    assert possible == 9950
    assert len(caplog.messages) == 1
    assert most_clients(10_000, possible) == most_clients(12_000, possible) == possible
    assert most_clients(10_000, told=True) == possible  # by the process before
    assert len(caplog.messages) == 1
    assert most_clients(10_000, 500) == possible
    assert len(caplog.messages) == 2
