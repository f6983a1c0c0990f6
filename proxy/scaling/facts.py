"""What a provider is told of the backend that it starts and stops."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from proxy.scaling.images import Launch
from proxy.scaling.sections import SchedulerPlatform


def nobody_says() -> Launch | None:
    """Where no image is looked up."""
    return None


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
    launch: Callable[[], Launch | None] = field(default=nobody_says, repr=False, compare=False)
    """What is to run there, as the images say at that moment; None: that is for its provider to know."""
