"""A load generator that reads what it is answered: a proxy that loses a token is not fast, it is broken.

    python -m benchmarks.load requests --url http://127.0.0.1:8080 --clients 32 --seconds 5
    python -m benchmarks.load streams  --url http://127.0.0.1:8080 --clients 256 --tokens 128

Closed loop: each client has one kept-alive connection and one request under way. The requests are those of the
`openai` package, fields and all; the answers must be those of `benchmarks.mock_backend` for the seed that was
sent, word by word, with the right usage where usage was asked for and none where it was not, and with `[DONE]` at
the end. Whatever is not so is counted as a failure under its reason, and its times are left out.

Prints one JSON object; times are in seconds. Raw `asyncio.Protocol`, so that 256 streams at 50 tokens a second
leave most of a core to the backend beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast
from urllib.parse import urlsplit

import orjson
import uvloop

from benchmarks.answers import AnswerError, EventReader, Expected, ResponseReader
from benchmarks.shapes import MODEL
from benchmarks.summary import quantile

BODY_BYTES = 1100
CLIENT_TIMEOUT_S = 120.0

_SYSTEM = (
    "You are the harbour master's assistant. Answer shortly and precisely, in plain words, with figures where "
    "there are any. If a question can't be answered from what you were told, say so. Never invent a tide table."
)
_TURNS = (
    (
        "user",
        "When is the next spring tide at the outer sluice, and how high will the water stand at the gate?",
    ),
    (
        "assistant",
        "Tomorrow at 04:20 the water reaches 3.4 m at the gate; the sill lies at 2.1 m, so it stays shut.",
    ),
    (
        "user",
        'The barge "Elbe 4" draws 1.9 m. Can she pass with the gate half open, and at what time is it safest?',
    ),
)


def chat_body(
    seed: int,
    tokens: int,
    stream: bool,
    size: int = BODY_BYTES,
    stream_options: dict[str, bool] | None = None,
) -> bytes:
    """A chat request of about `size` bytes as the `openai` package writes it: compact JSON, several turns."""
    messages = [{"role": "system", "content": _SYSTEM}]
    messages += [{"role": role, "content": text} for role, text in _TURNS]
    body: dict[str, Any] = {
        "messages": messages,
        "model": MODEL,
        "max_tokens": tokens,
        "seed": seed,
        "temperature": 0.7,
    }
    if stream:
        body["stream"] = True
    if stream_options is not None:
        body["stream_options"] = stream_options
    missing = size - len(orjson.dumps(body))
    if missing > 0:
        filler = "Log of the gate: opened at 06:10, closed at 09:45, level 2.8 m, wind south-west 5. "
        messages[-1]["content"] += (filler * (missing // len(filler) + 1))[:missing]
    return orjson.dumps(body)


def head(host: str, length: int, key: str = "", request_id: str = "") -> bytes:
    """The head of a chat request with the fields that the `openai` package sends."""
    return (
        "POST /v1/chat/completions HTTP/1.1\r\n"
        f"Host: {host}\r\n"
        "Accept-Encoding: gzip, deflate\r\n"
        "Connection: keep-alive\r\n"
        + (f"authorization: Bearer {key}\r\n" if key else "")
        + "accept: application/json\r\n"
        "content-type: application/json\r\n"
        "user-agent: AsyncOpenAI/Python 3.54.0\r\n"
        "x-stainless-lang: python\r\n"
        "x-stainless-package-version: 3.54.0\r\n"
        "x-stainless-os: Linux\r\n"
        "x-stainless-arch: x64\r\n"
        "x-stainless-runtime: CPython\r\n"
        "x-stainless-runtime-version: 3.11.7\r\n"
        "x-stainless-async: async:asyncio\r\n"
        "x-stainless-retry-count: 0\r\n"
        "x-stainless-read-timeout: 600\r\n"
        + (f"x-request-id: {request_id}\r\n" if request_id else "")
        + f"Content-Length: {length}\r\n\r\n"
    ).encode()


@dataclass
class Report:
    """What a run of the load generator saw."""

    requests: int = 0
    """Answers that were complete and right."""
    tokens: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    reconnects: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """CPU time the load generator itself used."""
    latency: array[float] = field(default_factory=lambda: array("d"))
    """Request written to answer complete."""
    first_token: array[float] = field(default_factory=lambda: array("d"))
    """Request written to first token read."""
    gaps: array[float] = field(default_factory=lambda: array("d"))
    """Between two reads that brought tokens."""

    def as_json(self) -> dict[str, Any]:
        """The report with times as quantiles, seconds."""
        return {
            "requests": self.requests,
            "tokens": self.tokens,
            "failures": dict(self.failures),
            "reconnects": self.reconnects,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "requests_per_s": self.requests / self.seconds if self.seconds else 0.0,
            "latency_s": quantiles(self.latency),
            "first_token_s": quantiles(self.first_token),
            "gap_s": quantiles(self.gaps),
        }


def quantiles(values: Iterable[float]) -> dict[str, float]:
    """p50, p90, p99 and maximum of some times; empty without any."""
    ordered = sorted(values)
    if not ordered:
        return {}
    parts = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: quantile(ordered, part) for name, part in parts.items()}


@dataclass(frozen=True)
class Plan:
    """What each client sends."""

    addresses: tuple[tuple[str, int], ...]
    """Hosts and ports; each client keeps to one, in turn."""
    stream: bool
    tokens: int
    key: str = ""
    body_bytes: int = BODY_BYTES
    stream_options: dict[str, bool] | None = None
    stamped: bool = False
    checked: bool = True
    """False: read streams without a look at their events, for a background that costs little."""

    def request(self, seed: int) -> bytes:
        """The bytes of the request with this seed."""
        body = chat_body(seed, self.tokens, self.stream, self.body_bytes, self.stream_options)
        host, port = self.addresses[0]
        return head(f"{host}:{port}", len(body), self.key) + body

    def expected(self, seed: int) -> Expected:
        """What its answer must be."""
        asked = bool(self.stream_options and self.stream_options.get("include_usage"))
        return Expected(seed, self.tokens, asked, self.stamped)


class Client(asyncio.Protocol):
    """One client: a connection that is kept, and one request at a time on it."""

    def __init__(self, plan: Plan, report: Report, next_seed: Callable[[], int | None]) -> None:
        """`next_seed` gives the seed of the next request, None to stop."""
        self.ended = asyncio.Event()
        self._plan = plan
        self._report = report
        self._next_seed = next_seed
        self._transport: asyncio.Transport | None = None
        self._response: ResponseReader | None = None
        self._events: EventReader | None = None
        self._expected = Expected(0, 0)
        self._body: list[bytes] = []
        self._sent_at = 0.0
        self._token_at = 0.0
        self._first_token = 0.0
        self._gaps: list[float] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._send_next()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._response is not None:
            self._fail("connection lost")
        self.ended.set()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if self._response is None:
            self._fail("bytes after the end")
            return
        try:
            body = self._response.feed(data)
            if self._events is not None and self._response.status == 200:
                if self._events.feed(body):
                    self._note_token(now)
            elif self._plan.checked:
                self._body.append(body)
            if self._response.complete:
                self._finish(now)
        except AnswerError as bad:
            self._fail(str(bad))

    def _note_token(self, now: float) -> None:
        if self._token_at:
            self._gaps.append(now - self._token_at)
        else:
            self._first_token = now - self._sent_at
        self._token_at = now

    def _finish(self, now: float) -> None:
        response, report = self._response, self._report
        assert response is not None
        if response.status != 200:
            raise AnswerError(f"status {response.status}")
        if self._events is not None:
            self._events.finish()
            report.first_token.append(self._first_token)
            report.gaps.extend(self._gaps)
        elif self._plan.checked:
            self._expected.check_chat(response.content(self._body))
        report.requests += 1
        report.tokens += self._expected.tokens
        report.latency.append(now - self._sent_at)
        self._response = None
        if response.closes:
            report.reconnects += 1
            self._close()
        else:
            self._send_next()

    def _send_next(self) -> None:
        seed = self._next_seed()
        if seed is None:
            self._close()
            return
        plan = self._plan
        self._expected = plan.expected(seed)
        self._response = ResponseReader()
        self._events = EventReader(self._expected) if plan.stream and plan.checked else None
        self._body = []
        self._gaps = []
        self._token_at = 0.0
        request = plan.request(seed)
        assert self._transport is not None
        self._sent_at = time.perf_counter()
        self._transport.write(request)

    def _fail(self, reason: str) -> None:
        self._report.failures[reason] += 1
        self._response = None
        self._close()

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def _itself(client: Client) -> Client:
    return client


MAX_FAILURES = 100
"""A run with more failures than this is ended: it measures nothing."""


async def run(
    plan: Plan,
    clients: int,
    seconds: float,
    requests_each: int = 0,
    spread_s: float = 0.0,
    first_seed: int | None = None,
) -> Report:
    """Drive `clients` clients until `seconds` are over or each has sent `requests_each` requests (0: no limit).

    Requests under way at the end are waited for. The clients start evenly over `spread_s` seconds.
    """
    loop = asyncio.get_running_loop()
    report = Report()
    seed = random.randrange(1 << 30) if first_seed is None else first_seed
    started = time.perf_counter()
    deadline = started + seconds

    async def client(number: int) -> None:
        host, port = plan.addresses[number % len(plan.addresses)]
        await asyncio.sleep(spread_s * number / clients)
        sent = 0

        def next_seed() -> int | None:
            nonlocal seed, sent
            if time.perf_counter() >= deadline or (requests_each and sent >= requests_each):
                return None
            sent += 1
            seed += 1
            return seed

        while time.perf_counter() < deadline and not (requests_each and sent >= requests_each):
            if sum(report.failures.values()) > MAX_FAILURES:
                return
            protocol = Client(plan, report, next_seed)
            try:
                await loop.create_connection(partial(_itself, protocol), host, port)
                await asyncio.wait_for(protocol.ended.wait(), seconds + CLIENT_TIMEOUT_S)
            except OSError:
                report.failures["cannot connect"] += 1
                await asyncio.sleep(0.1)
            except TimeoutError:
                report.failures["no answer"] += 1
                return

    await asyncio.gather(*(client(number) for number in range(clients)))
    report.seconds = time.perf_counter() - started
    report.cpu_seconds = time.process_time()
    return report


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Closed-loop load of chat requests; every answer is checked."
    )
    parser.add_argument("mode", choices=("requests", "streams"))
    parser.add_argument(
        "--url", required=True, nargs="+", help="where the API is, without /v1; several: in turn"
    )
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="start no request after this time (default 30)"
    )
    parser.add_argument("--each", type=int, default=0, help="requests of each client (default: no limit)")
    parser.add_argument("--tokens", type=int, default=16, help="length of each answer (default 16)")
    parser.add_argument("--body-bytes", type=int, default=BODY_BYTES)
    parser.add_argument("--spread", type=float, default=0.0, help="seconds over which the clients start")
    parser.add_argument("--key", default="", help="API key")
    parser.add_argument("--usage", action="store_true", help="ask for usage in streams")
    parser.add_argument("--stamped", action="store_true", help="the backend sends times in place of words")
    parser.add_argument(
        "--unchecked", action="store_true", help="don't look at the answers: for a background"
    )
    arguments = parser.parse_args()
    addresses = [urlsplit(url) for url in arguments.url]
    plan = Plan(
        addresses=tuple((address.hostname or "127.0.0.1", address.port or 80) for address in addresses),
        stream=arguments.mode == "streams",
        tokens=arguments.tokens,
        key=arguments.key,
        body_bytes=arguments.body_bytes,
        stream_options={"include_usage": True} if arguments.usage else None,
        stamped=arguments.stamped,
        checked=not arguments.unchecked,
    )
    report = uvloop.run(run(plan, arguments.clients, arguments.seconds, arguments.each, arguments.spread))
    print(json.dumps(report.as_json()))


if __name__ == "__main__":
    main()
