"""`make bench`: what a request and a streamed token cost in Tidegate and in its peers.

    python -m benchmarks.compare
    python -m benchmarks.compare --peers tidegate,vllm-router --rounds 3 --quick

In each round every proxy is started afresh on a core of its own, warmed up, loaded, measured and ended, one after
the other, so that a change in the machine's mood meets all of them. Two loads:

* requests: 32 clients in a closed loop, 1.1 KB chat requests, answers of 16 tokens in one piece (0.7 KB);
* streams: 256 clients start within a second, each one stream of 128 tokens at 50 tokens a second.

CPU is user plus system time of the proxy's whole process tree. Per request: over the first load, divided by its
requests. Per streamed token: over the second load, divided by its tokens, so that connecting, the request and the
end are in it. Each load is followed by a second without any, so that what it left to be done (records to write,
connections to close) is counted as its own and not as the next one's. A round in which an answer was not complete
and right does not count.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.peers import PEERS, WORK, Endpoint, Peer
from benchmarks.processes import Cores, Services, StartError, machine_cpu_seconds, raise_open_files
from benchmarks.summary import Spread, facts_line, print_table, ratio, write_result

TOKENS_PER_S = 50.0
SETTLE_S = 1.0
"""After a load, until its cost is read."""
PROMISED = {"us_per_request": 0.75, "us_per_token": 1.0}
"""Tidegate over vllm-router, at most."""


MOST_FAVOURED = -20
"""The niceness of `--undisturbed`: nearly all of a core to the benchmark while it wants it."""


@dataclass(frozen=True)
class Load:
    """How much of each load one round applies."""

    clients: int = 32
    seconds: float = 4.0
    streams: int = 256
    tokens: int = 128
    warm_up_s: float = 1.0


QUICK = Load(seconds=1.5, streams=128, tokens=64, warm_up_s=0.5)


@dataclass(frozen=True)
class Figures:
    """What one round saw of one proxy; times in the units of their names."""

    peer: str
    us_per_request: float | None
    """None: no proxy whose time could be counted."""
    us_per_token: float | None
    us_per_token_net: float | None
    """Per token without the cost of the stream's request, taken from the same round."""
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    first_token_p50_ms: float
    first_token_p99_ms: float
    gap_p99_ms: float
    memory_mb: float | None
    core_busy: tuple[float, float]
    """How much of a core the proxy used in either load, 0 to 1."""
    others: float
    """Cores' worth of CPU time that processes foreign to this benchmark used meanwhile."""
    failures: dict[str, int]


def load_command(mode: str, endpoint: Endpoint, **options: object) -> list[str]:
    """The command line of the load generator against an endpoint."""
    command = [sys.executable, "-m", "benchmarks.load", mode, "--url", *endpoint.urls]
    if endpoint.key:
        command += ["--key", endpoint.key]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    return command


def measure(peer: Peer, load: Load, cores: Cores, niceness: int = 0) -> Figures:
    """Start a proxy, apply both loads, end it; raises StartError if it does not serve."""
    folder = tempfile.TemporaryDirectory(prefix="tidegate-bench-")
    with folder, Services(Path(folder.name), niceness) as services:
        mock = services.start_mock("--backends", "2", "--rate", str(TOKENS_PER_S), core=cores.backend)
        endpoint = peer.start(services, mock.ports, cores.proxy)
        streams = min(load.streams, peer.stream_clients or load.streams)

        def run(mode: str, **options: object) -> dict[str, Any]:
            command = load_command(mode, endpoint, **options)
            report: dict[str, Any] = json.loads(services.run("load", command, core=cores.load, timeout_s=180))
            time.sleep(SETTLE_S)
            return report

        run("requests", clients=load.clients, seconds=load.warm_up_s)
        run("streams", clients=streams, tokens=4, each=1)
        begin = _Usage.now(endpoint, mock.cpu_seconds())
        requests = run("requests", clients=load.clients, seconds=load.seconds)
        middle = _Usage.now(endpoint, mock.cpu_seconds())
        streamed = run("streams", clients=streams, tokens=load.tokens, each=1, spread=1.0)
        end = _Usage.now(endpoint, mock.cpu_seconds())
        memory = endpoint.service.memory_bytes() / 1e6 if endpoint.service else None
        return _figures(
            peer.name, requests, streamed, (begin, middle, end), memory, endpoint.service is not None
        )


