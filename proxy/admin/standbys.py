"""`/standbys` on the admin port: which there are, starting and stopping one by hand, what has become of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from difflib import get_close_matches
from math import inf
from typing import Any

import orjson
from aiohttp import web

from policies.units import BadValueError, typed_duration
from proxy.admin.plans import LONGEST_NAME
from proxy.runtime import Runtime
from proxy.scaling.manager import Scaling
from proxy.scaling.seams import NotPossibleError
from proxy.scaling.service import scaling_in
from proxy.scaling.shown import moves, standby, standbys


def routes(runtime: Runtime) -> list[web.RouteDef]:
    """To be added to the admin port."""

    async def show(_: web.Request) -> web.Response:
        scaling = scaling_in(runtime)
        return _json({"standbys": [] if scaling is None else standbys(scaling)})

    async def history(request: web.Request) -> web.Response:
        async def read(scaling: Scaling, name: str) -> list[dict[str, Any]]:
            return moves(scaling, name)

        return await _of_one(request, "moves", read)

    async def start(request: web.Request) -> web.Response:
        text = request.query.get("for")
        try:
            seconds = inf if text is None else typed_duration(text)
            if seconds <= 0.0:
                raise BadValueError("nothing is started for no time")
        except BadValueError as error:
            return _error(400, f"for: {error}")
        by = request.query.get("by", "somebody")
        if not 0 < len(by) <= LONGEST_NAME or not by.isprintable():
            return _error(400, f"by: who starts it, in at most {LONGEST_NAME} printable characters")

        async def act(scaling: Scaling, name: str) -> dict[str, Any]:
            await scaling.start(name, seconds, by)
            return standby(scaling, name)

        return await _of_one(request, "standby", act)

    async def stop(request: web.Request) -> web.Response:
        async def act(scaling: Scaling, name: str) -> dict[str, Any]:
            await scaling.stop_one(name)
            return standby(scaling, name)

        return await _of_one(request, "standby", act)

    async def _of_one(
        request: web.Request, key: str, act: Callable[[Scaling, str], Awaitable[Any]]
    ) -> web.Response:
        name, scaling = request.match_info["name"], scaling_in(runtime)
        names = [] if scaling is None else scaling.names
        if scaling is None or name not in names:
            return _error(404, _unknown(name, names))
        try:
            return _json({key: await act(scaling, name)})
        except NotPossibleError as error:
            keeper = scaling.keepers.get(name)
            return _error(409, str(error), "" if keeper is None else str(keeper.state))
        except OSError as error:
            return _error(503, f"the move cannot be written: {error.strerror or error}")

    return [
        web.get("/standbys", show),
        web.get("/standbys/{name}/moves", history),
        web.post("/standbys/{name}/start", start),
        web.post("/standbys/{name}/stop", stop),
    ]


def _unknown(name: str, names: list[str]) -> str:
    if not names:
        return "the configuration has no standbys"
    close = get_close_matches(name, names, 1)
    hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(names)}"
    return f"no standby is called '{name}'; {hint}"


def _error(status: int, message: str, state: str = "") -> web.Response:
    return _json({"error": {"message": message, **({"state": state} if state else {})}}, status)


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")
