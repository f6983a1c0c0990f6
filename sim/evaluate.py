"""What a policy makes of a workload on a cluster, in figures.

Nothing is left out. A request that was rejected, failed or cut off misses the SLA, and counts as one whose first
token never came: its TTFT is infinite, and so is a quantile of the TTFT that such a request stands at. So no
policy looks faster by refusing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, inf
from pathlib import Path
from time import perf_counter
from typing import Final, NamedTuple

from policies import names
from policies.files import library_names, library_policy, read_policy
from policies.match import LOCAL
from policies.rules import RuleSet
from policies.yamlproblems import closest
from sim.cluster import Cluster
from sim.cluster_file import ClusterFile, Placed, Sla
from sim.router import End
from sim.traffic import period
from sim.trips import Trip
from sim.workload import Workload

CDF_POINTS: Final = 101
JOULES_PER_KWH: Final = 3.6e6


class Quantiles(NamedTuple):
    """Seconds; infinite: of a request that never came so far."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class Figures:
    """One simulation. Shares are of all requests that came, if nothing else is said."""

    requests: int
    seconds: float
    """In which they came; in a closed loop, until the last one had its answer."""
    goodput_rps: float
    """Requests a second that were answered whole and within the SLA."""
    met: float
    """Their share."""
    ttft_s: Quantiles
    tpot_s: Quantiles
    """Of complete answers of two tokens or more."""
    total_s: Quantiles
    spill: float
    """Share of the requests that were sent anywhere: to a site that is not `local`."""
    rejected: float
    failed: float
    """No answer, or half of one, or at fault with the backend."""
    cost: float
    """Of the tokens of complete answers, on backends that have a price."""
    unpriced: float
    """Share of the complete answers that came from backends without one; 1: nothing is known of the cost."""
    gco2: float | None
    """Of what the cards draw while they serve anybody (what they draw idle, no profile says). None: of a backend
    that served, the watts or the site's carbon intensity are unknown."""
    fairness: float | None
    """Jain's index over tenants, of the share of its requests that each got within the SLA: 1 is equal, 1/n is all
    for one. None: nobody got any."""
    cached: float
    """Share of the prompt tokens of complete answers that a prefix cache had."""
    policy_failures: int
    """Calls of a policy that raised or gave no answer; the least loaded backend was taken instead."""


class Run(NamedTuple):
    """One simulation, and what plots need of it."""

    figures: Figures
    ttft_cdf: tuple[float, ...]
    """`CDF_POINTS` quantiles of the TTFT, from the least to the greatest."""
    elapsed_s: float
    """That the simulation took, in real time."""
    last_failure: str = ""
    """Of a policy."""
    unmet_rules: tuple[str, ...] = ()
    """Names of the rules with a condition that no request met first."""


class PolicyText(NamedTuple):
    """A policy file under the name that it was asked for by."""

    name: str
    text: str


