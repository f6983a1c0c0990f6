"""ServeGen's clients (Xiang et al., arXiv 2505.09999): not requests, but how each client sends them.

Two files. `NAME_rates.csv` has a row for each client and window of 600 s: the rate, and the distribution of the
gaps between requests. `NAME_lengths.jsonl` has the quantiles of prompts and answers of each client in windows
of six hours. Requests are drawn from them.

The fitted gaps do not average to one over the rate, least of all those of bursty clients. So a window gets
the number of requests that its rate says, at times whose gaps are drawn as fitted and then scaled to fill it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from policies.units import shown
from sim.streams import stream
from sim.traces.lines import (
    MOST_TOKENS,
    FieldError,
    LeftOut,
    TraceError,
    csv_records,
    json_records,
    number,
    open_trace,
    value_of,
    whole,
)
from sim.workload import Arrival, Workload, in_order

if TYPE_CHECKING:
    import numpy as np

COLUMNS: Final = ("client", "window_start_s", "rate_rps", "pattern", "p1", "p2")
WINDOW_S: Final = 600
MOST_REQUESTS: Final = 5_000_000
"""That are drawn at once; a request takes some 300 bytes of memory."""

_MOST_CLIENTS: Final = 10**6
_MOST_START_S: Final = 10**9
_MOST_RATE: Final = 1e5


@dataclass(frozen=True, slots=True)
class Span:
    """What is drawn. Raises ValueError."""

    start_s: float = 0.0
    """Seconds from the beginning of the trace."""
    duration_s: float = 3600.0
    seed: int = 0
    borrow_lengths: bool = False
    """A client without lengths takes those of another one; otherwise it is left out."""
    pool_lengths: bool = False
    """A request of a client without lengths takes those of a request of any other client instead."""
    share: float = 1.0
    """Of its rates: 0.01 draws a hundredth of the requests, with the same gaps but for their length."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError("a span draws a share of its requests above 0, 1 at most")
        if not (self.start_s >= 0 and 0 < self.duration_s <= _MOST_START_S):
            raise ValueError("a span starts at zero or later and lasts longer than zero seconds")


class _Window(NamedTuple):
    """A row of the rates."""

    lines: range
    client: int
    start_s: int
    requests: int
    gamma: bool
    """Else Weibull."""
    shape: float

    def expected(self, span: Span) -> float:
        """Its requests, as far as it is in the span."""
        end = min(self.start_s + WINDOW_S, span.start_s + span.duration_s)
        return self.requests * max(0.0, end - max(self.start_s, span.start_s)) / WINDOW_S


class Columns(NamedTuple):
    """Requests of one client, in order of time."""

    at: np.ndarray
    """Microseconds from the beginning of the span."""
    prompt: np.ndarray
    output: np.ndarray
    """Tokens."""


class _Lengths(NamedTuple):
    """Quantiles from one moment on."""

    start_s: int
    prompt: np.ndarray
    output: np.ndarray


def read_servegen(path: Path, span: Span, *, strict: bool = False) -> Workload:
    """Requests of a span; the same request has the same time and lengths in every span that has it.

    Raises OSError, and TraceError for files that cannot be used and for a span that has nothing, or too much.
    """
    left_out = LeftOut(str(path), strict)
    drawn, missing = _all(path, span, left_out, MOST_REQUESTS)
    arrivals: list[Arrival] = []
    for client, columns in drawn:
        tenant = f"client-{client}"
        rows = zip(*(column.tolist() for column in columns), strict=True)
        arrivals += [Arrival(time, length, answer, tenant=tenant) for time, length, answer in rows]
    name = path.name.partition("_rates")[0]
    return Workload(name, in_order(arrivals), 0, left_out.problems, left_out.count, missing)


def read_columns(path: Path, span: Span) -> Iterator[Columns]:
    """The same requests as numbers, client by client and window by window: some hundred times as fast, and as many
    as there are. Raises as `read_servegen`."""
    drawn, _ = _all(path, span, LeftOut(str(path), False), None)
    for _, columns in drawn:
        yield columns


def _all(
    path: Path, span: Span, left_out: LeftOut, most: int | None
) -> tuple[Iterator[tuple[int, Columns]], int]:
    """Clients with their requests of a window each, drawn one by one; and how many requests are missing."""
    windows, ends_s = _windows(path, span, left_out)
    levels, lengths = _lengths(lengths_file(path), left_out.strict, left_out)
    if not lengths:
        raise TraceError(f"{lengths_file(path)}: no client has lengths")
    if span.share < 1.0:
        windows = [_thinned(window, span) for window in windows]
    kept, missing = _with_lengths(windows, lengths, span, left_out)
    count = sum(window.requests for window in kept)
    if not count:
        raise TraceError(f"{path}: no requests in this span; {_why_none(missing, left_out, ends_s)}")
    if most is not None and count > most:
        raise TraceError(f"{path}: {count} requests are in this span, more than {most}: take less")
    return _drawn(windows, kept, levels, lengths, span), missing


