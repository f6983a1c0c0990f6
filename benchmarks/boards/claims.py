"""What the authors of published policies say of them, and what the leaderboards make of it.

A published figure is a ratio of two systems on their traffic and machines. Here it is set beside the mean over
seeds of the same ratio, with its interval. Means over requests are medians here: a mean over requests of which
one was never answered is infinite.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import Final

from benchmarks.boards.entries import EQUAL_WEIGHTS, QUEUE_AND_BATCH
from sim.intervals import Estimate, estimate
from sim.leaderboard import Standing


@dataclass(frozen=True, slots=True)
class Claim:
    """One policy against another, one figure."""

    policy: str
    against: str
    figure: str
    """Name for `Standing.of`."""
    published: float
    """Ratio, policy over the other: the least advantage that the authors report."""
    source: str
    on: str
    """Name of the leaderboard (`Shown.name`)."""
    differs: str
    """What was otherwise where the authors measured."""

    @property
    def less_is_better(self) -> bool:
        return self.published < 1.0


MOONCAKE, CONTROL = "mooncake, open", "alike, control"
"""Claims on the first are judged on the second, too: alike backends in one place, as most authors had them."""

_LMETRIC: Final = (
    "LMetric, arXiv 2603.15202: TTFT -92 %, TPOT -21 % against vLLM's balancer",
    "its instances are alike and in one place; the score knows neither speeds nor distances, so here a slow "
    "backend and a far one are noticed only by what piles up there",
)
_GORGO: Final = (
    "GORGO, arXiv 2602.11688: p95 of TTFT -7 to -15 %, of the whole -14 to -31 %, against affinities",
    "alike replicas at 37, 279 and 456 ms; its affinities have no bound on load, ours have, and were tuned as well",
)
_SKYLB: Final = (
    "SkyLB, arXiv 2505.24095: throughput x1.12 to 2.06, latency 1.74 to 6.30 times lower, against load balancers",
    "several balancers in several regions with clients in each, and traffic that peaks at other times there; here "
    "is one balancer, and what it holds back waits at the router while cards may be idle for a step",
)
_MOONCAKE: Final = (
    "Mooncake, FAST'25: mean TTFT 3.07 s, 19.65 s by chance, 5.27 s by load (conversation trace)",
    "sixteen alike nodes, prefill apart from decoding, and a prefix is fetched from whichever node has it; here no "
    "memory is shared between sites, so a hit is bound to its backend",
)
_LLMD: Final = (
    "llm-d: end to end p50 13.42 s with weights 3-2-2, 16.42 s with 1-1-1, 15.98 s by turns",
    "thirteen alike servers of one pool, prefixes that most requests share; its scorers know neither speeds nor "
    "distances",
)
_PREQUAL: Final = (
    "Prequal, NSDI'24: tails half as long; by weighted turns p99.9 is at the timeout at 1.03 of the allocation, "
    "with it tails degrade gently until 1.74 (of goodput it says no figure: 5 % more is our reading)",
    "short queries on CPUs shared with others: a replica's speed changes all the time there, and here it does not; "
    "an engine of this kind batches, so what is too much for all cards is late at all of them, wherever it is sent",
)

CLAIMS: Final = (
    Claim("lmetric", QUEUE_AND_BATCH, "ttft_s.p50", 0.08, _LMETRIC[0], MOONCAKE, _LMETRIC[1]),
    Claim("lmetric", QUEUE_AND_BATCH, "tpot_s.p50", 0.79, _LMETRIC[0], MOONCAKE, _LMETRIC[1]),
    Claim("gorgo", "session-affinity", "ttft_s.p95", 0.93, _GORGO[0], MOONCAKE, _GORGO[1]),
    Claim("gorgo", "prefix-affinity", "ttft_s.p95", 0.93, _GORGO[0], MOONCAKE, _GORGO[1]),
    Claim("gorgo", "session-affinity", "total_s.p95", 0.86, _GORGO[0], MOONCAKE, _GORGO[1]),
    Claim("gorgo", "prefix-affinity", "total_s.p95", 0.86, _GORGO[0], MOONCAKE, _GORGO[1]),
    Claim("skylb", "round-robin", "goodput_rps", 1.12, _SKYLB[0], MOONCAKE, _SKYLB[1]),
    Claim("skylb", "least-load", "goodput_rps", 1.12, _SKYLB[0], MOONCAKE, _SKYLB[1]),
    Claim("skylb", "least-load", "ttft_s.p50", 1 / 1.74, _SKYLB[0], MOONCAKE, _SKYLB[1]),
    Claim("prequal", "weighted-qps", "ttft_s.p99", 0.5, _PREQUAL[0], "azure, overloaded", _PREQUAL[1]),
    Claim("prequal", "weighted-qps", "goodput_rps", 1.05, _PREQUAL[0], "azure, overloaded", _PREQUAL[1]),
    Claim("mooncake", "random", "ttft_s.p50", 3.07 / 19.65, _MOONCAKE[0], MOONCAKE, _MOONCAKE[1]),
    Claim("mooncake", "least-load", "ttft_s.p50", 3.07 / 5.27, _MOONCAKE[0], MOONCAKE, _MOONCAKE[1]),
    Claim("weighted-scores", EQUAL_WEIGHTS, "total_s.p50", 13.42 / 16.42, _LLMD[0], MOONCAKE, _LLMD[1]),
    Claim("weighted-scores", "round-robin", "total_s.p50", 13.42 / 15.98, _LLMD[0], MOONCAKE, _LLMD[1]),
)
ALL: Final = (*CLAIMS, *(replace(claim, on=CONTROL) for claim in CLAIMS if claim.on == MOONCAKE))
NOT_COMPARED: Final = (
    "kv-threshold (SageServe, arXiv 2502.14617: GPU hours -25 %, waste -80 %): its advantage is of scaling the "
    "number of instances by forecasts; a leaderboard has a fixed cluster, so only its routing rule is here",
)
"""What no leaderboard can show."""


def compared() -> set[str]:
    """Names of the policies that the control is played with."""
    return {name for claim in ALL if claim.on == CONTROL for name in (claim.policy, claim.against)}


@dataclass(frozen=True, slots=True)
class Verdict:
    """A claim and what was found."""

    claim: Claim
    found: Estimate | None
    """Of the ratio, over seeds. None: in one of the two, the figure stands at a request without an answer."""
    only_mine_never: bool = False
    """Such a request is the policy's, and none of the other's."""

    @property
    def word(self) -> str:
        """`shown`, `in part`: better by more than the interval, but by less than published; `not shown`, `worse`,
        or `unknown`."""
        if self.found is None:
            return "worse" if self.only_mine_never else "unknown"
        mean, half_width = self.found
        less, published = self.claim.less_is_better, self.claim.published
        if abs(mean - 1.0) <= (half_width or 0.0):
            return "not shown"
        if (mean > 1.0) is less:
            return "worse"
        return "shown" if (mean <= published if less else mean >= published) else "in part"


def judge(shown: Mapping[str, Sequence[Standing]], claims: Iterable[Claim] = ALL) -> list[Verdict]:
    """Each claim whose leaderboard was played with both policies; `shown`: standings by name of leaderboard."""
    found = []
    for claim in claims:
        by_name = {one.policy: one for one in shown.get(claim.on, ())}
        if claim.policy in by_name and claim.against in by_name:
            mine, others = (by_name[name].values(claim.figure) for name in (claim.policy, claim.against))
            answers, others_answer = all(map(isfinite, mine)), all(0.0 < one < inf for one in others)
            known = answers and others_answer
            ratios = [one / other for one, other in zip(mine, others, strict=True)] if known else []
            found.append(Verdict(claim, estimate(ratios), others_answer and not answers))
    return found


def rows(verdicts: Iterable[Verdict]) -> list[tuple[str, ...]]:
    """For a table: policy, against, figure, published, found, verdict."""
    return [
        (
            one.claim.policy,
            one.claim.against,
            one.claim.on,
            one.claim.figure,
            f"{one.claim.published:.2f}",
            _words(one.found),
            one.word,
        )
        for one in verdicts
    ]


COLUMNS: Final = ("policy", "against", "leaderboard", "ratio of", "published", "found", "verdict")


def reasons(verdicts: Sequence[Verdict]) -> list[str]:
    """A line for each policy that does not show all that its authors have: the source, what differs there, and what
    the control makes of it."""
    controlled = {_pair(one.claim): one for one in verdicts if one.claim.on == CONTROL}
    lines: dict[str, str] = {}
    for one in verdicts:
        claim = one.claim
        if one.word == "shown" or claim.on == CONTROL:
            continue
        line = lines.get(claim.policy, f"{claim.policy} ({claim.source}): {claim.differs}")
        if _pair(claim) in controlled:
            control = controlled[_pair(claim)]
            line += f"; {claim.figure} over {claim.against} is {one.word}, with alike backends in one place "
            line += f"{control.word} ({_words(control.found)})"
        lines[claim.policy] = line
    return [*lines.values(), *NOT_COMPARED]


def _pair(claim: Claim) -> tuple[str, str, str]:
    return claim.policy, claim.against, claim.figure


def _words(found: Estimate | None) -> str:
    if found is None:
        return "unknown"
    mean, half_width = found
    return f"{mean:.2f}" if half_width is None else f"{mean:.2f} ± {half_width:.2f}"
