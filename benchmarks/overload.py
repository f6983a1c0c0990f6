"""What is served, and how soon the rest is told, when more comes than can be served.

    python -m benchmarks.overload
    python -m benchmarks.overload --seconds 30 --check

`tidegate serve` stands before one `tidegate emulate`. A client in an open loop sends 1, 2, 5 and 10 times as many
requests a second as the emulator can serve, each at its time. Counted is what was due after the first `WARM_UP_S`:
complete answers whose first token came within the hold and a second (goodput), how long those waited who were
turned away, and the proxy's memory at the end of each load.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import uvloop

from benchmarks.open_loop import MODEL, play
from benchmarks.processes import Service, Services, StartError, free_port, raise_open_files
from benchmarks.summary import facts_line, print_table, quantile, write_result
from sim.workload import Arrival

TIMES = (1, 2, 5, 10)
SLOTS = 8
TTFT_S = 0.05
TPOT_S = 0.01
TOKENS = 60
PROMPT = 100
CAPACITY = SLOTS / (TTFT_S * PROMPT / 1000 + TPOT_S * TOKENS)
"""Requests a second."""
WAIT_S = 2
WARM_UP_S = 5.0
LEAST_OF_PEAK = 0.9
MOST_SHED_MS = 50.0
MOST_GROWTH = 32 * 1024 * 1024
"""Bytes that ten times the capacity may take more than once the capacity."""
POLICY = f"rules: [{{name: all, pick: least-load, queue: {{wait: {WAIT_S}s, depth: 200}}}}]\n"


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one load."""

    times: int
    offered: float
    """Requests a second."""
    goodput: float
    shed: int
    shed_p99_ms: float
    memory: int
    failures: tuple[str, ...]
    """What became of requests besides a complete answer, 429 and 503."""


def figures(times: int, seconds: float, port: int, service: Service) -> Figures:
    """Play one load."""
    rng = Random(times)
    rate = CAPACITY * times
    at = rng.expovariate(rate)
    arrivals = []
    while at < seconds:
        arrivals.append(Arrival(round(at * 1e6), PROMPT, TOKENS))
        at += rng.expovariate(rate)
    answers = uvloop.run(play(port, arrivals, lambda: None))
    memory = service.memory_bytes()
    counted = [
        answer for answer, arrival in zip(answers, arrivals, strict=True) if arrival.at >= WARM_UP_S * 1e6
    ]
    good = [a for a in counted if not a.failure and a.first_at - a.due_at <= WAIT_S + 1.0]
    shed = [a for a in counted if a.failure in ("status 429", "status 503")]
    waits = sorted((a.ended_at - a.sent_at) * 1000 for a in shed)
    others = {a.failure for a in counted} - {"", "status 429", "status 503"}
    return Figures(
        times,
        len(counted) / (seconds - WARM_UP_S),
        len(good) / (seconds - WARM_UP_S),
        len(shed),
        quantile(waits, 0.99) if waits else 0.0,
        memory,
        tuple(sorted(others)),
    )


def broken(found: Sequence[Figures]) -> list[str]:
    """Which promises were not kept."""
    peak = max(one.goodput for one in found)
    problems = []
    for one in found:
        name = f"{one.times} times the capacity"
        if one.goodput < LEAST_OF_PEAK * peak:
            problems.append(f"{name}: goodput {one.goodput:.1f}/s, {one.goodput / peak:.0%} of the peak")
        if one.shed_p99_ms > MOST_SHED_MS:
            problems.append(f"{name}: who was turned away waited {one.shed_p99_ms:.0f} ms (p99)")
        if one.memory > found[0].memory + MOST_GROWTH:
            problems.append(f"{name}: {(one.memory - found[0].memory) / 2**20:.0f} MB more memory")
        problems += [f"{name}: {failure}" for failure in one.failures]
    return problems


def measure(seconds: float) -> list[Figures]:
    """Start the processes and play every load."""
    raise_open_files(8192)
    with tempfile.TemporaryDirectory(prefix="tidegate-bench-") as name, Services(Path(name)) as services:
        folder = Path(name)
        engine, port, admin = free_port(), free_port(), free_port()
        command = [sys.executable, "-m", "proxy.cli"]
        options = {"port": engine, "model": MODEL, "slots": SLOTS, "ttft": TTFT_S, "tpot": TPOT_S}
        flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
        services.start("emulator", [*command, "emulate", *flags])
        (folder / "policy.yaml").write_text(POLICY)
        config = {
            "listen": f"127.0.0.1:{port}",
            "admin": f"127.0.0.1:{admin}",
            "state": "state",
            "policy": "./policy.yaml",
            "log": "off",
            "backends": [{"name": "a", "url": f"http://127.0.0.1:{engine}", "site": "local", "slots": SLOTS}],
        }
        (folder / "tidegate.yaml").write_text(json.dumps(config))
        proxy = services.start("tidegate", [*command, "serve", "--config", str(folder / "tidegate.yaml")])
        _wait_ready(services, admin, proxy)
        return [figures(times, seconds, port, proxy) for times in TIMES]


def _wait_ready(services: Services, admin: int, proxy: Service) -> None:
    script = (
        "import time, urllib.request as r\n"
        "for _ in range(300):\n"
        "    try:\n"
        f"        r.urlopen('http://127.0.0.1:{admin}/readyz', timeout=1); break\n"
        "    except OSError: time.sleep(0.1)\n"
        "else: raise SystemExit('not ready')\n"
    )
    try:
        services.run("ready", [sys.executable, "-c", script], timeout_s=90)
    except StartError:
        raise StartError(f"the proxy was not ready:\n{proxy.log_tail()}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load, above 6; default 20")
    parser.add_argument("--check", action="store_true", help="fail when a promise is not kept")
    parser.add_argument("--no-result", action="store_true", help="write no file into results/")
    options = parser.parse_args()
    if options.seconds <= WARM_UP_S + 1:
        parser.error("--seconds must be above 6")
    found = measure(options.seconds)
    rows = [
        [
            f"x{one.times}",
            f"{one.offered:.1f}",
            f"{one.goodput:.1f}",
            str(one.shed),
            f"{one.shed_p99_ms:.1f}",
            f"{one.memory / 2**20:.0f}",
        ]
        for one in found
    ]
    print_table(
        "Overload", ["load", "offered/s", "goodput/s", "turned away", "told after, p99 ms", "MB"], rows
    )
    print(facts_line())
    if not options.no_result:
        write_result("overload", {"loads": [asdict(one) for one in found]})
    problems = broken(found)
    for problem in problems:
        print(f"NOT KEPT: {problem}")
    if options.check and problems:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
