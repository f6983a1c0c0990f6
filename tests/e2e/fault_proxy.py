"""A network that fails to order: one TCP port in front of another.

    async with FaultProxy(backend.port, behind=b"\\r\\n\\r\\n", then="reset") as line:
        proxy = await start_proxy({"url": line.url})

What the backend sends is passed on up to and with the text `behind`; `then` says what comes next. Settings may be
changed at any time, and hold for connections that are open as well.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from types import TracebackType
from typing import Literal

from proxy.tasks import Tasks

Then = Literal["pass", "reset", "close", "half-close", "silence"]
"""`pass`: nothing fails. `half-close`: no more is sent, but the connection stays and is read. `silence`: the same,
and not even the end of it comes."""


class FaultProxy:
    """Attributes that count may be read at any time."""

    def __init__(
        self,
        port: int,
        *,
        behind: bytes = b"",
        then: Then = "pass",
        latency_s: float = 0.0,
        piece: int = 0,
    ) -> None:
        """`port`: of the backend, on 127.0.0.1. `behind`: if empty, it fails before the first byte. `latency_s`:
        before each part of an answer. `piece`: bytes of a part; 0: as it comes."""
        self.behind = behind
        self.then: Then = then
        self.latency_s = latency_s
        self.piece = piece
        self.port = 0
        self.connections = 0
        """Accepted since start."""
        self.asked = 0
        """Of these, the ones over which anything was sent to the backend."""
        self.failed = 0
        """Of these, the ones that `then` has happened to."""
        self._backend = port
        self._tasks = Tasks()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> FaultProxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        await self._tasks.cancel_all()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.wait([self._tasks.spawn(self._connection(reader, writer), "faulty connection")])

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        writer.transport.set_write_buffer_limits(0)  # so that `drain` waits until the system has everything
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._backend)
        except ConnectionError:
            writer.transport.abort()
            return
        tasks = Tasks()
        try:
            asking = tasks.spawn(self._ask(reader, back), "there")
            answering = tasks.spawn(self._answer(there, writer), "back")
            # Who asked has left: the backend hears of it. The backend has left: `_answer` has told who asked.
            await asyncio.wait([asking, answering], return_when=asyncio.FIRST_COMPLETED)
            if answering.done() and not writer.transport.is_closing():
                await asyncio.wait([asking])
        finally:
            await tasks.cancel_all()
            back.transport.abort()
            writer.transport.abort()

    async def _ask(self, reader: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        first = True
        try:
            while data := await reader.read(65536):
                self.asked += first
                first = False
                back.write(data)
                await back.drain()
        except ConnectionError:
            pass

    async def _answer(self, there: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen = b""
        try:
            while data := await there.read(self.piece or 65536):
                if self.latency_s:
                    await asyncio.sleep(self.latency_s)
                if self.then == "pass":
                    writer.write(data)
                    await writer.drain()
                    continue
                end = (seen + data).find(self.behind)
                if end < 0:
                    seen = (seen + data)[-len(self.behind) :]
                    writer.write(data)
                    await writer.drain()
                    continue
                writer.write(data[: end + len(self.behind) - len(seen)])
                await writer.drain()
                self.failed += 1
                self._fail(writer)
                return
            writer.close()
        except ConnectionError:
            pass

    def _fail(self, writer: asyncio.StreamWriter) -> None:
        if self.then == "half-close":
            writer.write_eof()
        elif self.then == "close":
            writer.close()
        elif self.then == "reset":
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
