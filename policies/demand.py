"""What a model will be asked for in the next minutes: seasonal-naive, corrected by what is, with a learned margin.

Demand is kept as its mean in each minute of eight days. What is expected within a horizon is what there is now,
times what the demand grew by from this time of day on, the day before and the week before (seasonal-naive). So the
ratio of now to then corrects the season, and without a past, demand is expected to stay. A rush that came out of
almost nothing is expected as it was.

The margin is learned from the forecast's own errors: the quantile of the highest minute within the horizon over
what was expected of it, in the last hour and at this time of the days before, whichever is more. Calm hours get a
small one; an evening that was bursty yesterday gets a large one before its first burst.

Pure: times are handed in.
"""

from __future__ import annotations

from math import ceil, isnan, nan
from typing import Final, NamedTuple

MINUTE_S: Final = 60.0
DAY: Final = 1440
"""Minutes."""
SEASONS: Final = (DAY, 7 * DAY)
KEPT: Final = 8 * DAY
MOST_GROWTH: Final = 4.0
"""Of what there is. A season that grew by more came out of almost nothing, and is expected as it was."""
SMOOTH: Final = 5
"""Minutes over which a season is averaged, before a moment and after the horizon: its bursts are for the margin."""
LEVELS: Final = (1, 5)
"""What there is now is the mean of so many minutes, the higher of the two: a burst that has just ended may be one
of several."""
RECENT: Final = 60
"""Minutes whose errors tell of now ..."""
BEFORE, AFTER = 30, 60
"""... and those around this time on the days before."""
LEAST_ERRORS: Final = 20
"""Fewer tell nothing."""
LONGEST_HORIZON: Final = 120
"""Minutes."""


class Ahead(NamedTuple):
    """What is to come within the horizon, tokens."""

    expected: float
    """The highest minute, if it goes on as it does and as it did."""
    high: float
    """What the highest minute stays below, in the share of cases that was asked for."""
    level: float
    """What there is now."""

    @property
    def margin(self) -> float:
        """Of what is expected: 0.2 is 20 % more."""
        return self.high / self.expected - 1.0 if self.expected > 0.0 else 0.0

    @property
    def more(self) -> float:
        """Than there is now."""
        return self.expected - self.level


