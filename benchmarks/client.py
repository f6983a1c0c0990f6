"""One client that notes when each token came, for the benchmarks that need more than the load generator counts."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import cast

from benchmarks.answers import AnswerError, EventReader, ResponseReader
from benchmarks.load import Plan


@dataclass
class Heard:
    """What came back for one request; times are monotonic, in seconds."""

    seed: int
    sent_at: float = 0.0
    token_at: list[float] = field(default_factory=list)
    """When each token was read; for an answer in one piece, all at its end."""
    words: list[str] = field(default_factory=list)
    """The text of each token event; empty for an answer in one piece."""
    request_id: str = ""
    failure: str = ""
    """Why the answer is not complete and right; empty if it is."""


class Connection(asyncio.Protocol):
    """A kept-alive connection to one address, with one request at a time."""

    def __init__(self, plan: Plan, number: int = 0) -> None:
        """`number` tells which of the plan's addresses to use."""
        self._plan = plan
        self._address = plan.addresses[number % len(plan.addresses)]
        self._transport: asyncio.Transport | None = None
        self._response = ResponseReader()
        self._events: EventReader | None = None
        self._body: list[bytes] = []
        self._heard = Heard(0)
        self._ended: asyncio.Future[None] | None = None

    async def ask(self, seed: int) -> Heard:
        """Send the plan's request with this seed and read the answer, whatever it is; raises nothing."""
        loop = asyncio.get_running_loop()
        heard = self._heard = Heard(seed)
        self._response = ResponseReader()
        self._events = EventReader(self._plan.expected(seed)) if self._plan.stream else None
        self._body = []
        request = self._plan.request(seed)
        self._ended = loop.create_future()
        try:
            if self._transport is None:
                await loop.create_connection(lambda: self, *self._address)
            assert self._transport is not None
            heard.sent_at = time.monotonic()
            self._transport.write(request)
            await self._ended
        except OSError as error:
            heard.failure = f"cannot connect: {error.strerror or error}"
        return heard

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.abort()

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
        heard, response = self._heard, self._response
        try:
            body = response.feed(data)
            if response.head and response.status != 200:
                raise AnswerError(f"status {response.status}")
            if self._events is not None:
                tokens = self._events.feed(body)
                heard.token_at += [now] * tokens
                heard.words = self._events.words
            else:
                self._body.append(body)
            if response.complete:
                self._finish(now)
        except AnswerError as wrong:
            self._end(str(wrong))
            self.close()

    def _finish(self, now: float) -> None:
        if self._events is not None:
            self._events.finish()
        else:
            expected = self._plan.expected(self._heard.seed)
            expected.check_chat(self._response.content(self._body))
            self._heard.token_at = [now] * expected.tokens
        self._end("")
        if self._response.closes:
            self.close()

    def _end(self, failure: str) -> None:
        if self._ended is not None and not self._ended.done():
            self._heard.failure = failure
            self._heard.request_id = self._response.field("x-request-id")
            self._ended.set_result(None)