@dataclass(frozen=True)
class _Usage:
    """CPU seconds used up to a moment."""

    at: float
    proxy: float
    mock: float
    machine: float

    @classmethod
    def now(cls, endpoint: Endpoint, mock: float) -> _Usage:
        proxy = endpoint.service.cpu_seconds() if endpoint.service else 0.0
        return cls(time.monotonic(), proxy, mock, machine_cpu_seconds())


def _figures(
    name: str,
    requests: dict[str, Any],
    streamed: dict[str, Any],
    usage: tuple[_Usage, _Usage, _Usage],
    memory_mb: float | None,
    is_proxy: bool,
) -> Figures:
    begin, middle, end = usage
    failures = dict(requests["failures"])
    for reason, count in streamed["failures"].items():
        failures[reason] = failures.get(reason, 0) + count
    if not requests["requests"] or not streamed["tokens"]:
        raise StartError(f"no right answer: {failures}")
    first, second = middle.proxy - begin.proxy, end.proxy - middle.proxy
    per_request = first / requests["requests"] * 1e6
    net = (second * 1e6 - per_request * streamed["requests"]) / streamed["tokens"]
    ours = (
        (end.proxy - begin.proxy)
        + (end.mock - begin.mock)
        + requests["cpu_seconds"]
        + streamed["cpu_seconds"]
    )
    return Figures(
        peer=name,
        us_per_request=per_request if is_proxy else None,
        us_per_token=second / streamed["tokens"] * 1e6 if is_proxy else None,
        us_per_token_net=net if is_proxy else None,
        requests_per_s=requests["requests_per_s"],
        p50_ms=requests["latency_s"]["p50"] * 1e3,
        p99_ms=requests["latency_s"]["p99"] * 1e3,
        first_token_p50_ms=streamed["first_token_s"]["p50"] * 1e3,
        first_token_p99_ms=streamed["first_token_s"]["p99"] * 1e3,
        gap_p99_ms=streamed["gap_s"]["p99"] * 1e3,
        memory_mb=memory_mb,
        core_busy=(first / requests["seconds"], second / streamed["seconds"]),
        others=max(0.0, (end.machine - begin.machine - ours) / (end.at - begin.at)),
        failures=failures,
    )


def run_rounds(
    names: Sequence[str], rounds: int, load: Load, niceness: int = 0
) -> tuple[list[dict[str, Figures]], dict[str, str]]:
    """Measure each peer once a round; returns the rounds and, by peer, why it could not be measured."""
    cores = Cores.of_machine()
    results: list[dict[str, Figures]] = [{} for _ in range(rounds)]
    errors: dict[str, str] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=rounds * len(names))
        for number, result in enumerate(results, 1):
            for name in names:
                progress.update(task, description=f"round {number}: {name:14}")
                try:
                    figures = measure(PEERS[name], load, cores, niceness)
                    if figures.failures:
                        errors[name] = f"round {number} does not count: {figures.failures}"
                    else:
                        result[name] = figures
                except (StartError, OSError) as error:
                    errors[name] = str(error)
                progress.advance(task)
    return results, errors


COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("µs/request", "us_per_request", 1),
    ("µs/token", "us_per_token", 1),
    ("p50 ms", "p50_ms", 2),
    ("p99 ms", "p99_ms", 2),
    ("TTFT p50", "first_token_p50_ms", 2),
    ("TTFT p99", "first_token_p99_ms", 2),
    ("MB", "memory_mb", 0),
)
WITH_QUARTILES = ("us_per_request", "us_per_token")


def spread_of(rounds: Sequence[dict[str, Figures]], name: str, figure: str) -> Spread | None:
    """The spread over the rounds of one figure of one peer; None if no round has it."""
    values = [getattr(result[name], figure) for result in rounds if name in result]
    values = [value for value in values if value is not None]
    return Spread.of(values) if values else None


def ratio_of(rounds: Sequence[dict[str, Figures]], figure: str, under: str = "vllm-router") -> Spread | None:
    """Tidegate's figure over that of a peer in the same round; None if they share no round."""
    shared = [result for result in rounds if "tidegate" in result and under in result]
    return ratio(
        [getattr(result["tidegate"], figure) for result in shared],
        [getattr(result[under], figure) for result in shared],
    )


