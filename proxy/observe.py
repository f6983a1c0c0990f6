"""Seeing: what is counted of every request, and the records of recent decisions.

Per request a few integers are added; nothing of a metrics library runs on the data path (`metrics.py` turns the
figures into families when somebody scrapes). What is kept is bounded: backends are configured, models are those
that backends serve, and of decisions the last ones are remembered.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from policies.routing import Routing
from proxy import records
from proxy.errors import RequestError
from proxy.http1 import RequestHead
from proxy.policy_failures import PolicyFailures
from proxy.requestlog import RequestLog

if TYPE_CHECKING:
    from probes.passive import AttemptError
    from proxy.exchange import Exchange

_Bounds: TypeAlias = tuple[float, ...]
SECONDS: Final[_Bounds] = (
    *(0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64),
    *(1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92),
)
"""Buckets of `gen_ai.client.operation.duration`."""
TOKEN_SECONDS: Final[_Bounds] = (
    *(0.0025, 0.005, 0.01, 0.025, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
)
OVERHEAD_SECONDS: Final[_Bounds] = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1)
MAX_SERIES: Final = 1000
"""Pairs of backend and model that get figures of their own."""


class Histogram:
    """Counts by bucket and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: _Bounds) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts, as the exposition format wants them."""
        total, rows = 0, []
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += count
            rows.append((str(bound), float(total)))
        return rows


class Series:
    """Figures of one model on one backend."""

    __slots__ = (
        "cached",
        "completion",
        "cost_nano",
        "duration",
        "outcomes",
        "prompt",
        "requests",
        "tpot",
        "ttft",
    )

    def __init__(self) -> None:
        self.requests = 0
        self.outcomes = dict.fromkeys(records.OUTCOMES, 0)
        self.prompt = 0
        self.cached = 0
        self.completion = 0
        self.cost_nano = 0
        self.ttft = Histogram(SECONDS)
        self.tpot = Histogram(TOKEN_SECONDS)
        self.duration = Histogram(SECONDS)


class Observer:
    """What the proxy has seen since it started."""

    def __init__(self, recent: int = 1000, log: RequestLog | None = None) -> None:
        self.series: dict[tuple[str, str], Series] = {}
        self.outcomes = dict.fromkeys(records.OUTCOMES, 0)
        """All requests, those that reached no backend too."""
        self.refusals: dict[str, int] = {}
        """By error code: requests that were answered without a backend."""
        self.failed_attempts: dict[tuple[str, str], int] = {}
        """By backend and kind of failure."""
        self.hedges: dict[str, int] = {}
        """Second attempts for late first tokens, by what became of them."""
        self.queue = Histogram(SECONDS)
        self.overhead = Histogram(OVERHEAD_SECONDS)
        self.spilled: dict[str, int] = {}
        """By backend: requests that went there because a tier before it was full."""
        self.reloads_ok = 0
        self.reloads_failed = 0
        self.reload_ok = True
        self.restart_for: list[str] = []
        """Configured keys that take effect at the next start only."""
        self.policies = PolicyFailures()
        self.recent: deque[Record] = deque(maxlen=recent)
        self.log = log

    def ended(self, exchange: Exchange) -> None:
        """An exchange is over: count it, log it, remember its decision."""
        row = exchange.row
        backend = row.backend
        self.outcomes[row.outcome] += 1
        if backend:
            key = (backend, row.served_model)
            series = self.series.get(key) or self._new_series(key)
            series.requests += 1
            series.outcomes[row.outcome] += 1
            series.prompt += row.prompt_tokens
            series.cached += row.cached_tokens
            series.completion += row.completion_tokens
            series.cost_nano += row.cost_nano
            series.duration.observe(row.total_s)
            if row.ttft_s is not None:
                series.ttft.observe(row.ttft_s)
                if row.completion_tokens > 1:
                    series.tpot.observe((row.total_s - row.ttft_s) / (row.completion_tokens - 1))
            self.overhead.observe(row.overhead_s)
            # inf: none of that tier's backends was available, so it was down and not full.
            routing = exchange.routing
            if routing is not None and any(saturation != inf for saturation in routing.passed):
                self.spilled[backend] = self.spilled.get(backend, 0) + 1
        if row.code:
            self.refusals[row.code] = self.refusals.get(row.code, 0) + 1
        self.queue.observe(row.queue_s)
        if self.recent.maxlen:
            self.recent.append(Record(exchange.id, row, exchange.routings))
        if self.log is not None:
            self.log.write((exchange.id, row))

    def rejected(self, error: RequestError, peer: str, head: RequestHead | None, request_id: str) -> None:
        """A request was refused before it became an exchange."""
        self.outcomes[records.CLIENT_ERROR] += 1
        self.refusals[error.code] = self.refusals.get(error.code, 0) + 1
        if self.log is not None and error.code != "auth_rate_limit":
            self.log.write(
                {
                    "time": time.time(),
                    "id": request_id,
                    "peer": peer,
                    "path": head.target.partition(b"?")[0][:200].decode("latin-1")
                    if head is not None
                    else None,
                    "status": error.status,
                    "outcome": records.CLIENT_ERROR,
                    "code": error.code,
                    "message": error.message,
                }
            )

    def attempt_failed(self, backend: str, error: AttemptError | int) -> None:
        """An attempt on a backend failed; its request may still succeed elsewhere."""
        key = (backend, str(error) if isinstance(error, int) else error.value)
        self.failed_attempts[key] = self.failed_attempts.get(key, 0) + 1

    def find(self, request_id: str) -> Record | None:
        """The latest record of a request, by its id or its operation id."""
        for record in reversed(self.recent):
            if request_id in (record.id, record.row.op):
                return record
        return None

    def totals(self) -> dict[str, int]:
        """Requests since start, by how they ended."""
        totals = dict.fromkeys(("total", "ok", "rejected", "failed", "client_gone", "client_error"), 0)
        for outcome, count in self.outcomes.items():
            totals["total"] += count
            totals[_STATE_NAMES[outcome]] += count
        return totals

    def _new_series(self, key: tuple[str, str]) -> Series:
        if len(self.series) >= MAX_SERIES:
            key = (key[0], "other")
        return self.series.setdefault(key, Series())


_STATE_NAMES: Final = {
    records.OK: "ok",
    records.CLIENT_ERROR: "client_error",
    records.REJECTED: "rejected",
    records.BACKEND_FAILED: "failed",
    records.CLIENT_GONE: "client_gone",
    records.CUT: "failed",
    records.SHUTDOWN: "failed",
    records.LOST: "failed",
}


@dataclass(slots=True)
class Record:
    """One exchange as `tidegate explain` shows it."""

    id: str
    row: records.Row
    routings: list[Routing]

    def explain(self) -> dict[str, Any]:
        """Decisions with candidates and what was removed why; forecast against what happened."""
        row = self.row
        forecast = next(
            (c.ttft_s for r in self.routings for c in r.candidates if c.name == row.backend and c.ttft_s > 0),
            None,
        )
        return {
            "request_id": self.id,
            "operation": row.op,
            "tenant": row.tenant,
            "model": row.model,
            "served_model": row.served_model,
            "data_class": row.data_class,
            "stream": row.stream,
            "status": row.status,
            "outcome": row.outcome,
            "code": row.code,
            "backend": row.backend,
            "site": row.site,
            "attempts": row.attempts,
            "hedge": row.hedge,
            "overhead_prompt_tokens": row.overhead_prompt_tokens,
            "overhead_completion_tokens": row.overhead_completion_tokens,
            "decisions": [decision_shown(routing) for routing in self.routings],
            "forecast": {"ttft_s": forecast, "completion_tokens": row.expected_tokens},
            "happened": {
                "ttft_s": row.ttft_s,
                "completion_tokens": row.completion_tokens,
                "prompt_tokens": row.prompt_tokens,
                "queue_s": row.queue_s,
                "total_s": row.total_s,
                "overhead_s": row.overhead_s,
            },
        }


def decision_shown(routing: Routing) -> dict[str, Any]:
    """One decision as `tidegate explain` shows it."""
    decision = routing.decision
    return {
        "rule": routing.rule,
        "part": routing.part,
        "decided_by": routing.decided_by,
        "decision": type(decision).__name__.lower(),
        "backend": getattr(decision, "backend", None),
        "fallbacks": list(getattr(decision, "fallbacks", ())),
        "reason": decision.reason,
        "scores": dict(getattr(decision, "scores", {})),
        "propensity": getattr(decision, "propensity", None),
        "tier": routing.tier,
        "tiers_passed": [_finite(value) for value in routing.passed],
        "spilling": routing.spilling,
        "held_s": routing.held_s,
        "failure": routing.failure,
        "removed": dict(routing.removed or {}),
        "candidates": [
            {name: _finite(value) for name, value in candidate._asdict().items()}
            for candidate in routing.candidates
        ],
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and value in (float("inf"), float("-inf")) else value
