"""What a token of the emulator costs: CPU time of `tidegate emulate` alone, the client's left out.

    python -m benchmarks.emulator --check
    python -m benchmarks.emulator --streams 64 --tokens-per-s 20

`--streams` clients in a closed loop, each with one kept-alive connection, ask for streams of `--tokens` tokens from
one emulated engine that gives each of them `--tokens-per-s`. CPU time is that of the emulator's process while all
streams run; tokens are those that its own metrics count. What it could serve on one core is the inverse. An
emulator that falls behind merges tokens into fewer events, which makes them cheaper: so events are counted too,
and a figure is only worth something where there is about one event a token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import cast
from urllib.request import ProxyHandler, build_opener

import uvloop
from rich.progress import track

from benchmarks.processes import Cores, Service, Services, StartError, raise_open_files
from benchmarks.summary import Spread, facts_line, print_table, write_result

PROMISED_TOKENS_PER_CORE = 10_000
"""A second, each with an event of its own: tokens that were merged into one do not count for the promise."""

WARM_UP_S = 3.0
_EVENT = b"data: {"
_DONE = b"data: [DONE]\n\n"
_GENERATED = re.compile(r"^vllm:generation_tokens_total\{.*\} (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Round:
    """One measurement."""

    tokens: float
    """That the emulator counted."""
    events: int
    """That the clients read."""
    cpu_s: float
    seconds: float

    @property
    def us_per_token(self) -> float:
        """CPU time of one token, microseconds."""
        return self.cpu_s / self.tokens * 1e6

    @property
    def tokens_per_core(self) -> float:
        """Tokens a second that one core would serve."""
        return self.tokens / self.cpu_s


def keeps_promise(rounds: Sequence[Round]) -> bool:
    """Whether one core serves as many tokens as promised; False without rounds."""
    rates = [min(one.tokens, one.events) / one.cpu_s for one in rounds]
    return bool(rates) and Spread.of(rates).median >= PROMISED_TOKENS_PER_CORE


@dataclass
class Seen:
    """What all clients together have read."""

    events: int = 0


class Client(asyncio.Protocol):
    """One connection that asks for a stream, reads it to its end, and asks again."""

    def __init__(self, asking: bytes, seen: Seen) -> None:
        self._asking = asking
        self._seen = seen
        self._tail = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._asking)

    def data_received(self, data: bytes) -> None:
        self._seen.events += data.count(_EVENT)
        self._tail = (self._tail + data)[-64:]
        if self._tail.endswith(_DONE + b"\r\n0\r\n\r\n"):
            self._tail = b""
            assert self._transport is not None
            self._transport.write(self._asking)


def request(tokens: int) -> bytes:
    """A streamed chat request for exactly so many tokens."""
    fields = {
        "model": "demo",
        "messages": [{"role": "user", "content": "When is high water at the outer sluice?"}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    body = json.dumps(fields).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: emulator\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def generated(port: int) -> float:
    """Tokens that the emulator has counted so far."""
    with build_opener(ProxyHandler({})).open(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        found = _GENERATED.search(answer.read().decode())
    assert found is not None
    return float(found[1])


def start(services: Services, streams: int, tokens_per_s: float, core: int) -> tuple[Service, int]:
    """Start an emulator whose engine serves all streams at once; returns it and its port."""
    command = [sys.executable, "-m", "proxy.cli", "emulate", "--port", "0", "--slots", str(streams)]
    command += ["--tpot", str(1 / tokens_per_s), "--ttft", str(1 / tokens_per_s)]
    service = services.start("emulator", command, core=core, stdout=subprocess.PIPE)
    assert service.process.stdout is not None
    line = service.process.stdout.readline().decode()
    if not line:
        raise StartError(f"the emulator did not start:\n{service.log_tail()}")
    return service, int(line.split()[2].rpartition(":")[2])


async def measure(service: Service, port: int, streams: int, tokens: int, seconds: float) -> Round:
    """Run streams for so long and read what the emulator used meanwhile."""
    loop = asyncio.get_running_loop()
    asking, seen = request(tokens), Seen()
    transports = []
    for _ in range(streams):
        transport, _ = await loop.create_connection(lambda: Client(asking, seen), "127.0.0.1", port)
        transports.append(transport)
        await asyncio.sleep(WARM_UP_S / streams)

    async def reading() -> Round:
        count = await asyncio.to_thread(generated, port)
        return Round(count, seen.events, service.cpu_seconds(), loop.time())

    begin = await reading()
    await asyncio.sleep(seconds)
    end = await reading()
    for transport in transports:
        transport.abort()
    return Round(*(late - early for early, late in zip(astuple(begin), astuple(end), strict=True)))


def main() -> int:
    """The command line; returns 1 if the emulator does not start, and with `--check` if a promise is not kept."""
    parser = argparse.ArgumentParser(description="CPU time of an emulated token.")
    parser.add_argument("--streams", type=int, default=200, help="open at once (default 200)")
    parser.add_argument("--tokens", type=int, default=256, help="of each answer (default 256)")
    parser.add_argument("--tokens-per-s", type=float, default=50.0, help="of each stream (default 50)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each round (default 8)")
    parser.add_argument("--rounds", type=int, default=3, help="(default 3)")
    parser.add_argument("--check", action="store_true", help="fail unless the promised rate is kept")
    parser.add_argument("--no-result", action="store_true", help="write no file into benchmarks/results")
    arguments = parser.parse_args()
    raise_open_files(arguments.streams * 2 + 1000)
    cores = Cores.of_machine()
    rounds = []
    with tempfile.TemporaryDirectory(prefix="tidegate-bench-") as folder, Services(Path(folder)) as services:
        try:
            service, port = start(services, arguments.streams, arguments.tokens_per_s, cores.proxy)
            for _ in track(range(arguments.rounds), "measuring"):
                measuring = measure(service, port, arguments.streams, arguments.tokens, arguments.seconds)
                rounds.append(uvloop.run(measuring))
        except (StartError, OSError) as error:
            print(error, file=sys.stderr)
            return 1
    figures = (
        ("tokens/s served", [one.tokens / one.seconds for one in rounds], 0),
        ("events a token", [one.events / one.tokens for one in rounds], 2),
        ("share of a core", [one.cpu_s / one.seconds for one in rounds], 2),
        ("µs CPU a token", [one.us_per_token for one in rounds], 1),
        ("tokens/s a core", [one.tokens_per_core for one in rounds], 0),
    )
    rows = [[name, Spread.of(values).text(digits)] for name, values, digits in figures]
    title = f"Emulator with {arguments.streams} streams of {arguments.tokens_per_s:g} tokens/s"
    print_table(title, ("figure", "median (quartiles)"), rows)
    kept = keeps_promise(rounds)
    verdict = "kept" if kept else "NOT KEPT"
    print(f"\npromised: {PROMISED_TOKENS_PER_CORE:,} tokens/s a core, with an event each: {verdict}")
    print(facts_line())
    if not arguments.no_result:
        result = {
            "benchmark": "emulator",
            "options": vars(arguments),
            "rounds": [asdict(one) for one in rounds],
        }
        print(f"written to {write_result('emulator', result).name} in benchmarks/results")
    return 1 if arguments.check and not kept else 0


if __name__ == "__main__":
    sys.exit(main())
