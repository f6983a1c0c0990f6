"""The backends of a simulated cluster, and what may happen to them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from policies.profile import Profile
from policies.state import Backend
from probes.base import Hysteresis, Timing
from sim.engine import Engine, EngineSettings
from sim.profile import engine_settings


@dataclass(slots=True)
class Member:
    """One backend of a simulated cluster. Times are microseconds."""

    backend: Backend
    """As the router sees it; its models must be set."""
    settings: EngineSettings
    rtt: int = 0
    """Network round trip from the router: 30 ms are 30_000."""
    overhead: int = 0
    """Between the server's door and the engine's queue."""
    starts: int = 0
    """When it is up for the first time: a cold start."""

    @classmethod
    def of(cls, backend: Backend, profile: Profile, rtt_s: float, unit_tokens: int) -> Member:
        """One whose engine is as a profile says. `unit_tokens`: of the hashes in the workload, 0 for none.

        Raises ValueError, also for units that no KV block divides.
        """
        settings = engine_settings(profile, unit_tokens)
        return cls(backend, settings, rtt=round(rtt_s * 1e6), overhead=round(profile.overhead_us))

    def __post_init__(self) -> None:
        """Raises ValueError."""
        for name in ("rtt", "overhead", "starts"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"backend {self.backend.name}: {name} is microseconds, zero or more, not {getattr(self, name)}"
                )
        if self.backend.slots is not None and self.backend.slots < 1:
            raise ValueError(f"backend {self.backend.name}: slots are one or more, not {self.backend.slots}")
        if not self.backend.models:
            raise ValueError(
                f"backend {self.backend.name}: it serves no model, so nothing is ever sent to it: give it `models`"
            )


class Change(Enum):
    """What may happen to a backend while a simulation runs."""

    DOWN = "down"
    """It closes all connections and refuses new ones."""
    UP = "up"
    """It is back, with an empty engine and an empty cache."""
    FAIL = "fail"
    """It answers every new request with a 500."""
    FULL = "full"
    """It answers every new request with a 429 that asks for a pause."""
    MENDED = "mended"
    """`FAIL` and `FULL` are over."""


@dataclass(frozen=True, slots=True)
class Incident:
    """Something that is to happen."""

    at: int
    """Microseconds since the simulation began."""
    backend: str
    change: Change
    retry_after_s: float = 1.0
    """For `FULL`."""

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if self.at < 0:
            raise ValueError(f"an incident of {self.backend} is at {self.at}: times are zero or more")


class Node:
    """A member's engine, and what the probes have seen of it."""

    __slots__ = (
        "backend",
        "change",
        "delay",
        "engine",
        "half",
        "health",
        "member",
        "retry_after_s",
        "scrape_idle_at",
        "scrape_working_at",
        "up",
        "wake",
    )

    def __init__(self, member: Member, timing: Timing) -> None:
        self.member = member
        self.backend = member.backend
        self.engine = Engine(member.settings)
        self.half = member.rtt // 2
        self.delay = self.half + member.overhead
        """From the router to the engine's queue."""
        self.up = member.starts <= 0
        self.change = Change.MENDED
        self.retry_after_s = 1.0
        self.health = Hysteresis(timing.up, timing.down)
        self.scrape_working_at = 0
        """From when on its engine's figures are asked for again, while it works ..."""
        self.scrape_idle_at = 0
        """... and while nothing runs on it."""
        self.wake = -1
        """When its engine is looked at next; below zero: never."""
