"""Which resources meet a service level, and what they cost: `tidegate plan`, and the same as a function.

Each profile is one engine; where one is not enough, several of it share the users. Figures are what a closed
loop keeps (`sim/closed_loop.py`): the worse of its first wave, in which all users ask at once, and of the
rounds after it, in which answers share their steps with the prompts of others. A price that nobody published
is unknown: such a resource ranks behind all that have one, and is never counted as free.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import ceil, inf, isfinite
from typing import NamedTuple

from policies.profile import Profile
from sim.closed_loop import LoopFigures, most_users, worst_figures
from sim.engine import EngineSettings
from sim.profile import engine_settings

MOST_CONCURRENCY = 1_000_000
"""Users that can be asked for."""
MOST_USERS = 1024
"""Of one engine that are tried: vLLM has 256 in a batch, the others wait. More users are for more copies."""
SECONDS_PER_HOUR = 3600.0


class DemandError(ValueError):
    """One field of a demand makes no sense."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}")
        self.field = field
        self.message = message


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked for. Raises DemandError."""

    concurrency: int
    """Users at once."""
    prompt_tokens: int = 1024
    output_tokens: int = 1024
    ttft_s: float = inf
    """Mean time to the first token, at most."""
    tpot_s: float = inf
    """Mean time per output token after the first, at most."""
    tokens_per_s: float = 0.0
    """Output tokens a second and user, at least."""
    model: str = ""
    """As profiles name it, or a part of that; empty: any."""
    carbon_gco2_kwh: float | None = None
    """Of the grid that the cards draw from."""

    def __post_init__(self) -> None:
        for name in ("concurrency", "prompt_tokens", "output_tokens"):
            if getattr(self, name) < 1:
                raise DemandError(name, "must be at least 1")
        if self.concurrency > MOST_CONCURRENCY:
            raise DemandError("concurrency", f"must be at most {MOST_CONCURRENCY:,}")
        for name in ("ttft_s", "tpot_s"):
            if not getattr(self, name) > 0:
                raise DemandError(name, "must be above zero")
        for name in ("tokens_per_s", "carbon_gco2_kwh"):
            value = getattr(self, name) or 0.0
            if not (isfinite(value) and value >= 0):
                raise DemandError(name, f"must be zero or more, not {value}")

    @property
    def tokens(self) -> int:
        """Of a prompt and its answer."""
        return self.prompt_tokens + self.output_tokens

    @property
    def has_level(self) -> bool:
        """Whether it asks for any speed at all."""
        return isfinite(self.ttft_s) or isfinite(self.tpot_s) or self.tokens_per_s > 0

    def missed_by(self, figures: LoopFigures) -> frozenset[str]:
        """Which of `ttft_s`, `tpot_s` and `tokens_per_s` these means miss."""
        missed = {
            "ttft_s": figures.ttft_mean > self.ttft_s,
            "tpot_s": figures.tpot_mean > self.tpot_s,
            "tokens_per_s": figures.tokens_per_s_per_user < self.tokens_per_s,
        }
        return frozenset(name for name, is_missed in missed.items() if is_missed)


@dataclass(frozen=True, slots=True)
class Option:
    """A number of engines of one profile, and what the users get from them."""

    profile: Profile
    concurrency: int
    """Users that are asked for."""
    copies: int
    figures: LoopFigures
    """Of the engine with most users; its throughput is that engine's alone."""
    slots: int
    """Users that one engine serves within the service level: the `slots` of a backend. 0: not even one."""
    at_least: bool
    """No more were tried: `slots`, `most` and `margin` are that or more."""
    missed: frozenset[str]
    """What it misses: `ttft_s`, `tpot_s`, `tokens_per_s`."""
    per_hour: float | None
    """None: the price is unknown."""
    currency: str
    watts: float | None
    gco2_per_hour: float | None
    shortfall: float
    """How far it is from the service level: the worst ratio of a figure to what is asked, 1 or less: it is
    met."""

    @property
    def meets(self) -> bool:
        return not self.missed

    @property
    def cards(self) -> int:
        return self.profile.cards * self.copies

    @property
    def most(self) -> int:
        """Users that all copies serve within the service level."""
        return self.slots * self.copies

    @property
    def margin(self) -> float:
        """Users that it could serve over those that are asked for, less one."""
        return self.most / self.concurrency - 1.0

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of all copies."""
        return self.figures.tokens_per_s_per_user * self.concurrency

    @property
    def per_million_tokens(self) -> float | None:
        """Price of a million output tokens at this load; None: unknown."""
        if self.per_hour is None:
            return None
        return self.per_hour / (self.tokens_per_s * SECONDS_PER_HOUR) * 1e6


class LeftOut(NamedTuple):
    """A profile that cannot serve a single such request, and why."""

    profile: Profile
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What there is for a demand."""

    options: list[Option] = field(default_factory=list)
    """That meet it: priced ones first, the cheapest first; then those without a price, the fewest cards
    first."""
    nearest: list[Option] = field(default_factory=list)
    """Those that do not, the nearest first."""
    left_out: list[LeftOut] = field(default_factory=list)


