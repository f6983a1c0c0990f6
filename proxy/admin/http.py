"""The admin port: health, metrics, state and explanations, by aiohttp."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import orjson
from aiohttp import web
from aiohttp.typedefs import Handler
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from policies.state import Backend
from proxy.admin.explain import explanation, standbys, unavailable
from proxy.admin.plans import plan_routes
from proxy.admin.standbys import routes as standby_routes
from proxy.admin.whatif import AskedError, Running, asked, what_if
from proxy.ask import CLIENTS_ERROR
from proxy.dialects import body_in, status_in
from proxy.endpoints import BY_NAME
from proxy.errors import RequestError
from proxy.metrics import Metrics
from proxy.openai import is_slow_to_read, read_body
from proxy.policy_failures import failing
from proxy.pressure import REFUSE_REQUESTS
from proxy.runtime import Runtime
from proxy.scaling import shown
from proxy.scaling.service import scaling_in

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def admin_app(runtime: Runtime, started: float, further: Iterable[web.RouteDef] = ()) -> web.Application:
    """The application; `started` is the monotonic time of the start. `further`: routes of others."""
    registry = CollectorRegistry()
    registry.register(Metrics(runtime))

    async def healthz(_: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def readyz(_: web.Request) -> web.Response:
        if reason := unready(runtime):
            return web.json_response({"status": "unready", "reason": reason}, status=503)
        return web.json_response({"status": "ready", "reason": asleep(runtime)})

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": _CONTENT_TYPE})

    async def show_state(_: web.Request) -> web.Response:
        return _json(state(runtime, started))

    async def explain(request: web.Request) -> web.Response:
        record = runtime.observer.find(request.match_info["id"])
        if record is None:
            message = (
                f"no request {request.match_info['id']!r} among the last {runtime.observer.recent.maxlen}"
            )
            return _json({"error": {"message": message}}, 404)
        return _json(explanation(runtime, record))

    async def explain_request(request: web.Request) -> web.Response:
        route = BY_NAME["chat"]
        try:
            wanted = asked(list(request.query.items()), runtime.keys.find, runtime.wall())
            route = BY_NAME[wanted.endpoint]
            raw = await _body(request, runtime.most_body_bytes)
            read = partial(read_body, wanted.endpoint, raw, media_urls=runtime.media_urls)
            body = await asyncio.to_thread(read) if is_slow_to_read(raw) else read()
            shown = what_if(Running(runtime), body, wanted)
            if reason := unready(runtime):
                shown["notes"].insert(0, f"the proxy is not ready: {reason}")
            return _json(shown)
        except AskedError as error:
            return _json({"error": {"message": str(error)}}, 400)
        except RequestError as error:
            text = body_in(route.dialect, error.code, error.message, error.param)
            status = status_in(route.dialect, error.code)
            return web.Response(
                body=text, status=status, content_type="application/json", headers={CLIENTS_ERROR: "yes"}
            )

    app = web.Application(middlewares=[_no_browsers])
    app.add_routes(
        [
            web.get("/healthz", healthz),
            web.get("/readyz", readyz),
            web.get("/metrics", metrics),
            web.get("/state", show_state),
            web.get("/explain/{id}", explain),
            web.post("/explain", explain_request),
            *plan_routes(runtime),
            *further,
            *standby_routes(runtime),
        ]
    )
    return app


@web.middleware
async def _no_browsers(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A page that an admin looks at must not be able to start what costs money: nobody asks it for a key here."""
    if request.method not in ("GET", "HEAD") and "Origin" in request.headers:
        return _json({"error": {"message": "web pages may not change anything here"}}, 403)
    return await handler(request)


def unready(runtime: Runtime) -> str:
    """Why no request should be sent here now; empty: it may."""
    if runtime.draining:
        return "shutting down"
    if failed := runtime.journal.failed or runtime.ledger.failed:
        return f"usage cannot be recorded: {failed}"
    if runtime.shedding >= REFUSE_REQUESTS:
        return "memory runs short"
    if not any(backend.models for backend in runtime.fleet):
        return "no backend serves any model"
    if not _runs(runtime) and not standbys(runtime):
        return "no backend is available"
    return ""


def asleep(runtime: Runtime) -> str:
    """What to say of a proxy whose backends all sleep; empty: one runs."""
    if _runs(runtime):
        return ""
    names = ", ".join(f"{name} ({how})" for name, how in standbys(runtime).items())
    return f"no backend runs: requests are held for standbys: {names}"


def _runs(runtime: Runtime) -> bool:
    panics = runtime.fleet.health.panic > 0
    return any(backend.available or (panics and backend.doubtful) for backend in runtime.fleet)


