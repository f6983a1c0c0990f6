"""Which resources meet a service level, and what they cost: `tidegate plan`, and the same as a function.

Each profile is one engine; where one is not enough, several of it share the users. Figures are those of a
closed loop with all users at once (`sim/closed_loop.py`), the harshest pattern that still is one. A price
that nobody published is unknown: such a resource ranks behind all that have one, and is never counted as
free.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import ceil, inf

from policies.profile import Profile
from sim.closed_loop import LoopFigures, closed_loop, most_users
from sim.profile import engine_settings

MOST_COPIES = 64
SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked for. Raises ValueError."""

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
                raise ValueError(f"{name.replace('_', ' ')} must be at least 1")
        for name in ("ttft_s", "tpot_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above zero")

    def met_by(self, figures: LoopFigures) -> bool:
        """Whether these means are good enough."""
        return (
            figures.ttft_mean <= self.ttft_s
            and figures.tpot_mean <= self.tpot_s
            and figures.tokens_per_s_per_user >= self.tokens_per_s
        )


@dataclass(frozen=True, slots=True)
class Option:
    """A number of engines of one profile, and what the users get from them."""

    profile: Profile
    copies: int
    figures: LoopFigures
    """Of the engine with most users; its throughput is that engine's alone."""
    tokens_per_s: float
    """Output tokens of all copies."""
    most: int
    """Users that all copies serve within the service level."""
    meets: bool
    per_hour: float | None
    """None: the price is unknown."""
    currency: str
    watts: float | None
    gco2_per_hour: float | None
    shortfall: float
    """How far it is from the service level: the worst ratio of a figure to what is asked, 1 or less: it is
    met."""

    @property
    def cards(self) -> int:
        return self.profile.cards * self.copies

    @property
    def margin(self) -> float:
        """Users that it could serve over those that are asked for, less one."""
        return self.most / (self.figures.users * self.copies) - 1.0

    @property
    def per_million_tokens(self) -> float | None:
        """Price of a million output tokens at this load; None: unknown."""
        if self.per_hour is None:
            return None
        return self.per_hour / (self.tokens_per_s * SECONDS_PER_HOUR) * 1e6


@dataclass(frozen=True, slots=True)
class Plan:
    """What there is for a demand."""

    options: list[Option] = field(default_factory=list)
    """That meet it: priced ones first, the cheapest first; then those without a price, the fewest cards
    first."""
    nearest: list[Option] = field(default_factory=list)
    """Those that do not, the nearest first."""


def plan(demand: Demand, profiles: Iterable[Profile]) -> Plan:
    """Resources for a demand, of those in `profiles` that serve its model.

    Raises ValueError if their prices are in several currencies: which is cheaper, nobody could say.
    """
    profiles = list(profiles)
    currencies = sorted({profile.price.currency for profile in profiles if profile.price is not None})
    if len(currencies) > 1:
        raise ValueError(f"prices in {' and '.join(currencies)} cannot be compared; give all in one currency")
    wanted = demand.model.lower()
    options = [
        option(demand, profile)
        for profile in profiles
        if wanted in profile.model.lower()
        and demand.prompt_tokens + demand.output_tokens <= profile.limits.max_model_len
    ]
    good = sorted(
        (option for option in options if option.meets),
        key=lambda option: (
            option.per_hour is None,
            option.per_hour or 0.0,
            option.cards,
            option.figures.ttft_mean,
        ),
    )
    bad = sorted((option for option in options if not option.meets), key=lambda option: option.shortfall)
    return Plan(good, bad)


def option(demand: Demand, profile: Profile) -> Option:
    """The fewest copies of a profile that meet a demand; one copy where no number does."""
    engine = engine_settings(profile)
    most = most_users(
        engine,
        demand.prompt_tokens,
        demand.output_tokens,
        tokens_per_s=demand.tokens_per_s,
        ttft_s=demand.ttft_s,
        tpot_s=demand.tpot_s,
        overhead_us=profile.overhead_us,
        limit=max(2 * demand.concurrency, 64),
    )
    copies = ceil(demand.concurrency / most) if most else MOST_COPIES + 1
    meets = copies <= MOST_COPIES
    if not meets:
        copies = 1
    users = ceil(demand.concurrency / copies)
    figures = closed_loop(
        engine, users, demand.prompt_tokens, demand.output_tokens, overhead_us=profile.overhead_us
    )
    price, power = profile.price, profile.power
    watts = None if power is None else power.watts * copies
    carbon = demand.carbon_gco2_kwh
    return Option(
        profile=profile,
        copies=copies,
        figures=figures,
        tokens_per_s=figures.tokens_per_s * demand.concurrency / users,
        most=most * copies,
        meets=meets and demand.met_by(figures),
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