def plan(demand: Demand, profiles: Iterable[Profile]) -> Plan:
    """Resources for a demand, of those in `profiles` that serve its model.

    Raises ValueError for a profile that no engine can have, and if prices are in several currencies: which is
    cheaper, nobody could say.
    """
    profiles = [profile for profile in profiles if demand.model.lower() in profile.model.lower()]
    currencies = sorted({profile.price.currency for profile in profiles if profile.price is not None})
    if len(currencies) > 1:
        raise ValueError(f"prices in {' and '.join(currencies)} cannot be compared; give all in one currency")
    options, left_out = [], []
    for profile in profiles:
        try:
            engine = engine_settings(profile)
        except ValueError as error:
            raise ValueError(f"profile {profile.name}: {error}") from error
        if reason := _does_not_fit(demand, profile, engine):
            left_out.append(LeftOut(profile, reason))
        else:
            options.append(_option(demand, profile, engine))
    good = sorted(
        (option for option in options if option.meets),
        key=lambda option: (
            option.per_hour is None,
            option.per_hour or 0.0,
            option.cards,
            option.figures.ttft_mean,
        ),
    )
    bad = sorted(
        (option for option in options if not option.meets),
        key=lambda option: (option.shortfall, option.cards),
    )
    return Plan(good, bad, left_out)


def _does_not_fit(demand: Demand, profile: Profile, engine: EngineSettings) -> str:
    """Why not even one request does; empty: it does."""
    longest = profile.limits.max_model_len
    if demand.tokens > longest:
        return f"prompt and output are {demand.tokens} tokens, more than max_model_len, {longest}"
    # The last token of an answer is not kept.
    if engine.kv_blocks is not None and ceil((demand.tokens - 1) / engine.block_tokens) > engine.kv_blocks:
        return (
            f"prompt and output are {demand.tokens} tokens, more than its KV cache holds, {engine.kv_tokens}"
        )
    return ""


def _option(demand: Demand, profile: Profile, engine: EngineSettings) -> Option:
    """The fewest copies of a profile that meet a demand; where no number does, one for each user."""
    slots = most_users(
        engine,
        demand.prompt_tokens,
        demand.output_tokens,
        tokens_per_s=demand.tokens_per_s,
        ttft_s=demand.ttft_s,
        tpot_s=demand.tpot_s,
        overhead_us=profile.overhead_us,
        limit=MOST_USERS,
        all_rounds=True,
    )
    copies = ceil(demand.concurrency / max(slots, 1))
    users = ceil(demand.concurrency / copies)
    figures = worst_figures(
        engine, users, demand.prompt_tokens, demand.output_tokens, overhead_us=profile.overhead_us
    )
    price, power = profile.price, profile.power
    watts = None if power is None else power.watts * copies
    carbon = demand.carbon_gco2_kwh
    return Option(
        profile=profile,
        concurrency=demand.concurrency,
        copies=copies,
        figures=figures,
        slots=slots,
        at_least=slots == MOST_USERS,
        missed=demand.missed_by(figures),
        per_hour=None if price is None else price.per_hour * copies,
        currency="" if price is None else price.currency,
        watts=watts,
        gco2_per_hour=None if watts is None or carbon is None else watts / 1000.0 * carbon,
        shortfall=max(
            figures.ttft_mean / demand.ttft_s,
            figures.tpot_mean / demand.tpot_s,
            demand.tokens_per_s / figures.tokens_per_s_per_user,
        ),
    )
