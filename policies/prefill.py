"""Choosers that count the prompt tokens that stand before a first token.

Computing prompts is what an engine does one after the other, so the tokens still to be computed are its queue. The
router counts them itself (`BackendView.prefill_tokens`): what an engine tells of its queue is older than the
requests that were sent meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp, inf
from random import Random
from typing import Annotated, Final

from policies.base import BackendView, Decision, Policy, Reject, RequestFacts, Tunable
from policies.latency import FADE_S
from policies.lengths import EXPECTED_TOKENS
from policies.mistakes import Mistakes
from policies.ranking import Rank, Recent, Turns, best_first, least_first, only
from policies.refusals import MOST_ADVICE_S
from policies.speeds import TPOT, TTFT
from policies.units import Duration

USUAL_TOKENS: Final = 512
"""Of a prompt, at least, from which the time for one token is told: a step takes its time however few are in it."""
FASTEST_S: Final = 1e-6
"""For a prompt token at least, whatever was learnt: at none, a queue would cost nothing."""


class Lmetric(Policy):
    """The least product of the prompt tokens to compute and the requests in the batch.

        score = (prefill_tokens + new tokens) * (in_flight + 1)

    LMetric (arXiv 2603.15202). The first factor stands for the time to the first token, the second for that of each
    further one, and a product needs no weights: whatever they were, they would cancel in the comparison. New tokens
    are those of the prompt that the backend has not cached (`prefix`).

    Ours: tokens of prompts that wait at the backend are in the first factor, as an independent implementation has
    it; this request is counted in the second, or all idle backends would be alike whatever they have cached.
    Nothing in it knows that one backend is faster than another: a slow one is only noticed by what piles up
    there. Ties go by in_flight / slots, then to the one dispatched to longest ago.

    Scores: score.
    """

    needs = frozenset({"prefix"})

    def __init__(self, rng: Random) -> None:
        self._turns = Turns()

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        if len(backends) == 1:
            return only(backends[0])
        turns = self._turns
        cached = request.cached
        prompt = request.prompt_tokens
        scores = {}
        ranking: list[Rank] = []
        for index, backend in enumerate(backends):
            name = backend.name
            in_flight = backend.in_flight
            new = max(prompt - cached.get(name, 0), 1)
            scores[name] = score = float((backend.prefill_tokens + new) * (in_flight + 1))
            ranking.append((score, in_flight / backend.slots, turns[name], index, name))
        return best_first(ranking, f"least prompt tokens times requests of {len(ranking)}", scores)

    def dispatched(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        self._turns.took(backend.name)


class Gorgo(Policy):
    """The least way to the first token: the network's, and that of all tokens before it.

        cost = RTT + s * (queued tokens + running_weight * running tokens + new tokens)

    seconds, with s seconds for a prompt token. GORGO (arXiv 2602.11688): of the published costs the one that
    weighs a far backend with the prompt in its cache against a near one without. Queued are the prompt tokens of
    requests that have no first token yet, as far as they are not cached; running the tokens of those that have
    one, which slow a prompt down by less than another prompt does (the paper's q^); new those of this prompt that
    are not cached (`prefix`).

    Ours: s is learnt for each backend (`speed`), unless `ms_per_token` gives one for all, as in the paper, where
    all backends are alike and s is searched for like `running_weight`. Learnt, it is (a - RTT) / n + b, with n
    the prompt's tokens, 512 at least, and a + b * n the time to the first token on the idle backend. Running
    tokens are the share of the tokens in flight (prompts and expected answers) that falls to requests with a
    first token, where the paper's code sums their prompts. The paper's limits on KV use and requests per backend
    are the fleet's business here (`slots`). Costs within 10 % or 1 ms of the least are alike: of these the least
    saturated is taken, then the one dispatched to longest ago.

    Where s is learnt, that of an idle backend fades with exp(-age / 60 s), age since this policy last sent it
    anything: so each is tried, and tried again.

    Scores: cost.
    """

    def __init__(
        self,
        rng: Random,
        *,
        ms_per_token: Annotated[
            float | None,
            "Milliseconds for a prompt token, the same everywhere; null: learnt for each backend.",
            Tunable(0.005, 2.0, log=True),
        ] = None,
        running_weight: Annotated[
            float,
            "What a token of a running request counts beside one that is to be computed.",
            Tunable(0.0, 2.0),
        ] = 0.5,
    ) -> None:
        with Mistakes() as wrong:
            if ms_per_token is not None and not 0.0 < ms_per_token < inf:
                wrong(f"ms_per_token must be above 0, not {ms_per_token:g}", "ms_per_token")
            if not 0.0 <= running_weight < inf:
                wrong(f"running_weight must be 0 or more, not {running_weight:g}", "running_weight")
        self.needs = frozenset({"prefix", "speed"} if ms_per_token is None else {"prefix"})
        self._given = None if ms_per_token is None else ms_per_token / 1000.0
        """Seconds for a prompt token."""
        self._running_weight = running_weight
        self._turns = Turns()
        self._used_at: Recent[float] = Recent()

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        if len(backends) == 1:
            return only(backends[0])
        given = self._given
        weight = self._running_weight
        used_at = self._used_at
        cached = request.cached.get
        prompt = request.prompt_tokens
        usual = max(prompt, USUAL_TOKENS)
        costs = []
        for backend in backends:
            in_flight = backend.in_flight
            new = prompt - cached(backend.name, 0)
            tokens = float(backend.prefill_tokens + (new if new > 1 else 1))
            if in_flight:
                tokens += weight * backend.in_flight_tokens * (in_flight - backend.prefilling) / in_flight
            seconds = given
            if not seconds:
                fit = backend.ttft_fit or TTFT
                seconds = max((fit[0] - backend.rtt_s) / usual + fit[1], FASTEST_S)
                if not in_flight:
                    seconds *= exp((used_at.get(backend.name, -inf) - now) / FADE_S)
            costs.append(backend.rtt_s + seconds * tokens)
        reason = f"least round trip and tokens before the first of {len(costs)}"
        return least_first(backends, costs, self._turns, now, reason)

    def dispatched(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        self._turns.took(backend.name)
        self._used_at.note(backend.name, now)


class Mooncake(Policy):
    """The soonest first token by estimate; refused at once where it would come too late anyway.

        first = a + b * prefill_tokens + b * new tokens + c * others that have their first token
        each  = p + q * in_flight

    Least `first`. Algorithm 1 of Mooncake's Conductor (Qin et al., FAST'25): way, queue and prefill of each
    instance summed, the least taken, refused if that misses the time promised for the first token or for further
    ones. a, b, c and p, q are learnt from each backend (`speed`, `policies/speeds.py`): a has the round trip and
    a step of the engine, b * prefill_tokens is the queue, and new tokens are those of the prompt that are not
    cached (`prefix`).

    With `ttft` or `tpot`, a backend that is predicted to miss one is passed over while another one keeps both. If
    none does, the request is refused with `overloaded` and a `Retry-After`, the time until one may, unless nobody
    is busy, or no backend would keep them even when idle: that is no overload, and refusing would not help. The
    time that a request has waited here counts against `ttft`.

    Ours: straight lines in place of the paper's offline fit over prompt and cached length; `c`, since prompts and
    answers share the same cards here; passing over, since backends differ. Left out is the transfer of KV cache, by
    which the paper takes a prefix from whoever has it and hands a prefilled request to another instance to answer:
    backends here are engines at different sites, with no memory between them. Estimates within 10 % or 1 ms of the
    least are alike: of these the least saturated is taken, then the one dispatched to longest ago.

    The estimate of an idle backend, beyond its round trip, fades with exp(-age / 60 s), age since this policy
    last sent it anything: so each is tried, and tried again.

    Scores: `first`, seconds.
    """

    needs = frozenset({"prefix", "speed"})

    def __init__(
        self,
        rng: Random,
        *,
        ttft: Annotated[
            Duration | None,
            "Promised time to the first token, waiting included; null: nothing is refused for it.",
        ] = None,
        tpot: Annotated[
            Duration | None,
            "Promised time for each token after the first; null: nothing is refused for it.",
        ] = None,
    ) -> None:
        with Mistakes() as wrong:
            for name, value in (("ttft", ttft), ("tpot", tpot)):
                if value is not None and not 0.0 < value < inf:
                    wrong(f"{name} must be above 0, not {value:g}", name)
        self._ttft = inf if ttft is None else ttft
        self._tpot = inf if tpot is None else tpot
        self._promises = ttft is not None or tpot is not None
        self._turns = Turns()
        self._used_at: Recent[float] = Recent()

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        if len(backends) == 1 and not self._promises:
            return only(backends[0])
        used_at = self._used_at
        cached = request.cached.get
        prompt = request.prompt_tokens
        ttft, tpot = self._ttft - max(now - request.arrived, 0.0), self._tpot
        misses = []
        estimates = []
        for backend in backends:
            in_flight = backend.in_flight
            a, b, c = backend.ttft_fit or TTFT
            new = prompt - cached(backend.name, 0)
            tokens = backend.prefill_tokens + (new if new > 1 else 1)
            first = a + b * tokens + c * (in_flight - backend.prefilling)
            if not in_flight:
                rtt = backend.rtt_s
                if first > rtt:
                    first = rtt + (first - rtt) * exp((used_at.get(backend.name, -inf) - now) / FADE_S)
            estimates.append(first)
            p, q = backend.tpot_fit or TPOT
            misses.append(first > ttft or p + q * in_flight > tpot)
        if all(misses):
            refusal = self._refusal(request, backends, min(estimates))
            if refusal is not None:
                return refusal
        if len(backends) == 1:
            return only(backends[0])
        return least_first(
            backends, estimates, self._turns, now, f"soonest first token of {len(estimates)}", misses
        )

    def _refusal(
        self, request: RequestFacts, backends: Sequence[BackendView], soonest: float
    ) -> Reject | None:
        """No backend keeps the promises now; None: nor would one that is idle, or all are."""
        expected = request.expected_tokens or EXPECTED_TOKENS
        busy = False
        wait = inf
        for backend in backends:
            busy = busy or backend.in_flight > 0
            a, b, c = backend.ttft_fit or TTFT
            p, q = backend.tpot_fit or TPOT
            new = request.new_tokens(backend.name)
            if a + b * new > self._ttft or p > self._tpot:
                continue
            # The queue gets shorter by a second in each; those in flight leave one by one, over one answer's time.
            late = b * backend.prefill_tokens + c * (backend.in_flight - backend.prefilling)
            late -= self._ttft - a - b * new
            each = p + q * backend.in_flight
            if each > self._tpot:
                late = max(late, (each - self._tpot) / q / backend.in_flight * each * expected)
            wait = min(wait, late)
        if not busy or wait == inf:
            return None
        reason = (
            f"no backend would keep the promised times now; the first token would come in {soonest:.1f} s"
        )
        return Reject("overloaded", reason, min(max(wait, 1.0), MOST_ADVICE_S))

    def dispatched(self, request: RequestFacts, backend: BackendView, now: float) -> None:
        self._turns.took(backend.name)
        self._used_at.note(backend.name, now)


# Fails type checking when a class stops being a Policy.
_guard: tuple[Callable[[Random], Policy], ...] = (Lmetric, Gorgo, Mooncake)
