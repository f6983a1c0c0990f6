"""What the machines of a site say of themselves: DCGM's exporter for GPUs, the node exporter for the rest.

Both are pages of Prometheus text, read as strictly as an engine's (`probes/engine.py`): what makes no sense is left
out. The figures have the names of `policies.host.HOST_FIGURES` and go to every backend of the site. Unlike the
probes of backends they decide on nothing by themselves: a host that says nothing takes no backend out.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, Final

import aiohttp

from policies.state import Fleet
from probes.active import fetch
from probes.base import Clock, ProbeResult, Target, ask
from probes.engine import METRICS_LIMIT, line_pattern, number

HOST_S: Final = 5.0
"""Between two looks at a host."""
HOST_TIMEOUT_S: Final = 2.0

_DCGM: Final = line_pattern(
    b"DCGM_FI_DEV_", (b"GPU_UTIL", b"FB_USED", b"FB_FREE", b"GPU_TEMP", b"POWER_USAGE")
)
_NODE: Final = line_pattern(
    b"node_", (b"cpu_seconds_total", b"memory_MemTotal_bytes", b"memory_MemAvailable_bytes")
)
_IDLE: Final = re.compile(rb'[{,]mode="(?:idle|iowait)"')


@dataclass(frozen=True, slots=True)
class HostTarget:
    """Where the machines of one site tell of themselves; URLs without `/metrics`."""

    site: str
    dcgm: str | None = None
    node: str | None = None


@dataclass(frozen=True, slots=True)
class CpuSeconds:
    """Of all processors since the machine started."""

    idle: float
    total: float


def parse_dcgm(page: bytes) -> dict[str, float]:
    """Figures of all GPUs on a page of DCGM's exporter; those that are not on it are missing."""
    rows: dict[bytes, list[float]] = {}
    for line in _DCGM.finditer(b"\n" + page):
        if (value := number(line[3])) is not None:
            rows.setdefault(line[1], []).append(value)
    figures: dict[str, float] = {}
    if used := rows.get(b"GPU_UTIL"):
        figures["gpu_utilisation"] = min(sum(used) / len(used) / 100.0, 1.0)
    in_use, free = sum(rows.get(b"FB_USED", ())), sum(rows.get(b"FB_FREE", ()))
    if b"FB_USED" in rows and in_use + free > 0.0:
        figures["gpu_memory"] = in_use / (in_use + free)
    if hot := rows.get(b"GPU_TEMP"):
        figures["gpu_temperature"] = max(hot)
    if power := rows.get(b"POWER_USAGE"):
        figures["gpu_power"] = sum(power)
    return figures


def parse_node(page: bytes, before: CpuSeconds | None) -> tuple[dict[str, float], CpuSeconds | None]:
    """Figures on a page of the node exporter. Use of the processors is that since `before`."""
    idle = total = 0.0
    memory: dict[bytes, float] = {}
    for line in _NODE.finditer(b"\n" + page):
        value = number(line[3])
        if value is None:
            continue
        if line[1] == b"cpu_seconds_total":
            total += value
            if line[2] and _IDLE.search(line[2]):
                idle += value
        else:
            memory[line[1]] = value
    figures: dict[str, float] = {}
    seconds = CpuSeconds(idle, total) if total else None
    if seconds is not None and before is not None and total > before.total and idle >= before.idle:
        figures["cpu"] = max(1.0 - (idle - before.idle) / (total - before.total), 0.0)
    whole, free = memory.get(b"memory_MemTotal_bytes"), memory.get(b"memory_MemAvailable_bytes")
    if whole and free is not None:
        figures["memory"] = max(1.0 - free / whole, 0.0)
    return figures, seconds


class _Page:
    """`GET /metrics` of an exporter."""

    asks = "GET /metrics"

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def __call__(self, target: Target) -> bytes:
        page = await fetch(self._session, target, "/metrics", METRICS_LIMIT)
        return page + b"\n"  # it is whole, so a missing last line end cuts no number short


@dataclass(slots=True)
class _Host:
    target: HostTarget
    due: float = -inf
    at: float = -inf
    """When the figures were asked for."""
    figures: Mapping[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    """By exporter: why its last page was of no use."""
    cpu: CpuSeconds | None = None
    task: asyncio.Task[Any] | None = None


class Hosts:
    """Asks the hosts of all sites, each in its own time, and tells the backends there."""

    def __init__(self, fleet: Fleet, clock: Clock) -> None:
        self._fleet = fleet
        self._clock = clock
        self._hosts: dict[str, _Host] = {}

    def replace(self, targets: Iterable[HostTarget]) -> None:
        """Watch these from now on; one that stays the same keeps what is known."""
        before, self._hosts = self._hosts, {}
        for target in targets:
            host = before.get(target.site)
            if host is not None and host.target == target:
                del before[target.site]
            else:
                host = _Host(target)
            self._hosts[target.site] = host
        for gone in before.values():
            if gone.task is not None:
                gone.task.cancel()

    def due(self, now: float) -> list[str]:
        """Sites whose host is to be asked now."""
        return [
            site
            for site, host in self._hosts.items()
            if now >= host.due and (host.task is None or host.task.done())
        ]

    def start(self, site: str, task: asyncio.Task[Any]) -> None:
        """The task that asks it."""
        self._hosts[site].task = task

    @property
    def tasks(self) -> list[asyncio.Task[Any]]:
        return [host.task for host in self._hosts.values() if host.task is not None]

    async def ask(self, site: str, session: aiohttp.ClientSession) -> None:
        """Ask one once. What it says stands until it is stale."""
        host = self._hosts[site]
        asked = self._clock()
        host.due = asked + HOST_S
        figures: dict[str, float] = {}
        if host.target.dcgm is not None:
            self._read(host, "dcgm", await _look(host.target.dcgm, session), parse_dcgm, figures)
        if host.target.node is not None:

            def read_node(page: bytes) -> dict[str, float]:
                found, host.cpu = parse_node(page, host.cpu)
                return found

            self._read(host, "node", await _look(host.target.node, session), read_node, figures)
        if figures:
            host.figures, host.at = figures, asked
            for backend in self._fleet:
                if backend.site == site:
                    backend.host, backend.host_at = figures, asked

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """By site: its figures, their age in seconds (None: none came yet), and what is wrong."""
        now = self._clock()
        return {
            site: {
                **host.figures,
                "age_s": None if host.at == -inf else round(now - host.at, 3),
                "reasons": dict(host.reasons),
            }
            for site, host in self._hosts.items()
        }

    @staticmethod
    def _read(
        host: _Host,
        exporter: str,
        result: ProbeResult[bytes],
        parse: Callable[[bytes], dict[str, float]],
        figures: dict[str, float],
    ) -> None:
        found = {} if result.value is None else parse(result.value)
        figures.update(found)
        reason = result.reason if result.value is None else "" if found else "none of its figures on the page"
        if reason:
            host.reasons[exporter] = reason
        else:
            host.reasons.pop(exporter, None)


async def _look(url: str, session: aiohttp.ClientSession) -> ProbeResult[bytes]:
    return await ask(_Page(session), Target("host", url.removesuffix("/metrics")), HOST_TIMEOUT_S)
