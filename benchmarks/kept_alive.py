"""A kept-alive connection with one request at a time, for the clients that note what came when."""

from __future__ import annotations

import asyncio
import time
from typing import cast

from benchmarks.answers import AnswerError, ResponseReader


class KeptAlive(asyncio.Protocol):
    """Sends a request and waits for the end of its answer. What is in the answer is for those who inherit."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._response = ResponseReader()
        """Of the present request, or of the last one."""
        self._ended: asyncio.Future[str] | None = None

    @property
    def usable(self) -> bool:
        """Whether a request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.abort()

    async def _exchange(self, request: bytes) -> str:
        """Send a request and read its answer; -> why that is not complete and right, empty if it is."""
        if self._transport is None:
            return "connection lost"
        self._response = ResponseReader()
        self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._ended

    def _take(self, body: bytes, now: float) -> None:
        """Bytes of the body came in at a monotonic time, seconds. Raises AnswerError, which ends the connection."""
        raise NotImplementedError

    def _finish(self, now: float) -> str:
        """The answer is complete; -> why it is not right, empty if it is. Raises as `_take`."""
        raise NotImplementedError

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._end("connection lost")

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        if self._ended is None or self._ended.done():
            self.close()
            return
        try:
            self._take(self._response.feed(data), now)
            if not self._response.complete:
                return
            self._end(self._finish(now))
            if self._response.closes:
                self.close()
        except AnswerError as wrong:
            self._end(str(wrong))
            self.close()

    def _end(self, failure: str) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(failure)
