"""Which class starts and stops which kind of standby. Each is loaded when it is needed."""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from policies.units import BadValueError
from proxy.config import BackendConfig
from proxy.scaling.facts import Facts
from proxy.scaling.images import Launch
from proxy.scaling.provider import Provider
from proxy.scaling.sections import SchedulerPlatform

CLASSES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "process": "proxy.scaling.process:ProcessProvider",
        "sleep": "proxy.scaling.sleep:SleepProvider",
        "command": "proxy.scaling.command:CommandProvider",
        "webhook": "proxy.scaling.webhook:WebhookProvider",
        "scheduler": "proxy.scaling.scheduler:SchedulerProvider",
    }
)
"""Kind to module and class. A class is made of a `StandbySection` and `Facts`; if it has a static method `check`
of these two, that yields what cannot work, each with its place in the section."""
FOLDER: Final = "standbys"
"""In the state directory: files of standbys."""


def provider_of(
    backend: BackendConfig,
    state: Path,
    *,
    key: str | None = None,
    tls: ssl.SSLContext | None = None,
    platform: SchedulerPlatform | None = None,
    launch: Launch | None = None,
) -> Provider:
    """What starts and stops a backend that has a `standby` section.

    `key`: what `backend_key` says. `tls`: how its certificate is checked. `platform`: `scaling.scheduler`.
    `launch`: what is to run. Raises BadValueError, placed in the backend's section: there is no such provider.
    """
    assert backend.standby is not None
    facts = replace(facts_of(backend, state, key, tls, platform), launch=launch)
    provider: Provider = _class_of(backend.standby.kind)(backend.standby, facts)
    return provider


def check_standby(
    backend: BackendConfig, state: Path, platform: SchedulerPlatform | None = None
) -> Iterator[BadValueError]:
    """What cannot work, each with its place in the backend's section; nothing for a backend without standby.

    Nothing is started, written or connected to.
    """
    if backend.standby is None:
        return
    try:
        check = getattr(_class_of(backend.standby.kind), "check", None)
    except BadValueError as error:
        yield error
        return
    if check is not None:
        problem: BadValueError
        for problem in check(backend.standby, facts_of(backend, state, platform=platform)):
            problem.at = ("standby", *problem.at)
            yield problem


def facts_of(
    backend: BackendConfig,
    state: Path,
    key: str | None = None,
    tls: ssl.SSLContext | None = None,
    platform: SchedulerPlatform | None = None,
) -> Facts:
    """What its provider is told."""
    models = () if backend.models == "auto" else tuple(backend.models)
    return Facts(
        backend.name,
        backend.url,
        models,
        backend.site,
        key,
        state / FOLDER,
        tls,
        backend.tls.server_name,
        platform,
    )


def _class_of(kind: str) -> Any:
    where = CLASSES.get(kind)
    if where is None:
        have = ", ".join(f"`{name}`" for name in CLASSES)
        raise BadValueError(f"no provider `{kind}` is here: there are {have}", at=("standby", kind))
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)
