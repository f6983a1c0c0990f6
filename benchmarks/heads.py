"""How long hostile request heads of 8 to 64 KB take: whole, and byte by byte.

    python -m benchmarks.heads

Linear work shows as the same number of nanoseconds per byte from left to right.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from proxy.errors import RequestError
from proxy.http1 import HeadLimits, PartialHead, RequestGrammar

SIZES = (8192, 16384, 32768, 65536)
LINE = b"POST / HTTP/1.1\r\nHost: a\r\n"

HEADS: dict[str, tuple[bytes, bytes, bytes]] = {
    "long target": (b"GET /", b"a", b" HTTP/1.1\r\nHost: a\r\n\r\n"),
    "long name": (LINE, b"a", b":\r\n\r\n"),
    "long value": (LINE + b"A:", b" ", b"x\r\n\r\n"),
    "many fields": (LINE, b"a:\r\n", b"\r\n"),
    "names like ours": (LINE, b"content-__:\r\n", b"\r\n"),
    "long list of codings": (LINE + b"Transfer-Encoding: ", b"gzip,", b"chunked\r\n\r\n"),
    "long list of options": (LINE + b"Connection: ", b"a,", b"close\r\n\r\n"),
    "refused at its end": (LINE + b"A: ", b"b", b"\x00\r\n\r\n"),
    "never complete": (LINE + b"A: ", b"b", b""),
}
"""Beginning, what is repeated, end."""


def hostile(kind: str, size: int) -> bytes:
    """A head of about `size` bytes."""
    begin, repeated, end = HEADS[kind]
    return begin + repeated * ((size - len(begin) - len(end)) // len(repeated)) + end


def read_whole(grammar: RequestGrammar, data: bytes) -> None:
    try:
        grammar.parse(data)
    except RequestError:
        pass


def read_bytes(grammar: RequestGrammar, data: bytes) -> None:
    try:
        partial = grammar.parse(data[:1])
        assert isinstance(partial, PartialHead)
        for at in range(1, len(data)):
            if partial.add(data[at : at + 1]):
                grammar.parse(partial.whole())
    except RequestError:
        pass


def best_ns(read: Callable[[RequestGrammar, bytes], None], data: bytes, rounds: int) -> int:
    """The shortest of `rounds` runs, nanoseconds."""
    grammar = RequestGrammar(HeadLimits(2 * len(data), 2 * len(data), len(data)))
    times = []
    for _ in range(rounds):
        begin = time.perf_counter_ns()
        read(grammar, data)
        times.append(time.perf_counter_ns() - begin)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="runs of each, the shortest counts (default: 5)"
    )
    rounds = parser.parse_args().rounds
    console = Console()
    for title, read in (("whole", read_whole), ("byte by byte", read_bytes)):
        table = Table(title=f"Hostile heads, {title}: nanoseconds per byte", title_justify="left")
        table.add_column("head")
        for size in SIZES:
            table.add_column(f"{size // 1024} KB", justify="right")
        table.add_column(f"{SIZES[-1] // 1024} KB in all", justify="right")
        for kind in HEADS:
            times = [best_ns(read, hostile(kind, size), rounds) for size in SIZES]
            per_byte = [f"{ns / size:,.1f}" for ns, size in zip(times, SIZES, strict=True)]
            table.add_row(kind, *per_byte, f"{times[-1] / 1000:,.0f} µs")
        console.print(table)


if __name__ == "__main__":
    main()
