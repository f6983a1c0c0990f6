"""Measured serving times: files of single requests, and of concurrency sweeps.

CSV with a header, or one JSON object a line; `.gz` is read as it is. Which of the three a file is, its first
row tells:

| one row for | columns |
|---|---|
| a request | `arrival_s`, `prompt_tokens`, `output_tokens`, `ttft_s`, `e2e_s` |
| a request, by vLLM's own clock | `queued_ts`, `input_toks`, `output_toks`, `first_token_ts`, `last_token_ts` |
| a level of a sweep | `concurrency`, `prompt_tokens`, `output_tokens`, `ttft_s`, `tpot_s` (means), `requests` |

All times are seconds; other columns are ignored. `requests`, which may be left out, says how many are behind
the means of a level, which began with all users at once; without it, they are those of a loop that was under
way before. What `tidegate bench --json` writes is no such file: `sim.measure.saved` reads it.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any, Final, NamedTuple

from sim.workload import Problem

SLOW_TPOT: Final = 1e6
SLOW_TTFT: Final = 1e9
"""Microseconds that nobody waits."""


class Timing(NamedTuple):
    """One measured request. Times are microseconds."""

    at: int
    """Its arrival, since that of the first."""
    prompt_tokens: int
    output_tokens: int
    ttft: float
    """From its arrival to its first token."""
    e2e: float
    """From its arrival to its last token."""


class Level(NamedTuple):
    """One level of a closed loop: so many users, each of whom asks again when the answer is there."""

    concurrency: int
    prompt_tokens: int
    output_tokens: int
    ttft: float
    """Mean, microseconds."""
    tpot: float
    """Mean time of an output token after the first, microseconds."""
    requests: int = 0
    """Behind these means, from the first ones on, which all came at once; 0: the loop was under way before."""


_FORMS: Final = {
    "arrival_s": ("arrival_s", "prompt_tokens", "output_tokens", "ttft_s", "e2e_s"),
    "queued_ts": ("queued_ts", "input_toks", "output_toks", "first_token_ts", "last_token_ts"),
    "concurrency": ("concurrency", "prompt_tokens", "output_tokens", "ttft_s", "tpot_s"),
}
"""Columns of each form, by the one that tells it from the others."""


class TimingsError(ValueError):
    """A file that cannot be used; the text says where: file, line, column."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


class _Row:
    """One line of a file, whose values are asked for by name."""

    __slots__ = ("_file", "_values", "line")

    def __init__(self, file: str, line: int, values: Mapping[str, Any]) -> None:
        self._file = file
        self.line = line
        self._values = values

    def __contains__(self, column: str) -> bool:
        return column in self._values

    @property
    def columns(self) -> list[str]:
        """Their names."""
        return [str(name) for name in self._values if name is not None]

    def error(self, column: str, message: str) -> TimingsError:
        return TimingsError(Problem(self._file, self.line, column, message))

    def seconds(self, column: str) -> float:
        """Any finite number."""
        value = self._values.get(column)
        if value is None or value == "":
            raise self.error(column, "is missing")
        try:
            number = float("nan") if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if not isfinite(number):
            raise self.error(column, f"must be a number, not {value!r}")
        return number

    def duration(self, column: str) -> float:
        """Seconds above zero -> microseconds."""
        return self.after(column, self.seconds(column), 0.0)

    def after(self, column: str, end: float, begin: float) -> float:
        """Microseconds from one moment to a later one, in seconds."""
        if end <= begin:
            raise self.error(column, f"must be above {begin:g}, not {end:g}")
        return (end - begin) * 1e6

    def count(self, column: str) -> int:
        """A whole number, at least one."""
        number = self.seconds(column)
        if number < 1 or number != int(number):
            raise self.error(column, f"must be a whole number of at least 1, not {number:g}")
        return int(number)


