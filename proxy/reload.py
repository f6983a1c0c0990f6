"""What a reload swaps in, and what it keeps: connections of backends that did not change, and what waits for the
next start."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING

from proxy.build import Built
from proxy.config import Config
from proxy.open_files import most_clients
from proxy.upstream import Endpoint

if TYPE_CHECKING:
    from proxy.runtime import Runtime

log = logging.getLogger("tidegate")

NEXT_START = (
    *("listen", "admin", "admin_tls", "proxy_protocol", "state", "database", "log", "recent", "seed"),
    *("probing", "budget_zone", "limits.memory", "retries.ratio", "retries.per_second"),
)
"""What a reload does not change."""


def owed(config: Config, started_with: Config) -> Iterator[tuple[str, str]]:
    """What of a configuration does not hold before the next start: the keys, each with words for the log.

    `tls` is among them only where HTTPS would begin or end.
    """
    for name in NEXT_START:
        if attrgetter(name)(config) != attrgetter(name)(started_with):
            yield name, f"a change of `{name}` takes effect at the next start"
    if bool(config.tls) != bool(started_with.tls):
        now = "HTTPS, with the certificates it has" if started_with.tls else "plain HTTP"
        yield "tls", f"`tls` was not applied: until the next start clients speak {now}"


def keep_connections(before: Built, built: Built, endpoints: Mapping[str, Endpoint]) -> None:
    """A backend whose section did not change keeps its connections: its endpoint among `endpoints`."""
    sections = {section.name: section for section in before.config.backends}
    for section in built.config.backends:
        old = endpoints.get(section.name)
        if sections.get(section.name) == section and old is not None:
            fresh = built.endpoints[section.name]
            if fresh.same_credentials(old):  # what stands in files may be new
                old.pool.idle_s = fresh.pool.idle_s
                old.pool.age_s = fresh.pool.age_s
                old.pool.most_requests = fresh.pool.most_requests
                built.endpoints[section.name] = old


def swap(runtime: Runtime, built: Built) -> None:
    """Serve from what was built, at once; what runs goes on where it is. Call `keep_connections` before."""
    old = runtime.endpoints
    for name, endpoint in old.items():
        if built.endpoints.get(name) is not endpoint:
            endpoint.pool.close()
    if built.prices.currency != runtime.prices.currency:
        log.warning("budgets count %s from now on, and what was counted in it before", built.prices.currency)
        runtime.limits.change_currency(runtime.prices.currency, built.prices.currency)
    runtime.use(built)
    runtime.most_clients = most_clients(built.config.limits.connections, runtime.most_clients)
    runtime.fleet.replace(built.backends)
    runtime.valve.swap(built.policy.rules, runtime.now())
