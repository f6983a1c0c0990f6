"""The life of the process: start, run, reload, stop.

Start: ledger and keys are opened, the journal of the last run is replayed, backends are probed once, then the
port opens. A reload builds the whole new configuration first and swaps it in at once; if anything in it is wrong,
the old one runs on and says so. On SIGTERM or SIGINT the proxy first says that it is not ready, takes no new
connections, lets running requests end within `timeouts.drain`, ends the rest with an error, and empties the
journal. It ends in the same way when another process has taken over from it (`upgrade.py`).
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import secrets
import signal
import time
from collections.abc import Callable, Mapping
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import sqlalchemy as sa
from aiohttp import web

from policies.yamlfile import FileProblems
from probes.resolver import Resolver
from probes.runner import Prober
from proxy import listeners
from proxy.access.key_watch import watch_keys
from proxy.access.keys import KeyStore
from proxy.access.pepper import load_pepper
from proxy.access.shared import limits_of_this_month, shared_budgets
from proxy.admin.http import admin_app
from proxy.admin.platform import platform_routes
from proxy.ask import PORTS_FILE
from proxy.build import Built, ConfigError, build, files_of, refused_without_keys, warn_of
from proxy.certificates import ServerCertificates, fingerprints
from proxy.changes import changes
from proxy.config import Config, load_config, override
from proxy.config_values import is_metadata, time_zone
from proxy.ledger import Ledger
from proxy.ledger_note import note_database
from proxy.listeners import Listeners, Listening, Ports, by_loop
from proxy.notify import READY, STOPPING, notify, reloading
from proxy.observe import Observer
from proxy.open_files import Reserve, most_clients, watch_open_files
from proxy.pressure import Memory
from proxy.probing import new_prober
from proxy.proxied_server import accepting
from proxy.readable import in_words
from proxy.reload import NEXT_START, keep_connections, owed, swap
from proxy.requestlog import RequestLog
from proxy.responses import StoredResponses
from proxy.runtime import Runtime
from proxy.scaling.overlay import judges
from proxy.scaling.planning import Planning
from proxy.scaling.platform import Platform
from proxy.scaling.service import Standbys
from proxy.scaling.spending import TokenSpending
from proxy.state_lock import adopt_when_left, lock_state, open_journal, other_journals
from proxy.stopping import let_end
from proxy.upgrade import SOCKET_FILE, Predecessor, UpgradeSocket
from proxy.upkeep import look_up, sweep
from proxy.upstream import is_our_shortage
from proxy.waiting import opened_in_time
from proxy.watched import WatchedFiles

if TYPE_CHECKING:
    from proxy.eventlog import RecordedRuntime

log = logging.getLogger("tidegate")

FILES_S = 1.0
"""How often files are looked at."""
IDLE_GRACE_S = 5.0
"""After a hand-over, how long an idle connection stays for a request that may be on its way."""


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
        take_over: bool = False,
        command: list[str] | None = None,
        watched: WatchedFiles | None = None,
    ) -> None:
        """`path`: the configuration file, watched for changes; None: there is none. `watched`: it as it was before
        it was read.

        `overrides`: values given by flags, which hold over every reload. `record`: where to write the event log.
        `take_over`: from the process that serves on the state directory, if there is one. `command`: what starts
        a process that takes over from this one.
        """
        self.config = config
        """What is served, placements of the scheduling platform included."""
        self._configured = config
        """The same as the file has it."""
        self._started_with = config
        self.path = path
        self.overrides = dict(overrides or {})
        self.state = config.state
        self.runtime: Runtime
        self.ports: Ports
        self._forward_model = forward_model
        self._record = record
        self.command = command or []
        self._take_over = take_over
        self._lock = -1
        self._upgrades: UpgradeSocket
        self._handed_over = False
        self._drain_until = inf
        self._listening = Listening()
        self._certificates: ServerCertificates | None = None
        """None: clients speak plain HTTP, as long as the process lives."""
        self._admin: web.AppRunner | None = None
        self._prober: Prober | None = None
        self._standbys: Standbys
        self._ledger: Ledger
        self._engine: sa.Engine
        self._seed = config.seed if config.seed is not None else secrets.randbits(32)
        self._watched = watched or WatchedFiles()
        """The configuration and what it names, also if that was refused."""
        self._resolver = Resolver(allowed=lambda address: not is_metadata(address), changed=self._moved)
        self.platform = Platform(self, self._resolver, config.state)
        self._stopping = asyncio.Event()
        self._started = time.monotonic()

    async def start(self) -> None:
        """Open everything. Raises ConfigError, OSError and the ledger's own errors with readable messages."""
        config = self.config
        loop = asyncio.get_running_loop()
        self._watched.watch(self._files(config))
        built = self._built(config)
        warn_of(built)
        config.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        predecessor = await asyncio.to_thread(Predecessor.of, config.state) if self._take_over else None
        if predecessor is None:
            given = listeners.from_systemd(os.environ)
        else:
            self._lock, given = predecessor.lock, predecessor.sockets(config)
        self._engine = await opened_in_time(config.database or config.state, self._stopping)
        pepper = load_pepper(config.state)
        keys = KeyStore(self._engine, pepper)
        for address in [*map(listeners.host_port, given.get("listen", ())), config.listen]:
            refusal = refused_without_keys(address, self.path, self.overrides.get("state"))
            if keys.empty and refusal:
                raise ConfigError(refusal)
        if predecessor is None:
            self._lock = lock_state(config.state)
        journal = open_journal(config.state)
        zone = time_zone(config.budget_zone)
        budgets = shared_budgets(self._engine, zone)
        spending = TokenSpending(self._engine, time.time(), zone, config.ledger_currency, budgets)
        self._ledger = ledger = Ledger(self._engine, journal, built.prices, budgets=spending)
        await asyncio.to_thread(ledger.start, loop, self._ledger_failed)
        left = other_journals(config.state, journal)
        written = [folder for folder in left if await asyncio.to_thread(ledger.adopt, folder) is None]
        limits = limits_of_this_month(self._engine, config.ledger_currency, zone, budgets)
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
        self._standbys = standbys = Standbys(runtime, self._engine, self.platform, alone=not written)
        if self._record is not None:
            cast("RecordedRuntime", runtime).record(self._record, self._seed)
        shared = bool(written)
        runtime.responses = StoredResponses(config.state / "responses.jsonl", shared=shared)
        keys_file = config.state / "idempotency.jsonl"
        runtime.idempotency.open(keys_file, runtime.tasks, runtime.wall(), shared=shared)
        self._planning = runtime.planning = await Planning.opened(runtime, spending)
        runtime.most_clients = most_clients(config.limits.connections, told=predecessor is not None)
        if built.certificates:
            self._certificates = ServerCertificates(built.certificates)
        runtime.pressure.memory = Memory(config.limits.memory)
        if config.probing.enabled:
            self._prober = new_prober(runtime, self._resolver)
            standbys.watch(self._prober)
            standbys.open()
            await self._prober.start()
        await self._listen(given)
        if self._record is not None:  # not before: a start that fails leaves nothing behind
            cast("RecordedRuntime", runtime).write_record()
        runtime.tasks.spawn(self.platform.expire(), "placements")
        runtime.tasks.spawn(sweep(runtime), "sweep")
        runtime.tasks.spawn(look_up(runtime, self._resolver), "resolve")
        runtime.tasks.spawn(watch_keys(keys, limits), "watch keys")
        runtime.tasks.spawn(self._watch_files(), "watch files")
        runtime.tasks.spawn(watch_open_files(self._listening, Reserve(), runtime), "watch open files")
        if budgets is not None:
            runtime.tasks.spawn(
                budgets.watch(limits, keys, lambda: runtime.prices.currency), "budgets of several proxies"
            )
        if written:
            unshare = (runtime.responses.unshare, runtime.idempotency.unshare, standbys.left_alone)
            runtime.tasks.spawn(adopt_when_left(ledger, written, unshare), "what others leave")
        self._upgrades = UpgradeSocket(self, runtime.tasks.spawn)
        if predecessor is not None and self._stopping.is_set():
            log.warning("not taking over: this process was told to stop")
            predecessor.leave()
            self._handed_over = True  # the state directory tells of the other
            self._drain_until = self._soon()
            return
        self.publish()
        standbys.begin()
        if predecessor is not None and (reason := await asyncio.to_thread(predecessor.ready)):
            log.error("not taking over: the process before %s", reason)
            self._stopping.set()

    async def _listen(self, given: Listeners) -> None:
        runtime, config = self.runtime, self.config
        self._admin = admin = web.AppRunner(
            admin_app(runtime, self._started, platform_routes(self.platform)),
            access_log=None,
            handle_signals=False,
        )
        await admin.setup()
        front = self._certificates.front if self._certificates is not None and config.admin_tls else None
        clients = accepting(runtime, config, self._certificates)
        await self._listening.open("listen", config.listen, given.get("listen", ()), clients)
        await self._listening.open(
            "admin", config.admin, given.get("admin", ()), by_loop(lambda: cast("Any", admin.server)(), front)
        )
        addresses, shown = self._listening.addresses, fingerprints(runtime.built.certificates)
        self.ports = Ports(addresses["listen"], addresses["admin"], config.admin_tls, shown)

    # Being replaced: `proxy.upgrade.Host`

    def refuses_upgrade(self) -> str:
        """Why no other process may take over now; empty: it may."""
        if self.runtime.draining or self._stopping.is_set():
            return "it is stopping"
        if self._record is not None:
            return "it records an event log (--record), which one process writes from its start to its end"
        if not self.command:
            return "it was not started by a command"
        return ""

    def offered(self) -> tuple[int, list[tuple[str, str, int]]]:
        """The lock; key, configured address and descriptor of each listening socket."""
        configured = self._started_with
        handles = self._listening.descriptors()
        return self._lock, [(name, getattr(configured, name), handle) for name, handle in handles]

    def publish(self) -> None:
        """Be the process that the state directory tells of."""
        self.ports.write(self.state / PORTS_FILE)
        note_database(self.state, self._started_with.database)
        try:
            self._upgrades.open()
        except OSError as error:
            log.warning("`tidegate upgrade` will not reach this process: %s", in_words(error))

    def hand_over(self, pid: int, drain_s: float | None) -> dict[str, Any]:
        """Process `pid` accepts connections: accept none any more, and end when what runs has ended."""
        runtime = self.runtime
        self._handed_over = runtime.handed_over = runtime.draining = True
        self.platform.leave()
        runtime.responses.share()
        runtime.idempotency.share()
        self._standbys.hand_over()
        runtime.timeouts.idle = min(runtime.timeouts.idle, IDLE_GRACE_S)
        for client in runtime.clients:
            if client.idle:
                client.deadline = min(client.deadline, runtime.now() + IDLE_GRACE_S)
        for name in listeners.NAMES:
            self._listening.close(name)
        self._upgrades.close()
        self._unlock()
        notify(f"MAINPID={pid}")
        drain_s = runtime.config.timeouts.drain if drain_s is None else drain_s
        self._drain_until = runtime.now() + drain_s
        self._stopping.set()
        return {"running": sum(client.exchange is not None for client in runtime.clients), "drain": drain_s}

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

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
        if self._handed_over and self._drain_until > (soon := self._soon()):
            self._drain_until = soon  # it may have been given longer than a stop is
        elif self._stopping.is_set():
            log.warning("stopping at once")
            self._standbys.hurry = True
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
        if not self._handed_over:
            notify(STOPPING)
            self._drain_until = self._soon()
        self._listening.close("listen")
        await let_end(runtime, lambda: self._drain_until, handed_over=self._handed_over)
        await self._standbys.stop()
        if self._prober is not None:
            await self._prober.close()
        await runtime.tasks.cancel_all()
        await self.platform.close()
        await self._resolver.close()
        await asyncio.to_thread(runtime.idempotency.close)
        for client in list(runtime.clients):
            client.abort()
        for endpoint in runtime.endpoints.values():
            endpoint.pool.close()
        self._listening.close("admin")
        if self._admin is not None:
            await self._admin.cleanup()
        runtime.responses.write(runtime.responses.take_unwritten())
        runtime.pressure.close()
        await asyncio.to_thread(self._ledger.stop)
        self._engine.dispose()
        if runtime.observer.log is not None:
            runtime.observer.log.close()
        if self._record is not None:
            cast("RecordedRuntime", runtime).end_record()
        if not self._handed_over:
            (self.state / PORTS_FILE).unlink(missing_ok=True)
            (self.state / SOCKET_FILE).unlink(missing_ok=True)
        self._unlock()

    def _soon(self) -> float:
        """When a stop that begins now ends what runs."""
        return self.runtime.now() + self.runtime.config.timeouts.drain

    # Reloading

    def reload(self) -> bool:
        """Read configuration and policy again and swap them in; False: they are wrong, and nothing changed."""
        reloading()
        try:
            return self._reload()
        finally:
            # What reads YAML leaves cycles, and requests leave none: nothing else would collect them for hours.
            gc.collect()
            notify(READY)

    def _reload(self) -> bool:
        runtime = self.runtime
        self._watched.read()
        try:
            config = load_config(self.path) if self.path is not None else self._configured
            config = override(config, self.overrides)
            self._watched.watch(self._files(config))
            built = self._built(config, runtime.built)
            follow = self._standbys.prepare(built)
        except (ConfigError, FileProblems, OSError, ValueError) as error:
            if is_our_shortage(error):
                self._watched.forget()  # nothing is wrong with the files: the next look tries again
                if not runtime.observer.reload_ok:
                    return False  # said already
            runtime.observer.reloads_failed += 1
            runtime.observer.reload_ok = False
            log.error("reload refused, the old configuration goes on:\n%s", in_words(error))
            return False
        warn_of(built)
        waiting = dict(owed(config, self._started_with))
        runtime.observer.restart_for = list(waiting)
        for words in waiting.values():
            log.warning("%s", words)
        if self._certificates is not None and built.certificates:
            self._certificates.use(built.certificates)
            self._tell_certificates(built)
        self._configured = config
        changed = self._use(built, follow)
        runtime.observer.reloads_ok += 1
        runtime.observer.reload_ok = True
        log.info("reloaded: %s", "; ".join(changed) or "nothing changed")
        return True

    def _built(self, config: Config, before: Built | None = None) -> Built:
        """What a configuration amounts to with the placements there are. Raises what `build` does."""
        config = self.platform.overlaid(config)
        loop = asyncio.get_running_loop()
        built = build(config, loop, self._seed, before, self._resolver, self.path)
        self._resolver.judge(judges(config))
        return built

    def _use(self, built: Built, follow: Callable[[], None]) -> list[str]:
        """Serve from what was built, and have standbys follow it. What has changed, in words."""
        runtime = self.runtime
        keep_connections(runtime.built, built, runtime.endpoints)
        changed = changes(runtime.built, built, (*NEXT_START, *runtime.observer.restart_for))
        self.config = built.config
        swap(runtime, built)
        self._planning.use(built.config)
        if self._prober is not None:
            self._prober.replace(built.targets, built.hosts)
        follow()
        self.platform.seen_from(runtime.fleet.backends, runtime.now())
        runtime.poll(runtime.now())
        return changed

    # Placements: `proxy.scaling.platform.Served`

    def configured(self) -> Config:
        """The configuration as the file has it."""
        return self._configured

    def serve_placements(self) -> None:
        """Serve from the placements there are now. Raises what `build` does: nothing has changed."""
        built = self._built(self._configured, self.runtime.built)
        changed = self._use(built, self._standbys.prepare(built))
        log.info("placements: %s", "; ".join(changed) or "nothing changed")

    def drain(self, name: str) -> None:
        """Send nothing new to a placement, and stop it."""
        self._standbys.withdraw(name)

    def _tell_certificates(self, built: Built) -> None:
        """For commands on this machine, which trust just these."""
        shown = fingerprints(built.certificates)
        if shown != self.ports.certificates and not self._handed_over:
            self.ports.certificates = shown
            self.ports.write(self.state / PORTS_FILE)

    def _files(self, config: Config) -> list[Path]:
        return [*([self.path] if self.path is not None else []), *files_of(config)]

    # What goes on all the time

    def _moved(self, host: str, addresses: frozenset[str]) -> None:
        """A name has other addresses now."""
        for endpoint in self.runtime.endpoints.values():
            if endpoint.host == host:
                endpoint.pool.keep_to(addresses)

    async def _watch_files(self) -> None:
        """Apart from the keys: a database that does not answer must not hold up a reload."""
        while True:
            await asyncio.sleep(FILES_S)
            try:
                if self._watched.changed:
                    self.reload()
            except Exception:
                log.exception("watching files failed this time")

    def _ledger_failed(self, reason: str) -> None:
        log.error("usage cannot be recorded any more, new requests are refused: %s", reason)
