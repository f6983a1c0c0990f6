"""What is to become of each standby now: by the controller, by plans, and for those that were started by hand."""

from __future__ import annotations

from collections.abc import Mapping

from policies.pools import MeanTokens, Terms, pools
from policies.scaling import Controller, Pool, Step
from policies.standby import Event, State
from proxy.config import BackendConfig
from proxy.scaling.asks import Asks
from proxy.scaling.keeper import Keeper
from proxy.scaling.seams import Around, Gate


class Decisions:
    """Decides when `turn` is called, and asks the keepers to do it."""

    def __init__(
        self,
        around: Around,
        controller: Controller,
        gate: Gate,
        asks: Asks | None,
        keepers: Mapping[str, Keeper],
    ) -> None:
        """`asks`: of a scheduling platform. `keepers`: as they are at any time."""
        self._around = around
        self._controller = controller
        self._gate = gate
        self._asks = asks
        self._keepers = keepers
        self._sections: Mapping[str, BackendConfig] = {}
        self.most: Mapping[str, int] = {}
        """Standbys that may run at once, by site; of a site that is not here, all."""
        self._means = MeanTokens()
        self._since: float | None = None
        """When this process began to decide, monotonic."""

    def use(self, sections: Mapping[str, BackendConfig], most: Mapping[str, int]) -> None:
        """Follow a configuration: its standbys, and how many of a site may run at once."""
        self._sections, self.most = sections, most

    def turn(self, now: float, wall: float) -> None:
        """Decide once, and have it done. `now` is monotonic, `wall` Unix time."""
        found = self._pools(now, wall)
        if self._asks is not None:
            self._asks.turn(found, self._means, now)
        gate, keepers = self._gate, self._keepers
        if self._since is None:
            self._since = now
        # What was asked for before is not known: a restart is no reason to stop what was busy a moment ago.
        may_stop = now - self._since >= self._controller.settings.settle_s
        for step in self._controller.decide(found, now, wall):
            keeper = keepers.get(step.name)
            if keeper is not None and not keeper.is_asked and (may_stop or step.event is Event.START):
                self._do(keeper, step)
        for name, plan, reason in gate.wanted():
            keeper = keepers.get(name)
            if keeper is not None and self._may_begin(keeper):
                keeper.ask(Event.START, reason, plan)
        for name, keeper in keepers.items():
            runs = keeper.state in (State.PREPARING, State.STARTING, State.READY)
            if runs and (why := gate.over(name)):
                keeper.ask(Event.STOP, why)
            elif keeper.pinned and self._may_begin(keeper) and gate.allowed(name):
                keeper.ask(Event.START, "started by hand, to stay")

    def _pools(self, now: float, wall: float) -> list[Pool]:
        standbys = {name: keeper.standby for name, keeper in self._keepers.items()}
        terms = {name: self._terms(keeper) for name, keeper in self._keepers.items()}
        around = self._around
        asked = self._asks is not None and self._asks.on
        return pools(around.fleet, around.valve, standbys, terms, now, wall, self._means, every_model=asked)

    def _do(self, keeper: Keeper, step: Step) -> None:
        if step.event is Event.STOP:
            if not keeper.pinned:
                keeper.ask(Event.STOP, step.reason)
        elif keeper.state is State.DRAINING:
            keeper.ask(Event.START, step.reason)
        elif keeper.standby.may(Event.START) and self.has_room(keeper):
            plan = self._gate.may_start(keeper.name, step)
            if plan is not None:
                keeper.ask(Event.START, step.reason, plan)

    def _may_begin(self, keeper: Keeper) -> bool:
        idle = keeper.state is State.STANDBY and keeper.pause_s <= 0.0 and not keeper.is_asked
        return idle and self.has_room(keeper)

    def _terms(self, keeper: Keeper) -> Terms:
        section = self._sections.get(keeper.name)
        if section is None or section.standby is None:
            return Terms(allowed=False)
        standby = section.standby
        return Terms(
            standby.cost_per_hour,
            keeper.kept.cold_start_s or standby.cold_start,
            standby.min_on,
            standby.min_off if keeper.standby.runs else 0.0,
            keeper.in_state_s,
            keeper.pause_s,
            not keeper.wants_out
            and self._gate.allowed(keeper.name)
            and (keeper.state is not State.STANDBY or self.has_room(keeper)),
        )

    def has_room(self, keeper: Keeper) -> bool:
        """Whether its site may have another one run."""
        site = keeper.config.site
        most = self.most.get(site)
        if most is None:
            return True
        running = sum(other.has_place and other.config.site == site for other in self._keepers.values())
        return running < most
