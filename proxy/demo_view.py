"""What `tidegate demo --traffic` shows: every backend's water level while a rush hour goes over it.

Levels, load, queue, spill and cost are what the proxy says on `GET /state`; times to first token and shares are
what the demo's own clients saw. On a terminal it is drawn in place, elsewhere it is a line every few seconds.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from proxy.demo_traffic import Served, Traffic
from proxy.levels import bar, called, condition, levels

WINDOW_S = 10.0
"""Live percentiles and rates look back so far."""

_LEVELS = "▁▂▃▄▅▆▇█"
_LEAST_BAR_CELLS, _MOST_BAR_CELLS = 6, 24


def percentile(values: Iterable[float], share: float) -> float | None:
    """Nearest-rank percentile; None of nothing."""
    ordered = sorted(values)
    return ordered[max(0, ceil(share * len(ordered)) - 1)] if ordered else None


def sparkline(shares: Sequence[float], cells: int) -> str:
    """Shares from 0 to 1 as a line of blocks; more shares than cells are averaged."""
    if not shares:
        return ""
    groups = min(cells, len(shares))
    edges = [position * len(shares) // groups for position in range(groups + 1)]
    means = [sum(shares[low:high]) / (high - low) for low, high in pairwise(edges)]
    return "".join(_LEVELS[min(len(_LEVELS) - 1, int(mean * len(_LEVELS)))] for mean in means)


def _median_and_tail(seconds: Sequence[float]) -> str:
    shown = (percentile(seconds, share) for share in (0.5, 0.95))
    return "/".join("-" if value is None else f"{value:.2f}" for value in shown)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"


@dataclass(slots=True)
class View:
    """Collects samples of the proxy's state beside a running `Traffic`."""

    traffic: Traffic
    currency: str
    state: Mapping[str, Any] = field(default_factory=dict)
    spilled: list[float] = field(default_factory=list)
    """Of the requests in flight at each sample, the share at remote sites."""
    _tokens: deque[tuple[float, dict[str, int]]] = field(default_factory=deque)
    """(time, completion tokens by backend), as far back as the window."""

    def sample(self, state: Mapping[str, Any]) -> None:
        """Take in what `GET /state` said just now."""
        self.state = state
        now = self.traffic.now_s()
        self._tokens.append((now, {row["name"]: row["completion_tokens"] for row in self._backends()}))
        while len(self._tokens) > 1 and self._tokens[0][0] < now - WINDOW_S:
            self._tokens.popleft()
        load = sum(row["in_flight"] for row in self._backends())
        remote = sum(row["in_flight"] for row in self._backends() if row["site"] != "local")
        self.spilled.append(remote / load if load else 0.0)

    def table(self, width: int = 80) -> RenderableType:
        """The live view, for a terminal of so many columns; 80 are enough."""
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("backend", no_wrap=True)
        table.add_column("water level", no_wrap=True)
        for name in ("load", "queue", "share"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("state", no_wrap=True)
        for name in ("TTFT 50/95%", "tok/s", self.currency):
            table.add_column(name, justify="right", no_wrap=True)
        shares = self._shares()
        cells = max(_LEAST_BAR_CELLS, min(_MOST_BAR_CELLS, width - 80 + _LEAST_BAR_CELLS))
        for row in self._backends():
            table.add_row(
                called(row),
                bar(row["saturation"], cells),
                f"{row['in_flight']}/{row['slots']}",
                str(row["waiting"]),
                _percent(shares[row["name"]], shares.total()),
                condition(row),
                _median_and_tail(self._ttfts(row["name"], self.traffic.now_s() - WINDOW_S)),
                f"{self._rate(row['name']):.0f}",
                f"{float(row['cost']):.4f}",
            )
        queue = self.state.get("queue", {"waiting": 0, "oldest_s": 0.0})
        last = self.traffic.arrivals[-1].at_s if self.traffic.arrivals else 0.0
        return Group(
            table,
            Text(
                f"spill {self._spill()}, {queue['waiting']} held, the oldest for {queue['oldest_s'] or 0.0:.1f} s"
            ),
            Text(f"spilled {sparkline(self.spilled, width - 8)}"),
            Text(f"{self._counts()}; {min(self.traffic.now_s(), last):.0f} of {last:.0f} s"),
        )

    def line(self) -> str:
        """The same in one line, for a log."""
        shown = levels(self._backends())
        return f"{self.traffic.now_s():5.1f} s  {shown}  spill {self._spill()}  {self._counts()}"

    def summary(self) -> str:
        """How it went, once all is done."""
        served = self.traffic.served
        total = len(served)
        shares = self._shares()
        sites = {row["name"]: row["site"] for row in self._backends()}
        local = sum(count for name, count in shares.items() if sites.get(name) == "local")
        remote = {name: count for name, count in shares.items() if sites.get(name, "local") != "local"}
        spilled = sum(remote.values())
        where = ", ".join(f"{name} {_percent(count, total)}" for name, count in sorted(remote.items()))
        turned_away = sum(record.turned_away for record in served)
        failed = sum(record.failed for record in served)
        first = f"of {total} requests {_percent(local, total)} local, {_percent(spilled, total)} spilled"
        if where:
            first += f" ({where})"
        times = [f"{name} {_median_and_tail(self._ttfts(name))}" for name in sites]
        cost = sum(float(row["cost"]) for row in self._backends())
        openings = sum(entry["openings"] for entry in self.state.get("spill", ()))
        tokens = self.state.get("tokens", {}).get("completion", 0)
        return "\n".join(
            [
                f"{first}, {turned_away} turned away, {failed} failed",
                f"TTFT p50/p95 s: {', '.join(times)}",
                f"{tokens} tokens for {cost:.4f} {self.currency}; spill opened {openings} times",
            ]
        )

    def _backends(self) -> Sequence[Mapping[str, Any]]:
        rows: Sequence[Mapping[str, Any]] = self.state.get("backends", ())
        return rows

    def _shares(self) -> Counter[str]:
        return Counter(record.backend for record in self.traffic.served if record.complete)

    def _ttfts(self, backend: str, since_s: float = 0.0) -> list[float]:
        return [
            record.ttft_s
            for record in self.traffic.served
            if record.backend == backend
            and record.ttft_s is not None
            and record.at_s + record.ttft_s >= since_s
        ]

    def _rate(self, backend: str) -> float:
        """Tokens a second over the window."""
        (begin, before), (end, after) = self._tokens[0], self._tokens[-1]
        return (after.get(backend, 0) - before.get(backend, 0)) / (end - begin) if end > begin else 0.0

    def _spill(self) -> str:
        return "OPEN" if any(entry["open"] for entry in self.state.get("spill", ())) else "closed"

    def _counts(self) -> str:
        served: list[Served] = self.traffic.served
        done = sum(record.done for record in served)
        turned_away = sum(record.turned_away for record in served)
        failed = sum(record.failed for record in served)
        return f"{len(served)} sent, {done} done, {turned_away} turned away, {failed} failed"
