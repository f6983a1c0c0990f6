"""What balancer and scheduling platform tell each other, as JSON: `docs/platform.openapi.yaml` has the same.

Times are seconds, money is in the ledger's currency, moments are Unix time. Unknown fields are errors.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, Field, ValidationError, model_validator

from policies.siteschema import DataClass, Name, SiteName
from policies.units import BadValueError
from policies.yamlfile import FileModel
from policies.yamlproblems import dotted, explain
from proxy.scaling.provider import Presence
from proxy.scaling.statusbody import Detail

MOST_BODY_BYTES = 64 * 1024

Model = TypeVar("Model", bound=BaseModel)
Text = Annotated[str, Field(min_length=1, max_length=200)]
Seconds = Annotated[float, Field(gt=0, le=86400)]
Amount = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0, le=1_000_000)]

PlacementState = Literal["standby", "preparing", "starting", "ready", "stopping", "failed"]

PRESENCE: dict[str, Presence] = {
    "standby": Presence.ABSENT,
    "preparing": Presence.ABSENT,
    "starting": Presence.STARTING,
    "ready": Presence.RUNNING,
    "stopping": Presence.RUNNING,
    "failed": Presence.ABSENT,
}
"""What of a placement is there, by its state. `failed`: nothing of it runs any more. `preparing`: before its start;
what is prepared for a run is `STARTING` (`scheduler.py`)."""


class MessageError(Exception):
    """A message is not as it should be; `field` says where."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.message = message


# From us to the platform


class Demand(FileModel):
    """What is asked for now."""

    requests: Amount
    """At once: running and waiting."""
    tokens: Amount
    """In use and waiting, prompts and answers."""
    prompt_tokens: int = Field(1024, ge=1)
    """Of one request, on average."""
    output_tokens: int = Field(1024, ge=1)
    """Of one answer, on average."""


class Sla(FileModel):
    """What answers are to keep, on average; null: anything."""

    ttft_s: Seconds | None = None
    """To the first token."""
    tpot_s: Seconds | None = None
    """Per token after the first."""
    tokens_per_s: Amount | None = None
    """A second and request."""


class Budget(FileModel):
    """What may be spent; null: no ceiling."""

    per_hour: Amount | None = None
    month_left: Amount | None = None
    """Of this calendar month's."""
    currency: str = Field("USD", min_length=3, max_length=3)


class ScaleRequest(FileModel):
    """Capacity is wanted. Sent again with the same id, it replaces what was asked before."""

    id: Name
    model: Text
    demand: Demand
    sla: Sla = Sla()
    budget: Budget = Budget()
    data_classes: list[DataClass] = Field(default_factory=list, max_length=100)
    """That its requests may hold: a site has to be cleared for all of them."""
    sites: list[SiteName] = Field(default_factory=list, max_length=100)
    """Where it may be; empty: anywhere."""
    cards: list[Text] = Field(default_factory=list, max_length=100)
    """Which cards; empty: any."""
    count: int | None = Field(None, ge=1, le=1024)
    """How many placements at most; null: as many as the demand needs."""
    expires: Amount
    """When it is not wanted any more, if it is not sent again before."""


# From the platform to us


class Price(FileModel):
    """Of a million tokens, as decimals."""

    input: Amount
    output: Amount
    cached_input: Amount | None = None
    currency: str | None = Field(None, min_length=3, max_length=3)
    """Default: the ledger's."""


class Route(FileModel):
    """The way there."""

    rtt_ms: float | None = Field(None, ge=0, le=10_000)
    """A round trip, until it has been measured."""
    bandwidth: Annotated[float, Field(gt=0)] | None = None
    """Bytes a second."""


class Placement(FileModel):
    """Resources that are bound, and what would answer on them. Nothing runs until it is started."""

    id: Name
    name: Name
    """Of the backend."""
    url: Text
    """Where its engine answers, without /v1."""
    site: SiteName
    """One of the configuration: who runs it and what it may see is the admin's word."""
    models: list[Text] = Field(min_length=1, max_length=100)
    slots: int | None = Field(None, ge=1, le=100_000)
    """Requests that it serves at once inside the SLA; null: the engine says it."""
    engine: Literal["vllm", "openai"] = "vllm"
    card: Text | None = None
    count: int = Field(1, ge=1, le=1024)
    """Cards."""
    cost_per_hour: Amount | None = None
    """While it runs; null: unknown. While it is placed it cannot rise, nor can `price`."""
    cold_start_s: Annotated[float, Field(gt=0, le=86400)] | None = None
    """From start to the first answer, as it is expected."""
    price: Price | None = None
    labels: dict[Text, Text] = Field(default_factory=dict, max_length=50)
    route: Route = Route()
    state: PlacementState = "standby"
    progress: float | None = Field(None, ge=0, le=1)
    """Of preparing or starting."""
    detail: Detail = ""
    run: str = Field("", max_length=200)
    """That it was started for."""
    request: Name | None = None
    """The scale request that it answers."""
    ttl_s: Seconds
    """It goes when this much time has passed without another message like this one."""


class Progress(FileModel):
    """What has become of a placement. It renews nothing."""

    placement: Name
    state: PlacementState
    progress: float | None = Field(None, ge=0, le=1)
    detail: Detail = ""
    run: str = Field("", max_length=200)


class Cards(FileModel):
    """Cards of one kind."""

    card: Text
    total: Count
    free: Count

    @model_validator(mode="after")
    def _check(self) -> Cards:
        if self.free > self.total:
            raise BadValueError(f"{self.free} of {self.total} cannot be free", at=("free",))
        return self


class Resources(FileModel):
    """What a site has."""

    site: SiteName
    cards: list[Cards] = Field(max_length=100)
    utilisation: float | None = Field(None, ge=0, le=1)
    """Of all its cards."""
    ttl_s: Seconds


class Software(FileModel):
    """An image or a command for a model on a card, everything filled in."""

    image: str = ""
    command: list[str] = Field(default_factory=list)
    """Instead of an image."""
    arguments: list[str] = Field(default_factory=list)
    environment: dict[str, str] = Field(default_factory=dict)


class Run(FileModel):
    """Body of `start` and `stop`, from us to the platform."""

    operation: Literal["start", "stop"]
    placement: Name
    run: str
    """The idempotency key: started twice for one run, it is started once."""
    launch: Software | None = None
    """With `start`: what is to run, by the images of Tidegate; null: they do not say, the platform knows."""


class PlacementStatus(FileModel):
    """The platform's answer when it is asked for a placement."""

    id: Name
    state: PlacementState
    run: str = ""
    progress: float | None = Field(None, ge=0, le=1)
    detail: Detail = ""


def read_message(body: bytes, model: type[Model]) -> Model:
    """A message. Raises MessageError, and nothing else whatever the body."""
    try:
        value: Any = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise MessageError("", f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise MessageError("", "expected a JSON object")
    return validated(value, model)


def validated(value: Any, model: type[Model]) -> Model:
    """Raises MessageError."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise problem_of(error, model, value) from None


def problem_of(error: ValidationError, model: type[BaseModel], value: Any) -> MessageError:
    """The first of its problems."""
    found = explain(error, model, value)
    if not found:
        return MessageError("", "not as it should be")
    hint = f" (did you mean '{found[0].suggestion}'?)" if found[0].suggestion else ""
    return MessageError(dotted(found[0].path), found[0].message + hint)
