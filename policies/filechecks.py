"""What must fit together in a policy file, beyond each value being right by itself.

A finding is an error if the file cannot mean what it says (a rule that never applies, a name that nobody has), a
warning if it may be meant but does nothing with the fleet as configured now.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from policies import picks
from policies.base import BackendView
from policies.fileschema import DEFAULT_PICK, Pick, PolicyFile, Rule, Tier
from policies.match import ANY_SITE, LOCAL, REMOTE, Match, Selector, sites_include
from policies.yamlproblems import Finding, Path, closest, listed

KEYED_BY_BACKEND = frozenset({("weighted-qps", "max_qps")})
"""Policy and parameter: those whose keys are names of backends."""


@dataclass(frozen=True, slots=True)
class KnownNames:
    """The configured fleet, as far as policy files speak of it."""

    backends: Sequence[BackendView]
    sites: frozenset[str] = frozenset()
    """Sites that are configured, with or without backends; those of the backends and `local` are known anyway."""

    @property
    def all_sites(self) -> frozenset[str]:
        return self.sites | {backend.site for backend in self.backends} | {LOCAL}


def errors(file: PolicyFile, matches: Sequence[Match], known: KnownNames | None) -> Iterator[Finding]:
    """What makes the file unusable. `matches` are the compiled conditions of its rules, in order."""
    yield from _order_of_rules(file, matches)
    for index, rule in enumerate(file.rules):
        at: Path = ("rules", index)
        yield from _tiers(rule, at, known)
        yield from _picks(rule, at)
        if known is not None:
            yield from _names(rule, at, known)


def warnings(file: PolicyFile, known: KnownNames) -> Iterator[Finding]:
    """What does nothing, or refuses everything, with this fleet."""
    for index, rule in enumerate(file.rules):
        at: Path = ("rules", index)
        require = selector(rule)
        allowed = [backend for backend in known.backends if require.accepts(backend)]
        tiers = [(selector(tier), (*at, "prefer", place)) for place, tier in enumerate(rule.prefer or ())]
        left = allowed
        for chosen, path in tiers:
            if not any(chosen.accepts(backend) for backend in left):
                yield Finding(path, "no backend is in this tier now")
            left = [backend for backend in left if not chosen.accepts(backend)]
        if tiers:
            allowed = [backend for backend in allowed if backend not in left]
        elif not allowed:
            yield Finding((*at, "sites"), f"no backend stands at {_sites(rule.sites or ())} now")
        yield from _data_classes(rule, at, allowed, known)


def _data_classes(
    rule: Rule, at: Path, allowed: Sequence[BackendView], known: KnownNames
) -> Iterator[Finding]:
    named = {"public"}.union(*(backend.data_classes or () for backend in known.backends))
    for place, data_class in enumerate((rule.when and rule.when.data_class) or ()):
        path = (*at, "when", "data_class", place)
        if data_class not in named and (suggestion := closest(data_class, named, cutoff=0.8)):
            yield Finding(path, f"no site names data class '{data_class}'", suggestion)
        elif allowed and not any(
            backend.data_classes is None or data_class in backend.data_classes for backend in allowed
        ):
            message = f"no backend of this rule accepts data class '{data_class}': it will be refused"
            yield Finding(path, message)


def selector(section: Rule | Tier) -> Selector:
    """The compiled set of backends of a tier, or of a rule's `sites`."""
    if isinstance(section, Rule):
        return Selector(sites=frozenset(section.sites or ()))
    return Selector(
        frozenset(section.site or ()), frozenset(section.backend or ()), dict(section.labels or {})
    )


def picks_of(rule: Rule) -> Iterator[tuple[Path, Pick]]:
    """Every policy of a rule with its path below the rule: its own, then those of its tiers."""
    yield ("pick",), rule.pick or Pick(policy=DEFAULT_PICK)
    for place, tier in enumerate(rule.prefer or ()):
        if tier.pick is not None:
            yield ("prefer", place, "pick"), tier.pick


