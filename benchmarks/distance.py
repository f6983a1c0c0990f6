"""Two sites whose distance and round trip disagree: what `geo` and `shortest-path` make of it, and who is right.

    python -m benchmarks.distance            # --quick: one seed, fewer requests: does it run?
    python -m benchmarks.distance --check

People ask from Nanjing (32.06 N, 118.79 E). `wuxi` is 157 km away, `guiyang` 1,322 km. Light in fibre needs 13 ms
there and back over the longer way, so a leased wave of 18 ms is about as good as it gets; a short way may be as
long as its detours and tunnels make it. Cases:

* `disagree`: wuxi 120 ms, guiyang 18 ms, equal engines: near on the map, far by network, and the other way round;
* `agree`: wuxi 3 ms, guiyang 120 ms, equal engines: where both rules want the same;
* `slow near`: wuxi 3 ms, guiyang 40 ms, and wuxi's engine is the slower one: near by both, and yet late;
* `slow and far`: wuxi 120 ms with the slower engine, guiyang 18 ms: all speaks against the map.

Engines: `h20-2-32b` with 80 slots; the slower one is `l40-2-32b` with 16, both as table 3-2 of the white paper has
them, prefix caches off, contexts of 16,384 tokens each. The SLA is that of its table 3-3: TTFT 2 s, TPOT 100 ms.

Load: ten minutes of the Azure conversation trace of 2023 (`../shared/data`; about 3,300 requests, 1,155 prompt
tokens and 211 of output on average), open loop. Its times are stretched: `light` is 0.25 requests a second, where
nothing queues; `heavy` is 2, more than wuxi alone can serve inside the SLA. So both loads have the same requests.
Seeds draw moving blocks of the trace (`sim/traffic.py`); all policies of a seed get the same arrivals, and
differences are taken seed by seed, with 95 % intervals.

Policies: `geo` and `shortest-path` as they come, one rule, all backends; `round-robin` and `least-load`, which know
neither map nor network, for scale. And the law: 30 % of the requests have the data class `restricted`, which a law
keeps in the province, that is at wuxi. Both sites would take it (`data_classes`), so that nothing but the policy
decides. The file `law` has one rule more than `shortest-path`: restricted data requires wuxi.

Promised (`--check`): where distance and network disagree, `shortest-path` is faster than `geo`, p50 and p95, at
both loads; where they agree and nothing queues, `geo` costs nothing (5 %); under `law` no restricted request leaves
wuxi.

Takes about two minutes of CPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any, Final, NamedTuple

from benchmarks.summary import RESULTS, facts_line, print_table, write_result
from policies.files import read_policy
from sim.cluster import Cluster
from sim.cluster_file import ClusterFile, read_cluster
from sim.evaluate import meets, quantiles
from sim.intervals import Estimate, estimate, paired
from sim.router import End
from sim.streams import stream
from sim.traces import read_workload
from sim.traffic import Traffic, cut, faster, period
from sim.trips import Trip
from sim.workers import Workers, cores
from sim.workload import Workload

TRACE: Final = (
    Path(__file__).parents[2] / "shared" / "data" / "azure" / "AzureLLMInferenceTrace_2023_conv.csv.gz"
)
START_S: Final = 600.0
SECONDS: Final = 600.0
QUICK_SECONDS: Final = 120.0
LOADS: Final = {"light": 0.25, "heavy": 2.0}
"""Requests a second."""
SEEDS: Final = 5
RESTRICTED: Final = 0.3
"""Share of the requests whose data a law keeps near."""
ALIKE: Final = 0.05
"""Share of `shortest-path`'s TTFT that `geo` may be slower by and still count as costing nothing."""

