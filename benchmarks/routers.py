"""Tidegate beside vllm-router, in front of backends that differ: p95 TTFT and goodput.

    python -m benchmarks.install_peers vllm-router
    python -m benchmarks.routers --check
    python -m benchmarks.routers --choose        # Tidegate's file, in the simulator
    python -m benchmarks.routers --sweep         # vllm-router's thresholds
    python -m benchmarks.routers --quick

Load: 400 turns of conversations that share prefixes, at 4 a second, an open loop (`conversations.py`; prompts of
1,000 to 8,000 tokens, answers of 30 to 170), with `X-Session-Id`, in real time. Backends: the five emulated ones
of `conversations.yaml`, of different speed, distance and cache, with contexts of 16,000 tokens. Each round has
arrivals of its own (its number is the seed), the same for all. All processes are started anew for every router, so
its caches are cold, and another router begins each round. One client for all of them; times count from when a
request is due.

SLA: a first token within 2 s and 100 ms for each further one. Goodput is the requests that keep both, a second;
one without a whole answer misses, and has a first token that never came.

Tidegate has the policy file `routers_policy.yaml`, and of the backends the slots of `conversations.yaml`; all else
is as it comes: in plain Python, body parsed, tokens metered, ledger written. `--choose` prints which file that is
to be: in the simulator, on other arrivals (seeds from 101 on) at 4 and 5 requests a second, the least p95 TTFT of
those of its candidates whose share within the SLA is within a hundredth of the best.

vllm-router has its `cache_aware`, `power_of_two` and `round_robin`, each at its best: no access log, no limit of
requests, nothing that resets its counts of load while it runs (its health checks come once an hour). Its
`cache_aware` asks a backend for the prompt in tokens (`/v1/chat/completions/render`), which the emulators answer.
It has no way to be told what a backend can do. `cache_aware` plays twice: as it comes, where it balances above a
difference of 64 requests, which five backends hardly reach, and with other thresholds of balance: those of eight
pairs that were best in both figures when `--sweep` tried them for real, on arrivals of seed 101. Ratios are taken
inside each round, and are medians with quartiles over rounds.

`--check` fails when Tidegate is not better than each of them in both figures, when a round is spoiled
(`agreement.py`) after it was repeated, or when client or emulators used more than half of a core: then they were
measured too.

Takes about half an hour, in real time. `--choose` takes a minute of CPU, and `--sweep` a quarter of an hour.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Final

from rich.progress import Progress

from benchmarks.agreement import REPEATS, Round, play_through
from benchmarks.agreement_loads import Load, Outcome, read_loads, simulate
from benchmarks.conversations import Conversations, conversations
from benchmarks.fleets import Served, served, start_emulators, start_tidegate
from benchmarks.install_peers import environment
from benchmarks.order import LOADS, QUICK_REQUESTS, finite, in_turn, quantile_of, spread_text, ttfts
from benchmarks.peers import start_vllm_router, wait_for_chat
from benchmarks.processes import Service, Services, StartError, raise_open_files
from benchmarks.shapes import MODEL as WAITED_FOR
from benchmarks.summary import RESULTS, Spread, facts_line, print_table, write_result
from policies.yamlfile import FileProblems
from sim.evaluate import named_policy, within

POLICY: Final = Path(__file__).with_name("routers_policy.yaml")
TIDEGATE: Final = "tidegate"
RATE: Final = 4.0
ROUNDS: Final = 3
SLA_TTFT_S: Final = 2.0
SLA_TPOT_S: Final = 0.1
BUSY: Final = 0.5
"""Of a core, that client or emulators may use."""
QUICK_SPEED: Final = 4.0
TRAINING: Final = (101, 102, 103, 104, 105)
TRAINING_RATES: Final = (4.0, 5.0)
ALIKE: Final = 0.01
"""Shares within the SLA that are so near are alike."""

_STEADY: Final = ("--health-check-interval-secs", "3600", "--worker-startup-check-interval", "1")


def _cache_aware(absolute: int, relative: float) -> tuple[str, ...]:
    thresholds = ("--balance-abs-threshold", str(absolute), "--balance-rel-threshold", str(relative))
    return ("--policy", "cache_aware", *thresholds)


PEERS: Final[Mapping[str, tuple[str, ...]]] = {
    "round_robin": ("--policy", "round_robin"),
    "power_of_two": ("--policy", "power_of_two"),
    "cache_aware": ("--policy", "cache_aware"),
    "cache_aware, balanced": _cache_aware(8, 1.1),
}
"""Options of vllm-router by what it is called here. Thresholds of the last are the best that `--sweep` found."""
SWEPT: Final[Mapping[str, tuple[str, ...]]] = {
    f"cache_aware {absolute} {relative:g}": _cache_aware(absolute, relative)
    for absolute, relative in product((2, 4, 8, 16), (1.1, 1.5))
}


@dataclass
class Played:
    """One router, round by round."""

    name: str
    options: tuple[str, ...] = ()
    """Of vllm-router; none: it is Tidegate."""
    rounds: list[Round] = field(default_factory=list)
    served: list[Served] = field(default_factory=list)
    repeated: int = 0
    """Rounds that were, since they were spoiled."""


def p95_ttft(outcome: Outcome, requests: int) -> float:
    """Seconds, of all requests."""
    return quantile_of(ttfts(outcome, requests), 0.95)


def met(outcome: Outcome, requests: int) -> float:
    """Share of all requests that were answered whole and within the SLA."""
    times = zip(outcome.ttft_s, outcome.tpot_s, strict=True)
    return sum(within(ttft, tpot, SLA_TTFT_S, SLA_TPOT_S) for ttft, tpot in times) / requests


def play(
    load: Load,
    one: Played,
    asked: Conversations,
    speed: float,
    heard: Callable[[], object],
    repeats: int = REPEATS,
) -> None:
    """One round of a router. Raises StartError, OSError and FileProblems."""
    fast = asked.faster(speed)
    bodies = fast.bodies()
    while True:
        with tempfile.TemporaryDirectory(prefix="tidegate-bench-") as name, Services(Path(name)) as services:
            emulators = start_emulators(services, load, speed, WAITED_FOR)
            router, port = _start(services, load, one, emulators)
            found = play_through(router, port, emulators, fast.workload, speed, heard, bodies=bodies)
            done = served(load, emulators)
        if not found.spoiled_by or one.repeated >= repeats:
            one.rounds.append(found)
            one.served.append(done)
            return
        one.repeated += 1


def _start(services: Services, load: Load, one: Played, emulators: Sequence[Service]) -> tuple[Service, int]:
    """-> it and its port, once it has answered."""
    if not one.options:
        service, port = start_tidegate(services, load, emulators)
        wait_for_chat(service, f"http://127.0.0.1:{port}", "")
        return service, port
    ports = [emulator.ports[0] for emulator in emulators]
    endpoint = start_vllm_router(services, ports, None, (*one.options, *_STEADY))
    assert endpoint.service is not None
    return endpoint.service, int(endpoint.urls[0].rpartition(":")[2])


@dataclass(frozen=True)
class Better:
    """By how much Tidegate is better than another router; above 1 is better."""

    than: str
    ttft: Spread
    """Their p95 TTFT over ours."""
    goodput: Spread
    """Ours over theirs."""

    @property
    def said(self) -> str:
        """What of it is not better; empty: nothing."""
        worse = [
            name for name, one in (("p95 TTFT", self.ttft), ("goodput", self.goodput)) if one.median <= 1
        ]
        return " and ".join(worse)


def better(played: Sequence[Played], requests: int) -> list[Better]:
    """Tidegate than each of the others."""
    ours = next(one for one in played if not one.options)
    found = []
    for one in played:
        if one.options:
            outcomes = [
                (mine.outcome, theirs.outcome) for mine, theirs in zip(ours.rounds, one.rounds, strict=True)
            ]
            ttft = [_over(p95_ttft(b, requests), p95_ttft(a, requests)) for a, b in outcomes]
            goodput = [_over(met(a, requests), met(b, requests)) for a, b in outcomes]
            found.append(Better(one.name, Spread.of(ttft), Spread.of(goodput)))
    return found


def _over(above: float, below: float) -> float:
    """Finite: what never came counts as a million times as long."""
    return min(above, 1e6) / max(min(below, 1e6), 1e-6)


def complaints(played: Sequence[Played], found: Sequence[Better]) -> list[str]:
    """What `--check` fails on, a line each."""
    lines = [f"tidegate is not better than {one.than} in {one.said}" for one in found if one.said]
    for one in played:
        for number, each in enumerate(one.rounds, 1):
            lines += [f"{one.name}, round {number} is spoiled: {why}" for why in each.spoiled_by]
            lines += [
                f"{one.name}, round {number}: {part} used {each.cores[part]:.2f} of a core, more than {BUSY:g}"
                for part in ("client", "emulators")
                if each.cores[part] > BUSY
            ]
    return lines


def report(
    played: Sequence[Played], found: Sequence[Better], requests: int, rate: float, speed: float
) -> None:
    """Print what was measured, by how much Tidegate is better, and what the machine did."""
    rows = [
        [
            one.name,
            spread_text([p95_ttft(each.outcome, requests) for each in one.rounds], 2),
            spread_text([met(each.outcome, requests) * rate for each in one.rounds], 2),
            spread_text([met(each.outcome, requests) * 100 for each in one.rounds], 1),
            spread_text([done.cached * 100 for done in one.served], 0),
            str(max(requests - len(each.outcome.ttft_s) for each in one.rounds)),
        ]
        for one in played
    ]
    columns = ["router", "p95 TTFT s", "goodput/s", "within the SLA %", "cached %", "unanswered"]
    print_table(
        f"{requests} requests at {rate:g} a second, speed {speed:g}: medians and quartiles", columns, rows
    )
    rows = [[one.than, f"{one.ttft.text(2)}", f"{one.goodput.text(2)}"] for one in found]
    print_table("Tidegate's advantage, inside each round", ["than", "p95 TTFT", "goodput"], rows)
    rows = [
        [
            f"{one.name}, {number}",
            *(f"{each.cores[part]:.2f}" for part in ("proxy", "emulators", "client", "others")),
            f"{each.late_ms:.1f}",
            " ".join(map(str, done.requests.values())),
        ]
        for one in played
        for number, (each, done) in enumerate(zip(one.rounds, one.served, strict=True), 1)
    ]
    columns = ["round", "router", "emulators", "client", "others", "late ms", "requests by backend"]
    print_table("Rounds: cores used; how late the client was, p99", columns, rows)


def plot(played: Sequence[Played], requests: int, path: Path) -> None:
    """First tokens, and shares within the SLA. Raises OSError; ModuleNotFoundError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    times, shares = figure.subplots(1, 2)
    for one in played:
        values = sorted(value for each in one.rounds for value in ttfts(each.outcome, requests))
        steps = [(place + 1) / len(values) for place in range(len(values))]
        reached = [min(value, 100.0) for value in values]
        times.plot(reached, steps, label=one.name, linewidth=2.5 if not one.options else 1.2)
    times.axhline(0.95, color="tab:grey", linewidth=0.8)
    times.axvline(SLA_TTFT_S, color="tab:grey", linewidth=0.8)
    times.set(xscale="log", xlabel="time to first token, s", ylabel="share of requests, all rounds")
    times.legend(fontsize="small")
    for place, one in enumerate(played):
        values = [100 * met(each.outcome, requests) for each in one.rounds]
        shares.plot([place] * len(values), values, "o", alpha=0.6)
    shares.set_xticks(range(len(played)), [one.name for one in played], rotation=20)
    shares.set(ylabel=f"within the SLA ({SLA_TTFT_S:g} s, {SLA_TPOT_S * 1e3:g} ms), %")
    figure.savefig(path, dpi=120)


