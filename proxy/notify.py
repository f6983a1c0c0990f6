"""Tells systemd how far the process is (sd_notify(3)): one datagram to the socket that it names."""

from __future__ import annotations

import logging
import os
import socket
import time

log = logging.getLogger("tidegate")

READY = "READY=1"
STOPPING = "STOPPING=1"


def notify(*lines: str) -> None:
    """Send these lines; without systemd, nothing."""
    where = os.environ.get("NOTIFY_SOCKET", "")
    if not where:
        return
    address = "\0" + where[1:] if where.startswith("@") else where
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.connect(address)
            sock.send("\n".join(lines).encode())
    except OSError as error:
        log.warning("systemd cannot be told %s: %s", lines[0], error)


def reloading() -> None:
    """`READY` has to follow, however the reload ends."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
