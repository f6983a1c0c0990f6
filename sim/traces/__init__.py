"""Readers of traces: from a file to a `sim.workload.Workload`. Their forms are listed in `sim/traces/forms.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from sim.traces import forms, servegen
from sim.traces.forms import FORMS, Form, write_workload
from sim.traces.lines import FieldError, LeftOut, Record, TraceError, csv_records, json_records, open_trace
from sim.traces.servegen import Span, read_servegen
from sim.workload import Arrival, Workload, in_order

__all__ = ["FORM_NAMES", "Span", "TraceError", "form_of", "read_workload", "write_workload"]

FORM_NAMES: Final = (*(form.name for form in FORMS), "servegen", "workload")


def read_workload(
    path: str | Path, form: str | None = None, *, strict: bool = False, span: Span | None = None
) -> Workload:
    """Read a trace, plain or compressed with gzip.

    `form`: one of `FORM_NAMES`; None: seen from the first record. `strict`: the first line that cannot be
    read raises, instead of being left out and counted. `span`: what is drawn from a ServeGen trace.

    Arrivals come in order of time, the first one at zero; in our own form and ServeGen's, zero is the
    beginning that the file or the span has.

    Raises OSError, and TraceError for a file that is damaged, has no form that is known, or has no request.
    """
    path = Path(path)
    if form is not None and form not in FORM_NAMES:
        raise TraceError(f"there is no form {form!r}: {', '.join(FORM_NAMES)}")
    first = _first_record(path)
    if form is None:
        form = _recognised(path, first)
    if form == "servegen":
        _require(path, form, servegen.COLUMNS, first)
        return read_servegen(path, span or Span(), strict=strict)
    if form == "workload":
        return _read_own(path, first, strict)
    found = next(one for one in FORMS if one.name == form)
    _require(path, form, found.columns, first)
    return _read(path, found, path.name.partition(".")[0], strict, skip=0)


def form_of(path: str | Path) -> str:
    """Which of `FORM_NAMES` a trace has, seen from its first record. Raises OSError and TraceError."""
    path = Path(path)
    return _recognised(path, _first_record(path))


def _read_own(path: Path, head: Record, strict: bool) -> Workload:
    try:
        form, name = forms.own_form({} if isinstance(head, FieldError) else head)
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from None
    return _read(path, form, name, strict, skip=1)


def _read(path: Path, form: Form, name: str, strict: bool, skip: int) -> Workload:
    """`skip`: records before the first request."""
    left_out = LeftOut(str(path), strict)
    arrivals: list[Arrival] = []
    for lines, record in _records(path, form.quoted):
        if skip:
            skip -= 1
            continue
        try:
            if isinstance(record, FieldError):
                raise record
            arrivals.append(form.arrival(record))
        except FieldError as error:
            left_out.add(lines, error)
    if not arrivals:
        first = f", first {left_out.problems[0]}" if left_out.problems else ""
        raise TraceError(f"{path}: no request in it; {left_out.count} lines left out{first}")
    arrivals = in_order(arrivals)
    if not form.starts_at_zero:
        start = arrivals[0].at
        arrivals = [arrival._replace(at=arrival.at - start) for arrival in arrivals]
    return Workload(name, arrivals, form.unit_tokens, left_out.problems, left_out.count)


def _records(path: Path, quoted: bool) -> Iterator[tuple[range, Record]]:
    with open_trace(path) as file:
        json = _is_json(file.readline(64))
    with open_trace(path) as file:
        yield from json_records(file) if json else csv_records(file, quoted=quoted)


def _is_json(start: bytes) -> bool:
    return start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")


# What it is


def _first_record(path: Path) -> Record:
    """Of JSON lines the first; of CSV the names of the columns, without values."""
    with open_trace(path) as file:
        line = file.readline(1 << 20)
    if not line.strip():
        raise TraceError(f"{path}: the file is empty, or begins with an empty line")
    if _is_json(line):
        return next(json_records([line]))[1]
    return dict.fromkeys(name.strip() for name in line.decode("utf-8-sig", "replace").split(","))


def _recognised(path: Path, first: Record) -> str:
    columns: Mapping[str, Any] = {} if isinstance(first, FieldError) else first
    if forms.VERSION_KEY in columns:
        return "workload"
    for name, needed in _needed():
        if set(needed) <= set(columns):
            return name
    expected = "; ".join(f"{name} ({', '.join(needed)})" for name, needed in _needed())
    got = first.message if isinstance(first, FieldError) else ", ".join(list(columns)[:12])[:200]
    raise TraceError(
        f"{path}: a form that is not known, expected one of these with their columns: {expected}; "
        f"or workload (a head with {forms.VERSION_KEY}); got {got!r}"
    )


def _needed() -> list[tuple[str, tuple[str, ...]]]:
    """Columns by form."""
    return [*((form.name, form.columns) for form in FORMS), ("servegen", servegen.COLUMNS)]


def _require(path: Path, form: str, columns: tuple[str, ...], first: Record) -> None:
    """A first record that cannot be read is left out like any other. Raises TraceError."""
    if isinstance(first, FieldError):
        return
    missing = [column for column in columns if column not in first]
    if missing:
        raise TraceError(
            f"{path}: form {form} needs the columns {', '.join(columns)}: no {', '.join(missing)}"
        )