def candidates() -> dict[str, str]:
    """Policy files by name, for Tidegate to choose from."""
    names = ("least-load", "session-affinity", "cache-aware", "lmetric", "gorgo", "forecast", "mooncake")
    found = {name: named_policy(name).text for name in names}
    for ttft in (1, 2):
        found[f"forecast {ttft} s"] = _rule(f"{{policy: forecast, ttft: {ttft}, tpot: {SLA_TPOT_S}}}")
    for prefix, load, latency in product((1, 2, 4), (1, 2, 4), (0, 1, 2, 4)):
        scorers = f"prefix: {prefix}, load: {load}, latency: {latency}"
        found[f"scores {prefix} {load} {latency}"] = _rule(
            f"{{policy: weighted-scores, scorers: {{{scorers}}}}}"
        )
    return found


def _rule(pick: str) -> str:
    return f"rules:\n  - name: all\n    pick: {pick}\n"


@dataclass(frozen=True)
class Tried:
    """A candidate in the simulator, on the training arrivals."""

    name: str
    text: str
    met: float
    """Share within the SLA, of the training arrivals at all their rates."""
    ttft_s: float
    """p95, the mean of them."""


def try_out(load: Load, name: str, text: str, seeds: Sequence[int], requests: int) -> Tried:
    """Play a candidate. Raises FileProblems and OSError."""
    load = load.model_copy(update={"policy": text})
    shares, times = [], []
    for rate, seed in product(TRAINING_RATES, seeds):
        outcome = simulate(load, conversations(requests, rate, seed).workload, 1.0, seed)
        shares.append(met(outcome, requests))
        times.append(p95_ttft(outcome, requests))
    return Tried(name, text, sum(shares) / len(shares), sum(times) / len(times))


