"""What arrives: one record for each request of a trace, whether it was read or made up.

Readers of public traces are in `sim/traces/`, the generator in `sim/generator.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple


class Arrival(NamedTuple):
    """One request. Tokens are counts, times microseconds since the beginning of the trace."""

    at: int
    """Microseconds: 1_500_000 is a second and a half after the beginning."""
    prompt_tokens: int
    output_tokens: int
    hashes: tuple[int, ...] = ()
    """One for each full unit of `Workload.unit_tokens` of its prompt; each stands for all that is before
    it, too. Units of the answer may follow, where a later request continues it."""
    tenant: str = "default"
    model: str = ""
    """Empty: whatever there is."""
    data_class: str = "public"
    priority: int = 0
    session: str = ""
    """Requests of one conversation share it."""
    think: int = -1
    """Zero or more: it comes so long after the answer to the one before it in its session, whatever `at`
    says (closed loop); below zero: it comes at `at` (open loop)."""
    labels: tuple[tuple[str, str], ...] = ()
    """Those of its key: name and value."""
    endpoint: str = "chat"
    stream: bool = True


@dataclass(frozen=True, slots=True)
class Problem:
    """A line that could not be read."""

    file: str
    line: int
    """From 1."""
    column: str
    """Its name; empty: the line as a whole."""
    message: str

    def __str__(self) -> str:
        column = f", {self.column}" if self.column else ""
        return f"{self.file}, line {self.line}{column}: {self.message}"


@dataclass(slots=True)
class Workload:
    """Requests in order of arrival."""

    name: str
    arrivals: list[Arrival]
    unit_tokens: int = 0
    """Tokens for which one hash stands; 0: no prompt shares anything with another."""
    problems: list[Problem] = field(default_factory=list)
    """The first few lines that were left out."""
    left_out: int = 0
    """Lines that were."""
    missing: int = 0
    """Requests that these lines stood for, where a line says how many: the load is so much too low."""

    @property
    def missing_share(self) -> float:
        """Of the requests that there would be."""
        return self.missing / (self.missing + len(self.arrivals)) if self.missing else 0.0

    def __len__(self) -> int:
        return len(self.arrivals)

    def __iter__(self) -> Iterator[Arrival]:
        return iter(self.arrivals)

    @property
    def span(self) -> int:
        """From the first arrival to the last, microseconds."""
        return self.arrivals[-1].at - self.arrivals[0].at if self.arrivals else 0

    def scaled(self, factor: float) -> Workload:
        """The same requests, `factor` times as many in a second."""
        if not factor > 0:
            raise ValueError("a load is scaled by a factor above zero")
        arrivals = [arrival._replace(at=round(arrival.at / factor)) for arrival in self.arrivals]
        return replace(self, name=f"{self.name} x{factor:g}", arrivals=arrivals)


def in_order(arrivals: Iterable[Arrival]) -> list[Arrival]:
    """Sorted by time; those of one moment keep their order."""
    return sorted(arrivals, key=lambda arrival: arrival.at)
