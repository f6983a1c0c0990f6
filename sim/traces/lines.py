"""Lines of a trace: opened plain or compressed, cut into records, their values checked, what is wrong kept."""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias, cast

import orjson

from policies.units import shown
from sim.workload import Problem

MOST_TOKENS: Final = 10_000_000
"""No prompt or answer is longer; a larger count is a mistake."""
MOST_SECONDS: Final = 1e11
"""A time of the years after 5000 is a mistake, too."""
KEPT_PROBLEMS: Final = 20

_WHOLE: Final = re.compile(r" *-?[0-9]{1,30} *")
_BOM: Final = b"\xef\xbb\xbf"
_FIELD: Final = re.compile(r'(?:"(?:[^"]++|"")*+"|[^",\r\n][^,\r\n]*|),')
"""One that is not the last of its row, comma included."""


class TraceError(ValueError):
    """A trace that cannot be used, in one line."""


class FieldError(ValueError):
    """What is wrong with a record, and in which column; an empty one: with the record as a whole."""

    def __init__(self, column: str, message: str) -> None:
        super().__init__(message)
        self.column = column
        self.message = message


Record: TypeAlias = "Mapping[str, Any] | FieldError"
"""Values by their column: text from CSV, whatever JSON has from JSON lines."""


class LeftOut:
    """Counts the lines that were left out, and keeps the first few."""

    def __init__(self, file: str, strict: bool = False) -> None:
        """`strict`: the first one raises TraceError."""
        self.file = file
        self.strict = strict
        self.problems: list[Problem] = []
        self.count = 0

    def add(self, lines: range, error: FieldError) -> None:
        """The lines of a record are left out. Raises TraceError if that is not wanted."""
        problem = Problem(self.file, lines[0], error.column, error.message)
        if self.strict:
            raise TraceError(str(problem))
        self.count += len(lines)
        if len(self.problems) < KEPT_PROBLEMS:
            self.problems.append(problem)


# Files