class Forecast:
    """The demand of one model, minute by minute."""

    __slots__ = ("_ahead", "_count", "_errors", "_first", "_horizon", "_minute", "_sum", "_values")

    def __init__(self) -> None:
        self._forget(-1)

    def _forget(self, minute: int) -> None:
        self._values = [nan] * KEPT
        """Mean of each minute, by its number modulo `KEPT`; nan: not seen."""
        self._errors = [nan] * KEPT
        """By the minute at whose end it was forecast: what came over what was expected."""
        self._minute = minute
        """The present one, counted from 1970; below zero: none was seen."""
        self._first = minute
        self._sum = 0.0
        self._count = 0
        self._horizon = 0
        """Minutes."""
        self._ahead: dict[float, Ahead | None] = {}
        """By quantile; forgotten with each minute."""

    def note(self, tokens: float, wall: float) -> None:
        """What is asked for at a moment, Unix time."""
        minute = int(wall // MINUTE_S)
        if self._minute < 0 or not -DAY < minute - self._minute < KEPT:
            self._forget(minute)  # the first, or its clock jumped
        elif minute > self._minute:
            self._end_minute()
            for missing in range(self._minute + 1, minute):
                self._values[missing % KEPT] = self._errors[missing % KEPT] = nan
            self._minute = minute
            self._sum, self._count = 0.0, 0
            self._ahead.clear()
        self._sum += tokens  # a clock that was set back a little goes on in the same minute
        self._count += 1

    def ahead(self, horizon_s: float, quantile: float) -> Ahead | None:
        """What is to come within so many seconds; None: too little is known to say how wrong that may be."""
        horizon = min(max(ceil(horizon_s / MINUTE_S), 1), LONGEST_HORIZON)
        if horizon != self._horizon:
            self._horizon = horizon
            self._ahead.clear()
            self._errors = [nan] * KEPT
            for minute in range(max(self._first, self._minute - KEPT + 1), self._minute - horizon):
                self._judge(minute)
        if quantile not in self._ahead:
            self._ahead[quantile] = self._look(quantile)
        return self._ahead[quantile]

    def _look(self, quantile: float) -> Ahead | None:
        last = self._minute - 1
        expected = self._expected(last)
        if isnan(expected):
            return None
        margin = self._margin(quantile)
        return None if margin is None else Ahead(expected, expected * margin, self._level(last))

    def _end_minute(self) -> None:
        minute = self._minute
        self._values[minute % KEPT] = self._sum / self._count if self._count else nan
        self._errors[minute % KEPT] = nan
        if self._horizon and minute - self._horizon >= self._first:
            self._judge(minute - self._horizon)

    def _judge(self, minute: int) -> None:
        """See what came of the forecast at the end of a minute."""
        expected = self._expected(minute)
        came = max(self._known(minute + 1, minute + 1 + self._horizon), default=nan)
        nothing = 1.0 if came == 0.0 else nan  # no factor leads from nothing to something
        self._errors[minute % KEPT] = came / expected if expected > 0.0 else nothing

    def _expected(self, minute: int) -> float:
        """At the end of a minute, for the horizon after it; nan: unknown."""
        level = self._level(minute)
        season = self._season(minute)
        if season is None:
            return level
        before, after = season
        if after > MOST_GROWTH * before:
            return max(level, after)  # out of almost nothing: no ratio to correct it by
        return level * max(after / before, 1.0) if before > 0.0 else level

    def _level(self, minute: int) -> float:
        """What there is at the end of a minute; nan: unknown."""
        means = [_mean(seen) for length in LEVELS if (seen := self._known(minute + 1 - length, minute + 1))]
        return max(means, default=nan)

    def _season(self, minute: int) -> tuple[float, float] | None:
        """What there was up to this time, and after the horizon, in the seasons before."""
        found = []
        for season in SEASONS:
            then = minute - season
            if then - SMOOTH < self._oldest():
                continue
            before = self._known(then + 1 - SMOOTH, then + 1)
            after = self._known(then + self._horizon, then + self._horizon + SMOOTH)
            if before and after:
                found.append((_mean(before), _mean(after)))
        if not found:
            return None
        return _mean([before for before, _ in found]), _mean([after for _, after in found])

    def _margin(self, quantile: float) -> float | None:
        last = self._minute - 1 - self._horizon
        found = []
        recent = self._judged(last + 1 - RECENT, last + 1)
        if len(recent) >= LEAST_ERRORS:
            found.append(_quantile(recent, quantile))
        then = []
        for season in SEASONS:
            middle = self._minute - season
            if middle - BEFORE >= self._oldest():
                then += self._judged(middle - BEFORE, middle + AFTER)
        if len(then) >= LEAST_ERRORS:
            found.append(_quantile(then, quantile))
        return max(*found, 1.0) if found else None

    def _oldest(self) -> int:
        return max(self._first, self._minute - KEPT + 1)

    def _known(self, first: int, end: int) -> list[float]:
        return _of(self._values, max(first, self._oldest()), end)

    def _judged(self, first: int, end: int) -> list[float]:
        return _of(self._errors, max(first, self._oldest()), end)


def _of(ring: list[float], first: int, end: int) -> list[float]:
    begin, length = first % KEPT, end - first
    if length <= 0:
        return []
    cut = ring[begin : begin + length] + ring[: max(begin + length - KEPT, 0)]
    return [value for value in cut if value == value]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _quantile(values: list[float], quantile: float) -> float:
    """The smallest value that so large a share of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(max(ceil(quantile * len(ordered)) - 1, 0), len(ordered) - 1)]


class Trend:
    """A measured time, and where it goes: a straight line through the last five minutes (least squares)."""

    __slots__ = ("_samples",)

    SPAN_S: Final = 300.0
    LEAST_S: Final = 60.0
    """A shorter past has no trend."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, float]] = []

    def note(self, value: float, now: float) -> None:
        """At most one a second is kept."""
        samples = self._samples
        if samples and now - samples[-1][0] < 1.0:
            return
        samples.append((now, value))
        while samples[0][0] < now - self.SPAN_S:
            samples.pop(0)

    def at(self, when: float) -> float:
        """What it will be; 0: nothing was seen."""
        samples = self._samples
        if not samples:
            return 0.0
        last = samples[-1][1]
        if samples[-1][0] - samples[0][0] < self.LEAST_S:
            return last
        count = len(samples)
        mean_at = sum(at for at, _ in samples) / count
        mean = sum(value for _, value in samples) / count
        spread = sum((at - mean_at) ** 2 for at, _ in samples)
        slope = sum((at - mean_at) * (value - mean) for at, value in samples) / spread
        return max(mean + slope * (when - mean_at), 0.0)
