"""What is asked of a scheduling platform, how often, and with how much money."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

from policies.asking import Ask
from policies.pools import MeanTokens
from policies.scaling import Pool, ScalingSettings, Unit
from proxy.config import Config
from proxy.scaling.asks import PAUSE_S, Asks

MEANS = MeanTokens()
MEANS.note("m", 1, 500, 0.0)


class Platform:
    def __init__(self) -> None:
        self.takes = True
        self.asked: list[tuple[Ask, float, float | None, list[str]]] = []
        self.there: set[str] = set()

    def placed(self) -> set[str]:
        return self.there

    async def ask(self, ask: Ask, per_request: float, left: float | None, sites: Sequence[str]) -> bool:
        self.asked.append((ask, per_request, left, list(sites)))
        return self.takes


class Asked:
    """One that is asked with a budget of each site."""

    def __init__(self, left: dict[str, float | None], *, with_platform: bool = True) -> None:
        self.platform = Platform()
        self.asks = Asks(self.platform, left.__getitem__, self._spawn)
        self._spawned: list[asyncio.Task[Any]] = []
        scheduler = {"url": "http://127.0.0.1:1", "secret_env": "HOOK"}
        config = {
            "backends": [{"name": "a", "url": "http://127.0.0.1:2"}],
            "sites": {site: {} for site in left},
            "scaling": {"scheduler": scheduler} if with_platform else {},
        }
        self.asks.use(Config.model_validate(config), ScalingSettings())

    def _spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[Any]:
        self._spawned.append(asyncio.get_running_loop().create_task(coroutine, name=name))
        return self._spawned[-1]

    async def turn(self, demand: float, now: float) -> int:
        """How often the platform was asked so far, after this turn."""
        pool = Pool("m", [Unit("a", "local", 1000.0, available=True)], tokens_in_use=demand)
        self.asks.turn([pool], MEANS, now)
        self.asks.turn([pool], MEANS, now)  # amid the first: one thing at a time
        await asyncio.gather(*self._spawned)
        return len(self.platform.asked)


async def test_it_is_asked_once_and_told_when_it_is_over() -> None:
    asked = Asked({"nanjing": None})
    assert await asked.turn(500, 0.0) == 0
    assert await asked.turn(2000, 1.0) == 1
    ask, per_request, left, sites = asked.platform.asked[0]
    assert (ask.tokens, per_request, left, sites) == (1500.0, 500.0, None, ["nanjing"])
    assert await asked.turn(2000, 2.0) == 1, "it has it"
    await asked.turn(0, 3.0)
    assert await asked.turn(0, 304.0) == 2
    assert asked.platform.asked[1][0].tokens == 0.0


async def test_what_did_not_arrive_is_sent_again_after_a_pause() -> None:
    asked = Asked({"nanjing": None})
    asked.platform.takes = False
    assert await asked.turn(2000, 1.0) == 1
    assert await asked.turn(2000, PAUSE_S) == 1
    assert await asked.turn(2000, 1.0 + PAUSE_S) == 2


async def test_the_budgets_of_its_sites_are_told_and_one_that_is_used_up_is_left_out() -> None:
    asked = Asked({"nanjing": 20.0, "suzhou": 0.0, "xian": 30.0})
    await asked.turn(2000, 1.0)
    assert asked.platform.asked[0][2:] == (30.0, ["nanjing", "xian"])
    free = Asked({"nanjing": 20.0, "suzhou": None})
    await free.turn(2000, 1.0)
    assert free.platform.asked[0][2:] == (None, ["nanjing", "suzhou"])


async def test_nobody_is_asked_without_money_or_platform() -> None:
    assert await Asked({"nanjing": 0.0}).turn(2000, 1.0) == 0
    assert await Asked({"nanjing": None}, with_platform=False).turn(2000, 1.0) == 0