def state(runtime: Runtime, started: float) -> dict[str, Any]:
    """The figures of this moment, as `GET /state` shows them."""
    now = runtime.now()
    observer = runtime.observer
    totals: dict[str, list[int]] = {}
    for (name, _), series in observer.series.items():
        sums = totals.setdefault(name, [0, 0, 0, 0])
        for index, value in enumerate((series.prompt, series.cached, series.completion, series.cost_nano)):
            sums[index] += value
    unpriced = sum(
        series.prompt + series.completion
        for (name, model), series in observer.series.items()
        if runtime.prices.price(name, model) is None
    )
    probes = runtime.probes()
    in_spite = runtime.valve.rules.in_spite
    backends = []
    for backend in runtime.fleet:
        prompt, cached, completion, cost = totals.get(backend.name, (0, 0, 0, 0))
        age = now - backend.sampled_at
        backends.append(
            {
                "name": backend.name,
                "site": backend.site,
                "url": runtime.endpoints[backend.name].url,
                "available": backend.available,
                "probed_up": backend.probed_up,
                "breaker": backend.breaker.state(now),
                "draining": backend.draining,
                "asleep": backend.asleep,
                "unavailable": unavailable(runtime, backend)[0],
                "in_flight": backend.in_flight,
                "in_flight_tokens": backend.in_flight_tokens,
                "slots": backend.slots,
                "full_slots": backend.full_slots,
                "slow_start": backend.starting,
                "adaptive": _adaptive(backend),
                "in_spite": backend.name in in_spite,
                "saturation": round(backend.saturation(now), 4),
                "ttft_s": backend.ttft_s,
                "tpot_s": backend.tpot_s,
                "rtt_s": backend.rtt_s,
                "running": backend.running,
                "waiting": backend.waiting,
                "kv_use": backend.kv_use,
                "engine_age_s": age if math.isfinite(age) else None,
                "ok": backend.ok,
                "failed": backend.failed,
                "ignored": backend.ignored,
                "spilled": observer.spilled.get(backend.name, 0),
                "prompt_tokens": prompt,
                "cached_tokens": cached,
                "completion_tokens": completion,
                "cost": cost / 1e9,
                "models": sorted(backend.models),
                "probe": probes.get(backend.name),
            }
        )
    return {
        "uptime_s": now - started,
        "ready": not unready(runtime),
        "unready_reason": unready(runtime),
        "reload_ok": runtime.observer.reload_ok,
        "restart_for": runtime.observer.restart_for,
        "policy": {
            "name": runtime.built.policy.name,
            "hash": runtime.built.policy.text_hash,
            "failing": failing(runtime.valve.rules),
        },
        "backends": backends,
        "certificates": [
            {
                "file": str(certificate.file),
                "names": certificate.names,
                "expires": certificate.not_after,
                "days_left": int(certificate.seconds_left(runtime.wall()) // 86400),
                "warning": certificate.warning(runtime.wall()),
            }
            for certificate in runtime.built.certificates
        ],
        "backend_certificates": [
            {
                "backend": certificate.backend,
                "key": certificate.key,
                "file": str(certificate.file),
                "expires": certificate.not_after,
                "days_left": int((certificate.not_after - runtime.wall()) // 86400),
                "warning": certificate.warning(runtime.wall()),
            }
            for certificate in runtime.built.backend_certificates
        ],
        "standbys": [] if (scaling := scaling_in(runtime)) is None else shown.standbys(scaling),
        "hosts": runtime.hosts(),
        "queue": {
            "waiting": runtime.valve.queued,
            "oldest_s": runtime.valve.oldest_age(now),
            "by_tenant": runtime.valve.queued_by_tenant(),
            "for_standbys": [
                {"standbys": sorted(names), "waiting": waiting, "tokens": tokens}
                for names, waiting, tokens in runtime.valve.waiting_for_standbys()
            ],
        },
        "spill": spills(runtime),
        "hedging": _hedging(runtime),
        "requests": observer.totals(),
        "errors": dict(observer.refusals),
        "tokens": {
            "prompt": sum(sums[0] for sums in totals.values()),
            "cached": sum(sums[1] for sums in totals.values()),
            "completion": sum(sums[2] for sums in totals.values()),
        },
        "unpriced_tokens": unpriced,
        "currency": runtime.prices.currency,
        "ledger": {
            "lag_rows": runtime.ledger.lag,
            "oldest_s": runtime.ledger.oldest_s,
            "trouble": runtime.ledger.trouble,
            "failed": runtime.ledger.failed or runtime.journal.failed,
        },
        "keys": {"trouble": runtime.keys.trouble},
        "plans": runtime.planning.shown() if runtime.planning is not None else None,
        "memory": {"use": round(runtime.pressure.use, 4), "shedding": runtime.shedding},
        "connections": {"clients": len(runtime.clients), "open_exchanges": len(runtime.exchanges)},
    }


def _adaptive(backend: Backend) -> dict[str, Any] | None:
    adaptive = backend.adaptive
    if adaptive is None:
        return None
    return {
        "slots": adaptive.slots(backend.full_slots),
        "minimum_ttft_s": adaptive.minimum_s or None,
        "measuring": backend.measuring_slots > 0,
    }


def _hedging(runtime: Runtime) -> dict[str, Any] | None:
    hedging = runtime.hedging
    if hedging is None:
        return None
    made = runtime.observer.hedges
    return {how: made.get(how, 0) for how in ("won", "lost", "failed")} | {"refused": hedging.refused}


def spills(runtime: Runtime) -> list[dict[str, Any]]:
    """The tiers with spill thresholds, and whether each stands open."""
    now = runtime.now()
    return [
        {
            "rule": flag.rule,
            "tier": flag.tier,
            "backends": sorted(flag.backends),
            "open": flag.open,
            "openings": flag.openings,
            "saturation": flag.saturation if math.isfinite(flag.saturation) else None,
            "moved_s_ago": now - flag.moved_at if math.isfinite(flag.moved_at) else None,
        }
        for flag in runtime.valve.rules.spills
    ]


async def _body(request: web.Request, most_bytes: int) -> bytes:
    """Raises RequestError."""
    body = bytearray()
    async for piece in request.content.iter_any():
        body += piece
        if len(body) > most_bytes:
            raise RequestError("body_too_large", f"a body may have {most_bytes} bytes")
    return bytes(body)


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")
