"""The load of case 4.2: a day of DeepSeek-R1's traffic by ServeGen, of which a share is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from sim.streams import stream
from sim.traces import Span, read_workload
from sim.workload import Arrival, Workload, in_order

TRACE: Final = Path(__file__).parents[3] / "shared" / "data" / "servegen" / "deepseek-r1_rates.csv.gz"
CONTEXT: Final = 5000
"""Tokens of the longest prompt plus answer."""
PEAK_HOUR: Final = 22
TRAINING_SEED: Final = 0
"""Its peak hour and day are of windows that no other seed's are of: on them a policy is chosen."""
TRAINING_HOUR: Final = 2
"""The other peak of the day."""
FIRST_SHOWN: Final = 5
"""Seed of the first day that is shown: those before it were seen while policies were written, and the rule by which
one is chosen."""
MOST: Final = 0.3
"""Greatest share that is ever drawn."""
HOUR_S: Final = 3600
WINDOW_S: Final = 600
"""In which ServeGen's clients do not change."""


class Piece(NamedTuple):
    """Requests of some seconds, each with a number from 0 to `MOST`: a share takes those below it."""

    seconds: float
    drawn: tuple[tuple[float, Arrival], ...]
    left_out: float
    """Share of the requests that do not fit into the context."""

    def rate(self, share: float) -> float:
        """Requests a second."""
        return sum(number < share for number, _ in self.drawn) / self.seconds

    def workload(self, share: float) -> Workload:
        """A smaller share is a part of a greater one. Raises ValueError above `MOST`."""
        if not 0 < share <= MOST:
            raise ValueError(f"a share of {share:.3f} of the trace was not drawn: at most {MOST:g}")
        arrivals = [arrival for number, arrival in self.drawn if number < share]
        return Workload(f"{share:.2%} of DeepSeek-R1", arrivals)


def peak(seed: int, seconds: float = HOUR_S) -> Piece:
    """The peak hour, or its beginning; in training, the even windows of `TRAINING_HOUR`. Raises OSError and
    TraceError, as the next one."""
    return _joined([_spans(seed, start_s, length) for start_s, length in peak_spans(seed, seconds)])


def day(seed: int, hours: Sequence[int] = range(24)) -> Piece:
    """Of each hour one window of ten minutes: four hours that stand for a day."""
    return _joined([_spans(seed, start_s, WINDOW_S) for start_s in day_windows(seed, hours)])


def peak_spans(seed: int, seconds: float = HOUR_S) -> list[tuple[float, float]]:
    """Beginning and length of what `peak` plays, seconds."""
    if seed != TRAINING_SEED:
        return [(PEAK_HOUR * HOUR_S, seconds)]
    starts = range(TRAINING_HOUR * HOUR_S, (TRAINING_HOUR + 1) * HOUR_S, 2 * WINDOW_S)
    return [(start_s, min(seconds, WINDOW_S)) for start_s in starts]


def day_windows(seed: int, hours: Sequence[int] = range(24)) -> list[int]:
    """Beginnings of what `day` plays, drawn by the seed out of the odd windows of each hour; in training, out of
    the even ones, without the peak hour, which `peak` shows whole."""
    training = seed == TRAINING_SEED
    places = stream(seed, "windows").integers(0, HOUR_S // WINDOW_S // 2, 24).tolist()
    return [
        hour * HOUR_S + (2 * places[hour] + (not training)) * WINDOW_S
        for hour in hours
        if not (training and hour == PEAK_HOUR)
    ]


class _Drawn(NamedTuple):
    seconds: float
    rows: list[tuple[float, Arrival]]
    came: int
    fitted: int


def _spans(seed: int, start_s: float, seconds: float) -> _Drawn:
    found = read_workload(TRACE, "servegen", span=Span(start_s, seconds, seed))
    numbers = stream(seed, "share", round(start_s)).random(len(found)).tolist()
    fits = [one.prompt_tokens + one.output_tokens <= CONTEXT for one in found]
    rows = [
        (number, one._replace(tenant="default"))
        for number, one, fit in zip(numbers, found, fits, strict=True)
        if fit and number < MOST
    ]
    return _Drawn(seconds, rows, len(found), sum(fits))


def _joined(parts: Sequence[_Drawn]) -> Piece:
    """One after the other."""
    rows: list[tuple[float, Arrival]] = []
    begins = 0.0
    for part in parts:
        shift = round(begins * 1e6)
        rows += [(number, one._replace(at=one.at + shift)) for number, one in part.rows]
        begins += part.seconds
    numbers = {id(one): number for number, one in rows}
    ordered = in_order(one for _, one in rows)
    came, fitted = sum(part.came for part in parts), sum(part.fitted for part in parts)
    return Piece(begins, tuple((numbers[id(one)], one) for one in ordered), 1 - fitted / came)
