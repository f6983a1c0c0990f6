"""Templates: plans that are kept, in a file of the state directory, which people may edit.

A template says what is wanted (model, task, service level, budget, mode) and may say of what (sites, cards, how
many, or which standbys). Which standbys that comes to is worked out when it is run. One that cannot come to any is
refused, with the field that stands in its way and what is nearest to it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, field_validator, model_validator
from ruamel.yaml import YAML

from policies.match import LOCAL
from policies.siteschema import Name, SiteName
from policies.units import BadValueError, Duration, Fraction
from policies.yamlfile import Document, FileModel, FileProblems, Problem, parse_yaml
from policies.yamlproblems import closest, listed
from proxy.config import Config
from proxy.scaling.images import Missing, Task, card_name
from proxy.scaling.offers import Offer

TEMPLATES_FILE: Final = "templates.yaml"
HEAD: Final = (
    "# Templates of plans: `tidegate templates --help`. Saving this file is enough to change them.\n"
)


class Sla(FileModel):
    """The service level that it is to keep."""

    ttft: Duration | None = Field(None, gt=0, description="Mean time to the first token, at most.")
    tpot: Duration | None = Field(None, gt=0, description="Mean time per token after the first, at most.")


class Automatic(FileModel):
    """When it fires by itself: as soon as one of these is so."""

    spilling: Duration | None = Field(None, description="A tier has been too full for so long.")
    queue: int | None = Field(None, ge=1, description="So many requests wait.")
    oldest: Duration | None = Field(None, gt=0, description="One of them has waited for so long.")
    saturation: Fraction | None = Field(None, gt=0, description="Local backends are as full as this.")

    @model_validator(mode="after")
    def _check(self) -> Automatic:
        if all(value is None for _, value in self):
            raise BadValueError("say when: `spilling`, `queue`, `oldest` or `saturation`")
        return self


class Template(FileModel):
    """One of them."""

    model: str = Field(min_length=1, description="Model to serve.")
    task: Task = Field("generate", description="What for.")
    mode: Literal["auto", "confirm"] | None = Field(None, description="Default: that of `scaling`.")
    budget: Annotated[float, Field(ge=0)] | None = Field(
        None, description="What it may cost a month, in the ledger's currency."
    )
    sla: Sla = Field(default_factory=Sla, description="Service level.")
    sites: list[SiteName] = Field(default_factory=list, description="Where. Default: wherever it can.")
    cards: list[str] = Field(default_factory=list, description="On which. Default: on whatever can.")
    count: Annotated[int, Field(ge=1)] | None = Field(
        None, description="How many standbys. Default: all of `standbys`, else one."
    )
    standbys: list[Name] = Field(default_factory=list, description="Just these. Default: the cheapest.")
    automatic: Automatic | None = Field(None, description="When it fires by itself. Default: when it is run.")

    @property
    def most(self) -> int:
        """Standbys that it comes to."""
        return self.count or len(self.standbys) or 1


class TemplatesFile(FileModel):
    """The file."""

    templates: dict[Name, Template]

    @field_validator("templates", mode="before")
    @classmethod
    def _none(cls, value: object) -> object:
        return {} if value is None else value  # as where all of them are commented out

    @model_validator(mode="after")
    def _check(self) -> TemplatesFile:
        first: dict[str, str] = {}
        for name, template in self.templates.items():
            if template.automatic is not None:
                other = first.setdefault(template.model, name)
                if other != name:
                    raise BadValueError(
                        f"'{other}' fires for model '{template.model}' already: one template of a model does",
                        at=("templates", name, "automatic"),
                    )
        return self


@dataclass(frozen=True, slots=True)
class Shortage:
    """How things stand that a template may fire by."""

    spilling_s: float = 0.0
    """For so long a tier with backends of its model has been too full; 0: none is."""
    queue: int = 0
    """Requests of its model that wait."""
    oldest_s: float = 0.0
    saturation: float = 0.0
    """Of local backends of its model, on average."""


def fires(automatic: Automatic, now: Shortage) -> str:
    """Why it fires now, in words; empty: it does not."""
    if automatic.spilling is not None and now.spilling_s > 0 and now.spilling_s >= automatic.spilling:
        return f"local has been too full for {now.spilling_s:.0f} s"
    if automatic.queue is not None and now.queue >= automatic.queue:
        return f"{now.queue} requests wait"
    if automatic.oldest is not None and now.oldest_s >= automatic.oldest:
        return f"a request has waited for {now.oldest_s:.0f} s"
    if automatic.saturation is not None and now.saturation >= automatic.saturation:
        return f"local backends are {now.saturation:.0%} full"
    return ""


def choose(
    template: Template, offered: Mapping[str, Offer], sites: frozenset[str], out: Container[str] = ()
) -> list[Offer]:
    """The standbys that it comes to, the cheapest first; `out`: cannot start now, so that others take their places.

    Raises BadValueError with the field that cannot be satisfied, and what is nearest.
    """
    for number, name in enumerate(template.standbys):
        if name not in offered:
            raise BadValueError(
                f"there is no standby '{name}'", closest(name, offered), at=("standbys", number)
            )
    for number, site in enumerate(template.sites):
        if site not in sites and site != LOCAL:
            raise BadValueError(f"there is no site '{site}'", closest(site, sites), at=("sites", number))
    left = [offered[name] for name in template.standbys] or list(offered.values())
    for key, chosen in _steps(template):
        keeps = [one for one in left if chosen(one)]
        if not keeps:
            raise _nothing(template, key, left)
        if template.standbys and len(keeps) < len(left):
            odd = next(one for one in left if one not in keeps)
            number = template.standbys.index(odd.name)
            raise BadValueError(f"'{odd.name}' {_why_not(template, key, odd)}", at=("standbys", number))
        left = keeps
    left.sort(key=lambda one: one.rank)
    count = template.most
    if count > len(left):
        names = listed((one.name for one in left), "and")
        fit = "1 standby fits" if len(left) == 1 else f"{len(left)} standbys fit"
        raise BadValueError(f"{count} are wanted, and {fit}: {names}", str(len(left)), at=("count",))
    return ([one for one in left if one.name not in out] or left)[:count]


def _steps(template: Template) -> Iterator[tuple[str, Any]]:
    """What each field keeps, in the order in which they are said to be in the way."""
    cards = {card_name(card) for card in template.cards}
    yield "model", lambda one: template.model in one.models
    yield "sites", lambda one: not template.sites or one.site in template.sites
    yield "cards", lambda one: not cards or card_name(one.card) in cards
    yield "task", lambda one: one.task == template.task
    yield "image", lambda one: not isinstance(one.launch, Missing)
    yield "ttft", lambda one: _keeps(one.forecast.ttft_s, template.sla.ttft)
    yield "tpot", lambda one: _keeps(one.forecast.tpot_s, template.sla.tpot)
    yield "budget", lambda one: template.budget is None or one.cost_per_hour is not None or one.priced


def _keeps(forecast: float | None, most: float | None) -> bool:
    """What nobody knows is not held against it."""
    return forecast is None or most is None or forecast <= most


def _why_not(template: Template, key: str, one: Offer) -> str:
    if key == "model":
        return f"serves {listed(one.models, 'and')}, and not {template.model}"
    if key == "sites":
        return f"is at {one.site}, and not at {listed(template.sites)}"
    if key == "cards":
        return f"has {one.card or 'no card that is known'}, and not {listed(template.cards)}"
    if key == "task":
        return f"is for {one.task}, and not for {template.task}"
    if key == "image":
        return f"cannot start: {one.launch}"
    if key == "ttft":
        return f"is expected to need {one.forecast.ttft_s or 0:.2f} s to the first token"
    if key == "tpot":
        return f"is expected to need {one.forecast.tpot_s or 0:.3f} s per token"
    return "does not say what it costs: give its `cost_per_hour`"


def _nothing(template: Template, key: str, left: Sequence[Offer]) -> BadValueError:
    """Of those that were left, none is as this field wants it."""
    if not left:
        return BadValueError("the configuration has no standby at all", at=("model",))
    if key == "model":
        models = sorted({model for one in left for model in one.models})
        return BadValueError(
            f"no standby serves '{template.model}': there are {listed(models, 'and')}",
            closest(template.model, models),
            at=("model",),
        )
    ranked = sorted(left, key=lambda one: (one.forecast.ttft_s or inf, one.rank))
    nearest = f"the nearest is '{ranked[0].name}', which {_why_not(template, key, ranked[0])}"
    at = {"image": ("task",), "ttft": ("sla", "ttft"), "tpot": ("sla", "tpot")}.get(key, (key,))
    if key == "cards":
        cards = [one.card for one in left if one.card]
        return BadValueError(
            f"none of them fits; {nearest}", closest(template.cards[0], cards), at=("cards",)
        )
    return BadValueError(f"no standby fits; {nearest}", at=at)


def problems(
    document: Document, file: TemplatesFile, offered: Mapping[str, Offer], sites: frozenset[str]
) -> list[Problem]:
    """What cannot work in a file of templates, with lines."""
    found = []
    for name, template in file.templates.items():
        try:
            choose(template, offered, sites)
        except BadValueError as error:
            path = ("templates", name, *error.at)
            found.append(document.problem(path, error.message, error.suggestion))
    return found


def check_templates(
    text: str, name: str, offered: Mapping[str, Offer], sites: frozenset[str], *, more: bool = False
) -> tuple[dict[str, Template], list[Problem]]:
    """The templates in a text, and what of them cannot work until there are `more` standbys than are offered.

    Raises FileProblems: it is no such text, or there will not be more.
    """
    if _is_empty(text):
        return {}, []
    document, file = _parsed(text, name)
    found = problems(document, file, offered, sites)
    if found and not more:
        raise document.failed(found)
    return file.templates, found


def sites_of(config: Config) -> frozenset[str]:
    """That templates may name."""
    return frozenset({*config.sites, *(backend.site for backend in config.backends)})


def _is_empty(text: str) -> bool:
    """Whether there are but comments."""
    return all(not line or line.startswith("#") for line in map(str.strip, text.splitlines()))


def _parsed(text: str, name: str) -> tuple[Document, TemplatesFile]:
    """Raises FileProblems."""
    document = parse_yaml(text, name)
    return document, document.validate(TemplatesFile)


class Templates:
    """The file, as it is now. A mistake in it keeps what was there before."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trouble = ""
        """What is wrong with the file; empty: nothing."""
        self.version = 0
        """Changes with what is known."""
        self._known: dict[str, Template] = {}
        self._seen: tuple[int, int, int] | None = None
        self._read: tuple[Document, TemplatesFile] | None = None
        """None: there is no file that can be used."""

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def all(self) -> dict[str, Template]:
        """By name, in the order of the file."""
        return dict(self._known)

    def find(self, name: str) -> Template:
        """Raises KeyError with what was probably meant."""
        if name in self._known:
            return self._known[name]
        meant = closest(name, self._known)
        said = f" (did you mean '{meant}'?)" if meant else ""
        raise KeyError(f"there is no template '{name[:64]}'{said}")

    def look(self) -> bool:
        """Read the file if it is another than at the last look. True: it was. Blocks for a moment."""
        stamp = self._stamp()
        if stamp == self._seen:
            return False
        self._seen = stamp
        self.version += 1
        try:
            text = self.path.read_text(encoding="utf-8") if stamp is not None else ""
            self._read = None if _is_empty(text) else _parsed(text, str(self.path))
            self._known = dict(self._read[1].templates) if self._read is not None else {}
            self.trouble = ""
        except FileProblems as error:
            self.trouble = str(error)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "the file is not UTF-8 text"
            self.trouble = f"{self.path}: {reason}"
        return True

    def unworkable(self, offered: Mapping[str, Offer], sites: frozenset[str]) -> str:
        """What of the file cannot work with these standbys, with its lines; empty: nothing."""
        if self._read is None:
            return ""
        document, file = self._read
        found = problems(document, file, offered, sites)
        return str(document.failed(found)) if found else ""

    def save(
        self, name: str, written: Mapping[str, Any], offered: Mapping[str, Offer], sites: frozenset[str]
    ) -> Template:
        """Write one, in place of the one of its name; the rest of the file stays as people wrote it.

        `written`: as it would stand in the file. Raises FileProblems or BadValueError: it cannot work, or the
        file is broken already; OSError.
        """
        try:
            text = self._changed(lambda templates: templates.__setitem__(name, dict(written)))
        except RecursionError:
            raise BadValueError("it is nested too deep", at=("templates", name)) from None
        document, file = _parsed(text, str(self.path))
        try:
            choose(file.templates[name], offered, sites)
        except BadValueError as error:
            path = ("templates", name, *error.at)
            raise document.failed([document.problem(path, error.message, error.suggestion)]) from None
        self._write(text)
        return file.templates[name]

    def delete(self, name: str) -> None:
        """Take one out. Raises KeyError: there is none; FileProblems, OSError."""
        self.find(name)
        self._write(self._changed(lambda templates: templates.pop(name, None)))

    def _changed(self, change: Any) -> str:
        """The text of the file after a change of its `templates`; comments and order stay."""
        yaml = YAML()
        yaml.width = 4096
        yaml.preserve_quotes = True
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        content = {}
        if not _is_empty(text):
            _parsed(text, str(self.path))
            content = yaml.load(text)
        templates = content.get("templates")
        if templates is None:
            templates = content["templates"] = {}
        change(templates)
        output = io.StringIO()
        yaml.dump(content, output)
        if not _is_empty(text):
            return output.getvalue()
        return (text.rstrip("\n") + "\n" if text.strip() else HEAD) + output.getvalue()

    def _write(self, text: str) -> None:
        """Whole or not at all."""
        new = self.path.with_suffix(".new")
        with new.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path)
        self.look()

    def _stamp(self) -> tuple[int, int, int] | None:
        """Changes with the file; None: there is none."""
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size
