"""One client that notes when each token came, for the benchmarks that need more than the load generator counts."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from benchmarks.answers import AnswerError, EventReader
from benchmarks.kept_alive import KeptAlive
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


class Connection(KeptAlive):
    """A kept-alive connection to one address, with one request at a time."""

    def __init__(self, plan: Plan, number: int = 0) -> None:
        """`number` tells which of the plan's addresses to use."""
        super().__init__()
        self._plan = plan
        self._address = plan.addresses[number % len(plan.addresses)]
        self._events: EventReader | None = None
        self._body: list[bytes] = []
        self._heard = Heard(0)

    async def ask(self, seed: int) -> Heard:
        """Send the plan's request with this seed and read the answer, whatever it is; raises nothing."""
        heard = self._heard = Heard(seed)
        self._events = EventReader(self._plan.expected(seed)) if self._plan.stream else None
        self._body = []
        request = self._plan.request(seed)
        try:
            if self._transport is None:
                await asyncio.get_running_loop().create_connection(lambda: self, *self._address)
            heard.sent_at = time.monotonic()
            heard.failure = await self._exchange(request)
            heard.request_id = self._response.field("x-request-id")
        except OSError as error:
            heard.failure = f"cannot connect: {error.strerror or error}"
        return heard

    def _take(self, body: bytes, now: float) -> None:
        if self._response.head and self._response.status != 200:
            raise AnswerError(f"status {self._response.status}")
        if self._events is not None:
            tokens = self._events.feed(body)
            self._heard.token_at += [now] * tokens
            self._heard.words = self._events.words
        else:
            self._body.append(body)

    def _finish(self, now: float) -> str:
        if self._events is not None:
            self._events.finish()
        else:
            expected = self._plan.expected(self._heard.seed)
            expected.check_chat(self._response.content(self._body))
            self._heard.token_at = [now] * expected.tokens
        return ""