HOME: Final = (32.06, 118.79)
NEAR: Final = "wuxi"
FAR: Final = "guiyang"
CLUSTER: Final = """\
model: deepseek-r1-distill-qwen-32b
sla: {{ttft: 2s, tpot: 100ms}}
backends:
  - {{name: wuxi, site: wuxi, profile: {near_profile}, rtt: {near_ms}ms, context: 16384}}
  - {{name: guiyang, site: guiyang, profile: {far_profile}, rtt: {far_ms}ms, context: 16384}}
sites:
  wuxi: {{location: [31.49, 120.31], data_classes: [public, restricted]}}
  guiyang: {{location: [26.65, 106.63], data_classes: [public, restricted]}}
"""

FAST: Final = "h20-2-32b"
SLOW: Final = "l40-2-32b"


class Case(NamedTuple):
    """Two sites: round trips in milliseconds, and their engines."""

    near_ms: int
    far_ms: int
    near_profile: str = FAST
    far_profile: str = FAST


CASES: Final = {
    "disagree": Case(120, 18),
    "agree": Case(3, 120),
    "slow near": Case(3, 40, SLOW),
    "slow and far": Case(120, 18, SLOW),
}

_GEO: Final = f"{{policy: geo, home: [{HOME[0]}, {HOME[1]}]}}"
POLICIES: Final = {
    "geo": f"rules:\n  - {{name: all, pick: {_GEO}}}\n",
    "shortest-path": "rules:\n  - {name: all, pick: shortest-path}\n",
    "law": (
        "rules:\n"
        "  - {name: restricted, when: {data_class: restricted}, require: {site: wuxi}, pick: least-load}\n"
        "  - {name: all others, pick: shortest-path}\n"
    ),
    "least-load": "rules:\n  - {name: all, pick: least-load}\n",
    "round-robin": "rules:\n  - {name: all, pick: round-robin}\n",
}


