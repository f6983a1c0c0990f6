"""Servers that answer as a test wants, over real sockets, and requests as they would have been recorded."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import orjson
from aiohttp import web

from sim.measure.level import RequestRecord

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def event(value: object) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def token(text: str, **fields: Any) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}], **fields})


def usage(prompt: int, output: int, **fields: Any) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": output, **fields}})


DONE = b"data: [DONE]\n\n"


async def stream(request: web.Request, *pieces: bytes, cut: bool = False) -> web.StreamResponse:
    """Answer with these bytes; `cut`: then break the connection."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for piece in pieces:
        await response.write(piece)
    if cut:
        assert request.transport is not None
        request.transport.abort()
    return response


@asynccontextmanager
async def serving(completions: Handler, **gets: object) -> AsyncIterator[str]:
    """A server on a free port -> its URL. `gets`: a JSON body, or text, for each path without its slash."""

    async def post(request: web.Request) -> web.StreamResponse:
        return await completions(request)

    app = web.Application()
    app.router.add_post("/v1/chat/completions", post)
    for path, body in gets.items():

        async def get(request: web.Request, body: object = body) -> web.StreamResponse:
            return web.Response(text=body) if isinstance(body, str) else web.json_response(body)

        app.router.add_get(f"/{path.replace('__', '/')}", get)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def record(
    sent: float = 0.0,
    ttft: float | None = 0.1,
    e2e: float | None = 1.0,
    tokens: int | None = 10,
    prompt: int | None = 100,
    error: str = "",
) -> RequestRecord:
    tpot = (
        (e2e - ttft) / (tokens - 1)
        if ttft is not None and e2e is not None and tokens and tokens > 1
        else None
    )
    return RequestRecord(sent, ttft, tpot, e2e, prompt, tokens, None, error)


def records(values: Sequence[tuple[float, float, float, int]]) -> list[RequestRecord]:
    """(sent, TTFT, end to end, tokens) of each."""
    return [record(*value) for value in values]
