"""Quantities as people write them in files: `10s`, `16MiB`, `85%`.

Each is a pydantic annotated type: a plain number in the model, text or a number in the file, and both in the
JSON Schema that editors read.
"""

from __future__ import annotations

import re
from math import isfinite
from typing import Annotated, TypeGuard

from pydantic import BeforeValidator, WithJsonSchema


class BadValueError(ValueError):
    """What a validator raises: one plain sentence, and if it can be guessed, what was meant.

    `at` points at the culprit below the value that is being validated: `("spill", "leave")`.
    """

    def __init__(self, message: str, suggestion: str | None = None, at: tuple[str | int, ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.suggestion = suggestion
        self.at = at


def shown(value: object) -> str:
    """A value from a file, as an error message names it: `'abc'`, `85`, `a list`, `nothing`."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"'{value}'" if len(value) <= 60 else f"'{value[:57]}...'"
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, dict):
        return "keys and values"
    return "a list"


_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|s|m|h|d))+", re.ASCII)
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", re.ASCII)

_NUMBER = re.compile(r"\d+(?:\.\d+)?", re.ASCII)

_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_BYTES_LOWER = {unit.lower(): unit for unit in _BYTES}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", re.ASCII)

_PERCENT = re.compile(r"(\d+(?:\.\d+)?) ?%", re.ASCII)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def parse_duration(value: object) -> float:
    """Seconds from `500ms`, `10s`, `2m`, `1h30m`, `1d` or a bare number of seconds.

    Raises: BadValueError.
    """
    seconds: float | None = None
    suggestion = None
    if _is_number(value):
        seconds = float(value)
    elif isinstance(value, str):
        if _DURATION.fullmatch(value):
            seconds = sum(float(number) * _SECONDS[unit] for number, unit in _DURATION_PART.findall(value))
        elif _DURATION.fullmatch(closer := _duration_guess(value)):
            suggestion = closer
    if seconds is None or not isfinite(seconds) or seconds < 0:
        raise BadValueError(f"expected a duration such as 10s, 500ms or 2m, got {shown(value)}", suggestion)
    return seconds


def typed_duration(text: str) -> float:
    """Seconds from an option's text, where a bare number is text too.

    Raises: BadValueError.
    """
    return parse_duration(float(text) if _NUMBER.fullmatch(text) else text)


def _duration_guess(text: str) -> str:
    """`10 Sec` -> `10s`: the spellings that other tools take."""
    text = text.lower().replace(" ", "")
    text = re.sub(r"(?:milliseconds?|msecs?|millis)", "ms", text)
    text = re.sub(r"(?:seconds?|secs?)", "s", text)
    text = re.sub(r"(?:minutes?|mins?)", "m", text)
    text = re.sub(r"(?:hours?|hrs?)", "h", text)
    return re.sub(r"days?", "d", text)


def parse_size(value: object) -> int:
    """Bytes from `16MiB` (2^20), `64KB` (1000) or a bare number of bytes.

    Raises: BadValueError.
    """
    size: float | None = None
    suggestion = None
    if _is_number(value):
        size = float(value)
    elif isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        number, unit = match.groups()
        if unit in _BYTES:
            size = float(number) * _BYTES[unit]
        elif unit.lower() in _BYTES_LOWER:
            suggestion = number + _BYTES_LOWER[unit.lower()]
        elif unit.upper() in ("K", "M", "G"):
            suggestion = f"{number}{unit.upper()}iB"
    if size is None or not isfinite(size) or size < 0 or size != int(size):
        raise BadValueError(f"expected a size such as 16MiB or 64KB, got {shown(value)}", suggestion)
    return int(size)


def parse_fraction(value: object) -> float:
    """A fraction from `0.85` or `85%`, not bounded here.

    Raises: BadValueError.
    """
    if _is_number(value) and isfinite(float(value)):
        return float(value)
    if isinstance(value, str) and (match := _PERCENT.fullmatch(value)):
        return float(match[1]) / 100.0
    raise BadValueError(f"expected a fraction such as 0.85 or a percentage such as 85%, got {shown(value)}")


def _parse_bounded_fraction(value: object) -> float:
    fraction = parse_fraction(value)
    if not 0.0 <= fraction <= 1.0:
        suggestion = f"{fraction:g}%" if _is_number(value) and 1.0 < fraction <= 100.0 else None
        raise BadValueError(
            f"expected a fraction from 0 to 1 or a percentage, got {shown(value)}", suggestion
        )
    return fraction


Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 0},
                {"type": "string", "pattern": r"^([0-9]+(\.[0-9]+)?(ms|s|m|h|d))+$"},
            ],
            "examples": ["10s", "500ms", "2m", "1h"],
        }
    ),
]
"""Seconds; in a file `10s`, `500ms`, `2m`, `1h30m` or a number of seconds."""

Size = Annotated[
    int,
    BeforeValidator(parse_size),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0},
                {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)? ?(B|KB|MB|GB|KiB|MiB|GiB)$"},
            ],
            "examples": ["16MiB", "64KB"],
        }
    ),
]
"""Bytes; in a file `16MiB`, `64KB` or a number of bytes."""

Fraction = Annotated[
    float,
    BeforeValidator(_parse_bounded_fraction),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 0, "maximum": 1},
                {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)? ?%$"},
            ],
            "examples": [0.85, "85%"],
        }
    ),
]
"""0 to 1; in a file `0.85` or `85%`."""
