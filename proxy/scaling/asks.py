"""Has the scheduling platform asked for capacity that our own standbys are not enough for, and given it back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol

from policies.asking import Ask, Asking
from policies.match import LOCAL
from policies.pools import MeanTokens
from policies.scaling import Pool, ScalingSettings
from proxy.config import Config

PAUSE_S: Final = 30.0
"""For a model, after the platform refused or was not reached, or while no site may be asked for."""

Spawn = Callable[[Coroutine[Any, Any, None], str], asyncio.Task[Any]]


class Sender(Protocol):
    """The way to the platform: `proxy.scaling.platform.Platform`."""

    def placed(self) -> set[str]:
        """Names of the backends that it has placed."""

    async def ask(
        self,
        ask: Ask,
        tokens_per_request: float,
        month_left: float | None,
        sites: Sequence[str],
        data_classes: Sequence[str],
    ) -> bool:
        """Whether it has arrived."""


class Asks:
    """Asks for each model one thing at a time."""

    def __init__(
        self,
        sender: Sender,
        left: Callable[[str], float | None],
        spawn: Spawn,
        classes: Callable[[str], Collection[str]],
    ) -> None:
        """`left`: of the budgets that a site falls under, in the ledger's currency; None: it has none. `classes`:
        data classes of the requests for a model that run or wait now."""
        self._sender = sender
        self._left = left
        self._spawn = spawn
        self._classes = classes
        self._asking = Asking(ScalingSettings())
        self._config: Config | None = None
        self._sites: dict[str, frozenset[str] | None] = {}
        """Data classes that each may see; None: all."""
        self._seen: dict[str, set[str]] = {}
        """Data classes by model, since it was asked for."""
        self._under_way: set[str] = set()
        self._not_before: dict[str, float] = {}

    def use(self, config: Config, settings: ScalingSettings) -> None:
        """Go by another configuration, or by the same one with other placements."""
        before, self._config = self._config, config
        self._asking.settings = settings
        self._sites = {
            site: config.sites[site].accepts(site) for site in sorted(config.sites) if site != LOCAL
        }
        if before is None or (before.scaling, before.sites) != (config.scaling, config.sites):
            self._not_before.clear()
        old, new = before.scaling.scheduler if before is not None else None, config.scaling.scheduler
        if old is None or new is None or old.url != new.url:
            self._asking = Asking(settings)
            self._seen.clear()
        else:
            for model in set(old.models) - set(new.models):  # its request runs out, unless traffic wants it
                self._asking.forget(model)

    @property
    def on(self) -> bool:
        """Whether there is a platform."""
        return self._config is not None and self._config.scaling.scheduler is not None

    def turn(self, pools: Sequence[Pool], means: MeanTokens, now: float) -> None:
        """Ask for what is wanted now. `now`: monotonic."""
        if not self.on:
            return
        for ask in self._asking.decide(self._with_reserved(pools, means), self._sender.placed(), now):
            model = ask.model
            if model in self._under_way or now < self._not_before.get(model, now):
                continue
            left = {site: self._left(site) for site in self._sites}
            may = {site: self._sites[site] for site, money in left.items() if money is None or money > 0.0}
            seen = self._seen.setdefault(model, set())
            seen.update(self._classes(model))
            sites, data_classes = cleared(seen, may)
            if ask.tokens > 0.0 and not sites:  # every ceiling is reached, or what is asked must not leave
                self._not_before[model] = now + PAUSE_S
                continue
            known = [money for site in sites if (money := left[site]) is not None]
            month_left = max(known) if known and len(known) == len(sites) else None
            self._under_way.add(model)
            sent = self._sent(ask, means.of(model), month_left, sites, data_classes, now)
            self._spawn(sent, f"scale request for {model}")

    def _with_reserved(self, pools: Sequence[Pool], means: MeanTokens) -> list[Pool]:
        """Also those models that there always is to be a placement for, as if one request of each waited."""
        assert self._config is not None
        assert self._config.scaling.scheduler is not None
        found = {pool.model: pool for pool in pools}
        for model in self._config.scaling.scheduler.models:
            pool = found.get(model) or Pool(model, ())
            waiting = max(pool.tokens_waiting, means.of(model) - pool.tokens_in_use)
            found[model] = replace(pool, tokens_waiting=waiting)
        return list(found.values())

    async def _sent(
        self,
        ask: Ask,
        tokens_per_request: float,
        month_left: float | None,
        sites: list[str],
        data_classes: list[str],
        now: float,
    ) -> None:
        try:
            if await self._sender.ask(ask, tokens_per_request, month_left, sites, data_classes):
                self._asking.sent(ask, now)
                if ask.tokens <= 0.0:
                    self._seen.pop(ask.model, None)
            else:
                self._not_before[ask.model] = now + PAUSE_S
        finally:
            self._under_way.discard(ask.model)


def cleared(
    classes: Collection[str], sites: Mapping[str, frozenset[str] | None]
) -> tuple[list[str], list[str]]:
    """Sites to place at, and those of the data classes that all of them may see: as many as one site can.

    A class that no site may see stays where it is. Of no class at all, whatever site will do.
    """
    may = {
        one: [site for site, accepted in sites.items() if accepted is None or one in accepted]
        for one in classes
    }
    chosen = list(sites)
    kept: list[str] = []
    for one in sorted(classes, key=lambda one: (-len(may[one]), one)):
        both = [site for site in chosen if site in may[one]]
        if both:
            chosen, kept = both, [*kept, one]
    return (chosen if kept or not classes else []), sorted(kept)
