"""The backends of case 4.1, the same for the simulator and for the run with real processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from policies.files import library_policy
from policies.profile import Profile
from sim.profile import load_profile

APPLIANCE: Final = Path(__file__).with_name("appliance.yaml")
MODEL: Final = "report-writer"
POLICY: Final = "local-first"
"""The proxy's default."""


@dataclass(frozen=True, slots=True)
class Site:
    """One backend, at a site of its own."""

    name: str
    site: str
    slots: int
    rtt_s: float
    profile: str
    """A name, or a file."""

    def load(self) -> Profile:
        """Raises FileProblems and OSError."""
        return load_profile(self.profile)


LOCAL: Final = Site("appliance", "local", 20, 0.0, str(APPLIANCE))
"""Twenty reports at once take it about 50 s each."""
REMOTE: Final = (
    Site("nanjing", "nanjing", 149, 0.02, "h20-4-32b"),
    Site("suzhou", "suzhou", 160, 0.04, "d-4-32b"),
)


def policy() -> str:
    """Text of the policy that decides, here and there."""
    return library_policy(POLICY)
