"""A chooser that weighs seconds against money and carbon, and keeps to a budget of either.

Lagrange's view of a budget. Wanted are the least seconds over all requests, with no more money an hour than a cap.
With a multiplier the cap becomes a price in seconds, and each request can be decided for itself:

    least over i of   seconds_i + lambda * money_i,      lambda >= 0

For the right lambda the decisions spend the cap, or less at lambda = 0. It is found while requests run, by ascent
on the dual function, whose slope is what was spent beyond the cap (online primal-dual; GAR, arXiv 2605.11603, has
it for carbon and latency):

    lambda <- max(0, lambda + eta * (spent - cap * hours) / cap)

Since each step is in proportion to the overspending, what is overspent in all is at most what moves lambda from
where it begins to where it ends: over H hours, a share of (change of lambda) / (eta * H) of the cap. Hours pass
whether requests come or not, so idle ones relax it; as it stops at 0, they save nothing up for later. What it is
worth at a moment follows from when it was last moved, so asking for it moves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp, inf
from random import Random
from typing import Annotated, Final

from policies.base import BackendView, Decision, Finished, Policy, RequestFacts, Tunable
from policies.lengths import EXPECTED_TOKENS
from policies.mistakes import Mistakes
from policies.ranking import Rank, Recent, Turns, best_first, only
from policies.speeds import TPOT, TTFT
from policies.units import Duration

ALIKE: Final = 0.15
"""Scores that differ by less than this share (and 1 ms) are alike: what is expected is no more exact than that. (At
a tenth, backends that are alike, whose times vary by a third, got half as much as each other now and then.)"""
FADE_S: Final = 60.0
"""Time constant with which the expected seconds of a backend that nothing is sent to lose their weight."""
MOST: Final = 1000.0
"""Most that a multiplier becomes, as a multiple of its weight."""
JOULES_PER_KWH: Final = 3.6e6


class Multiplier:
    """What a unit of something costs, in seconds: a weight, or with a cap the dual variable of the cap."""

    __slots__ = ("_at", "_step", "_value", "_weight", "cap_per_hour")

    def __init__(self, weight: float, cap_per_hour: float | None, step: float) -> None:
        """`step`: what overspending the cap of an hour adds, as a multiple of `weight`."""
        self._weight = weight
        self.cap_per_hour = cap_per_hour
        self._step = step * weight
        self._value = weight
        self._at = inf
        """When it was last moved; inf: not yet, and then it is what it begins with."""

    def at(self, now: float) -> float:
        """Its value: time has relaxed it since something was spent."""
        if self.cap_per_hour is None or now <= self._at:
            return self._value
        return max(0.0, self._value - self._step * (now - self._at) / 3600.0)

    def spent(self, amount: float, now: float) -> None:
        """So much was spent; the cap's share of the time since the last call was there for it."""
        if self.cap_per_hour is None:
            return
        hours = max(now - self._at, 0.0) / 3600.0 if self._at < inf else 0.0
        moved = self._value + self._step * (amount / self.cap_per_hour - hours)
        self._value = min(max(0.0, moved), MOST * self._weight)
        self._at = now if self._at == inf else max(self._at, now)