def _cell(spread: Spread | None, figure: str, digits: int) -> str:
    if spread is None:
        return ""
    return spread.text(digits) if figure in WITH_QUARTILES else f"{spread.median:.{digits}f}"


def print_report(names: Sequence[str], rounds: Sequence[dict[str, Figures]]) -> None:
    """Print the table, what each proxy does for its figures, and the ratios."""
    rows = []
    for name in names:
        if not any(name in result for result in rounds):
            continue
        cells = [_cell(spread_of(rounds, name, figure), figure, digits) for _, figure, digits in COLUMNS]
        rows.append([name, *cells, ", ".join(work for work in WORK if work in PEERS[name].work)])
    print_table(
        "CPU (median and quartiles of the rounds), latency and memory (median)",
        ("proxy", *(title for title, _, _ in COLUMNS), "does"),
        rows,
    )
    print("\n".join(f"{name}: {meaning}" for name, meaning in WORK.items()))
    for title, figure in (("request", "us_per_request"), ("streamed token", "us_per_token")):
        spread = ratio_of(rounds, figure)
        if spread is not None:
            print(
                f"tidegate / vllm-router, CPU per {title}: {spread.text(2)}, promised at most {PROMISED[figure]}"
            )
    busiest = max((figures.others for result in rounds for figures in result.values()), default=0.0)
    if busiest > 0.1:
        print(f"other processes used up to {busiest:.2f} cores meanwhile: run this again on a quiet machine")


def keeps_promise(rounds: Sequence[dict[str, Figures]]) -> bool:
    """Whether both ratios were measured and are as promised."""
    ratios = {figure: ratio_of(rounds, figure) for figure in PROMISED}
    return all(spread is not None and spread.median <= PROMISED[figure] for figure, spread in ratios.items())


def as_json(rounds: Sequence[dict[str, Figures]], load: Load, errors: dict[str, str]) -> dict[str, Any]:
    """The result as it is written down: every round of every peer, and the ratios."""
    ratios = {figure: ratio_of(rounds, figure) for figure in PROMISED}
    return {
        "benchmark": "compare",
        "load": asdict(load),
        "rounds": [{name: asdict(figures) for name, figures in result.items()} for result in rounds],
        "tidegate_over_vllm_router": {
            name: asdict(spread) if spread else None for name, spread in ratios.items()
        },
        "not_measured": errors,
    }


def main() -> int:
    """The command line; returns 1 with `--check` if a promise is not kept."""
    parser = argparse.ArgumentParser(
        description="CPU per request and per streamed token of Tidegate and its peers."
    )
    parser.add_argument("--peers", default=",".join(PEERS), help=f"of {','.join(PEERS)} (default: all)")
    parser.add_argument("--rounds", type=int, help="default 5, with --quick 1")
    parser.add_argument(
        "--quick", action="store_true", help="short loads: to see that it works, not to publish"
    )
    parser.add_argument(
        "--undisturbed", action="store_true", help="go before other processes, on a machine that is not quiet"
    )
    parser.add_argument("--check", action="store_true", help="fail unless the promised ratios are kept")
    parser.add_argument("--no-result", action="store_true", help="write no file into benchmarks/results")
    arguments = parser.parse_args()
    names = arguments.peers.split(",")
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        parser.error(f"no such peer: {', '.join(unknown)}; there are {', '.join(PEERS)}")
    missing = [name for name in names if not PEERS[name].installed()]
    for name in missing:
        print(f"{name} is not installed: python -m benchmarks.install_peers {name}")
    names = [name for name in names if name not in missing]
    raise_open_files(20_000)
    load = QUICK if arguments.quick else Load()
    count = arguments.rounds or (1 if arguments.quick else 5)
    rounds, errors = run_rounds(names, count, load, MOST_FAVOURED if arguments.undisturbed else 0)
    print_report(names, rounds)
    for name, error in errors.items():
        print(f"\n{name}: {error}")
    print(f"\n{facts_line()}")
    if not arguments.no_result:
        print(
            f"written to {write_result('compare', as_json(rounds, load, errors)).name} in benchmarks/results"
        )
    return 1 if arguments.check and not keeps_promise(rounds) else 0


if __name__ == "__main__":
    sys.exit(main())
