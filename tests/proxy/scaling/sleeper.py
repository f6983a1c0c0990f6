"""What a vLLM in its development mode answers about sleeping, with the laws that the real one has: it is awake when
both weights and KV cache are in memory, and answers nonsense when weights were dropped and not loaded again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web


class Sleeper:
    """The server's side."""

    def __init__(self) -> None:
        self.asleep: set[str] = set()
        """Of `weights`, `kv_cache`: what is not in memory."""
        self.level = 0
        self.weights_good = True
        self.failing: dict[str, int] = {}
        """Path to the status that it answers instead."""
        self.asked: list[str] = []
        self.keys: set[str | None] = set()
        self.url = ""

    @property
    def awake(self) -> bool:
        return not self.asleep

    async def answer(self, request: web.Request) -> web.Response:
        self.asked.append(request.method + " " + request.path_qs)
        self.keys.add(request.headers.get("authorization"))
        if status := self.failing.get(request.path):
            return web.Response(status=status)
        match request.method, request.path:
            case "POST", "/sleep":
                self.level = int(request.query.get("level", "1"))
                self.asleep = {"weights", "kv_cache"}
                self.weights_good = self.weights_good and self.level == 1
            case "POST", "/wake_up":
                tags = request.query.getall("tags", ["weights", "kv_cache"])
                self.asleep -= set(tags)
            case "POST", "/collective_rpc":
                asked: Any = await request.json()
                assert asked == {"method": "reload_weights"}
                assert "weights" not in self.asleep, "there is no memory to load them into"
                self.weights_good = True
            case "POST", "/reset_prefix_cache":
                pass
            case "GET", "/metrics":
                dropped = int(not self.awake and self.level == 2)
                return web.Response(
                    text=f'vllm:engine_sleep_state{{engine="0",sleep_state="discard_all"}} {dropped}.0\n'
                )
            case "GET", "/is_sleeping":
                return web.json_response({"is_sleeping": not self.awake})
            case _:
                return web.Response(status=404)
        return web.json_response({})


@asynccontextmanager
async def sleeper() -> AsyncIterator[Sleeper]:
    """One that runs, and is awake."""
    state = Sleeper()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", state.answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    state.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[attr-defined]
    try:
        yield state
    finally:
        await runner.cleanup()
