"""Starts the emulated backends of a load, and Tidegate in front of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple
from urllib.request import ProxyHandler, build_opener

from benchmarks.agreement_loads import SEED, FleetMember, Load, policy_text
from benchmarks.open_loop import MODEL
from benchmarks.processes import Service, Services, StartError
from sim.profile import dump_profile

START_S = 60.0
_COUNTS = re.compile(
    r"^vllm:(request_success|prefix_cache_queries|prefix_cache_hits)_total\{.*\} (\S+)$", re.MULTILINE
)


def start_emulators(services: Services, load: Load, speed: float, *aliases: str) -> list[Service]:
    """Its backends, which also answer to the `aliases` of the model; each has its port.

    Raises StartError, FileProblems and OSError.
    """
    started = [_start_emulator(services, member, speed, aliases) for member in load.backends]
    for service in started:
        assert service.process.stdout is not None
        line = service.process.stdout.readline().decode()
        if not line:
            raise StartError(f"{service.name} did not start:\n{service.log_tail()}")
        service.ports = (int(line.split()[2].rpartition(":")[2]),)
    return started


def _start_emulator(
    services: Services, member: FleetMember, speed: float, aliases: tuple[str, ...]
) -> Service:
    profile = services.folder / f"{member.name}.yaml"
    profile.write_text(dump_profile(member.load()), encoding="utf-8")
    command = [sys.executable, "-m", "proxy.cli", "emulate", "--port", "0"]
    for model in (MODEL, *aliases):
        command += ["--model", model]
    command += ["--profile", str(profile), "--rtt", str(member.rtt), "--speed", str(speed)]
    return services.start(f"emulator-{member.name}", command, stdout=subprocess.PIPE)


def start_tidegate(services: Services, load: Load, emulators: Sequence[Service]) -> tuple[Service, int]:
    """-> it and the port of its API. Raises StartError, OSError and ValueError."""
    folder = services.folder
    (folder / "policy.yaml").write_text(policy_text(load))
    config = {
        "listen": "127.0.0.1:0",
        "admin": "127.0.0.1:0",
        "state": str(folder / "state"),
        "policy": str(folder / "policy.yaml"),
        "seed": SEED,
        "probing": {"metrics": load.metrics},
        "backends": [
            {
                "name": member.name,
                "site": member.site,
                "slots": member.slots,
                "url": f"http://127.0.0.1:{emulator.ports[0]}",
            }
            for member, emulator in zip(load.backends, emulators, strict=True)
        ],
        "sites": {member.site: {} for member in load.backends if member.site != "local"},
    }
    path = folder / "tidegate.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    service = services.start("tidegate", [sys.executable, "-m", "proxy.cli", "serve", "--config", str(path)])
    ports, deadline = folder / "state" / "ports.json", time.monotonic() + START_S
    while not ports.is_file():
        if service.process.poll() is not None or time.monotonic() > deadline:
            raise StartError(f"tidegate did not start:\n{service.log_tail()}")
        time.sleep(0.05)
    return service, int(json.loads(ports.read_text())["listen"].rpartition(":")[2])


class Served(NamedTuple):
    """What backends have done."""

    requests: dict[str, int]
    """By backend."""
    cached: float
    """Share of the prompt tokens that were found in prefix caches."""


def served(load: Load, emulators: Sequence[Service]) -> Served:
    """As their metrics tell it. Raises OSError."""
    opener = build_opener(ProxyHandler({}))
    total: Counter[str] = Counter()
    requests = {}
    for member, emulator in zip(load.backends, emulators, strict=True):
        with opener.open(f"http://127.0.0.1:{emulator.ports[0]}/metrics", timeout=30) as answer:
            counts: Counter[str] = Counter()
            for name, value in _COUNTS.findall(answer.read().decode()):
                counts[name] += round(float(value))
        requests[member.name] = counts["request_success"]
        total += counts
    return Served(requests, total["prefix_cache_hits"] / max(total["prefix_cache_queries"], 1))
