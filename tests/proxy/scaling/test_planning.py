"""The admin in control, over a real proxy with its admin port, its ledger and the commands that a user types."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from policies.plans import PlanState, Trigger
from policies.standby import Event, Standby, State
from policies.state import Backend, Fleet
from proxy.config import BackendConfig
from proxy.scaling.service import scaling_in
from proxy.scaling.signing import signed, verify
from proxy.scaling.templates import Shortage
from tests.e2e.proxy_fixtures import eventually
from tests.proxy.scaling.planned import STEP, Start, standby

SECRET = "a-secret-of-16-bytes"


# By whose word


async def test_in_mode_auto_a_plan_is_executed_at_once(start: Start) -> None:
    proxy = await start()
    id = await proxy.planning.want("nj", STEP)
    assert id is not None
    assert await proxy.planning.want("nj", STEP) == id, "asking again makes no second one"
    plan = proxy.planning.plans.find(id)
    assert (plan.state, plan.approved_by, plan.reason) == (PlanState.APPROVED, "auto", STEP.reason)
    assert (plan.cost_per_hour, plan.resources.card, plan.forecast.concurrency) == (10.0, "H20", 8)
    assert plan.resources.image.startswith("vllm/vllm-openai:")
    assert proxy.planning.wanted() == [("nj", id, STEP.reason)]
    nj = Standby("nj")
    await proxy.lives(nj, Event.START, plan=id)
    assert proxy.planning.plans.find(id).state is PlanState.EXECUTING
    await proxy.lives(nj, Event.PREPARED, Event.STARTED)
    assert proxy.planning.plans.find(id).state is PlanState.DONE
    assert proxy.planning.wanted() == []
    assert await proxy.planning.want("nj", STEP) != id, "the next run is another plan"


async def test_the_manager_asks_and_is_woken_when_it_may(start: Start) -> None:
    proxy = await start()
    woken: list[str | None] = []
    proxy.planning.approved = lambda: woken.append(proxy.planning.may_start("nj", STEP))
    for _ in range(3):
        assert proxy.planning.may_start("nj", STEP) is None, "a plan is on its way to the disk"
    (id,) = await eventually(lambda: woken)
    assert [plan.id for plan in proxy.planning.plans.all()] == [id]


async def test_a_plan_does_not_hold_for_what_has_become_dearer(start: Start) -> None:
    proxy = await start()
    planning = proxy.planning
    id = await planning.want("nj", STEP)
    assert id is not None
    planning.offers["nj"] = replace(planning.offers["nj"], cost_per_hour=9.0)
    assert planning.may_start("nj", STEP) == id
    planning.offers["nj"] = replace(planning.offers["nj"], cost_per_hour=12.0)
    assert planning.may_start("nj", STEP) is None
    assert planning.wanted() == []
    await proxy.turn()
    plan = planning.plans.find(id)
    assert (plan.state, plan.decisions[-1].reason) == (PlanState.EXPIRED, "it costs 12 an hour now, not 10")
    after = await planning.want("nj", STEP)
    assert after is not None
    assert planning.plans.find(after).cost_per_hour == 12.0


async def test_a_failure_ends_its_plan(start: Start) -> None:
    proxy = await start()
    id = await proxy.planning.want("nj", STEP)
    assert id is not None
    await proxy.lives(Standby("nj"), Event.START, Event.FAIL, plan=id)
    plan = proxy.planning.plans.find(id)
    assert (plan.state, plan.decisions[-1].reason) == (PlanState.FAILED, "nj: it is to fail")


async def test_the_image_of_a_plan_is_what_is_started(start: Start, tmp_path: Path) -> None:
    proxy = await start(mode="confirm")
    plan = await proxy.planning.propose([proxy.planning.offers["nj"]], Trigger.HAND, "by hand")
    scaling = scaling_in(proxy.service.runtime)
    assert scaling is not None
    told = tmp_path / "told"
    script = {"command": {"command": ["sh", "-c", f'printf %s "$TIDEGATE_IMAGE" > {told}']}}
    section = BackendConfig.model_validate(standby("nj", "nanjing") | {"standby": script})
    await scaling.make(section).start("r1")
    assert told.read_text() == plan.resources.image != ""


async def test_what_a_crash_has_swallowed_is_seen_with_the_next_turn(start: Start) -> None:
    proxy = await start()
    id = await proxy.planning.want("nj", STEP)
    assert id is not None
    nj = Standby("nj")
    assert nj.move(Event.START, "", time.time(), id), "and the proxy was killed before its plan heard of it"
    proxy.planning.standby_of = {"nj": nj}.get
    await proxy.turn()
    assert proxy.planning.plans.find(id).state is PlanState.EXECUTING
    assert nj.move(Event.PREPARED, "", time.time())
    assert nj.move(Event.STARTED, "", time.time())
    await proxy.turn()
    assert proxy.planning.plans.find(id).state is PlanState.DONE
    assert nj.move(Event.FAIL, "", time.time())
    assert nj.move(Event.RECOVERED, "", time.time())
    await proxy.turn()
    assert proxy.planning.plans.find(id).stopped == (), "it has ended, and is looked at once"
    proxy.planning._all_seen = False  # the next start
    await proxy.turn()
    assert proxy.planning.plans.find(id).stopped == (("nj", nj.since),)


async def test_in_mode_confirm_somebody_has_to_approve(start: Start) -> None:
    proxy = await start(mode="confirm")
    assert await proxy.planning.want("nj", STEP) is None
    assert await proxy.planning.want("nj", STEP) is None
    (plan,) = proxy.planning.plans.all()
    assert plan.waits_for == "approval"
    assert proxy.planning.wanted() == []
    assert plan.id in await proxy.says("plans", "list")
    shown = await proxy.says("plans", "show", plan.id[:4])
    assert "costs     10.00 CNY an hour" in shown
    assert "for       qwen3-32b (generate), on 1 × H20" in shown
    said = await proxy.says("plans", "approve", plan.id, "--by", "ada", "--reason", "exam week")
    assert said == f"plan {plan.id} is approved, by ada\n"
    assert await proxy.planning.want("nj", STEP) == plan.id
    said = await proxy.says("plans", "approve", plan.id, status=1)
    assert f"plan {plan.id} is approved already, by ada: exam week" in said
    said = await proxy.says("plans", "show", "ffffffff", status=1)
    assert "there is no plan ffffffff: `tidegate plans list`" in said
    listed = json.loads(await proxy.says("plans", "list", "--all", "--json"))
    assert [row["id"] for row in listed["plans"]] == [plan.id]
    await proxy.planning.want("xa", STEP)
    assert "and 1 older ones (--last shows more)" in await proxy.says("plans", "list", "--all", "--last", "1")


async def test_what_was_refused_is_left_alone_for_a_while(start: Start) -> None:
    proxy = await start(mode="confirm", approval="10m")
    assert await proxy.planning.want("nj", STEP) is None
    (plan,) = proxy.planning.plans.all()
    await proxy.says("plans", "refuse", plan.id, "--reason", "too dear")
    assert not proxy.planning.allowed("nj")
    assert proxy.planning.allowed("xa")
    assert await proxy.planning.want("nj", STEP) is None
    assert len(proxy.planning.plans) == 1
    later = time.time() + 601
    proxy.service.runtime.wall = lambda: later
    assert proxy.planning.allowed("nj")


async def test_what_waits_too_long_expires(start: Start) -> None:
    proxy = await start(mode="confirm", approval="10m")
    await proxy.planning.want("nj", STEP)
    (plan,) = proxy.planning.plans.all()
    later = time.time() + 601
    proxy.planning.plans._wall = proxy.service.runtime.wall = lambda: later
    status, said = await proxy.ask("POST", f"/plans/{plan.id}/approve", {"by": "ada"})
    assert status == 409
    assert "is expired already, by manager: it waited too long: approval" in said["error"]["message"]


async def test_plans_outlive_the_process(start: Start) -> None:
    proxy = await start(mode="confirm")
    await proxy.planning.want("nj", STEP)
    (plan,) = proxy.planning.plans.all()
    await proxy.service.stop()
    again = await start(mode="confirm")
    assert again.planning.plans.all() == [plan]
    assert await again.planning.want("nj", STEP) is None
    assert len(again.planning.plans) == 1


# By webhook


@pytest.fixture
async def told() -> AsyncIterator[tuple[str, list[tuple[dict[str, str], bytes]]]]:
    """An endpoint: its URL, and what came."""
    came: list[tuple[dict[str, str], bytes]] = []

    async def take(request: web.Request) -> web.Response:
        came.append(({name.lower(): value for name, value in request.headers.items()}, await request.read()))
        return web.Response(status=204)

    app = web.Application()
    app.router.add_post("/hook", take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}/hook", came
    await runner.cleanup()


async def test_a_webhook_is_asked_and_answers(
    start: Start, told: tuple[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK_SECRET", SECRET)
    url, came = told
    proxy = await start(mode="confirm", approval_webhook={"url": url, "secret_env": "HOOK_SECRET"})
    await proxy.planning.want("nj", STEP)
    headers, body = await eventually(lambda: came[0] if came else None)
    assert verify([SECRET.encode()], headers, body, time.time())
    asked = json.loads(body)
    assert asked["type"] == "plan.proposed"
    id = asked["data"]["id"]
    path, now = f"/plans/{id}/answer", int(time.time())

    async def answer(content: Any, secret: str = SECRET, at: int = now) -> tuple[int, Any]:
        raw = json.dumps(content).encode()
        return await proxy.ask("POST", path, raw, **signed([secret.encode()], "msg_1", at, raw))

    good = {"plan": id, "decision": "approve", "by": "ops"}
    assert (await answer(good, "another-secret-of-16"))[0] == 401
    assert (await answer(good, at=now - 3600))[0] == 401
    assert (await proxy.ask("POST", path, good))[0] == 401, "not signed at all"
    assert (await answer(good | {"plan": "another"}))[0] == 422
    assert (await answer(good | {"decision": "perhaps"}))[0] == 422
    assert proxy.planning.plans.find(id).state is PlanState.PROPOSED
    assert (await answer(good))[1]["state"] == "approved"
    assert (await answer(good))[0] == 200, "its answer may have got lost"
    assert (await answer(good | {"decision": "refuse"}))[0] == 200, "not begun: it may be taken back"
    assert proxy.planning.plans.find(id).state is PlanState.REFUSED
    assert len(came) == 1


# Within which money


async def test_at_a_ceiling_nothing_new_is_sent_or_started(start: Start) -> None:
    proxy = await start(budgets={"sites": {"nanjing": 100, "xian": 1000}})
    proxy.pays(91)
    await proxy.turn()
    assert proxy.planning.allowed("nj")
    assert await proxy.planning.want("nj", STEP) is None, "an hour of it costs 10"
    (plan,) = proxy.planning.plans.all()
    hour = "the budget of site nanjing: 91.0000 of 100.0000 CNY used, and an hour of it costs 10.0000"
    assert plan.waits_for == hour
    assert plan.budget_left == 9.0
    said = await proxy.says("plans", "approve", plan.id, status=1)
    assert "raise scaling.budgets.sites.nanjing first" in said
    proxy.pays(9)
    await proxy.turn()
    fleet = proxy.service.runtime.fleet
    assert (fleet["nj"].over_budget, fleet["xa"].over_budget) == (True, False)
    assert (proxy.planning.over("nj"), proxy.planning.over("xa")) == ("its budget is used up", "")
    assert not proxy.planning.allowed("nj")
    assert await proxy.planning.want("xa", STEP) is not None
    _, shown = await proxy.ask("GET", "/budgets")
    assert {row["name"]: row["reached"] for row in shown["budgets"]} == {"nanjing": True, "xian": False}
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://{proxy.service.ports.admin}/metrics") as response,
    ):
        assert 'tidegate_budget_used_ratio{name="nanjing",scope="site"} 1.0' in await response.text()
    _, state = await proxy.ask("GET", "/state")
    assert [row["reached"] for row in state["plans"]["budgets"]] == [True, False]


async def test_a_ceiling_is_kept_over_a_restart_and_gives_back_when_it_is_raised(start: Start) -> None:
    proxy = await start(budgets={"sites": {"nanjing": 100}})
    proxy.pays(100)
    await proxy.service.stop()
    again = await start(budgets={"sites": {"nanjing": 100}})
    await again.turn()
    nj = again.service.runtime.fleet["nj"]
    assert nj.over_budget
    again.uses(budgets={"sites": {"nanjing": 200}})
    await again.turn()
    assert not nj.over_budget


async def test_with_money_again_a_plan_in_mode_auto_goes_on(start: Start) -> None:
    proxy = await start(budgets={"month": 5})
    assert await proxy.planning.want("nj", STEP) is None
    proxy.uses(budgets={"month": 50})
    await proxy.turn()
    (plan,) = proxy.planning.plans.all()
    assert plan.state is PlanState.APPROVED
    assert await proxy.planning.want("nj", STEP) == plan.id


# Templates


async def test_templates_from_the_terminal(start: Start) -> None:
    proxy = await start(mode="confirm")
    save = ("templates", "save", "rush", "--model", "qwen3-32b")
    said = await proxy.says(
        *save, "--site", "nanjing", "--budget", "200", "--when-queue", "20", "--ttft", "2s"
    )
    assert said == (
        "template rush is saved: qwen3-32b on 1 of those that fit, at nanjing, at most 200.0 a month, fires by "
        "itself\n"
    )
    said = await proxy.says(*save, "--count", "3", status=1)
    assert "templates.rush.count: 3 are wanted, and 2 standbys fit: xa and nj" in said
    said = await proxy.says("templates", "save", "rush", status=2)
    assert "--model" in said
    assert "rush: qwen3-32b" in await proxy.says("templates", "list")
    assert json.loads(await proxy.says("templates", "show", "rush"))["sla"] == {"ttft": 2.0}
    said = await proxy.says("templates", "run", "rush", "--by", "[/ada]")
    (plan,) = proxy.planning.plans.all()
    assert (plan.standbys, plan.template, plan.reason) == (
        ("nj",),
        "rush",
        "template rush: [/ada] has run it",
    )
    assert f"approve it: tidegate plans approve {plan.id}" in said
    assert plan.reason in await proxy.says("plans", "list"), "it is text, and no markup"
    said = await proxy.says("templates", "run", "rush", status=1)
    assert "all that template 'rush' would start is on, is being started, or has failed" in said
    await proxy.says("templates", "save", "again", "--plan", plan.id)
    assert proxy.planning.templates.find("again").standbys == ["nj"]
    await proxy.says("templates", "delete", "rush")
    said = await proxy.says("templates", "run", "rush", status=1)
    assert "there is no template 'rush'" in said


async def test_an_automatic_template_fires_once_for_a_shortage(start: Start) -> None:
    proxy = await start()
    status, said = await proxy.ask(
        "PUT", "/templates/rush", {"model": "qwen3-32b", "count": 2, "automatic": {"queue": 20}}
    )
    assert status == 200, said
    short = Shortage(queue=19)
    proxy.planning.shortage = lambda model: short  # type: ignore[method-assign]
    await proxy.turn()
    assert len(proxy.planning.plans) == 0
    short = Shortage(queue=20)
    for _ in range(3):
        await proxy.turn()
    (plan,) = proxy.planning.plans.all()
    assert (plan.standbys, plan.reason) == (("xa", "nj"), "template rush: 20 requests wait")
    assert (plan.state, plan.cost_per_hour) == (PlanState.APPROVED, 14.0)
    assert {name for name, _, _ in proxy.planning.wanted()} == {"nj", "xa"}


async def test_a_template_passes_over_what_has_failed(start: Start) -> None:
    proxy = await start()
    failed = Standby("xa", State.FAILED)
    proxy.planning.standby_of = {"xa": failed}.get
    template = {"model": "qwen3-32b", "automatic": {"queue": 1}}
    assert (await proxy.ask("PUT", "/templates/rush", template))[0] == 200
    proxy.planning.shortage = lambda model: Shortage(queue=9)  # type: ignore[method-assign]
    await proxy.turn()
    (plan,) = proxy.planning.plans.all()
    assert plan.standbys == ("nj",), "xa is cheaper, and is not there"


async def test_a_template_pays_for_what_runs_on_its_account(start: Start) -> None:
    proxy = await start()
    template = {"model": "qwen3-32b", "standbys": ["nj"], "budget": 50}
    assert (await proxy.ask("PUT", "/templates/rush", template))[0] == 200
    _, shown = await proxy.ask("POST", "/templates/rush/run", {"by": "ada"})
    assert shown["state"] == "approved"
    nj = Standby("nj")
    await proxy.lives(nj, Event.START, Event.PREPARED, Event.STARTED, plan=shown["id"])
    assert proxy.planning.template_of(shown["id"]) == "rush"
    proxy.pays(50)
    await proxy.turn()
    assert proxy.service.runtime.fleet["nj"].over_budget
    await proxy.lives(nj, Event.STOP, Event.DRAINED, Event.STOPPED)
    assert not proxy.service.runtime.fleet["nj"].over_budget, "it runs on nobody's account now"
    _, found = await proxy.ask("GET", "/budgets")
    assert found["budgets"][0]["used"] == 50.0


# Who may ask


async def test_no_web_page_changes_anything(start: Start) -> None:
    proxy = await start(mode="confirm")
    await proxy.planning.want("nj", STEP)
    (plan,) = proxy.planning.plans.all()
    approve = f"/plans/{plan.id}/approve"
    assert (await proxy.ask("POST", approve, {"by": "x"}, origin="http://localhost"))[0] == 403
    assert (await proxy.ask("POST", approve, {"by": "x"}, **{"content-type": "text/plain"}))[0] == 415
    assert proxy.planning.plans.find(plan.id).state is PlanState.PROPOSED


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "not JSON"),
        (b"[]", 400, "a JSON object"),
        (b"{}", 422, "by: who decides"),
        (b'{"by": "a\\u0007"}', 422, "by: who decides"),
        (b'{"by": "a", "reason": 1}', 422, "reason: at most"),
        (b" " * 70_000, 413, "a body may have"),
    ],
)
async def test_a_bad_body_is_named(start: Start, body: bytes, status: int, said: str) -> None:
    proxy = await start(mode="confirm")
    await proxy.planning.want("nj", STEP)
    (plan,) = proxy.planning.plans.all()
    found, answer = await proxy.ask("POST", f"/plans/{plan.id}/refuse", body)
    assert (found, said in answer["error"]["message"]) == (status, True)


def test_what_is_over_its_budget_gets_nothing_new() -> None:
    fleet = Fleet([Backend("nj", "nanjing", 8, models=frozenset({"m"}))])
    fleet.refresh(0.0)
    assert fleet["nj"].available
    fleet["nj"].over_budget = True
    assert fleet.refresh(1.0)
    assert not fleet["nj"].available
    fleet["nj"].over_budget = False
    fleet.refresh(2.0)
    assert fleet["nj"].available
