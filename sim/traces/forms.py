"""Forms of traces with one request on each line: their columns, and how a record becomes an arrival.

| form | from | columns |
|---|---|---|
| `azure` | Azure's LLM inference traces (Patel et al., "Splitwise", ISCA 2024) | CSV, date and time |
| `burstgpt` | BurstGPT (Wang et al., arXiv 2401.17644), with or without sessions | CSV, seconds |
| `mooncake` | Mooncake (Qin et al., FAST 2025) | JSON lines, milliseconds |
| `export` | `tidegate export` | JSON lines or CSV, Unix seconds |
| `workload` | `tidegate workload generate` | JSON lines below a head, microseconds |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, BinaryIO, Final

import orjson

from policies.units import shown
from sim.traces.lines import (
    MOST_SECONDS,
    FieldError,
    TraceError,
    flag,
    hashes,
    labels,
    number,
    text,
    tokens,
    value_of,
    whole,
)
from sim.workload import Arrival, Workload

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Form:
    """One form."""

    name: str
    columns: tuple[str, ...]
    """Which it must have."""
    arrival: Callable[[Mapping[str, Any]], Arrival]
    """From a record; its time counts from anywhere. Raises FieldError."""
    unit_tokens: int = 0
    """Tokens that one hash stands for."""
    quoted: bool = False
    """In CSV, text is quoted where it must be."""
    starts_at_zero: bool = False
    """Its times count from the beginning of the workload, which may be before the first arrival."""


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)


# Azure


def _azure(record: Mapping[str, Any]) -> Arrival:
    value = value_of(record, "TIMESTAMP")
    try:
        moment = datetime.fromisoformat(value.strip())
    except (AttributeError, ValueError):
        raise FieldError("TIMESTAMP", f"expected a date and time, got {shown(value)}") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return Arrival(
        (moment - _EPOCH) // _MICROSECOND, tokens(record, "ContextTokens"), tokens(record, "GeneratedTokens")
    )


# BurstGPT


def _burstgpt(record: Mapping[str, Any]) -> Arrival:
    return Arrival(
        _microseconds(number(record, "Timestamp", 0, MOST_SECONDS)),
        tokens(record, "Request tokens"),
        tokens(record, "Response tokens"),
        model=text(record, "Model", ""),
        session=text(record, "Session ID", ""),
    )


# Mooncake

MOONCAKE_UNIT: Final = 512


def _mooncake(record: Mapping[str, Any]) -> Arrival:
    prompt = tokens(record, "input_length")
    value_of(record, "hash_ids")
    return Arrival(
        round(number(record, "timestamp", 0, MOST_SECONDS * 1000) * 1000),
        prompt,
        tokens(record, "output_length"),
        # The last one may stand for less than a unit: such a piece nobody shares.
        hashes(record, "hash_ids", prompt // MOONCAKE_UNIT),
    )


# Tidegate's export

EXPORT_UNIT: Final = 512
"""A hash in a row stands for 2 KiB of the request's body: about so many tokens."""


