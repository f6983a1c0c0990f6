"""Case 4.1 with real processes: `tidegate serve` before `tidegate emulate`, one of each backend, and real clients.

Emulated time runs faster than real time, as fast as so many tokens a second (`TOKENS_PER_S`) allow: an emulator is
rated for 10,000 a core, and here three of them share the machine with proxy and clients. All deadlines of the proxy
that bound what an engine does are divided by the speed. Its own work, the clients', and the pauses between its
health checks are not, and so count `speed` times: it is the harder case.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from benchmarks.case_4_1.client import run
from benchmarks.case_4_1.figures import Figures, figures_of
from benchmarks.case_4_1.report import OUTPUT_TOKENS
from benchmarks.case_4_1.sites import LOCAL, MODEL, POLICY, REMOTE, Site
from benchmarks.processes import Services, StartError, free_port

TOKENS_PER_S: Final = 6000.0
MOST_SPEED: Final = 20.0
READY_S: Final = 30.0
_HOST: Final = "127.0.0.1"
_PREEMPTIONS: Final = re.compile(r"^vllm:num_preemptions_total\{.*\} (\S+)$", re.MULTILINE)


def speed_for(users: int, report_s: float) -> float:
    """How many times faster than real time a run may be whose reports take so long."""
    return min(TOKENS_PER_S * report_s / (users * OUTPUT_TOKENS), MOST_SPEED)


def measure(
    folder: Path,
    users: int,
    count: int,
    seed: int,
    speed: float,
    tidegate: bool,
    progress: Callable[[], None] = lambda: None,
    niceness: int = 0,
) -> Figures:
    """One run. `folder`: for logs and state, must exist. Without `tidegate`, everybody asks the appliance.
    `niceness`: of the processes.

    Raises StartError and RunError.
    """
    import uvloop

    with Services(folder, niceness) as services:
        urls = _start_backends(services, (LOCAL, *REMOTE) if tidegate else (LOCAL,), speed, seed)
        url = _start_tidegate(services, urls, speed, seed) if tidegate else urls[LOCAL.name]
        seen = uvloop.run(run(url, users, count, seed, speed, progress))
        preemptions = _PREEMPTIONS.search(_get(f"{urls[LOCAL.name]}/metrics"))
    assert preemptions is not None
    return figures_of(users, seen.report_s, seen.requests, round(float(preemptions[1])))


def _start_backends(services: Services, sites: Iterable[Site], speed: float, seed: int) -> dict[str, str]:
    """-> URL by name."""
    urls = {}
    started = []
    for site in sites:
        command = [sys.executable, "-m", "proxy.cli", "emulate", "--port", "0", "--model", MODEL]
        command += ["--profile", site.profile, "--rtt", f"{site.rtt_s}", "--speed", f"{speed}"]
        command += ["--seed", f"{seed}", "--enable-prompt-tokens-details", "--shutdown-timeout", "0"]
        started.append((site, services.start(site.name, command, stdout=subprocess.PIPE)))
    for site, service in started:
        assert service.process.stdout is not None
        line = service.process.stdout.readline().decode()
        if not line:
            raise StartError(f"{site.name} did not start:\n{service.log_tail()}")
        urls[site.name] = line.split()[2]
    return urls


def configuration(urls: dict[str, str], ports: tuple[int, int], speed: float, seed: int) -> dict[str, Any]:
    """Of the proxy; its state is beside it."""

    def scaled(seconds: float) -> str:
        return f"{max(round(seconds * 1000 / speed), 1)}ms"

    return {
        "listen": f"{_HOST}:{ports[0]}",
        "admin": f"{_HOST}:{ports[1]}",
        "state": "state",
        "policy": POLICY,
        "log": "off",
        "seed": seed,
        "timeouts": {
            "first_token": scaled(120),
            "between_tokens": scaled(30),
            "answer": scaled(600),
            "total": scaled(3600),
            "drain": "0s",
        },
        "backends": [
            {"name": site.name, "url": urls[site.name], "site": site.site, "slots": site.slots}
            for site in (LOCAL, *REMOTE)
        ],
    }


def _start_tidegate(services: Services, urls: dict[str, str], speed: float, seed: int) -> str:
    """-> its URL, once it takes requests for every backend."""
    ports = (free_port(), free_port())
    path = services.folder / "tidegate.yaml"
    path.write_text(json.dumps(configuration(urls, ports, speed, seed)), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "proxy.cli", "serve", "--config", str(path)]
    service = services.start("tidegate", command)
    admin = f"http://{_HOST}:{ports[1]}"
    deadline = time.monotonic() + READY_S
    while not _all_up(admin, len(urls)):
        if service.process.poll() is not None or time.monotonic() > deadline:
            raise StartError(f"tidegate was not ready:\n{service.log_tail()}")
        time.sleep(0.1)
    return f"http://{_HOST}:{ports[0]}"


def _all_up(admin: str, backends: int) -> bool:
    try:
        state = json.loads(_get(f"{admin}/state"))
    except (URLError, OSError, ValueError):
        return False
    up = [row for row in state["backends"] if row["available"] and MODEL in row["models"]]
    return len(up) == backends


def _get(url: str) -> str:
    with build_opener(ProxyHandler({})).open(url, timeout=30) as answer:
        text: str = answer.read().decode()
    return text
