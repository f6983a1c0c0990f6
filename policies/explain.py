"""A policy file in plain words, rule by rule: what `tidegate check` prints.

An admin reads here what the file does, not what it says: defaults are spelled out, and the spill of a tier is
told as the router carries it out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from textwrap import fill

import policies
from policies.backendschema import Amounts, Described, Part, Price, Selection
from policies.filechecks import picks_of
from policies.files import CompiledPolicy
from policies.fileschema import (
    DEFAULT_PICK,
    Host,
    Pick,
    PolicyFile,
    Queue,
    Range,
    Rule,
    Spill,
    Tier,
    When,
)
from policies.match import ANY_SITE, REMOTE
from policies.units import parse_duration
from policies.yamlproblems import listed

WIDTH = 100


def explain_policy(compiled: CompiledPolicy) -> str:
    """The file in words: a paragraph per rule, then what the policies do; lines of at most WIDTH characters."""
    file = compiled.file
    count = len(file.rules)
    heading = f"{compiled.name}: {count} rules. The first that matches a request decides."
    if count == 1:
        heading = f"{compiled.name}: 1 rule, for every request."
    rules = [
        "\n".join(_rule(number, rule, file, served=rule.name not in compiled.unserved))
        for number, rule in enumerate(file.rules, start=1)
    ]
    return "\n\n".join([heading, *rules, "\n".join(_glossary(file))]) + "\n"


def tier_in_words(rule: Rule, tier: int) -> str:
    """The backends of one tier, counted from 0: `site local`. Empty: the rule has no such tier."""
    tiers = rule.prefer or (None,)
    if tier == len(tiers) and rule.avoid is not None:
        return "what it avoids"
    if tier >= len(tiers):
        return ""
    section = tiers[tier]
    return "any backend" if section is None else _backends(section, first=tier == 0)


def _rule(number: int, rule: Rule, file: PolicyFile, *, served: bool) -> Iterator[str]:
    yield f"{number}. {rule.name}"
    otherwise = "All requests" if len(file.rules) == 1 else "All other requests"
    yield _line(f"{_requests(rule.when, file.utc_offset) or otherwise}.")
    if rule.sites is not None and ANY_SITE not in rule.sites:
        yield _line(
            f"They never go anywhere but {_sites(rule.sites)}, not even when every backend there is down."
        )
    if rule.require is not None:
        backends = _backends(rule.require, first=True)
        yield _line(f"Nobody else may ever serve them, not even when all of these are down: {backends}.")
    if rule.split is not None:
        yield from _split(rule.split)
    if not served:
        yield _line("No backend that is configured now may serve them: each is refused with 404.")
        return
    if rule.prefer is None and rule.avoid is None:
        yield _line(f"Any backend with a free slot may serve them; {_chosen_by(rule.pick)}.")
    else:
        yield from _tiers(rule, rule.prefer or ())
    if rule.weights:
        yield _line(f"Weights here: {_pairs(rule.weights)}.")
    yield _line(_queue(rule.queue))
    if rule.queue.depth and "cold_start" in rule.queue.model_fields_set:
        yield _line(_cold_start(rule.queue))


def _split(parts: Sequence[Part]) -> Iterator[str]:
    yield _line("They are split by session, those without one each for itself:")
    for place, part in enumerate(parts):
        end = "." if place == len(parts) - 1 else ";"
        otherwise = "they are refused" if part.strict else "they go to other parts"
        text = (
            f"{100 * part.share:g}% to {part.name}: {_backends(part, first=place == 0)}; while none of these is "
            f"available, {otherwise}{end}"
        )
        yield _line(text, "     - ", "       ")
    yield _line("What follows is about the backends of a request's part.")


def _line(text: str, first: str = "   ", rest: str = "   ") -> str:
    return fill(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


# --- which requests ------------------------------------------------------------------------------------------


def _requests(when: When | None, utc_offset: str) -> str:
    """`Requests of tenant acme with data class restricted`; empty if there is no condition."""
    if when is None:
        return ""
    words = [
        *_one_of("for model", when.model),
        *_one_of("of tenant", when.tenant),
        *_one_of("with data class", when.data_class),
        *_one_of("to endpoint", when.endpoint),
        *_bounds("with priority", "", when.priority),
        *_bounds("with a prompt of", " tokens (estimated)", when.prompt_tokens),
        *([f"labelled {_pairs(when.labels)}"] if when.labels else []),
        *_one_of("of SLA class", when.sla),
        *_one_of("for the task", when.task),
        *_times(when, utc_offset),
    ]
    streamed = {None: "", True: "Streamed ", False: "Unstreamed "}[when.stream]
    if not words and not streamed:
        return ""
    return f"{streamed}{'requests' if streamed else 'Requests'} {', '.join(words)}".rstrip()


def _one_of(what: str, names: Sequence[str] | None) -> list[str]:
    return [f"{what} {listed(names)}"] if names else []


def _bounds(what: str, unit: str, bounds: Range | None) -> list[str]:
    if bounds is None:
        return []
    if bounds.min == bounds.max:
        return [f"{what} {bounds.min}{unit}"]
    if bounds.max is None:
        return [f"{what} at least {bounds.min}{unit}"]
    if bounds.min is None:
        return [f"{what} at most {bounds.max}{unit}"]
    return [f"{what} {bounds.min} to {bounds.max}{unit}"]


def _times(when: When, utc_offset: str) -> list[str]:
    words = []
    if when.time is not None:
        start, _, end = when.time.partition("-")
        words.append(f"from {start} to {end}")
    if when.days is not None:
        words.append(f"on {listed(when.days, 'and')}")
    return [f"{' '.join(words)} (UTC{'' if utc_offset == '+00:00' else utc_offset})"] if words else []


# --- where they go -------------------------------------------------------------------------------------------


def _tiers(rule: Rule, tiers: Sequence[Tier]) -> Iterator[str]:
    if len(tiers) == 1 and rule.avoid is None:
        tier = tiers[0]
        yield _line(
            f"They go to {_backends(tier, first=True)} and nowhere else; {_chosen_by(tier.pick or rule.pick)}."
        )
        if tier.spill is not None:
            yield _line(f"{_spill(tier.spill)[0].upper()}{_spill(tier.spill)[1:]}.")
        if tier.host is not None:
            yield _line(f"{_host(tier.host).capitalize()}.")
        return
    yield _line("They are offered, in this order, to")
    lines = []
    for place, tier in enumerate(tiers):
        parts = [_backends(tier, first=place == 0)]
        if tier.spill is None or tier.spill.enter <= 1.0:
            parts[0] += ", while a slot is free"
        if tier.spill is not None:
            parts.append(_spill(tier.spill))
        if tier.host is not None:
            parts.append(_host(tier.host))
        if tier.pick is not None:
            parts.append(_chosen_by(tier.pick))
        lines.append("; ".join(parts))
    if rule.avoid is not None:
        if not tiers:
            lines.append("any backend but those below, while a slot is free")
        avoided = listed(_backends(section, first=True) for section in rule.avoid)
        above = "of the above, what is avoided" if tiers else "what is avoided"
        lines.append(f"{above}, while a slot is free: {avoided}")
    for place, line in enumerate(lines):
        letter = chr(ord("a") + place) if place < 26 else str(place + 1)
        end = "." if place == len(lines) - 1 else ";"
        yield _line(line + end, f"     {letter}) ", "        ")
    shared = len(lines) - sum(tier.pick is not None for tier in tiers)
    if shared:
        where = "In each" if shared == len(lines) else "Otherwise"
        yield _line(f"{where}, {_chosen_by(rule.pick)}.")


def _host(host: Host) -> str:
    """`only while its host has gpu_utilisation at most 0.9 (as far as that is known)`."""
    words = [
        f"{name} {' and '.join(limits)}"
        for name, bounds in host
        if bounds is not None
        and (
            limits := [
                *([f"at least {bounds.min:g}"] if bounds.min is not None else []),
                *([f"at most {bounds.max:g}"] if bounds.max is not None else []),
            ]
        )
    ]
    return f"only while its host has {listed(words, 'and')} (as far as that is known)"


def _spill(spill: Spill) -> str:
    enter, leave = f"{100 * spill.enter:g}% full", f"less than {100 * spill.leave:g}% full"
    if spill.enter <= 1.0:
        return f"from {enter} until {leave} it is reported as spilling"
    return (
        f"without a free slot too, so that requests queue in its engines, until it is {enter}; from then on, "
        f"until it is {leave}, only while a slot is free"
    )


def _backends(section: Described, first: bool) -> str:
    """`any other backend at site nanjing labelled card=h20`."""
    words = []
    site = None if section.site is None or ANY_SITE in section.site else _sites(section.site)
    if section.backend is not None:
        words.append(f"backend {listed(section.backend)}")
    elif site is None or section.labels is not None:
        words.append("any backend" if first else "any other backend")
    if site is not None:
        words.append(f"at {site}" if words else site)
    if section.labels is not None:
        words.append(f"labelled {_pairs(section.labels)}")
    if section.operator is not None:
        words.append(f"of operator {listed(section.operator)}")
    figures = [*_price(section.price), *_limits("carbon", section.carbon, " g/kWh")]
    if isinstance(section, Selection) and section.rtt is not None:
        limits = (section.rtt.min, "at least"), (section.rtt.max, "at most")
        said = [f"{word} {_seconds(value)}" for value, word in limits if value is not None]
        figures.append(f"a measured round trip of {' and '.join(said)}")
    if figures:
        words.append(f"with {listed(figures, 'and')}")
    return " ".join(words)


def _price(price: Price | None) -> list[str]:
    if price is None:
        return []
    return [
        *_limits("input and output together", price, " per million tokens"),
        *_limits("input", price.input, " per million tokens"),
        *_limits("output", price.output, " per million tokens"),
    ]


def _limits(what: str, bounds: Amounts | Price | None, unit: str) -> list[str]:
    """`carbon at most 400 g/kWh`."""
    if bounds is None:
        return []
    limits = (bounds.min, "at least"), (bounds.max, "at most")
    said = [f"{word} {value:g}" for value, word in limits if value is not None]
    return [f"{what} {' and '.join(said)}{unit}"] if said else []


def _chosen_by(pick: Pick | None) -> str:
    pick = pick or Pick(policy=DEFAULT_PICK)
    durations = {one.name for one in policies.parameters(pick.policy) if one.is_duration}
    given = ", ".join(
        f"{key} {_seconds(parse_duration(value)) if key in durations and value is not None else _value(value)}"
        for key, value in pick.parameters.items()
    )
    return f"{pick.policy} chooses" + (f" (with {given})" if given else "")


def _glossary(file: PolicyFile) -> Iterator[str]:
    names = dict.fromkeys(pick.policy for rule in file.rules for _, pick in picks_of(rule))
    for name in names:
        yield _line(f"{name}: {policies.summary(name).rstrip('.:')}.", "", "   ")


def _queue(queue: Queue) -> str:
    least_loaded = "to the least loaded backend that may serve it"
    if queue.depth == 0:
        return "When none has room, a request is answered 429 at once."
    unless = f"unless all are {queue.overflow:.0%} full"
    if queue.wait == 0:
        return f"When none has room, a request goes {least_loaded} at once, {unless}."
    return (
        f"When none has room, a request waits for up to {_seconds(queue.wait)} and then goes {least_loaded}, "
        f"{unless}. {queue.depth} may wait at once; one more is answered 429."
    )


def _cold_start(queue: Queue) -> str:
    if queue.cold_start == 0:
        return "When nothing but a standby may serve it, a request is answered 503 at once."
    return f"When nothing but a standby may serve it, a request waits for up to {_seconds(queue.cold_start)}."


def _sites(names: Sequence[str]) -> str:
    """`site local or nanjing`, `any remote site`."""
    named = [name for name in names if name != REMOTE]
    return listed(
        [*([f"site {listed(named)}"] if named else []), *(["any remote site"] if REMOTE in names else [])]
    )


def _pairs(values: Mapping[str, object]) -> str:
    return listed((f"{key}={_value(value)}" for key, value in values.items()), "and")


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_value(one)}" for key, one in value.items()) + "}"
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _seconds(seconds: float) -> str:
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= length and seconds % length == 0:
            return f"{seconds / length:g} {unit}"
    return f"{1000 * seconds:g} ms" if 0.0 < seconds < 1.0 else f"{seconds:g} s"
