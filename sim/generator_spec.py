"""What a workload to be made up is like: a YAML file. `sim/generator.py` makes it.

duration: 1h
clients:
  - name: office
    rate: 2
    prompt: {mean: 1155, p95: 4083}
    output: {mean: 211, p95: 451}
"""

from __future__ import annotations

from enum import StrEnum
from math import exp, log, sqrt
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import Field, model_validator

from policies.units import BadValueError, Duration, shown
from policies.yamlfile import FileModel, read_yaml
from sim.arrival_process import LEAST_CV, MOST_CV, Process
from sim.traces.lines import MOST_TOKENS

if TYPE_CHECKING:
    import numpy as np

HOURS: Final = 24
MOST_VALUE: Final = float(MOST_TOKENS)
_Z95: Final = NormalDist().inv_cdf(0.95)
MOST_P95: Final = exp(_Z95**2 / 2)
"""A lognormal distribution has no 95th percentile above so many times its mean."""

NotNegative = Annotated[float, Field(ge=0, le=MOST_VALUE)]
Positive = Annotated[float, Field(gt=0, le=MOST_VALUE)]
Text = Annotated[str, Field(min_length=1, max_length=256)]


class Distribution(FileModel):
    """Of lengths, turns or seconds: a number, or one of `constant`, `mean` and `quantiles`."""

    constant: NotNegative | None = None
    mean: Positive | None = None
    """Alone: exponential."""
    p95: Positive | None = None
    """Beside `mean`: lognormal with this 95th percentile."""
    quantiles: Annotated[list[tuple[float, NotNegative]], Field(min_length=2)] | None = None
    """Pairs of level and value, the levels rising from 0 to 1; linear between them."""
    min: NotNegative = 0.0
    """What is drawn below becomes this; the mean rises by it."""
    max: NotNegative = MOST_VALUE
    """What is drawn above becomes this; the mean falls by it."""

    @model_validator(mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        return (
            {"constant": value} if isinstance(value, int | float) and not isinstance(value, bool) else value
        )

    @model_validator(mode="after")
    def _one_of_them(self) -> Distribution:
        given = [name for name in ("constant", "mean", "quantiles") if getattr(self, name) is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise BadValueError(f"expected one of constant, mean and quantiles, got {got}")
        if self.p95 is not None:
            if self.mean is None:
                raise BadValueError("p95 stands beside mean", at=("p95",))
            if not self.mean < self.p95 <= MOST_P95 * self.mean:
                raise BadValueError(
                    f"expected a 95th percentile above the mean and at most {MOST_P95:.2f} times it, which is "
                    f"all that a lognormal distribution can have, got {shown(self.p95)}",
                    at=("p95",),
                )
        if self.quantiles is not None:
            levels = [level for level, _ in self.quantiles]
            values = [value for _, value in self.quantiles]
            if levels[0] != 0 or levels[-1] != 1 or levels != sorted(set(levels)) or values != sorted(values):
                raise BadValueError("levels must rise from 0 to 1, and values never fall", at=("quantiles",))
        if self.min > self.max:
            raise BadValueError(f"min is above max, {self.max:g}", at=("min",))
        return self

    def at(self, levels: np.ndarray) -> np.ndarray:
        """The quantile function, of levels in [0, 1). Drawing is putting uniform numbers in."""
        import numpy as np

        if self.constant is not None:
            values = np.full(len(levels), self.constant)
        elif self.quantiles is not None:
            known, lengths = np.array(self.quantiles).T
            values = np.interp(levels, known, lengths)
        elif self.mean is not None and self.p95 is not None:
            inverse = NormalDist(*lognormal(self.mean, self.p95)).inv_cdf
            values = np.exp([inverse(max(level, 2.0**-54)) for level in levels.tolist()])
        else:
            assert self.mean is not None
            values = -self.mean * np.log1p(-levels)
        found: np.ndarray = np.clip(values, self.min, self.max)
        return found

    def whole(self, levels: np.ndarray) -> np.ndarray:
        """The same, rounded to whole numbers of one or more."""
        import numpy as np

        found: np.ndarray = np.maximum(1, np.rint(self.at(levels))).astype(int)
        return found


def lognormal(mean: float, p95: float) -> tuple[float, float]:
    """Mean and standard deviation of the logarithm. Of the two there may be, the less spread one."""
    sigma = _Z95 - sqrt(max(0.0, _Z95**2 - 2.0 * log(p95 / mean)))
    return log(mean) - sigma**2 / 2.0, sigma


ONE: Final = Distribution(constant=1.0)
ZERO: Final = Distribution(constant=0.0)


class Day(FileModel):
    """How the rate changes over a day, by hours or as a sine. Its mean over a day is 1."""

    hours: Annotated[list[NotNegative], Field(min_length=HOURS, max_length=HOURS)] | None = None
    """A factor for each hour from midnight; only their proportions count."""
    peak_hour: Annotated[float, Field(ge=0, lt=HOURS)] | None = None
    """Where the sine is highest."""
    amplitude: Annotated[float, Field(gt=0, le=1)] = 0.5
    """How far the sine rises above its mean, as a share of it."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Day:
        if (self.hours is None) == (self.peak_hour is None):
            raise BadValueError("expected either hours or peak_hour")
        if self.hours is not None and not sum(self.hours) > 0:
            raise BadValueError("expected a factor above zero", at=("hours",))
        return self


class Bursts(FileModel):
    """Times of a higher rate, beginning at random."""

    every: Annotated[Duration, Field(ge=1)]
    """Mean time from the beginning of one to that of the next; exponential."""
    length: Annotated[Duration, Field(gt=0)]
    factor: Annotated[float, Field(ge=0, le=1000)]
    """By which the rate is multiplied meanwhile; `rate` is the one without bursts."""


class Loop(StrEnum):
    """What a turn of a session waits for."""

    OPEN = "open"
    """For the turn before it to be sent, and the think time after that."""
    CLOSED = "closed"
    """For the turn before it to be answered, and the think time after that."""


class Sessions(FileModel):
    """Conversations: each turn sends all that was said before."""

    turns: Distribution = ONE
    """Requests in a session."""
    think: Distribution = ZERO
    """Seconds before each turn but the first."""
    loop: Loop = Loop.OPEN
    system_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)] = 0
    """With which every prompt of this client begins: the same in all of its sessions."""
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] = 131_072
    """A session ends before a turn whose prompt and answer would be longer."""


class Users(FileModel):
    """A fixed number of users in a closed loop: each sends a request, waits for the answer, thinks, and so on."""

    count: Annotated[int, Field(ge=1, le=100_000)]
    requests: Annotated[int, Field(ge=1, le=1_000_000)]
    """That each of them sends at most."""


class Client(FileModel):
    """One source of requests. Either `rate` or `users` says how many there are."""

    name: Text
    """Seeds its random numbers; the tenant, too, if none is given."""
    rate: Annotated[float, Field(gt=0, le=1e5)] | None = None
    """Requests per second, the mean over a day."""
    users: Users | None = None
    process: Process = Process.POISSON
    cv: Annotated[float, Field(ge=LEAST_CV, le=MOST_CV)] | None = None
    """Coefficient of variation of the gaps, for gamma and weibull."""
    day: Day | None = None
    bursts: Bursts | None = None
    prompt: Distribution
    """New tokens of each request, one or more; what a session said before comes on top."""
    output: Distribution
    """Tokens of each answer, one or more."""
    sessions: Sessions = Sessions()
    tenant: Text | None = None
    model: str = ""
    """Empty: whatever there is."""
    data_class: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")] = "public"
    priority: Annotated[int, Field(ge=-(2**31), le=2**31)] = 0
    """Higher goes first."""

    @model_validator(mode="after")
    def _fits_together(self) -> Client:
        if (self.rate is None) == (self.users is None):
            raise BadValueError("expected either rate or users")
        if self.users is not None:
            for name in ("process", "cv", "day", "bursts"):
                if name in self.model_fields_set:
                    raise BadValueError("users come when they have thought: it goes with rate", at=(name,))
        elif (self.cv is None) != (self.process is Process.POISSON):
            needs = "has a cv of 1" if self.cv is not None else "needs a cv"
            raise BadValueError(
                f"{self.process} {needs}", at=("cv",) if self.cv is not None else ("process",)
            )
        return self


class WorkloadSpec(FileModel):
    """A workload to be made up."""

    name: Text = "generated"
    duration: Annotated[Duration, Field(gt=0, le=366 * 86_400)]
    """Requests come from 0 up to it."""
    start_hour: Annotated[float, Field(ge=0, lt=HOURS)] = 0.0
    """Hour of the day at which it begins."""
    unit_tokens: Annotated[int, Field(ge=0, le=1 << 20)] = 64
    """Tokens for which one hash stands, a multiple of 16; 0: no hashes, nothing is shared."""
    clients: Annotated[list[Client], Field(min_length=1, max_length=10_000)]

    @model_validator(mode="after")
    def _fits_together(self) -> WorkloadSpec:
        if self.unit_tokens % 16:
            raise BadValueError("expected a multiple of 16, the block of a KV cache", at=("unit_tokens",))
        names: set[str] = set()
        for index, client in enumerate(self.clients):
            if client.name in names:
                raise BadValueError("another client has this name", at=("clients", index, "name"))
            names.add(client.name)
        return self


def load_spec(path: Path) -> WorkloadSpec:
    """The specification in a file. Raises FileProblems and OSError."""
    return read_yaml(path.read_text(encoding="utf-8"), str(path), WorkloadSpec)
