"""Kills Tidegate with SIGKILL under load, again and again, and compares its ledger with what was really delivered.

    python -m benchmarks.crash --rounds 200
    python -m benchmarks.crash --rounds 20 --database postgresql://tidegate@/crash?host=/run/postgresql

Each round: streams and plain requests run, the proxy is killed at a random moment, started again on the same state,
and its export is compared with what the clients had read and what the backends had sent. Promised:

* no token read by a client more than a second before the kill is missing from the ledger;
* no operation is in it twice, and nothing of earlier rounds changes;
* it never holds more tokens than the backends sent.

`--database` keeps the ledger there, in a database that must be empty; `--database new` in a PostgreSQL that is
started for this run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import uvloop
from rich.progress import Progress

from benchmarks.client import Connection, Heard
from benchmarks.compare import TOKENS_PER_S
from benchmarks.databases import database_of
from benchmarks.load import Plan
from benchmarks.peers import configure_tidegate, create_key, tidegate_command, wait_for_chat
from benchmarks.processes import Service, Services, StartError, ask_mock, raise_open_files
from benchmarks.summary import facts_line, quantile, write_result

ALLOWED_LOSS_S = 1.0
STREAMS = 40
STREAM_TOKENS = 150
REQUEST_CLIENTS = 4
REQUEST_TOKENS = 16
PAUSE_S = 0.05
"""Between two requests of one client that sends plain ones."""
KILL_AFTER_S = (1.2, 3.2)
SETTLE_S = 10.0
PAUSE_OF_LEDGER_S = 0.5
"""A ledger that stays the same for so long has taken in all that the journal had."""


@dataclass
class Verdict:
    """What a comparison found; every count but the first three, `recent` and `oldest_lost_s` must be 0."""

    requests: int = 0
    delivered: int = 0
    """Tokens that clients had read."""
    kept: int = 0
    """Tokens of those requests in the ledger."""
    missing: int = 0
    """Tokens read more than a second before the kill that the ledger lacks."""
    recent: int = 0
    """Tokens read in the last second that it lacks: allowed."""
    oldest_lost_s: float = 0.0
    """How long before the kill the oldest lost token had been read."""
    twice: int = 0
    """Operations with more than one row."""
    excess: int = 0
    """Tokens in the ledger that no backend sent."""
    changed: int = 0
    """Rows of earlier rounds that are gone or different."""
    details: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether every promise was kept."""
        return not (self.missing or self.twice or self.excess or self.changed)

    def add(self, other: Verdict) -> None:
        """Add the counts of another round."""
        for name in ("requests", "delivered", "kept", "missing", "recent", "twice", "excess", "changed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.oldest_lost_s = max(self.oldest_lost_s, other.oldest_lost_s)
        self.details += other.details


def judge(
    heard: Iterable[Heard], sent: Iterable[dict[str, Any]], rows: Sequence[dict[str, Any]], killed_at: float
) -> Verdict:
    """Compare what clients read with the ledger's rows and with what backends sent.

    `sent` are the entries of `/bench/sent`, `rows` those of `tidegate export`; they belong together by the id that
    Tidegate gave the request towards the backend, clients and backends by the request's seed.
    """
    verdict = Verdict()
    by_op: dict[str, list[dict[str, Any]]] = defaultdict(list)
    ops_of_seed: dict[int, set[str]] = defaultdict(set)
    for entry in sent:
        by_op[entry["request_id"]].append(entry)
        ops_of_seed[entry["seed"]].add(entry["request_id"])
    verdict.twice = sum(count - 1 for count in Counter(row["op"] for row in rows).values())
    row_of = {row["op"]: row for row in rows}
    for row in row_of.values():
        verdict.excess += _excess(row, by_op.get(row["op"], []), verdict.details)
    for request in heard:
        kept = sum(row_of[op]["completion_tokens"] for op in ops_of_seed[request.seed] if op in row_of)
        _compare_delivered(verdict, request, kept, killed_at)
    return verdict


def _excess(row: dict[str, Any], entries: Sequence[dict[str, Any]], details: list[str]) -> int:
    """Tokens of a row beyond what backends sent for it."""
    excess = 0
    for kind, in_entry in (("completion_tokens", "tokens"), ("prompt_tokens", "prompt_tokens")):
        in_row = row[kind] + row[f"overhead_{kind}"]
        were_sent = sum(entry[in_entry] for entry in entries)
        if in_row > were_sent:
            details.append(f"{row['op']}: {in_row} {kind} in the ledger, {were_sent} sent")
            excess += in_row - were_sent
    return excess


def _compare_delivered(verdict: Verdict, request: Heard, kept: int, killed_at: float) -> None:
    delivered = len(request.token_at)
    verdict.requests += 1
    verdict.delivered += delivered
    verdict.kept += kept
    lost = request.token_at[kept:]
    if not lost:
        return
    old = sum(killed_at - at > ALLOWED_LOSS_S for at in lost)
    verdict.missing += old
    verdict.recent += len(lost) - old
    verdict.oldest_lost_s = max(verdict.oldest_lost_s, killed_at - lost[0])
    if old:
        verdict.details.append(
            f"seed {request.seed}: {delivered} delivered, {kept} in the ledger, {old} too old"
        )


class Crashes:
    """One Tidegate on one state directory, killed and started again."""

    def __init__(self, services: Services, mock: Service, draw: random.Random, database: str = "") -> None:
        self._services = services
        self._mock = mock
        self._draw = draw
        self._command = tidegate_command()
        self._configuration, self._port = configure_tidegate(services.folder, mock.ports)
        if database:
            with self._configuration.open("a") as file:
                file.write(f"database: {json.dumps(database)}\n")
        self._key = create_key(self._command, self._configuration)
        self._rows: dict[str, dict[str, Any]] = {}
        self._seed = 1
        self.restarts: list[float] = []
        """Seconds from starting the process to its first answer."""

    def start(self) -> Service:
        """Start the proxy and wait until it serves."""
        began = time.monotonic()
        serve = [*self._command, "serve", "--config", str(self._configuration)]
        service = self._services.start("tidegate", serve)
        wait_for_chat(service, f"http://127.0.0.1:{self._port}", self._key)
        self.restarts.append(time.monotonic() - began)
        return service

    async def load_and_kill(self, service: Service) -> tuple[list[Heard], float]:
        """Run clients until the proxy is killed; returns what they heard and the moment of the kill."""
        heard: list[Heard] = []
        killed = asyncio.Event()
        address = (("127.0.0.1", self._port),)
        stream = Plan(address, stream=True, tokens=STREAM_TOKENS, key=self._key)
        plain = Plan(address, stream=False, tokens=REQUEST_TOKENS, key=self._key)

        async def client(plan: Plan, pause_s: float) -> None:
            connection = Connection(plan)
            await asyncio.sleep(self._draw.random() * 0.5)
            while not killed.is_set():
                self._seed += 1
                heard.append(await connection.ask(self._seed))
                await asyncio.sleep(pause_s)
            connection.close()

        clients = [client(stream, 0.0) for _ in range(STREAMS)]
        clients += [client(plain, PAUSE_S) for _ in range(REQUEST_CLIENTS)]
        running = asyncio.gather(*clients)
        await asyncio.sleep(self._draw.uniform(*KILL_AFTER_S))
        killed_at = time.monotonic()
        os.killpg(service.pid, signal.SIGKILL)
        killed.set()
        await asyncio.wait_for(running, SETTLE_S)
        self._services.kill(service)
        return heard, killed_at

    def sent(self) -> list[dict[str, Any]]:
        """What the backends sent to each request so far, once no stream is open any more."""
        deadline = time.monotonic() + SETTLE_S
        while any(state["running"] for state in ask_mock(self._mock, "/bench/state")):
            if time.monotonic() > deadline:
                raise StartError(f"streams are still open {SETTLE_S:.0f} s after the kill")
            time.sleep(0.05)
        return [entry for entries in ask_mock(self._mock, "/bench/sent") for entry in entries]

    def export(self) -> list[dict[str, Any]]:
        """The ledger's rows, as `tidegate export` writes them."""
        command = [*self._command, "export", "--format", "jsonl", "--config", str(self._configuration)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise StartError(f"tidegate export failed:\n{done.stderr[-2000:]}")
        return [json.loads(line) for line in done.stdout.splitlines()]

    def compare(self, heard: list[Heard], killed_at: float) -> Verdict:
        """Read the ledger until every request that reached a backend is in it, or it stays as it is; judge it."""
        sent = self.sent()
        waited_for = {entry["request_id"] for entry in sent if entry["tokens"]}
        rows = self.export()
        previous: list[dict[str, Any]] = []
        while rows != previous and not waited_for <= {row["op"] for row in rows}:
            time.sleep(PAUSE_OF_LEDGER_S)
            previous, rows = rows, self.export()
        verdict = judge(heard, sent, rows, killed_at)
        row_of = {row["op"]: row for row in rows}
        verdict.changed = sum(row_of.get(op) != row for op, row in self._rows.items())
        self._rows = row_of
        return verdict


def run_rounds(rounds: int, seed: int, database: str = "") -> tuple[Verdict, list[float]]:
    """Kill and compare `rounds` times; returns the sum of the verdicts and how long the restarts took."""
    total = Verdict()
    with tempfile.TemporaryDirectory(prefix="tidegate-crash-") as folder, Services(Path(folder)) as services:
        mock = services.start_mock("--backends", "2", "--rate", str(TOKENS_PER_S), "--record")
        crashes = Crashes(services, mock, random.Random(seed), database)
        with Progress() as progress:
            task = progress.add_task("kill -9", total=rounds)
            service = crashes.start()
            for _ in range(rounds):
                heard, killed_at = uvloop.run(crashes.load_and_kill(service))
                service = crashes.start()
                total.add(crashes.compare(heard, killed_at))
                found = "" if total.good else ", promises broken"
                progress.update(task, advance=1, description=f"kill -9: {total.delivered} tokens{found}")
        return total, crashes.restarts


def print_report(rounds: int, verdict: Verdict, restarts: Sequence[float]) -> None:
    """Print the figures."""
    print(f"\n{rounds} kills, {verdict.requests} requests, {verdict.delivered} tokens read by clients")
    print(f"missing, read more than {ALLOWED_LOSS_S:.0f} s before the kill: {verdict.missing}")
    print(
        f"missing, read later than that: {verdict.recent}, the oldest {verdict.oldest_lost_s:.2f} s before the kill"
    )
    print(f"operations in the ledger twice: {verdict.twice}")
    print(f"tokens in the ledger that no backend sent: {verdict.excess}")
    print(f"rows of earlier rounds that changed: {verdict.changed}")
    slowest = quantile(restarts, 1.0)
    print(f"restart until it serves: p50 {quantile(restarts, 0.5):.2f} s, slowest {slowest:.2f} s")
    for detail in verdict.details[:20]:
        print(f"  {detail}")


def main() -> int:
    """The command line; returns 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description="kill -9 under load; the ledger against what was delivered.")
    parser.add_argument("--rounds", type=int, default=200, help="kills (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="for the moments of the kills (default: drawn)")
    parser.add_argument(
        "--database", default="", metavar="URL", help="of the ledger; `new`: of a PostgreSQL started for this"
    )
    parser.add_argument("--no-result", action="store_true", help="write no file into benchmarks/results")
    arguments = parser.parse_args()
    raise_open_files(4096)
    seed = arguments.seed or random.randrange(1, 1 << 30)
    print(f"seed {seed}")
    try:
        with database_of(arguments.database) as database:
            verdict, restarts = run_rounds(arguments.rounds, seed, database)
    except StartError as error:
        print(error)
        return 2
    print_report(arguments.rounds, verdict, restarts)
    print(facts_line())
    if not arguments.no_result:
        result = {
            "benchmark": "crash",
            "rounds": arguments.rounds,
            "seed": seed,
            "database": "postgresql" if arguments.database else "sqlite",
            **asdict(verdict),
            "restart_s": {"p50": quantile(restarts, 0.5), "max": quantile(restarts, 1.0)},
        }
        print(f"written to {write_result('crash', result).name} in benchmarks/results")
    return 0 if verdict.good else 1


if __name__ == "__main__":
    sys.exit(main())
