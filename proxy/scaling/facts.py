"""What a provider is told of the backend that it starts and stops."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from proxy.scaling.images import Launch
from proxy.scaling.sections import SchedulerPlatform


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
    directory: Path = Path("standbys")
    """Where files of standbys are kept: in the state directory."""
    tls: ssl.SSLContext | None = None
    """How its certificate is checked; None: its URL is plain http."""
    server_name: str | None = None
    """Name the certificate must carry; None: the URL's host."""
    platform: SchedulerPlatform | None = None
    """`scaling.scheduler`; None: there is none."""
    launch: Launch | None = None
    """What runs its model on its card; None: its provider brings its own, or nobody has said the card."""