def _drawn(
    windows: list[_Window],
    kept: list[_Window],
    levels: np.ndarray,
    lengths: Mapping[int, list[_Lengths]],
    span: Span,
) -> Iterator[tuple[int, Columns]]:
    pool = _Pool(windows, lengths) if span.pool_lengths else None
    for window in kept:
        if pool is not None and window.client not in lengths:
            sources, which = pool.of(window, span)
        else:
            sources, which = [_at(lengths[_lender(window.client, lengths)], window.start_s)], None
        yield window.client, _draw(window, levels, sources, which, span)


def _why_none(missing: int, left_out: LeftOut, ends_s: int) -> str:
    if missing:
        return (
            f"{missing} are of clients without lengths, which may borrow those of others (--borrow-lengths)"
        )
    first = f", {left_out.count} lines left out, first {left_out.problems[0]}" if left_out.problems else ""
    return f"the trace is {ends_s} seconds long{first}"


def lengths_file(path: Path) -> Path:
    """The file of lengths beside one of rates. Raises TraceError if there is none."""
    head, found, _ = path.name.rpartition("_rates.csv")
    beside = [path.with_name(f"{head}_lengths.jsonl{end}") for end in ("", ".gz")] if found else []
    for one in beside:
        if one.is_file():
            return one
    names = " or ".join(one.name for one in beside) or "it, which is named NAME_lengths.jsonl"
    raise TraceError(f"{path}: a ServeGen trace has two files, NAME_rates.csv and {names} is missing")


def _windows(path: Path, span: Span, left_out: LeftOut) -> tuple[list[_Window], int]:
    """Those that the span touches; and when the last one of the trace ends."""
    windows = []
    ends_s = 0
    with open_trace(path) as file:
        for lines, record in csv_records(file, quoted=False):
            try:
                if isinstance(record, FieldError):
                    raise record
                window = _window(lines, record)
            except FieldError as error:
                left_out.add(lines, error)
                continue
            end = window.start_s + WINDOW_S
            ends_s = max(ends_s, end)
            if end > span.start_s and window.start_s < span.start_s + span.duration_s:
                windows.append(window)
    return windows, ends_s


def _window(lines: range, record: Mapping[str, Any]) -> _Window:
    pattern = value_of(record, "pattern")
    if pattern not in ("Gamma", "Weibull"):
        raise FieldError("pattern", f"expected Gamma or Weibull, got {shown(pattern)}")
    number(record, "p2", 1e-12, 1e12)
    return _Window(
        lines,
        whole(record, "client", 0, _MOST_CLIENTS),
        whole(record, "window_start_s", 0, _MOST_START_S),
        round(number(record, "rate_rps", 0, _MOST_RATE) * WINDOW_S),
        pattern == "Gamma",
        number(record, "p1", 1e-6, 1e6),
    )


def _lengths(path: Path, strict: bool, left_out: LeftOut) -> tuple[np.ndarray, dict[int, list[_Lengths]]]:
    """Levels of the quantiles; lengths by client, in order of time."""
    import numpy as np

    own = LeftOut(str(path), strict)
    found: dict[int, list[_Lengths]] = {}
    levels: np.ndarray | None = None
    with open_trace(path) as file:
        for lines, record in json_records(file):
            try:
                if isinstance(record, FieldError):
                    raise record
                if levels is None:
                    levels = _quantiles(record, "quantiles", None, 1.0)
                    continue
                client = whole(record, "c", 0, _MOST_CLIENTS)
                start = whole(record, "t", 0, _MOST_START_S)
                if "input_tokens" not in record and "output_tokens" not in record:
                    continue  # a window without requests
                prompt = _quantiles(record, "input_tokens", len(levels), MOST_TOKENS)
                output = _quantiles(record, "output_tokens", len(levels), MOST_TOKENS)
            except FieldError as error:
                if levels is None:
                    raise TraceError(f"{path}, line {lines[0]}: {error.column or 'record'} {error}") from None
                own.add(lines, error)
                continue
            found.setdefault(client, []).append(_Lengths(start, prompt, output))
    left_out.problems += own.problems
    left_out.count += own.count
    for windows in found.values():
        windows.sort(key=lambda one: one.start_s)
    return np.zeros(0) if levels is None else levels, found


