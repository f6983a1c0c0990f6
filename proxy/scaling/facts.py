"""What a provider is told of the backend that it starts and stops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Facts:
    """Of one standby, from its section of the configuration."""

    name: str
    url: str
    """Where its engine will answer."""
    models: Sequence[str]
    site: str = "local"
    key: str | None = field(default=None, repr=False)
    """The API key that its engine wants; None: it wants none."""