def best(tried: Sequence[Tried]) -> Tried:
    """The least p95 TTFT of those that are alike in what they keep. Raises ValueError without any."""
    most = max(one.met for one in tried)
    return min((one for one in tried if one.met >= most - ALIKE), key=lambda one: one.ttft_s)


def choose(load: Load) -> int:
    """`--choose`: try all candidates, and print them and the file of the best."""
    tried = []
    with Progress(refresh_per_second=1) as progress:
        task = progress.add_task("candidates", total=len(candidates()))
        for name, text in candidates().items():
            tried.append(try_out(load, name, text, TRAINING, load.requests))
            progress.advance(task)
    tried.sort(key=lambda one: -one.met)
    rows = [[one.name, f"{one.met:.1%}", f"{one.ttft_s:.2f}"] for one in tried]
    print_table("Simulated, on training arrivals", ["candidate", "within the SLA", "p95 TTFT s"], rows)
    print(f"{best(tried).name}:\n{best(tried).text}")
    return 0


def sweep(load: Load) -> int:
    """`--sweep`: vllm-router's `cache_aware` with several thresholds, for real, on training arrivals."""
    played = [Played(name, options) for name, options in SWEPT.items()]
    asked = conversations(load.requests, RATE, TRAINING[0])
    with Progress(refresh_per_second=1) as progress:
        task = progress.add_task("thresholds", total=load.requests * len(played))
        for one in played:
            play(load, one, asked, 1.0, partial(progress.advance, task))
    report(played, [], load.requests, RATE, 1.0)
    return 0


