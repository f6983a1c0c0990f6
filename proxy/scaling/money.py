"""Ceilings in the running proxy: what this month has cost is looked at, and what has reached its ceiling drains."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.exc import SQLAlchemyError

from policies.match import LOCAL
from policies.plans import Plan
from proxy.access.shared import SHARE
from proxy.config import Config
from proxy.config_values import time_zone
from proxy.database import said
from proxy.prices import amount
from proxy.scaling.accounts import accounts, running_for
from proxy.scaling.budgets import SITE, TEMPLATE, TOLD_FILE, Budgets, ceilings
from proxy.scaling.hours import spent
from proxy.scaling.spending import Span, TokenSpending
from proxy.scaling.templates import Template

if TYPE_CHECKING:
    from proxy.runtime import Runtime

log = logging.getLogger("tidegate")

LOOK_S: Final = 5.0
"""How often costs are read: hours of capacity, and what other proxies have spent."""
STALE_S: Final = 60.0
"""What was read so long ago, though it should have been read anew, is not known any more."""


class Money:
    """Budgets over the ledger of one proxy."""

    def __init__(
        self,
        runtime: Runtime,
        spending: TokenSpending,
        tell: Callable[[str, dict[str, Any]], None],
        plans: Callable[[], Sequence[Plan]],
    ) -> None:
        """`spending` counts the rows of the runtime's ledger. `plans`: those that templates pay for."""
        config = runtime.config
        self._runtime = runtime
        self._plans = plans
        self.spending = spending
        zone = time_zone(config.budget_zone)
        self.budgets = Budgets(spending, zone, config.state / TOLD_FILE, self._capacity, tell)
        self.budgets.running = lambda template: running_for(plans(), template)
        self._hours: dict[tuple[str, str], int] = {}
        """What hours of capacity have cost at the last look, nano-units by site and template."""
        self._read_at = 0.0
        self._known_until = -inf
        self._trouble = ""

    def use(self, config: Config, templates: Mapping[str, Template]) -> None:
        """Go by these ceilings."""
        section = config.scaling.budgets
        before = self.budgets.ceilings
        of_templates = {name: template.budget for name, template in templates.items()}
        self.budgets.ceilings = ceilings(section.month, section.sites, of_templates)
        if config.ledger_currency != self.spending.currency or before != self.budgets.ceilings:
            self.spending.currency = config.ledger_currency
            self._read_at, self._known_until = 0.0, -inf

    def forget(self) -> None:
        """Somebody's account has changed: read anew with the next look."""
        self._read_at = 0.0

    async def look(self) -> str:
        """Read what this month has cost, if that was long ago. Returns why that cannot be done; empty: it can."""
        if self._runtime.now() >= self._read_at or self._runtime.wall() >= self.spending.end:
            self._trouble = ""
            try:
                await self.read()
            except SQLAlchemyError as error:
                self._trouble = f"budgets: what this month has cost cannot be read: {said(error)}"
        return self._trouble

    async def read(self) -> None:
        """The same now. Without ceilings nobody needs it. Raises SQLAlchemy's errors."""
        if not self.budgets.ceilings:
            return
        began = time.monotonic()
        self._read_at = self._runtime.now() + LOOK_S  # also if it fails
        await asyncio.to_thread(self._read, self._runtime.wall(), accounts(self._plans()))
        self._read_at = self._runtime.now() + max(LOOK_S, SHARE * (time.monotonic() - began))
        self._known_until = self._read_at + STALE_S

    @property
    def known(self) -> bool:
        """Whether it is known what this month has cost, as far as there are ceilings."""
        return not self.budgets.ceilings or self._runtime.now() < self._known_until

    def against(self, costs: Sequence[tuple[str, int]], template: str = "") -> tuple[str, str]:
        """What stands against these further costs, nano-units by site, and what to do about it; empty: nothing."""
        if not self.known and any(self.budgets.under(site, template) for site, _ in costs):
            return "what this month has cost cannot be read", "it is tried again"
        used = self.budgets.refuses(costs, template)
        if used is None:
            return "", ""
        hour = amount(sum(cost for _, cost in costs))
        words = f"{used.in_words(self.spending.currency)}, and an hour of it costs {hour}"
        return words, f"a plan needs an hour of it: raise {used.ceiling.key} first"

    def _read(self, wall: float, of: dict[str, Sequence[Span]]) -> None:
        """Blocks."""
        spending = self.spending
        spending.read(wall, of)
        wanted = {("", ""), (LOCAL, "")}
        for ceiling in self.budgets.ceilings:
            wanted.add((ceiling.name, "") if ceiling.scope == SITE else ("", ceiling.name))
        engine, begin, end, currency = (
            self._runtime.ledger.engine,
            spending.begin,
            spending.end,
            spending.currency,
        )
        self._hours = {
            key: spent(engine, key[0] or None, begin, end, key[1] or None, currency) for key in wanted
        }

    def _capacity(self, site: str, template: str, month_begin: float) -> int:
        return self._hours.get((site, template), 0)

    def drain(self) -> None:
        """Take what has reached its ceiling from those that get requests, and give back what has not."""
        runtime, budgets = self._runtime, self.budgets
        on_account: dict[str, str] = {}
        for used in budgets.used():
            if used.ceiling.scope == TEMPLATE and used.reached:
                on_account |= dict.fromkeys(budgets.running(used.ceiling.name), used.ceiling.name)
        changed = False
        for backend in runtime.fleet:
            over = budgets.reached(backend.site, on_account.get(backend.name, "")) is not None
            if over != backend.over_budget:
                backend.over_budget, changed = over, True
                words = "gets nothing new: its budget is used up" if over else "takes requests again"
                log.warning("backend %s %s", backend.name, words)
        if changed:
            now = runtime.now()
            runtime.fleet.version += 1  # who may be waited for is looked up with who may serve
            runtime.fleet.refresh(now)
            runtime.poll(now)
