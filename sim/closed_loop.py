"""What so many users at once get from one engine, each asking again as soon as it has its answer.

It is how capacity is measured (white paper, chapter 3; `vllm bench serve --max-concurrency`): requests of
one length, the first ones of all users at the same moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf

import numpy as np

from sim.engine import FINISHED, Engine, EngineSettings, Sequence

SECOND = 1e6
"""Microseconds."""


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
    """Output tokens of all, over the time from the first request to the last token."""

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
) -> LoopFigures:
    """`rounds`: requests of each user. Raises ValueError for a request that does not fit into the KV cache."""
    engine = Engine(settings)
    sequences: list[Sequence] = []
    coming = [(0, rounds - 1)] * users
    """(when, requests of that user that follow), in order."""
    overhead = round(overhead_us)
    now = 0
    while coming or engine.next_at < inf:
        now = ceil(engine.next_at) if engine.next_at < inf else coming[0][0]
        if coming:
            now = min(now, coming[0][0])
        for event in engine.advance(now):
            left = event.sequence.tag
            assert isinstance(left, int)
            if event.kind == FINISHED and left:
                coming.append((now + overhead, left - 1))
        while coming and coming[0][0] <= now:
            _, left = coming.pop(0)
            sequence = Sequence(prompt_tokens, output_tokens, tag=left)
            engine.submit(sequence, now)
            sequences.append(sequence)
    first = np.array([sequence.first_token - sequence.arrived for sequence in sequences]) + overhead
    total = np.array([sequence.finished - sequence.arrived for sequence in sequences]) + overhead
    per_token = (total - first) / max(output_tokens - 1, 1)
    return LoopFigures(
        users=users,
        ttft_mean=float(first.mean()) / SECOND,
        ttft_p50=float(np.quantile(first, 0.5)) / SECOND,
        ttft_p99=float(np.quantile(first, 0.99)) / SECOND,
        tpot_mean=float(per_token.mean()) / SECOND,
        tpot_p99=float(np.quantile(per_token, 0.99)) / SECOND,
        total_mean=float(total.mean()) / SECOND,
        tokens_per_s=len(sequences) * output_tokens / (now + overhead) * SECOND,
    )


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
) -> int:
    """The most users at once, all of whose requests meet the SLA in the mean; 0: not even one.

    `tokens_per_s`: output tokens a second and user, at least; `ttft_s` and `tpot_s`: at most. Found by
    doubling and bisection, so it is right where more users never make it better, as in this engine.
    """

    def meets(users: int) -> bool:
        figures = closed_loop(settings, users, prompt_tokens, output_tokens, overhead_us=overhead_us)
        return (
            figures.tokens_per_s_per_user >= tokens_per_s
            and figures.ttft_mean <= ttft_s
            and figures.tpot_mean <= tpot_s
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