@contextmanager
def open_trace(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked if it is a gzip file, whatever its name. Raises OSError, and TraceError
    for one that is damaged."""
    with path.open("rb") as file:
        if file.peek(2)[:2] != b"\x1f\x8b":
            yield file
            return
        try:
            with gzip.open(file) as unpacked:
                yield cast(BinaryIO, unpacked)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise TraceError(f"{path}: the gzip file is damaged or cut short ({error})") from None


def json_records(file: Iterable[bytes]) -> Iterator[tuple[range, Record]]:
    """(lines, record) of each line that is not empty."""
    for number, line in enumerate(file, 1):
        text = line.removeprefix(_BOM) if number == 1 else line
        if not text.strip():
            continue
        try:
            value = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            yield (
                range(number, number + 1),
                FieldError("", f"not JSON: {error.msg}, at character {error.colno}"),
            )
            continue
        yield (
            range(number, number + 1),
            value if isinstance(value, dict) else FieldError("", "not a JSON object"),
        )


def csv_records(file: Iterable[bytes], *, quoted: bool) -> Iterator[tuple[range, Record]]:
    """(lines, record) of each row; the first line names the columns.

    `quoted`: text may be quoted and go over several lines (RFC 4180). A row whose quotes are wrong is one record
    that cannot be read, with all the lines it went over; the next one begins on the line after them. Elsewhere a
    quote is no more than a wrong character, and spoils one line.
    """
    taken: list[str] = []
    """Lines of the present record."""
    ended = False

    def decoded() -> Iterator[str]:
        nonlocal ended
        for line in file:
            taken.append(line.decode("utf-8", "replace").removeprefix("\ufeff"))
            yield taken[-1]
        ended = True

    reader = csv.reader(decoded(), quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE, strict=quoted)
    columns: list[str] | None = None
    while True:
        taken.clear()
        row: list[str] = []
        wrong: FieldError | None = None
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            wrong = _not_csv("".join(taken), columns or [], len(taken), None if ended else error)
        lines = range(reader.line_num - len(taken) + 1, reader.line_num + 1)
        if wrong is not None:
            yield lines, wrong
            if columns is None:
                return
        elif columns is None:
            columns = [name.strip() for name in row]
        elif len(row) == len(columns):
            swallowing = _swallowing(row) if len(taken) > 1 else None
            if swallowing is None:
                yield lines, dict(zip(columns, row, strict=True))
            else:
                message = f"its quotes hold{_over(len(lines))} that look like rows: is one of them not meant?"
                yield lines, FieldError(columns[swallowing], message)
        elif row:
            message = f"{len(row)} fields where {len(columns)} are expected{_over(len(lines), ', in')}"
            yield lines, FieldError("", message)


def _over(lines: int, before: str = "") -> str:
    """That a record has several lines."""
    return f"{before} {lines} lines" if lines > 1 else ""


def _not_csv(text: str, columns: list[str], lines: int, error: csv.Error | None) -> FieldError:
    """What is wrong with the text of a record. No `error`: the file ended within quotes."""
    index = at = 0
    while found := _FIELD.match(text, at):
        index, at = index + 1, found.end()
    column = columns[index] if index < len(columns) else ""
    if error is None:
        message = f"a quote is never closed: everything to the end is left out{_over(lines, ',')}"
    else:
        message = f"not CSV: {error}{_over(lines, ', in')}"
    return FieldError(column, message)


def _swallowing(row: list[str]) -> int | None:
    """The field that holds rows, if one does: it begins with the rest of a row and ends with the beginning of one.

    For text of several lines that would take as many commas in its first and its last line.
    """
    broken = [index for index, value in enumerate(row) if "\n" in value]
    if not broken:
        return None
    first, last = row[broken[0]].partition("\n")[0], row[broken[-1]].rpartition("\n")[2]
    rests = first.count(",") >= len(row) - 1 - broken[0] and last.count(",") >= broken[-1]
    return broken[0] if rests else None


# Values


def value_of(record: Mapping[str, Any], column: str) -> Any:
    """The value of a column. Raises FieldError if there is none."""
    try:
        return record[column]
    except KeyError:
        raise FieldError(column, "is missing") from None


def whole(record: Mapping[str, Any], column: str, least: int, most: int) -> int:
    """A whole number within bounds, from JSON or text. Raises FieldError."""
    value = value_of(record, column)
    if isinstance(value, str):
        found = int(value) if _WHOLE.fullmatch(value) else None
    else:
        found = value if isinstance(value, int) and not isinstance(value, bool) else None
    if found is None:
        raise FieldError(column, f"expected a whole number, got {shown(value)}")
    if not least <= found <= most:
        raise FieldError(column, f"expected {least} to {most}, got {found}")
    return found


def number(record: Mapping[str, Any], column: str, least: float, most: float) -> float:
    """A number within bounds, from JSON or text. Raises FieldError."""
    value = value_of(record, column)
    try:
        if isinstance(value, bool):
            raise TypeError
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        raise FieldError(column, f"expected a number, got {shown(value)}") from None
    if not (isfinite(found) and least <= found <= most):
        raise FieldError(column, f"expected {least:g} to {most:g}, got {shown(value)}")
    return found


def tokens(record: Mapping[str, Any], column: str) -> int:
    """A count of tokens, one or more. Raises FieldError."""
    count = whole(record, column, 0, MOST_TOKENS)
    if not count:
        raise FieldError(column, "no tokens: a request that failed, or none")
    return count


def text(record: Mapping[str, Any], column: str, default: str) -> str:
    """Text, or the default where it is absent or empty. Raises FieldError."""
    value = record.get(column)
    if value is None or value == "":
        return default
    if not isinstance(value, str):
        raise FieldError(column, f"expected text, got {shown(value)}")
    return value


def flag(record: Mapping[str, Any], column: str, default: bool) -> bool:
    """True or false as JSON has it, or the default where it is absent. Raises FieldError."""
    value = record.get(column, default)
    if not isinstance(value, bool):
        raise FieldError(column, f"expected true or false, got {shown(value)}")
    return value


def labels(record: Mapping[str, Any], column: str) -> tuple[tuple[str, str], ...]:
    """Names and values of a map of text, none where it is absent. Raises FieldError."""
    value = record.get(column, {})
    if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
        raise FieldError(column, f"expected a map of text, got {shown(value)}")
    return tuple(value.items())


def hashes(record: Mapping[str, Any], column: str, most: int) -> tuple[int, ...]:
    """The leading `most` of a list of whole numbers; in CSV it is written as JSON has it. Raises FieldError."""
    value = record.get(column)
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            raise FieldError(column, f"expected a list of whole numbers, got {shown(value)}") from None
    if not isinstance(value, list) or not all(type(one) is int for one in value):
        raise FieldError(column, f"expected a list of whole numbers, got {shown(value)}")
    return tuple(value[:most])
