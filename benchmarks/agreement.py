"""Whether the simulator says what the emulator does, through the real proxy.

    python -m benchmarks.agreement
    python -m benchmarks.agreement --only many --speed 2 --undisturbed
    python -m benchmarks.agreement --trace my-workload.jsonl --loads my-loads.yaml --check

Each load of `agreement.yaml` (or `--loads`) is played twice: in `sim.cluster.Cluster`, and for real, by
`tidegate serve` before one `tidegate emulate` for each backend, with a client that sends every request at its time.
Compared are the means of time to first token and of end to end, as the client sees them, in emulated time.

When the proxy looks at its engines is a matter of chance, and what it sees decides where requests go: one trace
gives other means every time (knee and spill: some 4 % in TTFT). So the simulator plays it 25 times, with other
moments of probing, and the proxy `--rounds` times; compared are the medians.

Times count from when a request is due: what connecting takes is the proxy's, and a late client has no advantage.

`--speed` divides all emulated times. What proxy, HTTP and the loop's timers take (some 2 ms of a first token) is
not divided, and the proxy's own times are not either, see `agreement_loads.py`: 1 is what comes nearest to a real
fleet. A load is refused that would have more than 8,000 tokens a second.

A round is spoiled when other processes used more than a quarter of a core, or when the client turned to one request
in a hundred more than 20 ms late. It is repeated, twice at most; `--check` fails if there is still one.
`--undisturbed` lets ours go before all others (real-time priority, where this user may set it).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import uvloop
from rich.progress import Progress

from benchmarks.agreement_loads import SEED, Load, Outcome, arrivals, read_loads, simulate
from benchmarks.fleets import start_emulators, start_tidegate
from benchmarks.open_loop import Answer, play
from benchmarks.processes import (
    Service,
    Services,
    StartError,
    hurry,
    hurry_all,
    machine_cpu_seconds,
    raise_open_files,
)
from benchmarks.summary import Spread, facts_line, print_table, quantile, write_result
from policies.yamlfile import FileProblems
from sim.traces import TraceError
from sim.workload import Workload

LOADS = Path(__file__).with_name("agreement.yaml")
TRACE = Path(__file__).parents[2] / "shared" / "data" / "azure" / "AzureLLMInferenceTrace_2023_conv.csv.gz"
SPEED = 1.0
SIMULATIONS = 25
MOST_EVENTS = 8000.0
"""Tokens a second at most, through one proxy."""
BOUND = 0.05
"""How far the means may be apart."""
DISTURBED = 0.25
"""Of a core, used by others."""
LATE_MS = 20.0
"""How late the client may turn to requests, 99th percentile, on the wall: 5 % of the 0.4 s that a first token of
the Azure trace takes at least on an H20 pair."""
REPEATS = 2


@dataclass
class Round:
    """One load, played for real."""

    outcome: Outcome
    tokens: int
    late_ms: float
    """How late the client turned to requests, 99th percentile."""
    cores: dict[str, float] = field(default_factory=dict)
    """CPU seconds a second by process; `others`: all that is not ours."""
    load_average: float = 0.0
    ahead: bool = False
    """Our processes went before all others."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.outcome.seconds

    @property
    def spoiled_by(self) -> list[str]:
        """Why it says nothing; empty if it does."""
        found = []
        if self.cores["others"] > DISTURBED and not self.ahead:
            found.append(
                f"other processes used {self.cores['others']:.2f} of a core, more than {DISTURBED:g}"
            )
        if self.late_ms > LATE_MS:
            found.append(f"the client was {self.late_ms:.0f} ms late, more than {LATE_MS:g}")
        return found


@dataclass
class Compared:
    """One load, on both sides."""

    load: Load
    simulated: list[Outcome]
    """With other moments of probing each."""
    rounds: list[Round]
    repeated: int = 0
    """Rounds that were, since they were spoiled."""

    def ratio(self, figure: Callable[[Outcome], float]) -> Spread:
        """The emulator's over the median of the simulator's."""
        expected = quantile(map(figure, self.simulated), 0.5)
        return Spread.of([figure(one.outcome) / expected for one in self.rounds])

    @property
    def agrees(self) -> bool:
        """Whether as many were answered on both sides, and the means are as near as promised."""
        outcomes = [*self.simulated, *(one.outcome for one in self.rounds)]
        return len({len(one.ttft_s) for one in outcomes}) == 1 and all(
            abs(self.ratio(FIGURES[name]).median - 1.0) <= BOUND for name in ("TTFT mean", "end to end mean")
        )


def mean(values: Sequence[float]) -> float:
    """Raises ValueError without values."""
    if not values:
        raise ValueError("no request was answered")
    return sum(values) / len(values)


FIGURES: dict[str, Callable[[Outcome], float]] = {
    "TTFT mean": lambda one: mean(one.ttft_s),
    "TTFT p50": lambda one: quantile(one.ttft_s, 0.5),
    "TTFT p95": lambda one: quantile(one.ttft_s, 0.95),
    "end to end mean": lambda one: mean(one.total_s),
    "end to end p50": lambda one: quantile(one.total_s, 0.5),
    "end to end p95": lambda one: quantile(one.total_s, 0.95),
}
"""In emulated seconds."""


