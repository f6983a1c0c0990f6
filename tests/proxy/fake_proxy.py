"""A stand-in for `tidegate serve`, as far as the demo talks to it: forwards local first and answers `GET /state`.

python -m tests.proxy.fake_proxy --config FILE
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import aiohttp
from aiohttp import web
from ruamel.yaml import YAML


class FakeProxy:
    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.backends = [
            {
                "name": entry["name"],
                "site": entry["site"],
                "url": entry["url"],
                "slots": entry["slots"],
                "available": True,
                "probed_up": True,
                "breaker": "closed",
                "in_spite": False,
                "slow_start": False,
                "full_slots": 8,
                "draining": False,
                "in_flight": 0,
                "in_flight_tokens": 0,
                "saturation": 0.0,
                "waiting": 0,
                "running": 0,
                "ttft_s": 0.0,
                "tpot_s": 0.0,
                "rtt_s": 0.0,
                "kv_use": 0.0,
                "engine_age_s": None,
                "ok": 0,
                "failed": 0,
                "ignored": 0,
                "prompt_tokens": 0,
                "completion_tokens": 0,
                "cost": 0.0,
                "models": ["demo"],
            }
            for entry in config["backends"]
        ]
        self.openings = 0
        self.session: aiohttp.ClientSession | None = None

    async def state(self, request: web.Request) -> web.Response:
        remote = any(row["in_flight"] for row in self.backends if row["site"] != "local")
        return web.json_response(
            {
                "backends": self.backends,
                "queue": {"waiting": 0, "oldest_s": 0.0},
                "hosts": {},
                "spill": [{"rule": "all", "tier": 0, "open": remote, "openings": self.openings}],
                "requests": {"total": 0, "ok": 0, "rejected": 0, "failed": 0, "client_gone": 0},
                "tokens": {
                    "prompt": 0,
                    "cached": 0,
                    "completion": sum(row["completion_tokens"] for row in self.backends),
                },
                "uptime_s": 1.0,
            }
        )

    async def ready(self, request: web.Request) -> web.Response:
        return web.Response()

    async def forward(self, request: web.Request) -> web.StreamResponse:
        backend = next((row for row in self.backends if row["in_flight"] < row["slots"]), self.backends[-1])
        self.openings += backend["site"] != "local"
        backend["in_flight"] += 1
        backend["saturation"] = backend["in_flight"] / backend["slots"]
        assert self.session is not None
        try:
            async with self.session.post(
                backend["url"] + request.path, data=await request.read()
            ) as upstream:
                kind = upstream.headers["Content-Type"]
                response = web.StreamResponse(
                    status=upstream.status,
                    headers={"Content-Type": kind, "x-tidegate-backend": backend["name"]},
                )
                await response.prepare(request)
                async for chunk in upstream.content.iter_any():
                    backend["completion_tokens"] += chunk.count(b"data: ")
                    await response.write(chunk)
                await response.write_eof()
                backend["ok"] += 1
                return response
        finally:
            backend["in_flight"] -= 1
            backend["saturation"] = backend["in_flight"] / backend["slots"]

    async def serve(self) -> None:
        api, admin = web.Application(), web.Application()
        api.router.add_post("/v1/chat/completions", self.forward)
        admin.router.add_get("/readyz", self.ready)
        admin.router.add_get("/state", self.state)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as self.session:
            for app, address in ((api, self.config["listen"]), (admin, self.config["admin"])):
                runner = web.AppRunner(app, access_log=None)
                await runner.setup()
                host, _, port = address.rpartition(":")
                await web.TCPSite(runner, host, int(port)).start()
            await asyncio.Event().wait()


if __name__ == "__main__":
    with open(sys.argv[sys.argv.index("--config") + 1]) as file:
        asyncio.run(FakeProxy(YAML(typ="safe").load(file)).serve())
