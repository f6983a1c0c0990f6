"""The leaderboards: which trace on which cluster, at what speed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple

from benchmarks.boards.conversations import Conversations
from sim.cluster_file import ClusterFile, read_cluster
from sim.profile import dump_profile
from sim.traces import Span, read_workload
from sim.traffic import Loop, Traffic, cut

HERE: Final = Path(__file__).parent
DATA: Final = Path(__file__).parents[3] / "shared" / "data"
COPES: Final = 0.95
"""Share within the SLA of the best untuned policy on the training part, from which it copes (`--speeds`)."""


class Piece(NamedTuple):
    """Of a trace."""

    start_s: float
    duration_s: float


@dataclass(frozen=True, slots=True)
class Setup:
    """One trace on one cluster."""

    name: str
    """Of the cluster file, too."""
    trace: str
    """File under `shared/data`."""
    training: Piece
    test: Piece
    speed: float
    """Times the load of the trace; `--speeds` finds it."""
    loops: tuple[Loop, ...] = (Loop.OPEN,)
    conversations: bool = False
    """Whether they are told by the hashes of the prompts."""
    control: bool = False
    """Whether it is only played with the policies that are compared in `claims.py`, to say why they differ."""

    @property
    def cluster_path(self) -> Path:
        return HERE / f"{self.name}.yaml"

    @property
    def trace_path(self) -> Path:
        return DATA / self.trace

    @property
    def machines(self) -> str:
        """The cluster file and the profiles that it names, as text. Raises FileProblems and OSError."""
        profiles = {dump_profile(one.profile) for one in self.cluster().backends}
        return "".join([self.cluster_path.read_text(encoding="utf-8"), *sorted(profiles)])

    def cluster(self) -> ClusterFile:
        """Raises FileProblems and OSError."""
        return read_cluster(self.cluster_path)

    def traffic(self, piece: Piece, loop: Loop = Loop.OPEN) -> Traffic:
        """What is played of a piece. Raises OSError and ValueError."""
        sla = self.cluster().sla
        kind = Conversations if self.conversations else Traffic
        if self.trace.startswith("servegen"):
            return Traffic(self.trace_path, Span(*piece), loop=loop)
        whole = read_workload(self.trace_path)
        return kind(cut(whole, *piece), loop=loop, ttft_s=sla.ttft, tpot_s=sla.tpot)

    def shortened(self, duration_s: float) -> Setup:
        """With so much of each piece at most, and the same load."""
        training, test = (
            piece._replace(duration_s=min(piece.duration_s, duration_s))
            for piece in (self.training, self.test)
        )
        return replace(self, training=training, test=test)


SETUPS: Final = (
    Setup(
        "azure",
        "azure/AzureLLMInferenceTrace_2023_conv.csv.gz",
        training=Piece(0.0, 1500.0),
        test=Piece(2100.0, 1400.0),
        speed=2.1,
    ),
    Setup(
        "mooncake",
        "mooncake/conversation_trace.jsonl.gz",
        training=Piece(0.0, 1500.0),
        test=Piece(2100.0, 1400.0),
        speed=1.1,
        loops=(Loop.OPEN, Loop.CLOSED),
        conversations=True,
    ),
    Setup(
        "alike",
        "mooncake/conversation_trace.jsonl.gz",
        training=Piece(0.0, 1500.0),
        test=Piece(2100.0, 1400.0),
        speed=1.1,
        conversations=True,
        control=True,
    ),
    Setup(
        "servegen",
        "servegen/deepseek-r1_rates.csv.gz",
        training=Piece(14 * 3600.0, 400.0),
        test=Piece(14 * 3600.0 + 1800.0, 400.0),
        speed=0.6,
    ),
)
