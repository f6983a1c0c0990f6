"""The life of the process: start, run, reload, stop.

Start: ledger and keys are opened, the journal of the last run is replayed, backends are probed once, then the
port opens. A reload builds the whole new configuration first and swaps it in at once; if anything in it is wrong,
the old one runs on and says so. On SIGTERM or SIGINT the proxy first says that it is not ready, takes no new
connections, lets running requests end within `timeouts.drain`, ends the rest with an error, and empties the
journal.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import resource
import secrets
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import sqlalchemy as sa
import uvloop
from aiohttp import web

from policies.yamlfile import FileProblems
from probes.runner import Prober
from proxy import server
from proxy.access.keys import KeyStore
from proxy.access.limits import Limits
from proxy.access.pepper import load_pepper
from proxy.admin.http import admin_app
from proxy.build import Built, ConfigError, build, files_of, first_key, refused_without_keys, timing
from proxy.changes import changes
from proxy.config import Config, is_policy_file, load_config, override
from proxy.config_values import split_address, time_zone
from proxy.database import open_database
from proxy.exchange import OUR_SHORTAGE
from proxy.journal import Journal
from proxy.ledger import Ledger
from proxy.masking import database_shown
from proxy.observe import Observer
from proxy.pressure import Memory
from proxy.readable import in_words
from proxy.reports import spent_by_key
from proxy.requestlog import RequestLog
from proxy.runtime import Runtime
from proxy.server import ClientConnection
from proxy.watched import WatchedFiles

if TYPE_CHECKING:
    from proxy.eventlog import RecordedRuntime

log = logging.getLogger("tidegate")

SWEEP_S = 0.25
KEYS_S = 0.5
"""How often the keys are looked at: a revoked one is refused within this time."""
FLUSH_S = 1.0
"""At least so long, when the proxy stops, clients may take to read the ends of their answers."""
BACKLOG = 2048
OWN_FILES = 100
"""Open files besides those of clients and backends: journal, ledger, log, probes, admin port."""
NEXT_START = (
    *("listen", "admin", "state", "database", "log", "recent", "seed", "probing", "budget_zone"),
    *("limits.memory", "retries.ratio", "retries.per_second"),
)
"""What a reload does not change."""


@dataclass(slots=True)
class Ports:
    """Where the proxy listens, with real port numbers."""

    listen: str
    admin: str


class Service:
    """One running proxy."""

    def __init__(
        self,
        config: Config,
        path: Path | None = None,
        overrides: Mapping[str, Any] | None = None,
        *,
        forward_model: str = "",
        record: Path | None = None,
    ) -> None:
        """`path`: the configuration file, watched for changes; None: there is none.

        `overrides`: values given by flags, which hold over every reload. `record`: where to write the event log.
        """
        self.config = config
        self._started_with = config
        self.path = path
        self.overrides = dict(overrides or {})
        self.state = config.state
        self.runtime: Runtime
        self.ports: Ports
        self._forward_model = forward_model
        self._record = record
        self._server: asyncio.Server | None = None
        self._admin: web.AppRunner | None = None
        self._prober: Prober | None = None
        self._ledger: Ledger
        self._engine: sa.Engine
        self._seed = config.seed if config.seed is not None else secrets.randbits(32)
        self._watched = WatchedFiles()
        """The configuration and what it names, also if that was refused."""
        self._keys_unread = False
        """Whether the last attempt to read the keys failed."""
        self._stopping = asyncio.Event()
        self._started = time.monotonic()

    async def start(self) -> None:
        """Open everything. Raises ConfigError, OSError and the ledger's own errors with readable messages."""
        config = self.config
        loop = asyncio.get_running_loop()
        built = build(config, loop, self._seed)
        _warn(built)
        config.state.mkdir(parents=True, exist_ok=True)
        self._engine = open_database(config.database or config.state)
        pepper = load_pepper(config.state)
        keys = KeyStore(self._engine, pepper)
        refusal = refused_without_keys(config, self.path, self.overrides.get("state"))
        if keys.empty and refusal:
            raise ConfigError(refusal)
        journal = Journal(config.state / "journal")
        self._ledger = ledger = Ledger(self._engine, journal, built.prices)
        await asyncio.to_thread(ledger.start, loop, self._ledger_failed)
        limits = Limits(time.time(), self._spent, time_zone(config.budget_zone))
        new_runtime = Runtime
        if self._record is not None:
            from proxy.eventlog import RecordedRuntime as new_runtime  # noqa: N813
        observer = Observer(config.recent, RequestLog.to(config.log))
        self.runtime = runtime = new_runtime(
            built,
            loop=loop,
            journal=journal,
            ledger=ledger,
            keys=keys,
            limits=limits,
            observer=observer,
            salt=pepper[:16],
            forward_model=self._forward_model,
        )
        if self._record is not None:
            cast("RecordedRuntime", runtime).record(self._record, self._seed)
        runtime.most_clients = _most_clients(config.limits.connections)
        runtime.pressure.memory = Memory(config.limits.memory)
        self._watched.watch(self._files(config))
        if config.probing.enabled:
            await self._start_probes(built)
        await self._listen()
        runtime.tasks.spawn(self._sweep(), "sweep")
        runtime.tasks.spawn(self._watch(), "watch keys and files")
        self._write_ports()

    def _spent(self, since: float) -> Mapping[str, int]:
        """What each key has spent since a Unix time, nano-units of the ledger's currency."""
        currency = self.config.ledger_currency
        spent, others = spent_by_key(self._engine, since, currency)
        if others:
            log.warning(
                "budgets count %s only; this month there are costs in %s too", currency, ", ".join(others)
            )
        return spent

    async def _start_probes(self, built: Built) -> None:
        runtime = self.runtime
        self._prober = Prober(
            built.targets,
            runtime.fleet,
            spawn=runtime.tasks.spawn,
            clock=runtime.now,
            timing=timing(self.config),
            metrics=self.config.probing.metrics,
            changed=lambda: runtime.poll(runtime.now()),
        )
        runtime.probes = self._prober.snapshot
        await self._prober.start()

    async def _listen(self) -> None:
        runtime = self.runtime
        host, port = split_address(self.config.listen)
        try:
            self._server = await runtime.loop.create_server(
                lambda: cast("asyncio.Protocol", ClientConnection(runtime)),
                host,
                port,
                backlog=BACKLOG,
                reuse_address=True,
            )
        except OSError as error:
            raise _cannot_listen("listen", self.config.listen, error) from None
        app = admin_app(runtime, self._started)
        self._admin = web.AppRunner(app, access_log=None, handle_signals=False)
        await self._admin.setup()
        admin_host, admin_port = split_address(self.config.admin)
        site = web.TCPSite(self._admin, admin_host, admin_port)
        try:
            await site.start()
        except OSError as error:
            raise _cannot_listen("admin", self.config.admin, error) from None
        self.ports = Ports(
            _address(self._server.sockets[0]), "{}:{}".format(*_host_port(self._admin.addresses[0]))
        )

    def _write_ports(self) -> None:
        """For scripts that let the system choose: real ports, in the state directory."""
        path = self.state / "ports.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(
            json.dumps({"listen": self.ports.listen, "admin": self.ports.admin, "pid": os.getpid()})
        )
        temporary.replace(path)

    async def run(self) -> None:
        """Serve until a signal or `request_stop`, then stop."""
        await self._stopping.wait()
        await self.stop()

    def handle_signals(self) -> None:
        """SIGTERM and SIGINT stop, SIGHUP reloads; also while it still starts."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        loop.add_signal_handler(signal.SIGHUP, self._hang_up)

    def _hang_up(self) -> None:
        if hasattr(self, "ports"):
            self.reload()

    def _signalled(self) -> None:
        if self._stopping.is_set():
            log.warning("stopping at once")
            for exchange in [*self.runtime.exchanges, *self.runtime.held.values()]:
                exchange.stop()
        else:
            self._stopping.set()

    def request_stop(self) -> None:
        """Begin to stop, as a signal does."""
        self._stopping.set()

    async def stop(self) -> None:
        """Drain, end, and record everything."""
        runtime = self.runtime
        runtime.draining = True
        clients = runtime.clients
        if running := sum(client.exchange is not None for client in clients):
            log.info(
                "draining: up to %g s for what runs, %d requests", runtime.config.timeouts.drain, running
            )
        if self._server is not None:
            self._server.close()
        for client in list(runtime.clients):
            if client.idle and client.transport is not None:
                client.transport.close()
        deadline = runtime.now() + runtime.config.timeouts.drain
        await self._while(
            lambda: any(client.exchange is not None or client.receiving for client in clients), deadline
        )
        # Who waits goes first: the places of those who run would be given to them.
        rest = [client.exchange for client in clients if client.exchange is not None]
        for exchange in sorted(rest, key=lambda exchange: exchange in runtime.exchanges):
            exchange.stop()
        deadline = max(deadline, runtime.now() + FLUSH_S)
        await self._while(lambda: any(client.unsent for client in clients), deadline)
        if self._prober is not None:
            await self._prober.close()
        await runtime.tasks.cancel_all()
        for client in list(runtime.clients):
            client.abort()
        for endpoint in runtime.endpoints.values():
            endpoint.pool.close()
        if self._admin is not None:
            await self._admin.cleanup()
        runtime.pressure.close()
        await asyncio.to_thread(self._ledger.stop)
        self._engine.dispose()
        if runtime.observer.log is not None:
            runtime.observer.log.close()
        if self._record is not None:
            cast("RecordedRuntime", runtime).end_record()
        (self.state / "ports.json").unlink(missing_ok=True)

    async def _while(self, condition: Callable[[], object], deadline: float) -> None:
        """Return when the condition is false, or the time is over."""
        while condition() and self.runtime.now() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.02)

    # Reloading

    def reload(self) -> bool:
        """Read configuration and policy again and swap them in; False: they are wrong, and nothing changed."""
        runtime = self.runtime
        self._watched.read()
        try:
            config = load_config(self.path) if self.path is not None else self.config
            config = override(config, self.overrides)
            self._watched.watch(self._files(config))
            built = build(config, runtime.loop, self._seed, runtime.built)
        except (ConfigError, FileProblems, OSError, ValueError) as error:
            if _is_our_shortage(error):
                self._watched.forget()  # nothing is wrong with the files: the next look tries again
                if not runtime.observer.reload_ok:
                    return False  # said already
            runtime.observer.reloads_failed += 1
            runtime.observer.reload_ok = False
            log.error("reload refused, the old configuration goes on:\n%s", in_words(error))
            return False
        _warn(built)
        for name in NEXT_START:
            if attrgetter(name)(config) != attrgetter(name)(self._started_with):
                log.warning("a change of `%s` takes effect at the next start", name)
        old = runtime.endpoints
        self._keep_connections(old, built)
        changed = changes(runtime.built, built, NEXT_START)
        self.config = config
        for name, endpoint in old.items():
            if built.endpoints.get(name) is not endpoint:
                endpoint.pool.close()
        if built.prices.currency != runtime.prices.currency:
            log.warning(
                "budgets count %s from now on, and what was counted in it before", built.prices.currency
            )
            runtime.limits.change_currency(runtime.prices.currency, built.prices.currency)
        runtime.use(built)
        runtime.fleet.replace(built.backends)
        runtime.valve.swap(built.policy.rules, runtime.now())
        if self._prober is not None:
            self._prober.replace(built.targets)
        runtime.poll(runtime.now())
        runtime.observer.reloads_ok += 1
        runtime.observer.reload_ok = True
        log.info("reloaded: %s", "; ".join(changed) or "nothing changed")
        return True

    def _keep_connections(self, old: Mapping[str, Any], built: Built) -> None:
        """An endpoint whose section did not change keeps its pool."""
        sections = {section.name: section for section in self.runtime.config.backends}
        for section in built.config.backends:
            before = old.get(section.name)
            if sections.get(section.name) == section and before is not None:
                fresh = built.endpoints[section.name]
                if fresh.same_credentials(before):  # what stands in files may be new
                    before.pool.idle_s = fresh.pool.idle_s
                    built.endpoints[section.name] = before

    def _files(self, config: Config) -> list[Path]:
        return [*([self.path] if self.path is not None else []), *files_of(config)]

    # What goes on all the time

    async def _sweep(self) -> None:
        runtime = self.runtime
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                runtime.sweep(runtime.now())
            except Exception:
                log.exception("sweep failed")

    async def _watch(self) -> None:
        turn = 0
        while True:
            await asyncio.sleep(KEYS_S)
            turn += 1
            try:
                await self._refresh_keys()
                if turn % 2 == 0 and self._watched.changed:
                    self.reload()
            except Exception:
                # Whatever it was: revoked keys must go on being refused.
                log.exception("watching keys and files failed this time")

    async def _refresh_keys(self) -> None:
        """Read the keys if they changed. What fails (the database, descriptors, memory) is told once, and tried
        again at the next turn, also if it is the same for hours."""
        runtime = self.runtime
        keyless = runtime.keys.empty
        try:
            changed = await asyncio.to_thread(runtime.keys.refresh)
        except Exception as error:
            if not self._keys_unread:
                self._keys_unread = True
                reason = error.orig if isinstance(error, sa.exc.DBAPIError) else repr(error)
                log.error("keys cannot be read, the known ones go on and no revocation is seen: %s", reason)
            return
        if self._keys_unread:
            self._keys_unread = False
            log.warning("keys can be read again")
        if changed:
            runtime.limits.keep(runtime.keys.ids)
            if keyless and not runtime.keys.empty:
                log.info("there are keys now: every request needs one")

    def _ledger_failed(self, reason: str) -> None:
        log.error("usage cannot be recorded any more, new requests are refused: %s", reason)


def _warn(built: Built) -> None:
    """Say what is odd in a policy file; what is in the library is as it should be."""
    for warning in built.policy.warnings if is_policy_file(built.config.policy) else ():
        log.warning("policy %s:%s: %s", built.policy.name, warning.line, warning.message)


def _is_our_shortage(error: BaseException | None) -> bool:
    """Whether an error, or one that it arose from, says that this machine has no more of something."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in OUR_SHORTAGE:
            return True
        error = error.__context__
    return False


