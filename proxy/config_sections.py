"""The sections of the configuration file that say how carefully the proxy works; all have defaults."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from policies.units import BadValueError, Duration, Fraction, Size, parse_duration, shown
from policies.yamlfile import FileModel


class Timeouts(FileModel):
    """Deadlines of one exchange. Each ends it with the error named."""

    head: Duration = Field(10.0, gt=0, description="For a whole request head, from its first byte: 408.")
    body: Duration = Field(60.0, gt=0, description="For a whole request body: 408.")
    idle: Duration = Field(
        75.0,
        gt=0,
        description="Between two requests of a client's connection, or two bytes of a WebSocket: closed.",
    )
    connect: Duration = Field(2.0, gt=0, description="To connect to a backend: next backend.")
    first_token: Duration = Field(
        120.0, gt=0, description="Until the first data of a stream: next backend, else 504."
    )
    answer: Duration = Field(
        600.0, gt=0, description="Until an answer that is not a stream is complete: 504, not tried again."
    )
    heartbeat: Duration = Field(
        0.0,
        ge=0,
        description="Who asked for a stream and waits so long for its first token gets the head, and "
        "[a comment](api.md#heartbeats) each time. 0: never.",
    )
    between_tokens: Duration = Field(
        30.0, gt=0, description="Without a token in a stream, heartbeats or not: error."
    )
    total: Duration = Field(3600.0, gt=0, description="For the whole request: error event or 504.")
    client_write: Duration = Field(
        60.0, gt=0, description="A client that reads nothing for so long is cut off."
    )
    backend_idle: Duration = Field(
        4.0, gt=0, description="An idle backend connection is closed after this; vLLM closes its own at 5 s."
    )
    connection: Duration = Field(
        3600.0,
        gt=0,
        description="A connection that is older ends behind an answer, a client's and a backend's.",
    )
    drain: Duration = Field(30.0, ge=0, description="On SIGTERM, how long running requests may take to end.")


class LimitsConfig(FileModel):
    """Sizes and counts that are refused beyond."""

    head: Size = Field(65536, ge=1024, description="Bytes of a request head: 431.")
    target: Size = Field(8192, ge=64, description="Bytes of a request target: 414.")
    fields: int = Field(100, ge=8, description="Header fields of a request: 431.")
    body: Size = Field(32 * 1024 * 1024, ge=1024, description="Bytes of a request body: 413.")
    bodies: Size = Field(
        1024 * 1024 * 1024, ge=1024, description="Bytes of all request bodies held at once: 503."
    )
    requests: int = Field(
        100000, ge=1, description="Requests on one connection, a client's or a backend's; then it ends."
    )
    memory: Size | None = Field(
        None,
        ge=64 * 1024 * 1024,
        description="Memory of the process: [load is shed](operations.md#when-memory-runs-short) from 92 % on. "
        "Default: the limit of its control group, if it has one.",
    )
    connections: int = Field(10000, ge=1, description="Client connections; further ones: 503.")


class Retries(FileModel):
    """Further attempts on other backends, before an answer has begun."""

    ratio: float = Field(0.2, ge=0, le=1, description="Retries allowed per request of the last 10 seconds.")
    per_second: float = Field(10.0, ge=0, description="Retries allowed per second besides.")
    attempts: int = Field(3, ge=1, le=10, description="Attempts per request at most, the first included.")
    idempotent: bool = Field(
        True,
        description="A generation has no effect but its cost, so it may be sent again. `false`: never once a "
        "backend may have read it.",
    )


class HedgingConfig(FileModel):
    """A second attempt on another backend, while the first token is late."""

    after: Literal["off", "p95"] | Duration = Field(
        "off",
        description="When a first token is late: a duration, or `p95`: when 95 % of the model's requests with "
        "prompts of such length had theirs. `off`: never.",
    )
    ratio: float = Field(
        0.05, ge=0, le=1, description="Second attempts allowed per streaming request of the last minute."
    )

    @field_validator("after", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in ("off", "p95"):
            try:
                parse_duration(value)
            except BadValueError as error:
                meant = error.suggestion or ("p95" if value[:1] in "pP" else None)
                message = f"expected a duration such as 500ms, `p95` or `off`, got {shown(value)}"
                raise BadValueError(message, meant) from None
        return value

    @model_validator(mode="after")
    def _check(self) -> HedgingConfig:
        if isinstance(self.after, float) and self.after <= 0:
            raise BadValueError("a duration above 0, `p95` or `off`", at=("after",))
        return self


class Probing(FileModel):
    """How the state of backends is learnt."""

    interval: Duration = Field(2.0, gt=0, description="Between two health checks of a backend.")
    timeout: Duration = Field(1.0, gt=0, description="A check that takes longer has failed.")
    up: int = Field(2, ge=1, description="Successes in a row that bring a backend up.")
    down: int = Field(3, ge=1, description="Failures in a row that take it down.")
    metrics: bool = Field(True, description="Read the engine's own figures from `/metrics`.")
    generate: Duration | None = Field(
        None,
        gt=0,
        description="After so long without a token for a client, ask for one; none is a failure. Default: never.",
    )
    enabled: bool = Field(True, description="Probe at all; without, only real traffic tells.")

    @model_validator(mode="after")
    def _check(self) -> Probing:
        if self.timeout >= self.interval:
            raise BadValueError("timeout must be shorter than interval", at=("timeout",))
        return self


class HealthConfig(FileModel):
    """How carefully backends are taken out and back in."""

    slow_start: Duration = Field(
        10.0,
        ge=0,
        description="A backend that comes back, or is new, gets its slots in ten steps over this time.",
    )
    panic: Fraction = Field(
        0.01,
        description="When less than this share of the backends that may serve a request is available, those that "
        "look sick are used too. `1%`: when none is; 0: never.",
    )
    most_ejected: Fraction = Field(
        0.5, description="Circuit breakers take out at most this share of the backends; one in any case."
    )
