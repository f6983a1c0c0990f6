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