def read_trace(path: Path | None) -> Workload:
    """The trace that is given, else the Azure one, else one that is made up like it. Raises OSError, TraceError."""
    from sim.traces import read_workload

    if path is not None or TRACE.is_file():
        return read_workload(path or TRACE)
    from sim.generator import generate
    from sim.generator_spec import WorkloadSpec

    office = {
        "name": "office",
        "rate": 5,
        "prompt": {"mean": 1155, "p95": 4083},
        "output": {"mean": 211, "p95": 451},
    }
    return generate(
        WorkloadSpec.model_validate({"duration": 600, "unit_tokens": 0, "clients": [office]}), SEED
    )


def emulate(
    load: Load,
    workload: Workload,
    speed: float,
    heard: Callable[[], object],
    undisturbed: bool = False,
    bodies: Sequence[bytes] | None = None,
) -> Round:
    """Play requests (`arrivals`) through the proxy. Raises StartError and OSError.

    `undisturbed`: its processes go before all ordinary ones, where this user may say so. `bodies`: of the requests;
    without, they have the counts of tokens and share nothing.
    """
    with tempfile.TemporaryDirectory(prefix="tidegate-bench-") as name, Services(Path(name)) as services:
        emulators = start_emulators(services, load, speed)
        proxy, port = start_tidegate(services, load, emulators)
        return play_through(proxy, port, emulators, workload, speed, heard, undisturbed, bodies)


def play_through(
    proxy: Service,
    port: int,
    emulators: Sequence[Service],
    workload: Workload,
    speed: float,
    heard: Callable[[], object],
    undisturbed: bool = False,
    bodies: Sequence[bytes] | None = None,
) -> Round:
    """Play requests through any proxy that serves on a port of this machine, as `emulate` does. Raises OSError."""
    parts = {"proxy": [proxy], "emulators": emulators}
    if undisturbed:
        hurry(os.getpid(), 1)
        for service in (proxy, *emulators):
            hurry_all(service.pid, 1)

    def used() -> dict[str, float]:
        ours = {part: sum(one.cpu_seconds() for one in those) for part, those in parts.items()}
        ours["client"] = time.process_time()
        return ours | {"others": machine_cpu_seconds() - sum(ours.values())}

    ahead = os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK == os.SCHED_FIFO
    before, began = used(), time.monotonic()
    answers = uvloop.run(play(port, workload.arrivals, heard, bodies))
    seconds, after = time.monotonic() - began, used()
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    cores = {part: max(after[part] - before[part], 0.0) / seconds for part in before}
    return replace(seen(answers, workload, speed, cores), ahead=ahead)


def seen(answers: Sequence[Answer], workload: Workload, speed: float, cores: dict[str, float]) -> Round:
    """What the client's answers amount to."""
    outcome, tokens = Outcome(), 0
    for answer, request in zip(answers, workload, strict=True):
        outcome.decisions[answer.failure or answer.backend] += 1
        if not answer.failure:
            tokens += request.output_tokens
            outcome.ttft_s.append((answer.first_at - answer.due_at) * speed)
            outcome.total_s.append((answer.ended_at - answer.due_at) * speed)
            outcome.tpot_s.append(
                (answer.ended_at - answer.first_at) * speed / max(request.output_tokens - 1, 1)
            )
    outcome.seconds = max(answer.ended_at for answer in answers) - answers[0].due_at
    late = [(answer.began_at - answer.due_at) * 1e3 for answer in answers]
    return Round(outcome, tokens, quantile(late, 0.99), cores, os.getloadavg()[0])


def compare(
    load: Load,
    trace: Workload,
    speed: float,
    rounds: int,
    heard: Callable[[], object],
    undisturbed: bool = False,
    repeats: int = REPEATS,
) -> Compared:
    """Play a load on both sides. Raises StartError, OSError, FileProblems, and ValueError for one that is too much.

    `heard` is called with each answer of the real side. `repeats`: spoiled rounds that are repeated, at most.
    """
    workload = arrivals(load, trace, speed)
    simulated = [simulate(load, workload, speed, seed) for seed in range(SIMULATIONS)]
    rate = sum(one.output_tokens for one in workload) / min(one.seconds for one in simulated)
    if rate > MOST_EVENTS:
        raise ValueError(
            f"load {load.name}: {rate:,.0f} tokens a second at speed {speed:g}, more than {MOST_EVENTS:,.0f}: "
            "choose a lower --speed"
        )
    compared = Compared(load, simulated, [])
    while len(compared.rounds) < rounds:
        one = emulate(load, workload, speed, heard, undisturbed)
        if one.spoiled_by and compared.repeated < repeats:
            compared.repeated += 1
        else:
            compared.rounds.append(one)
    return compared


def complaints(results: Sequence[Compared]) -> list[str]:
    """What `--check` fails on, a line each."""
    found = []
    for result in results:
        name = result.load.name
        for number, one in enumerate(result.rounds, 1):
            found += [f"load {name}, round {number} is spoiled: {why}" for why in one.spoiled_by]
        if not result.agrees:
            found.append(f"load {name}: means further apart than {BOUND:.0%}, or not as many answers")
    return found


