"""What two conditions have in common: does one take all that the other takes, or nothing of it?

Both answers are for any fleet and any request, so "no" may only mean that nobody knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from policies.match import ANY_SITE, LOCAL, REMOTE, SLA, TASK, Between, Match, Selector, sites_include


def match_covers(wide: Match, narrow: Match) -> bool:
    """Whether one condition takes every request that another one takes."""
    return (
        _any_of_covers(wide.models, narrow.models)
        and _any_of_covers(wide.tenants, narrow.tenants)
        and _any_of_covers(wide.data_classes, narrow.data_classes)
        and _any_of_covers(wide.endpoints, narrow.endpoints)
        and _bounds_cover(wide.min_priority, narrow.min_priority, wide.max_priority, narrow.max_priority)
        and _bounds_cover(
            wide.min_prompt_tokens, narrow.min_prompt_tokens, wide.max_prompt_tokens, narrow.max_prompt_tokens
        )
        and wide.stream in (None, narrow.stream)
        and _marks_cover(wide, narrow)
        and wide.hours in (None, narrow.hours)
    )


def selector_covers(wide: Selector, narrow: Selector) -> bool:
    """Whether one set has every backend that another one has."""
    return (
        _sites_cover(wide.sites, narrow.sites)
        and _any_of_covers(wide.backends, narrow.backends)
        and _any_of_covers(wide.operators, narrow.operators)
        and _labels_cover(wide.labels, narrow.labels)
        and all(_covers(one, other) for one, other in zip(_figures(wide), _figures(narrow), strict=True))
    )


def disjoint(one: Selector, other: Selector) -> str:
    """What no backend of both sets can have, as the key of a file is called; empty: there may be one."""
    if _sites_apart(one.sites, other.sites):
        return "site"
    if one.backends and other.backends and not one.backends & other.backends:
        return "backend"
    if one.operators and other.operators and not one.operators & other.operators:
        return "operator"
    if any(other.labels.get(key, value) != value for key, value in one.labels.items()):
        return "labels"
    for name, first, second in zip(_FIGURES, _figures(one), _figures(other), strict=True):
        if first and second and max(first.low, second.low) > min(first.high, second.high):
            return name
    return ""


_FIGURES = ("price", "price", "price", "carbon", "rtt")


def _figures(selector: Selector) -> tuple[Between | None, ...]:
    return selector.price, selector.price_input, selector.price_output, selector.carbon, selector.rtt


def _covers(wide: Between | None, narrow: Between | None) -> bool:
    return wide is None or (narrow is not None and wide.low <= narrow.low and narrow.high <= wide.high)


def _sites_cover(wide: frozenset[str], narrow: frozenset[str]) -> bool:
    if not wide or ANY_SITE in wide or {LOCAL, REMOTE} <= wide:
        return True
    return bool(narrow) and ANY_SITE not in narrow and all(sites_include(wide, site) for site in narrow)


def _sites_apart(one: frozenset[str], other: frozenset[str]) -> bool:
    if not one or not other or ANY_SITE in one or ANY_SITE in other:
        return False
    return not any(sites_include(one, site) for site in other) and not any(
        sites_include(other, site) for site in one
    )


def _any_of_covers(wide: Iterable[str], narrow: Iterable[str]) -> bool:
    wide, narrow = set(wide), set(narrow)
    return not wide or (bool(narrow) and narrow <= wide)


def _bounds_cover(
    wide_low: int | None, narrow_low: int | None, wide_high: int | None, narrow_high: int | None
) -> bool:
    return (wide_low is None or (narrow_low is not None and wide_low <= narrow_low)) and (
        wide_high is None or (narrow_high is not None and narrow_high <= wide_high)
    )


def _labels_cover(wide: Mapping[str, str], narrow: Mapping[str, str]) -> bool:
    return all(narrow.get(key) == value for key, value in wide.items())


def _marks_cover(wide: Match, narrow: Match) -> bool:
    """As `_labels_cover`; `sla` and `task` are labels with several values."""
    given = _values_of_labels(narrow)
    return all(key in given and given[key] <= values for key, values in _values_of_labels(wide).items())


def _values_of_labels(match: Match) -> dict[str, frozenset[str]]:
    values = {key: frozenset({value}) for key, value in match.labels.items()}
    for key, several in ((SLA, match.sla), (TASK, match.task)):
        if several:
            values[key] = values.get(key, several) & several
    return values
