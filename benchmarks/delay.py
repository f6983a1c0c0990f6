"""The delay a proxy adds to the first token and to each later one, while it uses half a core.

    python -m benchmarks.delay
    python -m benchmarks.delay --peers tidegate,vllm-router --seconds 10

A background of 50-token/s streams is set so that the proxy uses half of its core. Meanwhile probes send short
streams, in turn through the proxy and straight to a backend, so that both meet the same moment of the machine: what
is added is the difference of the two distributions' quantiles. Probes and backends go before other processes of
their core (real-time priority, where this user may set it). The proxy is an ordinary process on the other core;
`--undisturbed` lets it go before others too, which shows on a busy machine about what a quiet one would.

Time to first token: from writing the request to reading its first token. Later tokens: from the moment the backend
writes a token, which is in the token (one clock for all processes of a machine), to the moment the client reads it.
Both with requests of 1.1 KB and of 400 KB, about 100,000 tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvloop
from rich.progress import Progress

from benchmarks.client import Connection, Heard
from benchmarks.compare import TOKENS_PER_S, load_command
from benchmarks.load import BODY_BYTES, Plan
from benchmarks.peers import PEERS, Endpoint, Peer
from benchmarks.processes import Cores, Service, Services, StartError, hurry, hurry_all, raise_open_files
from benchmarks.summary import facts_line, print_table, quantile, write_result

LONG_BODY_BYTES = 400_000
HALF_A_CORE = 0.5
PROMISED_MS = {0.5: 0.3, 0.99: 2.0}
"""What Tidegate adds at most, by quantile, to first and later tokens of short requests."""

PROBES = {BODY_BYTES: 8, LONG_BODY_BYTES: 2}
"""Probe streams at once: few beside the background, fewer if each is 400 KB."""

STREAM_TOKENS = 8
MOST_STREAMS = 1200


@dataclass
class Times:
    """What the probes saw on one way, seconds."""

    first: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)

    def take(self, heard: Heard) -> None:
        """Note a probe's answer: the first token's wait, and how long each later token was under way."""
        self.first.append(heard.token_at[0] - heard.sent_at)
        stamps = [int(stamp) / 1e9 for stamp in "".join(heard.words).split()]
        self.later += [read - written for read, written in zip(heard.token_at[1:], stamps[1:], strict=True)]


@dataclass(frozen=True)
class Added:
    """The result for one proxy and one size of request; times in milliseconds by quantile."""

    peer: str
    body_bytes: int
    core_busy: float
    samples: int
    failures: int
    direct_first: dict[str, float]
    added_first: dict[str, float]
    direct_later: dict[str, float]
    added_later: dict[str, float]


def compare(direct: Sequence[float], through: Sequence[float]) -> tuple[dict[str, float], dict[str, float]]:
    """Quantiles of the direct way and what the other adds to each, milliseconds; keys `p50`, `p99`."""
    quantiles = {f"p{part * 100:.0f}": part for part in PROMISED_MS}
    base = {name: quantile(direct, part) * 1e3 for name, part in quantiles.items()}
    return base, {name: quantile(through, part) * 1e3 - base[name] for name, part in quantiles.items()}


async def probe(
    endpoint: Endpoint, backends: Sequence[int], body_bytes: int, seconds: float
) -> tuple[Times, Times, int]:
    """Send short streams in turn directly and through the proxy; returns both ways' times and the failures."""
    addresses = tuple((part.hostname or "", part.port or 80) for part in map(urlsplit, endpoint.urls))
    shape = {"stream": True, "tokens": STREAM_TOKENS, "body_bytes": body_bytes, "stamped": True}
    ways = (
        Plan(tuple(("127.0.0.1", port) for port in backends), **shape),  # type: ignore[arg-type]
        Plan(addresses, key=endpoint.key, **shape),  # type: ignore[arg-type]
    )
    times = (Times(), Times())
    failures = 0
    deadline = time.monotonic() + seconds

    async def one(number: int) -> None:
        nonlocal failures
        connections = [Connection(plan, number) for plan in ways]
        # Out of step with the other probes and with the background.
        await asyncio.sleep(random.random() / TOKENS_PER_S * STREAM_TOKENS)
        for connection in connections:
            await connection.ask(number)
        while time.monotonic() < deadline and failures < 50:
            for way in (0, 1):
                heard = await connections[way].ask(random.randrange(1 << 30))
                if heard.failure:
                    failures += 1
                else:
                    times[way].take(heard)
                await asyncio.sleep(random.random() / TOKENS_PER_S)
        for connection in connections:
            connection.close()

    await asyncio.gather(*(one(number) for number in range(PROBES[body_bytes])))
    return times[0], times[1], failures


def start_background(services: Services, endpoint: Endpoint, streams: int, core: int) -> Service:
    """Streams of 50 tokens a second without end; stop the service to end them."""
    command = load_command("streams", endpoint, clients=streams, tokens=256, seconds=600, spread=2.0)
    return services.start("background", [*command, "--unchecked"], core=core, stdout=subprocess.DEVNULL)


def busy(endpoint: Endpoint, seconds: float) -> float:
    """How much of a core the proxy uses over the next seconds."""
    assert endpoint.service is not None
    before, at = endpoint.service.cpu_seconds(), time.monotonic()
    time.sleep(seconds)
    return (endpoint.service.cpu_seconds() - before) / (time.monotonic() - at)


