"""Half an hour of everything at once: does anything grow, break or get lost?

    python -m benchmarks.soak --check
    python -m benchmarks.soak --minutes 3

`tidegate serve` as a process before four emulated backends, three for chats and one for vectors. Clients stream,
ask for whole answers, embeddings, responses and messages, leave in the middle, read slowly, meet limits and ask
nonsense (`soak_clients.py`). Meanwhile backends have faults, drawn by chance and ordered at the emulators; the
configuration is changed and read again; half way `tidegate upgrade` replaces the process. Promised
(`soak_verdict.py`):

* each answer is whole, or says that it is not: an error, or an error event at the end of a stream;
* no connection is refused, no stream is cut but by a fault of its backend;
* every request has one row with what its client was told, and no backend generated less than the ledger has;
* memory is flat after the first third of each process; files, threads, tasks and connections are back to what they
  were before the load.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import uvloop
from rich.progress import Progress

from benchmarks import soak_clients
from benchmarks.peers import create_key, tidegate_command
from benchmarks.processes import Service, Services, StartError, free_port, raise_open_files
from benchmarks.soak_clients import MODEL, POOLING_MODEL
from benchmarks.soak_verdict import Asked, Books, Growth, Held, broken, check_books
from benchmarks.summary import facts_line, print_table, write_result
from proxy.tasks import Tasks

MINUTES = 30.0
READY_S = 60.0
SETTLE_S = 40.0
"""In which everything must be back to what it was."""
READINGS = 10
"""Of what a process holds while idle, half a second apart: the least counts, since probes come and go."""
RELOAD_EVERY_S = 20.0
FAULT_EVERY_S = (1.0, 5.0)
FAULT_S = (1.0, 5.0)
CHATTERS = ("home", "east", "west")
MORTAL = "west"
"""It dies now and then, and then has forgotten what it had counted."""
FAULTS: tuple[dict[str, Any], ...] = (
    {"kind": "error", "share": 0.5},
    {"kind": "error", "share": 0.5, "status": 503, "retry_after": 1},
    {"kind": "error", "share": 0.5, "status": 429, "retry_after": 1},
    {"kind": "garbage", "share": 0.3},
    {"kind": "cut", "share": 0.5},
    {"kind": "stall", "share": 0.3},
    {"kind": "error_event", "share": 0.5},
    {"kind": "slow", "factor": 5.0},
    {"kind": "unhealthy"},
)
POLICY = (
    'rules: [{name: all, prefer: [{site: local}, {site: "*"}], pick: least-load, '
    "queue: {wait: 5s, depth: 50}}]\n"
)
_METRIC = r"^%s(?:\{[^}]*\})? (\S+)$"
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def ask(url: str, document: dict[str, Any] | None = None) -> str:
    """GET, or POST of a document. Raises OSError, also for an error status."""
    data = None if document is None else json.dumps(document).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with _opener.open(request, timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def metric(page: str, name: str) -> float:
    """The sum of a metric over its labels."""
    return sum(map(float, re.findall(_METRIC % re.escape(name), page, re.M)))


@dataclass
class Soaked:
    """What one run saw."""

    asked: list[Asked] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    reloads: int = 0
    memory: list[list[tuple[float, float]]] = field(default_factory=lambda: [[]])
    """Readings (seconds, MB) of each process."""
    base: Held = field(default_factory=lambda: Held(0, 0, 0))
    end: Held = field(default_factory=lambda: Held(0, 0, 0))
    rows: list[dict[str, Any]] = field(default_factory=list)
    generated: dict[str, tuple[float, float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """Besides what the verdict finds."""


class Soak:
    """The processes of one run, and what is done to them."""

    def __init__(self, services: Services, seconds: float, seed: int) -> None:
        self._services = services
        self._folder = services.folder
        self._seconds = seconds
        self._rng = Random(seed)
        self._seed = seed
        self._command = tidegate_command()
        self._config = self._folder / "tidegate.yaml"
        self._state = self._folder / "state"
        self._port, self._admin = free_port(), f"127.0.0.1:{free_port()}"
        self._urls: dict[str, str] = {}
        self._serving = 0
        self.seen = Soaked()

    # The processes

    def start(self) -> tuple[str, str]:
        """Start everything. -> the keys of clients, one without limits and one with."""
        started = {}
        for name in (*CHATTERS, "vectors"):
            kind = (
                ["--model", MODEL] if name in CHATTERS else ["--model", POOLING_MODEL, "--runner", "pooling"]
            )
            options = ["--port", "0", "--slots", "16", "--ttft", "0.1", "--tpot", "0.02", "--control"]
            command = [sys.executable, "-m", "proxy.cli", "emulate", *options, *kind]
            command += ["--seed", str(self._seed + len(started)), "--shutdown-timeout", "0"]
            started[name] = self._services.start(name, command, stdout=subprocess.PIPE)
        for name, service in started.items():
            self._urls[name] = _url_of(service)
        (self._folder / "policy.yaml").write_text(POLICY)
        self._write_config(slots=16)
        limits = ("--rpm", "100", "--tpm", "20000", "--concurrency", "2")
        keys = (
            create_key(self._command, self._config),
            create_key(self._command, self._config, *limits, tenant="limited"),
        )
        serve = [*self._command, "serve", "--config", str(self._config)]
        self._first = self._services.start("tidegate", serve)
        self._wait_ready(self._first)
        return keys

    def _write_config(self, slots: int) -> None:
        backends = [
            {
                "name": name,
                "url": url,
                "site": "local" if name in ("home", "vectors") else name,
                "slots": slots,
                "price": {"input": "1", "output": "2", "currency": "EUR"},
            }
            for name, url in self._urls.items()
        ]
        config = {
            "listen": f"127.0.0.1:{self._port}",
            "admin": self._admin,
            "state": str(self._state),
            "policy": "./policy.yaml",
            "backends": backends,
            "sites": {"east": {}, "west": {}},
            "timeouts": {
                "first_token": "4s",
                "between_tokens": "3s",
                "answer": "15s",
                "total": "60s",
                "client_write": "20s",
                "drain": "60s",
            },
            "health": {"slow_start": "2s"},
            "hedging": {"after": "1s"},
        }
        temporary = self._config.with_suffix(".new")
        temporary.write_text(json.dumps(config))  # JSON is YAML
        temporary.replace(self._config)  # whoever reads it reads it whole

    def _wait_ready(self, service: Service) -> None:
        """Until every backend is up and has said what it serves. Raises StartError."""
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline and service.process.poll() is None:
            with contextlib.suppress(OSError, ValueError):
                state = json.loads(ask(f"http://{self._admin}/state"))
                if all(row["available"] and row["models"] for row in state["backends"]):
                    self._serving = self._pid()
                    return
            time.sleep(0.1)
        raise StartError(f"tidegate was not ready:\n{service.log_tail()}")

    def _pid(self) -> int:
        return int(json.loads((self._state / "ports.json").read_text())["pid"])

    def stop(self) -> None:
        """End the process that serves, which may be one that nobody else knows of."""
        if self._serving:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._serving, signal.SIGTERM)
                deadline = time.monotonic() + READY_S
                while time.monotonic() < deadline and resident_mb(self._serving):
                    time.sleep(0.1)
                os.kill(self._serving, signal.SIGKILL)

    # What is done

    async def run(self, keys: tuple[str, str], progress: Callable[[float], None]) -> None:
        """The whole of it."""
        seen, tasks = self.seen, Tasks()
        await soak_clients.each_once(self._port, keys, seen.asked)
        seen.base = await self._settled(None)
        stop = asyncio.Event()
        began = time.monotonic()
        clients = tasks.spawn(soak_clients.run(self._port, keys, self._seed, seen.asked, stop), "clients")
        others = [
            tasks.spawn(self._disturb(), "faults"),
            tasks.spawn(self._reload(), "reloads"),
            tasks.spawn(self._watch(), "memory"),
        ]
        upgraded = False
        try:
            while (now := time.monotonic() - began) < self._seconds:
                if failed := next((task for task in (clients, *others) if task.done()), None):
                    failed.result()
                    raise StartError(f"{failed.get_name()} ended early")
                if not upgraded and now > self._seconds / 2:
                    upgraded = True
                    await self._upgrade()
                progress(now)
                await asyncio.sleep(0.5)
        finally:
            stop.set()
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await self._end_faults()
            await asyncio.wait([clients])
        clients.result()
        seen.end = await self._settled(seen.base)
        await asyncio.to_thread(self._close_books)
        progress(self._seconds)

    async def _disturb(self) -> None:
        """One fault after the other, some at the same time."""
        while True:
            await asyncio.sleep(self._rng.uniform(*FAULT_EVERY_S))
            name = self._rng.choice(list(self._urls))
            kinds = [*FAULTS, *([{"kind": "die"}] if name == MORTAL else [])]
            fault = self._rng.choice(kinds) | {"seconds": round(self._rng.uniform(*FAULT_S), 1)}
            with contextlib.suppress(OSError):  # who is dead takes no orders
                await asyncio.to_thread(ask, f"{self._urls[name]}/emulator/fault", fault)
                self.seen.faults[fault["kind"]] += 1

    async def _end_faults(self) -> None:
        await asyncio.sleep(FAULT_S[1])  # that of the dead one ends by itself
        for url in self._urls.values():
            request = urllib.request.Request(f"{url}/emulator/fault", method="DELETE")
            await asyncio.to_thread(lambda asking=request: _opener.open(asking, timeout=10).close())

    async def _reload(self) -> None:
        while True:
            await asyncio.sleep(RELOAD_EVERY_S)
            self._write_config(slots=self._rng.choice((8, 12, 16)))
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid(), signal.SIGHUP)
            self.seen.reloads += 1

    async def _watch(self) -> None:
        began = time.monotonic()
        while True:
            with contextlib.suppress(OSError):
                reading = time.monotonic() - began, resident_mb(self._serving)
                self.seen.memory[-1].append(reading)
            await asyncio.sleep(1.0)

    async def _upgrade(self) -> None:
        command = [*self._command, "upgrade", "--state", str(self._state)]
        done = await asyncio.to_thread(
            subprocess.run, command, capture_output=True, text=True, check=False, timeout=120
        )
        if done.returncode:
            raise StartError(f"the upgrade failed: {done.stderr}")
        self.seen.memory.append([])
        self._serving = self._pid()

    # What is left of it

    async def _settled(self, base: Held | None) -> Held:
        """What the process holds when nothing runs; `base`: wait until it is no more than that, if it ever is."""
        deadline = time.monotonic() + SETTLE_S
        while True:
            readings = []
            for _ in range(READINGS):
                await asyncio.sleep(0.5)
                readings.append(await asyncio.to_thread(self._held))
            least = Held(*(min(getattr(one, name) for one in readings) for name in Held.__slots__))
            idle = not (least.connections or least.exchanges or least.queued)
            if (idle and (base is None or not least.beyond(base))) or time.monotonic() > deadline:
                return least

    def _held(self) -> Held:
        page = ask(f"http://{self._admin}/metrics")
        process = Path(f"/proc/{self._serving}")
        return Held(
            files=len(os.listdir(process / "fd")),
            threads=len(os.listdir(process / "task")),
            tasks=round(metric(page, "tidegate_tasks")),
            connections=round(metric(page, "tidegate_client_connections")),
            exchanges=round(metric(page, "tidegate_open_exchanges")),
            queued=round(metric(page, "tidegate_queued")),
        )

    def _close_books(self) -> None:
        """Read what the ledger and the backends have counted."""
        seen = self.seen
        try:
            self._first.process.wait(SETTLE_S)  # it puts what it still ended into the ledger
        except subprocess.TimeoutExpired:
            seen.problems.append("the process that was replaced does not end")
        page = ask(f"http://{self._admin}/metrics")
        for name, good in (("config_last_reload_successful", 1), ("journal_failed", 0)):
            if metric(page, f"tidegate_{name}") != good:
                seen.problems.append(f"tidegate_{name} is not {good}")
        deadline = time.monotonic() + READY_S
        while metric(ask(f"http://{self._admin}/metrics"), "tidegate_ledger_lag_rows"):
            if time.monotonic() > deadline:
                seen.problems.append("rows are not in the ledger")
                break
            time.sleep(0.2)
        seen.rows = [json.loads(line) for line in self._run("export", "--format", "jsonl").splitlines()]
        for name in (*CHATTERS, "vectors"):
            if name != MORTAL:
                page = ask(f"{self._urls[name]}/metrics")
                seen.generated[name] = (
                    metric(page, "vllm:prompt_tokens_total"),
                    metric(page, "vllm:generation_tokens_total"),
                )
        summed = json.loads(self._run("usage", "--by", "tenant", "--json"))
        for kind in ("prompt_tokens", "completion_tokens"):
            sums = sum(line[kind] for line in summed), sum(row[kind] for row in seen.rows)
            if sums[0] != sums[1]:
                seen.problems.append(f"usage sums {sums[0]} {kind}, the rows have {sums[1]}")

    def _run(self, *arguments: str) -> str:
        command = [*self._command, *arguments, "--config", str(self._config)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        if done.returncode:
            raise StartError(f"tidegate {arguments[0]} failed:\n{done.stderr[-2000:]}")
        return done.stdout


def _url_of(service: Service) -> str:
    assert service.process.stdout is not None
    line = service.process.stdout.readline().decode()
    if not line:
        raise StartError(f"{service.name} did not start:\n{service.log_tail()}")
    return line.split()[2]


def resident_mb(pid: int) -> float:
    """Resident memory of a process. Raises ProcessLookupError: it is gone, or nobody has looked at how it ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
    found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.M)
    if found is None:
        raise ProcessLookupError(pid)
    return int(found[1]) * 1024 / 1e6