def _quantiles(record: Mapping[str, Any], column: str, count: int | None, most: float) -> np.ndarray:
    """Numbers from 0 to `most` that never fall. Raises FieldError."""
    import numpy as np

    value = value_of(record, column)
    try:
        found = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        found = np.zeros((0, 0))
    if found.ndim != 1 or not len(found) or (count is not None and len(found) != count):
        raise FieldError(column, f"expected a list of {count or 'some'} numbers")
    if not (found[0] >= 0 and found[-1] <= most and np.all(np.diff(found) >= 0)):
        raise FieldError(column, f"expected numbers from 0 to {most:g}, none below the one before it")
    return found


def _with_lengths(
    windows: list[_Window], lengths: Mapping[int, list[_Lengths]], span: Span, left_out: LeftOut
) -> tuple[list[_Window], int]:
    """Those that can be drawn, and how many requests the others would have had in the span."""
    if span.borrow_lengths or span.pool_lengths:
        return windows, 0
    kept = []
    missing = 0.0
    for window in windows:
        if window.client in lengths:
            kept.append(window)
        else:
            requests = window.expected(span)
            missing += requests
            message = f"{window.client} has no lengths: {requests:.0f} requests are missing"
            left_out.add(window.lines, FieldError("client", message))
    return kept, round(missing)


def _lender(client: int, lengths: Mapping[int, list[_Lengths]]) -> int:
    """The client itself; if it has no lengths, one of those that have, always the same."""
    if client in lengths:
        return client
    lenders = sorted(lengths)
    return lenders[client % len(lenders)]


def _at(windows: list[_Lengths], start_s: int) -> _Lengths:
    """Those of a time, or the nearest before it."""
    return windows[max(0, bisect_right(windows, start_s, key=lambda one: one.start_s) - 1)]


def _thinned(window: _Window, span: Span) -> _Window:
    """With the span's share of its requests, so that no client's are always rounded away."""
    drawn = stream(span.seed, "servegen share", window.client, window.start_s).random()
    return window._replace(requests=int(window.requests * span.share + drawn))


class _Pool:
    """The lengths of all clients that have some, each by its requests at a time."""

    def __init__(self, windows: list[_Window], lengths: Mapping[int, list[_Lengths]]) -> None:
        self._lengths = lengths
        self._clients: dict[int, list[tuple[int, int]]] = {}
        """By start of a window: clients and their requests in it."""
        for window in windows:
            if window.client in lengths and window.requests:
                self._clients.setdefault(window.start_s, []).append((window.client, window.requests))

    def of(self, window: _Window, span: Span) -> tuple[list[_Lengths], np.ndarray]:
        """Those that there are, and which of them each request of a window has."""
        random = stream(span.seed, "servegen pool", window.client, window.start_s)
        there = self._clients.get(window.start_s) or [(client, 1) for client in self._lengths]
        sources = [_at(self._lengths[client], window.start_s) for client, _ in there]
        counts = [count for _, count in there]
        shares = [count / sum(counts) for count in counts]
        return sources, random.choice(len(sources), size=window.requests, p=shares)


def _draw(
    window: _Window, levels: np.ndarray, sources: list[_Lengths], which: np.ndarray | None, span: Span
) -> Columns:
    """The requests of a window as far as they are in the span; times count from its start. `which` of the sources
    each takes its lengths from; None: all from the one there is."""
    import numpy as np

    random = stream(span.seed, "servegen", window.client, window.start_s)
    count = window.requests
    draw = random.standard_gamma if window.gamma else random.weibull
    gaps = draw(window.shape, count + 1)  # the scale falls out: they are made to fill the window
    times = np.cumsum(gaps)
    if not times[-1] > 0:
        times = np.arange(1.0, count + 2)
    at = np.minimum(times[:-1] * (WINDOW_S * 1e6 / times[-1]), WINDOW_S * 1e6 - 1).astype(int)
    at += round((window.start_s - span.start_s) * 1e6)
    prompt = _tokens_of(random.random(count), levels, [one.prompt for one in sources], which)
    output = _tokens_of(random.random(count), levels, [one.output for one in sources], which)
    inside = (at >= 0) & (at < span.duration_s * 1e6)
    return Columns(at[inside], prompt[inside], output[inside])


def _tokens_of(
    uniform: np.ndarray, levels: np.ndarray, quantiles: list[np.ndarray], which: np.ndarray | None
) -> np.ndarray:
    if which is None:
        return _tokens(uniform, levels, quantiles[0])
    import numpy as np

    found = np.ones(len(which), dtype=int)
    for index in np.unique(which).tolist():
        mine = which == index
        found[mine] = _tokens(uniform[mine], levels, quantiles[index])
    return found


def _tokens(uniform: np.ndarray, levels: np.ndarray, quantiles: np.ndarray) -> np.ndarray:
    """Inverse transform sampling; no request has less than one token."""
    import numpy as np

    found: np.ndarray = np.maximum(1, np.rint(np.interp(uniform, levels, quantiles))).astype(int)
    return found
