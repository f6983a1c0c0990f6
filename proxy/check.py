"""`tidegate check`: is a file right, and what does it do?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from policies.explain import explain_policy
from policies.filechecks import KnownKeys, KnownNames
from policies.files import CompiledPolicy, library_policy, read_policy
from policies.match import LOCAL
from policies.state import Backend
from policies.units import BadValueError
from policies.yamlfile import Document, FileProblems, Problem, parse_yaml, read_yaml
from policies.yamlproblems import closest
from proxy.build import (
    DEFAULT_SLOTS,
    backend_certificates,
    known_names,
    make_backends,
    policy_text,
    refused_without_keys,
    slots_of,
    tls_context,
)
from proxy.certificates import load_certificates
from proxy.config import BackendConfig, Config, Price, backend_key, is_policy_file, load_config
from proxy.database import OpenError, has_keys, said_by_keys
from proxy.masking import database_shown, without_secrets
from proxy.places import unusable_places
from proxy.prices import amount
from proxy.readable import in_words
from proxy.scaling.images import load_images
from proxy.scaling.offers import offers, unworkable
from proxy.scaling.providers import check_standby
from proxy.scaling.templates import TEMPLATES_FILE, TemplatesFile, check_templates, sites_of

PROBE_TOKENS = 10
"""About what a chat template makes of the prompt of `probing.generate`, a full stop."""


@dataclass(slots=True)
class Report:
    """What a check found."""

    file: str
    kind: str
    """`policy`, `configuration` or `templates`."""
    ok: bool
    text: str
    """For people: the file in plain words, or what is wrong with it."""
    problems: list[tuple[str, Problem]] = field(default_factory=list)
    """Each with the file it is in: a configuration brings its policy file along."""
    warnings: list[tuple[str, Problem]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "kind": self.kind,
            "ok": self.ok,
            "problems": [{"file": file, **problem._asdict()} for file, problem in self.problems],
            "warnings": [{"file": file, **problem._asdict()} for file, problem in self.warnings],
        }


def check_file(file: Path, config_path: Path | None) -> Report:
    """Check a policy file, a configuration or a file of templates, told apart by their keys, or a policy of the
    library by its name.

    Names in policies and templates are checked against the configuration at `config_path`, if there is one.
    """
    kind = "policy"
    try:
        found = "" if is_policy_file(str(file)) or file.exists() else library_policy(str(file))
    except ValueError as error:
        return Report(str(file), kind, False, f"{file}: no such file, and {error}")
    library = bool(found)
    try:
        text = found or file.read_text(encoding="utf-8")
        if _is_configuration(text, str(file)):
            kind = "configuration"
            return _check_configuration(file, text)
        if set(parse_yaml(text, str(file)).value) == {"templates"}:
            kind = "templates"
            return _check_templates(file, text, config_path)
        if config_path is None or config_path.resolve() == file.resolve():
            return _check_policy(file, text, None, library)
        try:
            config = load_config(config_path)
        except (FileProblems, OSError) as error:
            return _without_configuration(_check_policy(file, text, None, library), config_path, error)
        return _check_policy(file, text, known_names(config, make_backends(config), _keys(config)), library)
    except FileProblems as error:
        error = without_secrets(error)
        problems = [(error.name, problem) for problem in error.problems]
        return Report(str(file), kind, False, str(error), problems)
    except (OSError, UnicodeDecodeError) as error:
        words = in_words(error)
        return Report(str(file), kind, False, words if words.startswith(str(file)) else f"{file}: {words}")


def _check_policy(file: Path, text: str, known: KnownNames | None, library: bool) -> Report:
    try:
        policy = read_policy(text, str(file), known, tried=True)
        return _good(str(file), "policy", "", [], _as_it_should_be(policy) if library else policy)
    except FileProblems as error:
        error = without_secrets(error)
        problems = [(error.name, problem) for problem in error.problems]
        return Report(str(file), "policy", False, str(error), problems)


def _as_it_should_be(policy: CompiledPolicy) -> CompiledPolicy:
    """One of the library: what does nothing now is there for other fleets."""
    return replace(policy, warnings=[])


def _without_configuration(report: Report, path: Path, error: FileProblems | OSError) -> Report:
    """What a policy file says by itself, and why no more is known of it."""
    reason = f"{path} cannot be used, so names of sites and backends were not checked"
    broken = error.problems if isinstance(error, FileProblems) else []
    problems = [*report.problems, *((str(path), problem) for problem in broken)]
    text = f"{report.text}\n\n{reason}:\n{in_words(error)}"
    return Report(report.file, report.kind, False, text, problems, report.warnings)


def _is_configuration(text: str, name: str) -> bool:
    """A configuration has backends or addresses, a policy file has rules."""
    tops = set(parse_yaml(text, name).value)
    return "rules" not in tops and bool(tops & set(Config.model_fields))


def _good(
    file: str, kind: str, words: str, warnings: list[tuple[str, Problem]], policy: CompiledPolicy
) -> Report:
    """The report on a file without mistakes; `words` are said before those on its policy."""
    warnings = [*warnings, *((policy.name, warning) for warning in policy.warnings)]
    text = "".join(f"{_warning(*warning)}\n" for warning in warnings) + words + explain_policy(policy)
    return Report(file, kind, True, text.rstrip(), [], warnings)


def _warning(file: str, problem: Problem) -> str:
    hint = f" (did you mean '{problem.suggestion}'?)" if problem.suggestion else ""
    at = f"{problem.path}: " if problem.path else ""
    return f"warning: {file}:{problem.line}:{problem.column}: {at}{problem.message}{hint}"


# Templates


def _check_templates(file: Path, text: str, config_path: Path | None) -> Report:
    if config_path is None:
        templates = read_yaml(text, str(file), TemplatesFile).templates
        words = f"{file}: {', '.join(templates) or 'no templates'}"
        words += "; without a configuration nobody knows what can work"
        return Report(str(file), "templates", True, words)
    words, found = _templates_in(load_config(config_path), file, text)
    warnings = [(str(file), problem) for problem in found]
    said = "".join(f"{_warning(*warning)}\n" for warning in warnings)
    return Report(str(file), "templates", True, said + words, [], warnings)


def _templates_in(config: Config, file: Path, text: str) -> tuple[str, list[Problem]]:
    """What there is, in words, and what cannot work before the scheduling platform has placed more. Raises
    FileProblems."""
    offered = offers(config, load_images(config.scaling.images))
    platform = config.scaling.scheduler is not None
    templates, found = check_templates(text, str(file), offered, sites_of(config), more=platform)
    return f"{file}: {', '.join(templates) or 'no templates'}", found


def _templates_of(config: Config) -> tuple[Path, str]:
    """The file of templates in the state directory; empty: there is none. Raises FileProblems or OSError."""
    file = config.state / TEMPLATES_FILE
    try:
        return file, file.read_text(encoding="utf-8") if file.is_file() else ""
    except UnicodeDecodeError:
        raise FileProblems(str(file), [Problem(1, 1, "", "the file is not UTF-8 text")]) from None


# A configuration


def _check_configuration(file: Path, text: str) -> Report:
    config = load_config(file)
    document = parse_yaml(text, str(file))
    if problems := list(_unusable(config, document)):
        raise document.failed(problems)
    backends = make_backends(config)
    try:
        rules = policy_text(config.policy)
        policy = read_policy(rules, config.policy, known_names(config, backends, _keys(config)), tried=True)
    except FileProblems:
        raise
    except (OSError, ValueError) as error:  # no such file, not UTF-8, or no such policy in the library
        words = in_words(error)
        if isinstance(error, UnicodeDecodeError):
            words = f"{config.policy}: {words}"
        raise document.failed([document.problem(("policy",), words)]) from None
    if not is_policy_file(config.policy):
        policy = _as_it_should_be(policy)
    warnings = [(str(file), problem) for problem in _unused(config, document)]
    words = _in_words(file, config, backends)
    templates, written = _templates_of(config)
    if written:
        said, found = _templates_in(config, templates, written)
        words += f"\nTemplates in {said}."
        warnings += [(str(templates), problem) for problem in found]
    return _good(str(file), "configuration", f"{words}\n\n", warnings, policy)


def _unusable(config: Config, document: Document) -> Iterator[Problem]:
    """What the proxy would not start with, beyond what the file itself says."""
    for found in [*unusable_places(config), *unworkable(config)]:
        yield document.problem(found.at, found.message, found.suggestion)
    try:
        load_certificates(config.tls)
    except BadValueError as error:
        yield document.problem(error.at, error.message)
    for number, section in enumerate(config.backends):
        try:
            tls_context(section)
        except BadValueError as error:
            yield document.problem(("backends", number, "tls", *error.at), error.message)
        try:
            slots_of(section)
        except BadValueError as error:
            yield document.problem(("backends", number, *error.at), error.message)
        for found in check_standby(section, config.state, config.scaling.scheduler):
            yield document.problem(("backends", number, *found.at), found.message, found.suggestion)
    refusal = refused_without_keys(config.listen, Path(document.name), None)
    if refusal and _has_keys(config) is False:
        yield document.problem(("listen",), refusal)


def _has_keys(config: Config) -> bool | None:
    """None: it cannot be seen."""
    try:
        return has_keys(config.database or config.state)
    except OpenError:
        return None


def _keys(config: Config) -> KnownKeys | None:
    """What the keys in the state directory say; None: there are none, or they are in a database elsewhere."""
    found = said_by_keys(config.state) if config.database is None else []
    if not found:
        return None
    labels: dict[str, set[str]] = {}
    for _, _, given in found:
        for label, value in given.items():
            labels.setdefault(label, set()).add(value)
    return KnownKeys(
        frozenset(tenant for tenant, _, _ in found),
        frozenset(data_class for _, data_class, _ in found),
        {label: frozenset(values) for label, values in labels.items()},
    )


def _unused(config: Config, document: Document) -> Iterator[Problem]:
    """What is written in a configuration and does nothing, or cannot work as things stand."""
    yield from _unknown_models(config, document)
    yield from _generation_costs(config, document)
    yield from _never_started(config, document)
    for number, certificate in enumerate(load_certificates(config.tls)):
        if warning := certificate.warning(time.time()):
            yield document.problem(("tls", number, "certificate"), warning)
    for number, section in enumerate(config.backends):
        for dated in backend_certificates(section):
            if warning := dated.warning(time.time()):
                yield document.problem(("backends", number, "tls", dated.key), warning)
    refusal = refused_without_keys(config.listen, Path(document.name), None)
    if refusal and _has_keys(config) is None:
        message = f"whether there are keys cannot be seen from here: {refusal}"
        yield document.problem(("listen",), message)
    at: dict[str, str] = {}
    for number, section in enumerate(config.backends):
        first = at.setdefault(section.url, section.name)
        if first != section.name:
            message = f"backend {first} has this URL too: two names for one engine, whose slots count twice"
            yield document.problem(("backends", number, "url"), message)
        if section.tls.model_fields_set and not section.url.startswith("https:"):
            message = f"backend {section.name} is asked over plain http: `tls` says nothing"
            yield document.problem(("backends", number, "tls"), message, at_key=True)
        try:
            backend_key(section)
        except BadValueError as error:
            key = "api_key_file" if section.api_key_env is None else "api_key_env"
            yield document.problem(("backends", number, key), error.message)
    used = {section.site for section in config.backends}
    for site in config.sites:
        if site not in used:
            message = f"no backend stands at site '{site}'"
            meant = closest(site, used - config.sites.keys())
            if meant is not None:
                message += f"; there is one at '{meant}', which is not among the sites"
            elif config.scaling.scheduler is not None:
                continue  # placements may
            yield document.problem(("sites", site), message, at_key=True)


def _unknown_models(config: Config, document: Document) -> Iterator[Problem]:
    """Prices of models that their backend does not list, and aliases of models that nobody lists."""
    listed: set[str] = set()
    for number, section in enumerate(config.backends):
        if section.models == "auto":
            continue
        listed.update(section.models)
        for model in section.prices:
            if model not in section.models:
                message = f"backend {section.name} does not list model '{model}': nothing ever costs this"
                meant = config.aliases.get(model)
                suggestion = meant if meant in section.models else closest(model, section.models)
                yield document.problem(
                    ("backends", number, "prices", model), message, suggestion, at_key=True
                )
    if config.scaling.scheduler is not None or any(section.models == "auto" for section in config.backends):
        return  # others may be there later
    for alias, model in config.aliases.items():
        if model not in listed:
            message = f"no backend lists model '{model}'"
            yield document.problem(("aliases", alias), message, closest(model, listed))


def _in_words(file: Path, config: Config, backends: list[Backend]) -> str:
    count = len(backends)
    policy = config.policy if is_policy_file(config.policy) else f"{config.policy} of the library"
    lines = [
        f"{file}: {count} backend{'' if count == 1 else 's'}. API on {config.listen}, admin on {config.admin}.",
        f"Keys and ledger in {database_shown(config.database or config.state)}, money in {config.ledger_currency}. "
        f"Policy: {policy}.",
        "",
    ]
    if on := [*_switched_on(config), *_scaling(config)]:
        lines += [*on, ""]
    for section, backend in zip(config.backends, backends, strict=True):
        lines += _backend(section, backend, config.ledger_currency)
    return "\n".join(lines)


def _scaling(config: Config) -> Iterator[str]:
    """Who decides over standbys, and with how much money."""
    scaling, currency = config.scaling, config.ledger_currency
    if scaling.scheduler is None and all(section.standby is None for section in config.backends):
        return
    decides = "at once, within budget" if scaling.mode == "auto" else "when somebody has approved it"
    yield f"Standbys are started {decides}."
    budgets = [] if scaling.budgets.month is None else [f"{scaling.budgets.month:g} at all remote sites"]
    budgets += [f"{money:g} at {site}" for site, money in scaling.budgets.sites.items()]
    if budgets:
        yield f"A month costs at most, in {currency}: {', '.join(budgets)}."
    if scaling.scheduler is not None:
        yield f"More is asked of the scheduling platform at {scaling.scheduler.url}."


def _switched_on(config: Config) -> Iterator[str]:
    """What is off unless it is asked for."""
    hedging, probing = config.hedging, config.probing
    if hedging.after != "off":
        when = "95 % had theirs" if hedging.after == "p95" else f"{hedging.after:g} s"
        most = f"{hedging.ratio:.3g} of all at most"
        yield f"Hedging: a stream without its first token after {when} is sent once more, {most}."
    if probing.enabled and probing.generate is not None:
        yield f"Probes ask a backend for one token that has given clients none for {probing.generate:g} s."
    if config.timeouts.heartbeat:
        every = f"{config.timeouts.heartbeat:g} s"
        yield f"Heartbeats: a stream that waits for its first token gets a comment every {every}."
    for name, site in config.sites.items():
        urls = [f"{key} {url}" for key, url in (("dcgm", site.host.dcgm), ("node", site.host.node)) if url]
        if urls:
            yield f"The machine of site {name} is watched: {', '.join(urls)}."


def _generation_costs(config: Config, document: Document) -> Iterator[Problem]:
    """`probing.generate` pays for tokens that no client has asked for."""
    probing = config.probing
    if probing.generate is None or not probing.enabled:
        return
    an_hour = 3600 / max(probing.generate, probing.interval)
    for section in config.backends:
        prices = [price for price in (section.price, *section.prices.values()) if price is not None]
        dearest = max(
            (PROBE_TOKENS * Decimal(price.input) + Decimal(price.output) for price in prices),
            default=Decimal(),
        )
        if dearest:
            cost = amount(round(dearest * round(an_hour) * 1000))  # nano-units, of a price for a million
            tokens = f"{round(an_hour):,} tokens, each for a prompt of some {PROBE_TOKENS}"
            message = (
                f"backend {section.name} has a price: while no client asks, its probes cost up to {cost} "
                f"{config.ledger_currency} an hour ({tokens})"
            )
            yield document.problem(("probing", "generate"), message)


def _never_started(config: Config, document: Document) -> Iterator[Problem]:
    """Standbys that a budget, or their own times, keep from ever running."""
    budgets = config.scaling.budgets
    for number, section in enumerate(config.backends):
        standby = section.standby
        if standby is None:
            continue
        limits = {f"site {section.site}": budgets.sites.get(section.site)}
        if section.site != LOCAL:
            limits["the month"] = budgets.month
        for what, limit in limits.items():
            if limit is not None and limit < (standby.cost_per_hour or 0.0):
                why = f"an hour costs more than the budget of {what}, {limit:g}"
                message = f"backend {section.name} never starts: {why}"
                yield document.problem(("backends", number, "standby", "cost_per_hour"), message)
        if standby.cold_start > standby.start_timeout:
            message = f"backend {section.name} never starts: it would take longer than `start_timeout`"
            yield document.problem(("backends", number, "standby", "cold_start"), message)


def _backend(section: BackendConfig, backend: Backend, currency: str) -> Iterator[str]:
    slots = f"as many slots as its engine says (until then {DEFAULT_SLOTS})"
    if (count := slots_of(section)) is not None:
        slots = f"{count} slots" + (f", as {section.profile} says" if section.slots == "auto" else "")
    if section.adaptive:
        slots += ", fewer while it would only queue more (adaptive)"
    models = "whatever models it serves" if section.models == "auto" else ", ".join(section.models)
    classes = "all data classes"
    if backend.data_classes is not None:
        named = ", ".join(sorted(backend.data_classes))
        classes = f"data class {named}" if named else "no data at all"
    yield f"  {section.name} at site {section.site}, {section.url}"
    yield f"    {slots}; {models}; may see {classes}"
    price = "no price: its usage counts as unpriced"
    yield f"    {price if section.price is None else _price(section.price, currency)}"
    for model, of_model in section.prices.items():
        yield f"    model {model}: {_price(of_model, currency)}"
    if (standby := section.standby) is not None:
        cost = standby.cost_per_hour
        hour = "an hour costs nobody knows what" if cost is None else f"{cost:g} {currency} an hour"
        yield f"    standby: runs when it is needed, by `{standby.kind}`; {hour}"


def _price(price: Price, currency: str) -> str:
    cached = "" if price.cached_input is None else f" ({price.cached_input} if cached)"
    return f"per million tokens {price.input} {currency} in{cached}, {price.output} {currency} out"
