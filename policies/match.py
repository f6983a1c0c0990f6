"""Conditions of a rule: on requests (`Match`), on the time of day (`Hours`) and on backends (`Selector`).

Everything is optional, and everything that is given must hold.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import translate
from functools import lru_cache
from types import MappingProxyType

from policies.base import BackendView, RequestFacts

LOCAL = "local"
REMOTE = "remote"
"""In conditions: every site but `local`."""
ANY_SITE = "*"

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

    def accepts(self, backend: BackendView) -> bool:
        if self.sites and not sites_include(self.sites, backend.site):
            return False
        if self.backends and backend.name not in self.backends:
            return False
        return all(backend.labels.get(key) == value for key, value in self.labels.items())


def sites_include(sites: Collection[str], site: str) -> bool:
    """Whether site names, with the meanings of `*` and `remote`, include a site."""
    return ANY_SITE in sites or site in sites or (REMOTE in sites and site != LOCAL)


def _within(value: int, low: int | None, high: int | None) -> bool:
    return (low is None or low <= value) and (high is None or value <= high)


@lru_cache(maxsize=256)
def _any_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(translate(pattern) for pattern in patterns))