class Job(NamedTuple):
    """One simulation."""

    case: str
    load: str
    policy: str
    seed: int


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one simulation. Seconds; a request without a whole answer has an infinite TTFT."""

    requests: int
    ttft_p50_s: float
    ttft_p95_s: float
    total_p50_s: float
    near: float
    """Share of all that were sent anywhere."""
    met: float
    """Share of all that kept the SLA."""
    lost: float
    """Share of all that had no whole answer."""
    left: float
    """Share of the restricted ones that were sent to the far site."""
    restricted_p95_s: float
    """TTFT."""
    others_p95_s: float


Found = Mapping[Job, Figures]


def cluster_of(case: Case) -> ClusterFile:
    """The two sites as a cluster."""
    with tempfile.TemporaryDirectory(prefix="tidegate-distance-") as folder:
        path = Path(folder, "distance.yaml")
        path.write_text(CLUSTER.format(**case._asdict()), encoding="utf-8")
        return read_cluster(path)


def workload_of(piece: Workload, load: str, seed: int) -> Workload:
    """The requests of a seed at a load, some of them restricted: the same ones at every load."""
    drawn = Traffic(piece).workload(seed)
    random = stream(seed, "restricted").random(len(drawn))
    arrivals = [
        one._replace(data_class="restricted") if value < RESTRICTED else one
        for one, value in zip(drawn, random.tolist(), strict=True)
    ]
    rate = len(arrivals) / (period(drawn) / 1e6)
    return faster(replace(drawn, arrivals=arrivals), LOADS[load] / rate)


def play(piece: Workload, job: Job) -> Figures:
    """One simulation."""
    cluster = cluster_of(CASES[job.case])
    rules = read_policy(POLICIES[job.policy], job.policy, cluster.known, job.seed).rules
    workload = workload_of(piece, job.load, job.seed)
    trips = Cluster(cluster.members(workload.unit_tokens), rules, seed=job.seed).run(workload).trips
    return figures_of(trips, cluster)


def figures_of(trips: Sequence[Trip], cluster: ClusterFile) -> Figures:
    """Of requests of both kinds."""
    sent = [trip for trip in trips if trip.backend]
    restricted = [trip for trip in trips if trip.arrival.data_class == "restricted"]
    others = [trip for trip in trips if trip.arrival.data_class != "restricted"]
    ttft = quantiles(_ttfts(trips))
    return Figures(
        requests=len(trips),
        ttft_p50_s=ttft.p50,
        ttft_p95_s=ttft.p95,
        total_p50_s=quantiles(trip.total_s if trip.end is End.OK else float("inf") for trip in trips).p50,
        near=sum(trip.backend == NEAR for trip in sent) / max(len(sent), 1),
        met=sum(meets(trip, cluster.sla) for trip in trips) / len(trips),
        lost=sum(trip.end is not End.OK for trip in trips) / len(trips),
        left=sum(trip.backend == FAR for trip in restricted) / max(len(restricted), 1),
        restricted_p95_s=quantiles(_ttfts(restricted)).p95,
        others_p95_s=quantiles(_ttfts(others)).p95,
    )


def _ttfts(trips: Sequence[Trip]) -> list[float]:
    return [trip.ttft_s if trip.end is End.OK and trip.ttft_s is not None else float("inf") for trip in trips]


def main(arguments: Sequence[str] | None = None) -> int:
    """Play all cases, print the tables, write the result."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distance",
        description="Two sites whose distance and round trip disagree: geo, shortest-path, and a law. Takes about "
        "two minutes of CPU.",
    )
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"samples of the trace (default: {SEEDS})")
    parser.add_argument("--jobs", type=int, default=cores(), help="processes (default: all cores)")
    parser.add_argument("--quick", action="store_true", help="one seed, two minutes of the trace")
    parser.add_argument("--check", action="store_true", help="fail if a promise is not kept")
    parser.add_argument("--no-result", action="store_true", help="write no files into benchmarks/results")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error("--seeds is one or more")
    seeds = range(1, 2 if options.quick else options.seeds + 1)
    try:
        trace = read_workload(TRACE)
    except OSError as error:
        print(f"the trace cannot be read: {error}", file=sys.stderr)
        return 2
    piece = cut(trace, START_S, QUICK_SECONDS if options.quick else SECONDS)
    found = _play_all(piece, seeds, options.jobs)
    _print_all(found)
    print(facts_line())
    broken = broken_promises(found)
    if not options.no_result and not options.quick:
        _write(found, broken)
    for line in broken:
        print(f"not kept: {line}")
    return int(options.check and bool(broken))


def _play_all(piece: Workload, seeds: Sequence[int], processes: int) -> dict[Job, Figures]:
    from rich.console import Console
    from rich.progress import track

    jobs = [
        Job(case, load, policy, seed)
        for seed in seeds
        for case in CASES
        for load in LOADS
        for policy in POLICIES
    ]
    with Workers(partial(play, piece), processes) as workers:
        done = track(workers.over(jobs), "simulating", total=len(jobs), console=Console(stderr=True))
        return {jobs[place]: figures for place, figures in done}


def values(found: Found, case: str, load: str, policy: str, figure: str) -> list[float]:
    """Of one figure, by seeds."""
    jobs = sorted(job for job in found if job[:3] == (case, load, policy))
    return [float(getattr(found[job], figure)) for job in jobs]


def broken_promises(found: Found) -> list[str]:
    """In words; empty: all are kept. With one seed, its difference; with several, their whole interval."""
    broken = []
    for load in LOADS:
        for figure in ("ttft_p50_s", "ttft_p95_s"):
            mine, other = (
                values(found, "disagree", load, policy, figure) for policy in ("shortest-path", "geo")
            )
            if not _below(paired(mine, other), 0.0):
                broken.append(f"disagree, {load}: shortest-path is not faster than geo by {figure}")
        for case in CASES:
            left = max(values(found, case, load, "law", "left"))
            if left:
                broken.append(f"{case}, {load}: {left:.1%} of the restricted requests left under law")
    for figure in ("ttft_p50_s", "ttft_p95_s"):
        mine, other = (values(found, "agree", "light", policy, figure) for policy in ("geo", "shortest-path"))
        if not _below(paired(mine, other), ALIKE * fmean(other)):
            broken.append(f"agree, light: geo costs more than {ALIKE:.0%} by {figure}")
    return broken


