"""How policy files speak of backends: by site, name, labels, operator, price, carbon and round trip."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import inf
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from policies.match import NO_LABELS, Between, Selector
from policies.units import BadValueError, Fraction, parse_duration, shown
from policies.yamlfile import FileModel


def as_list(value: object) -> object:
    """One entry may stand for a list of one."""
    return [value] if isinstance(value, str | int | float) else value


Name = Annotated[str, Field(min_length=1, max_length=100)]

Names = Annotated[
    tuple[Name, ...],
    BeforeValidator(as_list),
    Field(min_length=1),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
            ]
        }
    ),
]
"""One name or a list of names."""

Labels = Annotated[Mapping[Name, Name], Field(min_length=1)]


_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?(ms|s)?", re.ASCII)


def _bounds_only(example: str) -> BeforeValidator:
    """Bounds have to say which they are: `price: 2` could be either."""

    def check(value: object) -> object:
        if isinstance(value, dict | FileModel):
            return value
        meant = None
        if _NUMBER.fullmatch(str(value)):
            unit = "ms" if example.endswith("ms}") and isinstance(value, int) else ""
            meant = f"{{max: {value}{unit}}}"
        raise BadValueError(f"expected bounds such as {example}, got {shown(value)}", meant)

    return BeforeValidator(check)


def check_order(low: float | None, high: float | None, example: str) -> None:
    """Raises BadValueError if there are no bounds, or nothing is between them."""
    if low is None and high is None:
        raise BadValueError(f"expected bounds such as {example}, got none")
    if low is not None and high is not None and low > high:
        raise BadValueError(f"min ({low:g}) is above max ({high:g}): nothing fits", at=("min",))


Amount = Annotated[float, Field(ge=0)]


class Amounts(FileModel):
    """Bounds of an amount, both inclusive."""

    min: Amount | None = None
    """At least this."""
    max: Amount | None = None
    """At most this."""

    @model_validator(mode="after")
    def _ordered(self) -> Amounts:
        check_order(self.min, self.max, "{max: 2}")
        return self


class Price(FileModel):
    """Bounds of a price per million tokens, in the ledger's currency. `min`, `max`: of input and output added."""

    min: Amount | None = None
    """At least this, input and output together."""
    max: Amount | None = None
    """At most this, input and output together."""
    input: Annotated[Amounts, _bounds_only("{max: 2}")] | None = None
    """Of a million tokens of the prompt alone."""
    output: Annotated[Amounts, _bounds_only("{max: 2}")] | None = None
    """Of a million tokens of the answer alone."""

    @model_validator(mode="after")
    def _ordered(self) -> Price:
        if (self.input is None and self.output is None) or not (self.min is None and self.max is None):
            check_order(self.min, self.max, "{max: 2}, or {output: {max: 1}}")
        parts = [between(self.input) or Between(0.0), between(self.output) or Between(0.0)]
        least, most = sum(part.low for part in parts), sum(part.high for part in parts)
        if self.max is not None and least > self.max:
            message = (
                f"max ({self.max:g}) is below what input and output cost at least ({least:g}): nothing fits"
            )
            raise BadValueError(message, at=("max",))
        if self.min is not None and most < self.min:
            message = (
                f"min ({self.min:g}) is above what input and output cost at most ({most:g}): nothing fits"
            )
            raise BadValueError(message, at=("min",))
        return self


MOST_ROUND_TRIP_S = 10.0
"""No network has more: a number above it without a unit was meant as milliseconds."""


def _parse_round_trip(value: object) -> float:
    seconds = parse_duration(value)
    if seconds > MOST_ROUND_TRIP_S:
        meant = f"{value}ms" if isinstance(value, int | float) else None
        raise BadValueError(f"expected a round trip such as 50ms, got {shown(value)}", meant)
    return seconds


RoundTrip = Annotated[
    float,
    BeforeValidator(_parse_round_trip),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 0, "maximum": MOST_ROUND_TRIP_S},
                {"type": "string", "pattern": r"^([0-9]+(\.[0-9]+)?(ms|s))+$"},
            ],
            "examples": ["50ms", "0.2s"],
        }
    ),
]


class Rtt(FileModel):
    """Bounds of the network round trip, as it is measured; both inclusive."""

    min: RoundTrip | None = None
    """At least this."""
    max: RoundTrip | None = None
    """At most this."""

    @model_validator(mode="after")
    def _ordered(self) -> Rtt:
        check_order(self.min, self.max, "{max: 50ms}")
        if self.max == 0.0:
            raise BadValueError("no backend is as near as that", at=("max",))
        return self


class Described(FileModel):
    """Backends by what the configuration says of them. All that is given must hold; what is not known of a backend
    is inside of no bounds."""

    site: Names | None = None
    """Sites by name; `remote` is every site but `local`, `"*"` any site."""
    backend: Names | None = None
    """Backends by name."""
    labels: Labels | None = None
    """Labels the backends must carry, each with this value."""
    operator: Names | None = None
    """Operators of their sites."""
    price: Annotated[Price, _bounds_only("{max: 2}")] | None = None
    """Bounds of their price per million tokens."""
    carbon: Annotated[Amounts, _bounds_only("{max: 400}")] | None = None
    """Bounds of their sites' carbon, grams of CO2 per kWh."""


class Selection(Described):
    """Backends by what the configuration says of them and by how near they are. All that is given must hold; what
    is not known of a backend is inside of no bounds."""

    rtt: Annotated[Rtt, _bounds_only("{max: 50ms}")] | None = None
    """Bounds of the network round trip to them, as it is measured at the moment."""

    @model_validator(mode="after")
    def _not_empty(self) -> Selection:
        if all(getattr(self, name) is None for name in Selection.model_fields):
            names = ", ".join(Selection.model_fields)
            raise BadValueError(f"say which backends, by one at least of {names}", 'site: "*"')
        return self


class Part(Described):
    """Some of a rule's backends, and the share of its requests that goes to them."""

    name: Name
    """Shown by `tidegate explain`. Unique in the rule; the same requests belong to it under that name."""
    share: Fraction
    """Of the rule's requests; those of all parts make 100%."""
    strict: bool = False
    """Whether its requests are refused while none of its backends is available. Else they go to other parts."""


def between(bounds: Amounts | Price | Rtt | None) -> Between | None:
    """The compiled bounds; None: there are none."""
    if bounds is None or (bounds.min is None and bounds.max is None):
        return None
    return Between(0.0 if bounds.min is None else bounds.min, inf if bounds.max is None else bounds.max)


def selector(section: Described | None, sites: tuple[str, ...] | None = None) -> Selector:
    """The compiled set of backends. `sites`: sites of its own, if the section names none."""
    if section is None:
        return Selector(sites=frozenset(sites or ()))
    price = section.price
    values: dict[str, Any] = {
        "sites": frozenset(section.site or sites or ()),
        "backends": frozenset(section.backend or ()),
        "labels": dict(section.labels) if section.labels else NO_LABELS,
        "operators": frozenset(section.operator or ()),
        "price": between(price),
        "price_input": between(price.input) if price else None,
        "price_output": between(price.output) if price else None,
        "carbon": between(section.carbon),
    }
    if isinstance(section, Selection):
        values["rtt"] = between(section.rtt)
    return Selector(**values)
