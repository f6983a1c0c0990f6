"""Seeing: counters, histograms, the request log and the records of recent decisions.

Per request a few integers are added; nothing of a metrics library runs on the data path. `Metrics.collect` turns
them into families when somebody scrapes. Token and latency metrics carry OpenTelemetry's `gen_ai` names
(semantic conventions for generative AI, Prometheus form), routing metrics begin with `tidegate_`. Labels are
bounded: backends are configured, and models are those that backends serve; anything else is `other`.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import orjson
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from policies.routing import Routing
from proxy import records
from proxy.errors import RequestError
from proxy.http1 import RequestHead

if TYPE_CHECKING:
    from policies.state import Backend
    from probes.passive import AttemptError
    from proxy.exchange import Exchange
    from proxy.runtime import Runtime

SECONDS: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
"""Buckets of `gen_ai.client.operation.duration`."""
TOKEN_SECONDS: Final = (
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
)
OVERHEAD_SECONDS: Final = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1)
MAX_SERIES: Final = 1000
"""Pairs of backend and model that get figures of their own."""


class Histogram:
    """Counts by bucket and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
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
        self.refusals: dict[str, int] = {}
        """By error code: requests that were answered without a backend."""
        self.failed_attempts: dict[tuple[str, str], int] = {}
        """By backend and kind of failure."""
        self.queue = Histogram(SECONDS)
        self.overhead = Histogram(OVERHEAD_SECONDS)
        self.spilled: dict[str, int] = {}
        """By backend: requests that went there because a tier before it was full."""
        self.reloads_ok = 0
        self.reloads_failed = 0
        self.reload_ok = True
        self.recent: deque[Record] = deque(maxlen=recent)
        self.log = log

    def ended(self, exchange: Exchange) -> None:
        """An exchange is over: count it, log it, remember its decision."""
        row = exchange.row
        backend = row.backend
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
            if exchange.routings[-1].passed:
                self.spilled[backend] = self.spilled.get(backend, 0) + 1
        if row.code:
            self.refusals[row.code] = self.refusals.get(row.code, 0) + 1
        self.queue.observe(row.queue_s)
        if self.recent.maxlen:
            self.recent.append(Record(exchange.id, row, exchange.routings))
        if self.log is not None:
            self.log.write((exchange.id, row))

    def rejected(self, error: RequestError, peer: str, head: RequestHead | None) -> None:
        """A request was refused before it became an exchange."""
        self.refusals[error.code] = self.refusals.get(error.code, 0) + 1
        if self.log is not None and error.code != "auth_rate_limit":
            self.log.write(
                {
                    "time": time.time(),
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
        for series in self.series.values():
            for outcome, count in series.outcomes.items():
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


class Record(NamedTuple):
    """One exchange as `tidegate explain` shows it."""

    id: str
    row: records.Row
    routings: list[Routing]

    def explain(self) -> dict[str, Any]:
        """Decisions with candidates and what was removed why; forecast against what happened."""
        row = self.row
        decisions = []
        for routing in self.routings:
            decision = routing.decision
            decisions.append(
                {
                    "rule": routing.rule,
                    "decided_by": routing.decided_by,
                    "decision": type(decision).__name__.lower(),
                    "backend": getattr(decision, "backend", None),
                    "fallbacks": list(getattr(decision, "fallbacks", ())),
                    "reason": decision.reason,
                    "scores": dict(getattr(decision, "scores", {})),
                    "propensity": getattr(decision, "propensity", None),
                    "tier": routing.tier,
                    "tiers_passed": [None if value == float("inf") else value for value in routing.passed],
                    "spilling": routing.spilling,
                    "held_s": routing.held_s,
                    "removed": dict(routing.removed or {}),
                    "candidates": [
                        {name: _finite(value) for name, value in candidate._asdict().items()}
                        for candidate in routing.candidates
                    ],
                }
            )
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
            "status": row.status,
            "outcome": row.outcome,
            "code": row.code,
            "backend": row.backend,
            "site": row.site,
            "attempts": row.attempts,
            "decisions": decisions,
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


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and value in (float("inf"), float("-inf")) else value


def _log_line(request_id: str, row: records.Row) -> dict[str, Any]:
    return {
        "time": row.arrived,
        "id": request_id,
        "tenant": row.tenant,
        "key": row.key_id,
        "endpoint": row.endpoint,
        "model": row.model,
        "stream": row.stream,
        "status": row.status,
        "outcome": row.outcome,
        "code": row.code,
        "backend": row.backend,
        "site": row.site,
        "rule": row.rule,
        "policy": row.policy,
        "reason": row.reason,
        "attempts": row.attempts,
        "prompt_tokens": row.prompt_tokens,
        "cached_tokens": row.cached_tokens,
        "completion_tokens": row.completion_tokens,
        "usage": row.usage_source,
        "queue_s": row.queue_s,
        "ttft_s": row.ttft_s,
        "total_s": row.total_s,
        "overhead_s": row.overhead_s,
    }


class RequestLog:
    """JSON lines, written by a thread of their own: a slow disk or pipe never stops the loop.

    When the reader falls behind by more than `MAX_PENDING` lines, lines are dropped and counted; the ledger has
    them all.
    """

    MAX_PENDING: Final = 100_000

    def __init__(self, descriptor: int, interval_s: float = 0.1) -> None:
        self.dropped = 0
        self._descriptor = descriptor
        self._interval_s = interval_s
        self._lines: deque[tuple[str, records.Row] | dict[str, Any]] = deque()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="request log", daemon=True)
        self._thread.start()

    @classmethod
    def to(cls, where: str) -> RequestLog | None:
        """`-`: standard output; `off`: none; else a file that is appended to. Raises OSError."""
        if where == "off":
            return None
        if where == "-":
            return cls(sys.stdout.fileno())
        return cls(os.open(where, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640))

    def write(self, line: tuple[str, records.Row] | dict[str, Any]) -> None:
        """A finished request (its id and row), or any other line; it is put into words in the thread."""
        if len(self._lines) >= self.MAX_PENDING:
            self.dropped += 1
        else:
            self._lines.append(line)

    def close(self) -> None:
        """Write what is left and end."""
        self._stop.set()
        self._thread.join(timeout=2.0)

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        lines = self._lines
        while lines:
            block = [_encode(lines.popleft()) for _ in range(min(len(lines), 100))]
            data = memoryview(b"\n".join(block) + b"\n")
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError:
                self.dropped += len(block)
                return


def _encode(line: tuple[str, records.Row] | dict[str, Any]) -> bytes:
    return orjson.dumps(line if isinstance(line, dict) else _log_line(*line))


class Metrics:
    """A `prometheus_client` Collector over the proxy's own figures."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def collect(self) -> Iterator[Metric]:
        observer = self._runtime.observer
        yield from _requests(observer)
        yield from self._backends()
        yield _histogram(
            "tidegate_queue_seconds", "Time that requests were held.", [], [((), observer.queue)]
        )
        text = "Time from a whole request to its dispatch, holding excluded."
        yield _histogram("tidegate_overhead_seconds", text, [], [((), observer.overhead)])
        yield from self._process()

    def _backends(self) -> Iterator[Metric]:
        runtime = self._runtime
        now = runtime.now()
        gauges: dict[str, tuple[str, Callable[[Backend], float]]] = {
            "tidegate_backend_available": ("1: requests may be sent to it.", lambda b: float(b.available)),
            "tidegate_backend_in_flight": ("Requests leased to it.", lambda b: float(b.in_flight)),
            "tidegate_backend_slots": (
                "Requests it serves at once inside its SLA.",
                lambda b: float(b.slots),
            ),
            "tidegate_backend_saturation": ("How full it is, 1: full.", lambda b: b.saturation(now)),
            "tidegate_backend_rtt_seconds": ("Average network round trip.", lambda b: b.rtt_s),
            "tidegate_backend_breaker_open": (
                "1: its circuit breaker is open or half-open.",
                lambda b: float(b.breaker.state(now) != "closed"),
            ),
        }
        for name, (text, read) in gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=["backend", "site"])
            for backend in runtime.fleet:
                gauge.add_metric([backend.name, backend.site], read(backend))
            yield gauge
        failed = CounterMetricFamily(
            "tidegate_failed_attempts", "Attempts on a backend that failed.", labels=["backend", "error"]
        )
        for (backend_name, error), count in runtime.observer.failed_attempts.items():
            failed.add_metric([backend_name, error], count)
        yield failed

    def _process(self) -> Iterator[Metric]:
        runtime = self._runtime
        observer = runtime.observer
        yield GaugeMetricFamily("tidegate_queued", "Requests that are held.", value=runtime.valve.queued)
        yield GaugeMetricFamily(
            "tidegate_open_exchanges", "Requests at backends.", value=len(runtime.exchanges)
        )
        yield GaugeMetricFamily("tidegate_client_connections", "Connections.", value=len(runtime.clients))
        yield GaugeMetricFamily("tidegate_ledger_lag_rows", "Rows not in SQL yet.", value=runtime.ledger.lag)
        yield GaugeMetricFamily(
            "tidegate_journal_failed",
            "1: usage cannot be recorded.",
            value=float(bool(runtime.journal.failed)),
        )
        yield GaugeMetricFamily(
            "tidegate_config_last_reload_successful",
            "1: the last reload was.",
            value=float(observer.reload_ok),
        )
        yield CounterMetricFamily(
            "tidegate_retries_refused", "Retries over the budget.", value=runtime.retry_budget.refused
        )
        yield CounterMetricFamily(
            "tidegate_log_lines_dropped",
            "Request log lines lost.",
            value=observer.log.dropped if observer.log else 0,
        )


def _requests(observer: Observer) -> Iterator[Metric]:
    labels = ["backend", "gen_ai_request_model"]
    requests = CounterMetricFamily("tidegate_requests", "Requests by outcome.", labels=[*labels, "outcome"])
    tokens = CounterMetricFamily(
        "tidegate_tokens", "Tokens as metered.", labels=[*labels, "gen_ai_token_type"]
    )
    cost = CounterMetricFamily("tidegate_cost", "Cost in the ledger's currency.", labels=labels)
    for key, series in observer.series.items():
        for outcome, count in series.outcomes.items():
            if count:
                requests.add_metric([*key, outcome], count)
        for kind, count in (
            ("input", series.prompt),
            ("cached_input", series.cached),
            ("output", series.completion),
        ):
            tokens.add_metric([*key, kind], count)
        cost.add_metric(list(key), series.cost_nano / 1e9)
    yield requests
    yield tokens
    yield cost
    for name, text, attribute in (
        (
            "gen_ai_server_time_to_first_token_seconds",
            "From arrival to the first token, holding included.",
            "ttft",
        ),
        ("gen_ai_server_time_per_output_token_seconds", "Per token after the first.", "tpot"),
        ("gen_ai_server_request_duration_seconds", "From arrival to the end.", "duration"),
    ):
        rows = [(key, getattr(series, attribute)) for key, series in observer.series.items()]
        yield _histogram(name, text, labels, rows)
    refusals = CounterMetricFamily("tidegate_errors", "Errors answered, by code.", labels=["code"])
    for code, count in observer.refusals.items():
        refusals.add_metric([code], count)
    yield refusals
    spilled = CounterMetricFamily(
        "tidegate_spilled_requests", "Requests that a fuller tier passed on.", labels=["backend"]
    )
    for backend, count in observer.spilled.items():
        spilled.add_metric([backend], count)
    yield spilled


def _histogram(
    name: str, text: str, labels: list[str], rows: Sequence[tuple[tuple[str, ...], Histogram]]
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, text, labels=labels)
    for key, histogram in rows:
        family.add_metric(list(key), histogram.buckets(), histogram.sum)
    return family
