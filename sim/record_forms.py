"""The forms of an event log's records (`policies/eventlog.py`): what a replay may rely on in a file that anybody
may have changed. JSON's own types, nothing is converted; and no time is so large that sums overflow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError

from policies.base import Outcome
from policies.units import shown
from policies.yamlfile import FileModel
from policies.yamlproblems import dotted, explain
from probes.passive import AttemptError

Seconds = Annotated[float, Field(ge=-1e9, le=1e9)]
Positive = Annotated[float, Field(gt=0, le=1e15)]
NotNegative = Annotated[float, Field(ge=0, le=1e15)]
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]
# A tuple is a list in JSON, and an enumeration its values.
Location = Annotated[
    tuple[Annotated[float, Field(ge=-90, le=90)], Annotated[float, Field(ge=-180, le=180)]],
    Field(strict=False),
]
Usage = Annotated[tuple[Count, Count, Count], Field(strict=False)]
Share = Annotated[float, Field(ge=0, le=1)]
HealthForm = Annotated[tuple[NotNegative, Share, Share], Field(strict=False)]
BreakerForm = Annotated[tuple[AtLeastOne, NotNegative, NotNegative], Field(strict=False)]
OutcomeForm = Annotated[Outcome, Field(strict=False)]
ErrorForm = Annotated[AttemptError, Field(strict=False)]


class Form(FileModel, strict=True):
    """A default says only that the key may be left out."""


class PolicyForm(Form):
    name: str
    text: str
    seed: int


class RetriesForm(Form):
    ratio: NotNegative
    per_second: NotNegative
    attempts: Count


class FiguresForm(Form):
    """What probes have found of a backend, where its standby is, and whether its budget is used up."""

    probed_up: bool = True
    connects: bool = True
    full_slots: AtLeastOne = 1
    host: dict[str, float] = Field(default_factory=dict)
    host_at: Seconds = 0.0
    models: list[str] = Field(default_factory=list)
    models_unknown: str = ""
    models_awaited: bool = False
    context_tokens: dict[str, Count] = Field(default_factory=dict)
    rtt_s: NotNegative = 0.0
    running: Count = 0
    waiting: Count = 0
    kv_use: NotNegative = 0.0
    sampled_at: Seconds = 0.0
    kv_tokens: Count = 0
    asleep: bool = False
    draining: bool = False
    over_budget: bool = False


class BackendForm(Form):
    name: str
    site: str = ""
    slots: AtLeastOne = 1
    weight: NotNegative = 0.0
    models: list[str] = Field(default_factory=list)
    models_unknown: str = ""
    models_awaited: bool = False
    labels: dict[str, str] = Field(default_factory=dict)
    operator: str = ""
    location: Location | None = None
    data_classes: list[str] | None = None
    context_tokens: dict[str, Count] = Field(default_factory=dict)
    bandwidth: Positive = 1.0
    price_input: NotNegative | None = None
    price_output: NotNegative | None = None
    carbon_gco2_kwh: NotNegative | None = None
    probed_up: bool = True
    kv_tokens: Count = 0
    asleep: bool = False
    standby: bool = False
    adaptive: Literal[True] = True
    breaker: BreakerForm


class FactsForm(Form):
    id: str
    model: str
    endpoint: str = ""
    tenant: str = ""
    key_id: str = ""
    data_class: str = ""
    arrived: Seconds = 0.0
    wall: NotNegative = 0.0
    deadline: Seconds = 0.0
    stream: bool = False
    body_bytes: Count = 0
    prompt_tokens: Count = 0
    max_tokens: Count = 0
    expected_tokens: Count = 0
    session: str = ""
    priority: int = 0
    backend: str = ""
    labels: dict[str, str] = Field(default_factory=dict)
    prefix: list[int] = Field(default_factory=list)
    prefix_tokens: AtLeastOne = 512


class Record(Form):
    n: Count


class Start(Record):
    event: str
    format: int
    start: Seconds
    policy: PolicyForm
    retries: RetriesForm
    health: HealthForm
    backends: list[BackendForm]


class Event(Record):
    event: str
    at: Seconds


class End(Event):
    reason: str


class EventAnywhere(Event):
    """One that may happen amid a poll."""

    within: Literal[True] = True


class Arrival(EventAnywhere):
    request: FactsForm


class FirstToken(EventAnywhere):
    request: str


class Ended(EventAnywhere):
    request: str
    outcome: OutcomeForm
    usage: Usage


class Failed(Ended):
    error: ErrorForm | int
    pause: NotNegative


class Figures(EventAnywhere):
    backends: dict[str, FiguresForm]


class Refresh(EventAnywhere):
    renewed: bool


class Decision(Record):
    decision: str
    decided_by: str
    rule: str
    tier: int


class Send(Decision):
    send: str
    fallbacks: list[str]
    propensity: float
    spilling: bool


class Hold(Decision):
    hold: float | None


class Reject(Decision):
    reject: str
    retry_after_s: float | None


EVENTS: Final[Mapping[str, type[Record]]] = {
    "start": Start,
    "arrival": Arrival,
    "first token": FirstToken,
    "failed": Failed,
    "ended": Ended,
    "freed": Event,
    "poll": Event,
    "figures": Figures,
    "refresh": Refresh,
    "end": End,
}
DECISIONS: Final[Mapping[str, type[Decision]]] = {"send": Send, "hold": Hold, "reject": Reject}


def damage(record: Mapping[str, Any]) -> str:
    """What is wrong with the form of a record, in words; empty: nothing."""
    form: type[Record] | None
    if "event" in record:
        event = record["event"]
        form = EVENTS.get(event) if isinstance(event, str) else None
        if form is None:
            return f"there is no event {shown(event)}"
    elif "decision" in record:
        form = next((form for said, form in DECISIONS.items() if said in record), None)
        if form is None:
            return "a decision without `send`, `hold` or `reject`"
    else:
        return "neither an `event` nor a `decision`"
    try:
        form.model_validate(record)
    except ValidationError as error:
        found = explain(error, form, record)[0]
        return f"{dotted(found.path)}: {found.message}"
    return ""
