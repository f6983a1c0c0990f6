"""How many connections the system lets this process have."""

from __future__ import annotations

import logging
import resource

log = logging.getLogger("tidegate")

OWN_FILES = 100
"""Open files besides those of clients and backends: journal, ledger, log, probes, admin port."""


def most_clients(wanted: int) -> int:
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
