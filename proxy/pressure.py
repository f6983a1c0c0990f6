"""Memory that runs short: what is given up for it, stage by stage, before the kernel ends the process.

The figures are Envoy's (its overload manager): from 92 % of the bound connections end with their answers, from 95 %
new requests are refused, from 98 % new connections are closed unread. A stage ends 3 % below where it began, or it
would come and go with every request. Running requests go on, and so does the admin port.

Request bodies have a bound of their own, beyond which one is refused while it comes (`ClientConnection`). So they
alone end connections with their answers, and no more: who sends no large body is not refused for those of others.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

log = logging.getLogger("tidegate")

DROP_KEEP_ALIVE: Final = 1
REFUSE_REQUESTS: Final = 2
REFUSE_CONNECTIONS: Final = 3
LEVELS: Final[tuple[float, ...]] = (0.0, 0.92, 0.95, 0.98)
"""Use from which each stage applies, as a share of the bound."""
HYSTERESIS: Final = 0.03
STAGES: Final = (
    "memory suffices again",
    "memory runs short: connections end with their answers",
    "memory runs short: new requests are refused",
    "memory runs short: new connections are closed",
)


def stage_at(use: float, before: int) -> int:
    """The stage for a share of the bound, when it was `before`."""
    stage = max(number for number, level in enumerate(LEVELS) if use >= level)
    while before > stage and use < LEVELS[before] - HYSTERESIS:
        before -= 1
    return max(stage, before)


class Memory:
    """Resident memory of this process, and its bound. Raises OSError where there is no `/proc`."""

    def __init__(self, bound: int | None = None, root: Path = Path("/")) -> None:
        """`bound`: bytes; None: that of the control group, if it has one. `root`: of the file system."""
        self.bound = cgroup_bound(root) if bound is None else bound
        """0: there is none."""
        # Kept open: it has to be read when no further file can be opened, too.
        self._statm = os.open(root / "proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        self._page = os.sysconf("SC_PAGE_SIZE")
        self._trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)

    def used(self) -> int:
        """Bytes."""
        return int(os.pread(self._statm, 200, 0).split()[1]) * self._page

    def give_back(self) -> None:
        """Return what was freed to the system: without it, what was once used would count as used for ever."""
        if self._trim is not None:
            self._trim(0)

    def close(self) -> None:
        """Nothing is read any more."""
        os.close(self._statm)


def cgroup_bound(root: Path) -> int:
    """The least memory limit of this process's control groups (versions 1 and 2) and of those above; 0: none."""
    limits = []
    try:
        groups = (root / "proc/self/cgroup").read_text().split()
    except OSError:
        return 0
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        folder = mount / path.lstrip("/")
        for place in (folder, *folder.parents):
            if not place.is_relative_to(mount):
                break
            try:
                limits.append(int((place / name).read_text()))
            except (OSError, ValueError):  # no such file, or `max`
                continue
    return min((limit for limit in limits if limit < 1 << 60), default=0)


class Pressure:
    """Looks at the memory a few times a second, and says what to give up."""

    def __init__(self, memory: Memory | None = None) -> None:
        self.memory = memory
        self.stage = 0
        self.use = 0.0
        """Share of the bound at the last look."""

    def close(self) -> None:
        """Look at bodies alone from now on."""
        if self.memory is not None:
            self.memory.close()
            self.memory = None

    def look(self, bodies: int, most_bodies: int) -> int:
        """The stage of now. `bodies`: bytes of request bodies in memory, and how many there may be."""
        memory = self.memory
        room, used = bodies / most_bodies, 0.0
        if memory is not None and memory.bound:
            used = memory.used() / memory.bound
            if used >= LEVELS[DROP_KEEP_ALIVE]:
                memory.give_back()
                used = memory.used() / memory.bound
        self.use = max(room, used)
        stage = max(stage_at(used, self.stage), min(stage_at(room, self.stage), DROP_KEEP_ALIVE))
        if stage != self.stage:
            log.warning("%s (%.0f %% of the bound)", STAGES[stage], self.use * 100)
            self.stage = stage
        return stage
