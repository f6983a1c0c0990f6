"""What a probe is, what it learns, and when its word counts.

A probe puts one question to one backend. `ask` runs it under a deadline and turns whatever happens into a
`ProbeResult`: a probe never raises past it, and a slow answer is a failure. `Hysteresis` turns a row of
results into up or down, so that one bad answer moves nothing.

Times are monotonic seconds unless a name says otherwise.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from ssl import SSLContext
from time import perf_counter
from typing import Final, Generic, Protocol, TypeAlias, TypeVar
from urllib.parse import urlsplit

log = logging.getLogger("tidegate.probes")

Clock: TypeAlias = Callable[[], float]
"""Monotonic time, seconds."""

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


def socket_path(url: str) -> str:
    """The path in `unix:/run/vllm.sock`; empty: it is another URL."""
    return url[5:] if url.startswith("unix:/") else ""


@dataclass(frozen=True, slots=True)
class Target:
    """One backend to probe."""

    name: str
    url: str
    """Where its API begins, without `/v1`: `https://nj.example:8443`, `http://10.0.0.7:8000/llm`, or
    `unix:/run/vllm.sock`."""
    models: frozenset[str] | None = None
    """Models the configuration lists for it; None: whatever it serves (`models: auto`)."""
    slots: int | None = None
    """Slots the configuration gives it; None: what its engine reports."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Sent with `GET /v1/models` only, for its key; never logged."""
    tls: SSLContext | None = field(default=None, repr=False)
    """How its certificate is checked; None: by the system's authorities."""
    server_name: str | None = None
    """Name its certificate must carry; None: the URL's host."""
    certificate_ends: float = inf
    """When the certificate ends that we show it, Unix time; inf: we show none."""
    authorities_end: float = inf
    """The same of the authorities that `tls` trusts for it alone."""

    def __post_init__(self) -> None:
        if self.socket_path:
            return
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"backend {self.name}: its URL must begin with http:// or https:// and name a host"
            )
        if parts.username is not None:
            raise ValueError(f"backend {self.name}: a URL holds no user or password; use a key")

    @property
    def socket_path(self) -> str:
        """Of the Unix socket that it listens on; empty: it has an address."""
        return socket_path(self.url)

    @property
    def address(self) -> tuple[str, int]:
        """Host (name or number) and port to connect to."""
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


@dataclass(frozen=True, slots=True)
class Timing:
    """How often to ask, how long to wait, and how many answers in a row count. ValueError if it can't be."""

    interval_s: float = 2.0
    """Between two checks of a backend that is up."""
    retry_s: float = 1.0
    """Between two checks of a backend that is down, so that it is back soon after it recovered; `interval_s`
    if that is shorter."""
    timeout_s: float = 1.0
    """For each question; shorter than `interval_s`."""
    up: int = 2
    """Successes in a row that bring a backend up."""
    down: int = 3
    """Failures in a row that take it down."""
    models_s: float = 10.0
    """Between two looks at the list of models."""
    metrics_s: float = 1.0
    """Between two looks at the engine's figures while it works; they count for two seconds."""
    metrics_idle_s: float = 10.0
    """The same while nothing runs on it: scraping costs the engine time."""
    metrics_max_s: float = 60.0
    """Longest pause after failed scrapes, which double it each time."""
    generate_s: float = inf
    """After so long without a token a check asks for one; inf: never."""
    jitter: float = 0.1
    """Each pause is stretched or shortened by up to this share, so that backends are not asked in step."""

    def __post_init__(self) -> None:
        seconds = (self.interval_s, self.retry_s, self.timeout_s, self.models_s, self.metrics_s)
        if min(*seconds, self.metrics_idle_s, self.metrics_max_s, self.generate_s) <= 0:
            raise ValueError("probe times must be positive")
        if self.timeout_s >= self.interval_s:
            raise ValueError("the probe timeout must be shorter than the interval")
        if min(self.up, self.down) < 1:
            raise ValueError("probe thresholds must be at least 1")
        if not 0 <= self.jitter < 1:
            raise ValueError("probe jitter must be at least 0 and below 1")


