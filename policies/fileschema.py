"""The language of policy files: every key, its type and what it does.

The descriptions below feed `tidegate schema` (editors show them) and are checked against docs/policies.md. What a
single value must look like is said here; what must fit together is in `filechecks.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from policies.backendschema import Labels, Name, Names, Part, Selection, as_list
from policies.match import SLA, TASK
from policies.units import BadValueError, Duration, parse_fraction, shown
from policies.yamlfile import FileModel
from policies.yamlproblems import closest

DEFAULT_PICK = "least-load"
"""Policy of a rule that names none."""

WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_WEEKDAY_NAMES = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")

Endpoint = Literal[
    "chat",
    "completions",
    "responses",
    "responses-get",
    "responses-delete",
    "responses-cancel",
    "messages",
    "count-tokens",
    "embeddings",
    "rerank",
    "score",
    "pooling",
    "classify",
    "tokenize",
    "detokenize",
    "transcriptions",
    "translations",
    "speech",
    "images",
    "image-edits",
    "image-variations",
    "realtime",
]
ENDPOINTS: tuple[str, ...] = get_args(Endpoint)
"""What a rule may ask for, by the names that the proxy gives to its paths (docs/api.md)."""

DATA_CLASS = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
"""What a data class of a key looks like; no other can match."""


def _check_data_class(name: str) -> str:
    if DATA_CLASS.fullmatch(name) is None:
        meant = name.strip().lower().replace(" ", "-")
        raise BadValueError(
            f"expected a data class in lower case, such as internal, got {shown(name)}",
            meant if DATA_CLASS.fullmatch(meant) else None,
        )
    return name


_DATA_CLASS_SCHEMA = {"type": "string", "pattern": f"^{DATA_CLASS.pattern}$"}

DataClasses = Annotated[
    tuple[Annotated[str, AfterValidator(_check_data_class)], ...],
    BeforeValidator(as_list),
    Field(min_length=1),
    WithJsonSchema(
        {"anyOf": [_DATA_CLASS_SCHEMA, {"type": "array", "items": _DATA_CLASS_SCHEMA, "minItems": 1}]}
    ),
]

Endpoints = Annotated[tuple[Endpoint, ...], BeforeValidator(as_list), Field(min_length=1)]


# --- time ----------------------------------------------------------------------------------------------------

_WINDOW = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-(?:([01]\d|2[0-3]):([0-5]\d)|24:00)", re.ASCII)
_OFFSET = re.compile(r"([+-])(0\d|1[0-4]):([0-5]\d)", re.ASCII)


def window_minutes(text: str) -> tuple[int, int]:
    """Minutes after midnight of `22:00-06:00`: (1320, 360).

    Raises: BadValueError.
    """
    match = _WINDOW.fullmatch(text)
    if match is None:
        guess = re.fullmatch(r"(\d{1,2})(?::(\d\d))? ?[-–] ?(\d{1,2})(?::(\d\d))?", text, re.ASCII)
        suggestion = None
        if guess is not None:
            h1, m1, h2, m2 = (int(part or 0) for part in guess.groups())
            suggestion = f"{h1:02}:{m1:02}-{h2:02}:{m2:02}"
            suggestion = suggestion if _WINDOW.fullmatch(suggestion) else None
        raise BadValueError(f"expected a time of day such as 08:00-18:00, got {shown(text)}", suggestion)
    start = int(match[1]) * 60 + int(match[2])
    end = 1440 if match[3] is None else int(match[3]) * 60 + int(match[4])
    if start == end:
        raise BadValueError(f"this window is empty: it ends at {text[6:]}, when it starts", "00:00-24:00")
    return start, end


def weekday_numbers(text: str) -> frozenset[int]:
    """Days of `mon`, `mon-fri` or `sat-mon`; 0 is Monday.

    Raises: BadValueError.
    """
    first, dash, last = text.partition("-")
    numbers = []
    for name in (first, last) if dash else (first,):
        if name not in WEEKDAYS:
            suggestion = closest(name[:3] if name.lower() in _WEEKDAY_NAMES else name, WEEKDAYS)
            fixed = text.replace(name, suggestion) if suggestion and name else None
            message = f"expected a weekday such as mon, or mon-fri, got {shown(text)}"
            raise BadValueError(message, fixed)
        numbers.append(WEEKDAYS.index(name))
    length = (numbers[-1] - numbers[0]) % 7 + 1
    return frozenset((numbers[0] + day) % 7 for day in range(length))


def offset_seconds(text: str) -> int:
    """Seconds of `+08:00`.

    Raises: BadValueError.
    """
    if (match := _OFFSET.fullmatch(text)) is None:
        guess = re.fullmatch(r"(?:UTC|GMT)? ?([+-])?(\d{1,2})(?::?(\d\d))?", text, re.ASCII | re.IGNORECASE)
        suggestion = f"{guess[1] or '+'}{int(guess[2]):02}:{guess[3] or '00'}" if guess else None
        if suggestion is not None and not _OFFSET.fullmatch(suggestion):
            suggestion = None
        message = (
            f"expected an offset from UTC such as +08:00 (zones by name are not known), got {shown(text)}"
        )
        raise BadValueError(message, suggestion)
    seconds = int(match[2]) * 3600 + int(match[3]) * 60
    return -seconds if match[1] == "-" else seconds


def _checked(parse: Any) -> AfterValidator:
    """Check the syntax, keep the text: what is written back is what was read."""

    def check(text: str) -> str:
        parse(text)
        return text

    return AfterValidator(check)


Window = Annotated[
    str,
    _checked(window_minutes),
    Field(json_schema_extra={"pattern": r"^\d\d:\d\d-\d\d:\d\d$", "examples": ["22:00-06:00"]}),
]
Weekday = Annotated[str, _checked(weekday_numbers)]
Weekdays = Annotated[
    tuple[Weekday, ...],
    BeforeValidator(as_list),
    Field(min_length=1),
]
Offset = Annotated[
    str,
    _checked(offset_seconds),
    Field(json_schema_extra={"pattern": r"^[+-]\d\d:\d\d$", "examples": ["+08:00"]}),
]


# --- numbers -------------------------------------------------------------------------------------------------


class Range(FileModel):
    """Bounds of a number, both inclusive."""

    min: int | None = None
    """At least this."""
    max: int | None = None
    """At most this."""

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.min is None and self.max is None:
            raise BadValueError("expected a number, or bounds such as {min: 1, max: 5}, got no bounds")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise BadValueError(f"min ({self.min}) is above max ({self.max}): no number fits", at=("min",))
        return self


def _as_range(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        return {"min": value, "max": value}
    if isinstance(value, dict | Range):
        return value
    raise BadValueError(f"expected a number, or bounds such as {{min: 1, max: 5}}, got {shown(value)}")


NumberOrRange = Annotated[Range, BeforeValidator(_as_range)]


def _parse_level(value: object) -> float:
    level = parse_fraction(value)
    if not 0.0 < level <= 4.0:
        suggestion = f"{level:g}%" if 4.0 < level <= 400.0 and not isinstance(value, str) else None
        raise BadValueError(
            f"expected a saturation above 0 and up to 4 (1 is full), or a percentage, got {shown(value)}",
            suggestion,
        )
    return level


Saturation = Annotated[
    float,
    BeforeValidator(_parse_level),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0, "maximum": 4},
                {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)? ?%$"},
            ],
            "examples": [0.85, "85%"],
        }
    ),
]


class Bounds(FileModel):
    """Bounds of a figure, both inclusive: a number, or a percentage where it is a fraction."""

    min: Annotated[float, BeforeValidator(parse_fraction)] | None = None
    """At least this."""
    max: Annotated[float, BeforeValidator(parse_fraction)] | None = None
    """At most this."""

    @model_validator(mode="after")
    def _ordered(self) -> Bounds:
        if self.min is None and self.max is None:
            raise BadValueError("expected bounds such as {max: 90%}, got none")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise BadValueError(f"min ({self.min:g}) is above max ({self.max:g}): nothing fits", at=("min",))
        return self


# --- the file ------------------------------------------------------------------------------------------------


class When(FileModel):
    """Conditions on a request. All that are given must hold; a list holds if one of its entries does."""

    model: Names | None = None
    """Models, after aliases. Patterns may be used: `qwen*`."""
    tenant: Names | None = None
    """Tenants, as keys name them, no patterns."""
    data_class: DataClasses | None = None
    """Data classes, as keys name them; a key without one is `public`."""
    endpoint: Endpoints | None = None
    """API endpoints."""
    priority: NumberOrRange | None = None
    """The request's priority, higher is more urgent: a number, or bounds."""
    prompt_tokens: NumberOrRange | None = None
    """Length of the prompt in tokens, estimated as a quarter of its bytes: a number, or bounds."""
    stream: bool | None = None
    """Whether the answer is streamed."""
    labels: Labels | None = None
    """Labels the request must carry, each with this value."""
    sla: Names | None = None
    """SLA classes: values of the key's label `sla`."""
    task: Names | None = None
    """Tasks: values of the key's label `task`."""
    time: Window | None = None
    """A daily window, `08:00-18:00`; one that ends before it starts passes midnight."""
    days: Weekdays | None = None
    """Weekdays, `mon` or `mon-fri`; of a window that passes midnight, the days it starts on."""

    @model_validator(mode="after")
    def _agree(self) -> When:
        for name, values in ((SLA, self.sla), (TASK, self.task)):
            label = (self.labels or {}).get(name)
            if values is not None and label is not None and label not in values:
                message = f"no request has the label {name} '{label}' and one of {name} here: leave one out"
                raise BadValueError(message, at=("labels", name))
        return self


