"""What is known of one target, and what follows from it for its `Backend`.

Results come in by the `learn_*` methods; `apply` then brings a backend in line with all of it. It may be
called at any time and with a new `Backend` object (after a reload), and always gives the same result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, Final

from policies.state import NOT_ASKED, Backend
from probes.base import Generated, Hysteresis, ModelsSeen, ProbeResult, Sample, Target, Timing
from probes.network import MinFilter

WRONG_KEY: Final = frozenset({401, 403})
REFUSED: Final = WRONG_KEY | {404}
"""Answers to `GET /v1/models` that the next one will not differ from, unless somebody mends something."""


@dataclass(frozen=True, slots=True)
class Liveness:
    """What a successful check learns."""

    rtt_s: float
    models: ModelsSeen | None = None
    """Only if the list of models had to stand in for a missing `/health`."""


@dataclass(slots=True)
class TargetStatus:
    """Everything the probes know of one target."""

    target: Target
    health: Hysteresis
    checked: ProbeResult[Liveness] | None = None
    """The last check."""
    checked_at: float = -inf
    changed_at: float = -inf
    """When it last came up or went down."""
    rtt_s: float = 0.0
    rtt: MinFilter = field(default_factory=MinFilter)
    models: ModelsSeen | None = None
    """The last list that came; a failed look at it leaves this."""
    models_result: ProbeResult[ModelsSeen] | None = None
    models_at: float = -inf
    """When the list was last asked for, successfully or not."""
    sample: Sample | None = None
    metrics_result: ProbeResult[Sample] | None = None
    metrics_failures: int = 0
    """In a row."""
    generated_at: float = -inf
    """When it last gave the token that it was asked for, or was first checked."""
    generations: int = 0
    """Tokens that it was asked for, successfully or not, and what they have used, as far as it says so."""
    generated: Generated = field(default_factory=lambda: Generated(0, 0))

    @classmethod
    def new(cls, target: Target, timing: Timing) -> TargetStatus:
        return cls(target, Hysteresis(timing.up, timing.down))

    @property
    def up(self) -> bool:
        return self.health.is_up

    def learn_check(self, result: ProbeResult[Liveness], now: float) -> bool:
        """Take a check. True: it came up or went down."""
        self.checked, self.checked_at = result, now
        if result.value is not None:
            self.rtt_s = self.rtt.add(result.value.rtt_s)
        changed = self.health.record(result.ok)
        if changed or self.changed_at == -inf:
            self.changed_at = now
        return changed

    def learn_models(self, result: ProbeResult[ModelsSeen], now: float) -> None:
        self.models_result, self.models_at = result, now
        if result.value is not None:
            self.models = result.value

    def learn_metrics(self, result: ProbeResult[Sample]) -> None:
        self.metrics_result = result
        if result.value is not None:
            self.sample, self.metrics_failures = result.value, 0
        else:
            self.metrics_failures += 1

    def learn_generation(self, result: ProbeResult[Generated], now: float) -> None:
        self.generations += 1
        if result.value is not None:
            before, more = self.generated, result.value
            self.generated_at = now
            self.generated = Generated(
                before.prompt_tokens + more.prompt_tokens, before.completion_tokens + more.completion_tokens
            )

    @property
    def slots(self) -> int | None:
        """Slots by what the engine reports; None: the configuration gives them, or nothing is known."""
        if self.target.slots is not None or self.sample is None or self.sample.max_concurrency is None:
            return None
        return max(1, int(self.sample.max_concurrency))

    @property
    def served(self) -> frozenset[str]:
        """Models to send it: those it was seen to serve, of those the configuration lists if it lists any."""
        if self.models is None:
            return self.target.models or frozenset()
        return self.models.names if self.target.models is None else self.models.names & self.target.models

    @property
    def models_unknown(self) -> str:
        """Why it is not known what it serves, in words; empty: a list came, or the configuration has one."""
        if self.models is not None or self.target.models is not None:
            return ""
        if self.checked is not None and not self.checked.ok:
            return self.checked.reason
        asked = self.models_result
        return NOT_ASKED if asked is None else self._look_mended_by or asked.reason

    @property
    def models_awaited(self) -> bool:
        """Whether the next look may tell what it serves: it is up, and has not refused to say it."""
        asked = self.models_result
        refused = asked is not None and asked.status in REFUSED
        return bool(self.models_unknown) and self.up and not refused

    @property
    def context_tokens(self) -> Mapping[str, int]:
        if self.models is None:
            return {}
        return {
            name: self.models.context_tokens[name] for name in self.served & self.models.context_tokens.keys()
        }

    @property
    def _look_mended_by(self) -> str:
        """The answer to the last look at its models, and what would mend it; empty: nothing in our hands."""
        asked = self.models_result
        if asked is None or asked.status is None:
            return ""
        if asked.status in WRONG_KEY:
            return f"{asked.reason}: is its key right?"
        if self.models is None and self.target.models is None:
            return f"{asked.reason}: list its models in the configuration"
        return ""

    @property
    def misconfigured(self) -> list[str]:
        """What an operator has to mend, in words; it may be up nevertheless."""
        found = []
        if self._look_mended_by:
            found.append(self._look_mended_by)
        if self.models is not None and self.target.models is not None:
            serves = ", ".join(sorted(self.models.names)) or "none"
            missing = sorted(self.target.models - self.models.names)
            found += [f"does not serve model {name} (it serves: {serves})" for name in missing]
        elif self.models is not None and not self.models.names:
            found.append("serves no model")
        return found

    def apply(self, backend: Backend, now: float) -> bool:
        """Bring a backend in line. True: its models, what is known of them, or its slots changed: caches are stale.

        Whether it is available is for `Fleet.refresh` to find out, afterwards.
        """
        if self.health.decided:
            backend.probed(self.health.is_up, now)
        if self.checked is not None:
            backend.connects = self.checked.connected
        sample = self.sample
        if sample is not None and sample.at > backend.sampled_at:
            backend.running, backend.waiting = sample.running, sample.waiting
            backend.kv_use, backend.sampled_at = sample.kv_use, sample.at
            backend.kv_tokens = sample.kv_tokens
        served, context_tokens = self.served, self.context_tokens
        slots, unknown, awaited = self.slots or backend.full_slots, self.models_unknown, self.models_awaited
        before = (backend.models, backend.context_tokens, backend.full_slots)
        before_unknown = (backend.models_unknown, backend.models_awaited)
        if (served, context_tokens, slots) == before and (unknown, awaited) == before_unknown:
            return False
        backend.models, backend.context_tokens, backend.full_slots = served, context_tokens, slots
        backend.models_unknown, backend.models_awaited = unknown, awaited
        return True

    def snapshot(self, now: float) -> dict[str, Any]:
        """The same for people and scripts: plain values, ages in seconds, None where nothing is known."""
        sample, checked, metrics = self.sample, self.checked, self.metrics_result
        return {
            "url": self.target.url,
            "up": self.health.is_up if self.health.decided else None,
            "since_s": _age(self.changed_at, now),
            "reason": checked.reason if checked else "not checked yet",
            "checked_age_s": _age(self.checked_at, now),
            "check_ms": round(checked.duration_s * 1e3, 3) if checked else None,
            "rtt_ms": round(self.rtt_s * 1e3, 3) or None,
            "models": sorted(self.served),
            "context_tokens": dict(self.context_tokens),
            "lora_parents": dict(self.models.parents) if self.models else {},
            "models_age_s": _age(self.models_at, now),
            "misconfigured": self.misconfigured,
            "slots_reported": self.slots,
            "engine": _engine(sample, now) if sample else None,
            "generation": {
                "requests": self.generations,
                "prompt_tokens": self.generated.prompt_tokens,
                "completion_tokens": self.generated.completion_tokens,
            },
            "metrics_reason": metrics.reason if metrics else "not asked yet",
        }


def _age(then: float, now: float) -> float | None:
    return None if then == -inf else round(now - then, 3)


def _engine(sample: Sample, now: float) -> dict[str, Any]:
    queries = sample.prefix_queries
    return {
        "age_s": _age(sample.at, now),
        "running": sample.running,
        "waiting": sample.waiting,
        "kv_use": sample.kv_use,
        "max_concurrency": sample.max_concurrency,
        "prefix_hit_rate": min(sample.prefix_hits / queries, 1.0) if queries else None,
    }
