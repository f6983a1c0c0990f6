"""A very fast OpenAI-compatible backend that says what it was asked to say, in vLLM's shapes.

    python -m benchmarks.mock_backend --backends 2 --rate 50

It stands in for vLLM where a real engine would be the bottleneck: raw `asyncio.Protocol`, no framework, one timer
wheel for all streams of a process. What it imitates exactly is what a proxy has to read: one SSE event is one HTTP
chunk, written when its token is due; the head of a stream goes out before its first token; the first event has the
role and no text; running usage is in every event when `continuous_usage_stats` asks for it, and in one last event
when `include_usage` does.

The text of an answer follows from the request's `seed` (see `shapes.answer_text`), so that whoever asked can tell a
complete answer from a cut one and its own answer from somebody else's. `max_tokens` is the number of tokens sent.

Everything that was sent is counted: `GET /bench/state` has the totals, `GET /bench/sent` (with `--record`) the
tokens of each request, which is what a ledger is compared with.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import socket
import time
from dataclasses import asdict, dataclass
from email.utils import formatdate
from itertools import count
from typing import Any, cast

import orjson
import uvloop

from benchmarks import shapes

WHEEL_RESOLUTION_S = 0.001
DEFAULT_MAX_TOKENS = 16


@dataclass
class Counters:
    """What one backend did since it started."""

    requests: int = 0
    streams: int = 0
    tokens: int = 0
    """Completion tokens handed to the kernel, streamed or not."""
    prompt_tokens: int = 0
    running: int = 0
    aborted: int = 0
    """Streams whose client went away before the end."""
    refused: int = 0
    """Requests answered with an error."""


@dataclass(slots=True)
class Sent:
    """What one request was sent, for comparing a ledger with."""

    request_id: str
    """The `x-request-id` header as it arrived here; empty if there was none."""
    seed: int
    stream: bool
    prompt_tokens: int
    tokens: int = 0
    finished: bool = False


def asked_tokens(body: dict[str, Any]) -> int:
    """How many tokens a request asks for."""
    return int(body.get("max_tokens") or body.get("max_completion_tokens") or DEFAULT_MAX_TOKENS)


class Wheel:
    """Calls many streams at one rate with one timer: each stream keeps the phase it started with."""

    def __init__(self, loop: asyncio.AbstractEventLoop, period_s: float) -> None:
        self._loop = loop
        self._slots: list[list[Stream]] = [[] for _ in range(max(1, round(period_s / WHEEL_RESOLUTION_S)))]
        self._at = 0
        self._turned_at = 0.0
        self._streams = 0

    def add(self, stream: Stream) -> None:
        """Call this stream one period from now and each period after, until it says that it has ended."""
        if not self._streams:
            self._turned_at = time.monotonic()
            self._loop.call_later(WHEEL_RESOLUTION_S, self._turn)
        self._streams += 1
        self._slots[self._at].append(stream)

    def _turn(self) -> None:
        due = int((time.monotonic() - self._turned_at) / WHEEL_RESOLUTION_S)
        for _ in range(due):
            self._turned_at += WHEEL_RESOLUTION_S
            self._at = (self._at + 1) % len(self._slots)
            slot = self._slots[self._at]
            if slot:
                going_on = [stream for stream in slot if stream.send_token()]
                self._streams -= len(slot) - len(going_on)
                self._slots[self._at] = going_on
        if self._streams:
            self._loop.call_later(WHEEL_RESOLUTION_S, self._turn)


class Backend:
    """One emulated engine: its counters, its speed and the numbering of its answers."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        rate: float = 50.0,
        ttft_s: float = 0.0,
        stamp: bool = False,
        record: bool = False,
    ) -> None:
        """`rate`: tokens per second of a stream. `stamp`: send the monotonic time in ns in place of each word."""
        self.loop = loop
        self.wheel = Wheel(loop, 1.0 / rate)
        self.ttft_s = ttft_s
        self.stamp = stamp
        self.record = record
        self.counters = Counters()
        self.sent: list[Sent] = []
        self._numbers = count(1)
        self._date_at = 0.0
        self._date = b""

    def head_lines(self) -> bytes:
        """Status line and the fields that uvicorn sends with every answer; the date is made once a second."""
        now = time.monotonic()
        if now - self._date_at >= 1.0:
            self._date_at = now
            self._date = formatdate(usegmt=True).encode()
        return b"HTTP/1.1 200 OK\r\ndate: %b\r\nserver: uvicorn\r\n" % self._date

    def next_id(self, request_id: str) -> str:
        """An answer's id: as vLLM does, the client's request id if there is one."""
        return f"chatcmpl-{request_id or f'{next(self._numbers):016x}'}"

    def open_record(self, request_id: str, seed: int, stream: bool, prompt_tokens: int) -> Sent:
        """Count a request; its record is kept only when asked for (a long run would not fit in memory)."""
        self.counters.requests += 1
        self.counters.streams += stream
        self.counters.prompt_tokens += prompt_tokens
        sent = Sent(request_id, seed, stream, prompt_tokens)
        if self.record:
            self.sent.append(sent)
        return sent