def _as_pick(value: object) -> object:
    return {"policy": value} if isinstance(value, str) else value


class Pick(FileModel):
    """The policy that chooses among the backends, with its parameters beside its name."""

    model_config = ConfigDict(extra="allow")

    policy: Name
    """Name of the policy."""

    @property
    def parameters(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


PickOrName = Annotated[Pick, BeforeValidator(_as_pick)]


def _parse_overflow(value: object) -> float:
    level = parse_fraction(value)
    if not 1.0 <= level <= 100.0:
        raise BadValueError(
            f"expected 100% (none) up to 10000%, or a number from 1 to 100, got {shown(value)}"
        )
    return level


Overflow = Annotated[
    float,
    BeforeValidator(_parse_overflow),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 1, "maximum": 100},
                {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)? ?%$"},
            ],
            "examples": [1.5, "150%"],
        }
    ),
]


class Spill(FileModel):
    """When a tier begins and ends to spill; while it spills it still takes what it has a free slot for.

    Saturation is 0 for an empty tier, 1 for a full one, above 1 when its engines queue.
    """

    enter: Saturation
    """Saturation from which on it spills. Above 1, it takes requests without a free slot until then."""
    leave: Saturation
    """Saturation below which it no longer does. Below `enter`; the distance keeps it from flapping."""

    @model_validator(mode="after")
    def _ordered(self) -> Spill:
        if self.leave >= self.enter:
            message = f"leave ({self.leave:g}) must be below enter ({self.enter:g}), or spill would flap"
            raise BadValueError(message, at=("leave",))
        return self


