"""What the machines of a site say of themselves, as bounds in a tier of a policy file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from policies.values import BackendView

HOST_FIGURES_VALID_S: Final = 15.0
"""Figures of a host that are older are ignored."""

HOST_FIGURES: Final[Mapping[str, str]] = {
    "gpu_utilisation": "of its GPUs' time, the mean",
    "gpu_memory": "of its GPUs' memory",
    "gpu_temperature": "degrees Celsius, the hottest GPU",
    "gpu_power": "watts, all GPUs",
    "cpu": "of its processors' time",
    "memory": "of its memory",
}
"""What there is, and its unit; those without one are fractions, 0 to 1."""


ALARMS: Final[Mapping[str, float]] = {"gpu_temperature": 90.0}
"""From which on a machine is about to slow down: NVIDIA's cards throttle some degrees above."""


def alarm_of(backend: BackendView, now: float) -> str:
    """What of its host alarms, in words; empty: nothing, or nobody knows."""
    if now - backend.host_at > HOST_FIGURES_VALID_S:
        return ""
    raised = (
        f"{name} of {backend.host[name]:.0f}"
        for name, limit in ALARMS.items()
        if backend.host.get(name, 0.0) >= limit
    )
    return next(raised, "")


@dataclass(frozen=True, slots=True)
class HostBounds:
    """Bounds of figures by name, both inclusive."""

    bounds: tuple[tuple[str, float, float], ...]
    """Name, least and most."""

    def accept(self, backend: BackendView, now: float) -> bool:
        """Whether the host of a backend is inside them. What is not known, or stale, is."""
        if now - backend.host_at > HOST_FIGURES_VALID_S:
            return True
        figures = backend.host
        for name, least, most in self.bounds:
            value = figures.get(name)
            if value is not None and not least <= value <= most:
                return False
        return True
