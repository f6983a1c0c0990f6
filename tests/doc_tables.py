"""Tables of the documentation that are made from the program: `python -m tests.doc_tables` writes them anew.

A page holds a table between two comments, `<!-- NAME: from the code -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import annotated_types
from prometheus_client.core import CounterMetricFamily
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import policies
from policies import guide, siteschema
from policies.units import Duration, Fraction, Size
from proxy import config, config_sections, config_values, exchange
from proxy.endpoints import TABLE
from proxy.metrics import Metrics
from proxy.scaling import sections
from sim import derive
from tests.commands import Command, Option, commands
from tests.proxy.fakes import World

ROOT = Path(__file__).parents[1]
_TABLE = re.compile(r"(<!-- ([\w .-]+): from the code -->\n)(?:(?!<!-- ).*\n)*(<!-- end -->)")

SECTIONS: dict[str, type[BaseModel]] = {
    "configuration": config.Config,
    "backend": config.BackendConfig,
    "price": config.Price,
    "tls": config.Tls,
    "certificate": config.CertificateConfig,
    "site": config.SiteConfig,
    "host": config.HostConfig,
    "timeouts": config_sections.Timeouts,
    "limits": config_sections.LimitsConfig,
    "retries": config_sections.Retries,
    "hedging": config_sections.HedgingConfig,
    "probing": config_sections.Probing,
    "health": config_sections.HealthConfig,
    "standby": sections.StandbySection,
    "process": sections.ProcessSection,
    "vllm": sections.VllmRecipe,
    "sleep": sections.SleepSection,
    "command": sections.CommandSection,
    "webhook": sections.WebhookSection,
    "placement": sections.SchedulerSection,
    "scaling": sections.ScalingConfig,
    "objective": sections.Objective,
    "notice": sections.NoticeSection,
    "budgets": sections.BudgetsSection,
    "platform": sections.SchedulerPlatform,
}
"""Sections of the configuration file, each with a table of its keys."""

HEADINGS = {
    "backend": "backends",
    "site": "sites",
    "certificate": "certificates",
    "process": "standby.process",
    "vllm": "standby.process.vllm",
    "sleep": "standby.sleep",
    "command": "standby.command",
    "webhook": "standby.webhook",
    "placement": "standby.scheduler",
    "objective": "scaling.objective",
    "notice": "scaling.approval_webhook",
    "budgets": "scaling.budgets",
    "platform": "scaling.scheduler",
}
"""Of the parts of the page that have them, where they are called otherwise."""

_TYPES: tuple[tuple[Any, str], ...] = (
    (Duration, "duration"),
    (Size, "size"),
    (Fraction, "fraction"),
    (siteschema.Name, "name"),
    (siteschema.SiteName, "name"),
    (siteschema.DataClass, "word"),
    (config_values.Zone, "time zone"),
    (config_values.NetworkText, "network"),
    (config_values.HostName, "host name"),
    (config_values.Url, "URL"),
    (config_values.Address, "`HOST:PORT`"),
    (config_values.DecimalText, "decimal"),
    (bool, "`true`, `false`"),
    (int, "whole number"),
    (float, "number"),
    (str, "text"),
    (Path, "path"),
)


def tables(page: str) -> list[str]:
    """Names of the generated tables of a page."""
    return [match[2] for match in _TABLE.finditer(page)]


def renewed(page: str) -> str:
    """A page with its generated tables as they should be. KeyError: a table that nobody makes."""
    return _TABLE.sub(lambda match: f"{match[1]}{_make(match[2])}\n{match[3]}", page)


def _make(name: str) -> str:
    kind, _, rest = name.partition(" ")
    makers: dict[str, Callable[[str], str]] = {
        "keys": keys,
        "options": options,
        "guide": guide_table,
        "policies": lambda _: policy_table(),
        "metrics": lambda _: metric_table(),
        "states": lambda _: state_table(),
        "predictions": lambda _: prediction_table(),
        "endpoints": lambda _: endpoint_table(),
    }
    return makers[kind](rest)


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# Keys of the configuration


def keys(section: str) -> str:
    """Key, type, default and meaning of every key of a section of the configuration."""
    model = SECTIONS[section]
    hints = get_type_hints(model, include_extras=True)
    return _rows(
        ("key", "type", "default", "meaning"),
        [
            (f"`{name}`", _type(hints[name]) + _bounds(field), _default(field, hints[name]), _text(field))
            for name, field in model.model_fields.items()
        ],
    )


def _text(field: FieldInfo) -> str:
    assert field.description, "every key says what it means"
    return field.description


def _type(hint: Any) -> str:
    for known, words in _TYPES:
        if hint is known or hint == known:
            return words
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin is list:
        return f"list of {_type(inner[0])}"
    if origin is dict:
        return f"map of {_type(inner[0])} to {_type(inner[1])}"
    if origin is tuple:
        return f"`[{', '.join(_type(one) for one in inner)}]`"
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        section = next(name for name, model in SECTIONS.items() if model is hint)
        heading = HEADINGS.get(section, section)
        return f"[{heading}](#{heading.replace('.', '')})"
    if origin is Union or (origin is not None and origin.__name__ == "UnionType"):
        return " or ".join(_type(one) for one in inner if one is not type(None))
    for hinted in inner[:1]:  # Annotated with a Field
        return _type(hinted)
    raise AssertionError(f"no words for {hint}")


def _bounds(field: FieldInfo) -> str:
    words = []
    for bound in field.metadata:
        if isinstance(bound, annotated_types.Ge):
            words.append(f"{bound.ge} or more")
        elif isinstance(bound, annotated_types.Gt):
            words.append(f"above {bound.gt}")
        elif isinstance(bound, annotated_types.Le):
            words.append(f"at most {bound.le}")
        elif isinstance(bound, annotated_types.MinLen):
            words.append(f"{bound.min_length} or more")
    return f", {', '.join(words)}" if words else ""


def _default(field: FieldInfo, hint: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, BaseModel):
        return ""
    if hint is Duration or hint == Duration:
        return f"`{value / 3600:g}h`" if value >= 3600 else f"`{value:g}s`"
    if hint is Fraction or hint == Fraction:
        return f"`{value:.0%}`"
    if hint is Size or hint == Size:
        return f"`{value // 2**20}MiB`" if value % 2**20 == 0 else f"`{value // 1024}KiB`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, float):
        return f"`{value:g}`"
    if isinstance(value, list | dict):
        return "none"
    return f"`{value}`" if value != "" else "none"


# Options of the commands


def options(name: str) -> str:
    """Option, default and meaning of every option and argument of a command."""
    command = next(command for command in commands() if command.name == name)
    return _rows(("option", "default", "meaning"), [_option(command, option) for option in command.options])


def _option(command: Command, option: Option) -> tuple[str, str, str]:
    names = ", ".join(f"`{name}`" for name in option.names)
    return names, "required" if option.required else option.default, option.help


# Everything else


def policy_table() -> str:
    """The built-in policies, each in one line."""
    return _rows(
        ("policy", "chooses"),
        [(f"`{name}`", f"{policies.summary(name).rstrip('.:')}.") for name in policies.POLICIES],
    )


def guide_table(kind: str) -> str:
    """What to take for what: `files` of the library, or `policies`."""
    wishes = {"files": guide.FILES, "policies": guide.POLICIES}[kind]
    return _rows(("you want", "take"), [(wish, f"`{name}`") for name, wish in wishes.items()])


def metric_table() -> str:
    """Every metric that `/metrics` shows, as Prometheus sees it."""
    rows = []
    for family in Metrics(World("a").runtime).collect():
        name = f"{family.name}_total" if isinstance(family, CounterMetricFamily) else family.name
        labels = ", ".join(f"`{label}`" for label in getattr(family, "_labelnames", ()))
        rows.append((f"`{name}`", family.type, labels, family.documentation))
    return _rows(("metric", "type", "labels", "meaning"), rows)


def state_table() -> str:
    """Where an exchange may go from each state."""
    rows = []
    for state, following in exchange.MOVES.items():
        names = [f"`{to.name}`" for to in exchange.State if to in following]
        rows.append((f"`{state.name}`", ", ".join(names) or "nowhere: it is over"))
    return _rows(("state", "may become"), rows)


def prediction_table() -> str:
    """How well each cell of the white paper's table 3-2 is predicted by the others of its card."""
    found = [one for one in derive.predictions(derive.written_bandwidths()) if one.predicted is not None]
    rows = [
        (derive.name_of(one.cell), str(one.cell.most), str(one.predicted), f"{one.error:+.0%}")
        for one in found
    ]
    sizes = zip(("mean size", "median size"), derive.error_sizes(found), strict=True)
    rows += [(name, "", "", f"{size:.0%}") for name, size in sizes]
    return _rows(("profile", "paper", "predicted", "error"), rows)


_METERED = {
    "running": "prompt and answer",
    "responses": "prompt and answer",
    "messages": "prompt and answer",
    "input": "prompt",
    "stored": "prompt and answer, if they were not counted before",
    "media": "prompt and answer, if the backend tells them",
    "session": "prompts and answers, if the backend tells them",
}


def endpoint_table() -> str:
    """Every endpoint that reaches a backend."""
    rows = []
    for route in TABLE:
        paths = ", ".join(f"`{path}`" for path in (route.path, *route.aliases))
        metered = f"no: {route.unmetered}" if route.unmetered else _METERED[route.metering]
        stream = "yes" if route.streams else ""
        rows.append((paths, route.method, f"`{route.name}`", stream, metered))
    return _rows(("path", "method", "name", "streams", "metered"), rows)


def pages() -> list[Path]:
    """README and all pages of `docs/`."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> None:
    for path in pages():
        page = path.read_text(encoding="utf-8")
        path.write_text(renewed(page), encoding="utf-8")


if __name__ == "__main__":
    main()
