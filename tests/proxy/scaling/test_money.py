"""Ceilings in the running proxy: what they drain, what they keep from being started, and what nobody knows."""

from __future__ import annotations

import logging
import time

import pytest
from sqlalchemy.exc import OperationalError

from policies.plans import PlanState, Trigger
from policies.standby import Event, Standby
from proxy.scaling.seams import NotPossibleError
from tests.proxy.scaling.planned import STEP, Start


async def test_a_start_by_hand_that_a_ceiling_forbids_stands_in_nobodys_way(start: Start) -> None:
    proxy = await start(budgets={"sites": {"nanjing": 5}})
    with pytest.raises(NotPossibleError, match=r"raise scaling\.budgets\.sites\.nanjing first"):
        await proxy.planning.by_hand("nj", "ada")
    (plan,) = proxy.planning.plans.all()
    assert (plan.trigger, plan.state) == (Trigger.HAND, PlanState.EXPIRED)
    proxy.uses(budgets={"sites": {"nanjing": 50}})
    await proxy.turn()
    assert await proxy.planning.want("nj", STEP) is not None


async def test_a_start_by_hand_approves_nothing_besides(start: Start) -> None:
    proxy = await start(mode="confirm")
    template = {"model": "qwen3-32b", "standbys": ["nj", "xa"]}
    assert (await proxy.ask("PUT", "/templates/both", template))[0] == 200
    _, both = await proxy.ask("POST", "/templates/both/run", {"by": "ada"})
    with pytest.raises(NotPossibleError, match=f"plan {both['id']} waits, to start xa and nj: approve or"):
        await proxy.planning.by_hand("nj", "bo")
    assert proxy.planning.wanted() == []
    await proxy.planning.refuse(both["id"], "ada")
    id = await proxy.planning.by_hand("nj", "bo")
    assert proxy.planning.plans.find(id).approved_by == "bo"
    assert [name for name, _, _ in proxy.planning.wanted()] == ["nj"]


async def test_a_start_by_hand_while_another_process_decides_is_refused(start: Start) -> None:
    proxy = await start()
    proxy.planning.hand_over()
    with pytest.raises(NotPossibleError, match="another process decides"):
        await proxy.planning.by_hand("nj", "ada")
    assert await proxy.planning.want("nj", STEP) is None


