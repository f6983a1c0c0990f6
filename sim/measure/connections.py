"""Open files: each user has a connection, and what the system refuses must not look like the server's limit."""

from __future__ import annotations

import contextlib
import resource

from sim.measure.endpoint import MeasureError

OWN_FILES = 64
"""Beside the connections of the users: those of the event loop, the terminal, the files that are written."""


def check_room(users: int) -> None:
    """Raise the limit of open files as far as the system lets us. Raises MeasureError: so many users do not fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # What it refuses is seen below, where it matters.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < users + OWN_FILES:
        raise MeasureError(
            f"{users} users need {users + OWN_FILES} open files, and {soft} are allowed here: raise "
            f"`ulimit -Hn`, or measure {soft - OWN_FILES} users at most"
        )