class Host(FileModel):
    """Bounds on what the machine of a backend's site says of itself (`sites.NAME.host` in the configuration)."""

    gpu_utilisation: Bounds | None = None
    """Share of their time that its GPUs work, the mean over them."""
    gpu_memory: Bounds | None = None
    """Share of its GPUs' memory in use."""
    gpu_temperature: Bounds | None = None
    """Of the hottest GPU, degrees Celsius."""
    gpu_power: Bounds | None = None
    """Of all GPUs, watts."""
    cpu: Bounds | None = None
    """Share of their time that its processors work."""
    memory: Bounds | None = None
    """Share of its memory in use."""

    @model_validator(mode="after")
    def _reachable(self) -> Host:
        if not self.model_fields_set:
            raise BadValueError("say which figure: gpu_utilisation, for one", "{gpu_utilisation: {max: 90%}}")
        for name in ("gpu_utilisation", "gpu_memory", "cpu", "memory"):
            bounds: Bounds | None = getattr(self, name)
            for bound in ("min", "max"):
                value = None if bounds is None else getattr(bounds, bound)
                if value is not None and not 0.0 <= value <= 1.0:
                    meant = f"{value:g}%" if 1.0 < value <= 100.0 else None
                    raise BadValueError(
                        f"{name} is a fraction from 0 to 1, or a percentage, not {value:g}",
                        meant,
                        at=(name, bound),
                    )
        return self


