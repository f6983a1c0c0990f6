"""Backends, load generator and client agree with each other, and each notices when the other is wrong."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, replace

import orjson
import pytest

from benchmarks import shapes
from benchmarks.client import Connection
from benchmarks.load import BODY_BYTES, Plan, chat_body, head, run
from benchmarks.mock_backend import Backend, start

FAST = 1000.0
"""Tokens per second: as fast as the backend's timer turns."""


@pytest.fixture
async def backend() -> AsyncIterator[tuple[Backend, int]]:
    mock = Backend(asyncio.get_running_loop(), rate=FAST, record=True)
    server, port = await start(mock)
    yield mock, port
    server.close()


def plan(port: int, **changes: object) -> Plan:
    """Streams of 20 tokens to a backend."""
    base = Plan((("127.0.0.1", port),), stream=True, tokens=20)
    return replace(base, **changes)  # type: ignore[arg-type]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens in this loop and tells nobody."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


def test_a_request_looks_like_one_of_the_openai_package() -> None:
    body = chat_body(7, 16, stream=True, stream_options={"include_usage": True})
    request = orjson.loads(body)
    assert abs(len(body) - BODY_BYTES) < 10
    assert request["stream"] is True
    assert request["seed"] == 7
    assert [message["role"] for message in request["messages"]] == ["system", "user", "assistant", "user"]
    assert len(chat_body(7, 16, stream=False, size=400_000)) == 400_000
    lines = head("127.0.0.1:1", len(body), "key").decode().split("\r\n")
    assert lines[0] == "POST /v1/chat/completions HTTP/1.1"
    assert "authorization: Bearer key" in lines


def test_words_tell_neighbouring_answers_apart() -> None:
    assert len(set(shapes.WORDS)) == len(shapes.WORDS)
    assert shapes.answer_text(3, 2) == shapes.WORDS[3] + shapes.WORDS[4]


@pytest.mark.parametrize("options", [None, {"include_usage": True}, {"include_usage": False}])
async def test_streams_count_what_backends_sent(
    backend: tuple[Backend, int], options: dict[str, bool] | None
) -> None:
    mock, port = backend
    report = await run(plan(port, stream_options=options), clients=5, seconds=30, requests_each=3)
    assert report.failures == {}
    assert (report.requests, report.tokens) == (15, 300)
    assert (mock.counters.streams, mock.counters.tokens, mock.counters.running) == (15, 300, 0)
    assert len(report.first_token) == 15
    assert report.gaps


async def test_requests_count_what_backends_sent(backend: tuple[Backend, int]) -> None:
    mock, port = backend
    report = await run(plan(port, stream=False), clients=3, seconds=30, requests_each=4)
    assert report.failures == {}
    assert (report.requests, report.tokens, report.reconnects) == (12, 240, 0)
    assert (mock.counters.requests, mock.counters.tokens) == (12, 240)
    assert sum(sent.tokens for sent in mock.sent) == 240
    assert report.as_json()["latency_s"]["p50"] > 0


async def test_clients_take_several_addresses_in_turn(backend: tuple[Backend, int]) -> None:
    mock, port = backend
    other = Backend(asyncio.get_running_loop())
    server, second = await start(other)
    addresses = (("127.0.0.1", port), ("127.0.0.1", second))
    report = await run(plan(0, addresses=addresses, stream=False), clients=4, seconds=30, requests_each=1)
    server.close()
    assert report.failures == {}
    assert (mock.counters.requests, other.counters.requests) == (2, 2)


async def raw_stream(port: int, options: dict[str, bool] | None) -> list[dict[str, object]]:
    """The events of one stream, [DONE] left out."""
    body = chat_body(1, 3, stream=True, stream_options=options)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head("h", len(body)) + body)
    data = await reader.readuntil(b"0\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    lines = [line[6:] for line in data.split(b"\n") if line.startswith(b"data: ")]
    assert lines.pop() == b"[DONE]"
    return [orjson.loads(line) for line in lines]


async def test_usage_comes_as_vllm_sends_it(backend: tuple[Backend, int]) -> None:
    _, port = backend
    plain = await raw_stream(port, None)
    assert [event.get("usage") for event in plain] == [None] * 4
    last = await raw_stream(port, {"include_usage": True})
    assert [bool(event.get("usage")) for event in last] == [False] * 4 + [True]
    assert last[-1]["choices"] == []
    running = await raw_stream(port, {"include_usage": True, "continuous_usage_stats": True})
    counts = [event["usage"]["completion_tokens"] for event in running]  # type: ignore[index]
    assert counts == [0, 1, 2, 3, 3]


async def test_a_client_that_goes_away_is_noticed(backend: tuple[Backend, int]) -> None:
    mock, port = backend
    body = chat_body(5, 1_000_000, stream=True)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head("h", len(body)) + body)
    await reader.readuntil(b"data: ")
    assert mock.counters.running == 1
    writer.transport.abort()
    await until(lambda: not mock.counters.running)
    assert mock.counters.aborted == 1
    [sent] = mock.sent
    assert 0 < sent.tokens == mock.counters.tokens
    assert not sent.finished


