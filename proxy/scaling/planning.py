"""The admin in control: what may be started, by whose word, and within which money.

The manager of standbys asks `may_start` before it starts anything that the controller wants, starts what `wanted`
says, and reports every move (`moved`). Admins approve, refuse and run plans; templates fire by themselves; ceilings
drain what has reached them. All of it is one object, which belongs to the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.exc import SQLAlchemyError

from policies.match import LOCAL
from policies.plans import AUTO, CONFIRM, Plan, PlanEvent, PlanState, Trigger
from policies.scaling import Step
from policies.standby import Event, Move, State
from policies.units import BadValueError
from policies.yamlfile import FileProblems
from proxy.access.shared import SHARE
from proxy.config import Config
from proxy.config_values import time_zone
from proxy.database import said
from proxy.scaling.accounts import accounts, running_for, shortage
from proxy.scaling.budgets import NANO, SITE, TOLD_FILE, Budgets, Used, ceilings, nano_of
from proxy.scaling.hours import spent
from proxy.scaling.images import Images, load_images
from proxy.scaling.notices import Notices
from proxy.scaling.offers import Offer, draft, offers
from proxy.scaling.plans import PLANS_FILE, ConflictError, Plans, PlansError, new_id
from proxy.scaling.planwords import in_words
from proxy.scaling.seams import NotPossibleError
from proxy.scaling.spending import Span, TokenSpending
from proxy.scaling.templates import TEMPLATES_FILE, Shortage, Template, Templates, choose, fires, sites_of

if TYPE_CHECKING:
    from proxy.runtime import Runtime

log = logging.getLogger("tidegate")

TURN_S: Final = 1.0
LOOK_S: Final = 5.0
"""How often costs are read: hours of capacity, and what other proxies have spent."""


class Planning:
    """Plans, templates and budgets of one proxy."""

    def __init__(self, runtime: Runtime, spending: TokenSpending) -> None:
        """`spending` counts the rows of the runtime's ledger."""
        config = runtime.config
        self.runtime = runtime
        self.spending = spending
        self.plans = Plans(config.state / PLANS_FILE, runtime.wall)
        self.plans.changed = self._plan_changed
        self.templates = Templates(config.state / TEMPLATES_FILE)
        self.budgets = Budgets(
            spending,
            time_zone(config.budget_zone),
            config.state / TOLD_FILE,
            self._capacity,
            self._tell_budget,
        )
        self.budgets.running = lambda template: running_for(self.plans.all(), template)
        self.state_of: Callable[[str], State | None] = lambda name: None
        """State of a standby; None: not known. Set by the manager."""
        self.approved: Callable[[], None] = lambda: None
        """Called when something may start. Set by the manager."""
        self.offers: dict[str, Offer] = {}
        self.images = Images(())
        self._approval: Notices | None = None
        self._budget_notices: Notices | None = None
        self._hours: dict[tuple[str, str], int] = {}
        """What hours of capacity have cost at the last look, nano-units by site and template."""
        self._moves: deque[Move] = deque(maxlen=10_000)
        self._read_at = 0.0
        self._turning = asyncio.Lock()
        self._asking: set[str] = set()
        """Standbys of which a plan is being proposed."""
        self._trouble = ""
        self.use(config)

    # Its life

    def use(self, config: Config) -> None:
        """Go by another configuration, or by other standbys of it."""
        self.config = config
        try:
            self.images = load_images(config.scaling.images)
        except (OSError, ValueError, FileProblems) as error:  # `unworkable` refuses it; a file may go later
            log.error("images: %s", error)
        self.offers = offers(config, self.images)
        self._approval = self._notices(self._approval, config.scaling.approval_webhook)
        self._budget_notices = self._notices(self._budget_notices, config.scaling.budgets.webhook)
        if self.spending.currency != config.ledger_currency:
            self.spending.currency = config.ledger_currency
            self._read_at = 0.0
        self._set_ceilings()

    def _notices(self, before: Notices | None, section: Any) -> Notices | None:
        if before is not None and before.section == section:
            return before
        if before is not None:
            self.runtime.tasks.spawn(before.close(), "notices")
        try:
            return None if section is None else Notices(section, self.runtime.tasks.spawn, self.runtime.wall)
        except BadValueError as error:
            log.error("notices: %s", error)
            return None

    @classmethod
    async def opened(cls, runtime: Runtime, spending: TokenSpending) -> Planning:
        """One that runs until the tasks of the runtime are cancelled. Raises as `open` does."""
        planning = cls(runtime, spending)
        await planning.open()
        runtime.tasks.spawn(planning.run(), "plans")
        return planning

    async def open(self) -> None:
        """Read what is on the disk and in the ledger. Raises OSError and SQLAlchemy's errors."""
        await asyncio.to_thread(self.plans.open)
        self.templates.look()
        self._set_ceilings()
        if self.budgets.ceilings:
            await self._read()

    async def run(self) -> None:
        """Turn, again and again, until it is cancelled; then close."""
        try:
            while True:
                try:
                    await self.turn()
                except OSError as error:
                    self._say(f"plans cannot be written: {error.strerror or error}")
                except Exception:
                    log.exception("plans: this turn failed")
                await asyncio.sleep(TURN_S)
        finally:
            await self.close()

    async def close(self) -> None:
        """Let connections and the file go."""
        for notices in (self._approval, self._budget_notices):
            if notices is not None:
                await notices.close()
        await asyncio.to_thread(self.plans.close)

    async def turn(self) -> None:
        """What goes on all the time: moves, ends of waits, money, templates."""
        async with self._turning:
            await self._turn()

    async def _turn(self) -> None:
        if self.templates.look():
            if self.templates.trouble:
                log.error("templates: the old ones go on:\n%s", self.templates.trouble)
            self._set_ceilings()
        while self._moves:
            await self._take(self._moves[0])
            self._moves.popleft()
        await self.plans.expire()
        await self._look_at_costs()
        self.budgets.turn()
        self._drain()
        for plan in self.plans.open_plans():
            await self._look_again(plan)
        await self._fire()
        self._say("")

    def _say(self, trouble: str) -> None:
        if trouble and trouble != self._trouble:
            log.error("%s", trouble)
        self._trouble = trouble

    # What the manager asks

    def allowed(self, name: str) -> bool:
        """Whether the controller may count on this standby: not where a ceiling is reached, or somebody said no."""
        offer = self.offers.get(name)
        if offer is None or self.budgets.reached(offer.site) is not None:
            return False
        refused = self.plans.latest_refusal(name)
        if refused is None or self.plans.holding(name) is not None:
            return True
        age = self.runtime.wall() - refused.decisions[-1].wall
        return not 0.0 <= age < self.config.scaling.approval

    def may_start(self, name: str, step: Step) -> str | None:
        """The id of the approved plan that pays for starting a standby; None: not now.

        Where there is none, one is proposed meanwhile, and `approved` called when it may start: at once in mode
        `auto`, unless a ceiling is in the way. Asking again changes nothing. Not to be asked for a standby that
        drains: its run is paid for.
        """
        plan = self.plans.holding(name)
        if plan is not None and plan.state is not PlanState.PROPOSED:
            return plan.id
        if plan is None and name not in self._asking and self.allowed(name):
            self._asking.add(name)
            self.runtime.tasks.spawn(self._asked(name, step), f"plan for {name}")
        return None

    async def _asked(self, name: str, step: Step) -> None:
        try:
            await self.want(name, step)
        finally:
            self._asking.discard(name)

    async def want(self, name: str, step: Step) -> str | None:
        """As `may_start`, with what comes of a proposal."""
        if not self.allowed(name):
            return None
        plan = self.plans.holding(name)
        try:
            if plan is None:
                offer = self.offers[name]
                plan = await self.propose([offer], Trigger.CONTROLLER, step.reason, figures=step.figures)
            plan = await self._look_again(plan) or plan
        except OSError as error:
            self._say(f"plans cannot be written, so nothing is started: {error.strerror or error}")
            return None
        return plan.id if plan.state in (PlanState.APPROVED, PlanState.EXECUTING) else None

    def wanted(self) -> list[tuple[str, str, str]]:
        """Standbys that approved plans are to start and have not yet: name, id of the plan, reason."""
        found = []
        for plan in self.plans.open_plans():
            if plan.state is not PlanState.PROPOSED:
                done = {*plan.ready, *dict(plan.stopped)}
                for name in plan.standbys:
                    if name not in done and self.state_of(name) in (None, State.STANDBY):
                        found.append((name, plan.id, plan.reason))
        return found

    def moved(self, move: Move) -> None:
        """A standby has made a move; what it means for its plan is written with the next turn."""
        if move.plan:
            self._moves.append(move)

    def template_of(self, plan_id: str) -> str:
        """Whose account a plan is on; empty: no template's."""
        return next((plan.template for plan in self.plans.all() if plan.id == plan_id), "")

    # What admins and templates ask

    async def propose(
        self,
        chosen: Sequence[Offer],
        trigger: Trigger,
        reason: str,
        *,
        figures: Mapping[str, float] | None = None,
        template: str = "",
        mode: str = "",
    ) -> Plan:
        """Write a plan; the open one of one of its standbys is returned in its place. Raises OSError."""
        left = [nano for one in chosen if (nano := self.budgets.left(one.site, template)) is not None]
        plan = draft(
            chosen,
            id=new_id(),
            trigger=trigger,
            reason=reason,
            mode=mode or self.config.scaling.mode,
            created=self.runtime.wall(),
            waits_s=self.config.scaling.approval,
            budget_left=min(left) / NANO if left else None,
            figures=dict(figures or {}),
            template=template,
        )
        plan = replace(plan, waits_for=self._waits_for(plan))
        made = await self.plans.propose(plan)
        if made.id == plan.id:
            log.info("plan %s: %s, since %s", plan.id, in_words(plan, self.spending.currency), reason)
            after = await self._look_again(made)
            if after is None and self._approval is not None:
                self._approval.tell("plan.proposed", made.as_dict())
            made = after or made
        return made

    async def approve(self, id: str, by: str, reason: str = "") -> Plan:
        """Raises UnknownPlanError; ConflictError: it is decided, or a ceiling stands against it; OSError."""
        plan = self.plans.find(id)
        if plan.state is PlanState.PROPOSED and (against := self._against(plan)) is not None:
            words = against.in_words(self.spending.currency)
            raise ConflictError(f"{words}, and a plan needs an hour of it: raise {against.ceiling.key} first")
        if plan.is_due(self.runtime.wall()):
            await self.plans.expire()
        return await self.plans.move(plan.id, PlanEvent.APPROVE, by, reason)

    async def refuse(self, id: str, by: str, reason: str = "") -> Plan:
        """Raises as `approve` does."""
        return await self.plans.move(self.plans.find(id).id, PlanEvent.REFUSE, by, reason)

    async def run_template(self, name: str, by: str) -> Plan:
        """Make a plan of a template. In mode `confirm` it waits as any other.

        Raises KeyError: there is none; BadValueError: it cannot work; ConflictError: what it would start is on.
        """
        template = self.templates.find(name)
        chosen = self._startable(template)
        if not chosen:
            raise ConflictError(f"all that template '{name}' would start is on, or is being started")
        return await self._of_template(name, template, chosen, f"{by} has run it")

    async def by_hand(self, name: str, by: str) -> str:
        """The id of a plan for a standby that somebody starts by hand, approved by that. Raises OSError;
        NotPossibleError: a ceiling stands against it."""
        offer = self.offers.get(name)
        if offer is None:
            return ""
        plan = await self.propose([offer], Trigger.HAND, f"{by} has started it", mode=CONFIRM)
        if plan.state is PlanState.PROPOSED:
            try:
                plan = await self.approve(plan.id, by)
            except PlansError as error:
                raise NotPossibleError(str(error)) from None
        return plan.id

    def shortage(self, model: str) -> Shortage:
        """How short of capacity the local backends of a model are."""
        return shortage(self.runtime.fleet, self.runtime.valve, model, self.runtime.now())

    # Plans

    def _plan_changed(self, plan: Plan) -> None:
        if plan.decisions:
            last = plan.decisions[-1]
            why = f": {last.reason}" if last.reason else ""
            log.info("plan %s is %s, by %s%s", plan.id, plan.state, last.by, why)
        if plan.state is PlanState.APPROVED:
            self.approved()

    async def _look_again(self, plan: Plan) -> Plan | None:
        """Approve a plan in mode `auto` that is within budget, or note what it waits for. None: as it was."""
        if plan.state is PlanState.EXECUTING:
            return await self._abandon(plan)
        if plan.state is not PlanState.PROPOSED:
            return None
        waits_for = self._waits_for(plan)
        if not waits_for:
            try:
                return await self.plans.move(plan.id, PlanEvent.APPROVE, AUTO, "within budget")
            except ConflictError:
                return self.plans.find(plan.id)  # somebody was faster
        if waits_for != plan.waits_for:
            await self.plans.wait_for(plan.id, waits_for)
        return None

    async def _abandon(self, plan: Plan) -> Plan | None:
        """End a plan whose standbys all stand by again although nobody said so: a move got lost in a crash."""
        states = {self.state_of(name) for name in plan.standbys}
        if states != {State.STANDBY} or self._moves:
            return None
        gone = "its standbys stand by"
        return await self.plans.update(
            plan.id, lambda one: one.moved(PlanEvent.EXPIRE, "manager", gone, self.runtime.wall())
        )

    def _waits_for(self, plan: Plan) -> str:
        """Empty: nothing."""
        if (against := self._against(plan)) is not None:
            return against.in_words(self.spending.currency)
        return "approval" if plan.mode == CONFIRM else ""

    def _against(self, plan: Plan) -> Used | None:
        """The ceiling without room for an hour of what it starts."""
        of = [self.offers[name] for name in plan.standbys if name in self.offers]
        return self.budgets.refuses(
            ((one.site, nano_of(one.cost_per_hour or 0.0)) for one in of), plan.template
        )

    async def _take(self, move: Move) -> None:
        """What a move of a standby means for its plan. Raises OSError."""
        name, wall, reason = move.name, move.wall, move.reason
        if move.after is State.PREPARING:
            await self.plans.update(move.plan, lambda plan: plan.began_with(name, wall, reason))
        elif move.after is State.READY and move.event is Event.STARTED:
            await self.plans.update(move.plan, lambda plan: _begun(plan, name, wall).ready_with(name, wall))
        elif move.event is Event.FAIL:
            words = f"{name}: {reason}"
            await self.plans.update(
                move.plan, lambda plan: plan.moved(PlanEvent.FAIL, "manager", words, wall)
            )
        elif move.after is State.STANDBY:
            await self.plans.update(
                move.plan, lambda plan: plan.stopped_with(name, wall, f"{name}: {reason}")
            )

    # Templates

    def _startable(self, template: Template) -> list[Offer]:
        """Of what it comes to, what is off. Raises BadValueError."""
        chosen = choose(template, self.offers, sites_of(self.config))
        return [
            one
            for one in chosen
            if self.plans.holding(one.name) is None and self.state_of(one.name) in (None, State.STANDBY)
        ]

    async def _of_template(self, name: str, template: Template, chosen: list[Offer], reason: str) -> Plan:
        mode = template.mode or ""
        return await self.propose(
            chosen, Trigger.TEMPLATE, f"template {name}: {reason}", template=name, mode=mode
        )

    async def _fire(self) -> None:
        """Run the templates whose time has come."""
        for name, template in self.templates.all().items():
            if template.automatic is None:
                continue
            why = fires(template.automatic, self.shortage(template.model))
            if not why:
                continue
            try:
                chosen = [one for one in self._startable(template) if self.allowed(one.name)]
            except BadValueError as error:
                self._say(f"template {name} cannot fire: {error.message}")
                continue
            if chosen:
                await self._of_template(name, template, chosen, why)

    # Money

    def _set_ceilings(self) -> None:
        section = self.config.scaling.budgets
        of_templates = {name: template.budget for name, template in self.templates.all().items()}
        self.budgets.ceilings = ceilings(section.month, section.sites, of_templates)

    async def _read(self) -> None:
        """Raises SQLAlchemy's errors."""
        began = time.monotonic()
        await asyncio.to_thread(self._read_costs, self.runtime.wall(), accounts(self.plans.all()))
        self._read_at = self.runtime.now() + max(LOOK_S, SHARE * (time.monotonic() - began))

    def _read_costs(self, wall: float, of: dict[str, Sequence[Span]]) -> None:
        """Blocks."""
        spending = self.spending
        spending.read(wall, of)
        wanted = {("", ""), (LOCAL, "")}
        for ceiling in self.budgets.ceilings:
            wanted.add((ceiling.name, "") if ceiling.scope == SITE else ("", ceiling.name))
        engine, begin, end = self.runtime.ledger.engine, spending.begin, spending.end
        self._hours = {key: spent(engine, key[0] or None, begin, end, key[1] or None) for key in wanted}

    def _capacity(self, site: str, template: str, month_begin: float) -> int:
        return self._hours.get((site, template), 0)

    async def _look_at_costs(self) -> None:
        over = self.runtime.wall() >= self.spending.end
        if not self.budgets.ceilings or (self.runtime.now() < self._read_at and not over):
            return
        try:
            await self._read()
        except SQLAlchemyError as error:
            self._say(f"budgets: what this month has cost cannot be read: {said(error)}")

    def _drain(self) -> None:
        """Take what has reached its ceiling from those that get requests, and give back what has not."""
        runtime = self.runtime
        accounts: dict[str, str] = {}
        for used in self.budgets.used():
            if used.ceiling.scope == "template" and used.reached:
                accounts |= dict.fromkeys(self.budgets.running(used.ceiling.name), used.ceiling.name)
        changed = False
        for backend in runtime.fleet:
            over = self.budgets.reached(backend.site, accounts.get(backend.name, "")) is not None
            if over != backend.over_budget:
                backend.over_budget, changed = over, True
                words = "gets nothing new: its budget is used up" if over else "takes requests again"
                log.warning("backend %s %s", backend.name, words)
        if changed:
            now = runtime.now()
            runtime.fleet.refresh(now)
            runtime.poll(now)

    def _tell_budget(self, words: str, figures: dict[str, Any]) -> None:
        if self._budget_notices is not None:
            self._budget_notices.tell("budget.reached", {"message": words, **figures})

    @property
    def approval_secrets(self) -> tuple[bytes, ...]:
        """That sign answers to plans; empty: nobody is asked."""
        return () if self._approval is None else self._approval.secrets

    def shown(self) -> dict[str, Any]:
        """For `/state`."""
        return {
            "mode": self.config.scaling.mode,
            "waiting": sum(plan.state is PlanState.PROPOSED for plan in self.plans.open_plans()),
            "open": [plan.id for plan in self.plans.open_plans()],
            "budgets": [self.budgets.shown(used) for used in self.budgets.used()],
            "trouble": self._trouble or self.templates.trouble,
        }


def _begun(plan: Plan, name: str, wall: float) -> Plan:
    """The plan, executed: its first move may have got lost in a crash."""
    return plan.began_with(name, wall, "") or plan
