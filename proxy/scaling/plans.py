"""`STATE/plans.jsonl`: every plan, as it stands after each of its moves, on the disk before the move is in force.

The last line of a plan is what a start needs. A line that was being written when the machine failed is dropped, and
so is what it would have led to. Two who decide at once decide one after the other: the second one is told what the
first has made of it.

A standby has one open plan at most: whoever asks again, and the controller does so every second, gets the one that
there is. What somebody has refused is not proposed again for as long as a plan waits.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Final

import orjson

from policies.plans import Plan, PlanEvent, PlanState, plan_from

log = logging.getLogger("tidegate")

PLANS_FILE: Final = "plans.jsonl"
KEPT_PLANS: Final = 1000
"""Of those that have ended."""
MOST_LINES: Final = 5 * KEPT_PLANS
"""The file is written anew when it has more, and twice as many as there are plans."""
COUNTED_S: Final = 32 * 86400.0
"""What a template pays for is counted for so long after its end: a month."""
LEAST_PREFIX: Final = 4
"""Characters of an id that may stand for the whole."""


class PlansError(Exception):
    """A plan cannot be decided over; the message is for the person who asked."""


class UnknownPlanError(PlansError):
    """There is no such plan."""


class ConflictError(PlansError):
    """It is not in a state for that any more, or a ceiling stands against it."""


class Plans:
    """All plans. Belongs to the event loop; one process at a time has the file."""

    def __init__(self, path: Path, wall: Callable[[], float], executor: Executor | None = None) -> None:
        """`executor`: what writes, one after the other; None: a thread."""
        self.path = path
        self._wall = wall
        self._plans: dict[str, Plan] = {}
        self._last: dict[str, str] = {}
        """Id of the last plan of each standby: the open one, if there is one."""
        self._executor = executor or ThreadPoolExecutor(1, "plans")
        self.closed = True
        """Whether nothing can be written: it is not open yet, or not any more."""
        self._handle = -1
        self._lines = 0
        self._one_at_a_time = asyncio.Lock()
        self.changed: Callable[[Plan], None] = lambda plan: None
        """Called with a plan that has come into another state, or was proposed."""

    def open(self) -> None:
        """Read the file, and write it anew with what is still needed. Blocks. Raises OSError."""
        self._plans, self._last = {}, {}
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            data = b""
        lines = data.split(b"\n")
        if lines.pop():
            log.warning("%s: its last line was not written to the end, and is dropped", self.path)
        for number, line in enumerate(lines, 1):
            try:
                plan = plan_from(orjson.loads(line))
            except (ValueError, TypeError, KeyError) as error:
                log.error("%s:%d cannot be read, and is passed over: %r", self.path, number, error)
                continue
            self._plans.pop(plan.id, None)  # the latest stands last
            self._plans[plan.id] = plan
        for plan in sorted(self._plans.values(), key=lambda plan: (plan.open, plan.created)):
            self._note(plan)
        self._forget()
        self._write_anew(self._plans.values())
        self.closed = False

    def close(self) -> None:
        """Wait for what is being written. Blocks."""
        self.closed = True
        self._executor.shutdown(wait=True)
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    # What there is

    def __len__(self) -> int:
        return len(self._plans)

    def all(self) -> list[Plan]:
        """The newest first."""
        return sorted(self._plans.values(), key=lambda plan: plan.created, reverse=True)

    def on_accounts(self) -> list[Plan]:
        """Those that templates pay for, or have paid for."""
        return [plan for plan in self._plans.values() if plan.template and plan.started]

    def template_of(self, id: str) -> str:
        """Whose account a plan is on; empty: no template's, or there is no such plan."""
        return self._plans[id].template if id in self._plans else ""

    def open_plans(self) -> list[Plan]:
        """Those that hold standbys, the oldest first."""
        return sorted((plan for plan in self._plans.values() if plan.open), key=lambda plan: plan.created)

    def holding(self, standby: str) -> Plan | None:
        """The open plan of a standby."""
        plan = self._plans.get(self._last.get(standby, ""))
        return plan if plan is not None and plan.open else None

    def latest_refusal(self, standby: str) -> Plan | None:
        """The last plan of a standby, if somebody has refused it."""
        last = self._plans.get(self._last.get(standby, ""))
        return last if last is not None and last.state is PlanState.REFUSED else None

    def find(self, id: str) -> Plan:
        """By its id, or by the beginning of it that only it has. Raises UnknownPlanError."""
        if id in self._plans:
            return self._plans[id]
        found = [plan for name, plan in self._plans.items() if name.startswith(id)]
        if len(found) == 1 and len(id) >= LEAST_PREFIX:
            return found[0]
        if len(found) > 1 and len(id) >= LEAST_PREFIX:
            raise UnknownPlanError(f"{len(found)} plans begin with {id}: write more of the id")
        raise UnknownPlanError(
            f"there is no plan {id[:64]}: `tidegate plans list` shows those that there are"
        )

    # What becomes of them

    async def propose(self, plan: Plan) -> Plan:
        """Write a new plan; the one that already holds one of its standbys is returned in its place.

        Raises OSError: it could not be written, and there is none.
        """
        async with self._one_at_a_time:
            for standby in plan.standbys:
                if (held := self.holding(standby)) is not None:
                    return held
            await self._put(plan)
            return plan

    async def move(self, id: str, event: PlanEvent, by: str, reason: str) -> Plan:
        """Make a move. Raises ConflictError: its state has no such move; UnknownPlanError, OSError."""
        async with self._one_at_a_time:
            plan = self.find(id)
            after = plan.moved(event, by, reason, self._wall())
            if after is None:
                raise ConflictError(f"plan {plan.id} is {_stands(plan)}")
            await self._put(after)
            return after

    async def update(self, id: str, change: Callable[[Plan], Plan | None]) -> Plan | None:
        """Write what `change` makes of a plan; None: nothing, or there is no such plan. Raises OSError."""
        async with self._one_at_a_time:
            plan = self._plans.get(id)
            after = None if plan is None else change(plan)
            if after is None or after == plan:
                return None
            await self._put(after)
            return after

    async def wait_for(self, id: str, what: str) -> None:
        """Note what a proposed plan waits for. Raises OSError."""
        await self.update(
            id, lambda plan: replace(plan, waits_for=what) if plan.state is PlanState.PROPOSED else None
        )

    async def expire(self, invalid: Callable[[Plan], str] = lambda plan: "") -> list[Plan]:
        """End those that have waited too long, or do not hold any more. `invalid`: why. Raises OSError."""

        def expired(plan: Plan) -> Plan | None:
            wall = self._wall()
            reason = f"it waited too long: {plan.waiting}" if plan.is_due(wall) else invalid(plan)
            return plan.moved(PlanEvent.EXPIRE, "manager", reason, wall) if reason else None

        found = [await self.update(plan.id, expired) for plan in self.open_plans()]
        return [plan for plan in found if plan is not None]

    # On the disk

    async def _put(self, plan: Plan) -> None:
        if self.closed:
            raise ConflictError("another process decides over plans now: ask again")
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._executor, self._append, plan)
        before = self._plans.pop(plan.id, None)
        self._plans[plan.id] = plan
        if before is None:
            self._note(plan)
        if len(self._plans) > 2 * KEPT_PLANS:
            self._forget()
        if before is None or before.state is not plan.state:
            self.changed(plan)

    def _forget(self) -> None:
        """Keep the open ones, those that their template has to pay for, and the last that have ended."""
        since = self._wall() - COUNTED_S
        ended = [id for id, plan in self._plans.items() if not plan.open and not plan.is_paid_for(since)]
        for id in ended[:-KEPT_PLANS]:
            del self._plans[id]
        self._last = {name: id for name, id in self._last.items() if id in self._plans}

    def _note(self, plan: Plan) -> None:
        self._last |= dict.fromkeys(plan.standbys, plan.id)

    def _append(self, plan: Plan) -> None:
        """In the writing thread."""
        try:
            if self._handle < 0 or self._lines >= max(MOST_LINES, 2 * len(self._plans)):
                others = [other for other in self._plans.values() if other.id != plan.id]
                self._write_anew([*others, plan])
            else:
                _write_all(self._handle, _line(plan))
                os.fdatasync(self._handle)
                self._lines += 1
        except OSError:
            # Nobody knows what of the file has reached the disk: the next one writes it anew.
            if self._handle >= 0:
                os.close(self._handle)
                self._handle = -1
            raise

    def _write_anew(self, plans: Iterable[Plan]) -> None:
        """Whole or not at all."""
        lines = [_line(plan) for plan in plans]
        new = self.path.with_suffix(".new")
        handle = os.open(new, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC | os.O_APPEND, 0o600)
        try:
            _write_all(handle, b"".join(lines))
            os.fsync(handle)
            os.replace(new, self.path)
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except BaseException:
            os.close(handle)
            raise
        if self._handle >= 0:
            os.close(self._handle)
        self._handle, self._lines = handle, len(lines)


def new_id() -> str:
    """An id that nobody has had; short, since it is typed."""
    return secrets.token_hex(4)


def _stands(plan: Plan) -> str:
    """`approved by Ada already`."""
    if not plan.decisions:
        return f"still {plan.state}"
    last = plan.decisions[-1]
    return f"{plan.state} already, by {last.by}" + (f": {last.reason}" if last.reason else "")


def _line(plan: Plan) -> bytes:
    return orjson.dumps(plan.as_dict(), option=orjson.OPT_APPEND_NEWLINE)


def _write_all(handle: int, data: bytes) -> None:
    while data:
        data = data[os.write(handle, data) :]
