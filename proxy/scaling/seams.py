"""What `manager.py` asks of the proxy around it, of plans and budgets, and of sections."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from pydantic import ValidationError

from policies.pools import Waits
from policies.scaling import Step
from policies.standby import Move, State
from policies.state import Fleet
from proxy.config import BackendConfig
from proxy.scaling.journal import Kept
from proxy.scaling.provider import Provider
from proxy.scaling.sections import PROVIDERS

log = logging.getLogger("tidegate")

MakeProvider = Callable[[BackendConfig], Provider]
"""Raises ConfigError: the section cannot work."""


class NotPossibleError(Exception):
    """A standby cannot be started or stopped now; the message says why."""


class Around(Protocol):
    """The running proxy, as far as standbys need it (`service.py`)."""

    @property
    def fleet(self) -> Fleet: ...

    @property
    def valve(self) -> Waits: ...

    @property
    def alone(self) -> bool:
        """Whether no other process has requests on the same backends."""

    def now(self) -> float: ...

    def wall(self) -> float: ...

    def put(self, name: str, state: State) -> None:
        """Have fleet and probes know where a standby is."""

    def answers(self, name: str) -> bool:
        """Whether the probes say that a backend answers."""


class Gate(Protocol):
    """Who may forbid a start: plans and budgets."""

    def may_start(self, name: str, step: Step) -> str | None:
        """The id of the plan that pays for it, or empty: nobody has to; None: not now."""

    def allowed(self, name: str) -> bool:
        """Whether it is worth planning with."""

    def template_of(self, plan: str) -> str:
        """Name of the template that a plan was made from; empty: none."""

    def wanted(self) -> Iterable[tuple[str, str, str]]:
        """Standbys that plans are to start: name, id of the plan, reason."""

    def over(self, name: str) -> str:
        """Why it may not run on; empty: it may."""

    def moved(self, move: Move) -> None:
        """A standby has made a move."""

    async def by_hand(self, name: str, by: str) -> str:
        """The id of the plan that pays for a start by hand, or empty. Raises NotPossibleError: a ceiling is in
        the way."""


class NoGate:
    """Everything may start."""

    def may_start(self, name: str, step: Step) -> str | None:
        return ""

    def allowed(self, name: str) -> bool:
        return True

    def template_of(self, plan: str) -> str:
        return ""

    def wanted(self) -> Iterable[tuple[str, str, str]]:
        return ()

    def over(self, name: str) -> str:
        return ""

    def moved(self, move: Move) -> None:
        pass

    async def by_hand(self, name: str, by: str) -> str:
        return ""


def provided(section: BackendConfig) -> dict[str, Any]:
    """What of a backend's section its provider is made of: one that differs is another standby."""
    written = section.model_dump(mode="json")
    standby = written["standby"] or {}
    kept = {name: written[name] for name in ("url", "models", "engine", "api_key_env", "api_key_file", "tls")}
    kept["provider"] = {name: standby.get(name) for name in (*PROVIDERS, "card", "cards", "task", "image")}
    return kept


def section_of(kept: Kept, name: str) -> BackendConfig | None:
    """The section by which its run was started; None, and told: it is not there, or not understood."""
    try:
        return BackendConfig.model_validate(kept.backend)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)  # what stands there may be secret
        words = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in found)
        log.error("standby %s: what it was started by cannot be read: %s", name, words)
        return None
