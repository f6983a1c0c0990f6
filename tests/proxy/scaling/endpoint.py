"""A real HTTP endpoint whose answers a test chooses, one by one, and which keeps what it was asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class Asked:
    method: str
    path: str
    headers: dict[str, str]
    raw: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.raw) if self.raw else None


Reply = tuple[int, Any] | tuple[int, Any, dict[str, str]] | str
"""Status and body (and headers); or `hang`, `drop`."""


@dataclass
class Endpoint:
    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    """In this order; then `otherwise`."""
    otherwise: Reply | Callable[[Asked], Reply] = (200, {})
    released: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        asked = Asked(
            request.method,
            request.path_qs,
            {name.lower(): value for name, value in request.headers.items()},
            await request.read(),
        )
        self.asked.append(asked)
        reply: Any = self.replies.pop(0) if self.replies else self.otherwise
        if callable(reply):
            reply = reply(asked)
        if reply == "hang":
            await self.released.wait()
            return web.Response(status=500)
        if reply == "drop":
            assert request.transport is not None
            request.transport.abort()
            return web.Response(status=500)
        status, body, *more = reply
        text = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        return web.Response(status=status, body=text, headers=more[0] if more else None)


@asynccontextmanager
async def endpoint(*replies: Reply, otherwise: Any = (200, {})) -> AsyncIterator[Endpoint]:
    one = Endpoint(replies=list(replies), otherwise=otherwise)
    app = web.Application(client_max_size=1 << 20)
    app.router.add_route("*", "/{path:.*}", one.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    one.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield one
    finally:
        one.released.set()
        await runner.cleanup()


class Pauses(list[float]):
    """A `sleep` that takes no time and remembers how long it should have taken, and the clock that believes it."""

    def clock(self) -> float:
        return float(sum(self))

    async def __call__(self, seconds: float) -> None:
        self.append(seconds)
        await asyncio.sleep(0)


Sleep = Callable[[float], Awaitable[object]]