@dataclass(frozen=True, slots=True)
class Sample:
    """What an engine said of itself at one moment, summed over its data-parallel ranks unless noted."""

    at: float
    """When it was asked: the figures are at most this old."""
    running: int = 0
    waiting: int = 0
    """Requests in its queue."""
    kv_use: float = 0.0
    """Share of the KV cache in use, 0 to 1; the fullest rank's."""
    max_concurrency: float | None = None
    """Requests of full context length whose KV cache fits at once; None: not reported (older vLLM)."""
    kv_tokens: int = 0
    """Room in the KV caches, tokens; 0: not reported."""
    prefix_queries: float = 0.0
    prefix_hits: float = 0.0
    """Prompt tokens looked up, and found, in the prefix cache since the engine started."""


@dataclass(frozen=True, slots=True)
class ModelsSeen:
    """The models a backend serves."""

    names: frozenset[str]
    context_tokens: Mapping[str, int]
    """Longest prompt plus answer, tokens; a LoRA adapter has its base model's. Unknown limits are missing."""
    parents: Mapping[str, str]
    """LoRA adapter to base model."""


@dataclass(frozen=True, slots=True)
class Generated:
    """What one token of an answer cost, tokens; 0 where the backend does not say."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class ProbeResult(Generic[T]):
    """One question and what came of it."""

    ok: bool
    reason: str
    """Why not, for people; empty if ok."""
    duration_s: float
    value: T | None = None
    """What was learnt; None unless ok."""
    status: int | None = None
    """HTTP status that made it fail, if one did."""
    connected: bool = True
    """False: no connection came about."""


class ProbeError(Exception):
    """The answer was no. The message is for people and holds nothing secret."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


class Probe(Protocol[T_co]):
    """One question: returns what it learnt, or raises ProbeError. May take for ever: `ask` ends it."""

    asks: str
    """The question in a few words: `GET /health`."""

    async def __call__(self, target: Target) -> T_co: ...


def os_reason(error: OSError) -> str:
    """What the system says went wrong, without the addresses that asyncio adds."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else type(error).__name__


_CERTIFICATE_REASONS: Final = {
    9: "it is not valid yet",
    10: "it has expired",
    18: "it is self-signed",
    19: "nobody we trust has signed it",
    20: "nobody we trust has signed it",
    21: "nobody we trust has signed it",
    23: "it was revoked",
    26: "it is not for this purpose",
    62: "it is for another name",
    64: "it is for another address",
}
"""By X509_V_ERR of OpenSSL's x509_vfy.h."""


def certificate_reason(error: Exception) -> str:
    """Why a certificate was refused (`ssl.SSLCertVerificationError`), in words that hold no name and no address."""
    code = getattr(error, "verify_code", 0)
    if code in _CERTIFICATE_REASONS:
        return _CERTIFICATE_REASONS[code]
    return str(getattr(error, "verify_message", "") or "it cannot be verified")


async def ask(probe: Probe[T], target: Target, timeout_s: float) -> ProbeResult[T]:
    """Put one question to one backend; never raises, except when cancelled."""
    started = perf_counter()
    status: int | None = None
    try:
        async with asyncio.timeout(timeout_s):
            value = await probe(target)
        return ProbeResult(True, "", perf_counter() - started, value)
    except ProbeError as error:
        reason, status = str(error), error.status
    except TimeoutError:
        reason = f"no answer within {timeout_s:g} s"
    except Exception as error:
        # A fault of ours must not freeze what is believed of the backend: it counts as a failure, aloud.
        log.exception("probe %s of backend %s", probe.asks, target.name)
        reason = type(error).__name__
    return ProbeResult(False, f"{probe.asks}: {reason}", perf_counter() - started, None, status)


@dataclass(slots=True)
class Hysteresis:
    """Results in, up or down out.

    `down` failures in a row take it down, `up` successes in a row bring it up, anything else leaves it. The
    very first result decides alone: there is nothing yet that it could be a blip of.
    """

    up: int
    down: int
    is_up: bool = True
    decided: bool = False
    streak: int = 0
    """Results in a row that contradict the present state."""

    def record(self, ok: bool) -> bool:
        """Take one result. True: up became down, or down up."""
        needed = 1 if not self.decided else self.up if ok else self.down
        self.decided = True
        if ok == self.is_up:
            self.streak = 0
            return False
        self.streak += 1
        if self.streak < needed:
            return False
        self.is_up, self.streak = ok, 0
        return True