def _below(difference: Estimate | None, bound: float) -> bool:
    return difference is not None and difference.mean + (difference.half_width or 0.0) < bound


def _print_all(found: Found) -> None:
    rows = [
        [
            case,
            load,
            policy,
            *(
                _seconds(estimate(values(found, case, load, policy, figure)))
                for figure in ("ttft_p50_s", "ttft_p95_s", "total_p50_s")
            ),
            *(
                f"{fmean(values(found, case, load, policy, figure)):.1%}"
                for figure in ("near", "met", "lost")
            ),
        ]
        for case in CASES
        for load in LOADS
        for policy in POLICIES
    ]
    columns: tuple[str, ...] = (
        "case",
        "load",
        "policy",
        "TTFT p50",
        "p95",
        "total p50",
        "at wuxi",
        "in SLA",
        "lost",
    )
    print_table("Seconds, means over seeds with 95 % intervals", columns, rows)
    rows = [
        [
            case,
            load,
            policy,
            f"{fmean(values(found, case, load, policy, 'left')):.1%}",
            _seconds(estimate(values(found, case, load, policy, "restricted_p95_s"))),
            _seconds(estimate(values(found, case, load, policy, "others_p95_s"))),
        ]
        for case in CASES
        for load in LOADS
        for policy in ("geo", "shortest-path", "law")
    ]
    columns = ("case", "load", "policy", "left", "TTFT p95 restricted", "others")
    print_table(f"The law: {RESTRICTED:.0%} of the requests may not leave wuxi", columns, rows)


def _seconds(found: Estimate | None) -> str:
    if found is None or not isfinite(found.mean):
        return "never"
    return f"{found.mean:.3f}" + (f" ±{found.half_width:.3f}" if found.half_width is not None else "")


def _write(found: Found, broken: Sequence[str]) -> None:
    runs = [{**job._asdict(), **_finite(asdict(figures))} for job, figures in sorted(found.items())]
    cases = {name: case._asdict() for name, case in CASES.items()}
    path = write_result(
        "distance",
        {"cases": cases, "loads": LOADS, "policies": POLICIES, "not_kept": list(broken), "runs": runs},
    )
    plot(found, path.with_suffix(".png"))
    print(f"written to {path.name} and {path.with_suffix('.png').name} in {RESULTS.name}")


def _finite(figures: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows no infinity: null is a first token that never came."""
    return {
        name: value if not isinstance(value, float) or isfinite(value) else None
        for name, value in figures.items()
    }


def plot(found: Found, path: Path) -> None:
    """TTFT p50 (bar) to p95 (dot) of each case, and who was sent near. Raises OSError and ModuleNotFoundError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True)
    for column, load in enumerate(LOADS):
        times, shares = grid[0][column], grid[1][column]
        width = 0.8 / len(POLICIES)
        for place, policy in enumerate(POLICIES):
            x = [index + (place - (len(POLICIES) - 1) / 2) * width for index in range(len(CASES))]
            p50, p95, near = (
                [fmean(values(found, case, load, policy, name)) for case in CASES]
                for name in ("ttft_p50_s", "ttft_p95_s", "near")
            )
            bars = times.bar(x, p50, width * 0.9, label=policy)
            times.plot(x, p95, "_", color=bars[0].get_facecolor(), markersize=11, markeredgewidth=2)
            shares.bar(x, [100 * share for share in near], width * 0.9)
        times.set(
            title=f"{load}: {LOADS[load]:g} requests/s", yscale="log", ylabel="TTFT, s: p50, and p95 (line)"
        )
        shares.set(ylabel="sent to the near site, %", ylim=(0, 105))
        shares.set_xticks(range(len(CASES)), list(CASES))
    grid[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
