"""The clients of a soak: some read to the end, some leave, are slow, are limited, or ask nonsense.

Each notes what it was told, so that the ledger can be compared with it. Whatever is neither a whole answer nor an
honest error is a failure.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import orjson

from benchmarks.answers import AnswerError, ResponseReader
from benchmarks.soak_verdict import Asked

MODEL, POOLING_MODEL = "demo", "vectors"
PATIENCE_S = 90.0
"""No answer takes so long: the proxy's own deadline is shorter."""
SLOW_READ_BYTES, SLOW_PAUSE_S = 512, 0.05
HONEST = frozenset((429, 500, 502, 503, 504, 529))
"""Statuses that a sick backend or a limit may bring about."""


@dataclass(frozen=True, slots=True)
class Manner:
    """How a client reads."""

    leaves_after: int | None = None
    """Events; 0: before the head, after a moment. None: it stays."""
    slow: bool = False


STAYS = Manner()


class Client:
    """One client, which keeps its connection as long as the proxy does."""

    def __init__(self, port: int, key: str, rng: Random, asked: list[Asked]) -> None:
        self.rng = rng
        self._port = port
        self._key = key
        self._asked = asked
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(
        self,
        kind: str,
        path: str,
        document: dict[str, Any],
        manner: Manner = STAYS,
        *,
        running: bool = False,
        recorded: bool = True,
        wanted: frozenset[int] = frozenset((200,)),
    ) -> Asked:
        """Send one request and read its answer. `wanted`: statuses besides those of `HONEST` that may come."""
        one = Asked(kind, running=running, recorded=recorded)
        self._asked.append(one)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._ask(one, path, orjson.dumps(document), manner)
        except TimeoutError:
            one.failure = "no answer"
            self.close()
        except AnswerError as wrong:
            one.failure = str(wrong)
            self.close()
        except OSError as error:
            # The proxy may reset a connection that is half closed already, and no other.
            one.failure = f"connection: {error.strerror or type(error).__name__}"
            self.close()
        if one.complete and not one.failure and one.status not in wanted | HONEST:
            one.failure = f"status {one.status}"
        return one

    async def _ask(self, one: Asked, path: str, body: bytes, manner: Manner) -> None:
        if self._writer is None or self._writer.is_closing() or manner.slow:
            self.close()
            await self._connect(manner.slow)
        reader, writer = self._reader, self._writer
        assert reader is not None
        assert writer is not None
        head = (
            f"POST {path} HTTP/1.1\r\nHost: soak\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {self._key}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        if manner.leaves_after == 0:
            await asyncio.sleep(self.rng.random() * 0.3)
            one.left = True
            self.close()
            return
        response, told = ResponseReader(), _Told(one)
        while not response.complete:
            if manner.slow:
                await asyncio.sleep(SLOW_PAUSE_S)
            data = await reader.read(SLOW_READ_BYTES if manner.slow else 65536)
            if not data:
                raise AnswerError("the connection was closed before the end of the answer")
            told.take(response.feed(data), response)
            if manner.leaves_after is not None and told.events >= manner.leaves_after:
                one.left = True
                self.close()
                return
        told.end()
        if response.closes or manner.slow or one.cut:  # the proxy closes behind an error event
            self.close()

    async def _connect(self, slow: bool) -> None:
        sock = socket.socket()
        try:
            if slow:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self._port))
            limit = 2 * SLOW_READ_BYTES if slow else 2**16
            self._reader, self._writer = await asyncio.open_connection(sock=sock, limit=limit)
        except BaseException:
            sock.close()
            raise

    def close(self) -> None:
        """Leave, at once."""
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = None


class _Told:
    """What an answer says, as it comes. Raises AnswerError."""

    def __init__(self, one: Asked) -> None:
        self.events = 0
        self._one = one
        self._body = b""
        self._stream = False
        self._usage: dict[str, Any] = {}
        self._ends: list[str] = []

    def take(self, body: bytes, response: ResponseReader) -> None:
        one = self._one
        if not one.status and response.head:
            one.status, one.op = response.status, response.field("x-request-id")
            self._stream = response.field("content-type").startswith("text/event-stream")
        self._body += body
        if self._stream:
            *blocks, self._body = self._body.split(b"\n\n")
            for block in blocks:
                self._event(block)

    def end(self) -> None:
        """The answer is complete."""
        one = self._one
        one.complete = True
        if not self._stream:
            document = _document(self._body)
            if one.status == 200:
                self._note_usage(document)
            elif "error" not in document:
                raise AnswerError(f"status {one.status} without an error")
        elif self._body or len(self._ends) != 1:
            raise AnswerError(f"a stream with the ends {self._ends}")
        else:
            one.cut = self._ends == ["error"]

    def _event(self, block: bytes) -> None:
        data = b"\n".join(line[6:] for line in block.split(b"\n") if line.startswith(b"data: "))
        if self._ends and data:
            raise AnswerError("something behind the end of a stream")
        if data == b"[DONE]":
            self._ends.append("done")
        elif data:
            self.events += 1
            document = _document(data)
            kind = document.get("type")
            if document.get("error") is not None or kind == "error" or kind == "response.failed":
                self._ends.append("error")
            elif kind in ("response.completed", "response.incomplete", "message_stop"):
                self._ends.append("done")
            self._note_usage(document)

    def _note_usage(self, document: dict[str, Any]) -> None:
        for holder in (document, document.get("response"), document.get("message")):
            if isinstance(holder, dict) and isinstance(holder.get("usage"), dict):
                self._usage |= holder["usage"]
                self._one.tokens = tokens_of(self._usage)


