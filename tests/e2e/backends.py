"""Scripted backends on real sockets: each request is answered as its script says, and every byte is kept.

    async with Backend(resets_before_head, then=answers()) as backend:
        ...

The first request meets the first entry of the script, the second the next one, all further ones `then`. Probes
(`GET`) are answered beside the script.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeAlias

from proxy.tasks import Tasks

STREAM_FIELDS = b"content-type: text/event-stream; charset=utf-8\r\n"
DONE = b"data: [DONE]\n\n"
LAST_CHUNK = b"0\r\n\r\n"
PROMPT_TOKENS = 7


def dead_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def sse(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n"


def error_event() -> bytes:
    return sse({"error": {"message": "the engine died", "type": "InternalServerError", "code": 500}})


def usage(completion: int) -> dict[str, int]:
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "total_tokens": PROMPT_TOKENS + completion,
        "completion_tokens": completion,
    }


@dataclass
class Request:
    """One request that a backend received."""

    method: str
    target: str
    fields: dict[str, str]
    body: bytes

    @property
    def document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.body)
        return document

    @property
    def streams(self) -> bool:
        return self.document.get("stream") is True

    def event(self, number: int, text: str = "x") -> bytes:
        """The `number`-th token of a stream, with running usage if that was asked for, as vLLM does it."""
        document: dict[str, Any] = {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": self.document["model"],
            "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}],
        }
        options = self.document.get("stream_options") or {}
        if options.get("continuous_usage_stats"):
            document["usage"] = usage(number)
        return sse(document)

    def end(self, tokens: int) -> bytes:
        """What stands behind the last token."""
        options = self.document.get("stream_options") or {}
        last = b""
        if options.get("include_usage"):
            last = sse(
                {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [], "usage": usage(tokens)}
            )
        return last + DONE

    def answer(self, tokens: int) -> bytes:
        """The body of an answer that is no stream."""
        message = {"role": "assistant", "content": "x" * tokens}
        return json.dumps(
            {
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "created": 1,
                "model": self.document["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": usage(tokens),
            }
        ).encode()


@dataclass
class Wire:
    """One request and the connection to answer it on."""

    request: Request
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    sent: int = 0
    """Bytes that the system has taken."""
    keep: bool = True
    """The connection may be used again afterwards."""

    async def send(self, data: bytes) -> None:
        """Raises ConnectionError when the proxy has gone."""
        self.writer.write(data)
        await self.writer.drain()
        if self.writer.transport.is_closing():
            raise ConnectionResetError
        self.sent += len(data)

    async def begin(self) -> None:
        """The head of a stream."""
        await self.send(b"HTTP/1.1 200 OK\r\n" + STREAM_FIELDS + b"transfer-encoding: chunked\r\n\r\n")

    async def tokens(self, first: int, last: int) -> None:
        """Events of a stream."""
        for number in range(first, last + 1):
            await self.send(chunk(self.request.event(number)))

    async def finish(self, tokens: int) -> None:
        await self.send(chunk(self.request.end(tokens)) + LAST_CHUNK)

    async def whole(self, status: int, body: bytes, *fields: bytes) -> None:
        lines = b"".join(line + b"\r\n" for line in (b"content-type: application/json", *fields))
        head = b"HTTP/1.1 %d X\r\n%bcontent-length: %d\r\n\r\n" % (status, lines, len(body))
        await self.send(head + body)

    def close(self) -> None:
        self.keep = False
        self.writer.close()

    def reset(self) -> None:
        """Close with RST."""
        self.keep = False
        linger = struct.pack("ii", 1, 0)
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()

    async def gone(self) -> None:
        """Returns when the proxy has closed the connection."""
        while await self.reader.read(65536):
            pass


Behaviour: TypeAlias = Callable[[Wire], Awaitable[None]]


@dataclass
class Backend:
    """One server. Attributes are its memory, and may be read at any time."""

    script: list[Behaviour] = field(default_factory=list)
    then: Behaviour | None = None
    models: tuple[str, ...] = ("m",)
    refuses_models: int = 0
    """Status that `/v1/models` is answered with instead."""
    health: int = 200
    """Status that `/health` is answered with."""
    received: list[Request] = field(default_factory=list)
    raw: bytearray = field(default_factory=bytearray)
    """Every byte that ever came in."""
    connections: int = 0
    """Accepted since start."""
    open: int = 0
    running: int = 0
    """Requests being answered."""
    aborted: int = 0
    """Answers that the proxy did not want to the end."""
    host: str = "127.0.0.1"
    port: int = 0
    path: str = ""
    """Of a Unix socket, which it listens on instead."""
    tls: ssl.SSLContext | None = None
    _server: asyncio.Server | None = None
    _tasks: Tasks = field(default_factory=Tasks)

    @classmethod
    def of(cls, *script: Behaviour, then: Behaviour | None = None, **options: Any) -> Backend:
        """Without `then`, requests behind the script get a short answer."""
        return cls(list(script), then or answers(), **options)

    @property
    def url(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"http{'' if self.tls is None else 's'}://{self.host}:{self.port}"

    async def __aenter__(self) -> Backend:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Begin (again) to listen, on the same port."""
        if self.path:
            self._server = await asyncio.start_unix_server(self._serve, self.path)
            return
        self._server = await asyncio.start_server(self._serve, self.host, self.port, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop as a crash does: connections are cut."""
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._tasks.cancel_all()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = self._tasks.spawn(self._connection(reader, writer), "backend connection")
        await asyncio.wait([task])

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        try:
            while True:
                wire = Wire(await self._read(reader), reader, writer)
                await self._answer(wire)
                if not wire.keep:
                    break
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            writer.transport.abort()

    async def _read(self, reader: asyncio.StreamReader) -> Request:
        head = await reader.readuntil(b"\r\n\r\n")
        self.raw += head
        first, *lines = head.decode("latin-1").split("\r\n")[:-2]
        method, target, _ = first.split(" ")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await reader.readexactly(int(fields.get("content-length", "0")))
        self.raw += body
        return Request(method, target, fields, body)

    async def _answer(self, wire: Wire) -> None:
        if wire.request.method == "GET":
            await self._probe(wire)
            return
        self.received.append(wire.request)
        behaviour = self.script.pop(0) if self.script else self.then
        assert behaviour is not None
        self.running += 1
        try:
            await behaviour(wire)
        except ConnectionError:
            self.aborted += 1
            raise
        finally:
            self.running -= 1

    async def _probe(self, wire: Wire) -> None:
        if wire.request.target == "/health":
            await wire.whole(self.health, b"")
        elif wire.request.target == "/v1/models" and self.refuses_models:
            await wire.whole(self.refuses_models, b"")
        elif wire.request.target == "/v1/models":
            rows = [{"id": name, "object": "model", "max_model_len": 4096} for name in self.models]
            await wire.whole(200, json.dumps({"object": "list", "data": rows}).encode())
        else:
            await wire.whole(404, b"")


# Behaviours


def answers(tokens: int = 3, *, gap_s: float = 0.0) -> Behaviour:
    """Well."""

    async def behave(wire: Wire) -> None:
        if not wire.request.streams:
            await wire.whole(200, wire.request.answer(tokens))
            return
        await wire.begin()
        for number in range(1, tokens + 1):
            await wire.tokens(number, number)
            if gap_s:
                await asyncio.sleep(gap_s)
        await wire.finish(tokens)

    return behave


def waits(gate: asyncio.Event, tokens: int = 2) -> Behaviour:
    """Streams its first token and the rest, or answers at all, when the gate opens."""

    async def behave(wire: Wire) -> None:
        if not wire.request.streams:
            await _until(gate, wire)
            await wire.whole(200, wire.request.answer(tokens))
            return
        await wire.begin()
        await wire.tokens(1, 1)
        await _until(gate, wire)
        await wire.tokens(2, tokens)
        await wire.finish(tokens)

    return behave


async def _until(gate: asyncio.Event, wire: Wire) -> None:
    """Wait for a gate, or raise ConnectionError when the proxy leaves before."""
    tasks = Tasks()
    opened, gone = tasks.spawn(gate.wait(), "gate"), tasks.spawn(wire.gone(), "gone")
    try:
        await asyncio.wait([opened, gone], return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            raise ConnectionResetError
    finally:
        await tasks.cancel_all()


async def _left(wire: Wire) -> None:
    await wire.gone()
    raise ConnectionResetError


async def stalls(wire: Wire) -> None:
    """Says nothing."""
    await _left(wire)


async def stalls_after_head(wire: Wire) -> None:
    """Says 200, as vLLM does before it works, and nothing else."""
    await wire.begin()
    await _left(wire)


async def stalls_midstream(wire: Wire) -> None:
    await wire.begin()
    await wire.tokens(1, 2)
    await _left(wire)


async def resets_before_head(wire: Wire) -> None:
    wire.reset()


async def closes_before_head(wire: Wire) -> None:
    wire.close()


async def resets_after_head(wire: Wire) -> None:
    await wire.begin()
    wire.reset()


async def resets_midstream(wire: Wire) -> None:
    await wire.begin()
    await wire.tokens(1, 2)
    await asyncio.sleep(0.02)  # a reset takes what is still on its way with it
    wire.reset()


async def closes_midstream(wire: Wire) -> None:
    await wire.begin()
    await wire.tokens(1, 2)
    wire.close()


async def closes_within_an_answer(wire: Wire) -> None:
    """Of an answer that is no stream."""
    body = wire.request.answer(5)
    await wire.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body[:-4]))
    wire.close()


async def garbage(wire: Wire) -> None:
    await wire.send(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
    await _left(wire)


async def garbage_midstream(wire: Wire) -> None:
    await wire.begin()
    await wire.tokens(1, 2)
    await asyncio.sleep(0.02)  # what comes in one piece with it is garbage too
    await wire.send(b"not a chunk size\r\n")
    await _left(wire)


async def closes_behind(wire: Wire) -> None:
    """Answers well and closes the connection without having said so."""
    await answers()(wire)
    wire.close()


async def speaks_unasked(wire: Wire) -> None:
    """Answers well, and goes on with an answer that nobody asked for."""
    await answers()(wire)
    await wire.send(b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nPOISONED")


def status(code: int, body: bytes = b'{"error":{"message":"no"}}', *fields: bytes) -> Behaviour:
    async def behave(wire: Wire) -> None:
        await wire.whole(code, body, *fields)

    return behave


async def error_event_first(wire: Wire) -> None:
    await wire.begin()
    await wire.send(chunk(error_event() + DONE) + LAST_CHUNK)


async def error_event_midstream(wire: Wire) -> None:
    """What vLLM sends when its engine dies."""
    await wire.begin()
    await wire.tokens(1, 2)
    await wire.send(chunk(error_event()) + chunk(DONE) + LAST_CHUNK)


async def data_behind_done(wire: Wire) -> None:
    await wire.begin()
    await wire.tokens(1, 2)
    await wire.send(chunk(DONE))
    await wire.tokens(3, 4)
    await wire.send(chunk(DONE))
    await _left(wire)


async def one_byte_chunks(wire: Wire) -> None:
    request = wire.request
    stream = request.event(1) + request.event(2) + request.end(2)
    await wire.begin()
    await wire.send(b"".join(chunk(bytes([byte])) for byte in stream) + LAST_CHUNK)


async def one_byte_writes(wire: Wire) -> None:
    request = wire.request
    stream = chunk(request.event(1)) + chunk(request.event(2) + request.end(2)) + LAST_CHUNK
    await wire.begin()
    for byte in stream:
        await wire.send(bytes([byte]))
        await asyncio.sleep(0)


async def heartbeats(wire: Wire) -> None:
    """Comments between and before the tokens, CRLF lines, an empty event."""
    request = wire.request
    await wire.begin()
    events = [b": keep-alive\r\n\r\n", b"data:\n\n", request.event(1).replace(b"\n", b"\r\n"), b": again\n\n"]
    for event in [*events, request.event(2), request.end(2)]:
        await wire.send(chunk(event))
    await wire.send(LAST_CHUNK)


async def gzipped(wire: Wire) -> None:
    body = gzip.compress(wire.request.answer(3))
    await wire.whole(200, body, b"content-encoding: gzip")


def until_close(*, complete: bool) -> Behaviour:
    """A stream of HTTP/1.0 that only its end delimits."""

    async def behave(wire: Wire) -> None:
        request = wire.request
        await wire.send(b"HTTP/1.0 200 OK\r\n" + STREAM_FIELDS + b"\r\n")
        await wire.send(request.event(1) + request.event(2) + (request.end(2) if complete else b""))
        wire.close()

    return behave


def huge_event(size: int) -> Behaviour:
    """One event of so many bytes (logprobs, audio), then a token."""

    async def behave(wire: Wire) -> None:
        await wire.begin()
        await wire.send(chunk(wire.request.event(1, "h" * size)))
        await wire.tokens(2, 2)
        await wire.finish(2)

    return behave


def floods(wires: list[Wire], size: int) -> Behaviour:
    """Streams `size` bytes as fast as it can; `wires` gets the wire, to see how far it has come."""

    async def behave(wire: Wire) -> None:
        wires.append(wire)
        event = wire.request.event(1, "f" * 1000)
        await wire.begin()
        for _ in range(size // len(event)):
            await wire.send(chunk(event))
        await wire.finish(1)

    return behave
