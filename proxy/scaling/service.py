"""Standbys of the running proxy: makes `Scaling` out of its configuration, and starts, reloads and ends it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf
from typing import TYPE_CHECKING

from sqlalchemy import Engine

from policies.scaling import ScalingSettings
from policies.standby import State
from policies.state import Fleet
from policies.units import BadValueError
from policies.valve import Valve
from proxy.build import Built, ConfigError, tls_context
from proxy.config import BackendConfig, Config, backend_key
from proxy.scaling.asks import Asks, Sender
from proxy.scaling.budgets import NANO
from proxy.scaling.hours import Hours
from proxy.scaling.images import Launch
from proxy.scaling.journal import JOURNAL_FILE
from proxy.scaling.manager import Scaling
from proxy.scaling.provider import Provider
from proxy.scaling.providers import provider_of

if TYPE_CHECKING:
    from probes.runner import Prober
    from proxy.runtime import Runtime


class Surroundings:
    """`manager.Around`: the running proxy."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.alone = True
        self.prober: Prober | None = None
        self._watched: set[str] = set()
        """Standbys that the probes ask while they start."""
        self._leaving: set[str] = set()
        """Standbys that get nothing new, wherever they are."""

    @property
    def fleet(self) -> Fleet:
        return self._runtime.fleet

    @property
    def valve(self) -> Valve:
        return self._runtime.valve

    def now(self) -> float:
        return self._runtime.now()

    def wall(self) -> float:
        return self._runtime.wall()

    def put(self, name: str, state: State) -> None:
        runtime = self._runtime
        now = runtime.now()
        leaves = name in self._leaving
        changed = runtime.fleet.put(
            name,
            now,
            asleep=state is not State.READY and not leaves,
            draining=state is State.DRAINING or leaves,
        )
        starts = state is State.STARTING
        if self.prober is not None and starts is not (name in self._watched):
            if starts:
                self._watched.add(name)
                self.prober.watch(name, True)
            else:
                self._watched.discard(name)
                if state is not State.READY:
                    self.prober.watch(name, False)
        if changed:
            runtime.poll(now)

    def drain(self, name: str) -> None:
        """Send nothing new there and hold nothing for it, until another configuration is followed."""
        self._leaving.add(name)
        runtime = self._runtime
        if name in runtime.fleet.backends and runtime.fleet.put(
            name, runtime.now(), asleep=False, draining=True
        ):
            runtime.poll(runtime.now())

    def begin_anew(self) -> None:
        """Another configuration is followed: the probes may have forgotten which of them start."""
        self._watched.clear()
        self._leaving.clear()

    def answers(self, name: str) -> bool:
        backend = self._runtime.fleet.backends.get(name)
        return backend is not None and backend.probed_up


def standbys_of(config: Config) -> list[BackendConfig]:
    return [section for section in config.backends if section.standby is not None]


def provider(config: Config, launch: Callable[[str], Launch | None]) -> Callable[[BackendConfig], Provider]:
    """What makes providers by a configuration. `launch`: what is to run on the standby of a name."""

    def make(section: BackendConfig) -> Provider:
        try:
            return provider_of(
                section,
                config.state,
                key=backend_key(section),
                tls=tls_context(section),
                platform=config.scaling.scheduler,
                launch=partial(launch, section.name),
            )
        except BadValueError as error:
            raise ConfigError(f"backend {section.name}: {error.message}") from None

    return make


def settings_of(config: Config) -> ScalingSettings:
    scaling, objective = config.scaling, config.scaling.objective
    return ScalingSettings(
        up=scaling.up,
        down=scaling.down,
        least_use=scaling.least_use,
        settle_s=scaling.settle,
        most_at_once=scaling.most_at_once,
        quantile=scaling.forecast,
        most=dict(scaling.most),
        ttft_objective_s=objective.ttft or inf,
        tpot_objective_s=objective.tpot or inf,
    )


def scaling_in(runtime: Runtime) -> Scaling | None:
    """That of a running proxy; None: it has no standbys."""
    return runtime.scaling if isinstance(runtime.scaling, Scaling) else None


