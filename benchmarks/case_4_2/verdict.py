"""The claims of case 4.2, asked of each policy; money; and which policy is chosen.

Prices, dollars. A card of the box costs what an A6000 (48 GB, too) is rented for, 1.09 an hour (SkyPilot's
catalogue, v8, 2026), whoever owns it: an assumption, since nobody publishes what an institute pays for an L20 with
its server, room and power over the years. A token in the cloud costs what R1-Distill-Qwen-32B costs at DeepInfra
(0.27 a million, in and out) at the nearer site, and at Nscale (0.15) at the farther one (LiteLLM's price list,
2026): that MLU370 cards are let for as much is an assumption, too. These are the two lowest of that list; Novita
asks 0.30, Fireworks 0.90, Cloudflare 0.50 in and 4.88 out. `sensitivity` varies both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

from benchmarks.case_4_2.simulated import Figures

CARD_HOUR: Final = 1.09
CARDS: Final = 2
"""Of a box."""
SHARE: Final = 0.95
"""Of the requests that keep the SLA where a load is served within it."""
TIMES: Final = 3.0
"""The throughput that is claimed, as a multiple of the box's."""
LATENCY_CUT: Final = 0.40
COST_CUT: Final = 0.50

CARD_HOURS: Final = (0.25, 0.5, 1.09, 2.0)
TOKEN_FACTORS: Final = (0.5, 1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one policy, means over the seeds."""

    policy: str
    spill_peak: float
    spill_day: float
    mean_s: float
    """In the peak hour, as `p95_s`, `ttft_p95_s`, `met_peak`."""
    p95_s: float
    ttft_p95_s: float
    met_peak: float
    met_day: float
    lost: float
    """In the peak hour."""
    tokens_per_hour: float
    """Dollars, over the day."""
    latency_cut: float
    """Of the mean in the peak hour, against the box alone under the same load."""
    at_capacity_cut: float
    """Against the box alone under the load that it just serves within the SLA: a third of it."""
    cost_cut: float
    """Of an hour, against boxes for the peak."""

    @property
    def keeps_throughput(self) -> bool:
        """`TIMES` what the box serves alone, within the SLA."""
        return self.met_peak >= SHARE

    @property
    def keeps_latency(self) -> bool:
        return self.latency_cut >= LATENCY_CUT

    @property
    def keeps_cost(self) -> bool:
        return self.cost_cut >= COST_CUT

    @property
    def missed(self) -> list[str]:
        """Claims that it does not keep."""
        kept = {"throughput": self.keeps_throughput, "latency": self.keeps_latency, "cost": self.keeps_cost}
        return [claim for claim, keeps in kept.items() if not keeps]

    @property
    def keeps_all(self) -> bool:
        return not self.missed

    @property
    def keeps_strictly(self) -> bool:
        """All claims, latency against the box under what it just serves, too, and the SLA over the whole day."""
        return self.keeps_all and self.at_capacity_cut >= LATENCY_CUT and self.met_day >= SHARE


def box_hour(card_hour: float = CARD_HOUR) -> float:
    """Dollars for an hour of a box."""
    return CARDS * card_hour


def cost_cut(tokens_per_hour: float, boxes: float, card_hour: float = CARD_HOUR) -> float:
    """What a box and paid tokens cost less than so many boxes, as a share of those."""
    return 1.0 - (box_hour(card_hour) + tokens_per_hour) / (boxes * box_hour(card_hour))


def verdict(
    policy: str,
    peaks: Sequence[Figures],
    days: Sequence[Figures],
    boxes: Sequence[int],
    alone: Sequence[Figures],
    at_capacity: Sequence[Figures],
) -> Verdict:
    """Of a policy: its peak hours and days, one for each seed, as the boxes for the peak, and the box alone under
    the same load and under what it just serves."""

    def cut(against: Sequence[Figures]) -> float:
        return fmean(1 - mine.mean_s / other.mean_s for mine, other in zip(peaks, against, strict=True))

    return Verdict(
        policy=policy,
        spill_peak=fmean(one.spill for one in peaks),
        spill_day=fmean(one.spill for one in days),
        mean_s=fmean(one.mean_s for one in peaks),
        p95_s=fmean(one.p95_s for one in peaks),
        ttft_p95_s=fmean(one.ttft_p95_s for one in peaks),
        met_peak=fmean(one.met for one in peaks),
        met_day=fmean(one.met for one in days),
        lost=fmean(one.lost for one in peaks),
        tokens_per_hour=fmean(one.tokens_per_hour for one in days),
        latency_cut=cut(alone),
        at_capacity_cut=cut(at_capacity),
        cost_cut=fmean(cost_cut(one.tokens_per_hour, count) for one, count in zip(days, boxes, strict=True)),
    )


def best(found: Sequence[Verdict]) -> Verdict | None:
    """Of those that keep all three claims, strictly if somebody does, the one that spills least over the day. None:
    nobody keeps them."""
    keep = [one for one in found if one.keeps_strictly] or [one for one in found if one.keeps_all]
    return min(keep, key=lambda one: one.spill_day, default=None)


def nearest(found: Sequence[Verdict]) -> Verdict:
    """The best, or who keeps most claims, and of those costs least. Raises ValueError for no policy."""
    return best(found) or max(found, key=lambda one: (-len(one.missed), one.cost_cut))


def words(chosen: Verdict, shown: Sequence[Verdict]) -> list[str]:
    """What came of the policy that was chosen in training, and of the others, in lines. `shown` has all of them."""
    named = f"{chosen.policy}, chosen on the training day,"
    spill = f"spilling {chosen.spill_peak:.0%} in the peak hour and {chosen.spill_day:.0%} over the day"
    kept = "keeps all three claims"
    if chosen.missed:
        kept = f"does not keep the claim of {' and '.join(chosen.missed)}"
    reached = "reached" if chosen.at_capacity_cut >= LATENCY_CUT else "not reached"
    keep = [one.policy for one in shown if one.keeps_all]
    strictly = [one.policy for one in shown if one.keeps_strictly]
    return [
        f"{named} {kept} on the days that are shown, {spill}.",
        f"Against the box under the load that it just serves, its latency falls by {chosen.at_capacity_cut:.0%}: "
        f"by that reading {LATENCY_CUT:.0%} are {reached}.",
        f"All three claims on the days that are shown: {len(keep)} of {len(shown)} policies"
        + (f" ({', '.join(keep)})." if keep else "."),
        f"By the stricter reading, and with the SLA kept over the day: {len(strictly)}"
        + (f" ({', '.join(strictly)})." if strictly else "."),
    ]


def sensitivity(tokens_per_hour: float, boxes: float) -> list[list[float]]:
    """`cost_cut` by `CARD_HOURS` (rows) and `TOKEN_FACTORS` (columns)."""
    return [
        [cost_cut(factor * tokens_per_hour, boxes, card_hour) for factor in TOKEN_FACTORS]
        for card_hour in CARD_HOURS
    ]


def most_token_factor(tokens_per_hour: float, boxes: float, card_hour: float = CARD_HOUR) -> float:
    """As many times the price of tokens the cost is still halved; below zero: at no price."""
    left = ((1 - COST_CUT) * boxes - 1) * box_hour(card_hour)
    return left / tokens_per_hour if tokens_per_hour else float("inf")