def decisions(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """How many requests went where, on average."""
    total: Counter[str] = sum((one.decisions for one in outcomes), Counter())
    return {name: count / len(outcomes) for name, count in total.items()}


def report(results: Sequence[Compared], speed: float) -> None:
    """Print both sides of every load."""
    rows = []
    for result in results:
        for name, figure in FIGURES.items():
            expected = Spread.of([figure(one) for one in result.simulated]).text(3)
            emulated = Spread.of([figure(one.outcome) for one in result.rounds]).text(3)
            rows.append([result.load.name, name, expected, emulated, result.ratio(figure).text(3)])
    columns = ["load", "figure", "simulator", "emulator", "emulator / simulator"]
    print_table(f"Emulated seconds at speed {speed:g}", columns, rows)
    rows = []
    for result in results:
        simulated = decisions(result.simulated)
        emulated_decisions = decisions([one.outcome for one in result.rounds])
        for name in sorted(simulated.keys() | emulated_decisions.keys()):
            counts = (simulated.get(name, 0.0), emulated_decisions.get(name, 0.0))
            rows.append([result.load.name, name, *(f"{count:.1f}" for count in counts)])
    columns = ["load", "where", "simulator", "emulator"]
    print_table("Requests by backend, or by why they have none", columns, rows)
    rows = [
        [
            result.load.name,
            f"{one.tokens_per_s:,.0f}",
            f"{one.outcome.seconds:.0f}",
            *(f"{share:.2f}" for share in one.cores.values()),
            f"{one.late_ms:.1f}",
            f"{one.load_average:.1f}",
        ]
        for result in results
        for one in result.rounds
    ]
    columns = [
        "load",
        "tokens/s",
        "seconds",
        "proxy",
        "emulators",
        "client",
        "others",
        "late ms",
        "load average",
    ]
    print_table("Rounds: cores used; how late the client was, p99", columns, rows)


def main() -> int:
    """The command line; returns 1 with `--check` if there are complaints, 2 for bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--trace", type=Path, help="of any form that tidegate reads (default: Azure's of 2023)"
    )
    parser.add_argument("--loads", type=Path, default=LOADS, help="YAML file (default: agreement.yaml)")
    parser.add_argument("--only", help="names of loads, with commas between (default: all)")
    parser.add_argument("--speed", type=float, default=SPEED, help=f"(default {SPEED:g})")
    parser.add_argument("--rounds", type=int, default=3, help="of the real side (default 3)")
    parser.add_argument("--undisturbed", action="store_true", help="go before other processes of the machine")
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"fail if means are more than {BOUND:.0%} apart, or a round is spoiled",
    )
    parser.add_argument("--no-result", action="store_true", help="write no file into benchmarks/results")
    options = parser.parse_args()
    if options.speed <= 0 or options.rounds < 1:
        parser.error("--speed and --rounds are above zero")
    raise_open_files(20_000)
    results: list[Compared] = []
    try:
        loads = read_loads(options.loads)
        if options.only is not None:
            names = options.only.split(",")
            unknown = set(names) - {load.name for load in loads}
            if unknown:
                parser.error(f"no such load: {', '.join(sorted(unknown))}")
            loads = [load for load in loads if load.name in names]
        trace = read_trace(options.trace)
        with Progress(refresh_per_second=1) as progress:
            for load in loads:
                task = progress.add_task(load.name, total=load.requests * options.rounds)
                results.append(
                    compare(
                        load,
                        trace,
                        options.speed,
                        options.rounds,
                        partial(progress.advance, task),
                        options.undisturbed,
                    )
                )
    except (StartError, OSError, ValueError, FileProblems, TraceError) as error:
        print(error, file=sys.stderr)
        return 2
    report(results, options.speed)
    print(f"{trace.name}\n{facts_line()}")
    if not options.no_result:
        print(f"written to {write_result('agreement', _document(results, trace, options)).name}")
    wrong = complaints(results)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if options.check and wrong else 0


def _document(results: Sequence[Compared], trace: Workload, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "benchmark": "agreement",
        "speed": options.speed,
        "undisturbed": options.undisturbed,
        "trace": trace.name,
        "loads": [
            {
                "load": result.load.model_dump(mode="json"),
                "simulator": [_figures(one) for one in result.simulated],
                "rounds": [
                    asdict(one) | {"outcome": _figures(one.outcome), "tokens_per_s": one.tokens_per_s}
                    for one in result.rounds
                ],
                "ratios": {name: asdict(result.ratio(figure)) for name, figure in FIGURES.items()},
                "repeated_rounds": result.repeated,
            }
            for result in results
        ],
    }


def _figures(outcome: Outcome) -> dict[str, Any]:
    figures = {name: figure(outcome) for name, figure in FIGURES.items()}
    return figures | {"decisions": dict(outcome.decisions), "seconds": outcome.seconds}


if __name__ == "__main__":
    sys.exit(main())
