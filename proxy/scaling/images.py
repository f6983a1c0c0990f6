"""What runs a model on a card: model × card × task × protocol to an image or a command, by `deploy/images.yaml`.

Of the entries that fit the most specific is taken; where none does, the nearest is named with what keeps it from
fitting, so that this is known when a file is checked or a plan is proposed and not when money is being spent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from policies.units import BadValueError
from policies.yamlfile import FileModel, read_yaml

Task = Literal["generate", "embed", "classify", "score", "transcribe"]
TASKS: Final[tuple[str, ...]] = get_args(Task)
Protocol = Literal["openai", "anthropic"]
PROTOCOLS: Final[tuple[str, ...]] = get_args(Protocol)
FIELDS: Final = ("model", "card", "task", "protocol")
"""What is looked up by, in the order of their weight: an entry for a model goes before one for a card."""
_DIFFERS: Final = {"card": 8, "model": 4, "task": 2, "protocol": 1}
"""How far an entry is that does not fit in a field: another card is further than another task on the same one."""
_VENDORS: Final = re.compile(r"^(?:nvidia|tesla|huawei|ascend)[\s_-]*")
_PLACE: Final = re.compile(r"\{(\w*)\}")
_PLACES: Final = frozenset({"model", "cards", "port"})


def card_name(text: str) -> str:
    """A card's name as names are compared: `NVIDIA L40S`, `Tesla-V100` and `l40s` without vendor and in small
    letters."""
    name = text.strip().casefold()
    while (shorter := _VENDORS.sub("", name)) != name:
        name = shorter
    return name


def _argument(text: str) -> str:
    for name in _PLACE.findall(text):
        if name not in _PLACES:
            raise BadValueError(f"{{{name}}} is not known: {{model}}, {{cards}} and {{port}} are filled in")
    return text


Argument = Annotated[str, AfterValidator(_argument)]
Patterns = Annotated[list[str], Field(min_length=1)]


class Entry(FileModel):
    """One line of the mapping: for which, and what."""

    models: Patterns = Field(["*"], description="Names or patterns (`Qwen/Qwen3-*`).")
    cards: Patterns = Field(["*"], description="Cards or patterns; vendor and case do not count.")
    tasks: list[Task] = Field(
        default_factory=lambda: list(get_args(Task)), min_length=1, description="What it serves."
    )
    protocols: list[Protocol] = Field(["openai"], min_length=1, description="API that it speaks.")
    image: str | None = Field(None, min_length=1, description="Container image.")
    command: list[Argument] | None = Field(None, min_length=1, description="Instead of an image: a command.")
    arguments: list[Argument] = Field(
        default_factory=list, description="Behind it; `{model}`, `{cards}`, `{port}`."
    )
    environment: dict[str, str] = Field(default_factory=dict, description="Variables.")
    source: str = Field(min_length=1, description="Where this is known from.")

    @model_validator(mode="after")
    def _check(self) -> Entry:
        if (self.image is None) == (self.command is None):
            raise BadValueError("give `image` or `command`, one of them", at=("image",))
        return self

    def patterns(self, name: str) -> Sequence[str]:
        """Of one of the four fields."""
        found: dict[str, Sequence[str]] = {
            "model": self.models,
            "card": self.cards,
            "task": self.tasks,
            "protocol": self.protocols,
        }
        return found[name]


class ImagesFile(FileModel):
    """A file of such entries."""

    images: list[Entry] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is looked up."""

    model: str
    card: str
    task: str = "generate"
    protocol: str = "openai"

    def __str__(self) -> str:
        return f"{self.model} on {self.card}, {self.task}, {self.protocol}"


@dataclass(frozen=True, slots=True)
class Launch:
    """What runs it: an image or a command, with everything filled in."""

    image: str = ""
    command: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    source: str = ""

    def __str__(self) -> str:
        return self.image or " ".join(self.command)

    def as_dict(self) -> dict[str, Any]:
        """As providers are told."""
        return {
            "image": self.image,
            "command": list(self.command),
            "arguments": list(self.arguments),
            "environment": dict(self.environment),
        }


@dataclass(frozen=True, slots=True)
class Missing:
    """Nothing runs it, and what comes nearest."""

    wanted: Wanted
    nearest: Entry | None
    differs: Mapping[str, tuple[str, ...]]
    """What the nearest one takes instead, by field that does not fit."""

    def __str__(self) -> str:
        said = f"there is no image for {self.wanted}"
        if self.nearest is None:
            return said
        instead = "; ".join(f"{name} {_listed(names)}" for name, names in self.differs.items())
        what = self.nearest.image or " ".join(self.nearest.command or ())
        return f"{said}; the nearest is {what}, for {instead}"