class Tier(Selection):
    """Backends that are asked together: those of a site, those named, or those with labels, for example."""

    spill: Spill | None = None
    """When the tier begins and ends to spill. Without it, it takes a request when it has a free slot."""
    pick: PickOrName | None = None
    """Policy that chooses in this tier, instead of the rule's."""
    host: Host | None = None
    """A backend whose host is outside of these bounds has no free slot in this tier. Stale figures are ignored."""


class Queue(FileModel):
    """What happens when no tier has room, or nothing runs that may serve a request."""

    wait: Duration = 10.0
    """How long a request is held for room, at most. Then it goes to any backend, full or not, up to `overflow`. One
    that would wait for most of it is answered 429 at once."""
    depth: int = Field(200, ge=0, le=1_000_000)
    """How many requests may be held at once. One more is answered 429."""
    overflow: Overflow = 1.5
    """Saturation up to which backends take requests whose wait is over. Beyond, those are answered 503."""
    cold_start: Duration = 300.0
    """How long a request is held while nothing but a standby may serve it, at most. Then it is answered 503."""


class Rule(FileModel):
    """What happens to the requests that it matches. The first rule that matches applies."""

    name: Name
    """Shown in logs and by `tidegate explain`. Unique."""
    when: When | None = None
    """Which requests. Without it: all."""
    sites: Names | None = None
    """The only sites these requests may ever reach, on spill and retry too; `remote` is every site but `local`.
    Short for `require: {site: ...}`."""
    require: Selection | None = None
    """The only backends these requests may ever reach, on spill and retry too."""
    prefer: tuple[Tier, ...] | None = Field(None, min_length=1, max_length=100)
    """Backends in the order in which they are asked, and no others; one belongs to the first tier that takes it.
    Without it: all at once."""
    avoid: tuple[Selection, ...] | None = Field(None, min_length=1, max_length=100)
    """Of these backends, those that are asked only when no other one takes the request: after all tiers."""
    split: tuple[Part, ...] | None = Field(None, min_length=2, max_length=20)
    """Parts of these backends, each for a fixed share of the requests. A backend belongs to the first part that
    takes it; a conversation stays in its part."""
    pick: PickOrName | None = None
    """Policy that chooses one of the backends asked: a name, or a name with parameters. Default: `least-load`."""
    weights: Mapping[Name, Annotated[float, Field(ge=0, le=1_000_000)]] | None = Field(None, min_length=1)
    """Weights of backends, by name, that replace those of the configuration in this rule. 0 takes nothing
    while another backend that may serve the request is available."""
    queue: Queue = Queue()
    """How long a request is held when no tier has room, and how many may be."""

    @model_validator(mode="after")
    def _agree(self) -> Rule:
        if self.sites is not None and self.require is not None and self.require.site is not None:
            raise BadValueError("sites says this already: keep one of the two", at=("require", "site"))
        names = [part.name for part in self.split or ()]
        for place, name in enumerate(names):
            if name in names[:place]:
                raise BadValueError(f"an earlier part is called '{name}', too", at=("split", place, "name"))
        total = sum(part.share for part in self.split or ())
        if self.split and abs(total - 1.0) > 1e-6:
            last = self.split[-1].share + 1.0 - total
            message = f"the shares make {100 * total:g}%, and have to make 100%"
            meant = f"{100 * last:g}%" if 0.0 < last <= 1.0 else None
            raise BadValueError(message, meant, at=("split", len(self.split) - 1, "share"))
        return self


class PolicyFile(FileModel):
    """Where requests go. Rules are tried from the top; the last one has to match every request."""

    model_config = ConfigDict(title="Tidegate policy file")

    rules: tuple[Rule, ...] = Field(min_length=1, max_length=1000)
    """Tried in order; the first that matches a request decides."""
    utc_offset: Offset = "+00:00"
    """What `time` and `days` mean: local time as an offset from UTC. A zone's summer time is not followed."""