def _export(record: Mapping[str, Any]) -> Arrival:
    at = _microseconds(number(record, "arrived", 0, MOST_SECONDS))
    outcome = text(record, "outcome", "ok")
    for column in ("prompt_tokens", "completion_tokens"):
        if outcome != "ok" and not whole(record, column, 0, 2**63):
            raise FieldError(column, f"no tokens are known: the request ended as {shown(outcome)}")
    prompt = tokens(record, "prompt_tokens")
    return Arrival(
        at,
        prompt,
        tokens(record, "completion_tokens"),
        hashes(record, "prefix", prompt // EXPORT_UNIT),
        tenant=text(record, "tenant", "default"),
        model=text(record, "served_model", text(record, "model", "")),
        data_class=text(record, "data_class", "public"),
        session=text(record, "session", ""),
    )


AZURE = Form("azure", ("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _azure)
BURSTGPT = Form("burstgpt", ("Timestamp", "Model", "Request tokens", "Response tokens"), _burstgpt)
MOONCAKE = Form(
    "mooncake", ("timestamp", "input_length", "output_length", "hash_ids"), _mooncake, MOONCAKE_UNIT
)
EXPORT = Form(
    "export", ("op", "arrived", "prompt_tokens", "completion_tokens"), _export, EXPORT_UNIT, quoted=True
)
FORMS: Final = (AZURE, BURSTGPT, MOONCAKE, EXPORT)
"""Those that name their columns in every record, or in the first line."""

# Our own

VERSION_KEY: Final = "workload_version"
VERSION: Final = 1
MOST_UNIT: Final = 1 << 20

_KEYS: Final = {
    "at_us": "at",
    "prompt_tokens": "prompt_tokens",
    "output_tokens": "output_tokens",
    "hashes": "hashes",
    "tenant": "tenant",
    "model": "model",
    "data_class": "data_class",
    "priority": "priority",
    "session": "session",
    "think_us": "think",
    "labels": "labels",
    "endpoint": "endpoint",
    "stream": "stream",
}
"""Keys of a line, and the fields of `Arrival` that they are. What has its default is not written."""
_ALWAYS: Final = ("at_us", "prompt_tokens", "output_tokens")
_WRITTEN: Final = [
    (key, list(Arrival._fields).index(field), Arrival._field_defaults.get(field))
    for key, field in _KEYS.items()
]
_MOST_US: Final = int(MOST_SECONDS * 1e6)


def own_form(head: Mapping[str, Any]) -> tuple[Form, str]:
    """The form of the lines below this head, and the name of the workload. Raises TraceError."""
    if head.get(VERSION_KEY) != VERSION:
        raise TraceError(
            f"the first line is no head of a workload: it has no {VERSION_KEY!r}: {VERSION}; "
            f"`tidegate workload generate` writes one"
        )
    try:
        unit = whole(head, "unit_tokens", 0, MOST_UNIT)
        name = text(head, "name", "")
    except FieldError as error:
        raise TraceError(f"line 1, {error.column}: {error.message}") from None

    def arrival(record: Mapping[str, Any]) -> Arrival:
        unknown = next((key for key in record if key not in _KEYS), None)
        if unknown is not None:
            raise FieldError(unknown, "there is no such key")
        prompt, output = tokens(record, "prompt_tokens"), tokens(record, "output_tokens")
        units = (prompt + output) // unit if unit else 0
        found = hashes(record, "hashes", units + 1)
        if len(found) > units:
            raise FieldError("hashes", f"more than the {units} units of {unit} tokens in prompt and answer")
        return Arrival(
            whole(record, "at_us", 0, _MOST_US),
            prompt,
            output,
            found,
            text(record, "tenant", "default"),
            text(record, "model", ""),
            text(record, "data_class", "public"),
            whole(record, "priority", -(2**31), 2**31) if "priority" in record else 0,
            text(record, "session", ""),
            whole(record, "think_us", -1, _MOST_US) if "think_us" in record else -1,
            labels(record, "labels"),
            text(record, "endpoint", "chat"),
            flag(record, "stream", True),
        )

    return Form("workload", _ALWAYS, arrival, unit, starts_at_zero=True), name


def write_workload(workload: Workload, file: BinaryIO) -> None:
    """Write a workload in our own form: a head, then one line for each request. Raises OSError."""
    head = {VERSION_KEY: VERSION, "name": workload.name, "unit_tokens": workload.unit_tokens}
    file.write(orjson.dumps(head, option=orjson.OPT_APPEND_NEWLINE))
    for arrival in workload:
        line: dict[str, Any] = {
            key: arrival[index]
            for key, index, default in _WRITTEN
            if key in _ALWAYS or arrival[index] != default
        }
        if arrival.labels:
            line["labels"] = dict(arrival.labels)
        file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