async def test_nothing_is_begun_while_nobody_knows_what_the_month_has_cost(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = await start()
    away = OperationalError("SELECT", {}, Exception("the database is away"))

    def fails(*_: object) -> None:
        raise away

    with monkeypatch.context() as patched:
        patched.setattr(proxy.planning.spending, "read", fails)
        proxy.uses(budgets={"sites": {"nanjing": 100}})
        await proxy.turn()
        assert await proxy.planning.want("nj", STEP) is None
        assert await proxy.planning.want("xa", STEP) is not None, "it has no ceiling"
        plan = proxy.planning.plans.holding("nj")
        assert plan is not None
        assert plan.waits_for == "what this month has cost cannot be read"
        status, said = await proxy.ask("POST", f"/plans/{plan.id}/approve", {"by": "ada"})
        assert (status, said["error"]["message"]) == (
            409,
            "what this month has cost cannot be read; it is tried again",
        )
        for later in (10.0, 11.0, 16.0):  # it is not tried at every turn
            proxy.service.runtime.now = lambda later=later: time.monotonic() + later
            await proxy.turn()
            assert "the database is away" in proxy.planning.shown()["trouble"]
        assert caplog.text.count("the database is away") == 1, "the log has it once, as long as it stays"
    proxy.service.runtime.now = lambda: time.monotonic() + 30.0
    await proxy.turn()
    assert await proxy.planning.want("nj", STEP) == plan.id
    proxy.service.runtime.now = lambda: time.monotonic() + 30.0 + 3600.0
    assert not proxy.planning.money.known, "an hour ago"


async def test_what_was_approved_is_not_begun_at_a_ceiling(start: Start) -> None:
    proxy = await start(budgets={"sites": {"nanjing": 100}})
    id = await proxy.planning.want("nj", STEP)
    assert [plan for _, plan, _ in proxy.planning.wanted()] == [id]
    proxy.pays(100)
    await proxy.turn()
    assert proxy.planning.wanted() == []
    assert proxy.planning.may_start("nj", STEP) is None


async def test_what_drains_at_the_ceiling_of_its_template_is_not_taken_back(start: Start) -> None:
    proxy = await start()
    template = {"model": "qwen3-32b", "standbys": ["nj"], "budget": 50}
    assert (await proxy.ask("PUT", "/templates/rush", template))[0] == 200
    _, plan = await proxy.ask("POST", "/templates/rush/run", {"by": "ada"})
    nj = Standby("nj")
    await proxy.lives(nj, Event.START, Event.PREPARED, Event.STARTED, plan=plan["id"])
    proxy.pays(50)
    await proxy.turn()
    await proxy.lives(nj, Event.STOP)
    assert not proxy.planning.allowed("nj"), "or the controller takes it back as soon as it drains"
    await proxy.lives(nj, Event.DRAINED, Event.STOPPED)
    assert proxy.planning.allowed("nj")


async def test_a_template_that_is_new_has_its_ceiling_at_once(start: Start) -> None:
    proxy = await start()
    template = {"model": "qwen3-32b", "standbys": ["nj"], "budget": 5}
    assert (await proxy.ask("PUT", "/templates/rush", template))[0] == 200
    _, plan = await proxy.ask("POST", "/templates/rush/run", {"by": "ada"})
    hour = "the budget of template rush: 0.0000 of 5.0000 CNY used, and an hour of it costs 10.0000"
    assert plan["waits_for"] == hour


async def test_a_backend_that_a_reload_makes_anew_gets_nothing_at_a_ceiling(start: Start) -> None:
    proxy = await start(budgets={"sites": {"nanjing": 100}})
    proxy.pays(100)
    await proxy.turn()
    nj = proxy.service.runtime.fleet["nj"]
    nj.over_budget = False  # as of one with another URL
    proxy.uses()
    assert nj.over_budget


async def test_who_wants_to_be_asked_is_asked_of_what_waits_for_money(start: Start) -> None:
    proxy = await start(budgets={"month": 5})
    assert await proxy.planning.want("nj", STEP) is None
    proxy.uses(mode="confirm", budgets={"month": 50})
    await proxy.turn()
    (plan,) = proxy.planning.plans.all()
    assert (plan.state, plan.waits_for) == (PlanState.PROPOSED, "approval")


async def test_what_waits_for_money_is_written_once_and_not_with_every_request(start: Start) -> None:
    proxy = await start(budgets={"sites": {"nanjing": 100}})
    proxy.pays(95)
    assert await proxy.planning.want("nj", STEP) is None
    written = proxy.planning.plans.path.read_bytes()
    proxy.pays(1)
    await proxy.turn()
    assert proxy.planning.plans.path.read_bytes() == written


async def test_what_has_begun_cannot_be_refused(start: Start) -> None:
    proxy = await start()
    id = await proxy.planning.want("nj", STEP)
    assert id is not None
    move = Standby("nj").move(Event.START, "it is wanted", time.time(), id)
    assert move is not None
    proxy.planning.moved(move)
    status, said = await proxy.ask("POST", f"/plans/{id}/refuse", {"by": "ada"})
    assert (status, said["error"]["message"]) == (
        409,
        f"plan {id} is executing already, by manager: it is wanted",
    )


async def test_templates_that_cannot_work_are_told_of(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    proxy = await start()
    proxy.planning.templates.path.write_text(
        "templates:\n  good: {model: qwen3-32b}\n  bad: {model: qwen3-32b, sites: [xi-an]}\n"
    )
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            await proxy.turn()
    assert caplog.text.count("templates.yaml:3:35: templates.bad.sites[0]: there is no site 'xi-an'") == 1
    assert "there is no site 'xi-an'" in proxy.planning.shown()["trouble"]
    said = await proxy.says("templates", "list")
    assert "good: qwen3-32b" in said
    assert "warning: some cannot work as things are:\n" in said
    assert (await proxy.ask("POST", "/templates/good/run", {"by": "ada"}))[0] == 200