async def test_the_request_id_and_the_tokens_sent_can_be_asked_for(backend: tuple[Backend, int]) -> None:
    mock, port = backend
    body = chat_body(5, 6, stream=False)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head("h", len(body), request_id="r-1") + body)
    writer.write(b"GET /bench/sent HTTP/1.1\r\nHost: h\r\n\r\n")
    answer = b""
    while b'"finished"' not in answer:
        answer += await reader.read(65536)
    writer.close()
    await writer.wait_closed()
    assert b'"id":"chatcmpl-r-1"' in answer
    assert orjson.loads(answer[answer.rindex(b"\r\n\r\n") + 4 :]) == [asdict(mock.sent[0])]
    assert (mock.sent[0].request_id, mock.sent[0].tokens, mock.sent[0].finished) == ("r-1", 6, True)


@pytest.mark.parametrize(
    ("request_line", "status", "part"),
    [
        (b"GET /health HTTP/1.1\r\n", b"200", b"content-length: 0"),
        (b"GET /v1/models HTTP/1.1\r\n", b"200", b'"id":"bench"'),
        (
            b"GET /metrics HTTP/1.1\r\n",
            b"200",
            b'vllm:num_requests_running{engine="0",model_name="bench"} 0.0',
        ),
        (b"GET /nothing HTTP/1.1\r\n", b"404", b"Not Found"),
        (b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 1\r\n", b"400", b"not a chat request"),
        (b"POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n", b"411", b"chunked"),
    ],
)
async def test_what_else_a_backend_answers(
    backend: tuple[Backend, int], request_line: bytes, status: bytes, part: bytes
) -> None:
    mock, port = backend
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        request_line + b"Connection: close\r\n\r\n" + (b"{" if b"Content-Length" in request_line else b"")
    )
    answer = b""
    while part not in answer:
        answer += await reader.read(65536)
    writer.close()
    await writer.wait_closed()
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert mock.counters.refused == (status != b"200")


async def test_a_cut_stream_is_a_failure(backend: tuple[Backend, int]) -> None:
    """A relay that drops the last byte of what it is told: the load generator must not count its answers."""
    _, port = backend

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        request += await reader.readexactly(
            int(request.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        )
        from_backend, to_backend = await asyncio.open_connection("127.0.0.1", port)
        to_backend.write(request)
        answer = await from_backend.readuntil(b"[DONE]")
        writer.write(answer[:-1])
        for side in (to_backend, writer):
            side.close()
            await side.wait_closed()

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    relayed = server.sockets[0].getsockname()[1]
    report = await run(plan(relayed), clients=1, seconds=30, requests_each=1)
    server.close()
    assert (report.requests, report.tokens) == (0, 0)
    assert dict(report.failures) == {"connection lost": 1}


async def test_nobody_listening_is_a_failure() -> None:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    report = await run(plan(port), clients=1, seconds=0.01, requests_each=1)
    assert dict(report.failures) == {"cannot connect": 1}


async def test_a_client_notes_when_each_token_came(backend: tuple[Backend, int]) -> None:
    mock, port = backend
    connection = Connection(plan(port))
    first, second = await connection.ask(3), await connection.ask(4)
    connection.close()
    assert first.failure == second.failure == ""
    assert len(first.token_at) == len(second.token_at) == 20
    assert first.sent_at <= first.token_at[0] <= first.token_at[-1] <= second.sent_at
    assert "".join(second.words) == shapes.answer_text(4, 20)
    assert [sent.seed for sent in mock.sent] == [3, 4]


async def test_a_client_says_what_it_had_when_the_connection_was_lost() -> None:
    mock = Backend(asyncio.get_running_loop(), rate=FAST)
    server, port = await start(mock)
    connection = Connection(plan(port, tokens=1_000_000))
    asking = asyncio.get_running_loop().create_task(connection.ask(3))
    await until(lambda: mock.counters.tokens >= 3)
    connection.close()
    heard = await asking
    server.close()
    assert heard.failure == "connection lost"
    assert len(heard.token_at) <= mock.counters.tokens
    assert (await connection.ask(4)).failure.startswith("cannot connect")


async def test_stamped_tokens_carry_the_time_they_were_written() -> None:
    server, port = await start(Backend(asyncio.get_running_loop(), rate=FAST, stamp=True))
    connection = Connection(plan(port, stamped=True))
    heard = await connection.ask(1)
    connection.close()
    server.close()
    assert heard.failure == ""
    stamps = [int(word) / 1e9 for word in "".join(heard.words).split()]
    assert all(written <= read for written, read in zip(stamps, heard.token_at, strict=True))
    assert stamps == sorted(stamps)


def test_the_commands_work_together() -> None:
    command = [sys.executable, "-m", "benchmarks.mock_backend", "--backends", "2", "--rate", "1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as mock:
        try:
            assert mock.stdout is not None
            ports = json.loads(mock.stdout.readline())["ports"]
            load = [
                sys.executable,
                "-m",
                "benchmarks.load",
                "streams",
                "--clients",
                "4",
                "--each",
                "1",
                "--usage",
            ]
            load += ["--url", *(f"http://127.0.0.1:{port}" for port in ports)]
            done = subprocess.run(load, capture_output=True, text=True, timeout=50)
        finally:
            mock.terminate()
    report = json.loads(done.stdout)
    assert report["failures"] == {}
    assert (report["requests"], report["tokens"]) == (4, 64)
    assert mock.returncode == 0
