"""Plans, templates and budgets on the admin port.

The port asks for no key, so what changes something takes no request that a web page could send from a browser which
may reach it: one with an `Origin`, or with a body that is not declared as JSON. Answers of the
operator's own systems are signed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

import orjson
from aiohttp import web

from policies.plans import OPEN
from policies.units import BadValueError
from policies.yamlfile import FileProblems
from proxy.scaling.plans import ConflictError, PlansError
from proxy.scaling.signing import SignatureError, verify
from proxy.scaling.templates import Template, sites_of

if TYPE_CHECKING:
    from proxy.runtime import Runtime
    from proxy.scaling.planning import Planning

MOST_BODY_BYTES: Final = 64 * 1024
LONGEST_NAME: Final = 64
SHOWN_PLANS: Final = 100
"""Unless more are asked for: requests wait meanwhile."""
LONGEST_REASON: Final = 500
Handler = Callable[[web.Request, "Planning"], Awaitable[Any]]


class _AnswerError(Exception):
    """What to say instead of an answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def plan_routes(runtime: Runtime) -> list[web.RouteDef]:
    """Routes of the admin port."""

    def of(handler: Handler, *, changes: bool = False) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(request: web.Request) -> web.Response:
            try:
                if runtime.planning is None:
                    raise _AnswerError(503, "this proxy makes no plans")
                if changes:
                    _refuse_browsers(request)
                shown, status = await handler(request, runtime.planning), 200
            except _AnswerError as error:
                shown, status = _error(str(error)), error.status
            except ConflictError as error:
                shown, status = _error(str(error)), 409
            except PlansError as error:
                shown, status = _error(str(error)), 404
            except KeyError as error:
                shown, status = _error(str(error.args[0])), 404
            except BadValueError as error:
                hint = f" (did you mean '{error.suggestion}'?)" if error.suggestion else ""
                at = ".".join(map(str, error.at))
                shown, status = (
                    _error(f"{at}: {error.message}{hint}" if at else f"{error.message}{hint}"),
                    422,
                )
            except FileProblems as error:
                shown, status = _error(str(error)), 422
            except OSError as error:
                shown, status = _error(f"it could not be written: {error.strerror or error}"), 503
            return web.Response(body=orjson.dumps(shown), status=status, content_type="application/json")

        return handle

    return [
        web.get("/plans", of(_plans)),
        web.get("/plans/{id}", of(_plan)),
        web.post("/plans/{id}/approve", of(_approve, changes=True)),
        web.post("/plans/{id}/refuse", of(_refuse, changes=True)),
        web.post("/plans/{id}/answer", of(_answer)),
        web.get("/templates", of(_templates)),
        web.get("/templates/{name}", of(_template)),
        web.put("/templates/{name}", of(_save, changes=True)),
        web.delete("/templates/{name}", of(_delete, changes=True)),
        web.post("/templates/{name}/run", of(_run, changes=True)),
        web.get("/budgets", of(_budgets)),
    ]


async def _plans(request: web.Request, planning: Planning) -> Any:
    wanted = request.query.get("state", "")
    plans = planning.plans.all()
    if wanted == "open":
        plans = [plan for plan in plans if plan.state in OPEN]
    elif wanted:
        plans = [plan for plan in plans if plan.state == wanted]
    try:
        most = int(request.query.get("limit", SHOWN_PLANS))
    except ValueError:
        raise _AnswerError(422, "limit: how many plans at most, a whole number") from None
    shown = [plan.as_dict() for plan in plans[: max(most, 0)]]
    return {"plans": shown, "of": len(plans), "currency": planning.spending.currency}


async def _plan(request: web.Request, planning: Planning) -> Any:
    plan = planning.plans.find(request.match_info["id"])
    return plan.as_dict() | {"currency": planning.spending.currency}


async def _approve(request: web.Request, planning: Planning) -> Any:
    by, reason = _who(await _json(request))
    return (await planning.approve(request.match_info["id"], by, reason)).as_dict()


async def _refuse(request: web.Request, planning: Planning) -> Any:
    by, reason = _who(await _json(request))
    return (await planning.refuse(request.match_info["id"], by, reason)).as_dict()


