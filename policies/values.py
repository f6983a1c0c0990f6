"""What a decision is made from, and what it says: plain values. `base.py` tells their contract."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from math import inf
from typing import Final, TypeAlias

ENGINE_FIGURES_VALID_S = 2.0
"""Scraped engine figures older than this are ignored (routers that trust stale queues herd)."""

KV_USE_FULL: Final = 0.95
"""KV cache use at which an engine is about to preempt, and so counts as full."""

WAITING_FULL: Final = 5
"""Requests in an engine's own queue at which it counts as full. A new prompt waits there for the next step, and
several do while a long one is computed: one or two say nothing (the saturation detector of the Gateway API's
Inference Extension takes the same figure)."""


@dataclass(frozen=True, slots=True)
class Tunable:
    """Where `tidegate tune` looks for a policy's parameter, or for each value of a map: third in its annotation,
    after the text."""

    low: float
    high: float
    log: bool = False
    """By ratio instead of by difference: for what spans more than a decade."""
    only_with: tuple[str, str] | None = None
    """Another parameter, and the value of it without which this one does nothing."""


@dataclass(slots=True)
class RequestFacts:
    """What a decision may depend on, read once from the request and its key."""

    id: str
    model: str
    """The model after aliases, as backends name it."""
    endpoint: str = "chat"
    """One of `policies.fileschema.ENDPOINTS`."""
    tenant: str = "default"
    key_id: str = ""
    data_class: str = "public"
    arrived: float = 0.0
    """Monotonic time at which the request was complete."""
    wall: float = 0.0
    """Unix time of the same moment."""
    deadline: float = inf
    """Monotonic time at which its client gives up."""
    stream: bool = False
    body_bytes: int = 0
    prompt_tokens: int = 0
    """An estimate, until the backend reports: about a quarter of the bytes of the prompt."""
    max_tokens: int = 0
    """The client's limit on the answer; 0: none given."""
    expected_tokens: int = 0
    """Forecast of the length of the answer, tokens, over all choices."""
    session: str = ""
    """Affinity key, unique over tenants; empty: no affinity."""
    priority: int = 0
    """Higher goes first."""
    labels: Mapping[str, str] = field(default_factory=dict)
    prefix: tuple[int, ...] = ()
    """Chained hashes of the prompt's leading blocks; filled only for policies that need `prefix` or
    `hashes`."""
    prefix_tokens: int = 512
    """Prompt tokens that each of `prefix` stands for (in the proxy an estimate: 2 KiB of the body)."""
    cached: Mapping[str, int] = field(default_factory=dict)
    """Prompt tokens that a backend has probably in its prefix cache, by its name; one that is missing has none.
    Set before each decision of a policy that needs `prefix`."""
    backend: str = ""
    """The only backend that can serve it, since it has what the request is about; empty: any may."""

    @property
    def tokens(self) -> int:
        """Load this request is expected to put on a backend, tokens."""
        return self.prompt_tokens + self.expected_tokens

    def new_tokens(self, backend: str) -> int:
        """Prompt tokens that the backend would have to compute, at least 1 (an engine computes the last one
        anew)."""
        return max(self.prompt_tokens - self.cached.get(backend, 0), 1)


