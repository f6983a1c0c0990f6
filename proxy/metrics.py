"""`GET /metrics`: the proxy's figures in the exposition format of Prometheus.

Token and latency metrics carry OpenTelemetry's `gen_ai` names (semantic conventions for generative AI, in
Prometheus form), routing metrics begin with `tidegate_`. Labels are bounded as the figures are (`observe.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from policies.state import Backend
from proxy.observe import Histogram, Observer
from proxy.runtime import Runtime
from proxy.scaling.service import scaling_in
from proxy.scaling.shown import families


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
        yield from families(scaling_in(self._runtime))
        expiry = GaugeMetricFamily(
            "tidegate_certificate_expiry_timestamp_seconds",
            "Unix time at which a certificate for clients ends, or a file in the `tls` of a backend.",
            labels=["certificate"],
        )
        yield from self._plans()
        built = self._runtime.built
        ends = {shown.file: shown.not_after for shown in built.certificates}
        ends |= {used.file: used.not_after for used in built.backend_certificates}
        for file, end in ends.items():
            expiry.add_metric([str(file)], end)
        yield expiry

    def _backends(self) -> Iterator[Metric]:
        runtime = self._runtime
        now, in_spite = runtime.now(), runtime.valve.rules.in_spite
        gauges: dict[str, tuple[str, Callable[[Backend], float]]] = {
            "tidegate_backend_available": ("1: requests may be sent to it.", lambda b: float(b.available)),
            "tidegate_backend_asleep": ("1: a standby that is not ready.", lambda b: float(b.asleep)),
            "tidegate_backend_in_flight": ("Requests leased to it.", lambda b: float(b.in_flight)),
            "tidegate_backend_slots": (
                "Requests it serves at once inside its SLA.",
                lambda b: float(b.slots),
            ),
            "tidegate_backend_full_slots": (
                "The same without slow start and adaptive slots.",
                lambda b: float(b.full_slots),
            ),
            "tidegate_backend_in_spite": (
                "1: it looks sick and is used, since too few others are left.",
                lambda b: float(b.name in in_spite),
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
        probed = CounterMetricFamily(
            "tidegate_probe_tokens",
            "Tokens that probes have used (`probing.generate`); in no ledger.",
            labels=["backend", "gen_ai_token_type"],
        )
        for name, known in runtime.probes().items():
            if (generation := known.get("generation")) and generation["requests"]:
                probed.add_metric([name, "input"], generation["prompt_tokens"])
                probed.add_metric([name, "output"], generation["completion_tokens"])
        yield probed
        failed = CounterMetricFamily(
            "tidegate_failed_attempts", "Attempts on a backend that failed.", labels=["backend", "error"]
        )
        for (backend_name, error), count in runtime.observer.failed_attempts.items():
            failed.add_metric([backend_name, error], count)
        yield failed
        hedges = CounterMetricFamily(
            "tidegate_hedges", "Second attempts for late first tokens: won, lost, failed.", labels=["outcome"]
        )
        for outcome, count in runtime.observer.hedges.items():
            hedges.add_metric([outcome], count)
        yield hedges

    def _plans(self) -> Iterator[Metric]:
        planning = self._runtime.planning
        ratio = GaugeMetricFamily(
            "tidegate_budget_used_ratio",
            "How much of a ceiling this month has used, 1: all of it. `scope`: month, site or template.",
            labels=["scope", "name"],
        )
        waiting = 0
        if planning is not None:
            waiting = planning.shown()["waiting"]
            for used in planning.budgets.used():
                ratio.add_metric([used.ceiling.scope, used.ceiling.name], used.ratio)
        yield ratio
        yield GaugeMetricFamily("tidegate_plans_waiting", "Plans that are not approved yet.", value=waiting)

    def _process(self) -> Iterator[Metric]:
        runtime = self._runtime
        observer = runtime.observer
        yield GaugeMetricFamily("tidegate_queued", "Requests that are held.", value=runtime.valve.queued)
        yield GaugeMetricFamily(
            "tidegate_open_exchanges", "Requests at backends.", value=len(runtime.exchanges)
        )
        yield GaugeMetricFamily("tidegate_client_connections", "Connections.", value=len(runtime.clients))
        yield GaugeMetricFamily("tidegate_tasks", "Tasks in the background.", value=len(runtime.tasks))
        yield GaugeMetricFamily(
            "tidegate_memory_use", "Memory, as a share of its bound.", value=runtime.pressure.use
        )
        yield GaugeMetricFamily(
            "tidegate_shedding_stage",
            "1: keep-alive is dropped, 2: requests are refused, 3: connections are.",
            value=runtime.shedding,
        )
        yield GaugeMetricFamily("tidegate_ledger_lag_rows", "Rows not in SQL yet.", value=runtime.ledger.lag)
        yield GaugeMetricFamily(
            "tidegate_ledger_oldest_seconds",
            "For so long the oldest of them has waited; about half a second while all is well.",
            value=runtime.ledger.oldest_s,
        )
        yield GaugeMetricFamily(
            "tidegate_keys_unread",
            "1: keys cannot be read, so that no new or revoked one is seen.",
            value=float(bool(runtime.keys.trouble)),
        )
        yield CounterMetricFamily(
            "tidegate_ledger_rows_refused",
            "Rows that the database would not take; the log has them.",
            value=runtime.ledger.refused,
        )
        yield GaugeMetricFamily(
            "tidegate_journal_failed",
            "1: usage cannot be recorded.",
            value=float(bool(runtime.journal.failed or runtime.ledger.failed)),
        )
        yield GaugeMetricFamily(
            "tidegate_config_last_reload_successful",
            "1: the last reload was.",
            value=float(observer.reload_ok),
        )
        policies = CounterMetricFamily(
            "tidegate_policy_failures",
            "Calls of a policy that raised or gave no answer; the least loaded backend was chosen instead.",
            labels=["rule", "policy"],
        )
        for key, count in observer.policies.counts.items():
            policies.add_metric(key, count)
        yield policies
        yield CounterMetricFamily(
            "tidegate_retries_refused", "Retries over the budget.", value=runtime.retry_budget.refused
        )
        yield CounterMetricFamily(
            "tidegate_hedges_refused",
            "Second attempts over the budget.",
            value=runtime.hedging.refused if runtime.hedging is not None else 0,
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
        "tidegate_spilled_requests", "Requests it got because a tier before it was full.", labels=["backend"]
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