async def _answer(request: web.Request, planning: Planning) -> Any:
    """What `scaling.approval_webhook` was asked, answered later: signed with the same secret."""
    raw = await _body(request)
    secrets = planning.approval_secrets
    if not secrets:
        raise _AnswerError(404, "nobody is asked: there is no scaling.approval_webhook")
    try:
        verify(secrets, request.headers, raw, planning.runtime.wall())
    except SignatureError as error:
        raise _AnswerError(401, str(error)) from None
    content = _parsed(raw)
    plan = planning.plans.find(request.match_info["id"])
    if content.get("plan") != plan.id:
        raise _AnswerError(
            422, f"plan: expected {plan.id}, which the address names: a signed answer is for one"
        )
    decision = content.get("decision")
    if decision not in ("approve", "refuse"):
        raise _AnswerError(422, "decision: approve or refuse")
    by, reason = _who({"by": "webhook"} | content)
    decided = "approved" if decision == "approve" else "refused"
    if any(made.by == by and made.after == decided for made in plan.decisions):
        return plan.as_dict()  # said again, since our answer was lost
    decide = planning.approve if decision == "approve" else planning.refuse
    return (await decide(plan.id, by, reason)).as_dict()


async def _templates(request: web.Request, planning: Planning) -> Any:
    planning.templates.look()
    return {
        "file": str(planning.templates.path),
        "trouble": planning.templates.trouble,
        "unworkable": planning.templates.unworkable(planning.offers, sites_of(planning.config)),
        "templates": {name: _shown(template) for name, template in planning.templates.all().items()},
    }


async def _template(request: web.Request, planning: Planning) -> Any:
    planning.templates.look()
    return _shown(planning.templates.find(request.match_info["name"]))


async def _save(request: web.Request, planning: Planning) -> Any:
    content, name = await _json(request), request.match_info["name"]
    if "plan" in content:
        plan = planning.plans.find(str(content.pop("plan")))
        of = plan.resources
        pinned = {"model": of.model.split(", ")[0], "task": of.task, "standbys": list(plan.standbys)}
        content = {**pinned, "mode": plan.mode, **content}
    template = planning.templates.save(name, content, planning.offers, sites_of(planning.config))
    return _shown(template)


async def _delete(request: web.Request, planning: Planning) -> Any:
    planning.templates.look()
    planning.templates.delete(request.match_info["name"])
    return {"deleted": request.match_info["name"]}


async def _run(request: web.Request, planning: Planning) -> Any:
    by, _ = _who(await _json(request))
    planning.templates.look()
    plan = await planning.run_template(request.match_info["name"], by)
    return plan.as_dict() | {"currency": planning.spending.currency}


async def _budgets(request: web.Request, planning: Planning) -> Any:
    budgets = planning.budgets
    return {
        "budgets": [budgets.shown(used) for used in budgets.used()],
        "currency": planning.spending.currency,
    }


def _shown(template: Template) -> dict[str, Any]:
    return template.model_dump(mode="json", exclude_unset=True)


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message}}


def _refuse_browsers(request: web.Request) -> None:
    if request.method in ("POST", "PUT") and request.content_type != "application/json":
        raise _AnswerError(415, "send JSON, and say so: `Content-Type: application/json`")


def _who(content: dict[str, Any]) -> tuple[str, str]:
    """Name and reason that a body gives."""
    by, reason = content.get("by", ""), content.get("reason", "")
    if not isinstance(by, str) or not 0 < len(by) <= LONGEST_NAME or not by.isprintable():
        raise _AnswerError(422, f"by: who decides, in at most {LONGEST_NAME} printable characters")
    if not isinstance(reason, str) or len(reason) > LONGEST_REASON or not reason.isprintable():
        raise _AnswerError(422, f"reason: at most {LONGEST_REASON} printable characters")
    return by, reason


async def _json(request: web.Request) -> dict[str, Any]:
    return _parsed(await _body(request))


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        content = orjson.loads(raw or b"{}")
    except orjson.JSONDecodeError as error:
        raise _AnswerError(400, f"this is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise _AnswerError(400, "a JSON object is expected")
    return content


async def _body(request: web.Request) -> bytes:
    body = bytearray()
    async for piece in request.content.iter_any():
        body += piece
        if len(body) > MOST_BODY_BYTES:
            raise _AnswerError(413, f"a body may have {MOST_BODY_BYTES} bytes")
    return bytes(body)