class Stream:
    """One streamed answer: writes its next token whenever it is called."""

    __slots__ = (
        "_final_usage",
        "_head",
        "_position",
        "_protocol",
        "_running_usage",
        "_sent",
        "_tokens",
        "_transport",
    )

    def __init__(self, protocol: BackendProtocol, answer_id: str, body: dict[str, Any], sent: Sent) -> None:
        options = body.get("stream_options") or {}
        self._protocol = protocol
        self._transport = protocol.transport
        self._sent = sent
        self._position = 0
        self._tokens = asked_tokens(body)
        self._final_usage = bool(options.get("include_usage"))
        self._running_usage = self._final_usage and bool(options.get("continuous_usage_stats"))
        self._head = shapes.event_head(answer_id, int(time.time()))

    def send_token(self) -> bool:
        """Write the next token, if the client keeps up; returns whether more are to come."""
        protocol, sent = self._protocol, self._sent
        if protocol.stream is not self:
            return False
        if protocol.write_paused:
            return True
        position = self._position
        self._position = position + 1
        if position == 0:
            self._transport.write(self._event(shapes.ROLE, 0, shapes.ROLE_END))
        stamp = protocol.backend.stamp
        word = b"%d " % time.monotonic_ns() if stamp else shapes.word(sent.seed, position)
        last = self._position >= self._tokens
        self._transport.write(
            self._event((shapes.LAST_TOKEN if last else shapes.TOKEN) % word, self._position)
        )
        sent.tokens += 1
        protocol.backend.counters.tokens += 1
        if last:
            self._finish()
        return not last

    def _finish(self) -> None:
        end = shapes.DONE
        if self._final_usage:
            usage = shapes.usage(self._sent.prompt_tokens, self._position)
            end = shapes.chunk(self._head, b"]", usage, shapes.FINGERPRINT) + end
        self._sent.finished = True
        self._transport.write(end)
        self._protocol.stream_ended()

    def _event(self, choice: bytes, tokens: int, end: bytes = b"") -> bytes:
        usage = shapes.usage(self._sent.prompt_tokens, tokens) if self._running_usage else b""
        return shapes.chunk(self._head, choice, usage, end)


_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]+)", re.IGNORECASE)
_REQUEST_ID = re.compile(rb"\r\nx-request-id:[ \t]*([^\r]*)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:", re.IGNORECASE)