def soak(minutes: float, seed: int) -> Soaked:
    """One run. Raises StartError."""
    raise_open_files(4096)
    with tempfile.TemporaryDirectory(prefix="tidegate-soak-") as name, Services(Path(name)) as services:
        run = Soak(services, minutes * 60, seed)
        try:
            keys = run.start()
            with Progress() as progress:
                task = progress.add_task("soak", total=minutes * 60)

                def done(seconds: float) -> None:
                    text = f"soak: {len(run.seen.asked)} requests, {run.seen.faults.total()} faults"
                    progress.update(task, completed=seconds, description=text)

                uvloop.run(run.run(keys, done))
        finally:
            run.stop()
    return run.seen


def print_report(seen: Soaked, books: Books, growths: Sequence[Growth]) -> None:
    """Print the figures."""
    kinds = dict.fromkeys(one.kind for one in seen.asked)
    rows = []
    for kind in kinds:
        those = [one for one in seen.asked if one.kind == kind]
        whole = [one for one in those if one.complete and not one.cut]
        rows.append(
            [
                kind,
                str(len(those)),
                str(sum(one.status == 200 for one in whole)),
                str(sum(one.status in (400, 401, 404, 429) for one in whole)),
                str(sum(one.status >= 500 for one in whole)),
                str(sum(one.cut for one in those)),
                str(sum(one.left for one in those)),
                str(sum(bool(one.failure) for one in those)),
            ]
        )
    columns = ("clients", "requests", "answered", "refused", "failed", "cut", "left", "broken")
    print_table("Requests", columns, rows)
    rows = [
        [
            str(number),
            f"{one.seconds:.0f}",
            f"{one.first_mb:.1f}",
            f"{one.last_mb:.1f}",
            f"{one.mb_per_10_min:+.2f}",
        ]
        for number, one in enumerate(growths, 1)
    ]
    print_table("Memory", ("process", "seconds", "MB first", "MB last", "MB in 10 min"), rows)
    base, end = asdict(seen.base), asdict(seen.end)
    print_table(
        "Held while idle", ("what", "before", "after"), [[k, str(base[k]), str(end[k])] for k in base]
    )
    faults = ", ".join(f"{count} {kind}" for kind, count in seen.faults.most_common())
    print(f"faults: {faults}; {seen.reloads} reloads, 1 upgrade")
    print(
        f"ledger: {books.rows} rows; {books.missing} missing, {books.twice} twice, {books.unknown} unknown, "
        f"{books.wrong} wrong, {books.excess} tokens that no backend generated"
    )


