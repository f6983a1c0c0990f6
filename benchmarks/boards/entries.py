"""The policies of a leaderboard, and what each is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from policies import names, parameters
from policies.match import LOCAL
from sim.cluster_file import ClusterFile

QUEUE_AND_BATCH = "4q+r"
EQUAL_WEIGHTS = "weighted-scores 1-1-1"
"""Of llm-d's scorers; its authors' better weights are 3, 2, 2, which are the defaults of `weighted-scores`."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a leaderboard."""

    name: str
    policy: str
    """A name of the registry, or `package.module:Class`."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """Parameters that are not searched."""
    searched_with: Mapping[str, Any] = field(default_factory=dict)
    """More of them, while it is searched: without, its parameters would mean nothing."""
    tuned: bool = True
    """Whether its parameters are searched, if it has any that can be."""

    @property
    def searched(self) -> bool:
        return self.tuned and any(one.tunable is not None for one in parameters(self.policy))


def entries(cluster: ClusterFile) -> list[Entry]:
    """All of the registry, by name, and those that published ones were compared with."""
    promised = {"ttft": cluster.sla.ttft, "tpot": cluster.sla.tpot}
    told: dict[str, dict[str, Any]] = {
        "forecast": promised,
        "mooncake": promised,
        "cost": promised,
        "geo": {"home": list(_home(cluster))},
    }
    with_: dict[str, dict[str, Any]] = {"weighted-scores": {"picker": "softmax"}}
    found = [Entry(name, name, told.get(name, {}), with_.get(name, {})) for name in names()]
    equal = {"scorers": {"prefix": 1.0, "queue": 1.0, "kv": 1.0}}
    return [
        *found,
        Entry(QUEUE_AND_BATCH, "benchmarks.boards.baselines:QueueAndBatch"),
        Entry(EQUAL_WEIGHTS, "weighted-scores", equal, tuned=False),
    ]


def _home(cluster: ClusterFile) -> tuple[float, float]:
    """Where the local site stands. Raises ValueError."""
    for one in cluster.backends:
        if one.section.site == LOCAL and one.site.location is not None:
            return one.site.location
    raise ValueError(f"cluster {cluster.name} does not say where its local site stands")
