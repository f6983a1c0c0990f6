"""A reference scheduling platform: the other side of Tidegate's two-way hook, in one file.

    export PLATFORM_SECRET=$(openssl rand -base64 32)   # for both processes
    python examples/scheduler/scheduler.py --listen 127.0.0.1:9090 --tidegate http://127.0.0.1:8081 \\
        --site nanjing=H20:8 --site suzhou=L40:16 --as qwen3-32b=32b

It has sites with cards, takes scale requests, picks resources with what `tidegate plan` uses, and binds them as
placements: placeholders on which nothing runs. Tidegate starts one when traffic needs it, and then an emulated
engine (`tidegate emulate`) runs there. Progress is pushed as it happens, placements and resources are pushed again
before their time to live is over; when this process dies, they drain and go by themselves.

What a real platform would do otherwise: launch images on machines where this launches emulators, and keep its
placements over a restart. The protocol is `docs/platform.openapi.yaml`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from math import ceil, inf
from typing import Any

from aiohttp import web

from policies.profile import Profile
from proxy.scaling.calls import Caller, new_id
from proxy.scaling.messages import (
    MessageError,
    Placement,
    PlacementState,
    PlacementStatus,
    Run,
    ScaleRequest,
    read_message,
)
from proxy.scaling.provider import ProviderError
from proxy.scaling.signing import SignatureError, secrets_of, verify, what_is_signed
from sim.plan import Demand, Option, plan
from sim.profile import load_profile, profile_names

ROUTES = (
    ("POST", "/v1/scale-requests"),
    ("DELETE", "/v1/scale-requests/{id}"),
    ("GET", "/v1/placements/{id}"),
    ("POST", "/v1/placements/{id}/start"),
    ("POST", "/v1/placements/{id}/stop"),
)
PUSH_WITHIN_S = 10.0
LEAVE_S = 60.0
"""For so long Tidegate may let what runs on a placement end that was taken back, and stop it."""
PORTS = range(30000, 32768)
"""Of engines: those that Tidegate takes from others (`proxy/ssrf.py`)."""


@dataclass
class Site:
    """Cards of one kind at one place."""

    name: str
    card: str
    total: int
    free: int
    cost: float | None = None
    """Of a card and hour; None: as the profile says."""


@dataclass
class Placed:
    """A placement and the engine on it, if it runs."""

    site: Site
    cards: int
    profile: str
    speed: float
    message: dict[str, Any]
    """As it is pushed, without what changes."""
    port: int
    state: PlacementState = "standby"
    progress: float | None = None
    detail: str = ""
    run: str = ""
    ended: str = ""
    """The run that was stopped last: an order for it that comes late starts nothing."""
    engine: asyncio.subprocess.Process | None = None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def placement(self, ttl_s: float) -> Placement:
        return Placement.model_validate({**self.message, **self.status(), "ttl_s": ttl_s})

    def status(self) -> dict[str, Any]:
        return {
            "state": self.state,
            "progress": self.progress,
            "detail": self.detail[:500],
            "run": self.run,
        }


class Scheduler:
    """One platform for one Tidegate."""

    def __init__(
        self,
        secrets: tuple[bytes, ...],
        tidegate: str,
        sites: list[Site],
        *,
        ttl_s: float = 30.0,
        models: dict[str, str] | None = None,
        speed: float = 1.0,
        profiles: Sequence[Profile] | None = None,
    ) -> None:
        """`models`: for names of models, what profiles call them or a part of that. `speed`: of the engines.
        `profiles`: of what may be placed; default: all that Tidegate knows."""
        self._known = list(map(load_profile, profile_names()) if profiles is None else profiles)
        self.sites = {site.name: site for site in sites}
        self.placed: dict[str, Placed] = {}
        self._leaving: dict[str, Placed] = {}
        """Taken back, and what runs there may end."""
        self.requests: dict[str, ScaleRequest] = {}
        self.ttl_s = ttl_s
        self._secrets = secrets
        self.tidegate = tidegate
        self._models = models or {}
        self._speed = speed
        self._caller = Caller(secrets)
        self._tasks: set[asyncio.Task[None]] = set()
        self._numbers = 0
        self._turn = asyncio.Lock()
        """One choice at a time: each needs what the others have left."""

    # What Tidegate asks

    def app(self) -> web.Application:
        handlers = (self.ask, self.give_back, self.look, self.start, self.stop)
        app = web.Application(client_max_size=1 << 16)
        for (method, path), handler in zip(ROUTES, handlers, strict=True):
            app.router.add_route(method, path, self._checked(handler))
        app.cleanup_ctx.append(self._lifetime)
        return app

    def _checked(
        self, handler: Callable[[web.Request, bytes], Awaitable[web.Response]]
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        """Only what Tidegate has signed. Orders are idempotent by what they say: ids need not be remembered."""

        async def handle(request: web.Request) -> web.Response:
            body = await request.read()
            try:
                signed = what_is_signed(request.method, request.raw_path, body)
                verify(self._secrets, request.headers, signed, time.time())
                return await handler(request, body)
            except SignatureError as error:
                return refused(401, str(error))
            except MessageError as error:
                return refused(422, error.message, error.field)

        return handle

    async def ask(self, request: web.Request, body: bytes) -> web.Response:
        wanted = read_message(body, ScaleRequest)
        if not self._allowed(wanted):
            raise MessageError("sites", f"there are {', '.join(self.sites)}")
        async with self._turn:
            before = self.requests.get(wanted.id)
            if before is not None and before.model != wanted.model:
                self._take_back(wanted.id)
            # What is placed stays, since it may run: only what is missing is added.
            placed = [one for one in self.placed.values() if one.message["request"] == wanted.id]
            more = wanted.demand.requests - sum(one.message["slots"] for one in placed)
            most = (wanted.count or sys.maxsize) - len(placed)
            copies = 0
            if not placed or (more > 0.0 and most > 0):
                chosen = await asyncio.to_thread(self._choose, wanted, more, most)
                if chosen is None and not placed:
                    self.requests.pop(wanted.id, None)
                    return refused(422, "no free cards meet it: see `tidegate plan` for what would")
                if chosen is not None:
                    site, option, copies = chosen
                    for _ in range(copies):
                        self._place(wanted, site, option.profile, option.slots)
            self.requests[wanted.id] = wanted
        if copies:
            self._spawn(self.push_all())
        return web.json_response({"id": wanted.id, "placements": copies}, status=202)

    def _choose(self, wanted: ScaleRequest, requests: float, most: int) -> tuple[Site, Option, int] | None:
        """The cheapest resources for so many requests at once, by what `tidegate plan` says of the cards that are
        free, and how many placements that makes."""
        demand = Demand(
            concurrency=max(1, ceil(requests)),
            prompt_tokens=wanted.demand.prompt_tokens,
            output_tokens=wanted.demand.output_tokens,
            ttft_s=wanted.sla.ttft_s or inf,
            tpot_s=wanted.sla.tpot_s or inf,
            tokens_per_s=wanted.sla.tokens_per_s or 0.0,
            model=self._models.get(wanted.model, wanted.model),
        )
        money = [left for left in (wanted.budget.per_hour, wanted.budget.month_left) if left is not None]
        for option in plan(demand, self._profiles(wanted)).options:
            copies = min(option.copies, most)
            for site in self._allowed(wanted):
                cost = cost_of(site, option.profile)
                if (
                    site.card == option.profile.card
                    and site.free >= option.profile.cards * copies
                    and (not money or (cost is not None and cost * copies <= min(money)))
                ):
                    return site, option, copies
        return None

    def _allowed(self, wanted: ScaleRequest) -> list[Site]:
        return [site for site in self.sites.values() if not wanted.sites or site.name in wanted.sites]

    def _profiles(self, wanted: ScaleRequest) -> list[Profile]:
        cards = {site.card for site in self._allowed(wanted) if not wanted.cards or site.card in wanted.cards}
        return [profile for profile in self._known if profile.card in cards]

    def _place(self, wanted: ScaleRequest, site: Site, profile: Profile, slots: int) -> None:
        self._numbers += 1
        id = f"{site.name}-{self._numbers}-{new_id()[-6:]}"
        port = free_port()
        message: dict[str, Any] = {
            "id": id,
            "name": id,
            "url": f"http://127.0.0.1:{port}",
            "site": site.name,
            "models": [wanted.model],
            "slots": max(slots, 1),
            "card": profile.card,
            "count": profile.cards,
            "request": wanted.id,
        }
        if (cost := cost_of(site, profile)) is not None:
            message["cost_per_hour"] = cost
        site.free -= profile.cards
        self.placed[id] = Placed(site, profile.cards, profile.name, self._speed, message, port)

    async def give_back(self, request: web.Request, _: bytes) -> web.Response:
        id = request.match_info["id"]
        if self.requests.pop(id, None) is None:
            return refused(404, "there is no such request")
        self._take_back(id)
        return web.json_response({}, status=202)

    def _take_back(self, request: str) -> None:
        """Every placement of a scale request."""
        for id, placed in list(self.placed.items()):
            if placed.message["request"] == request:
                self._leaving[id] = self.placed.pop(id)
                self._spawn(self._let_go(id, placed))

    async def _let_go(self, id: str, placed: Placed) -> None:
        await self._push("DELETE", f"/platform/placements/{id}")
        async with placed.turn:  # a launch that has begun is over
            engine = placed.engine
        if engine is not None:
            try:
                async with asyncio.timeout(LEAVE_S):
                    await engine.wait()
            except TimeoutError:
                await self._end(placed)
        del self._leaving[id]
        placed.site.free += placed.cards

    async def look(self, request: web.Request, _: bytes) -> web.Response:
        placed = self._found(request)
        if placed is None:
            return refused(404, "there is no such placement")
        status = PlacementStatus.model_validate({"id": request.match_info["id"], **placed.status()})
        return web.json_response(status.model_dump(mode="json"))

    async def start(self, request: web.Request, body: bytes) -> web.Response:
        order, placed = self._ordered(request, body, "start")
        if placed is None or order.placement not in self.placed:
            return refused(404, "there is no such placement")
        if order.run == placed.ended:
            return refused(422, "this run was stopped: an order that came late", "run")
        if placed.state in ("starting", "ready", "stopping"):
            if placed.run == order.run and placed.state != "stopping":
                return web.json_response({}, status=202)  # it came before
            return refused(409, f"it is {placed.state} for another run")
        placed.state, placed.run, placed.progress, placed.detail = "starting", order.run, 0.0, ""
        self._spawn(self._launch(order.placement, placed))
        return web.json_response({}, status=202)

    async def stop(self, request: web.Request, body: bytes) -> web.Response:
        order, placed = self._ordered(request, body, "stop")
        if placed is None:
            return refused(404, "there is no such placement")
        placed.ended = order.run
        if placed.state in ("starting", "ready", "failed"):
            placed.state = "stopping"
            if placed.engine is not None and placed.engine.returncode is None:
                placed.engine.terminate()
            self._spawn(self._stop(order.placement, placed))
        return web.json_response({}, status=202)

    def _ordered(self, request: web.Request, body: bytes, operation: str) -> tuple[Run, Placed | None]:
        """Raises MessageError: what was signed is not about this path, which is not signed itself."""
        order = read_message(body, Run)
        if (order.operation, order.placement) != (operation, request.match_info["id"]):
            raise MessageError("operation", "operation and placement are not those of the path")
        return order, self._found(request)

    def _found(self, request: web.Request) -> Placed | None:
        id = request.match_info["id"]
        return self.placed.get(id) or self._leaving.get(id)

    # Engines

    async def _launch(self, id: str, placed: Placed) -> None:
        async with placed.turn:
            if placed.state != "starting":
                return
            self._progress(id, placed, 0.1, "launching")
            command = [sys.executable, "-m", "proxy.cli", "emulate", "--model", placed.message["models"][0]]
            command += ["--port", str(placed.port), "--profile", placed.profile, "--speed", str(placed.speed)]
            placed.engine = engine = await asyncio.create_subprocess_exec(
                *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
            )
            assert engine.stdout is not None
            listens = (await engine.stdout.readline()).startswith(b"listening")
            if placed.state != "starting":
                return  # stopped meanwhile
            if listens:
                placed.state = "ready"
                self._progress(id, placed, 1.0, "")
                self._spawn(self._watch(id, placed, engine, engine.stdout))
            else:
                await self._end(placed)
                placed.state = "failed"
                self._progress(id, placed, None, "the engine ended before it listened")

    async def _watch(
        self, id: str, placed: Placed, engine: asyncio.subprocess.Process, said: asyncio.StreamReader
    ) -> None:
        """Notice that an engine ends by itself. What it says is not kept."""
        while await said.read(1 << 16):
            pass
        code = await engine.wait()
        if placed.engine is engine and placed.state == "ready":
            placed.engine, placed.state = None, "failed"
            self._progress(id, placed, None, f"the engine ended with exit code {code}")

    async def _stop(self, id: str, placed: Placed) -> None:
        async with placed.turn:
            await self._end(placed)
            placed.state, placed.run = "standby", ""
            self._progress(id, placed, None, "")

    async def _end(self, placed: Placed) -> None:
        engine = placed.engine
        if engine is not None and engine.returncode is None:
            engine.terminate()
            try:
                async with asyncio.timeout(10.0):
                    await engine.wait()
            except TimeoutError:
                engine.kill()
                await engine.wait()
        placed.engine = None

    # What Tidegate is told

    async def push_all(self) -> None:
        """Placements and resources, again: their time to live begins anew."""
        for site in list(self.sites.values()):
            cards = [{"card": site.card, "total": site.total, "free": site.free}]
            use = 1.0 - site.free / site.total
            content = {"site": site.name, "cards": cards, "utilisation": use, "ttl_s": self.ttl_s}
            await self._push("PUT", f"/platform/sites/{site.name}/resources", content)
        for id, placed in list(self.placed.items()):
            if id not in self.placed:
                continue  # taken back meanwhile
            content = placed.placement(self.ttl_s).model_dump(mode="json", exclude_none=True)
            await self._push("PUT", f"/platform/placements/{id}", content)

    def _progress(self, id: str, placed: Placed, progress: float | None, detail: str) -> None:
        placed.progress, placed.detail = progress, detail
        if id in self.placed:
            self._spawn(self._push("POST", "/platform/progress", {"placement": id, **placed.status()}))

    async def _push(self, method: str, path: str, content: dict[str, Any] | None = None) -> None:
        try:
            await self._caller.call(
                method, self.tidegate + path, content, id=new_id(), within_s=PUSH_WITHIN_S
            )
        except ProviderError as error:
            print(f"{method} {path}: {error}", file=sys.stderr)

    async def renew(self) -> None:
        """For as long as this process lives."""
        while True:
            now = time.time()
            for id in [id for id, wanted in self.requests.items() if wanted.expires <= now]:
                del self.requests[id]
                self._take_back(id)
            await self.push_all()
            await asyncio.sleep(self.ttl_s / 3.0)

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _lifetime(self, _: web.Application) -> AsyncIterator[None]:
        self._spawn(self.renew())
        yield
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for placed in (*self.placed.values(), *self._leaving.values()):
            await self._end(placed)
        await self._caller.close()


def cost_of(site: Site, profile: Profile) -> float | None:
    """Of an engine and hour."""
    if site.cost is not None:
        return site.cost * profile.cards
    return None if profile.price is None else profile.price.per_hour


def refused(status: int, message: str, field: str = "") -> web.Response:
    error = {"message": message} | ({"field": field} if field else {})
    return web.json_response({"error": error}, status=status)


def free_port() -> int:
    """One that nobody listens on now."""
    for port in random.sample(PORTS, len(PORTS)):
        with contextlib.closing(socket.socket()) as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no port is free")


def site_of(text: str) -> Site:
    """`nanjing=H20:8`, or with what an hour of a card costs `nanjing=H20:8:12.5`."""
    name, _, rest = text.partition("=")
    card, _, rest = rest.partition(":")
    count, _, cost = rest.partition(":")
    try:
        site = Site(name, card, int(count), int(count), float(cost) if cost else None)
    except ValueError:
        site = Site("", "", 0, 0)
    if not (site.name and site.card and site.total > 0 and 0.0 <= (site.cost or 0.0) < inf):
        raise argparse.ArgumentTypeError(
            f"a site is NAME=CARD:COUNT or NAME=CARD:COUNT:COST, as nanjing=H20:8:12.5, not {text!r}"
        )
    return site


def alias_of(text: str) -> tuple[str, str]:
    """`qwen3-32b=32b`."""
    name, given, part = text.partition("=")
    if not given:
        raise argparse.ArgumentTypeError(f"a model is NAME=PART, as qwen3-32b=32b, not {text!r}")
    return name, part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--listen", default="127.0.0.1:9090", help="where Tidegate asks")
    parser.add_argument("--tidegate", required=True, help="its admin port: http://127.0.0.1:8081")
    parser.add_argument(
        "--site", action="append", type=site_of, required=True, metavar="NAME=CARD:COUNT[:COST]"
    )
    parser.add_argument(
        "--as", dest="models", action="append", type=alias_of, metavar="MODEL=PART", default=[]
    )
    parser.add_argument("--ttl", type=float, default=30.0, help="seconds that placements live unrenewed")
    parser.add_argument("--speed", type=float, default=1.0, help="of the emulated engines")
    parser.add_argument("--secret-env", default="PLATFORM_SECRET", help="variable with the shared secret")
    given = parser.parse_args()
    scheduler = Scheduler(
        secrets_of(given.secret_env),
        given.tidegate.rstrip("/"),
        given.site,
        ttl_s=given.ttl,
        models=dict(given.models),
        speed=given.speed,
    )
    host, _, port = given.listen.rpartition(":")
    web.run_app(scheduler.app(), host=host, port=int(port), print=lambda text: print(text, flush=True))


if __name__ == "__main__":
    main()
