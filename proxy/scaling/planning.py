"""The admin in control: what may be started, by whose word, and within which money.

The manager of standbys asks `may_start` before it starts anything that the controller wants, starts what `wanted`
says, and reports every move (`moved`). Admins approve, refuse and run plans; templates fire by themselves; ceilings
drain what has reached them. All of it is one object, which belongs to the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from policies.plans import AUTO, CONFIRM, Plan, PlanEvent, PlanState, Trigger
from policies.scaling import Step
from policies.standby import Move, Standby, State
from policies.units import BadValueError
from policies.yamlfile import FileProblems
from proxy.config import Config
from proxy.scaling.accounts import room, shortage
from proxy.scaling.budgets import NANO, nano_of
from proxy.scaling.filelock import FileLock
from proxy.scaling.images import Images, load_images
from proxy.scaling.money import Money
from proxy.scaling.notices import Notices, notices
from proxy.scaling.offers import Offer, draft, offers
from proxy.scaling.plans import PLANS_FILE, ConflictError, Plans, PlansError, new_id
from proxy.scaling.planwords import in_words
from proxy.scaling.seams import NotPossibleError
from proxy.scaling.spending import TokenSpending
from proxy.scaling.templates import TEMPLATES_FILE, Shortage, Template, Templates, choose, fires, sites_of

if TYPE_CHECKING:
    from proxy.runtime import Runtime

log = logging.getLogger("tidegate")

TURN_S: Final = 1.0
LOCK_FILE: Final = "plans.lock"
LOCK_LOOK_S: Final = 0.1


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
        self.money = Money(runtime, spending, self._tell_budget, self.plans.on_accounts)
        self.budgets = self.money.budgets
        self.standby_of: Callable[[str], Standby | None] = lambda name: None
        """A standby as it stands; None: not known. Set by the manager."""
        self.approved: Callable[[], None] = lambda: None
        """Called when something may start. Set by the manager."""
        self.offers: dict[str, Offer] = {}
        self.images = Images(())
        self._approval: Notices | None = None
        self._budget_notices: Notices | None = None
        self._moves: deque[Move] = deque(maxlen=10_000)
        self._turning = asyncio.Lock()
        self._following = asyncio.Lock()
        self._all_seen = False
        """Whether plans that have ended know where their standbys are: of what happened before a crash."""
        self._used_version = 0
        """Of the templates."""
        self._unworkable = ""
        """What of them cannot work as things are, in words."""
        self.acting = False
        """Whether this process is the one that decides."""
        self._handed_over = False
        self._lock = FileLock(config.state / LOCK_FILE)
        self._asking: set[str] = set()
        """Standbys of which a plan is being proposed."""
        self._troubles: list[str] = []
        self._said: list[str] = []
        """Those of the turn before."""
        self._use(config)

    # Its life

    def use(self, config: Config) -> None:
        """Go by another configuration, or by other standbys of it."""
        self._use(config)
        self.money.drain()  # backends that are new must not get anything first

    def _use(self, config: Config) -> None:
        self.config = config
        try:
            self.images = load_images(config.scaling.images)
        except (OSError, ValueError, FileProblems) as error:  # `unworkable` refuses it; a file may go later
            log.error("images: %s", error)
        self.offers = offers(config, self.images)
        spawn, wall = self.runtime.tasks.spawn, self.runtime.wall
        self._approval = notices(config.scaling.approval_webhook, self._approval, spawn, wall)
        self._budget_notices = notices(config.scaling.budgets.webhook, self._budget_notices, spawn, wall)
        self.money.use(self.config, self.templates.all())
        self._judge_templates()

    @classmethod
    async def opened(cls, runtime: Runtime, spending: TokenSpending) -> Planning:
        """One that runs until the tasks of the runtime are cancelled. Raises as `open` does."""
        planning = cls(runtime, spending)
        await planning.open()
        runtime.tasks.spawn(planning.run(), "plans")
        return planning

    async def open(self) -> None:
        """Read what is on the disk and in the ledger. Raises OSError and SQLAlchemy's errors."""
        self._use_templates()
        await self.money.read()
        await self._act()
        self.money.drain()

    async def _act(self) -> None:
        """Have plans to ourselves, if no other process does: during an upgrade the one before decides on."""
        if not self.acting and not self._handed_over and self._lock.taken():
            await asyncio.to_thread(self.plans.open)
            self.acting = True

    def hand_over(self) -> None:
        """Another process decides from now on; what is drained is for each of the two."""
        self.acting, self._handed_over = False, True
        self.plans.close()
        self._lock.release()

    async def run(self) -> None:
        """Turn, again and again, until it is cancelled; then close."""
        try:
            while True:
                try:
                    await self._act()
                    await self.turn()
                except OSError as error:
                    self._say(f"plans cannot be written: {error.strerror or error}")
                except Exception:
                    log.exception("plans: this turn failed")
                await asyncio.sleep(TURN_S if self.acting or self._handed_over else LOCK_LOOK_S)
        finally:
            await self.close()

    async def close(self) -> None:
        """Let connections and the file go."""
        for one in (self._approval, self._budget_notices):
            if one is not None:
                await one.close()
        await asyncio.to_thread(self.hand_over)

    async def turn(self) -> None:
        """What goes on all the time: moves, ends of waits, money, templates."""
        async with self._turning:
            self._said, self._troubles = self._troubles, []
            await self._turn()

    async def _turn(self) -> None:
        self._use_templates()
        if self.acting:
            await self._follow()
        if trouble := await self.money.look():
            self._say(trouble)
        self.money.drain()
        if not self.acting:
            return
        await self._see()
        await self.plans.expire(self._dearer)
        self.budgets.turn()
        for plan in self.plans.open_plans():
            await self._look_again(plan)
        await self._fire()

    def _use_templates(self) -> None:
        """Go by their file as it is now."""
        self.templates.look()
        if self.templates.version != self._used_version:
            self._used_version = self.templates.version
            if self.templates.trouble:
                log.error("templates: the old ones go on:\n%s", self.templates.trouble)
            self.money.use(self.config, self.templates.all())
            self._judge_templates()

    def _judge_templates(self) -> None:
        found = self.templates.unworkable(self.offers, sites_of(self.config))
        if found and found != self._unworkable:
            log.warning("templates that cannot work as things are:\n%s", found)
        self._unworkable = found

    def _say(self, trouble: str) -> None:
        """Note what is wrong; the log has it once, as long as it stays."""
        if trouble not in self._said and trouble not in self._troubles:
            log.error("%s", trouble)
        self._troubles.append(trouble)

    # What the manager asks

    def allowed(self, name: str) -> bool:
        """Whether the controller may count on this standby: not where a ceiling is reached, or somebody said no."""
        offer = self.offers.get(name)
        if offer is None or self.over(name) or self.budgets.reached(offer.site) is not None:
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
            return None if self.over(name) or self._dearer(plan) else plan.id
        if self.acting and plan is None and name not in self._asking and self.allowed(name):
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
        except ConflictError:  # another process decides now
            return None
        return plan.id if plan.state in (PlanState.APPROVED, PlanState.EXECUTING) else None

    def wanted(self) -> list[tuple[str, str, str]]:
        """Standbys that approved plans are to start and have not yet: name, id of the plan, reason."""
        unseen = {move.plan for move in self._moves}
        found = []
        for plan in self.plans.open_plans() if self.acting else ():
            if plan.state is not PlanState.PROPOSED and plan.id not in unseen and not self._dearer(plan):
                for name in plan.standbys:
                    if (
                        name not in plan.started
                        and self._state_of(name) is State.STANDBY
                        and not self.over(name)
                    ):
                        found.append((name, plan.id, plan.reason))
        return found

    def _state_of(self, name: str) -> State:
        standby = self.standby_of(name)
        return State.STANDBY if standby is None else standby.state

    def over(self, name: str) -> str:
        """Why a standby may not run on: a ceiling that it falls under is reached. Empty: it may."""
        backend = self.runtime.fleet.backends.get(name)
        return "its budget is used up" if backend is not None and backend.over_budget else ""

    def moved(self, move: Move) -> None:
        """A standby has made a move; what it means for its plan is written with the next turn."""
        if move.plan:
            self._moves.append(move)

    def template_of(self, plan_id: str) -> str:
        """Whose account a plan is on; empty: no template's."""
        return self.plans.template_of(plan_id)

    # What admins and templates ask

    async def propose(
        self,
        chosen: Sequence[Offer],
        trigger: Trigger,
        reason: str,
        *,
        figures: Mapping[str, float] = MappingProxyType({}),
        template: str = "",
        mode: str | None = None,
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
            figures=dict(figures),
            template=template,
        )
        plan = replace(plan, waits_for=self._waits_for(plan))
        made = await self.plans.propose(plan)
        if made.id == plan.id:
            log.info("plan %s: %s, since %s", plan.id, in_words(plan, self.spending.currency), reason)
            after = await self._look_again(made)
            if after is None and self._approval is not None and trigger is not Trigger.HAND:
                self._approval.tell("plan.proposed", made.as_dict())
            made = after or made
        return made

    async def approve(self, id: str, by: str, reason: str = "") -> Plan:
        """Raises UnknownPlanError; ConflictError: it is decided, or a ceiling stands against it; OSError."""
        plan = self.plans.find(id)
        if plan.state is PlanState.PROPOSED:
            words, advice = self._against(plan)
            if words:
                raise ConflictError(f"{words}; {advice}")
        if plan.is_due(self.runtime.wall()):
            await self.plans.expire()
        return await self.plans.move(plan.id, PlanEvent.APPROVE, by, reason)

    async def refuse(self, id: str, by: str, reason: str = "") -> Plan:
        """Raises as `approve` does."""
        await self._follow()  # what has begun a moment ago is not refused any more
        return await self.plans.move(self.plans.find(id).id, PlanEvent.REFUSE, by, reason)

    async def run_template(self, name: str, by: str) -> Plan:
        """Make a plan of a template. In mode `confirm` it waits as any other.

        Raises KeyError: there is none; BadValueError: it cannot work; ConflictError: what it would start is on.
        """
        self._use_templates()
        template = self.templates.find(name)
        await self.money.look()  # its budget may be new
        chosen = self._startable(template)
        if not chosen:
            raise ConflictError(
                f"all that template '{name}' would start is on, is being started, or has failed"
            )
        why = f"template {name}: {by} has run it"
        return await self.propose(chosen, Trigger.TEMPLATE, why, template=name, mode=template.mode)

    async def by_hand(self, name: str, by: str) -> str:
        """The id of a plan for a standby that somebody starts by hand, approved by that. Raises OSError;
        NotPossibleError: a ceiling stands against it."""
        offer = self.offers.get(name)
        if offer is None:
            return ""
        try:
            plan = await self.propose([offer], Trigger.HAND, f"{by} has started it", mode=CONFIRM)
            if plan.state is PlanState.PROPOSED:
                if len(plan.standbys) > 1:
                    words = f"plan {plan.id} waits, to start {' and '.join(plan.standbys)}"
                    raise NotPossibleError(f"{words}: approve or refuse it first")
                plan = await self._approved_by_hand(plan, by)
        except PlansError as error:
            raise NotPossibleError(str(error)) from None
        return plan.id

    async def _approved_by_hand(self, plan: Plan, by: str) -> Plan:
        try:
            return await self.approve(plan.id, by)
        except ConflictError as error:
            if plan.trigger is Trigger.HAND:  # it would stand in the way of the next one
                await self.plans.move(plan.id, PlanEvent.EXPIRE, "manager", str(error))
            raise

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
        if plan.state is not PlanState.PROPOSED:
            return None
        waits_for = self._waits_for(plan)
        if not waits_for:
            try:
                return await self.plans.move(plan.id, PlanEvent.APPROVE, AUTO, "within budget")
            except ConflictError:
                return self.plans.find(plan.id)  # somebody was faster
        if waits_for.partition(":")[0] != plan.waits_for.partition(":")[0]:  # its figures change all the time
            await self.plans.wait_for(plan.id, waits_for)
        return None

    def _waits_for(self, plan: Plan) -> str:
        """Empty: nothing."""
        asked = CONFIRM in (plan.mode, self._mode_now(plan))
        return self._against(plan)[0] or ("approval" if asked else "")

    def _mode_now(self, plan: Plan) -> str:
        """It may have been proposed before somebody wanted to be asked."""
        template = self.templates.all().get(plan.template)
        return (template.mode if template is not None else None) or self.config.scaling.mode

    def _against(self, plan: Plan) -> tuple[str, str]:
        """What of money stands against it, and what to do about that, in words; empty: nothing."""
        costs = [(one.site, nano_of(one.cost_per_hour or 0.0)) for one in self._of(plan)]
        return self.money.against(costs, plan.template)

    def _of(self, plan: Plan) -> list[Offer]:
        return [self.offers[name] for name in plan.standbys if name in self.offers]

    def _dearer(self, plan: Plan) -> str:
        """Why a plan does not hold any more: it costs more than it says. Empty: it holds."""
        return plan.dearer(sum(one.cost_per_hour or 0.0 for one in self._of(plan)))

    async def _follow(self) -> None:
        """Have plans know what their standbys did. Raises OSError."""
        async with self._following:
            while self._moves:
                move = self._moves[0]
                if move.after is State.STANDBY:
                    self.money.forget()
                await self._take(move)
                self._moves.popleft()

    async def _take(self, move: Move) -> None:
        await self.plans.update(move.plan, lambda plan: plan.after(move))

    async def _see(self) -> None:
        """The same of moves that a crash has swallowed. Raises OSError."""
        known = {name: one for name in self.offers if (one := self.standby_of(name)) is not None}
        if not known or self._moves:
            return
        for plan in self.plans.open_plans() if self._all_seen else self.plans.all():
            for one in (known[name] for name in plan.standbys if name in known):
                await self._seen(plan.id, one)
        self._all_seen = True

    async def _seen(self, id: str, standby: Standby) -> None:
        await self.plans.update(id, lambda plan: plan.as_seen(standby, self.runtime.wall()))

    # Templates

    def _startable(self, template: Template) -> list[Offer]:
        """Of what it comes to, what is off. Raises BadValueError."""
        out = {name for name in self.offers if self.over(name) or self._state_of(name) is State.FAILED}
        chosen = choose(template, self.offers, sites_of(self.config), out)
        off = {one.name for one in chosen if self._state_of(one.name) is State.STANDBY}
        return [one for one in chosen if one.name in off and self.plans.holding(one.name) is None]

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
                chosen = chosen[: room(self.plans.all(), name, template.most)]
            except BadValueError as error:
                self._say(f"template {name} cannot fire: {error.message}")
                continue
            if chosen:
                why = f"template {name}: {why}"
                await self.propose(chosen, Trigger.TEMPLATE, why, template=name, mode=template.mode)

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
            "trouble": "; ".join(
                filter(None, (*dict.fromkeys(self._troubles), self.templates.trouble, self._unworkable))
            ),
        }