def main() -> int:
    """The command line; returns 1 with `--check` if there are complaints, 2 for bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=RATE, help=f"requests a second (default {RATE:g})")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"(default {ROUNDS})")
    parser.add_argument("--choose", action="store_true", help="choose Tidegate's file, in the simulator")
    parser.add_argument("--sweep", action="store_true", help="try thresholds of vllm-router, for real")
    parser.add_argument("--quick", action="store_true", help="one round of few requests: does it run?")
    parser.add_argument(
        "--check", action="store_true", help="fail if Tidegate is not better, or a round is spoiled"
    )
    parser.add_argument("--no-result", action="store_true", help="write no files into benchmarks/results")
    options = parser.parse_args()
    if options.rate <= 0 or options.rounds < 1:
        parser.error("--rate and --rounds are above zero")
    raise_open_files(20_000)
    try:
        (load,) = read_loads(LOADS)
        if options.choose:
            return choose(load)
        if not (environment("vllm-router") / "bin" / "vllm-router").exists():
            print("vllm-router is not there: python -m benchmarks.install_peers vllm-router", file=sys.stderr)
            return 2
        if options.sweep:
            return sweep(load)
        return _compare(load, options)
    except (StartError, OSError, ValueError, FileProblems) as error:
        print(error, file=sys.stderr)
        return 2


def _compare(load: Load, options: argparse.Namespace) -> int:
    load = load.model_copy(update={"policy": str(POLICY)})
    requests, rounds, speed, repeats = load.requests, options.rounds, 1.0, REPEATS
    if options.quick:
        requests, rounds, speed, repeats = QUICK_REQUESTS, 1, QUICK_SPEED, 0
    played = [Played(TIDEGATE), *(Played(name, given) for name, given in PEERS.items())]
    with Progress(refresh_per_second=1) as progress:
        tasks = [progress.add_task(one.name, total=requests * rounds) for one in played]
        for seed in range(1, rounds + 1):
            asked = conversations(requests, options.rate, seed)
            for place in in_turn(len(played), seed):
                play(load, played[place], asked, speed, partial(progress.advance, tasks[place]), repeats)
    found = better(played, requests)
    report(played, found, requests, options.rate, speed)
    print(facts_line())
    if not options.no_result and not options.quick:
        path = write_result("routers", _document(played, found, requests, options.rate))
        plot(played, requests, path.with_suffix(".png"))
        print(f"written to {path.name} and {path.with_suffix('.png').name} in {RESULTS.name}")
    wrong = complaints(played, found)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if options.check and wrong else 0


def _document(
    played: Sequence[Played], found: Sequence[Better], requests: int, rate: float
) -> dict[str, Any]:
    return {
        "benchmark": "routers",
        "rate": rate,
        "requests": requests,
        "sla": {"ttft_s": SLA_TTFT_S, "tpot_s": SLA_TPOT_S},
        "policy": POLICY.read_text(encoding="utf-8"),
        "routers": [
            {
                "router": one.name,
                "options": list(one.options),
                "repeated_rounds": one.repeated,
                "rounds": [
                    {
                        "p95_ttft_s": finite(p95_ttft(each.outcome, requests)),
                        "met": met(each.outcome, requests),
                        "goodput_rps": met(each.outcome, requests) * rate,
                        "unanswered": requests - len(each.outcome.ttft_s),
                        "cached": done.cached,
                        "requests_by_backend": done.requests,
                        "cores": each.cores,
                        "late_ms": each.late_ms,
                    }
                    for each, done in zip(one.rounds, one.served, strict=True)
                ],
            }
            for one in played
        ],
        "better": [
            {"than": one.than, "p95_ttft": vars(one.ttft), "goodput": vars(one.goodput)} for one in found
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