@dataclass(slots=True)
class BackendView:
    """One backend as a policy sees it: valid during the call only, not to be kept or changed by a policy."""

    name: str
    site: str = "local"
    slots: int = 32
    """Requests it serves at once inside its SLA; at least 1."""
    weight: float = 1.0
    """Its share where a policy goes by weight, 0 or more; 0: nothing, not even after a failed attempt or a wait,
    while another backend with a weight that may serve the request is available."""
    models: frozenset[str] = frozenset()
    models_unknown: str = ""
    """Why nobody knows yet which models it serves, in words; empty: they are known."""
    models_awaited: bool = False
    """They are unknown, and the next look may tell them."""
    labels: Mapping[str, str] = field(default_factory=dict)
    operator: str = ""
    location: tuple[float, float] | None = None
    """Latitude and longitude, degrees."""
    data_classes: frozenset[str] | None = None
    """Data classes it may see; None: all of them (the local site)."""
    context_tokens: Mapping[str, int] = field(default_factory=dict)
    """Longest prompt plus answer by model, tokens; a model that is not named has no known limit."""
    bandwidth: float = 125_000_000.0
    """Bytes per second towards it, above 0."""
    price_input: float | None = None
    price_output: float | None = None
    """Per million tokens in the ledger's currency; None: unknown, which is not free."""
    carbon_gco2_kwh: float | None = None

    in_flight: int = 0
    """Requests leased to it by this router: always exact, always fresh."""
    in_flight_tokens: int = 0
    prefilling: int = 0
    """Those of `in_flight` whose first token has not come."""
    prefill_tokens: int = 0
    """Their prompts, less what was probably cached, tokens: what stands before the next prompt."""
    ttft_s: float = 0.0
    """EWMA of the time to the first token; 0: not measured yet."""
    tpot_s: float = 0.0
    """EWMA of the time per output token after the first; 0: not measured yet."""
    rtt_s: float = 0.0
    """EWMA of the network round trip; 0: not measured yet."""
    ttft_fit: tuple[float, ...] = ()
    """Seconds to the first token, network included: alone, more for each prompt token that is computed before it
    (its own and `prefill_tokens`), and more for each other request that has its first token. Empty: nobody needs
    `speed` (`policies/speeds.py`)."""
    tpot_fit: tuple[float, ...] = ()
    """Seconds for each token after the first: alone, and more for each other request in flight. As `ttft_fit`."""
    available: bool = True
    """The one question about a backend: probed up, serves a model, breaker closed, not draining."""
    running: int = 0
    waiting: int = 0
    kv_use: float = 0.0
    """What the engine said of itself (`waiting`: requests in its queue; `kv_use`: 0 to 1) at `sampled_at`."""
    kv_tokens: int = 0
    """Room in its KV cache, tokens, as the engine says; 0: it does not."""
    sampled_at: float = -inf
    host: Mapping[str, float] = field(default_factory=dict)
    """Figures of its site's machine by name (`policies/host.py`), as they were at `host_at`."""
    host_at: float = -inf

    def saturation(self, now: float) -> float:
        """How full it is: 0 empty, 1 full, above 1 queueing.

        The worst of in-flight over slots, KV use over 0.95 and requests in the engine's queue over 5; engine
        figures count only while younger than 2 s.
        """
        saturation = self.in_flight / self.slots
        if now - self.sampled_at <= ENGINE_FIGURES_VALID_S:
            saturation = max(saturation, self.kv_use / KV_USE_FULL, self.waiting / WAITING_FULL)
        return saturation

    def has_free_slot(self, now: float) -> bool:
        """Whether one more request fits without queueing."""
        return self.in_flight < self.slots and self.saturation(now) < 1.0


@dataclass(slots=True)
class Send:
    """Send the request to `backend`; if it fails before its first data event, to the fallbacks in order."""

    backend: str
    fallbacks: tuple[str, ...] = ()
    reason: str = ""
    """A few words for people: `least in-flight of 3`."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Backend name to score; lower is better unless the policy says otherwise."""
    propensity: float = 1.0
    """Probability with which this policy would choose this backend here (for off-policy estimates)."""


@dataclass(slots=True)
class Hold:
    """Keep the request for now, and ask again when capacity appears, at the latest at `until` (monotonic).

    It ends with its rule's wait or the request's deadline, whatever `until` says.
    """

    until: float
    reason: str = ""


REJECT_CODES: Final[frozenset[str]] = frozenset(
    {
        "model_not_found",
        "data_class",
        "context_length",
        "no_backend",
        "overloaded",
        "queue_full",
        "queue_timeout",
    }
)
"""What a `Reject` may say; `proxy/errors.py` has a status for each."""


@dataclass(slots=True)
class Reject:
    """Refuse the request; `code` is one of `REJECT_CODES`."""

    code: str
    reason: str = ""
    retry_after_s: float | None = None


Decision: TypeAlias = Send | Hold | Reject


class Outcome(Enum):
    """How an attempt on one backend ended, seen from the backend."""

    OK = "ok"
    FAILED = "failed"
    """The backend's fault: refused, reset, stalled, garbage, 5xx."""
    IGNORED = "ignored"
    """Says nothing about the backend: the client left, or the client's own 4xx."""


@dataclass(slots=True)
class Finished:
    """One attempt, after its stream has ended."""

    request: RequestFacts
    backend: str
    outcome: Outcome
    ended: float
    """Monotonic."""
    started: float = 0.0
    """Monotonic time of the dispatch to this backend."""
    ttft_s: float | None = None
    """From dispatch to the first token; None: none came."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    decided_by: str = ""
    """Name of the policy that chose the backend."""
