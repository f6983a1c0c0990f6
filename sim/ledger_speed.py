"""How fast a backend is, from what the ledger says of the requests that it served: for one without a profile.

The busiest requests that came one after the other are simulated with `sim/calibrate.py`, and the coefficients are
those whose times come nearest to theirs; so is the time that a server takes outside its engine, since the router's
clock is a client's. What the ledger does not say stays at vLLM's defaults: the token budget and the size of the
batch; and the KV cache is never full.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isfinite, isnan
from typing import Final

from policies.profile import Limits, Origin, Profile, Source
from sim.calibrate import Search, calibrate_timings, rounded
from sim.timings import Timing

LEAST: Final = 30
"""Complete answers."""
FEW: Final = 100
"""Of fewer, one slow moment shows in the profile."""
MOST: Final = 1500
SEARCH: Final = Search(starts=1, evaluations=240)


def profile_from(
    name: str,
    timings: Sequence[Timing],
    rtt_s: float,
    slots: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[Profile, str]:
    """The profile of the backend `name`, and how well it foretells those requests, in words. Raises ValueError with
    the reason: too few, or none that can be told apart."""
    if wrong := unfit(timings):
        raise ValueError(wrong)
    rtt = rtt_s * 1e6
    chosen = [_without(one, rtt) for one in busiest(sorted(timings))]
    text = f"the ledger's own times of {len(chosen)} requests"
    source = Source(origin=Origin.MEASURED, text=text)
    limits = Limits(max_num_seqs=max(slots, 256), prefix_cache=True, source=source)
    search = replace(SEARCH, overhead=True)
    found = calibrate_timings(chosen, limits, search, test_half=False, progress=progress)
    profile = Profile(
        name="from-the-ledger",
        card="unknown",
        model=name,
        step=found.step(source),
        overhead_us=rounded(found.overhead_us),
        limits=limits,
    )
    errors = ", ".join(
        f"{metric} {error:+.0%}"
        for metric, error in zip(("TTFT", "TPOT", "end to end"), found.fit.mean, strict=True)
        if isfinite(error)
    )
    few = f" (few: {FEW} would tell more)" if len(timings) < FEW else ""
    return profile, f"fitted to {text}{few}; its means are off by {errors}"


def unfit(timings: Sequence[Timing]) -> str:
    """Why no profile can be made of these, or nothing."""
    if len(timings) < LEAST:
        return f"{len(timings)} complete answers in the ledger, {LEAST} are the least"
    if all(isnan(one.ttft) for one in busiest(sorted(timings))):
        return "none of its answers was a stream, so nobody saw a first token"
    return ""


def busiest(timings: Sequence[Timing]) -> Sequence[Timing]:
    """Of requests in order of arrival, `MOST` that follow each other in the shortest time."""
    if len(timings) <= MOST:
        return timings
    starts = range(len(timings) - MOST + 1)
    best = min(starts, key=lambda start: timings[start + MOST - 1].at - timings[start].at)
    return timings[best : best + MOST]


def _without(timing: Timing, rtt: float) -> Timing:
    """Less the network."""
    return timing._replace(ttft=max(timing.ttft - rtt, 1.0), e2e=max(timing.e2e - rtt, 2.0))