def main() -> int:
    """The command line; returns 1 with `--check` if a promise is not kept."""
    parser = argparse.ArgumentParser(
        description="Mixed load, faults, reloads and an upgrade, for a long time."
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"default {MINUTES:.0f}")
    parser.add_argument("--seed", type=int, default=0, help="for faults and clients (default: drawn)")
    parser.add_argument("--check", action="store_true", help="fail unless the promises are kept")
    parser.add_argument("--no-result", action="store_true", help="write no file into benchmarks/results")
    options = parser.parse_args()
    if options.minutes < 0.5:
        parser.error("--minutes must be at least 0.5")
    seed = options.seed or Random().randrange(1, 1 << 30)
    print(f"seed {seed}")
    try:
        seen = soak(options.minutes, seed)
    except StartError as error:
        print(error)
        return 2
    books = check_books(seen.asked, seen.rows, seen.generated)
    growths = [Growth.of(readings) for readings in seen.memory]
    print_report(seen, books, growths)
    problems = [*broken(seen.asked, books, growths, seen.base, seen.end), *seen.problems]
    for problem in problems:
        print(f"NOT KEPT: {problem}")
    print(facts_line())
    if not options.no_result:
        result = {
            "benchmark": "soak",
            "minutes": options.minutes,
            "seed": seed,
            "requests": Counter(one.kind for one in seen.asked),
            "faults": seen.faults,
            "reloads": seen.reloads,
            "ledger": asdict(books),
            "memory": [asdict(one) for one in growths],
            "before": asdict(seen.base),
            "after": asdict(seen.end),
            "not_kept": problems,
        }
        print(f"written to {write_result('soak', result).name} in benchmarks/results")
    return 1 if options.check and problems else 0


if __name__ == "__main__":
    sys.exit(main())
