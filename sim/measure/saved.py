"""Reads reports back that `tidegate bench --json` wrote."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from sim.measure.sweep import Report
from sim.timings import TimingsError, text_lines
from sim.workload import Problem


def is_report(path: Path) -> bool:
    """By its name, which ends in `.json` or `.json.gz`; JSON lines end in `.jsonl`."""
    return path.name.removesuffix(".gz").endswith(".json")


def read_report(path: Path) -> Report:
    """A report as it was when it was written. Raises OSError, and ValueError: the file is none; it says where."""
    text = "".join(text_lines(path))
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        said = f"is not one JSON document, as bench writes it: {error.msg}; name a file of JSON lines .jsonl"
        raise TimingsError(Problem(str(path), error.lineno, "", said)) from error
    try:
        return TypeAdapter(Report).validate_python(document)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        raise ValueError(
            f"{path}: {where} is not as `tidegate bench --json` writes it: {problem['msg']}"
        ) from error
