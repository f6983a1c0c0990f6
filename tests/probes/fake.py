"""A backend that does as it is told, on a real socket, and a clock that stands still."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

from aiohttp import web

Answer = int | bytes | dict[str, Any] | Literal["hang"]
"""A status without a body, a body under 200, or never."""


def model_list(*names: str, length: int | None = 2048) -> dict[str, Any]:
    return {
        "object": "list",
        "data": [{"id": name, "max_model_len": length, "parent": None} for name in names],
    }


def metrics_page(running: int = 0, waiting: int = 0, kv_use: float = 0.0, concurrency: float = 8.5) -> bytes:
    return (
        "# TYPE vllm:num_requests_running gauge\n"
        f'vllm:num_requests_running{{engine="0",model_name="m"}} {running}.0\n'
        f'vllm:num_requests_waiting{{engine="0",model_name="m"}} {waiting}.0\n'
        f'vllm:kv_cache_usage_perc{{engine="0",model_name="m"}} {kv_use}\n'
        f'vllm:cache_config_info{{block_size="16",kv_cache_max_concurrency="{concurrency}"}} 1.0\n'
    ).encode()


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeBackend:
    """`async with FakeBackend() as backend`: answers `/health`, `/v1/models` and `/metrics` as its fields say."""

    health: Answer = 200
    models: Answer = field(default_factory=lambda: model_list("m"))
    metrics: Answer = field(default_factory=metrics_page)
    generate: Answer = field(
        default_factory=lambda: {"choices": [{}], "usage": {"prompt_tokens": 5, "completion_tokens": 1}}
    )
    listening: bool = True
    """False: its port refuses connections until `listen` is called."""
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    """Path and header fields (lower case) of each request."""
    posted: list[Any] = field(default_factory=list)
    """Bodies of completions that were asked for."""
    open: int = 0
    most_open: int = 0
    """Requests being answered, and the most there ever were at once."""

    async def __aenter__(self) -> FakeBackend:
        self._released = asyncio.Event()
        self.hung = asyncio.Event()
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        application = web.Application()
        application.router.add_get("/{path:.*}", self._answer)
        application.router.add_post("/{path:.*}", self._answer)
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        if self.listening:
            await self.listen()
        return self

    async def listen(self) -> None:
        await web.SockSite(self._runner, self._socket).start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._released.set()
        await self._runner.cleanup()
        self._socket.close()

    def asked(self, path: str) -> int:
        """How often it was asked for a path."""
        return sum(seen == path for seen, _ in self.requests)

    async def _answer(self, request: web.Request) -> web.Response:
        self.requests.append((request.path, {name.lower(): value for name, value in request.headers.items()}))
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            answers = {
                "/health": self.health,
                "/v1/models": self.models,
                "/metrics": self.metrics,
                "/v1/chat/completions": self.generate,
            }
            if request.method == "POST":
                self.posted.append(await request.json())
            match answers.get(request.path, 404):
                case int(status):
                    return web.Response(status=status)
                case bytes(body):
                    return web.Response(body=body)
                case dict(document):
                    return web.json_response(document)
                case _:
                    self.hung.set()
                    await self._released.wait()
                    return web.Response(status=500)
        finally:
            self.open -= 1


class RawServer:
    """`async with RawServer(reply) as url`: answers any connection with fixed bytes, then closes it."""

    def __init__(self, reply: bytes) -> None:
        self._reply = reply

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(self._reply)
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()
