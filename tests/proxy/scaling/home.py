"""Where the engines of a test call. Whatever a test waits for is a line, or the end, of such a call."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENGINE = Path(__file__).with_name("engine.py")
PATIENCE_S = 120.0


@dataclass
class Call:
    """One process that has called, and lives as long as its connection."""

    who: str
    pid: int
    arguments: list[str]
    environment: dict[str, str]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def line(self) -> Any:
        """What it says next; None: it has ended."""
        async with asyncio.timeout(PATIENCE_S):
            try:
                data = await self.reader.readline()
            except ConnectionResetError:
                return None
        return json.loads(data) if data else None

    async def ended(self) -> None:
        """Wait until it has."""
        while await self.line() is not None:
            pass

    def go_on(self) -> None:
        """Let one with `--exit` end."""
        self.writer.write(b"x")


class Home:
    """Takes the calls."""

    def __init__(self) -> None:
        self._calls = asyncio.Queue[Call]()
        self._pids: list[int] = []
        self._writers: list[asyncio.StreamWriter] = []
        self.port = 0

    async def call(self) -> Call:
        """The next process that calls."""
        async with asyncio.timeout(PATIENCE_S):
            return await self._calls.get()

    def nobody_else(self) -> bool:
        """Whether all who called were heard."""
        return self._calls.empty()

    def command(self, *arguments: str) -> list[str]:
        """To launch an engine by."""
        return [sys.executable, "-I", "-S", str(ENGINE), str(self.port), *arguments]

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said = json.loads(await reader.readline())
        self._pids.append(said["pid"])
        self._writers.append(writer)
        self._calls.put_nowait(Call(**said, reader=reader, writer=writer))


@asynccontextmanager
async def at_home() -> AsyncIterator[Home]:
    """A home; whoever has called and still lives at its end is killed."""
    home = Home()
    server = await asyncio.start_server(home._take, "127.0.0.1", 0)
    home.port = server.sockets[0].getsockname()[1]
    try:
        yield home
    finally:
        for pid in home._pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        server.close()
        for writer in home._writers:
            writer.transport.abort()
        await asyncio.sleep(0)


async def ended(pid: int) -> None:
    """Wait until a process that is not our child has ended."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    over = loop.create_future()
    loop.add_reader(handle, lambda: over.done() or over.set_result(None))
    try:
        async with asyncio.timeout(PATIENCE_S):
            await over
    finally:
        loop.remove_reader(handle)
        os.close(handle)