def tokens_of(usage: dict[str, Any]) -> tuple[int, int]:
    """Tokens of prompt and answer, in the words of any of the APIs."""
    prompt = usage.get("prompt_tokens")
    if prompt is None:
        cached = ("cache_creation_input_tokens", "cache_read_input_tokens")
        prompt = sum(usage.get(name) or 0 for name in ("input_tokens", *cached))
    return prompt, usage.get("completion_tokens") or usage.get("output_tokens") or 0


def _document(data: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise AnswerError("no JSON where JSON should be") from None
    if not isinstance(document, dict):
        raise AnswerError("no JSON object where one should be")
    return document


# What they ask

Kind = Callable[[Client], Awaitable[Asked]]


def _text(rng: Random) -> str:
    return "The tide comes in at noon. " * rng.choice((1, 1, 4, 20, 150))


def _chat(client: Client, **fields: Any) -> dict[str, Any]:
    rng = client.rng
    messages = [{"role": "user", "content": _text(rng)}]
    return {
        "model": MODEL,
        "messages": messages,
        "max_tokens": rng.randint(1, 120),
        "ignore_eos": True,
        "seed": rng.randrange(10**6),
        **fields,
    }


def _stream(client: Client, running: bool = False, **fields: Any) -> dict[str, Any]:
    options = {"include_usage": True, "continuous_usage_stats": True} if running else {"include_usage": True}
    return _chat(client, stream=True, stream_options=options, **fields)


CHATS = "/v1/chat/completions"


async def streams(client: Client) -> Asked:
    return await client.ask("stream", CHATS, _stream(client))


async def watches(client: Client) -> Asked:
    """Wants running usage, so it knows at each moment what it has had."""
    return await client.ask("watched stream", CHATS, _stream(client, True), running=True)


async def asks_whole(client: Client) -> Asked:
    return await client.ask("whole answer", CHATS, _chat(client))


async def embeds(client: Client) -> Asked:
    texts = [_text(client.rng) for _ in range(client.rng.randint(1, 4))]
    return await client.ask("embeddings", "/v1/embeddings", {"model": POOLING_MODEL, "input": texts})


async def responds(client: Client) -> Asked:
    rng = client.rng
    document = {"model": MODEL, "input": _text(rng), "max_output_tokens": rng.randint(1, 80)}
    return await client.ask("response", "/v1/responses", document | {"stream": rng.random() < 0.7})


async def messages(client: Client) -> Asked:
    rng = client.rng
    said = [{"role": "user", "content": _text(rng)}]
    document = {"model": MODEL, "messages": said, "max_tokens": rng.randint(1, 80)}
    return await client.ask("message", "/v1/messages", document | {"stream": rng.random() < 0.7})


async def leaves(client: Client) -> Asked:
    manner = Manner(leaves_after=client.rng.choice((0, 1, 1, 5, 20, 60)))
    return await client.ask("left stream", CHATS, _stream(client, True), manner, running=True)


async def reads_slowly(client: Client) -> Asked:
    return await client.ask("slow reader", CHATS, _stream(client, True), Manner(slow=True), running=True)


async def is_limited(client: Client) -> Asked:
    return await client.ask("limited", CHATS, _stream(client))


async def asks_nonsense(client: Client) -> Asked:
    document = client.rng.choice(({"model": "nobody", "messages": []}, {"messages": []}, _chat(client, n=-1)))
    return await client.ask("nonsense", CHATS, document, wanted=frozenset((400, 404)))


async def is_unknown(client: Client) -> Asked:
    return await client.ask("stranger", CHATS, _chat(client), recorded=False, wanted=frozenset((401,)))


OPEN: dict[Kind, int] = {
    streams: 12,
    watches: 6,
    asks_whole: 6,
    embeds: 3,
    responds: 4,
    messages: 4,
    leaves: 4,
    reads_slowly: 3,
    asks_nonsense: 1,
}
"""Clients with a key without limits, by what they do."""
LIMITED: dict[Kind, int] = {is_limited: 3}
STRANGERS: dict[Kind, int] = {is_unknown: 1}
MOST_PAUSE_S = 1.0
"""Between two requests of a client. Connections that idle longer may be closed at any moment."""


async def run(port: int, keys: tuple[str, str], seed: int, asked: list[Asked], stop: asyncio.Event) -> None:
    """All clients, until `stop`; what is under way then is waited for. `keys`: one without limits, one with."""
    everybody = [
        (kind, key)
        for kinds, key in ((OPEN, keys[0]), (LIMITED, keys[1]), (STRANGERS, "tg_nobody"))
        for kind, count in kinds.items()
        for _ in range(count)
    ]

    async def one(number: int, kind: Kind, key: str) -> None:
        client = Client(port, key, Random(f"{seed}/{number}"), asked)
        try:
            while not stop.is_set():
                await asyncio.sleep(client.rng.random() * MOST_PAUSE_S)
                await kind(client)
        finally:
            client.close()

    await asyncio.gather(*(one(number, kind, key) for number, (kind, key) in enumerate(everybody)))


async def each_once(port: int, keys: tuple[str, str], asked: list[Asked]) -> None:
    """One request of each kind, one after the other."""
    for kinds, key in ((OPEN, keys[0]), (LIMITED, keys[1]), (STRANGERS, "tg_nobody")):
        for kind in kinds:
            client = Client(port, key, Random(1), asked)
            await kind(client)
            client.close()
