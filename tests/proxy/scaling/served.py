"""A platform's hook on a real admin port, and something that serves from it without a proxy."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from probes.resolver import Resolver
from proxy.admin.platform import platform_routes
from proxy.config import Config
from proxy.scaling.calls import new_id
from proxy.scaling.platform import Platform
from proxy.scaling.signing import signed, what_is_signed

SECRET = b"a-secret-of-16-b"
CONFIG: dict[str, Any] = {
    "backends": [{"name": "appliance", "url": "http://127.0.0.1:8000"}],
    "sites": {"nanjing": {}, "suzhou": {}},
    "scaling": {"scheduler": {"url": "http://127.0.0.1:1", "secret_env": "HOOK"}},
}
BODY: dict[str, Any] = {
    "id": "a",
    "name": "nj-1",
    "url": "http://93.184.215.14:8000",
    "site": "nanjing",
    "models": ["m"],
    "ttl_s": 30,
}


async def public(host: str) -> Sequence[str]:
    """Every name is public, but those that say their address."""
    return [host.removesuffix(".at.test")] if host.endswith(".at.test") else ["93.184.215.14"]


class Serving:
    """Builds what it serves as the proxy does, and may be told that it cannot."""

    def __init__(self, config: dict[str, Any], state: Path) -> None:
        self.config = Config.model_validate(config)
        self.served = self.config
        self.swaps = 0
        self.drained: list[str] = []
        self.broken = ""
        self.clock = 1000.0
        self.wall = time.time()
        self.platform = Platform(
            self,
            Resolver(public),
            state,
            now=lambda: self.clock,
            wall=lambda: self.wall + self.clock - 1000.0,
        )

    def configured(self) -> Config:
        return self.config

    def serve_placements(self) -> None:
        served = self.platform.overlaid(self.config)
        if self.broken:
            raise ValueError(self.broken)
        self.served = served
        self.swaps += 1

    def drain(self, name: str) -> None:
        self.drained.append(name)

    @property
    def names(self) -> list[str]:
        return [backend.name for backend in self.served.backends]


class Pusher:
    """The platform's side: signs and sends."""

    def __init__(self, url: str, session: aiohttp.ClientSession, serving: Serving) -> None:
        self.url, self.session, self.serving = url, session, serving

    async def __call__(
        self, method: str, path: str, body: Any = None, *, id: str = "", secret: bytes = SECRET, **change: str
    ) -> tuple[int, Any]:
        raw = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        now = int(self.serving.wall + self.serving.clock - 1000.0)
        headers = signed([secret], id or new_id(), now, what_is_signed(method, path, raw))
        headers |= {name.replace("_", "-"): value for name, value in change.items()}
        async with self.session.request(method, self.url + path, data=raw or None, headers=headers) as answer:
            return answer.status, await answer.json()

    async def put(self, **fields: Any) -> tuple[int, Any]:
        body = {**BODY, **fields}
        return await self("PUT", f"/platform/placements/{body['id']}", body)


@asynccontextmanager
async def pushing(serving: Serving) -> AsyncIterator[Pusher]:
    app = web.Application()
    app.add_routes(platform_routes(serving.platform))
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    async with aiohttp.ClientSession() as session:
        yield Pusher(f"http://127.0.0.1:{runner.addresses[0][1]}", session, serving)
    await runner.cleanup()
