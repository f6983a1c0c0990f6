"""Memory per open stream, and whether memory stays flat over many requests.

    python -m benchmarks.memory
    python -m benchmarks.memory --peers tidegate,vllm-router --streams 1000 --requests 20000

Streams: `--streams` clients open one stream each and keep it open at a slow rate; memory is read while all are open
and compared with that before. Requests: 32 clients in a closed loop; after a quarter as many to warm up
(pools, caches and the rows on their way to the ledger reach their size), memory is read, and again after each
twentieth.

Memory is the proportional set size of the process tree: what the operating system would get back. Socket buffers in
the kernel are not in it; they are the same for every proxy that holds two sockets per stream.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmarks.compare import load_command
from benchmarks.peers import PEERS, Endpoint, Peer
from benchmarks.processes import Cores, Service, Services, StartError, ask_mock, raise_open_files
from benchmarks.summary import facts_line, print_table, write_result

SLOW_TOKENS_PER_S = 0.5
OPENING_STREAMS_PER_S = 500
SETTLE_S = 3.0
STEPS = 20
WARM_UP = 4
"""One of so many parts of the requests comes before them."""
CLIENTS = 32

PROMISED_KB_PER_STREAM = 40.0
FLAT_MB = 4.0
"""Growth over the requests after the warm-up that still counts as flat: pools and caches breathe."""


@dataclass(frozen=True)
class StreamMemory:
    """Memory of one proxy with many open streams."""

    peer: str
    streams: int
    """Open at the moment of reading, as the backends count them."""
    before_mb: float
    open_mb: float
    closed_mb: float
    failures: dict[str, int]

    @property
    def kb_per_stream(self) -> float:
        """What one open stream adds, kB."""
        return (self.open_mb - self.before_mb) * 1000 / self.streams


@dataclass(frozen=True)
class RequestMemory:
    """Memory of one proxy after a warm-up and each step of many requests."""

    peer: str
    requests: tuple[int, ...]
    """Answered so far, at each reading."""
    memory_mb: tuple[float, ...]
    failures: dict[str, int]

    @property
    def growth_mb(self) -> float:
        """From the end of the warm-up to the last reading."""
        return self.memory_mb[-1] - self.memory_mb[0]


def running(mock: Service) -> int:
    """Streams open at the backends."""
    return sum(state["running"] for state in ask_mock(mock, "/bench/state"))


def measure_streams(peer: Peer, streams: int, cores: Cores) -> StreamMemory:
    """Open `streams` streams through a proxy and read its memory; raises StartError if it does not serve."""
    with tempfile.TemporaryDirectory(prefix="tidegate-bench-") as folder, Services(Path(folder)) as services:
        mock = services.start_mock("--backends", "2", "--rate", str(SLOW_TOKENS_PER_S), core=cores.backend)
        endpoint = peer.start(services, mock.ports, cores.proxy)
        assert endpoint.service is not None
        opening_s = streams / OPENING_STREAMS_PER_S
        tokens = round((opening_s + 4 * SETTLE_S) * SLOW_TOKENS_PER_S) + 1
        warm_up = load_command("requests", endpoint, clients=CLIENTS, each=50)
        services.run("warm-up", warm_up, core=cores.load, timeout_s=120)
        time.sleep(SETTLE_S)
        before = endpoint.service.memory_bytes()
        command = load_command("streams", endpoint, clients=streams, tokens=tokens, each=1, spread=opening_s)
        load = services.start("load", command, core=cores.load, stdout=subprocess.PIPE)
        time.sleep(opening_s + SETTLE_S)
        count, while_open = running(mock), endpoint.service.memory_bytes()
        report = json.loads(load.process.communicate(timeout=600)[0] or "{}")
        if not count or not report.get("requests"):
            raise StartError(f"no stream came through: {report.get('failures')} {load.log_tail()}")
        time.sleep(SETTLE_S)
        return StreamMemory(
            peer=peer.name,
            streams=count,
            before_mb=before / 1e6,
            open_mb=while_open / 1e6,
            closed_mb=endpoint.service.memory_bytes() / 1e6,
            failures=report["failures"],
        )


def measure_requests(peer: Peer, requests: int, cores: Cores, step_done: Callable[[], None]) -> RequestMemory:
    """Send many requests through a proxy, reading its memory as they go; raises StartError if it does not serve."""
    with tempfile.TemporaryDirectory(prefix="tidegate-bench-") as folder, Services(Path(folder)) as services:
        mock = services.start_mock("--backends", "2", core=cores.backend)
        endpoint = peer.start(services, mock.ports, cores.proxy)
        assert endpoint.service is not None
        answered, counts, memory = 0, [], []
        failures: dict[str, int] = {}
        for count in (requests // WARM_UP, *[requests // STEPS] * STEPS):
            report = _requests_step(services, endpoint, count, cores.load)
            answered += report["requests"]
            for reason, count in report["failures"].items():
                failures[reason] = failures.get(reason, 0) + count
            counts.append(answered)
            memory.append(endpoint.service.memory_bytes() / 1e6)
            step_done()
        return RequestMemory(peer.name, tuple(counts), tuple(memory), failures)


def _requests_step(services: Services, endpoint: Endpoint, requests: int, core: int) -> dict[str, Any]:
    each = -(-requests // CLIENTS)
    command = load_command("requests", endpoint, clients=CLIENTS, each=each, seconds=600)
    report: dict[str, Any] = json.loads(services.run("load", command, core=core, timeout_s=700))
    return report


def print_report(streams: Sequence[StreamMemory], requests: Sequence[RequestMemory]) -> None:
    """Print both tables."""
    rows = [
        [
            memory.peer,
            str(memory.streams),
            f"{memory.before_mb:.1f}",
            f"{memory.open_mb:.1f}",
            f"{memory.closed_mb:.1f}",
            f"{memory.kb_per_stream:.1f}",
            str(memory.failures or ""),
        ]
        for memory in streams
    ]
    columns = ("proxy", "open streams", "MB before", "MB open", "MB after", "kB/stream", "failures")
    print_table("Memory of open streams", columns, rows)
    rows = [
        [
            memory.peer,
            str(memory.requests[-1]),
            f"{memory.memory_mb[0]:.1f}",
            f"{memory.memory_mb[len(memory.memory_mb) // 2]:.1f}",
            f"{memory.memory_mb[-1]:.1f}",
            f"{memory.growth_mb:+.1f}",
            str(memory.failures or ""),
        ]
        for memory in requests
    ]
    columns = ("proxy", "requests", "MB warmed up", "MB half-way", "MB at the end", "growth MB", "failures")
    print_table("Memory over many requests; growth since the warm-up", columns, rows)
    print(
        f"promised for tidegate: at most {PROMISED_KB_PER_STREAM:.0f} kB per stream, growth below {FLAT_MB:.0f} MB"
    )


def keeps_promise(streams: Sequence[StreamMemory], requests: Sequence[RequestMemory]) -> bool:
    """Whether Tidegate was measured, without failures, and keeps both bounds."""
    ours = [memory for memory in streams if memory.peer == "tidegate"]
    flat = [memory for memory in requests if memory.peer == "tidegate"]
    return (
        bool(ours and flat)
        and all(memory.kb_per_stream <= PROMISED_KB_PER_STREAM and not memory.failures for memory in ours)
        and all(memory.growth_mb <= FLAT_MB and not memory.failures for memory in flat)
    )


def main() -> int:
    """The command line; returns 1 with `--check` if a promise is not kept."""
    parser = argparse.ArgumentParser(description="Memory per open stream and over many requests.")
    parser.add_argument("--peers", default="tidegate", help=f"of {','.join(PEERS)} (default: tidegate)")
    parser.add_argument("--streams", type=int, default=5000, help="open at once (default 5000)")
    parser.add_argument("--requests", type=int, default=200_000, help="one after another (default 200000)")
    parser.add_argument("--check", action="store_true", help="fail unless the promised bounds are kept")
    parser.add_argument("--no-result", action="store_true", help="write no file into benchmarks/results")
    arguments = parser.parse_args()
    names = arguments.peers.split(",")
    unknown = [name for name in names if name not in PEERS or name == "direct"]
    if unknown:
        parser.error(f"no such proxy: {', '.join(unknown)}")
    open_files = raise_open_files(arguments.streams * 2 + 1000)
    if open_files < arguments.streams * 2 + 200:
        parser.error(f"only {open_files} files may be open here: raise `ulimit -n` or open fewer streams")
    cores = Cores.of_machine()
    streams: list[StreamMemory] = []
    requests: list[RequestMemory] = []
    errors: dict[str, str] = {}
    with Progress() as progress:
        task = progress.add_task("", total=len(names) * (STEPS + 2))
        for name in names:
            try:
                progress.update(task, description=f"{name}: open streams")
                streams.append(measure_streams(PEERS[name], arguments.streams, cores))
                progress.advance(task)
                progress.update(task, description=f"{name}: requests")
                requests.append(
                    measure_requests(PEERS[name], arguments.requests, cores, lambda: progress.advance(task))
                )
            except (StartError, OSError) as error:
                errors[name] = str(error)
    print_report(streams, requests)
    for name, text in errors.items():
        print(f"\n{name}: {text}")
    print(facts_line())
    if not arguments.no_result:
        result = {
            "benchmark": "memory",
            "streams": [asdict(memory) | {"kb_per_stream": memory.kb_per_stream} for memory in streams],
            "requests": [asdict(memory) | {"growth_mb": memory.growth_mb} for memory in requests],
            "not_measured": errors,
        }
        print(f"written to {write_result('memory', result).name} in benchmarks/results")
    return 1 if arguments.check and not keeps_promise(streams, requests) else 0


if __name__ == "__main__":
    sys.exit(main())
