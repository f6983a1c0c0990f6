"""What is asked of a scheduling platform, how often, and with how much money."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, NamedTuple

import pytest

from policies.asking import LIFE_S, Ask
from policies.pools import REQUEST_TOKENS, MeanTokens
from policies.scaling import Pool, ScalingSettings, Unit
from policies.standby import State
from proxy.config import Config
from proxy.scaling.asks import PAUSE_S, Asks, cleared

MEANS = MeanTokens()
MEANS.note("m", 1, 500, 0.0)


class Sent(NamedTuple):
    ask: Ask
    per_request: float
    left: float | None
    sites: list[str]
    data_classes: list[str]


class Platform:
    def __init__(self) -> None:
        self.takes = True
        self.asked: list[Sent] = []
        self.there: set[str] = set()

    def placed(self) -> set[str]:
        return self.there

    async def ask(
        self,
        ask: Ask,
        per_request: float,
        left: float | None,
        sites: Sequence[str],
        data_classes: Sequence[str],
    ) -> bool:
        self.asked.append(Sent(ask, per_request, left, list(sites), list(data_classes)))
        return self.takes


class Asked:
    """One that is asked with a budget of each site."""

    def __init__(self, left: dict[str, float | None], **scheduler: Any) -> None:
        self.platform = Platform()
        self.classes: set[str] = set()
        self.asks = Asks(self.platform, left.__getitem__, self._spawn, lambda model: self.classes)
        self._spawned: list[asyncio.Task[Any]] = []
        self.sites: dict[str, Any] = {site: {} for site in left}
        self.use(**scheduler)

    def use(self, **scheduler: Any) -> None:
        """Another configuration. `url` empty: without a platform."""
        platform = {"url": "http://127.0.0.1:1", "secret_env": "HOOK", **scheduler}
        config = {
            "backends": [{"name": "a", "url": "http://127.0.0.1:2"}],
            "sites": self.sites,
            "scaling": {"scheduler": platform} if platform["url"] else {},
        }
        self.asks.use(Config.model_validate(config), ScalingSettings())

    def _spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[Any]:
        self._spawned.append(asyncio.get_running_loop().create_task(coroutine, name=name))
        return self._spawned[-1]

    async def turn(self, demand: float, now: float) -> int:
        """How often the platform was asked so far, after this turn."""
        return await self.turn_with(
            [Pool("m", [Unit("a", "local", 1000.0, available=True)], tokens_in_use=demand)], now
        )

    async def turn_with(self, pools: list[Pool], now: float) -> int:
        self.asks.turn(pools, MEANS, now)
        self.asks.turn(pools, MEANS, now)  # amid the first: one thing at a time
        await asyncio.gather(*self._spawned)
        return len(self.platform.asked)


async def test_it_is_asked_once_and_told_when_it_is_over() -> None:
    asked = Asked({"nanjing": None})
    assert await asked.turn(500, 0.0) == 0
    assert await asked.turn(2000, 1.0) == 1
    sent = asked.platform.asked[0]
    assert (sent.ask.tokens, *sent[1:]) == (1500.0, 500.0, None, ["nanjing"], [])
    assert await asked.turn(2000, 2.0) == 1, "it has it"
    await asked.turn(0, 3.0)
    assert await asked.turn(0, 304.0) == 2
    assert asked.platform.asked[1].ask.tokens == 0.0


async def test_what_did_not_arrive_is_sent_again_after_a_pause() -> None:
    asked = Asked({"nanjing": None})
    asked.platform.takes = False
    assert await asked.turn(2000, 1.0) == 1
    assert await asked.turn(2000, PAUSE_S) == 1
    asked.use()  # a placement came or went: the file is as it was
    assert await asked.turn(2000, PAUSE_S) == 1
    assert await asked.turn(2000, 1.0 + PAUSE_S) == 2


async def test_the_budgets_of_its_sites_are_told_and_one_that_is_used_up_is_left_out() -> None:
    asked = Asked({"nanjing": 20.0, "suzhou": 0.0, "xian": 30.0})
    await asked.turn(2000, 1.0)
    assert asked.platform.asked[0][2:4] == (30.0, ["nanjing", "xian"])
    free = Asked({"nanjing": 20.0, "suzhou": None})
    await free.turn(2000, 1.0)
    assert free.platform.asked[0][2:4] == (None, ["nanjing", "suzhou"])


async def test_nobody_is_asked_without_money_or_platform() -> None:
    assert await Asked({"nanjing": 0.0}).turn(2000, 1.0) == 0
    assert await Asked({"nanjing": None}, url="").turn(2000, 1.0) == 0


async def test_only_sites_are_asked_for_that_may_see_what_is_asked() -> None:
    asked = Asked({"nanjing": None, "suzhou": None})
    asked.sites["suzhou"] = {"data_classes": ["public", "internal"]}
    asked.use()
    asked.classes = {"internal"}
    await asked.turn(2000, 1.0)
    assert asked.platform.asked[0][3:] == (["suzhou"], ["internal"])
    asked.classes = {"public"}
    await asked.turn(2000, 1.0 + LIFE_S / 2)
    assert asked.platform.asked[1][3:] == (["suzhou"], ["internal", "public"]), (
        "what was there may come again"
    )


async def test_what_no_site_may_see_is_not_asked_for() -> None:
    asked = Asked({"nanjing": None})
    asked.classes = {"restricted"}
    assert await asked.turn(2000, 1.0) == 0
    asked.classes = {"public"}
    assert await asked.turn(2000, 1.0 + PAUSE_S) == 1
    assert asked.platform.asked[0][3:] == (["nanjing"], ["public"])


@pytest.mark.parametrize(
    ("classes", "found"),
    [
        ("", ("nsx", "")),
        ("p", ("ns", "p")),
        ("i", ("s", "i")),
        ("pi", ("s", "ip")),
        ("pq", ("ns", "p")),  # no site for both: the one that more sites may see
        ("pr", ("ns", "p")),  # r stays where it is
        ("r", ("", "")),
    ],
)
def test_the_sites_for_some_data_classes(classes: str, found: tuple[str, str]) -> None:
    sites = {"n": frozenset("p"), "s": frozenset("pi"), "x": frozenset("q")}
    assert cleared(set(classes), sites) == (list(found[0]), list(found[1]))
    assert cleared(set(classes), {"all": None}) == (["all"], sorted(classes))


async def test_a_model_that_is_reserved_is_asked_for_before_anybody_asks() -> None:
    asked = Asked({"nanjing": None}, models=["far", "m"])
    own = Pool("m", [Unit("a", "local", 1000.0, available=True)])
    assert await asked.turn_with([own], 1.0) == 1, "our own is enough for m"
    assert asked.platform.asked[0].ask.model == "far"
    assert asked.platform.asked[0].ask.tokens >= REQUEST_TOKENS
    asked.platform.there = {"p"}
    placed = Pool("far", [Unit("p", "nanjing", 9000.0, State.STANDBY)])
    assert await asked.turn_with([own, placed], 2.0) == 1
    assert await asked.turn_with([own, placed], 1.0 + LIFE_S / 2) == 2, "still wanted"
    again = Asked({"nanjing": None}, models=["far"])  # after a restart the platform may have forgotten it
    again.platform.there = {"p"}
    assert await again.turn_with([placed], 1.0) == 1
    asked.use(models=["m"])
    assert await asked.turn_with([own, placed], 2000.0) == 2, "it runs out"


async def test_another_platform_is_asked_anew() -> None:
    asked = Asked({"nanjing": None})
    assert await asked.turn(2000, 1.0) == 1
    asked.use(url="http://127.0.0.1:3")
    assert await asked.turn(2000, 2.0) == 2