class Cost(Policy):
    """The least of seconds, money and carbon together, inside a SLA and under caps by the hour:

        score   = seconds + lambda_money * money + lambda_carbon * gCO2
        seconds = TTFT + TPOT * (expected tokens - 1)
        money   = (price_input * (new + cached_share * cached) + price_output * expected tokens) / 10^6
        gCO2    = carbon_gco2_kwh * joules_per_token * (new + expected tokens) / (3.6 * 10^6)

    TTFT and TPOT are what is expected there now (`policies/speeds.py`), `new` and `cached` the prompt's tokens that
    it computes and has. The multipliers are seconds that a unit is worth: `money` and `carbon`; with a cap they
    begin there and follow what is really spent, as reported (dual ascent; GAR, arXiv 2605.11603):

        lambda <- max(0, lambda + step * weight * (spent - cap * hours) / cap)

    - `ttft` and `tpot` come first: while somebody keeps to both, who does not comes after all who do.
    - A backend without a price is not free: while money counts it comes after those with one, unless
      `unknown_price` says what to assume. One without a figure for carbon counts as the worst of the candidates.
    - Nothing in flight: its seconds fade with exp(-age / 60 s), age since this policy last dispatched to it, so
      that a backend that was slow once is tried again, by one request at a time. So is one never tried.
    - Scores within 15 % or 1 ms of the least are alike, and the least saturated of them is taken, then the one
      dispatched to longest ago.

    Scores: seconds, money and carbon in them.
    """

    def __init__(
        self,
        rng: Random,
        *,
        money: Annotated[
            float,
            "Seconds that one unit of the ledger's currency is worth.",
            Tunable(10.0, 100_000.0, log=True),
        ] = 1000.0,
        carbon: Annotated[
            float, "Seconds that one gram of CO2 is worth.", Tunable(0.1, 1000.0, log=True)
        ] = 10.0,
        money_per_hour: Annotated[float | None, "Most money an hour; null: no cap."] = None,
        carbon_per_hour: Annotated[float | None, "Most grams of CO2 an hour; null: no cap."] = None,
        step: Annotated[
            float,
            "What overspending the cap of an hour adds to a multiplier, as a multiple of its weight.",
            Tunable(1.0, 100.0, log=True),
        ] = 20.0,
        ttft: Annotated[Duration | None, "Longest time to the first token; null: any."] = None,
        tpot: Annotated[Duration | None, "Longest time for each token after it; null: any."] = None,
        unknown_price: Annotated[
            float | None, "Price per million tokens, of prompt and answer, where none is known; null: none."
        ] = None,
        cached_share: Annotated[
            float, "Price of a cached prompt token, as a share of `price_input`: 0 to 1."
        ] = 1.0,
        joules_per_token: Annotated[float, "Energy for a token, of the prompt or the answer, joules."] = 1.0,
    ) -> None:
        with Mistakes() as wrong:
            for name, value in (
                ("money", money),
                ("carbon", carbon),
                ("unknown_price", unknown_price or 0.0),
                ("joules_per_token", joules_per_token),
            ):
                if not 0.0 <= value < inf:
                    wrong(f"{name} must be 0 or more, not {value:g}", name)
            for name, limit in (
                ("money_per_hour", money_per_hour),
                ("carbon_per_hour", carbon_per_hour),
                ("step", step),
                ("ttft", ttft),
                ("tpot", tpot),
            ):
                if limit is not None and not 0.0 < limit < inf:
                    wrong(f"{name} must be above 0, not {limit:g}", name)
            for name, weight, cap in (("money", money, money_per_hour), ("carbon", carbon, carbon_per_hour)):
                if cap is not None and weight == 0.0:
                    message = f"{name} must be above 0 where {name}_per_hour is given: it moves from there"
                    wrong(message, name)
            if not 0.0 <= cached_share <= 1.0:
                wrong(f"cached_share must be from 0 to 1, not {cached_share:g}", "cached_share")
        self.needs = frozenset({"prefix", "speed", "length"})
        self._money = Multiplier(money, money_per_hour, step)
        self._carbon = Multiplier(carbon, carbon_per_hour, step)
        self._money_counts = money > 0.0
        self._ttft = ttft or inf
        self._tpot = tpot or inf
        self._unknown_price = unknown_price
        self._cached_share = cached_share
        self._joules = joules_per_token
        self._turns = Turns()
        self._used_at: Recent[float] = Recent()
        self._priced: Recent[tuple[float, float, float]] = Recent()
        """Prices of prompt and answer per million tokens, and gCO2 per kWh, when last dispatched to."""

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        if len(backends) == 1:
            return only(backends[0])
        money = self._money.at(now) / 1e6
        carbon = self._carbon.at(now) * self._joules / JOULES_PER_KWH
        dirtiest = 0.0
        for backend in backends:
            grams = backend.carbon_gco2_kwh
            if grams is not None and grams > dirtiest:
                dirtiest = grams
        prompt = request.prompt_tokens
        expected = request.expected_tokens or EXPECTED_TOKENS
        after_first = expected - 1
        cached_tokens = request.cached
        unknown = self._unknown_price
        counts = self._money_counts
        most_ttft, most_tpot = self._ttft, self._tpot
        used_at = self._used_at
        scores = {}
        behind = []
        """0: keeps to the SLA and has a price; 1: has none; 2 and 3: the same, outside of the SLA."""
        for backend in backends:
            name = backend.name
            cached = cached_tokens.get(name, 0)
            new = max(prompt - cached, 1)
            in_flight = backend.in_flight
            alone, each, other = backend.ttft_fit or TTFT
            ttft = alone + each * (backend.prefill_tokens + new) + other * (in_flight - backend.prefilling)
            alone, other = backend.tpot_fit or TPOT
            tpot = alone + other * in_flight
            if not in_flight:
                fresh = exp((used_at.get(name, -inf) - now) / FADE_S)
                ttft *= fresh
                tpot *= fresh
            price_input, price_output = backend.price_input, backend.price_output
            last = 0
            if price_input is None:
                price_input = unknown
            if price_output is None:
                price_output = unknown
            if price_input is None or price_output is None:
                price_input = price_output = 0.0
                last = 1 if counts else 0
            if ttft > most_ttft or tpot > most_tpot:
                last += 2
            grams = backend.carbon_gco2_kwh
            scores[name] = (
                ttft
                + tpot * after_first
                + money
                * (price_input * (new + self._cached_share * (prompt - new)) + price_output * expected)
                + carbon * (dirtiest if grams is None else grams) * (new + expected)
            )
            behind.append(last)
        first = min(behind)
        least = min([score for score, last in zip(scores.values(), behind, strict=True) if last == first])
        alike = least * (1.0 + ALIKE) + 0.001
        turns = self._turns
        ranking: list[Rank] = []
        for index, backend in enumerate(backends):
            name = backend.name
            score = scores[name]
            if behind[index] == first and score <= alike:
                ranking.append((-1.0, backend.saturation(now), turns[name], index, name))
            else:
                ranking.append((behind[index], score, turns[name], index, name))
        return best_first(ranking, f"least cost of {len(ranking)}", scores)

    def dispatched(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        name = backend.name
        self._turns.took(name)
        self._used_at.note(name, now)
        unknown = self._unknown_price or 0.0
        self._priced.note(
            name,
            (
                unknown if backend.price_input is None else backend.price_input,
                unknown if backend.price_output is None else backend.price_output,
                backend.carbon_gco2_kwh or 0.0,
            ),
        )

    def finished(self, finished: Finished) -> None:
        price_input, price_output, grams = self._priced.get(finished.backend, (0.0, 0.0, 0.0))
        cached = finished.cached_tokens
        new = max(finished.prompt_tokens - cached, 0)
        completion = finished.completion_tokens
        money = price_input * (new + self._cached_share * cached) + price_output * completion
        self._money.spent(money / 1e6, finished.ended)
        energy = self._joules * (new + completion)
        self._carbon.spent(grams * energy / JOULES_PER_KWH, finished.ended)


# Fails type checking when a class stops being a Policy.
_guard: tuple[Callable[[Random], Policy], ...] = (Cost,)
