"""What a scheduling platform pushes to the admin port: signed, small, each message once.

Messages are `proxy/scaling/messages.py` and `docs/platform.openapi.yaml`; who takes them is
`proxy/scaling/platform.py`.
"""

from __future__ import annotations

import orjson
from aiohttp import web

from proxy.scaling.messages import MOST_BODY_BYTES
from proxy.scaling.platform import Platform, Reply, refusal


def platform_routes(platform: Platform) -> list[web.RouteDef]:
    """The routes of a platform."""

    async def push(request: web.Request) -> web.Response:
        body = bytearray()
        async for piece in request.content.iter_any():
            body += piece
            if len(body) > MOST_BODY_BYTES:
                return _json(refusal(413, f"a message has at most {MOST_BODY_BYTES} bytes"))
        return _json(await platform.push(request.method, request.raw_path, request.headers, bytes(body)))

    async def show(_: web.Request) -> web.Response:
        return _json(Reply(200, platform.shown()))

    return [
        web.get("/platform", show),
        web.put("/platform/placements/{id}", push),
        web.delete("/platform/placements/{id}", push),
        web.put("/platform/sites/{site}/resources", push),
        web.post("/platform/progress", push),
    ]


def _json(reply: Reply) -> web.Response:
    return web.Response(body=orjson.dumps(reply.body), status=reply.status, content_type="application/json")
