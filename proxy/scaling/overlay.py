"""Placements as further backends of the configuration.

The file's word goes first: sites, operators and data classes are the admin's, and a placement that does not fit
the file (any more) is left out and told of, while all others serve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import ceil
from typing import Any, NamedTuple

from pydantic import ValidationError

from policies.match import LOCAL
from policies.units import BadValueError
from proxy.client_address import Network
from proxy.config import BackendConfig, Config
from proxy.scaling.messages import MessageError, Placement, problem_of
from proxy.scaling.offers import unpriced
from proxy.scaling.sections import SchedulerPlatform
from proxy.ssrf import check_url, may_be_reached


class LeftOut(NamedTuple):
    """A placement that does not fit, and why."""

    placement: Placement
    problem: MessageError


def with_placements(config: Config, placements: Iterable[Placement]) -> tuple[Config, list[LeftOut]]:
    """The configuration with those that fit, and the others. `config`: as the file has it."""
    platform = config.scaling.scheduler
    fitting: list[BackendConfig] = []
    left_out: list[LeftOut] = []
    for placement in placements:
        try:
            if platform is None:
                raise MessageError("", "the configuration has no scaling.scheduler")
            fitting.append(_fits(config, fitting, placement, platform))
        except MessageError as problem:
            left_out.append(LeftOut(placement, problem))
    backends = [*config.backends, *fitting]
    return (config.model_copy(update={"backends": backends}) if fitting else config), left_out


def _fits(
    config: Config, others: Sequence[BackendConfig], placement: Placement, platform: SchedulerPlatform
) -> BackendConfig:
    """Its section. Raises MessageError with the field that does not fit."""
    if placement.site == LOCAL:
        raise MessageError("site", "`local` may see every class of data: a placement stands at another site")
    if placement.site not in config.sites:
        known = ", ".join(sorted(config.sites)) or "none"
        raise MessageError("site", f"'{placement.site}' is not in the configuration, where there is {known}")
    if any(backend.name == placement.name for backend in (*config.backends, *others)):
        raise MessageError("name", f"a backend is called '{placement.name}' already")
    for backend in config.backends:
        pinned = backend.standby.scheduler if backend.standby is not None else None
        if pinned is not None and pinned.placement == placement.id:
            raise MessageError("id", f"it is backend '{backend.name}' of the configuration")
    check_place(placement.url, platform.networks)
    written = section_of(placement, platform)
    try:
        section = BackendConfig.model_validate(written)
    except ValidationError as error:
        raise problem_of(error, BackendConfig, written) from None
    ours = config.ledger_currency
    if placement.price is not None and (placement.price.currency or ours) != ours:
        raise MessageError("price.currency", f"the ledger counts in {ours}")
    if why := unpriced(config, section):
        raise MessageError("cost_per_hour", why)
    return section


def judges(config: Config) -> dict[str, Callable[[str], bool]]:
    """Who may be connected to, for each name that only placements have: see `probes.resolver`."""
    section = config.scaling.scheduler
    networks = section.networks if section is not None else ()
    ours: set[str] = set()
    theirs: set[str] = set()
    for backend in config.backends:
        if backend.url.startswith("unix:"):
            continue
        is_placement = backend.standby is not None and backend.standby.scheduler is not None
        host = backend.url.partition("://")[2].partition("/")[0].rpartition("@")[2]
        name = host.partition(":")[0] if not host.startswith("[") else host
        (theirs if is_placement else ours).add(name.lower())
    return {name: partial(may_be_reached, allowed=networks) for name in theirs - ours}


def check_place(url: str, networks: Sequence[Network]) -> None:
    """Whether the text of a URL that came from the platform may be connected to. Raises MessageError."""
    try:
        check_url(url, networks)
    except BadValueError as error:
        raise MessageError("url", error.message) from None


def section_of(placement: Placement, platform: SchedulerPlatform) -> dict[str, Any]:
    """A placement as a backend's section."""
    standby: dict[str, Any] = {"scheduler": {"placement": placement.id}, "cards": placement.count}
    if placement.cost_per_hour is not None:
        standby["cost_per_hour"] = placement.cost_per_hour
    if placement.cold_start_s is not None:
        standby["cold_start"] = placement.cold_start_s
    labels = dict(placement.labels)
    if placement.card is not None:
        labels.setdefault("card", placement.card)
    section: dict[str, Any] = {
        "name": placement.name,
        "url": placement.url,
        "site": placement.site,
        "models": placement.models,
        "engine": placement.engine,
        "labels": labels,
        "standby": standby,
    }
    if placement.slots is not None:
        section["slots"] = placement.slots
    if placement.price is not None:
        section["price"] = placement.price.model_dump(exclude_none=True)
    if placement.route.bandwidth is not None:
        section["bandwidth"] = ceil(placement.route.bandwidth)
    if platform.api_key_env is not None:
        section["api_key_env"] = platform.api_key_env
    return section
