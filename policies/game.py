"""Choosers that share requests out as game theory says, by service rates that they learn.

Backend i serves up to mu_i requests a second and is sent x_i of the Phi that arrive. As an M/M/1 queue it takes
1 / (mu_i - x_i) seconds for each, and the way to it RTT_i more.

Bargaining (`nash`). Each backend wants room left: mu_i - x_i. Nash's axioms (1950) ask for the shares that
maximise the product of these, so with a multiplier for sum x = Phi all of 1 / (mu_i - x_i) are equal: everyone
keeps the same room, hence everyone is as fast:

    x_i = mu_i - (sum mu - Phi) / n

over the n fastest, where the slowest is dropped for as long as its share is negative (Grosu and Chronopoulos, "A
game-theoretic model and algorithm for load balancing in distributed systems", IPPS 2002).

Wardrop (`wardrop`). Requests that each look for the shortest way end where no way is shorter (Wardrop's first
principle, 1952): c_i(x_i) = RTT_i + 1 / (mu_i - x_i) is one level on all that are used, and above it on the others.
That is not the best for all of them together. The sum of x_i c_i(x_i) is least (his second principle) where its
derivative is one level,

    RTT_i + mu_i / (mu_i - x_i)^2 = level

which is what each would look for if it also paid for the time that it costs the others, x_i c_i'(x_i): Pigou's toll
(1920). Solved for x_i, with nothing below zero,

    x_i = mu_i - sqrt(mu_i / (level - RTT_i))      selfish: x_i = mu_i - 1 / (level - RTT_i)

grow with the level, so the level at which they add up to Phi is found by bisection (water filling). Without RTT the
selfish equilibrium is the bargain.

The same optimum is where best responses lead, each request to the least marginal cost at the present rates (a
potential game: arXiv 2501.15324). Water filling is what is used here, with shares that are kept request by request.
With rates of the last 20 s both are at the optimum in the long run, and while the load stays, water filling is
nearer to it in every hundred requests (1.5 of them are elsewhere, 1.9 with best responses; eight fleets as in
`tests/policies/test_game.py`). When the load doubles, best responses follow sooner (1.5 instead of 2.4 over the
next 4000), but by making up for what was not sent: a backend that returns, or is found to be faster than was
thought, gets nearly everything until its rate is what it should be, and is flooded. Shares make up for nothing.

When as much arrives as can be served, there is no such point, and shares go in proportion to mu.

Service rates are `speeds.capacity_rps` for the mean request, so they are no better known than the lines behind
them. At little load the formulas give the fastest nearly everything: of backends that are alike, the one whose
estimate happens to be best. So estimates which differ by less than they are uncertain are taken for one, their
mean by precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import exp, inf, log, sqrt
from random import Random
from typing import Annotated, Final, NamedTuple

from policies.base import BackendView, Decision, Policy, RequestFacts, Tunable
from policies.lengths import EXPECTED_TOKENS, Mean
from policies.mistakes import Mistakes
from policies.ranking import Rank, Recent, Turns, best_first, only
from policies.speeds import capacity_rps
from policies.units import Duration

SOLVED_FOR_S: Final = 1.0
"""How long shares are used before they are computed anew."""
SEEN_S: Final = 10.0
"""A backend that was no candidate for longer has no share, and nothing to make up for when it returns. One that is
full for a moment keeps its own."""
FORGET_S: Final = 600.0
"""Time constant with which it is forgotten how far behind its share a backend is."""
TRY: Final = 100
"""Of so many requests one goes to backends that have no share, so that they are measured again."""
SAMPLES: Final = 200
"""That the variance of an estimate is made of: twice as many as the estimate itself is (`speeds.MEMORY`)."""
CERTAIN: Final = 3.0
"""Standard deviations by which estimates differ that are not taken for one."""
PROMPT_TOKENS: Final = 512
"""Of the request at which an estimate's variance is taken: one that never changes."""
FULL: Final = 0.999
"""Share of sum mu from which on shares go in proportion to mu; the formulas differ from that by less than this does
from 1."""