def half_load(services: Services, endpoint: Endpoint, core: int) -> Service:
    """Start a background that makes the proxy use half a core; returns it."""
    streams = 64
    for _ in range(4):
        background = start_background(services, endpoint, streams, core)
        time.sleep(3.0)
        share = busy(endpoint, 1.5)
        wanted = min(MOST_STREAMS, max(1, round(streams * HALF_A_CORE / max(share, 0.01))))
        if abs(share - HALF_A_CORE) < 0.05 or wanted == streams:
            return background
        services.stop(background)
        streams = wanted
    return start_background(services, endpoint, streams, core)


def measure(peer: Peer, seconds: float, cores: Cores, undisturbed: bool = False) -> list[Added]:
    """Measure one proxy with short and with long requests; raises StartError if it does not serve."""
    results = []
    with tempfile.TemporaryDirectory(prefix="tidegate-bench-") as folder, Services(Path(folder)) as services:
        mock = services.start_mock(
            "--backends", "2", "--rate", str(TOKENS_PER_S), "--stamp", core=cores.backend
        )
        endpoint = peer.start(services, mock.ports, cores.proxy)
        assert endpoint.service is not None
        hurry(mock.pid, 1)
        half_load(services, endpoint, cores.load)
        if undisturbed:
            hurry_all(endpoint.service.pid, 1)
        hurry(os.getpid(), 2)
        for body_bytes in PROBES:
            before, at = endpoint.service.cpu_seconds(), time.monotonic()
            direct, through, failures = uvloop.run(probe(endpoint, mock.ports, body_bytes, seconds))
            share = (endpoint.service.cpu_seconds() - before) / (time.monotonic() - at)
            if not direct.first or not through.first:
                raise StartError(f"no right answer to requests of {body_bytes} bytes ({failures} failures)")
            direct_first, added_first = compare(direct.first, through.first)
            direct_later, added_later = compare(direct.later, through.later)
            results.append(
                Added(
                    peer=peer.name,
                    body_bytes=body_bytes,
                    core_busy=share,
                    samples=len(through.first),
                    failures=failures,
                    direct_first=direct_first,
                    added_first=added_first,
                    direct_later=direct_later,
                    added_later=added_later,
                )
            )
    return results


def print_report(results: Sequence[Added]) -> None:
    """Print what each proxy adds."""
    rows = [
        [
            f"{added.peer}, {added.body_bytes / 1000:.0f} KB",
            f"{added.core_busy:.2f}",
            str(added.samples),
            *(f"{value:.2f}" for value in added.direct_first.values()),
            *(f"{value:.2f}" for value in added.added_first.values()),
            *(f"{value:.2f}" for value in added.direct_later.values()),
            *(f"{value:.2f}" for value in added.added_later.values()),
        ]
        for added in results
    ]
    columns = ["proxy, request", "core", "streams", "TTFT p50", "p99", "added p50", "p99"]
    columns += ["token p50", "p99", "added p50", "p99"]
    print_table("Delay in ms: direct, and what the proxy adds", columns, rows)
    bounds = ", ".join(f"p{part * 100:.0f} {bound} ms" for part, bound in PROMISED_MS.items())
    print(f"promised for tidegate at most, added to first and later tokens: {bounds}")


def keeps_promise(results: Sequence[Added]) -> bool:
    """Whether Tidegate was measured with short requests and adds no more than promised."""
    short = [added for added in results if added.peer == "tidegate" and added.body_bytes == BODY_BYTES]
    return bool(short) and all(
        added.failures == 0 and values[f"p{part * 100:.0f}"] <= bound
        for added in short
        for values in (added.added_first, added.added_later)
        for part, bound in PROMISED_MS.items()
    )


def main() -> int:
    """The command line; returns 1 with `--check` if the promise is not kept."""
    parser = argparse.ArgumentParser(
        description="Delay added to first and later tokens at half a core's load."
    )
    parser.add_argument("--peers", default="tidegate", help=f"of {','.join(PEERS)} (default: tidegate)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of probing, for each size (default 30)")
    parser.add_argument("--undisturbed", action="store_true", help="let the proxy go before other processes")
    parser.add_argument("--check", action="store_true", help="fail unless the promised bounds are kept")
    parser.add_argument("--no-result", action="store_true", help="write no file into benchmarks/results")
    arguments = parser.parse_args()
    names = arguments.peers.split(",")
    unknown = [name for name in names if name not in PEERS or name == "direct"]
    if unknown:
        parser.error(f"no such proxy: {', '.join(unknown)}")
    raise_open_files(20_000)
    results: list[Added] = []
    errors: dict[str, str] = {}
    cores = Cores.of_machine()
    # The probes run here, beside the load and not on the proxy's core; the bar must not disturb them.
    os.sched_setaffinity(0, {cores.load})
    with Progress(refresh_per_second=1) as progress:
        task = progress.add_task("", total=len(names))
        for name in names:
            progress.update(task, description=f"{name:14}")
            try:
                results += measure(PEERS[name], arguments.seconds, cores, arguments.undisturbed)
            except (StartError, OSError) as error:
                errors[name] = str(error)
            progress.advance(task)
    print_report(results)
    for name, text in errors.items():
        print(f"\n{name}: {text}")
    if not arguments.no_result:
        result: dict[str, Any] = {
            "benchmark": "delay",
            "undisturbed": arguments.undisturbed,
            "results": [asdict(added) for added in results],
            "not_measured": errors,
        }
        print(f"written to {write_result('delay', result).name} in benchmarks/results")
    print(facts_line())
    return 1 if arguments.check and not keeps_promise(results) else 0


if __name__ == "__main__":
    sys.exit(main())