class Standbys:
    """What the life of the process (`proxy/serve.py`) has to do with them. Without standbys there is none of it."""

    def __init__(self, runtime: Runtime, engine: Engine, platform: Sender, *, alone: bool) -> None:
        """`engine`: of the ledger. `platform`: who is asked for more, if one is configured. `alone`: no process
        before this one still has requests."""
        self._runtime = runtime
        self._engine = engine
        self._around = Surroundings(runtime)
        self._around.alone = alone
        self._asks = Asks(platform, self._left, runtime.tasks.spawn, self._classes)
        self._begun = False
        self.hurry = False
        """Wait for nothing any more."""

    def _left(self, site: str) -> float | None:
        planning = self._runtime.planning
        left = planning.budgets.left(site) if planning is not None else None
        return None if left is None else left / NANO

    def _classes(self, model: str) -> set[str]:
        exchanges = (*self._runtime.exchanges, *self._runtime.held.values())
        requests = (exchange.routings[-1].request for exchange in exchanges if exchange.routings)
        return {request.data_class for request in requests if request.model == model}

    def _launch(self, name: str) -> Launch | None:
        planning = self._runtime.planning
        offer = planning.offers.get(name) if planning is not None else None
        return offer.launch if offer is not None and isinstance(offer.launch, Launch) else None

    def open(self) -> None:
        """Show the fleet where they are, before probes and traffic come. Raises ConfigError, OSError."""
        config = self._runtime.config
        has_some = standbys_of(config) or (config.state / JOURNAL_FILE).exists()
        if has_some or config.scaling.scheduler is not None:
            self.prepare(self._runtime.built)()

    def watch(self, prober: Prober) -> None:
        self._around.prober = prober

    def begin(self) -> None:
        """The proxy serves: act."""
        self._begun = True
        if (scaling := scaling_in(self._runtime)) is not None:
            scaling.begin()

    def prepare(self, built: Built) -> Callable[[], None]:
        """Make what a configuration says of them, and return what has it followed, once all else has been swapped.

        Raises ConfigError, OSError: a section cannot work, and nothing has changed.
        """
        runtime, config, sections = self._runtime, built.config, standbys_of(built.config)
        scaling = scaling_in(runtime)
        if scaling is None:
            if not sections and config.scaling.scheduler is None and self._begun:
                return lambda: None
            hours = Hours(self._engine, config.ledger_currency)
            gate = runtime.planning
            scaling = Scaling(
                self._around,
                provider(config, self._launch),
                config.state,
                hours=hours,
                gate=gate,
                asks=self._asks,
            )
            scaling.journal.read()
            if gate is not None:
                gate.standby_of, gate.approved = scaling.standby_of, scaling.wanted
        made = scaling.make_all(sections, provider(config, self._launch))

        def follow() -> None:
            scaling.make = provider(config, self._launch)
            scaling.controller.settings = settings = settings_of(config)
            self._asks.use(config, settings)
            scaling.hours.currency = config.ledger_currency
            is_new = scaling_in(runtime) is None
            runtime.scaling = scaling
            self._around.begin_anew()
            scaling.configure(sections, made, config.scaling.most)
            if is_new and self._begun:
                scaling.begin()

        return follow

    def withdraw(self, name: str) -> None:
        """Have a standby stop for good although what is served from still has it."""
        self._around.drain(name)
        scaling = scaling_in(self._runtime)
        if scaling is not None:
            config = self._runtime.config
            left = [one for one in standbys_of(config) if one.name != name and scaling.section(one.name)]
            scaling.configure(left, {}, config.scaling.most)
        self._runtime.poll(self._runtime.now())

    def left_alone(self) -> None:
        """The process before this one has ended."""
        self._around.alone = True

    def hand_over(self) -> None:
        """Another process acts from now on."""
        if self._runtime.planning is not None:
            self._runtime.planning.hand_over()
        scaling = scaling_in(self._runtime)
        if scaling is not None:
            self._runtime.tasks.spawn(scaling.hand_over(), "standbys follow")

    async def stop(self) -> None:
        """The proxy ends, and nothing runs on its backends any more."""
        scaling = scaling_in(self._runtime)
        if scaling is not None:
            await scaling.stop(keep=self._runtime.config.scaling.keep, hurry=lambda: self.hurry)