class Rate:
    """Events a second, each counting exp(-age / `memory_s`)."""

    __slots__ = ("_began", "_count", "_last", "_memory_s")

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._began = inf
        self._last = -inf
        self._count = 0.0

    def note(self, now: float) -> float:
        """An event. The rate of those before it (what a Poisson arrival finds is the mean); 0 for the first."""
        before = self._count * exp((self._last - now) / self._memory_s)
        self._count = before + 1.0
        self._last = now
        self._began = min(self._began, now)
        window = self._memory_s * (1.0 - exp((self._began - now) / self._memory_s))
        return before / window if window > 0.0 else 0.0


class Wobble:
    """How uncertain an estimate is, from how it moves: a running variance."""

    __slots__ = ("_mean", "_variance", "count")

    def __init__(self) -> None:
        self.count = 0
        self._mean = 0.0
        self._variance = 0.0

    def note(self, estimate: float) -> None:
        self.count = min(self.count + 1, SAMPLES)
        step = 1.0 / self.count
        moved = estimate - self._mean
        self._mean += step * moved
        self._variance = (1.0 - step) * (self._variance + step * moved * moved)

    @property
    def variance(self) -> float:
        """Of the logarithm of a time. One that was never measured may be wrong by a factor."""
        return self._variance + 1.0 / (1 + self.count) ** 2


class Player(NamedTuple):
    """A backend when it was last a candidate."""

    slots: int
    rtt_s: float
    time_s: float
    """That the mean request takes with all slots taken."""
    seen_at: float


