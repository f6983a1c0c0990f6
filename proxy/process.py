"""A proxy as a process: the loop it runs on, what it says at the start, what a service manager hears."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import uvloop

from proxy import server
from proxy.build import first_key
from proxy.config import Config
from proxy.disk_room import told_if_full
from proxy.masking import database_shown
from proxy.notify import READY, notify
from proxy.serve import Service
from proxy.successor import own_stderr, successor_command
from proxy.watched import WatchedFiles

log = logging.getLogger("tidegate")


def serve(
    config: Config,
    path: Path | None,
    overrides: Mapping[str, Any] | None = None,
    record: Path | None = None,
    *,
    take_over: bool = False,
    watched: WatchedFiles | None = None,
) -> None:
    """Run a proxy until it is told to stop; `record`: where to write the event log, the rest as of `Service`."""

    async def main() -> None:
        service = Service(
            config,
            path,
            overrides,
            record=record,
            take_over=take_over,
            command=successor_command(),
            watched=watched,
        )
        service.handle_signals()
        with told_if_full(config.state):
            await service.start()
        own_stderr()
        notify(READY)
        # What lives as long as the process is not looked at again, and what a request leaves behind holds no
        # cycles: collecting every 700 allocations cost 7 % of the CPU.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)
        print_banner(service)
        await service.run()
        log.info("stopped")

    uvloop.run(main())


def print_banner(service: Service) -> None:
    runtime = service.runtime
    scheme = "https" if service.config.tls else "http"
    admin = service.ports.admin_url if service.ports.admin_tls else f"http://{service.ports.admin}"
    log.info("OpenAI API on %s://%s, admin on %s", scheme, service.ports.listen, admin)
    place = database_shown(service.config.database or service.config.state)
    log.info("policy %s, ledger in %s", runtime.built.policy.name, place)
    if not (server.__file__ or "").endswith(".py"):
        log.info("the data path is compiled")
    if runtime.keys.empty:
        command = first_key(service.path, service.overrides.get("state"))
        log.info("no keys: everybody on this machine may use it; `%s` makes the first", command)
    for backend in runtime.fleet:
        log.info(
            "backend %s (%s) %s: %s, %d slots, models %s",
            backend.name,
            backend.site,
            runtime.endpoints[backend.name].url,
            "standby" if backend.asleep else "up" if backend.probed_up else "down",
            backend.slots,
            ", ".join(sorted(backend.models)) or "none yet",
        )