def _order_of_rules(file: PolicyFile, matches: Sequence[Match]) -> Iterator[Finding]:
    first_use: dict[str, int] = {}
    for index, rule in enumerate(file.rules):
        if (first := first_use.setdefault(rule.name, index)) != index:
            yield Finding(("rules", index, "name"), f"rule {first + 1} is already called '{rule.name}'")
        for earlier in range(index):
            if _match_covers(matches[earlier], matches[index]):
                takes = "every request" if matches[earlier] == Match() else "all of its requests"
                name = file.rules[earlier].name
                message = f"this rule never applies: rule {earlier + 1} ('{name}') above takes {takes}"
                yield Finding(("rules", index), message)
                break
    if matches[-1] != Match():
        last = len(matches) - 1
        message = "the last rule must match every request: add one without 'when' below it"
        yield Finding(("rules", last, "when"), message, at_key=True)


def _tiers(rule: Rule, at: Path, known: KnownNames | None) -> Iterator[Finding]:
    require = selector(rule)
    tiers = [selector(tier) for tier in rule.prefer or ()]
    for place, tier in enumerate(tiers):
        path = (*at, "prefer", place)
        for earlier in range(place):
            if _selector_covers(tiers[earlier], tier):
                message = f"this tier is never asked: tier {earlier + 1} above takes all of its backends"
                yield Finding(path, message)
                break
        for number, site in enumerate((rule.prefer or ())[place].site or ()):
            means_site = site not in (ANY_SITE, REMOTE) and (known is None or site in known.all_sites)
            outside = means_site and require.sites and not sites_include(require.sites, site)
            if outside or (tier.sites == {REMOTE} and require.sites == {LOCAL}):
                message = f"site '{site}' is not among the rule's sites ({_sites(rule.sites or ())})"
                yield Finding((*path, "site", number), message)


def _picks(rule: Rule, at: Path) -> Iterator[Finding]:
    for path, pick in picks_of(rule):
        for finding in picks.check(pick.policy, pick.parameters):
            yield finding._replace(path=(*at, *path, *finding.path))


def _names(rule: Rule, at: Path, known: KnownNames) -> Iterator[Finding]:
    sites, backends = known.all_sites, {backend.name for backend in known.backends}
    yield from _unknown("site", rule.sites, (*at, "sites"), sites)
    for place, tier in enumerate(rule.prefer or ()):
        path = (*at, "prefer", place)
        yield from _unknown("site", tier.site, (*path, "site"), sites)
        yield from _unknown("backend", tier.backend, (*path, "backend"), backends)
    yield from _unknown_keys(rule.weights or (), (*at, "weights"), backends)
    for path, pick in picks_of(rule):
        for parameter, value in pick.parameters.items():
            if (pick.policy, parameter) in KEYED_BY_BACKEND and isinstance(value, Mapping):
                yield from _unknown_keys(value, (*at, *path, parameter), backends)


def _unknown_keys(names: Iterable[str], at: Path, backends: Collection[str]) -> Iterator[Finding]:
    """Keys of a mapping that should be names of backends and are none."""
    for name in names:
        if name not in backends:
            suggestion = closest(name, backends)
            choices = "" if suggestion else f"; known: {', '.join(sorted(backends))}"
            yield Finding((*at, name), f"unknown backend '{name}'{choices}", suggestion, at_key=True)


def _unknown(what: str, names: Iterable[str] | None, at: Path, known: Iterable[str]) -> Iterator[Finding]:
    for place, name in enumerate(names or ()):
        if name not in known and not (what == "site" and name in (ANY_SITE, REMOTE)):
            suggestion = closest(name, known)
            choices = "" if suggestion else f"; known: {', '.join(sorted(known))}"
            yield Finding((*at, place), f"unknown {what} '{name}'{choices}", suggestion)


def _sites(names: Iterable[str]) -> str:
    return listed(f"'{name}'" for name in names)


# --- does one condition take everything that another one takes? ---------------------------------------------------


def _match_covers(wide: Match, narrow: Match) -> bool:
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
        and _labels_cover(wide.labels, narrow.labels)
        and wide.hours in (None, narrow.hours)
    )


def _selector_covers(wide: Selector, narrow: Selector) -> bool:
    return (
        _sites_cover(wide.sites, narrow.sites)
        and _any_of_covers(wide.backends, narrow.backends)
        and _labels_cover(wide.labels, narrow.labels)
    )


def _sites_cover(wide: frozenset[str], narrow: frozenset[str]) -> bool:
    if not wide or ANY_SITE in wide or {LOCAL, REMOTE} <= wide:
        return True
    return bool(narrow) and ANY_SITE not in narrow and all(sites_include(wide, site) for site in narrow)


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