def _cannot_listen(key: str, address: str, error: OSError) -> ConfigError:
    reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or "no such host"
    return ConfigError(
        f"cannot listen on {address}: {reason.lower()}; "
        f"give another address with --{key} HOST:PORT, or `{key}` in the configuration"
    )


def _host_port(name: Any) -> tuple[str, int]:
    host, port = name[0], name[1]
    return (f"[{host}]" if ":" in host else host), port


def _address(sock: socket.socket) -> str:
    return "{}:{}".format(*_host_port(sock.getsockname()))


def serve(
    config: Config, path: Path | None, overrides: Mapping[str, Any] | None = None, record: Path | None = None
) -> None:
    """Run a proxy until it is told to stop; `record`: where to write the event log."""

    async def main() -> None:
        service = Service(config, path, overrides, record=record)
        service.handle_signals()
        await service.start()
        # What lives as long as the process is not looked at again, and what a request leaves behind holds no
        # cycles: collecting every 700 allocations cost 7 % of the CPU.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)
        _print_banner(service)
        await service.run()
        log.info("stopped")

    uvloop.run(main())


def _most_clients(wanted: int) -> int:
    """Client connections that the open files suffice for, after the limit was raised as far as it goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard == resource.RLIM_INFINITY or hard >= 2 * wanted + OWN_FILES:
        return wanted
    possible = max((hard - OWN_FILES) // 2, 8)
    log.warning(
        "%d open files are allowed: %d client connections instead of %d; raise `ulimit -Hn`",
        hard,
        possible,
        wanted,
    )
    return possible


def _print_banner(service: Service) -> None:
    runtime = service.runtime
    log.info("OpenAI API on http://%s, admin on http://%s", service.ports.listen, service.ports.admin)
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
            "up" if backend.probed_up else "down",
            backend.slots,
            ", ".join(sorted(backend.models)) or "none yet",
        )