class BackendProtocol(asyncio.Protocol):
    """One connection of a proxy (or of a client without one), kept alive."""

    transport: asyncio.Transport

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.stream: Stream | None = None
        self.write_paused = False
        self._received = bytearray()
        self._needed = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self.stream is not None:
            self.backend.counters.aborted += 1
            self.backend.counters.running -= 1
            self.stream = None

    def pause_writing(self) -> None:
        self.write_paused = True

    def resume_writing(self) -> None:
        self.write_paused = False

    def data_received(self, data: bytes) -> None:
        self._received += data
        while self.stream is None and len(self._received) >= self._needed and self._received:
            if not self._take_request():
                return

    def _take_request(self) -> bool:
        """Answer the first request received, if it is all there."""
        received = self._received
        end = received.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = bytes(received[: end + 2])
        length_field = _CONTENT_LENGTH.search(head)
        if length_field is None and _CHUNKED.search(head):
            # No proxy of the comparison sends one; if that changes, the figures must not go wrong in silence.
            self._answer_error(411, "this backend reads no chunked requests")
            self.transport.close()
            return False
        length = int(length_field[1]) if length_field else 0
        self._needed = end + 4 + length
        if len(received) < self._needed:
            return False
        body = bytes(received[end + 4 : self._needed])
        del received[: self._needed]
        self._needed = 0
        method, path, _ = head.split(b"\r\n", 1)[0].split(b" ", 2)
        if method == b"POST" and path == b"/v1/chat/completions":
            request_id = _REQUEST_ID.search(head)
            self._chat(body, request_id[1].decode("latin-1") if request_id else "")
        else:
            self._get(path)
        return True

    def _chat(self, raw: bytes, request_id: str) -> None:
        try:
            body = orjson.loads(raw)
            seed = int(body.get("seed") or 0)
        except (ValueError, AttributeError):
            self._answer_error(400, "the body is not a chat request")
            return
        backend = self.backend
        answer_id = backend.next_id(request_id)
        stream = body.get("stream") is True
        sent = backend.open_record(request_id, seed, stream, len(raw) // 4)
        if not stream:
            self._answer_chat(body, answer_id, sent)
            return
        self.stream = Stream(self, answer_id, body, sent)
        backend.counters.running += 1
        self.transport.write(backend.head_lines() + shapes.STREAM_FIELDS)
        if backend.ttft_s:
            backend.loop.call_later(backend.ttft_s, self._first_token, self.stream)
        else:
            self._first_token(self.stream)

    def _first_token(self, stream: Stream) -> None:
        if stream.send_token():
            self.backend.wheel.add(stream)

    def stream_ended(self) -> None:
        """The stream has written its end; requests that waited behind it are answered now."""
        self.stream = None
        self.backend.counters.running -= 1
        if self._received:
            self.backend.loop.call_soon(self.data_received, b"")

    def _answer_chat(self, body: dict[str, Any], answer_id: str, sent: Sent) -> None:
        tokens = asked_tokens(body)
        sent.tokens = tokens
        sent.finished = True
        self.backend.counters.tokens += tokens
        self._answer(shapes.completion(answer_id, int(time.time()), sent.seed, sent.prompt_tokens, tokens))

    def _get(self, path: bytes) -> None:
        counters = self.backend.counters
        if path == b"/health":
            self._answer(b"")
        elif path == b"/v1/models":
            self._answer(shapes.MODELS)
        elif path == b"/metrics":
            figures = shapes.metrics(counters.running, counters.prompt_tokens, counters.tokens)
            self._answer(figures, b"text/plain; version=1.0.0; charset=utf-8")
        elif path == b"/bench/state":
            self._answer(orjson.dumps(asdict(counters)))
        elif path == b"/bench/sent":
            self._answer(orjson.dumps([asdict(sent) for sent in self.backend.sent]))
        else:
            self._answer_error(404, "Not Found")

    def _answer(self, body: bytes, content_type: bytes = b"application/json") -> None:
        self.transport.write(
            b"%bcontent-length: %d\r\ncontent-type: %b\r\n\r\n%b"
            % (self.backend.head_lines(), len(body), content_type, body)
        )

    def _answer_error(self, status: int, message: str) -> None:
        self.backend.counters.refused += 1
        body = orjson.dumps({"error": {"message": message, "type": "mock", "param": None, "code": status}})
        self.transport.write(
            b"HTTP/1.1 %d Error\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
            % (status, len(body), body)
        )


def listen(port: int = 0) -> socket.socket:
    """A listening socket on the loopback address with a queue long enough for thousands of streams at once."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(4096)
    return listener


async def start(backend: Backend, port: int = 0) -> tuple[asyncio.Server, int]:
    """Serve a backend on the loopback address; returns the server and its port."""
    listener = listen(port)
    server = await backend.loop.create_server(lambda: BackendProtocol(backend), sock=listener)
    return server, listener.getsockname()[1]


async def serve(arguments: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT; the first line printed is `{"ports": [...]}`."""
    loop = asyncio.get_running_loop()
    servers, ports = [], []
    for _ in range(arguments.backends):
        backend = Backend(loop, arguments.rate, arguments.ttft, arguments.stamp, arguments.record)
        server, port = await start(backend)
        servers.append(server)
        ports.append(port)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    print(json.dumps({"ports": ports}), flush=True)
    await stop.wait()
    for server in servers:
        server.close()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Fast OpenAI-compatible mock backends on the loopback address."
    )
    parser.add_argument("--backends", type=int, default=2, help="how many, each on a free port (default 2)")
    parser.add_argument(
        "--rate", type=float, default=50.0, help="tokens per second of each stream (default 50)"
    )
    parser.add_argument("--ttft", type=float, default=0.0, help="seconds before the first token (default 0)")
    parser.add_argument(
        "--stamp", action="store_true", help="send the monotonic time in ns in place of each word"
    )
    parser.add_argument(
        "--record", action="store_true", help="keep the tokens of each request for /bench/sent"
    )
    arguments = parser.parse_args()
    uvloop.run(serve(arguments))


if __name__ == "__main__":
    main()
