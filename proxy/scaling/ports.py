"""Whether an engine can listen where it is to answer, and who does if it cannot."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

_LISTENING = "0A"  # of /proc/net/tcp, as TCP_LISTEN of the kernel


def why_not(host: str, port: int) -> str:
    """Why nobody can listen at an address of this machine; empty: somebody can. `port` 0: at any port."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        return f"{host} is no address: {(error.strerror or str(error)).lower()}"
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:
                    return f"{host} is not an address of this machine"
                if error.errno != errno.EADDRINUSE:
                    return f"{host}:{port} cannot be listened at: {(error.strerror or '').lower()}"
                who = listener(port)
                return f"port {port} is in use" + (f" by {who}" if who else "")
    return ""


def listener(port: int) -> str:
    """Name and id of the process that listens on a TCP port; empty: it cannot be seen, or there is none."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = Path(table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            fields = row.split()
            if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").iterdir() if inodes else ():
        if not process.name.isdigit():
            continue
        try:
            for handle in (process / "fd").iterdir():
                if os.readlink(handle) in inodes:
                    name = (process / "comm").read_text(errors="replace").strip()
                    return f"{name}, process {process.name}"
        except OSError:  # another user's, or gone
            continue
    return ""
