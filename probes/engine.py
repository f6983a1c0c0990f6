"""Reading an engine's figures: vLLM's page of metrics -> `Sample`.

The page is Prometheus text (https://prometheus.io/docs/instrumenting/exposition_formats/), some 70 KB of
which a dozen lines matter. One compiled pattern finds those and skips the rest; everything in it that
repeats is possessive, so the time is linear in the page, whatever is on it. What makes no sense (NaN,
infinities, negative counts, broken labels, a last line without its end) is left out; nothing raises.

vLLM renamed some figures; an engine that shows both names is counted once, by the new one. Sums and maxima
run over the rows of one name: a row per data-parallel rank (`engine`) and per served model (`model_name`).
"""

from __future__ import annotations

import re
from math import isfinite
from typing import Final

import aiohttp

from probes.active import fetch
from probes.base import Clock, ProbeError, Sample, Target

METRICS_LIMIT: Final = 2 * 1024 * 1024
"""Longest page that is read, bytes: some thirty ranks."""

# What each figure is called, newest first. Prometheus clients append `_total` to counters; old ones did not.
_RUNNING: Final = (b"num_requests_running",)
_WAITING: Final = (b"num_requests_waiting",)
_KV_USE: Final = (b"kv_cache_usage_perc", b"gpu_cache_usage_perc")
_PREFIX_QUERIES: Final = (
    b"prefix_cache_queries_total",
    b"prefix_cache_queries",
    b"gpu_prefix_cache_queries_total",
    b"gpu_prefix_cache_queries",
)
_PREFIX_HITS: Final = tuple(name.replace(b"queries", b"hits") for name in _PREFIX_QUERIES)
_CACHE_CONFIG: Final = b"cache_config_info"

_WANTED: Final = (*_RUNNING, *_WAITING, *_KV_USE, *_PREFIX_QUERIES, *_PREFIX_HITS, _CACHE_CONFIG)


def line_pattern(prefix: bytes, names: tuple[bytes, ...]) -> re.Pattern[bytes]:
    """Finds lines of Prometheus text behind a line end: the name without `prefix`, labels (or None), value."""
    # It begins with plain bytes, not with `^`: so the search skips to the next candidate, five times as fast.
    return re.compile(
        rb"\n" + prefix + rb"(" + b"|".join(names) + rb")"
        rb'(\{(?:[^"}\n]|"(?:[^"\\\n]|\\.)*+")*+\})?+'  # labels; quoted values may hold braces and escaped quotes
        rb"[ \t]++([0-9.eE+-]{1,40}+)"  # NaN and Inf don't match
        rb"(?:[ \t][^\n]*+|\r)?+(?=\n)"  # a timestamp, an exemplar
    )


_LINE: Final = line_pattern(b"vllm:", _WANTED)
_KV_TOKENS: Final = re.compile(rb'[{,]kv_cache_size_tokens="([0-9]{1,15})"')
_KV_BLOCKS: Final = re.compile(rb'[{,]num_gpu_blocks="([0-9]{1,15})"')
_BLOCK_SIZE: Final = re.compile(rb'[{,]block_size="([0-9]{1,15})"')
_MAX_CONCURRENCY: Final = re.compile(rb'[{,]kv_cache_max_concurrency="([0-9.eE+-]{1,40})"')


def parse_metrics(page: bytes, at: float) -> Sample | None:
    """The figures on a page asked for at `at` (monotonic); None if none of an engine's load is on it."""
    rows: dict[bytes, list[float]] = {}
    max_concurrency = 0.0
    kv_tokens = 0
    for line in _LINE.finditer(b"\n" + page):
        name, labels, text = line.groups()
        if name == _CACHE_CONFIG:
            if labels and (found := _MAX_CONCURRENCY.search(labels)):
                max_concurrency += number(found[1]) or 0.0
            if labels:
                kv_tokens += _kv_tokens(labels)
        elif (value := number(text)) is not None:
            rows.setdefault(name, []).append(value)
    running, waiting = _newest(rows, _RUNNING), _newest(rows, _WAITING)
    kv_use = _newest(rows, _KV_USE)
    if not (running or waiting or kv_use):
        return None
    return Sample(
        at=at,
        running=int(sum(running)),
        waiting=int(sum(waiting)),
        kv_use=min(max(kv_use, default=0.0), 1.0),
        max_concurrency=max_concurrency or None,
        kv_tokens=kv_tokens,
        prefix_queries=sum(_newest(rows, _PREFIX_QUERIES)),
        prefix_hits=sum(_newest(rows, _PREFIX_HITS)),
    )


def _kv_tokens(labels: bytes) -> int:
    """Room in the KV cache of one rank; 0: not told. Older versions tell blocks and their size."""
    if found := _KV_TOKENS.search(labels):
        return int(found[1])
    blocks, size = _KV_BLOCKS.search(labels), _BLOCK_SIZE.search(labels)
    return int(blocks[1]) * int(size[1]) if blocks and size else 0


_LARGEST: Final = 1e15
"""Larger values are garbage; below it sums stay exact enough and finite."""


def _newest(rows: dict[bytes, list[float]], names: tuple[bytes, ...]) -> list[float]:
    return next((rows[name] for name in names if name in rows), [])


def number(text: bytes) -> float | None:
    """A value of a line; None: it makes no sense."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if isfinite(value) and 0.0 <= value <= _LARGEST else None


class Metrics:
    """`GET /metrics`. A server without vLLM's figures fails this probe, which stops no traffic."""

    asks = "GET /metrics"

    def __init__(self, session: aiohttp.ClientSession, clock: Clock) -> None:
        self._session = session
        self._clock = clock

    async def __call__(self, target: Target) -> Sample:
        asked = self._clock()
        page = await fetch(self._session, target, "/metrics", METRICS_LIMIT)
        # The page is whole here, so a missing last line end cuts no number short.
        sample = parse_metrics(page + b"\n", asked)
        if sample is None:
            raise ProbeError("no figures of vLLM's on the page")
        return sample
