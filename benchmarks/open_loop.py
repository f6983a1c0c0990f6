"""A client that sends each request at its time, whether or not others are answered, and notes what came when.

Requests are chats with exactly the wanted counts of tokens by the emulator's tokenizer (`sim/tokens.py`). Their
bodies have four bytes for each token of the prompt, as far as words of one to five letters allow: the proxy
forecasts a prompt's tokens from its bytes, and so forecasts right. No two prompts share their first block.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import orjson

from benchmarks.kept_alive import KeptAlive
from proxy.meter import BYTES_PER_TOKEN
from sim.tokens import chat_pieces
from sim.workload import Arrival

MODEL = "demo"
LEAST_PROMPT = len(chat_pieces([("user", "")]))
"""Tokens of a chat that says nothing."""
START_S = 0.2
"""Before the first request is sent."""

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_NUMBER_WORDS = 5
"""The first words of a prompt begin with the digits of its number."""
_EVENT = b"data: {"
_USAGE = re.compile(rb'"usage":\{"prompt_tokens":(\d+),"total_tokens":\d+,"completion_tokens":(\d+)')


@dataclass
class Answer:
    """What became of one request; times are monotonic, seconds."""

    due_at: float
    began_at: float = 0.0
    """When the client turned to it: as much later than it was due as the client was late."""
    sent_at: float = 0.0
    """When there was a connection, and the request was written to it."""
    first_at: float = 0.0
    """When its first token was read."""
    ended_at: float = 0.0
    backend: str = ""
    events: int = 0
    failure: str = ""
    """Why it is not complete and as long as it was asked for; empty if it is."""


def body(number: int, prompt_tokens: int, output_tokens: int) -> bytes:
    """A streamed chat request with so many tokens of prompt (`LEAST_PROMPT` at least) and of answer."""
    fields = {
        "model": MODEL,
        "messages": [{"role": "user", "content": ""}],
        "max_tokens": output_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    words = prompt_tokens - LEAST_PROMPT
    room = prompt_tokens * BYTES_PER_TOKEN - len(orjson.dumps(fields))
    fields["messages"] = [{"role": "user", "content": _text(number, words, room)}]
    return orjson.dumps(fields)


def _text(number: int, words: int, size: int) -> str:
    """So many tokens in so many bytes, or as near to it as can be. A token is a space and one to five letters."""
    if words == 0:
        return ""
    length, longer = divmod(min(max(size, 2 * words), 6 * words), words)
    said = []
    for at in range(words):
        first = "a"
        if at < _NUMBER_WORDS:
            number, digit = divmod(number, len(_LETTERS))
            first = _LETTERS[digit]
        said.append(" " + first + "e" * (length - 2 + (at < longer)))
    return "".join(said)


async def play(
    port: int,
    requests: Sequence[Arrival],
    heard: Callable[[], object],
    bodies: Sequence[bytes] | None = None,
) -> list[Answer]:
    """Send requests, each `at` so many microseconds after the beginning, to a port of this machine; raises nothing
    of what comes back. `heard` is called with each end of an answer. `bodies`: of the requests, with as many tokens
    as they have; without, they are made by `body`. -> the answers, in order of the requests.
    """
    if bodies is None:
        bodies = [body(number, one.prompt_tokens, one.output_tokens) for number, one in enumerate(requests)]
    idle: list[_Connection] = []
    begin = time.monotonic() + START_S

    async def one(request: Arrival, asking: bytes) -> Answer:
        answer = Answer(begin + request.at / 1e6)
        await asyncio.sleep(answer.due_at - time.monotonic())
        answer.began_at = time.monotonic()
        try:
            connection = await _connection(idle, port)
            await connection.ask(asking, request, answer)
            if connection.usable:
                idle.append(connection)
        except OSError as error:
            answer.failure = f"cannot connect: {error.strerror or error}"
        heard()
        return answer

    answers = await asyncio.gather(*map(one, requests, bodies))
    for connection in idle:
        connection.close()
    return answers


async def _connection(idle: list[_Connection], port: int) -> _Connection:
    """An idle one, or one more."""
    while idle:
        connection = idle.pop()
        if connection.usable:
            return connection
    _, connection = await asyncio.get_running_loop().create_connection(_Connection, "127.0.0.1", port)
    return connection


class _Connection(KeptAlive):
    """Fills in answers."""

    def __init__(self) -> None:
        super().__init__()
        self._answer = Answer(0.0)
        self._wanted = (0, 0)
        self._tail = b""

    async def ask(self, asking: bytes, request: Arrival, answer: Answer) -> None:
        """Send a body and read the answer."""
        self._answer, self._tail = answer, b""
        self._wanted = (request.prompt_tokens, request.output_tokens)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: tidegate\r\nContent-Type: application/json\r\n"
        if request.session:
            head += b"X-Session-Id: %s\r\n" % request.session.encode()
        answer.sent_at = time.monotonic()
        answer.failure = await self._exchange(head + b"Content-Length: %d\r\n\r\n" % len(asking) + asking)

    def _take(self, received: bytes, now: float) -> None:
        answer = self._answer
        if not answer.events:
            received = self._tail + received  # an event's first bytes may have come alone
        events = received.count(_EVENT)
        if events and not answer.events:
            answer.first_at = now
        answer.events += events
        self._tail = (self._tail + received)[-1000:] if answer.events else received

    def _finish(self, now: float) -> str:
        self._answer.ended_at = now
        self._answer.backend = self._response.field("x-tidegate-backend")
        if self._response.status != 200:
            return f"status {self._response.status}"
        usage = _USAGE.search(self._tail)
        if usage is None or not self._tail.endswith(b"data: [DONE]\n\n"):
            return "the stream has no proper end"
        counted = (int(usage[1]), int(usage[2]))
        return "" if counted == self._wanted else f"{counted} tokens instead of {self._wanted}"