def named_policy(name: str) -> PolicyText:
    """The policy that is meant by a file (`.yaml`), a name of the library, or one of the registry, which then
    chooses among all backends by one rule.

    Raises OSError, and ValueError with the names there are.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return PolicyText(name, Path(name).read_text(encoding="utf-8"))
    library, registry = library_names(), names()
    if name in library:
        return PolicyText(name, library_policy(name))
    if name in registry or ":" in name:
        quoted = json.dumps(name)  # in YAML, too
        return PolicyText(name, f"rules:\n  - name: {quoted}\n    pick: {quoted}\n")
    meant = closest(name, (*library, *registry))
    hint = f"; did you mean '{meant}'?" if meant else "."
    raise ValueError(
        f"no policy is called '{name}'{hint} The library has {', '.join(library)}; the registry "
        f"{', '.join(registry)}; a file ends in .yaml"
    )


def evaluate(
    cluster: ClusterFile,
    policy: PolicyText,
    workload: Workload,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Run:
    """Play a workload under a policy. One seed and one workload give the same figures, byte for byte.

    `progress` hears of every thousandth arrival. Raises FileProblems for the policy, ValueError for the workload.
    """
    started = perf_counter()
    rules = read_policy(policy.text, policy.name, cluster.known, seed).rules
    simulation = Cluster(cluster.members(workload.unit_tokens), rules, seed=seed)
    trips = simulation.run(workload, progress).trips
    closed = any(arrival.think >= 0 for arrival in workload)
    seconds = _until_all_ended(trips) if closed else period(workload) / 1e6
    failures, last_failure = failures_of(rules)
    figures = figures_of(trips, cluster, seconds, failures)
    elapsed = perf_counter() - started
    return Run(figures, cdf(_ttfts(trips)), elapsed, last_failure, _unmet(rules, trips))


def figures_of(
    trips: Sequence[Trip], cluster: ClusterFile, seconds: float, policy_failures: int = 0
) -> Figures:
    """The figures of the requests that came in so many seconds, of which there is one at least."""
    count = len(trips)
    placed = {one.name: one for one in cluster.backends}
    met = sum(meets(trip, cluster.sla) for trip in trips)
    complete = [trip for trip in trips if trip.end is End.OK]
    cost, unpriced = _cost(complete, placed)
    rejected = sum(trip.end is End.REJECTED for trip in trips)
    prompts = sum(trip.arrival.prompt_tokens for trip in complete)
    return Figures(
        requests=count,
        seconds=seconds,
        goodput_rps=met / seconds,
        met=met / count,
        ttft_s=quantiles(_ttfts(trips)),
        tpot_s=quantiles([trip.tpot_s for trip in complete if trip.tpot_s is not None]),
        total_s=quantiles([trip.total_s if trip.end is End.OK else inf for trip in trips]),
        spill=away([placed[trip.backend].section.site for trip in trips if trip.backend]) or 0.0,
        rejected=rejected / count,
        failed=(count - len(complete) - rejected) / count,
        cost=cost,
        unpriced=unpriced / len(complete) if complete else 0.0,
        gco2=_gco2(trips, placed),
        fairness=jain(_shares_met(trips, cluster.sla)),
        cached=sum(trip.cached_tokens for trip in complete) / prompts if prompts else 0.0,
        policy_failures=policy_failures,
    )


def meets(trip: Trip, sla: Sla) -> bool:
    """Whether a request was answered whole and within the SLA."""
    return trip.end is End.OK and within(trip.ttft_s, trip.tpot_s, sla.ttft, sla.tpot)


def within(ttft_s: float | None, tpot_s: float | None, most_ttft_s: float, most_tpot_s: float) -> bool:
    """Whether the times of a whole answer keep these bounds; an answer of one token has no TPOT to miss."""
    return ttft_s is not None and ttft_s <= most_ttft_s and (tpot_s is None or tpot_s <= most_tpot_s)


def away(sites: Collection[str]) -> float | None:
    """Of the sites of requests, the share that is not `local`. None: there are no requests."""
    return sum(site != LOCAL for site in sites) / len(sites) if sites else None


def quantiles(values: Iterable[float]) -> Quantiles:
    """Each the least value that so many of all do not exceed; of none, infinite."""
    ordered = sorted(values)
    return Quantiles(*(_quantile(ordered, share) for share in (0.5, 0.95, 0.99)))


def cdf(values: Iterable[float]) -> tuple[float, ...]:
    """`CDF_POINTS` quantiles at equal steps, the first of them the least value."""
    ordered = sorted(values)
    return tuple(_quantile(ordered, step / (CDF_POINTS - 1)) for step in range(CDF_POINTS))


def _quantile(ordered: Sequence[float], share: float) -> float:
    # A share such as 0.95 is a little off in binary, its product with a count of 100 too.
    return ordered[max(ceil(share * len(ordered) - 1e-9), 1) - 1] if ordered else inf


def jain(shares: Sequence[float]) -> float | None:
    """(sum x)^2 / (n sum x^2), Jain, Chiu and Hawe 1984; None: all are zero."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else None


def _shares_met(trips: Sequence[Trip], sla: Sla) -> list[float]:
    came: Counter[str] = Counter()
    met: Counter[str] = Counter()
    for trip in trips:
        came[trip.arrival.tenant] += 1
        met[trip.arrival.tenant] += meets(trip, sla)
    return [met[tenant] / count for tenant, count in sorted(came.items())]


def _ttfts(trips: Sequence[Trip]) -> list[float]:
    """Of all: who has no complete answer has a first token that is worth nothing."""
    return [trip.ttft_s if trip.end is End.OK and trip.ttft_s is not None else inf for trip in trips]


def _until_all_ended(trips: Sequence[Trip]) -> float:
    return max(max(trip.ended for trip in trips) - min(trip.arrived for trip in trips), 1e-6)


def _cost(complete: Sequence[Trip], placed: dict[str, Placed]) -> tuple[float, int]:
    """-> money, and how many answers have no price."""
    cost, unpriced = 0.0, 0
    for trip in complete:
        price = placed[trip.backend].section.price
        if price is None:
            unpriced += 1
            continue
        cached = trip.cached_tokens
        of_cached = price.input if price.cached_input is None else price.cached_input
        cost += (trip.arrival.prompt_tokens - cached) * price.input + cached * of_cached
        cost += trip.arrival.output_tokens * price.output
    return cost / 1e6, unpriced


def _gco2(trips: Sequence[Trip], placed: dict[str, Placed]) -> float | None:
    """Watts times the time in which a backend had a request at all, times what its site emits."""
    served: dict[str, list[tuple[float, float]]] = {}
    for trip in trips:
        if trip.backend:
            served.setdefault(trip.backend, []).append((trip.arrived + trip.held_s, trip.ended))
    total = 0.0
    for name, spans in served.items():
        watts, carbon = placed[name].watts, placed[name].site.carbon_gco2_kwh
        if watts is None or carbon is None:
            return None
        total += watts * _covered(spans) / JOULES_PER_KWH * carbon
    return total


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of spans of time."""
    covered, reached = 0.0, -inf
    for begin, end in sorted(spans):
        if end > reached:
            covered += end - max(begin, reached)
            reached = end
    return covered


def _unmet(rules: RuleSet, trips: Iterable[Trip]) -> tuple[str, ...]:
    met = {rules.rule_for(trip.facts).name for trip in trips}
    return tuple(rule.name for rule in rules.rules if not rule.matches_all and rule.name not in met)


def failures_of(rules: RuleSet) -> tuple[int, str]:
    """Calls of policies that raised or gave no answer, and what one of them said."""
    guards = {id(one): one for rule in rules.rules for one in (rule.guarded, *rule.choosers)}
    said = next((one.last_failure for one in guards.values() if one.last_failure), "")
    return sum(one.failures for one in guards.values()), said