class _Shares(Policy):
    """Sends each request to the candidate that is furthest behind its share.

    Of the shares s_i of a request's candidates (those of all backends, made to add up to 1), each dispatch gives
    every candidate s_i and takes 1 from the backend that it went to; the one with the most is next. So after N
    dispatches each has had s_i N, to within one or two. Ties go to the one dispatched to longest ago.
    """

    def __init__(
        self,
        rng: Random,
        *,
        arrivals_s: Annotated[
            Duration,
            "Time constant of the mean that the arrival rate is.",
            Tunable(5.0, 300.0, log=True),
        ] = 20.0,
    ) -> None:
        with Mistakes() as wrong:
            if not 0.0 < arrivals_s < inf:
                wrong(f"arrivals_s must be above 0, not {arrivals_s:g}", "arrivals_s")
        self.needs = frozenset({"speed", "length"})
        self._turns = Turns()
        self._sent = 0
        self._tried: Recent[int] = Recent()
        """How many had been sent when a backend last got one."""
        self._arrivals = Rate(arrivals_s)
        self._prompt = Mean()
        self._answer = Mean()
        self._wobbles: Recent[Wobble] = Recent()
        self._players: dict[str, Player] = {}
        self._rates: dict[str, float] = {}
        """x_i by name."""
        self._credits: dict[str, float] = {}
        """How far each player is behind its share, requests."""
        self._solved_at = -inf
        self._decided: tuple[str, Sequence[tuple[str, float]], Mapping[str, Player]] = ("", (), {})
        """The last decision: request, shares, and the candidates if shares are to be computed anew."""

    def rates(self, mu: Sequence[float], rtt: Sequence[float], phi: float) -> list[float]:
        """x_i, requests a second, that add up to `phi`, which is above 0 and below the sum of `mu`."""
        raise NotImplementedError

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        rates = self._rates
        total = 0.0
        without = 0
        stale = now - self._solved_at >= SOLVED_FOR_S
        for backend in backends:
            rate = rates.get(backend.name)
            if rate is None:
                stale = True
            elif rate:
                total += rate
            else:
                without += 1
        found = self._seen(backends, now) if stale else {}
        count = len(backends)
        credits = self._credits
        turns = self._turns
        tried = self._tried
        due = self._sent - TRY * without
        shares = []
        scores = {}
        ranking: list[Rank] = []
        for index, backend in enumerate(backends):
            name = backend.name
            share = rates.get(name, 0.0) / total if total else 1.0 / count
            shares.append((name, share))
            scores[name] = credit = credits.get(name, 0.0) + share
            first = 0.0 if share or tried.get(name, due) > due else -1.0
            ranking.append((first, -credit, turns[name], index, name))
        self._decided = (request.id, shares, found)
        if count == 1:
            return only(backends[0])
        send = best_first(ranking, f"furthest behind its share, of {count}", scores)
        if ranking[0][0]:
            send.reason = "tried, since it had nothing for long"
        return send

    def dispatched(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        name = backend.name
        self._turns.took(name)
        self._sent += 1
        self._tried.note(name, self._sent)
        phi = self._arrivals.note(now)
        self._prompt.note(request.prompt_tokens)
        self._answer.note(request.expected_tokens or EXPECTED_TOKENS)
        credits = self._credits
        decided, shares, found = self._decided
        if request.id == decided:
            for candidate, share in shares:
                credits[candidate] = credits.get(candidate, 0.0) + share
            if found:
                self._solve(found, phi, now)
                self._decided = (decided, shares, {})
        # One that was not decided here comes without a share for anybody: without a floor, debts would only grow.
        self._credits[name] = max(self._credits.get(name, 0.0) - 1.0, -1.0)

    def first_token(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        wobble = self._wobbles.get(backend.name, Wobble())
        wobble.note(log(backend.slots / capacity_rps(backend, PROMPT_TOKENS, EXPECTED_TOKENS)))
        self._wobbles.note(backend.name, wobble)

    def _seen(self, backends: Sequence[BackendView], now: float) -> dict[str, Player]:
        prompt = self._prompt.value
        answer = self._answer.value or EXPECTED_TOKENS
        return {
            one.name: Player(one.slots, one.rtt_s, one.slots / capacity_rps(one, prompt, answer), now)
            for one in backends
        }

    def _solve(self, found: Mapping[str, Player], phi: float, now: float) -> None:
        """Compute shares anew, and forget who is no candidate any more."""
        players = {**self._players, **found}
        self._players = players = {name: one for name, one in players.items() if now - one.seen_at <= SEEN_S}
        nobody = Wobble()
        times = alike(
            [(log(one.time_s), self._wobbles.get(name, nobody).variance) for name, one in players.items()]
        )
        mu = [one.slots / exp(time) for one, time in zip(players.values(), times, strict=True)]
        total = sum(mu)
        if phi >= FULL * total:
            rates = mu
        else:
            rates = self.rates(mu, [one.rtt_s for one in players.values()], max(phi, 1e-6 * total))
        self._rates = dict(zip(players, rates, strict=True))
        kept = exp((self._solved_at - now) / FORGET_S)
        self._credits = {name: kept * self._credits.get(name, 0.0) for name in players}
        self._solved_at = now


class Nash(_Shares):
    """Shares that a fair bargain gives, each backend with the same room left: x_i = mu_i - (sum mu - Phi) / n.

    mu_i is how many requests a second backend i can serve, Phi how many arrive; of the n fastest, the slowest is
    dropped while its share is negative (Grosu and Chronopoulos, IPPS 2002; Nash, 1950). If Phi >= sum mu, shares
    are in proportion to mu. As all have the same room, they are equally fast, to whichever a request goes.

    Both are learnt: mu_i from the times that requests take (`policies/speeds.py`) for the mean prompt and answer,
    Phi from the last seconds. All requests that it decides are taken to be of one kind: where models differ, give
    each a rule. One request of a hundred goes to backends that got nothing otherwise.

    Scores: share of all requests minus those that it had, in requests; more is better.
    """

    def rates(self, mu: Sequence[float], rtt: Sequence[float], phi: float) -> list[float]:
        return bargaining(mu, phi)


class Wardrop(_Shares):
    """Shares of least mean delay: the same RTT_i + mu_i / (mu_i - x_i)^2 on all that are used.

    That is the time that one more request a second costs all of them together: its own, RTT_i + 1 / (mu_i - x_i),
    and the toll for what it costs the others (Wardrop's second principle, 1952; Pigou, 1920). With `selfish` the
    toll is left out and all take the same time, which on the whole is longer. If Phi >= sum mu, shares are in
    proportion to mu.

    mu_i and Phi are learnt as `nash` does, RTT_i is the router's own average.

    Scores: share of all requests minus those that it had, in requests; more is better.
    """

    def __init__(
        self,
        rng: Random,
        *,
        selfish: Annotated[bool, "Without the toll: each request minds its own delay only."] = False,
        arrivals_s: Annotated[
            Duration,
            "Time constant of the mean that the arrival rate is.",
            Tunable(5.0, 300.0, log=True),
        ] = 20.0,
    ) -> None:
        super().__init__(rng, arrivals_s=arrivals_s)
        self._selfish = selfish

    def rates(self, mu: Sequence[float], rtt: Sequence[float], phi: float) -> list[float]:
        return water_filling(mu, rtt, phi, self._selfish)


def bargaining(mu: Sequence[float], phi: float) -> list[float]:
    """Nash's shares: each of the fastest keeps the same room, (sum mu - phi) / n; 0 for who has not as much.

    `phi` is above 0 and below the sum of `mu`; all are requests a second.
    """
    fastest = sorted(mu)
    total = sum(fastest)
    count = len(fastest)
    for slowest in fastest:
        if slowest * count >= total - phi or count == 1:
            break
        total -= slowest
        count -= 1
    room = (total - phi) / count
    return [max(one - room, 0.0) for one in mu]


def water_filling(
    mu: Sequence[float], rtt: Sequence[float], phi: float, selfish: bool = False
) -> list[float]:
    """Rates of one marginal cost, or with `selfish` of one delay, on all that are used.

    `mu` and `phi` are requests a second, `phi` above 0 and below the sum of `mu`; `rtt` is seconds. The level is
    bisected; where Newton's step stays between the bounds it is taken instead.
    """
    least = min([way + 1.0 / one for one, way in zip(mu, rtt, strict=True)])
    room = (sum(mu) - phi) / len(mu)
    if selfish:
        most = max(least, max(rtt) + 1.0 / room)
    else:
        most = max(least, max([way + one / room**2 for one, way in zip(mu, rtt, strict=True)]))
    pairs = list(zip(mu, rtt, strict=True))
    level = most
    rates: list[float] = []
    for _ in range(100):
        total = slope = 0.0
        rates = []
        for one, way in pairs:
            above = level - way
            rate = 0.0
            if above * one > 1.0:
                left = 1.0 / above if selfish else sqrt(one / above)
                rate = one - left
                total += rate
                slope += left / above
            rates.append(rate)
        if abs(total - phi) <= 1e-9 * phi:
            break
        if total < phi:
            least = level
        else:
            most = level
        if not selfish:
            slope *= 0.5
        level += (phi - total) / slope if slope else inf
        if not least < level < most:
            level = 0.5 * (least + most)
            if not least < level < most:
                break  # no number lies between them
    return rates


def alike(estimates: Sequence[tuple[float, float]]) -> list[float]:
    """Estimates, each a mean and its variance, where those that are not surely different are one.

    From the least upwards, each joins the group before it if it is within `CERTAIN` standard deviations of its
    mean.
    """
    found = [0.0] * len(estimates)
    group: list[int] = []
    mean = weight = 0.0
    for index in sorted(range(len(estimates)), key=estimates.__getitem__):
        estimate, variance = estimates[index]
        if group and estimate - mean > CERTAIN * sqrt(variance + 1.0 / weight):
            for member in group:
                found[member] = mean
            group, mean, weight = [], 0.0, 0.0
        group.append(index)
        weight += 1.0 / variance
        mean += (estimate - mean) / (variance * weight)
    for member in group:
        found[member] = mean
    return found


# Fails type checking when a class stops being a Policy.
_guard: tuple[Callable[[Random], Policy], ...] = (Nash, Wardrop)
