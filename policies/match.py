"""Conditions of a rule: on requests (`Match`), on the time of day (`Hours`) and on backends (`Selector`).

Everything is optional, and everything that is given must hold.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import translate
from functools import lru_cache
from math import inf
from types import MappingProxyType

from policies.base import BackendView, RequestFacts

LOCAL = "local"
REMOTE = "remote"
"""In conditions: every site but `local`."""
ANY_SITE = "*"

SLA = "sla"
TASK = "task"
"""Labels of a request that have conditions of their own."""

NO_LABELS: Mapping[str, str] = MappingProxyType({})

DAY_S = 86_400
EPOCH_WEEKDAY = 3
"""1 January 1970 was a Thursday; 0 is Monday."""


@dataclass(frozen=True, slots=True)
class Hours:
    """A daily window of local time, on some weekdays.

    Local time is Unix time plus a fixed offset: a zone that moves its clocks has to be given twice.
    """

    start_minute: int = 0
    """Minutes after local midnight; inclusive."""
    end_minute: int = 1440
    """Minutes after local midnight; exclusive. Not after `start_minute`: the window passes midnight."""
    weekdays: frozenset[int] = frozenset(range(7))
    """Days on which the window starts; 0 is Monday."""
    utc_offset_s: int = 0

    def contains(self, wall: float) -> bool:
        """Whether the Unix time `wall` lies in the window."""
        day, second = divmod(wall + self.utc_offset_s, DAY_S)
        minute = second / 60
        weekday = (int(day) + EPOCH_WEEKDAY) % 7
        if self.start_minute < self.end_minute:
            return self.start_minute <= minute < self.end_minute and weekday in self.weekdays
        if minute >= self.start_minute:
            return weekday in self.weekdays
        return minute < self.end_minute and (weekday - 1) % 7 in self.weekdays


@dataclass(frozen=True, slots=True)
class Between:
    """Bounds of a number, both inclusive."""

    low: float = -inf
    high: float = inf

    def contains(self, value: float | None) -> bool:
        """Whether it is inside; what is not known (None) is inside of no bounds."""
        return value is not None and self.low <= value <= self.high


@dataclass(frozen=True, slots=True)
class Match:
    """Conditions on a request. Without any it matches everything."""

    models: tuple[str, ...] = ()
    """Shell patterns (`qwen*`), any of which may match."""
    tenants: frozenset[str] = frozenset()
    data_classes: frozenset[str] = frozenset()
    endpoints: frozenset[str] = frozenset()
    min_priority: int | None = None
    max_priority: int | None = None
    """Inclusive, both."""
    min_prompt_tokens: int | None = None
    max_prompt_tokens: int | None = None
    """Inclusive, both; of the estimate."""
    stream: bool | None = None
    labels: Mapping[str, str] = field(default_factory=lambda: NO_LABELS)
    """Labels the request must carry, with these values."""
    sla: frozenset[str] = frozenset()
    """SLA classes: values of the label `sla`, any of which may stand there."""
    task: frozenset[str] = frozenset()
    """As `sla`, of the label `task`."""
    hours: Hours | None = None

    def accepts(self, request: RequestFacts) -> bool:
        if self.models and not _any_of(self.models).match(request.model):
            return False
        if self.tenants and request.tenant not in self.tenants:
            return False
        if self.data_classes and request.data_class not in self.data_classes:
            return False
        if self.endpoints and request.endpoint not in self.endpoints:
            return False
        if self.stream is not None and request.stream != self.stream:
            return False
        if self.sla and request.labels.get(SLA) not in self.sla:
            return False
        if self.task and request.labels.get(TASK) not in self.task:
            return False
        return (
            _within(request.priority, self.min_priority, self.max_priority)
            and _within(request.prompt_tokens, self.min_prompt_tokens, self.max_prompt_tokens)
            and all(request.labels.get(key) == value for key, value in self.labels.items())
            and (self.hours is None or self.hours.contains(request.wall))
        )


@dataclass(frozen=True, slots=True)
class Selector:
    """A set of backends. Without conditions it is every backend."""

    sites: frozenset[str] = frozenset()
    """Site names; `remote` among them: every site but `local`; empty, or with `*` among them: any site."""
    backends: frozenset[str] = frozenset()
    """Backend names; empty: any."""
    labels: Mapping[str, str] = field(default_factory=lambda: NO_LABELS)
    """Labels the backend must carry, with these values."""
    operators: frozenset[str] = frozenset()
    """Operators of its site; empty: any."""
    price: Between | None = None
    """Of a million tokens of prompt and a million of answer together, in the ledger's currency."""
    price_input: Between | None = None
    price_output: Between | None = None
    carbon: Between | None = None
    """Grams of CO2 per kWh."""
    rtt: Between | None = None
    """Seconds, as measured. It changes while all the rest is configured, so `fits` leaves it out."""

    def accepts(self, backend: BackendView) -> bool:
        """Whether the backend is one of the set, now."""
        return self.fits(backend) and (self.rtt is None or is_between(self.rtt, backend))

    def fits(self, backend: BackendView) -> bool:
        """Whether the backend is one of the set, or would be with another round trip. What is not known of it is
        inside of no bounds."""
        if self.sites and not sites_include(self.sites, backend.site):
            return False
        if self.backends and backend.name not in self.backends:
            return False
        if self.operators and backend.operator not in self.operators:
            return False
        price_input, price_output = backend.price_input, backend.price_output
        if self.price is not None and (
            price_input is None or price_output is None or not self.price.contains(price_input + price_output)
        ):
            return False
        if self.price_input is not None and not self.price_input.contains(price_input):
            return False
        if self.price_output is not None and not self.price_output.contains(price_output):
            return False
        if self.carbon is not None and not self.carbon.contains(backend.carbon_gco2_kwh):
            return False
        return all(backend.labels.get(key) == value for key, value in self.labels.items())


def is_between(rtt: Between, backend: BackendView) -> bool:
    """Whether the round trip of a backend is inside of bounds; one that is not measured yet (0) is not."""
    return backend.rtt_s > 0.0 and rtt.low <= backend.rtt_s <= rtt.high


def sites_include(sites: Collection[str], site: str) -> bool:
    """Whether site names, with the meanings of `*` and `remote`, include a site."""
    return ANY_SITE in sites or site in sites or (REMOTE in sites and site != LOCAL)


def _within(value: int, low: int | None, high: int | None) -> bool:
    return (low is None or low <= value) and (high is None or value <= high)


@lru_cache(maxsize=256)
def _any_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(translate(pattern) for pattern in patterns))
