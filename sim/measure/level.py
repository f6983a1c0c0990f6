"""What was measured at one concurrency: its requests one by one, and their figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sim.measure.wire import Answer


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request. Times are seconds; None: there was none."""

    sent_s: float
    """Since the level began."""
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float | None
    """From sending it to the last token."""
    prompt_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None
    error: str
    """Empty: the answer is whole."""

    @classmethod
    def of(cls, answer: Answer, sent_at: float, began_at: float) -> RequestRecord:
        """From an answer that has ended."""
        first, last, tokens = answer.first_at, answer.last_at, answer.output_tokens
        decoded = None if first is None or last is None else last - first
        return cls(
            sent_s=sent_at - began_at,
            ttft_s=None if first is None else first - sent_at,
            tpot_s=decoded / (tokens - 1) if decoded is not None and tokens and tokens > 1 else None,
            e2e_s=None if last is None else last - sent_at,
            prompt_tokens=answer.prompt_tokens,
            output_tokens=tokens,
            cached_tokens=answer.cached_tokens,
            error=answer.error,
        )

    def tokens_by(self, at_s: float) -> float:
        """Output tokens there so long after the level began, as if they had come evenly. Only of a whole answer."""
        assert self.ttft_s is not None
        assert self.e2e_s is not None
        assert self.output_tokens is not None
        elapsed = at_s - self.sent_s
        if elapsed < self.ttft_s:
            return 0.0
        if elapsed >= self.e2e_s:
            return float(self.output_tokens)
        return 1 + (self.output_tokens - 1) * (elapsed - self.ttft_s) / (self.e2e_s - self.ttft_s)


@dataclass(frozen=True, slots=True)
class Summary:
    """Mean and percentiles, linear between neighbours as numpy's (and vLLM's) are."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary | None:
        """None: there are no values."""
        if not values:
            return None
        return cls(float(np.mean(values)), *map(float, np.percentile(values, (50, 90, 99))))


@dataclass(frozen=True, slots=True)
class Level:
    """One concurrency. Times are seconds, rates per second; None: no answer says it."""

    concurrency: int
    completed: int
    """Answers that are whole; all figures below are of these."""
    failed: int
    errors: dict[str, int]
    """How many requests failed with each message."""
    interrupted: bool
    """The user stopped it: what was under way is not counted."""
    duration_s: float
    """From the first request to the last answer."""
    prompt_tokens: int
    cached_tokens: int | None
    """Of the prompt tokens, those that the server found in its prefix cache; None: it reports none."""
    output_tokens: int
    output_tokens_per_s: float
    """Over the whole duration, as vLLM's `output_throughput`."""
    steady_output_tokens_per_s: float | None
    """Over the time in which no user was out of work. None: every request was sent at the start."""
    output_tokens_per_s_per_user: float
    """Output throughput / concurrency: section 3.3 of the white paper."""
    request_output_tokens_per_s: float | None
    """Mean over the requests of output tokens / end to end."""
    requests_per_s: float
    ttft_s: Summary | None
    tpot_s: Summary | None
    e2e_s: Summary | None
    client_cpu: float
    """Processor time that the measuring took, in cores."""
    warm_up_error: str
    """Why the request that brings a warm beginning into the cache failed; empty: it did not, or there was none."""
    requests: list[RequestRecord]

    @classmethod
    def of(
        cls,
        concurrency: int,
        requests: list[RequestRecord],
        duration_s: float,
        cpu_s: float = 0.0,
        *,
        interrupted: bool = False,
        warm_up_error: str = "",
    ) -> Level:
        """From its requests. ValueError: it took no time."""
        if not duration_s > 0:
            raise ValueError("a level takes time")
        whole = [request for request in requests if not request.error]
        output = sum(request.output_tokens or 0 for request in whole)
        cached = [request.cached_tokens for request in whole if request.cached_tokens is not None]
        rates = [
            request.output_tokens / request.e2e_s
            for request in whole
            if request.output_tokens and request.e2e_s
        ]
        return cls(
            concurrency=concurrency,
            completed=len(whole),
            failed=len(requests) - len(whole),
            errors=dict(Counter(request.error for request in requests if request.error).most_common()),
            interrupted=interrupted,
            duration_s=duration_s,
            prompt_tokens=sum(request.prompt_tokens or 0 for request in whole),
            cached_tokens=sum(cached) if cached else None,
            output_tokens=output,
            output_tokens_per_s=output / duration_s,
            steady_output_tokens_per_s=_steady(requests),
            output_tokens_per_s_per_user=output / duration_s / concurrency,
            request_output_tokens_per_s=float(np.mean(rates)) if rates else None,
            requests_per_s=len(whole) / duration_s,
            ttft_s=Summary.of([request.ttft_s for request in whole if request.ttft_s is not None]),
            tpot_s=Summary.of([request.tpot_s for request in whole if request.tpot_s is not None]),
            e2e_s=Summary.of([request.e2e_s for request in whole if request.e2e_s is not None]),
            client_cpu=cpu_s / duration_s,
            warm_up_error=warm_up_error,
            requests=requests,
        )


def _steady(requests: Sequence[RequestRecord]) -> float | None:
    """Until the last request was sent, every user had one under way."""
    end = max((request.sent_s for request in requests), default=0.0)
    whole = [request for request in requests if not request.error]
    if not any(request.sent_s + (request.e2e_s or 0.0) <= end for request in whole):
        return None
    return sum(request.tokens_by(end) for request in whole) / end