class Images:
    """The mapping; earlier entries go before later ones that are as specific."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = tuple(entries)

    def find(self, wanted: Wanted) -> Entry | Missing:
        """The most specific entry that fits, else what is missing."""
        best: Entry | None = None
        best_rank: tuple[tuple[int, int], ...] = ()
        for entry in self.entries:
            ranks = [_rank(entry, wanted, name) for name in FIELDS]
            if None not in ranks:
                rank = tuple(rank for rank in ranks if rank is not None)
                if best is None or rank > best_rank:
                    best, best_rank = entry, rank
        return best if best is not None else self._missing(wanted)

    def launch(self, wanted: Wanted, cards: int = 1, port: int = 8000) -> Launch | Missing:
        """What runs it on so many cards."""
        entry = self.find(wanted)
        if isinstance(entry, Missing):
            return entry
        places = {"model": wanted.model, "cards": str(cards), "port": str(port)}

        def filled(texts: Sequence[str]) -> tuple[str, ...]:
            return tuple(_PLACE.sub(lambda match: places[match[1]], text) for text in texts)

        return Launch(
            entry.image or "",
            filled(entry.command or ()),
            filled(entry.arguments),
            dict(entry.environment),
            entry.source,
        )

    def matching(
        self, model: str = "", card: str = "", task: str = "", protocol: str = ""
    ) -> Iterator[Entry]:
        """Entries that fit what is given; empty: whatever."""
        wanted = Wanted(model, card, task, protocol)
        for entry in self.entries:
            if all(not getattr(wanted, name) or _rank(entry, wanted, name) is not None for name in FIELDS):
                yield entry

    def _missing(self, wanted: Wanted) -> Missing:
        def distance(entry: Entry) -> tuple[int, float]:
            off = [name for name in FIELDS if _rank(entry, wanted, name) is None]
            unlike = sum(1.0 - _likeness(entry.patterns(name), getattr(wanted, name)) for name in off)
            return sum(_DIFFERS[name] for name in off), unlike

        nearest = min(self.entries, key=distance, default=None)
        if nearest is None:
            return Missing(wanted, None, {})
        differs = {
            name: tuple(nearest.patterns(name)) for name in FIELDS if _rank(nearest, wanted, name) is None
        }
        return Missing(wanted, nearest, differs)


def _rank(entry: Entry, wanted: Wanted, name: str) -> tuple[int, int] | None:
    """How specifically an entry fits in a field, more is more; None: it does not."""
    value = getattr(wanted, name)
    plain = card_name if name == "card" else str.casefold
    value = plain(value)
    found: tuple[int, int] | None = None
    for text in entry.patterns(name):
        pattern = plain(text)
        if not fnmatchcase(value, pattern):
            continue
        literal = len(pattern) - sum(map(pattern.count, "*?[]"))
        rank = (2, 0) if pattern == value else (1, literal) if literal else (0, 0)
        if found is None or rank > found:
            found = rank
    return found


def _likeness(patterns: Sequence[str], value: str) -> float:
    plain = value.casefold()
    return max(SequenceMatcher(None, plain, pattern.casefold()).ratio() for pattern in patterns)


def _listed(names: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return f"{shown} …" if len(names) > most else shown


def read_images(text: str, name: str) -> list[Entry]:
    """The entries of a file. Raises FileProblems."""
    return read_yaml(text, name, ImagesFile).images


def shipped_file() -> Path:
    """The mapping that comes with Tidegate: beside this module where it is installed, else in `deploy/`."""
    beside = Path(__file__).with_name("images.yaml")
    return beside if beside.is_file() else Path(__file__).parents[2] / "deploy" / "images.yaml"


@cache
def _shipped() -> tuple[Entry, ...]:
    file = shipped_file()
    return tuple(read_images(file.read_text(encoding="utf-8"), str(file)))


def load_images(own: Path | None = None) -> Images:
    """The shipped mapping, and before it that of one's own file. Raises FileProblems or OSError."""
    mine = [] if own is None else read_images(own.read_text(encoding="utf-8"), str(own))
    return Images([*mine, *_shipped()])
