"""What must fit together in a policy file, beyond each value being right by itself.

A finding is an error if the file cannot mean what it says (a rule that never applies, a name that nobody has), a
warning if it may be meant but does nothing with the fleet as configured now.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from policies import picks
from policies.backendschema import Described, selector
from policies.base import BackendView
from policies.fileschema import DEFAULT_PICK, Pick, PolicyFile, Rule, When
from policies.match import ANY_SITE, LOCAL, REMOTE, SLA, TASK, Match, Selector, sites_include
from policies.overlap import disjoint, match_covers, selector_covers
from policies.yamlproblems import Finding, Path, closest, listed

KEYED_BY_BACKEND = frozenset({("weighted-qps", "max_qps")})
"""Policy and parameter: those whose keys are names of backends."""

LISTS_SITES = frozenset({("kv-threshold", "prefer")})
"""Policy and parameter: those that are lists of sites."""


@dataclass(frozen=True, slots=True)
class KnownKeys:
    """What the API keys say, as far as rules go by it."""

    tenants: frozenset[str]
    data_classes: frozenset[str]
    labels: Mapping[str, frozenset[str]]
    """Values by label."""


@dataclass(frozen=True, slots=True)
class KnownNames:
    """The configured fleet, as far as policy files speak of it."""

    backends: Sequence[BackendView]
    sites: frozenset[str] = frozenset()
    """Sites that are configured, with or without backends; those of the backends and `local` are known anyway."""

    operators: frozenset[str] = frozenset()
    """Those of configured sites; those of the backends are known anyway."""

    keys: KnownKeys | None = None
    """None: nothing is known of them, or there are none, so that every client is let in."""

    placements: bool = False
    """A scheduling platform has backends come and go: a name that nobody has now may be that of one."""

    @property
    def all_operators(self) -> frozenset[str]:
        return (self.operators | {backend.operator for backend in self.backends}) - {""}

    @property
    def all_sites(self) -> frozenset[str]:
        return self.sites | {backend.site for backend in self.backends} | {LOCAL}


def errors(file: PolicyFile, matches: Sequence[Match], known: KnownNames | None) -> Iterator[Finding]:
    """What makes the file unusable. `matches` are the compiled conditions of its rules, in order."""
    yield from _order_of_rules(file, matches)
    for index, rule in enumerate(file.rules):
        at: Path = ("rules", index)
        yield from _tiers(rule, at, known)
        yield from _avoided(rule, at)
        yield from _parts(rule, at)
        yield from _picks(rule, at)
        for place, tenant in enumerate((rule.when and rule.when.tenant) or ()):
            if set(tenant) & set("*?["):
                message = "tenants are no patterns: list them, or leave 'tenant' out for all of them"
                yield Finding((*at, "when", "tenant", place), message)
        if known is not None:
            yield from _names(rule, at, known)
            if not known.placements:
                yield from _names_of_backends(rule, at, known)


def warnings(file: PolicyFile, known: KnownNames) -> Iterator[Finding]:
    """What does nothing, or refuses everything, with this fleet."""
    for index, rule in enumerate(file.rules):
        at: Path = ("rules", index)
        yield from _marks(rule, at, known)
        if known.placements:
            yield from _names_of_backends(rule, at, known)
        if not known.backends:
            continue  # all of them are yet to come
        if rule.when is not None:
            yield from _unmet(rule.when, (*at, "when"), known)
        require = required(rule)
        allowed = [backend for backend in known.backends if require.fits(backend)]
        tiers = [(selector(tier), (*at, "prefer", place)) for place, tier in enumerate(rule.prefer or ())]
        left = allowed
        for chosen, path in tiers:
            if not any(chosen.fits(backend) for backend in left):
                yield Finding(path, "no backend is in this tier now")
            if chosen.rtt is None:
                left = [backend for backend in left if not chosen.fits(backend)]
        refused = f"all that rule '{rule.name}' matches is refused with 404"
        if not allowed and rule.require is None:
            yield Finding((*at, "sites"), f"no backend stands at {_sites(rule.sites or ())} now: {refused}")
        elif not allowed:
            yield Finding((*at, "require"), f"no backend is like this now: {refused}")
        elif tiers:
            allowed = [backend for backend in allowed if any(chosen.fits(backend) for chosen, _ in tiers)]
            if not allowed:
                yield Finding((*at, "prefer"), f"no backend is in any of its tiers now: {refused}")
        for place, avoided in enumerate(map(selector, rule.avoid or ())):
            if allowed and not any(avoided.fits(backend) for backend in allowed):
                yield Finding((*at, "avoid", place), "no backend of this rule is like this now")
        left = allowed
        for place, part in enumerate(map(selector, rule.split or ())):
            if allowed and not any(part.fits(backend) for backend in left):
                yield Finding((*at, "split", place), "no backend is in this part now")
            left = [backend for backend in left if not part.fits(backend)]
        if rule.split and allowed:
            allowed = [backend for backend in allowed if backend not in left]
            if not allowed:
                yield Finding((*at, "split"), f"no backend is in any of its parts now: {refused}")
        yield from _data_classes(rule, at, allowed, known)


def _marks(rule: Rule, at: Path, known: KnownNames) -> Iterator[Finding]:
    """Labels that no backend has; where one is like them, it is probably meant."""
    for below, section in selections(rule):
        for key, value in (section.labels or {}).items():
            path = (*at, *below, "labels", key)
            values = {backend.labels[key] for backend in known.backends if key in backend.labels}
            if not values:
                keys = {label for backend in known.backends for label in backend.labels}
                if suggestion := closest(key, keys, cutoff=0.7):
                    yield Finding(path, f"no backend has a label '{key}'", suggestion, at_key=True)
            elif value not in values and (suggestion := closest(value, values, cutoff=0.8)):
                yield Finding(path, f"no backend is labelled {key}={value}", suggestion)


def _unmet(when: When, at: Path, known: KnownNames) -> Iterator[Finding]:
    """Names that no request carries: of models that no backend lists, of what no key says."""
    served = {model for backend in known.backends for model in backend.models}
    if all(backend.models and not backend.models_unknown for backend in known.backends):
        for place, pattern in enumerate(when.model or ()):
            if not any(fnmatchcase(model, pattern) for model in served):
                suggestion = closest(pattern, served)
                yield Finding((*at, "model", place), f"no backend lists model '{pattern}'", suggestion)
    if (keys := known.keys) is None:
        return
    for key, what, names, said in (
        ("tenant", "tenant", when.tenant, keys.tenants),
        (SLA, "the label sla", when.sla, keys.labels.get(SLA, frozenset())),
        (TASK, "the label task", when.task, keys.labels.get(TASK, frozenset())),
    ):
        for place, name in enumerate(names or ()):
            if name not in said:
                yield Finding((*at, key, place), f"no key has {what} '{name}'", closest(name, said))
    for label, value in (when.labels or {}).items():
        values = keys.labels.get(label)
        path = (*at, "labels", label)
        if values is None:
            yield Finding(path, f"no key has a label '{label}'", closest(label, keys.labels), at_key=True)
        elif value not in values:
            yield Finding(path, f"no key is labelled {label}={value}", closest(value, values))


def _data_classes(
    rule: Rule, at: Path, allowed: Sequence[BackendView], known: KnownNames
) -> Iterator[Finding]:
    named = {"public"}.union(*(backend.data_classes or () for backend in known.backends))
    for place, data_class in enumerate((rule.when and rule.when.data_class) or ()):
        path = (*at, "when", "data_class", place)
        if data_class not in named and (suggestion := closest(data_class, named, cutoff=0.8)):
            yield Finding(path, f"no site names data class '{data_class}'", suggestion)
        elif known.keys is not None and data_class not in known.keys.data_classes:
            suggestion = closest(data_class, known.keys.data_classes)
            yield Finding(path, f"no key has data class '{data_class}'", suggestion)
        elif allowed and not any(
            backend.data_classes is None or data_class in backend.data_classes for backend in allowed
        ):
            message = f"no backend of this rule accepts data class '{data_class}': it will be refused"
            yield Finding(path, message)


def required(rule: Rule) -> Selector:
    """The compiled set of backends that a rule may reach at all."""
    return selector(rule.require, rule.sites)


def selections(rule: Rule) -> Iterator[tuple[Path, Described]]:
    """Every description of backends in a rule with its path below the rule."""
    if rule.require is not None:
        yield ("require",), rule.require
    for key, sections in (("prefer", rule.prefer), ("avoid", rule.avoid), ("split", rule.split)):
        for place, section in enumerate(sections or ()):
            yield (key, place), section


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
            if match_covers(matches[earlier], matches[index]):
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
    require = required(rule)
    tiers = [selector(tier) for tier in rule.prefer or ()]
    walls = "the rule's sites" if rule.sites else "those of 'require'"
    for place, tier in enumerate(tiers):
        path = (*at, "prefer", place)
        for earlier in range(place):
            if selector_covers(tiers[earlier], tier):
                message = f"this tier is never asked: tier {earlier + 1} above takes all of its backends"
                yield Finding(path, message)
                break
        for number, site in enumerate((rule.prefer or ())[place].site or ()):
            means_site = site not in (ANY_SITE, REMOTE) and (known is None or site in known.all_sites)
            outside = means_site and require.sites and not sites_include(require.sites, site)
            if outside or (tier.sites == {REMOTE} and require.sites == {LOCAL}):
                message = f"site '{site}' is not among {walls} ({_sites(sorted(require.sites))})"
                yield Finding((*path, "site", number), message)
        if (key := disjoint(require, tier)) not in ("", "site"):
            message = f"this tier is empty: no backend has the {key} of both this tier and 'require'"
            yield Finding((*path, key), message)
        if any(selector_covers(selector(avoided), tier) for avoided in rule.avoid or ()):
            message = (
                "avoid takes every backend of this tier, so it is never asked here: leave one of them out"
            )
            yield Finding(path, message)


def _avoided(rule: Rule, at: Path) -> Iterator[Finding]:
    """What `avoid` means nothing, or everything."""
    require = required(rule)
    tiers = [selector(tier) for tier in rule.prefer or ()] or [Selector()]
    avoided = [selector(section) for section in rule.avoid or ()]
    for place, one in enumerate(avoided):
        path = (*at, "avoid", place)
        if key := disjoint(require, one):
            message = f"'{_wall(rule, key)}' leaves out everything with this {key} already"
            yield Finding((*path, key), message)
        elif all(disjoint(tier, one) for tier in tiers):
            yield Finding(path, "no tier of this rule has backends like this: leave it out")
        elif rule.prefer is None and selector_covers(one, require):
            yield Finding(path, "this is every backend of the rule: say which are to be asked before them")
        elif any(selector_covers(earlier, one) for earlier in avoided[:place]):
            yield Finding(path, "what stands above it has all of its backends")


def _wall(rule: Rule, key: str) -> str:
    """The key of a rule that leaves backends out by what `key` says."""
    return "sites" if key == "site" and rule.sites else "require"


def _parts(rule: Rule, at: Path) -> Iterator[Finding]:
    """Parts of a split that are empty by what is written."""
    require = required(rule)
    tiers = [selector(tier) for tier in rule.prefer or ()] or [Selector()]
    parts = [selector(section) for section in rule.split or ()]
    for place, part in enumerate(parts):
        path = (*at, "split", place)
        above = [number for number, earlier in enumerate(parts[:place]) if selector_covers(earlier, part)]
        if above:
            yield Finding(path, f"this part is empty: part {above[0] + 1} above takes all of its backends")
        elif key := disjoint(require, part):
            message = f"this part is empty: '{_wall(rule, key)}' leaves out everything with this {key}"
            yield Finding((*path, key), message)
        elif all(disjoint(tier, part) for tier in tiers):
            yield Finding(path, "this part is empty: no tier of this rule has backends like this")


def _picks(rule: Rule, at: Path) -> Iterator[Finding]:
    for path, pick in picks_of(rule):
        for finding in picks.check(pick.policy, pick.parameters):
            yield finding._replace(path=(*at, *path, *finding.path))


def _names(rule: Rule, at: Path, known: KnownNames) -> Iterator[Finding]:
    sites = known.all_sites
    several = (ANY_SITE, REMOTE)
    yield from _unknown("site", rule.sites, (*at, "sites"), sites, several)
    for below, section in selections(rule):
        path = (*at, *below)
        yield from _unknown("site", section.site, (*path, "site"), sites, several)
        yield from _unknown("operator", section.operator, (*path, "operator"), known.all_operators)
    for path, pick in picks_of(rule):
        for parameter, value in pick.parameters.items():
            if (pick.policy, parameter) in LISTS_SITES and isinstance(value, list):
                yield from _unknown("site", value, (*at, *path, parameter), sites)


def _names_of_backends(rule: Rule, at: Path, known: KnownNames) -> Iterator[Finding]:
    backends = {backend.name for backend in known.backends}
    for below, section in selections(rule):
        yield from _unknown("backend", section.backend, (*at, *below, "backend"), backends)
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


def _unknown(
    what: str, names: Iterable[object] | None, at: Path, known: Collection[str], words: Collection[str] = ()
) -> Iterator[Finding]:
    """`words` stand for more than one of those `known`."""
    for place, name in enumerate(names or ()):
        if isinstance(name, str) and name not in known and name not in words:
            suggestion = closest(name, known)
            choices = "" if suggestion else f"; known: {', '.join(sorted(known)) or 'none'}"
            yield Finding((*at, place), f"unknown {what} '{name}'{choices}", suggestion)


def _sites(names: Iterable[str]) -> str:
    return listed(f"'{name}'" for name in names)
