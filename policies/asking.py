"""When a scheduling platform is asked for capacity: what there is, with every standby awake, would not do.

One open request for each model, which is sent again when the demand has changed or its time runs out, and given
back when our own capacity has been enough for a while. What the platform has placed does not count as our own:
else its placements would answer the request that keeps them.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from math import inf
from typing import Final

from policies.scaling import Pool, ScalingSettings
from policies.standby import State

LIFE_S: Final = 600.0
"""Of a request; it is sent again after half of it."""
CHANGED: Final = 0.25
"""A demand that differs by this share from what was asked for is asked for anew."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Capacity for so many tokens in use at once is wanted, on top of our own. 0: not any more."""

    model: str
    tokens: float
    reason: str


@dataclass(slots=True)
class _Open:
    tokens: float
    at: float
    enough_since: float = inf


class Asking:
    """Decides what to ask the platform for. Whoever sends says by `sent` what has arrived."""

    def __init__(self, settings: ScalingSettings) -> None:
        self.settings = settings
        self._open: dict[str, _Open] = {}

    def decide(self, pools: Sequence[Pool], placed: Set[str], now: float) -> list[Ask]:
        """What to send now. `placed`: names of the platform's units. `now`: monotonic."""
        asks = []
        for pool in pools:
            ask = self._of_pool(pool, placed, now)
            if ask is not None:
                asks.append(ask)
        return asks

    def _of_pool(self, pool: Pool, placed: Set[str], now: float) -> Ask | None:
        settings, demand = self.settings, pool.demand
        own = sum(
            unit.tokens
            for unit in pool.units
            if unit.name not in placed
            and (unit.available if unit.state is None else unit.allowed and unit.state is not State.FAILED)
        )
        short = demand / settings.up - own
        opened = self._open.get(pool.model)
        if opened is None:
            if short <= 0:
                return None
            return Ask(
                pool.model, short, f"demand of {demand:.0f} tokens is above {settings.up:.0%} of {own:.0f}"
            )
        if demand < settings.down * own:
            opened.enough_since = min(opened.enough_since, now)
            if now - opened.enough_since >= settings.settle_s:
                reason = f"demand of {demand:.0f} tokens is below {settings.down:.0%} of our own {own:.0f}"
                return Ask(pool.model, 0.0, reason)
        else:
            opened.enough_since = inf
        wanted = max(short, 0.0) or opened.tokens  # between the two marks: as it was
        if now - opened.at >= LIFE_S / 2.0:
            return Ask(pool.model, wanted, "still wanted")
        if wanted - opened.tokens > CHANGED * opened.tokens:
            return Ask(pool.model, wanted, f"demand has grown to {demand:.0f} tokens")
        return None

    def forget(self, model: str) -> None:
        """Send nothing more for what was asked: it runs out, unless it is asked for anew."""
        self._open.pop(model, None)

    def sent(self, ask: Ask, now: float) -> None:
        """The platform has it."""
        if ask.tokens <= 0.0:
            self._open.pop(ask.model, None)
        else:
            opened = self._open.setdefault(ask.model, _Open(ask.tokens, now))
            opened.tokens, opened.at = ask.tokens, now
