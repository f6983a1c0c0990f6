"""The requests of a simulation, and what it saw of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from policies.base import RequestFacts
from sim.engine import Sequence
from sim.members import Node
from sim.router import Request
from sim.workload import Arrival


class Trip(Request):
    """A request of a workload."""

    __slots__ = ("arrival", "cached_tokens", "index", "node", "preemptions", "sequence")

    def __init__(self, index: int, arrival: Arrival, facts: RequestFacts) -> None:
        super().__init__(facts)
        self.index = index
        """Its place in the workload."""
        self.arrival = arrival
        self.node: Node | None = None
        """Where its present attempt goes."""
        self.sequence: Sequence | None = None
        """Of its present attempt, while an engine has it, and when that has finished it."""
        self.cached_tokens = 0
        self.preemptions = 0

    def __repr__(self) -> str:
        times = ", ".join(
            f"{name} {value:.3f}"
            for name, value in (
                ("ttft_s", self.ttft_s),
                ("tpot_s", self.tpot_s),
                ("held_s", self.held_s or None),
            )
            if value is not None
        )
        end = "under way" if self.end is None else self.end.value
        reason = f" ({self.reason})" if self.reason else ""
        where = f" at {self.backend}" if self.backend else ""
        return f"<Trip {self.index}: {end}{reason}{where}{', ' if times else ''}{times}>"

    @property
    def tpot_s(self) -> float | None:
        """Seconds per token after the first; None: there is no such token, or no complete answer."""
        tokens = self.arrival.output_tokens
        if self.sequence is None or self.sequence.finished < 0 or tokens < 2:
            return None
        return (self.ended - self.first_token) / (tokens - 1)


@dataclass(slots=True)
class Result:
    """What a simulation saw."""

    trips: list[Trip] = field(default_factory=list)
    """In the order of their arrivals."""
    events: int = 0
    """That were processed."""
    ended: int = 0
    """Virtual time at the end, microseconds."""
    moves: list[tuple[int, str, bool]] = field(default_factory=list)
    """(time, backend, available): each change of what the router holds available."""
