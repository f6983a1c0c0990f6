"""Choosers that go by the time to the first token: as it was lately at that load, as it was at its worst, or as
it is predicted.

A stream says how fast a backend is when it begins, long before it ends: so the time to the first token stands here
where the papers, which are about short requests, have the time of the whole answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from math import exp, inf
from random import Random
from typing import Annotated, Final

from policies.base import BackendView, Decision, Policy, RequestFacts, Tunable
from policies.lengths import EXPECTED_TOKENS
from policies.mistakes import Mistakes
from policies.ranking import ALIKE, Rank, Recent, Turns, best_first, least_first, only
from policies.speeds import TPOT, TTFT
from policies.units import Duration

LEVELS: Final = 32
"""Loads up to one are told apart in so many steps; above it they are one more."""
SAMPLES: Final = 8
"""First tokens kept for each level of load of a backend."""
SAMPLE_AGE_S: Final = 60.0
"""First tokens that came longer ago are forgotten."""
FADE_S: Final = 60.0
"""Time constant with which what is predicted of an idle backend fades while nothing is sent there, seconds: it may
have been slow for a reason that has passed, and who is sent nothing teaches nothing."""


class FirstTokens:
    """Recent times to the first token of one backend, by the load that it had when they were asked for."""

    __slots__ = ("_medians", "_samples", "at", "medians")

    def __init__(self) -> None:
        self._samples: dict[int, deque[tuple[float, float]]] = {}
        """By level of load: (when it came, seconds), the oldest first."""
        self._medians: dict[int, float] = {}
        self.medians: list[float] = []
        """Seconds by level of load; of a level without samples the nearest one's, of two as near the emptier's."""
        self.at = -inf
        """When the last one came."""

    def note(self, load: float, seconds: float, now: float) -> None:
        """A first token came; `load`: requests in flight beside it, over slots, when it was asked for."""
        self.at = now
        samples = self._samples
        noted = level_of(load)
        samples.setdefault(noted, deque(maxlen=SAMPLES)).append((now, seconds))
        for level, known in list(samples.items()):
            if level != noted and known[0][0] >= now - SAMPLE_AGE_S:
                continue
            while known and known[0][0] < now - SAMPLE_AGE_S:
                known.popleft()
            if known:
                ordered = sorted([sample[1] for sample in known])
                middle = len(ordered) // 2
                self._medians[level] = 0.5 * (ordered[middle] + ordered[-1 - middle])
            else:
                del samples[level], self._medians[level]
        levels = sorted(samples)
        self.medians = []
        for level, above in zip(levels, [*levels[1:], 2 * LEVELS - levels[-1]], strict=True):
            # Up to the middle between two levels that have samples; the last one's up to the top.
            reach = (level + above) // 2 + 1 - len(self.medians)
            self.medians += [self._medians[level]] * reach


def level_of(load: float) -> int:
    """Which of the `LEVELS` a load belongs to."""
    return int(load * LEVELS) if load < 1.0 else LEVELS


class Prequal(Policy):
    """Hot or cold by load; of the cold ones the one whose first tokens came soonest lately, at such a load.

        load  = in_flight / slots
        theta = the `quantile` of the candidates' loads
        hot   = load > theta
        time  = median of the backend's last first-token times that were asked for at a similar load
        cold ones by time, then hot ones by load

    HCL, "hot-cold lexicographic", of Prequal (Wydrowski, Kleinberg, Rumble and Archer, "Load is not what you should
    balance", NSDI'24, arXiv 2312.10172). Taken over are the rule, the median at similar load and the default of
    `quantile`: 1 goes by time alone, 0 takes the least load, and by time only among equals. Left out are probes and
    their pool: they tell a client what other clients do, and here all requests pass one router, whose counts are
    exact.

    Ours: requests in flight are taken over `slots`, since backends differ here, and the paper's replicas are
    alike. The quantile is one of the candidates' present loads, not of loads seen lately, so the least loaded is
    always cold and the paper's second case, none cold and so the least load, only orders the fallbacks. It is
    interpolated between two loads: by nearest rank, none of two to six backends would ever be hot. Similar loads
    are those in the same 32nd of the slots, else in the nearest that has samples; up to 8 samples are kept of
    each, for 60 s. Times within 10 % or 1 ms of the least are alike: of these the least load is taken, then the
    one dispatched to longest ago.

    A backend that is idle and had no first token for 60 s is tried; one that is busy and never had one comes after
    the cold ones.

    Scores: seconds, of those that are cold and measured.
    """

    def __init__(
        self,
        rng: Random,
        *,
        quantile: Annotated[
            float, "Quantile of the loads above which a backend is hot, 0 to 1.", Tunable(0.0, 1.0)
        ] = 0.84,
    ) -> None:
        with Mistakes() as wrong:
            if not 0.0 <= quantile <= 1.0:
                wrong(f"quantile must be 0 to 1, not {quantile:g}", "quantile")
        self._quantile = quantile
        self._turns = Turns()
        self._sent: Recent[tuple[float, float] | None] = Recent()
        """When, and at what load, by request and backend."""
        self._first_tokens: Recent[FirstTokens | None] = Recent()

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        if len(backends) == 1:
            return only(backends[0])
        turns = self._turns
        known = self._first_tokens
        loads = [backend.in_flight / backend.slots for backend in backends]
        theta = _quantile(loads, self._quantile)
        since = now - SAMPLE_AGE_S
        scores = {}
        ranking: list[Rank] = []
        cold = []
        least = inf
        for index, backend in enumerate(backends):
            name = backend.name
            load = loads[index]
            times = known.get(name, None)
            if load > theta:
                ranking.append((4.0, load, turns[name], index, name))
            elif times is None or times.at < since:
                ranking.append((3.0 if backend.in_flight else 0.0, load, turns[name], index, name))
            else:
                scores[name] = seconds = times.medians[level_of(load)]
                if seconds < least:
                    least = seconds
                cold.append(index)
        alike = least * (1.0 + ALIKE) + 0.001
        for index in cold:
            name = backends[index].name
            seconds = scores[name]
            if seconds <= alike:
                ranking.append((1.0, loads[index], turns[name], index, name))
            else:
                ranking.append((2.0, seconds, 0.0, index, name))
        return best_first(ranking, f"soonest first tokens of {len(cold)} cold, of {len(loads)}", scores)

    def dispatched(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        self._turns.took(backend.name)
        self._sent.note(f"{request.id} {backend.name}", (now, (backend.in_flight - 1) / backend.slots))

    def first_token(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        sent = self._sent.get(f"{request.id} {backend.name}", None)
        if sent is None:
            return
        times = self._first_tokens.get(backend.name, None) or FirstTokens()
        times.note(sent[1], now - sent[0], now)
        self._first_tokens.note(backend.name, times)


def _quantile(values: Sequence[float], share: float) -> float:
    """With linear interpolation between the two values next to it."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = int(position)
    value = ordered[below]
    return value + (position - below) * (ordered[min(below + 1, len(ordered) - 1)] - value)


class PeakEwma(Policy):
    """The least recent worst time to the first token, times the requests it would be shared by.

        cost = peak * exp(-age / tau) * (in_flight + 1)
        on a sample above the peak:  peak = sample
        on any other:                peak = sample + (peak - sample) * exp(-age / tau)

    `age` is the time since the last sample, and `tau` is `decay`. An average that believes bad news at once and
    good news slowly: one long prefill, and the backend is left alone until that is forgotten. (Finagle's
    `PeakEwma`, Twitter 2016; Linkerd's balancer, there between two drawn at random. 10 s is the default of both.)

    Ours: the time to the first token, where they have the whole response; the least of all candidates, since the
    counts here are exact, and herding is what two drawn at random are for; reading the cost changes nothing, where
    Finagle's stores the decayed peak and weighs the next sample by the time since it was read.

    A backend that was never measured costs nothing while it is idle, so that it is tried, by one request at a time;
    while it is busy it comes after all others, those of less load first. Equal costs go to the one dispatched to
    longest ago.

    Scores: cost, of those that are measured.
    """

    def __init__(
        self,
        rng: Random,
        *,
        decay: Annotated[
            Duration, "Time constant with which a peak is forgotten.", Tunable(1.0, 100.0, log=True)
        ] = 10.0,
    ) -> None:
        with Mistakes() as wrong:
            if not 0.0 < decay < inf:
                wrong(f"decay must be above 0, not {decay:g}", "decay")
        self._decay = decay
        self._turns = Turns()
        self._sent: Recent[float] = Recent()
        """When, by request and backend."""
        self._peaks: Recent[tuple[float, float]] = Recent()
        """(peak, when its last sample came)."""

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        if len(backends) == 1:
            return only(backends[0])
        turns = self._turns
        peaks = self._peaks
        decay = self._decay
        scores = {}
        ranking: list[Rank] = []
        for index, backend in enumerate(backends):
            name = backend.name
            peak, at = peaks.get(name, (0.0, 0.0))
            if peak:
                scores[name] = cost = peak * exp((at - now) / decay) * (backend.in_flight + 1)
                ranking.append((0.0, cost, turns[name], index, name))
            elif backend.in_flight:
                ranking.append((1.0, backend.in_flight / backend.slots, turns[name], index, name))
            else:
                ranking.append((0.0, 0.0, turns[name], index, name))
        return best_first(ranking, f"least peak of {len(ranking)}", scores)

    def dispatched(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        self._turns.took(backend.name)
        self._sent.note(f"{request.id} {backend.name}", now)

    def first_token(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        sent = self._sent.get(f"{request.id} {backend.name}", inf)
        if sent == inf:
            return
        peak, at = self._peaks.get(backend.name, (0.0, 0.0))
        sample = max(now - sent, 1e-6)
        if sample < peak:
            sample += (peak - sample) * exp((at - now) / self._decay)
        self._peaks.note(backend.name, (sample, now))


class Forecast(Policy):
    """The least predicted times, to the first token and for each further one, as shares of what is promised.

        first = waited + a + b * (prefill_tokens + new tokens) + c * others with a first token + room
        each  = p + q * in_flight
        room  = max(0, in_flight_tokens + tokens - kv_tokens) / in_flight_tokens * each * expected tokens
        worse = max(first / ttft, each / tpot)
        score = ttft_weight * first / ttft + (1 - ttft_weight) * each / tpot   if worse <= 1
                worse                                                          otherwise

    Least score; the first kind is at most 1 and the second above, so whoever keeps both promises comes before
    whoever breaks one. a, b, c and p, q are learnt from each backend (`speed`, `policies/speeds.py`; the round
    trip is in a), tokens that are new there from what it has cached (`prefix`), and expected tokens from the
    tenant's last answers (`length`). `waited` is the time since the request's arrival. `room` is the time until
    so many tokens of the KV cache are free again, where the engine tells its size: all in flight are gone after
    about one answer.

    After llm-d's predicted-latency scheduling, which sums what is left of both promises with weights 0.8 and 0.2.
    Ours: two straight lines per backend in place of gradient-boosted trees for a pool of equals; shares in place
    of seconds, so that 0.1 s of a second and 10 ms of a tenth weigh alike; the least of them, where llm-d takes
    the fullest backend that still keeps the promise; the worse share, where none keeps both; `room`. Scores
    within 10 % of the least are alike: of these the least saturated is taken, then the one dispatched to longest
    ago.

    What is predicted of an idle backend, beyond its round trip, fades with exp(-age / 60 s), age since this
    policy last sent it anything: so each is tried, and tried again.

    Scores: score.
    """

    needs = frozenset({"prefix", "speed", "length"})

    def __init__(
        self,
        rng: Random,
        *,
        ttft: Annotated[Duration, "Promised time to the first token, waiting included."] = 2.0,
        tpot: Annotated[Duration, "Promised time for each token after the first."] = 0.1,
        ttft_weight: Annotated[
            float, "Weight of the first token, 0 to 1; further tokens have the rest.", Tunable(0.0, 1.0)
        ] = 0.8,
    ) -> None:
        with Mistakes() as wrong:
            for name, value in (("ttft", ttft), ("tpot", tpot)):
                if not 0.0 < value < inf:
                    wrong(f"{name} must be above 0, not {value:g}", name)
            if not 0.0 <= ttft_weight <= 1.0:
                wrong(f"ttft_weight must be 0 to 1, not {ttft_weight:g}", "ttft_weight")
        self._ttft = ttft
        self._tpot = tpot
        self._ttft_weight = ttft_weight
        self._turns = Turns()
        self._used_at: Recent[float] = Recent()

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        if len(backends) == 1:
            return only(backends[0])
        used_at = self._used_at
        cached = request.cached.get
        prompt, expected = request.prompt_tokens, request.expected_tokens or EXPECTED_TOKENS
        waited = max(now - request.arrived, 0.0)
        weight = self._ttft_weight
        misses = []
        scores = []
        for backend in backends:
            in_flight = backend.in_flight
            a, b, c = backend.ttft_fit or TTFT
            p, q = backend.tpot_fit or TPOT
            new = prompt - cached(backend.name, 0)
            tokens = backend.prefill_tokens + (new if new > 1 else 1)
            first = a + b * tokens + c * (in_flight - backend.prefilling)
            each = p + q * in_flight
            if in_flight:
                held, room = backend.in_flight_tokens, backend.kv_tokens
                if room and held + prompt + expected > room:
                    first += (held + prompt + expected - room) / held * each * expected
            else:
                fade = exp((used_at.get(backend.name, -inf) - now) / FADE_S)
                rtt = backend.rtt_s
                first = rtt + (first - rtt) * fade if first > rtt else first
                each *= fade
            first_share = (waited + first) / self._ttft
            each_share = each / self._tpot
            worse = first_share if first_share > each_share else each_share
            misses.append(worse > 1.0)
            scores.append(worse if worse > 1.0 else weight * first_share + (1.0 - weight) * each_share)
        reason = f"least predicted times of {len(scores)}"
        if all(misses):
            reason = f"none of {len(scores)} is predicted to keep the promised times: the least late"
        return least_first(backends, scores, self._turns, now, reason, misses)

    def dispatched(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        self._turns.took(backend.name)
        self._used_at.note(backend.name, now)


# Fails type checking when a class stops being a Policy.
_guard: tuple[Callable[[Random], Policy], ...] = (Prequal, PeakEwma, Forecast)