def read_measured(path: Path) -> list[Timing] | list[Level]:
    """Requests in order of arrival, or the levels of a sweep.

    Raises OSError, and TimingsError for what is not such a file.
    """
    rows = list(_rows(path))
    if not rows:
        raise TimingsError(Problem(str(path), 1, "", "the file has no rows"))
    if not any(name in rows[0] for name in _FORMS):
        forms = "; ".join(", ".join(columns) for columns in _FORMS.values())
        found = ", ".join(map(repr, rows[0].columns))
        said = f"its columns are those of none of these forms: {forms}; it has {found}"
        raise TimingsError(Problem(str(path), 1 if _is_csv(path) else rows[0].line, "", said))
    if "concurrency" in rows[0]:
        return [_level(row) for row in rows]
    read = _by_vllm if "queued_ts" in rows[0] else _by_client
    timed = sorted((read(row) for row in rows), key=lambda one: one[0])
    first = timed[0][0]
    return [timing._replace(at=round((arrived - first) * 1e6)) for arrived, timing in timed]


def looks_like_milliseconds(rows: list[Timing] | list[Level]) -> str:
    """What is too slow to be believed, in words; empty: nothing is."""
    for row in rows:
        if isinstance(row, Level):
            what, tpot = f"the level of {row.concurrency} users", row.tpot
        else:
            what, tpot = (
                f"the request at {row.at / 1e6:g} s",
                (row.e2e - row.ttft) / max(row.output_tokens - 1, 1),
            )
        if row.output_tokens > 1 and tpot > SLOW_TPOT:
            return (
                f"{what} has {tpot / 1e6:g} s for each token: are these milliseconds? All times are seconds"
            )
        if row.ttft > SLOW_TTFT:
            return f"{what} has a TTFT of {row.ttft / 1e6:g} s: are these milliseconds? All times are seconds"
    return ""


def _level(row: _Row) -> Level:
    return Level(
        row.count("concurrency"),
        row.count("prompt_tokens"),
        row.count("output_tokens"),
        row.duration("ttft_s"),
        row.duration("tpot_s"),
        row.count("requests") if "requests" in row else 0,
    )


def _by_client(row: _Row) -> tuple[float, Timing]:
    arrived = row.seconds("arrival_s")
    prompt, output = row.count("prompt_tokens"), row.count("output_tokens")
    ttft, e2e = row.duration("ttft_s"), row.duration("e2e_s")
    if e2e < ttft or (output > 1 and e2e == ttft):
        raise row.error("e2e_s", "the last token comes after the first, not before or with it")
    return arrived, Timing(0, prompt, output, ttft, e2e)


def _by_vllm(row: _Row) -> tuple[float, Timing]:
    queued = row.seconds("queued_ts")
    prompt, output = row.count("input_toks"), row.count("output_toks")
    first, last = row.seconds("first_token_ts"), row.seconds("last_token_ts")
    ttft = row.after("first_token_ts", first, queued)
    if output > 1:
        row.after("last_token_ts", last, first)
    return queued, Timing(0, prompt, output, ttft, row.after("last_token_ts", last, queued))


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a file, unpacked if it ends in `.gz`. Raises OSError, and TimingsError: it is no UTF-8 text."""
    line = 1
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for line, data in enumerate(file, 1):
                yield data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise TimingsError(Problem(str(path), line, "", "is not UTF-8 text")) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TimingsError(Problem(str(path), line, "", f"the file is not whole gzip: {error}")) from error


def _rows(path: Path) -> Iterator[_Row]:
    name = str(path)
    read = _csv if _is_csv(path) else _json_lines
    for line, values in read(name, text_lines(path)):
        yield _Row(name, line, values)


def _is_csv(path: Path) -> bool:
    return ".csv" in path.suffixes


def _csv(name: str, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(lines, strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise TimingsError(Problem(name, max(reader.line_num, 1), "", f"is not CSV: {error}")) from error


def _json_problem(error: ValueError) -> str:
    """Without the line of its own, which is ever the first."""
    if isinstance(error, json.JSONDecodeError):
        return f"is not JSON: {error.msg[:1].lower()}{error.msg[1:]}, at character {error.colno}"
    return f"is not JSON: {error}"


def _json_lines(name: str, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            values = json.loads(text)
        except ValueError as error:
            raise TimingsError(Problem(name, line, "", _json_problem(error))) from error
        if not isinstance(values, dict):
            raise TimingsError(Problem(name, line, "", "is not a JSON object"))
        yield line, values
