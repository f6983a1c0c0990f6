"""What so many users at once get from one engine, each asking again as soon as it has its answer.

It is how capacity is measured (white paper, chapter 3; `vllm bench serve --max-concurrency`): requests of
one length, the first ones of all users at the same moment.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from math import ceil, inf

import numpy as np

from sim.engine import FINISHED, Engine, EngineSettings, Sequence

SECOND = 1e6
"""Microseconds."""
WARM_ROUNDS, STEADY_ROUNDS, COOL_ROUNDS = 1, 2, 1
"""Of the loop that shows what comes after the first wave."""


@dataclass(frozen=True, slots=True)
class LoopFigures:
    """One closed loop. Times are seconds."""

    users: int
    ttft_mean: float
    ttft_p50: float
    ttft_p99: float
    tpot_mean: float
    """Over requests, of (last token - first token) / (tokens - 1); 0 with answers of one token."""
    tpot_p99: float
    total_mean: float
    tokens_per_s: float
    """Output tokens of all, over the time from the first request to the last token; after warm rounds, over
    the mean time of a round."""

    @property
    def tokens_per_s_per_user(self) -> float:
        return self.tokens_per_s / self.users


def closed_loop(
    settings: EngineSettings,
    users: int,
    prompt_tokens: int,
    output_tokens: int,
    *,
    overhead_us: float = 0.0,
    rounds: int = 1,
    warm_rounds: int = 0,
    cool_rounds: int = 0,
) -> LoopFigures:
    """`rounds`: requests of each user, of which the first `warm_rounds` are not in the means, and not the
    last `cool_rounds` either, in which one user after the other stops.

    Raises ValueError for a request that does not fit into the KV cache.
    """
    engine = Engine(settings)
    measured: list[Sequence] = []
    asking = deque([(0, 0)] * users)
    """(when, which of that user's requests), in order."""
    overhead = round(overhead_us)
    number = now = 0
    while asking or engine.next_at < inf:
        now = ceil(engine.next_at) if engine.next_at < inf else asking[0][0]
        if asking:
            now = min(now, asking[0][0])
        for event in engine.advance(now):
            made = event.sequence.tag
            assert isinstance(made, int)
            if event.kind == FINISHED and made + 1 < rounds:
                asking.append((now + overhead, made + 1))
        while asking and asking[0][0] <= now:
            _, made = asking.popleft()
            hashes = own_hashes(settings, prompt_tokens, output_tokens, number)
            sequence = Sequence(prompt_tokens, output_tokens, hashes, made)
            number += 1
            engine.submit(sequence, now)
            if warm_rounds <= made < rounds - cool_rounds:
                measured.append(sequence)
    first = np.array([sequence.first_token - sequence.arrived for sequence in measured]) + overhead
    total = np.array([sequence.finished - sequence.arrived for sequence in measured]) + overhead
    per_token = (total - first) / max(output_tokens - 1, 1)
    # Little's law: who asks again at once makes a request each time that one takes.
    round_us = float(total.mean()) if warm_rounds else (now + overhead) / rounds
    return LoopFigures(
        users=users,
        ttft_mean=float(first.mean()) / SECOND,
        ttft_p50=float(np.quantile(first, 0.5)) / SECOND,
        ttft_p99=float(np.quantile(first, 0.99)) / SECOND,
        tpot_mean=float(per_token.mean()) / SECOND,
        tpot_p99=float(np.quantile(per_token, 0.99)) / SECOND,
        total_mean=float(total.mean()) / SECOND,
        tokens_per_s=users * output_tokens / round_us * SECOND,
    )


def worst_figures(
    settings: EngineSettings,
    users: int,
    prompt_tokens: int,
    output_tokens: int,
    *,
    overhead_us: float = 0.0,
) -> LoopFigures:
    """Figure by figure, the worse of the first wave and of the rounds after it: what a loop keeps throughout.

    First tokens are latest in the wave, when all prompts come at once. In the rounds after it the answers
    share their steps with others' prompts, so further tokens are latest there.
    """
    wave, later = _loops(settings, users, prompt_tokens, output_tokens, overhead_us)
    worst = {
        name: (min if name == "tokens_per_s" else max)(getattr(wave, name), getattr(later, name))
        for name in LoopFigures.__slots__
    }
    return LoopFigures(**worst)


def _loops(
    settings: EngineSettings, users: int, prompt_tokens: int, output_tokens: int, overhead_us: float
) -> Iterator[LoopFigures]:
    """Of the first wave, then of the rounds after it."""
    yield closed_loop(settings, users, prompt_tokens, output_tokens, overhead_us=overhead_us)
    yield closed_loop(
        settings,
        users,
        prompt_tokens,
        output_tokens,
        overhead_us=overhead_us,
        rounds=WARM_ROUNDS + STEADY_ROUNDS + COOL_ROUNDS,
        warm_rounds=WARM_ROUNDS,
        cool_rounds=COOL_ROUNDS,
    )


def own_hashes(
    settings: EngineSettings, prompt_tokens: int, output_tokens: int, number: int
) -> tuple[int, ...]:
    """Hashes that no other sequence has: only itself finds them in the prefix cache, once it was preempted."""
    unit = settings.prefix_unit_tokens
    units = (prompt_tokens + output_tokens - 1) // unit if unit else 0
    begin = number << 32
    return tuple(range(begin, begin + units))


def most_users(
    settings: EngineSettings,
    prompt_tokens: int,
    output_tokens: int,
    *,
    tokens_per_s: float = 0.0,
    ttft_s: float = inf,
    tpot_s: float = inf,
    overhead_us: float = 0.0,
    limit: int = 4096,
    all_rounds: bool = False,
) -> int:
    """The most users at once, all of whose requests meet the SLA in the mean; 0: not even one.

    `tokens_per_s`: output tokens a second and user, at least; `ttft_s` and `tpot_s`: at most. `all_rounds`:
    they hold in the rounds after the first wave too (`worst_figures`). `limit`: no more are tried. Found by
    doubling and bisection, so it is right where more users never make it better, as in this engine.
    """
    if tokens_per_s <= 0 and ttft_s == tpot_s == inf:
        return limit

    def meets(users: int) -> bool:
        loops = _loops(settings, users, prompt_tokens, output_tokens, overhead_us)
        return all(
            figures.tokens_per_s_per_user >= tokens_per_s
            and figures.ttft_mean <= ttft_s
            and figures.tpot_mean <= tpot_s
            for figures in islice(loops, 2 if all_rounds else 1)
        )

    if not meets(1):
        return 0
    good, bad = 1, 2
    while bad <= limit and meets(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, limit + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        if meets(middle):
            good = middle
        else:
            bad = middle
    return good
