"""Has the scheduling platform asked for capacity that our own standbys are not enough for, and given it back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, Protocol

from policies.asking import Ask, Asking
from policies.match import LOCAL
from policies.pools import MeanTokens
from policies.scaling import Pool, ScalingSettings
from proxy.config import Config

PAUSE_S: Final = 30.0
"""For a model, after the platform refused or was not reached."""

Spawn = Callable[[Coroutine[Any, Any, None], str], asyncio.Task[Any]]


class Sender(Protocol):
    """The way to the platform: `proxy.scaling.platform.Platform`."""

    def placed(self) -> set[str]:
        """Names of the backends that it has placed."""

    async def ask(
        self, ask: Ask, tokens_per_request: float, month_left: float | None, sites: Sequence[str]
    ) -> bool:
        """Whether it has arrived."""


class Asks:
    """Asks for each model one thing at a time."""

    def __init__(self, sender: Sender, left: Callable[[str], float | None], spawn: Spawn) -> None:
        """`left`: of the budgets that a site falls under, in the ledger's currency; None: it has none."""
        self._sender = sender
        self._left = left
        self._spawn = spawn
        self._asking = Asking(ScalingSettings())
        self._sites: list[str] = []
        self._on = False
        self._under_way: set[str] = set()
        self._not_before: dict[str, float] = {}

    def use(self, config: Config, settings: ScalingSettings) -> None:
        """Go by another configuration."""
        self._on = config.scaling.scheduler is not None
        self._asking.settings = settings
        self._sites = sorted(site for site in config.sites if site != LOCAL)
        self._not_before.clear()

    @property
    def on(self) -> bool:
        """Whether there is a platform."""
        return self._on

    def turn(self, pools: Sequence[Pool], means: MeanTokens, now: float) -> None:
        """Ask for what is wanted now. `now`: monotonic."""
        if not self._on:
            return
        left = {site: self._left(site) for site in self._sites}
        sites = [site for site, money in left.items() if money is None or money > 0.0]
        known = [money for site in sites if (money := left[site]) is not None]
        month_left = max(known) if known and len(known) == len(sites) else None
        for ask in self._asking.decide(pools, self._sender.placed(), now):
            if ask.model in self._under_way or now < self._not_before.get(ask.model, now):
                continue
            if ask.tokens > 0.0 and not sites:
                continue  # every ceiling is reached
            self._under_way.add(ask.model)
            sent = self._sent(ask, means.of(ask.model), month_left, sites, now)
            self._spawn(sent, f"scale request for {ask.model}")

    async def _sent(
        self, ask: Ask, tokens_per_request: float, month_left: float | None, sites: list[str], now: float
    ) -> None:
        try:
            if await self._sender.ask(ask, tokens_per_request, month_left, sites):
                self._asking.sent(ask, now)
            else:
                self._not_before[ask.model] = now + PAUSE_S
        finally:
            self._under_way.discard(ask.model)
