"""The pages of the documentation as data: headings, links, code, tables."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

_FENCE = re.compile(r"^( *)```([a-z]*)((?: [\w=./-]+)*)\n(.*?)^\1```$", re.M | re.S)
_INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n)+")
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]\n]+\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.M)
_COMMAND = re.compile(r"(?:^|[\s(/])tidegate ([^\n|;&]*)")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block. Its marks stand behind its language: `run`, `serve`, `file=NAME`."""

    language: str
    marks: tuple[str, ...]
    text: str

    @property
    def file(self) -> str:
        """Name of the file that the block is; empty: it is none."""
        return next((mark.removeprefix("file=") for mark in self.marks if mark.startswith("file=")), "")


class Page:
    """One page of Markdown."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = path.read_text(encoding="utf-8")

    def __repr__(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def blocks(self) -> list[Block]:
        """Its fenced blocks."""
        return [Block(match[2], tuple(match[3].split()), match[4]) for match in _FENCE.finditer(self.text)]

    @property
    def prose(self) -> str:
        """The page without its fenced blocks."""
        return _FENCE.sub("", self.text)

    @property
    def links(self) -> list[str]:
        """Targets of its links."""
        return _LINK.findall(self.prose)

    @property
    def anchors(self) -> set[str]:
        """What a link can point to, as GitHub names headings."""
        return {_anchor(heading) for heading in _HEADING.findall(self.prose)}

    def section(self, heading: str) -> str:
        """The text under a heading, up to the next heading of any level. AssertionError: there is none."""
        found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", self.text, re.M | re.S)
        assert found is not None, f"{self!r} has no heading {heading!r}"
        return found[1]

    def commands(self) -> Iterator[list[str]]:
        """Every `tidegate …` in its code, as words without `tidegate`."""
        code = [block.text for block in self.blocks if block.language != "python"]
        code += _INDENTED.findall(self.prose) + _INLINE.findall(self.prose)
        for text in code:
            for found in _COMMAND.findall(text.replace("\\\n", " ")):
                yield shlex.split(found.rstrip("`. "), comments=True)


def rows(table: str) -> list[list[str]]:
    """The cells of the tables in a text, heads left out."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for number, row in enumerate(cells) if not _is_head(cells, number)]


def first_codes(table: str) -> list[str]:
    """What stands in code in the first column of the tables in a text."""
    return [name for row in rows(table) for name in _INLINE.findall(row[0])]


def _is_head(cells: list[list[str]], number: int) -> bool:
    def is_rule(row: list[str]) -> bool:
        return all(set(cell) <= set("-:") and cell for cell in row)

    return is_rule(cells[number]) or (number + 1 < len(cells) and is_rule(cells[number + 1]))


def _anchor(heading: str) -> str:
    plain = re.sub(r"[^\w\- ]", "", heading.lower())
    return plain.strip().replace(" ", "-")


def pages() -> list[Page]:
    """README and all pages of `docs/`."""
    return [Page(path) for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]


def page(name: str) -> Page:
    """A page of `docs/`, or `README`."""
    return Page(ROOT / "README.md" if name == "README" else ROOT / "docs" / f"{name}.md")
