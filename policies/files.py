"""The policy file: text in, compiled rules out.

`fileschema.py` says what may be written, `filechecks.py` what must fit together; here the parts become the objects
of `rules.py`. A file is taken whole or not at all: whoever reloads it keeps the old rules when this raises.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib import resources
from math import inf
from random import Random

from policies import POLICIES, PolicyError, filechecks, load, trial
from policies.backendschema import selector
from policies.base import BackendView, Policy
from policies.filechecks import KnownNames, required
from policies.fileschema import PolicyFile, When, offset_seconds, weekday_numbers, window_minutes
from policies.fileschema import Rule as RuleSection
from policies.fileschema import Tier as TierSection
from policies.host import HostBounds
from policies.match import NO_LABELS, Hours, Match
from policies.rules import Queue, Rule, RuleSet, Spill, Tier
from policies.split import Part, Split
from policies.weights import WithWeights
from policies.yamlfile import Document, Problem, parse_yaml
from policies.yamlproblems import Finding, Path, closest, listed

__all__ = [
    "DEFAULT_POLICY",
    "CompiledPolicy",
    "KnownNames",
    "PolicyFile",
    "library_names",
    "library_policy",
    "read_policy",
]

DEFAULT_POLICY = "local-first"
"""Name of the library file that applies when none is configured."""


@dataclass(frozen=True, slots=True)
class CompiledPolicy:
    """A policy file that is ready to run."""

    name: str
    """As given to `read_policy`: a path, or a name from the library."""
    file: PolicyFile
    """What was written, for `explain_policy`."""
    rules: RuleSet
    warnings: list[Problem]
    """What may be meant but does nothing with the fleet as it is; in the order of the file."""
    text_hash: str
    """SHA-256 of the text, hex: tells in records and logs which version decided."""
    unserved: frozenset[str] = frozenset()
    """Rules whose requests no backend of the fleet as it is may serve."""


def read_policy(
    text: str, name: str, known: KnownNames | None = None, seed: int = 0, *, tried: bool = False
) -> CompiledPolicy:
    """Compile the text of a policy file.

    `name` is the file's name in messages. With `known`, names of sites and backends are checked. Each rule's policy
    gets a random generator of its own, from `seed` and the rule's name, so that rules do not disturb each other
    when one is added. `tried`: policies of others choose once, which is a warning if it fails.

    Raises: FileProblems with everything that is wrong.
    """
    document = parse_yaml(text, name)
    file = document.validate(PolicyFile)
    offset = offset_seconds(file.utc_offset)
    matches = [_match(rule.when, offset) for rule in file.rules]
    findings = list(filechecks.errors(file, matches, known))
    compiled: list[Rule] = []
    for index, (section, match) in enumerate(zip(file.rules, matches, strict=True)):
        rule = _rule(section, match, seed, ("rules", index), findings)
        if rule is not None:
            compiled.append(rule)
    if findings:
        raise document.failed(_problems(document, findings))
    unserved = [
        rule.name
        for rule in compiled
        if known is not None and not any(rule.allows(backend) for backend in known.backends)
    ]
    doubts = list(filechecks.warnings(file, known)) if known is not None else []
    if tried:
        doubts += _trials(file, known.backends if known is not None else ())
    warnings = _problems(document, doubts)
    return CompiledPolicy(
        name,
        file,
        RuleSet(compiled),
        sorted(warnings, key=lambda problem: problem[:4]),
        sha256(text.encode(errors="surrogatepass")).hexdigest(),
        frozenset(unserved),
    )


def library_names() -> list[str]:
    """Names of the ready policy files, sorted."""
    folder = resources.files("policies") / "library"
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def library_policy(name: str) -> str:
    """Text of a ready policy file.

    Raises: ValueError that names the nearest one.
    """
    names = library_names()
    if name not in names:
        guess = closest(name, names)
        hint = f"did you mean '{guess}'?" if guess else f"there are {', '.join(names)}"
        raise ValueError(f"no policy in the library is called '{name}' ({hint})")
    return (resources.files("policies") / "library" / f"{name}.yaml").read_text(encoding="utf-8")


def _trials(file: PolicyFile, fleet: Sequence[BackendView]) -> Iterator[Finding]:
    """Policies of others that fail at once."""
    for index, section in enumerate(file.rules):
        for path, pick in filechecks.picks_of(section):
            if pick.policy in POLICIES:
                continue
            try:
                policy = load(pick.policy, Random(0), **pick.parameters)  # noqa: S311
            except PolicyError as error:  # it was made before, and cannot be twice
                yield Finding(("rules", index, *path), str(error))
                continue
            if failure := trial.failure(policy, pick.policy, fleet):
                message = f"policy {pick.policy} fails when it is tried: {failure}"
                yield Finding(
                    ("rules", index, *path), f"{message}; the least loaded backend is chosen instead"
                )


def _problems(document: Document, findings: list[Finding]) -> list[Problem]:
    return [document.problem(found.path, found.message, found.suggestion, found.at_key) for found in findings]


def _match(when: When | None, utc_offset_s: int) -> Match:
    if when is None:
        return Match()
    priority, prompt = when.priority, when.prompt_tokens
    return Match(
        models=when.model or (),
        tenants=frozenset(when.tenant or ()),
        data_classes=frozenset(when.data_class or ()),
        endpoints=frozenset(when.endpoint or ()),
        min_priority=priority.min if priority else None,
        max_priority=priority.max if priority else None,
        min_prompt_tokens=prompt.min if prompt else None,
        max_prompt_tokens=prompt.max if prompt else None,
        stream=when.stream,
        labels=dict(when.labels) if when.labels else NO_LABELS,
        sla=frozenset(when.sla or ()),
        task=frozenset(when.task or ()),
        hours=_hours(when, utc_offset_s),
    )


def _hours(when: When, utc_offset_s: int) -> Hours | None:
    if when.time is None and when.days is None:
        return None
    start, end = window_minutes(when.time) if when.time else (0, 1440)
    days = when.days or ("mon-sun",)
    return Hours(start, end, frozenset[int]().union(*map(weekday_numbers, days)), utc_offset_s)


def _rule(section: RuleSection, match: Match, seed: int, at: Path, findings: list[Finding]) -> Rule | None:
    """The rule; or None, and findings, if a policy does not take its parameters. What has findings is not made."""
    made: dict[Path, Policy] = {}
    for path, pick in filechecks.picks_of(section):
        here = (*at, *path)
        refused = {one.path[len(here) :][:1] for one in findings if one.path[: len(here)] == here}
        if refused & {(), ("policy",)}:
            continue
        given = {key: value for key, value in pick.parameters.items() if (key,) not in refused}
        stream = "/".join([str(seed), section.name, *map(str, path[:-1])])
        try:
            policy = load(pick.policy, Random(stream), **given)  # noqa: S311
        except PolicyError as error:
            mistakes = [one for one in error.mistakes if one.at or not refused]
            findings += [Finding((*here, *one.at), one.message, None, one.at_key) for one in mistakes]
            continue
        made[path] = policy
        if section.weights and "weight" in policy.needs:
            made[path] = WithWeights(policy, section.weights)
    names = {path: pick.policy for path, pick in filechecks.picks_of(section)}
    if len(made) < len(names):
        return None
    if section.weights and not any("weight" in policy.needs for policy in made.values()):
        message = (
            f"weights mean nothing to {listed(dict.fromkeys(names.values()))}: pick weighted-qps, or another"
        )
        findings.append(Finding((*at, "weights"), f"{message} policy that goes by weight", at_key=True))
    tiers = [
        _tier(tier, made.get(("prefer", place, "pick")), names.get(("prefer", place, "pick"), ""))
        for place, tier in enumerate(section.prefer or ())
    ]
    return Rule(
        section.name,
        made["pick",],
        names["pick",],
        match,
        required(section),
        tuple(tiers) or (Tier(),),
        Queue(section.queue.wait, section.queue.depth, section.queue.overflow, section.queue.cold_start),
        section.weights or {},
        tuple(selector(avoided) for avoided in section.avoid or ()),
        _split(section),
    )


def _split(section: RuleSection) -> Split | None:
    if section.split is None:
        return None
    return Split(tuple(Part(part.name, part.share, selector(part), part.strict) for part in section.split))


def _tier(section: TierSection, policy: Policy | None, policy_name: str) -> Tier:
    spill = Spill(section.spill.enter, section.spill.leave) if section.spill else None
    return Tier(selector(section), spill, policy, policy_name, _host(section))


def _host(section: TierSection) -> HostBounds | None:
    if section.host is None:
        return None
    return HostBounds(
        tuple(
            (name, -inf if bounds.min is None else bounds.min, inf if bounds.max is None else bounds.max)
            for name, bounds in section.host
            if bounds is not None
        )
    )
