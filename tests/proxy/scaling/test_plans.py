"""The store of plans: on the disk before it counts, one at a time, whole after any end."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policies.plans import Plan, PlanEvent, PlanState
from proxy.scaling import plans as module
from proxy.scaling.plans import ConflictError, Plans, UnknownPlanError, new_id
from tests.policies.test_plans import a_plan


class AtOnce(Executor):
    """Writes in the thread that asks."""

    def submit(self, task: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(task(*arguments, **named))
        except OSError as error:
            future.set_exception(error)
        return future


class Store:
    """Plans with a clock that the test moves."""

    def __init__(self, folder: Path) -> None:
        self.wall = 1000.0
        self.path = folder / "plans.jsonl"
        self.plans = self.opened()

    def opened(self) -> Plans:
        plans = Plans(self.path, lambda: self.wall, AtOnce())
        plans.open()
        return plans

    def restart(self) -> Plans:
        self.plans.close()
        self.plans = self.opened()
        return self.plans


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    made = Store(tmp_path)
    yield made
    made.plans.close()


async def test_a_plan_is_there_after_every_restart(store: Store) -> None:
    plan = await store.plans.propose(a_plan("nj"))
    assert store.restart().find(plan.id) == plan
    approved = await store.plans.move(plan.id, PlanEvent.APPROVE, "Ada", "go")
    assert store.restart().find(plan.id) == approved
    assert store.plans.find(plan.id).approved_by == "Ada"


async def test_asking_again_makes_no_second_plan(store: Store) -> None:
    first = await store.plans.propose(a_plan("nj", "xa", id="first"))
    again = await asyncio.gather(*(store.plans.propose(a_plan("xa", id=f"no-{n}")) for n in range(5)))
    assert {plan.id for plan in again} == {"first"}
    await store.plans.move(first.id, PlanEvent.REFUSE, "Ada", "")
    assert (await store.plans.propose(a_plan("xa", id="second"))).id == "second"
    assert len(store.restart()) == 2


async def test_of_two_who_approve_at_once_one_does(store: Store) -> None:
    plan = await store.plans.propose(a_plan())
    found = await asyncio.gather(
        *(store.plans.move(plan.id, PlanEvent.APPROVE, who, "") for who in ("Ada", "Bo", "Cy")),
        return_exceptions=True,
    )
    made = [one for one in found if isinstance(one, Plan)]
    assert len(made) == 1
    errors = [one for one in found if isinstance(one, ConflictError)]
    assert len(errors) == 2
    assert str(errors[0]) == f"plan {plan.id} is approved already, by {made[0].approved_by}"
    assert store.path.read_text().count('"approve"') == 1


async def test_who_approves_after_the_end_is_told_of_it(store: Store) -> None:
    plan = await store.plans.propose(a_plan(created=1000.0, expires=1900.0, waits_for="approval"))
    store.wall = 1899.0
    assert await store.plans.expire() == []
    store.wall = 1900.0
    (expired,) = await store.plans.expire()
    assert expired.state is PlanState.EXPIRED
    with pytest.raises(ConflictError, match=r"is expired already, by manager: it waited too long: approval"):
        await store.plans.move(plan.id, PlanEvent.APPROVE, "Ada", "")


async def test_plans_are_found_by_the_beginning_of_their_id(store: Store) -> None:
    for id in ("abcd1234", "abcd9999", "ffff0000"):
        await store.plans.propose(a_plan(f"s-{id}", id=id))
    assert store.plans.find("ffff").id == "ffff0000"
    for id, said in (("abcd", "2 plans begin with"), ("ff", "there is no plan"), ("0", "there is no plan")):
        with pytest.raises(UnknownPlanError, match=said):
            store.plans.find(id)


async def test_a_refusal_is_remembered_until_the_next_plan(store: Store) -> None:
    plan = await store.plans.propose(a_plan())
    await store.plans.move(plan.id, PlanEvent.REFUSE, "Ada", "too dear")
    last = store.restart().latest_refusal("nj")
    assert last is not None
    assert last.id == plan.id
    await store.plans.propose(a_plan(id="later", created=2000.0, expires=3000.0))
    assert store.plans.latest_refusal("nj") is None


# Ends of all kinds


STEPS = st.lists(
    st.tuples(st.sampled_from([*PlanEvent, "propose", "restart"]), st.integers(0, 2)), max_size=14
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS)
async def test_whatever_happens_the_disk_knows_it_and_no_standby_has_two(
    tmp_path: Path, steps: list[tuple[PlanEvent | str, int]]
) -> None:
    (tmp_path / "plans.jsonl").unlink(missing_ok=True)
    store = Store(tmp_path)
    try:
        for number, (what, which) in enumerate(steps):
            if what == "restart":
                before = {plan.id: plan for plan in store.plans.all()}
                assert {plan.id: plan for plan in store.restart().all()} == before
            elif what == "propose":
                await store.plans.propose(a_plan(f"s{which}", id=f"plan-{number}", created=float(number)))
            elif (plan := store.plans.holding(f"s{which}")) is not None:
                assert isinstance(what, PlanEvent)
                try:
                    await store.plans.move(plan.id, what, "somebody", "")
                except ConflictError:
                    assert not plan.may(what)
            held = {name: plan for plan in store.plans.open_plans() for name in plan.standbys}
            assert len(held) == sum(len(plan.standbys) for plan in store.plans.open_plans())
            assert all(store.plans.holding(name) == held.get(name) for name in ("s0", "s1", "s2"))
    finally:
        store.plans.close()


async def test_half_a_line_is_dropped_and_the_rest_stays(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    plan = await store.plans.propose(a_plan())
    whole = store.path.read_bytes()
    await store.plans.move(plan.id, PlanEvent.APPROVE, "Ada", "")
    both = store.path.read_bytes()
    for length in (*range(len(whole), len(both), 97), len(both) - 1):
        store.path.write_bytes(both[:length])
        assert store.restart().find(plan.id).state is PlanState.PROPOSED, length
        assert store.path.read_bytes() == whole, "what follows begins a line of its own"
    assert "was not written to the end" in caplog.text


async def test_a_line_that_is_no_plan_costs_no_other(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    plan = await store.plans.propose(a_plan())
    store.path.write_bytes(b'{"id": 1}\n\xff\n[]\n' + store.path.read_bytes())
    assert store.restart().find(plan.id) == plan
    assert caplog.text.count("cannot be read") == 3


async def test_what_cannot_be_written_has_not_happened(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = await store.plans.propose(a_plan())
    real = os.write

    def full(handle: int, data: bytes) -> int:
        real(handle, data[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module.os, "write", full)
        with pytest.raises(OSError, match="No space"):
            await store.plans.move(plan.id, PlanEvent.APPROVE, "Ada", "")
        assert store.plans.find(plan.id).state is PlanState.PROPOSED
        with pytest.raises(OSError, match="No space"):
            await store.plans.propose(a_plan("xa", id="other"))
    await store.plans.move(plan.id, PlanEvent.APPROVE, "Bo", "")
    assert store.restart().find(plan.id).approved_by == "Bo"
    assert len(store.plans) == 1


async def test_the_file_and_what_is_kept_are_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_PLANS", 5)
    monkeypatch.setattr(module, "MOST_LINES", 25)
    held = await store.plans.propose(a_plan("held", id="held", created=0.0))
    for number in range(60):
        plan = await store.plans.propose(a_plan(id=f"plan-{number}", created=float(number)))
        await store.plans.move(plan.id, PlanEvent.REFUSE, "Ada", "")
        assert len(store.plans) <= 11
        assert store.path.read_bytes().count(b"\n") <= 26
    assert store.restart().find("held") == held, "an open one is never forgotten"
    assert [plan.id for plan in store.plans.all()][:5] == [f"plan-{n}" for n in range(59, 54, -1)]
    assert len(store.plans) == 6


async def test_what_a_template_pays_for_is_not_forgotten_before_the_month_is_over(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT_PLANS", 5)
    paid = await store.plans.propose(a_plan("paid", id="paid", template="rush", created=0.0))
    await store.plans.move(paid.id, PlanEvent.APPROVE, "Ada", "")
    await store.plans.update(paid.id, lambda plan: plan.began_with("paid", 1000.0, ""))
    await store.plans.update(paid.id, lambda plan: plan.stopped_with("paid", 2000.0, ""))

    async def others(first: int) -> None:
        for number in range(first, first + 20):
            plan = await store.plans.propose(a_plan(id=f"plan-{number}"))
            await store.plans.move(plan.id, PlanEvent.REFUSE, "Ada", "")

    await others(0)
    assert store.restart().find("paid").stopped == (("paid", 2000.0),)
    store.wall = 2000.0 + 33 * 86400
    await others(20)
    with pytest.raises(UnknownPlanError):
        store.plans.find("paid")


def test_ids_differ_and_can_be_typed() -> None:
    ids = {new_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(len(id) == 8 and id.isalnum() for id in ids)


async def test_changes_are_told_and_nothing_else(store: Store) -> None:
    told = []
    store.plans.changed = lambda plan: told.append(plan.state)
    plan = await store.plans.propose(a_plan())
    await store.plans.wait_for(plan.id, "the budget of site nanjing")
    await store.plans.move(plan.id, PlanEvent.APPROVE, "ada", "")
    assert told == [PlanState.PROPOSED, PlanState.APPROVED]
