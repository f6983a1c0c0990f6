"""The metrics page of a vLLM 0.32: the series that routers and dashboards read, under vLLM's names and labels.

As in vLLM, figures are per sequence: a request with `n = 2` counts its prompt twice, finishes twice, and shows
as two running. Sequences that a client abandoned count their tokens and never finish: vLLM 0.32 leaves
`finished_reason="abort"` at zero, so it stays there. Times are those of the clock on the wall, whatever the
speed of the emulator.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_1_0_0

from sim.engine import EngineSettings
from sim.generation import EngineFigures, TokenSequence

CONTENT_TYPE = CONTENT_TYPE_PLAIN_1_0_0

_TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)


def _length_buckets(longest: int) -> list[int]:
    """1, 2, 5, 10, 20, 50 ... up to a length in tokens."""
    steps = (digit * 10**exponent for exponent in range(12) for digit in (1, 2, 5))
    return [step for step in steps if step <= longest]


class VllmMetrics:
    """Implements `sim.generation.Observer`; `page` renders what it has seen."""

    def __init__(self, model: str, engine: EngineSettings, max_model_len: int) -> None:
        """`model`: the first served name; `engine`: its KV cache has a size."""
        self._registry = CollectorRegistry()
        self._labels = {"model_name": model, "engine": "0"}
        self._prompt_tokens = self._counter("prompt_tokens", "Number of prefill tokens processed.")
        self._generation_tokens = self._counter("generation_tokens", "Number of generation tokens processed.")
        self._cached_tokens = self._counter("prompt_tokens_cached", "Prompt tokens found in the cache.")
        self._prefix_queries = self._counter("prefix_cache_queries", "Tokens looked up in the prefix cache.")
        self._prefix_hits = self._counter("prefix_cache_hits", "Tokens found in the prefix cache.")
        self._preemptions = self._counter("num_preemptions", "Number of preemptions.")
        self._preempted = 0
        self._prefix_cache = engine.prefix_unit_tokens > 0
        self._figures: Callable[[], EngineFigures] = lambda: EngineFigures(0, 0, 0.0)
        success = Counter(
            "vllm:request_success",
            "Count of successfully processed requests.",
            [*self._labels, "finished_reason"],
            registry=self._registry,
        )
        self._success = {
            reason: success.labels(**self._labels, finished_reason=reason)
            for reason in ("stop", "length", "abort", "error", "repetition")
        }
        rejections = Counter(
            "vllm:admission_rejections",
            "Requests refused by a queue limit, by limit.",
            ["model_name", "reason"],
            registry=self._registry,
        )
        self._rejections = {
            reason: rejections.labels(model_name=model, reason=reason)
            for reason in ("max_num_queued_reqs", "max_num_queued_tokens")
        }
        self._ttft = self._histogram("time_to_first_token_seconds", _TTFT_BUCKETS)
        self._inter_token = self._histogram("inter_token_latency_seconds", _TOKEN_BUCKETS)
        self._per_token = self._histogram("request_time_per_output_token_seconds", _TOKEN_BUCKETS)
        self._latency = self._histogram("e2e_request_latency_seconds", _REQUEST_BUCKETS)
        self._queue_time = self._histogram("request_queue_time_seconds", _REQUEST_BUCKETS)
        self._inference_time = self._histogram("request_inference_time_seconds", _REQUEST_BUCKETS)
        self._prefill_time = self._histogram("request_prefill_time_seconds", _REQUEST_BUCKETS)
        self._decode_time = self._histogram("request_decode_time_seconds", _REQUEST_BUCKETS)
        lengths = _length_buckets(max_model_len)
        self._prompt_length = self._histogram("request_prompt_tokens", lengths)
        self._generation_length = self._histogram("request_generation_tokens", lengths)
        self._max_tokens = self._histogram("request_params_max_tokens", lengths)
        self._cache_info(engine, max_model_len)

    def watch(self, figures: Callable[[], EngineFigures]) -> None:
        """Read the gauges from an engine at every scrape."""
        self._figures = figures
        self._gauge("num_requests_running", lambda: figures().running)
        self._gauge("num_requests_waiting", lambda: figures().waiting)
        self._gauge("kv_cache_usage_perc", lambda: figures().kv_use)
        reasons = Gauge(
            "vllm:num_requests_waiting_by_reason",
            "Number of waiting requests by reason.",
            [*self._labels, "reason"],
            registry=self._registry,
        )
        reasons.labels(**self._labels, reason="capacity").set_function(lambda: figures().waiting)
        reasons.labels(**self._labels, reason="deferred").set(0)

    def rejected(self) -> None:
        """A request was refused because too many are running and waiting."""
        self._rejections["max_num_queued_reqs"].inc()

    def page(self) -> bytes:
        """Prometheus text exposition."""
        preemptions = self._figures().preemptions
        self._preemptions.inc(preemptions - self._preempted)
        self._preempted = preemptions
        return generate_latest(self._registry)

    def advanced(self, sequence: TokenSequence, tokens: int, now: float) -> None:
        """More of its tokens are there; the first ones say that the prompt is processed."""
        self._generation_tokens.inc(tokens)
        if sequence.done:
            interval = (now - sequence.last_token_at) / tokens
            for _ in range(tokens):
                self._inter_token.observe(interval)
            return
        self._prompt_tokens.inc(sequence.plan.prompt_tokens)
        self._cached_tokens.inc(sequence.cached_tokens)
        if self._prefix_cache:
            self._prefix_queries.inc(sequence.plan.prompt_tokens)
            self._prefix_hits.inc(sequence.cached_tokens)
        self._ttft.observe(now - sequence.submitted_at)
        for _ in range(tokens - 1):
            self._inter_token.observe(0.0)

    def finished(self, sequence: TokenSequence) -> None:
        """All of its tokens are there."""
        plan = sequence.plan
        self._success[plan.finished_reason].inc()
        end, decode = sequence.last_token_at, sequence.last_token_at - sequence.first_token_at
        admitted_at = sequence.submitted_at + sequence.queued_s
        self._queue_time.observe(sequence.queued_s)
        self._prefill_time.observe(sequence.first_token_at - admitted_at)
        self._latency.observe(end - sequence.submitted_at)
        self._inference_time.observe(end - admitted_at)
        self._decode_time.observe(decode)
        if plan.output_tokens > 1:
            self._per_token.observe(decode / (plan.output_tokens - 1))
        self._prompt_length.observe(plan.prompt_tokens)
        self._generation_length.observe(plan.output_tokens)
        self._max_tokens.observe(plan.max_tokens)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, list(self._labels), registry=self._registry).labels(
            **self._labels
        )

    def _histogram(self, name: str, buckets: tuple[float, ...] | list[int]) -> Histogram:
        text = f"Histogram of {name.replace('_', ' ')}."
        metric = Histogram(f"vllm:{name}", text, list(self._labels), registry=self._registry, buckets=buckets)
        return metric.labels(**self._labels)

    def _gauge(self, name: str, value: Callable[[], float]) -> None:
        text = f"Engine figure {name.replace('_', ' ')}."
        gauge = Gauge(f"vllm:{name}", text, list(self._labels), registry=self._registry)
        gauge.labels(**self._labels).set_function(value)

    def _cache_info(self, engine: EngineSettings, max_model_len: int) -> None:
        assert engine.kv_tokens is not None
        info = {
            "engine": "0",
            "block_size": str(engine.block_tokens),
            "cache_dtype": "auto",
            "enable_prefix_caching": str(self._prefix_cache),
            "gpu_memory_utilization": "0.92",
            "kv_cache_max_concurrency": str(engine.kv_tokens / max_model_len),
            "kv_cache_size_tokens": str(engine.kv_tokens),
            "num_gpu_blocks": str(engine.kv_blocks),
        }
        gauge = Gauge(
            "vllm:cache_config_info",
            "Information of the LLMEngine CacheConfig",
            list(info),
            registry=self._registry,
        )
        gauge.labels(**info).set(1)
