"""YAML text in, a validated pydantic model out; else every problem of the file with its line and column.

Three steps. The parser of ruamel.yaml turns text into events, which know their positions. `_Composer` turns
events into nodes: YAML 1.2's core schema and nothing more (no tags, dates, merge keys or second document),
within bounds, so that a hostile file ends in a problem and not in an outage. `Document.validate` hands plain
values to pydantic; `yamlproblems.py` puts what pydantic finds into plain words.

Text in, values out: nothing here opens a file.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, NamedTuple, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml import events as yaml_events
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.reader import ReaderError

from policies import yamlproblems
from policies.units import BadValueError, Duration, Fraction, Size, shown
from policies.yamlproblems import Path

__all__ = [
    "BadValueError",
    "Document",
    "Duration",
    "FileModel",
    "FileProblems",
    "Fraction",
    "Problem",
    "Size",
    "parse_yaml",
    "read_yaml",
]

MAX_CHARACTERS = 1 << 20
MAX_DEPTH = 50
MAX_VALUES = 100_000
"""Values in one file after its aliases are followed: a "billion laughs" file ends here."""

Value: TypeAlias = "str | int | float | bool | list[Value] | dict[str, Value] | None"
Model = TypeVar("Model", bound=BaseModel)


class Problem(NamedTuple):
    """One thing that is wrong in a file. Line and column count from 1, columns in characters."""

    line: int
    column: int
    path: str
    """Where in the structure: `rules[1].prefer[0].spill.enter`; empty for the file as a whole."""
    message: str
    suggestion: str | None = None
    """What was probably meant, as it would be written."""


class FileProblems(Exception):  # noqa: N818 (a list of findings)
    """Everything that is wrong with one file. `str()` prints it as a compiler would."""

    def __init__(self, name: str, problems: Iterable[Problem], text: str = "") -> None:
        self.name = name
        self.problems = sorted(problems, key=lambda problem: problem[:4])
        self.text = text
        super().__init__(name, self.problems)

    def __str__(self) -> str:
        return render(self.name, self.problems, self.text)


class FileModel(BaseModel):
    """Base of everything that is read from a file: unknown keys are errors, nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


def read_yaml(text: str, name: str, model: type[Model]) -> Model:
    """The model that a YAML text describes. `name` is the file's name in messages.

    Raises: FileProblems, and nothing else whatever the text.
    """
    return parse_yaml(text, name).validate(model)


def parse_yaml(text: str, name: str) -> Document:
    """The values and positions in a YAML text whose top level is a mapping.

    Raises: FileProblems, and nothing else whatever the text.
    """
    text = text.removeprefix("\ufeff")
    if len(text) > MAX_CHARACTERS:
        raise FileProblems(name, [Problem(1, 1, "", "the file is larger than 1 MiB")])
    composer = _Composer(name, text)
    try:
        root = composer.document(YAML(typ="safe", pure=True).parse(text))
        value = _Plain(composer).value(root, ())
    except FileProblems:
        raise
    except MarkedYAMLError as error:
        line, column, message, suggestion = yamlproblems.syntax(error)
        problem = Problem(line, column, "", message, suggestion)
        raise FileProblems(name, [*composer.problems, problem], text) from None
    except ReaderError as error:
        line, column = _line_and_column(text, error.position)
        message = f"character U+{ord(text[error.position]):04X} is not allowed in YAML"
        raise FileProblems(name, [Problem(line, column, "", message)], text) from None
    except Exception as error:  # the parser is not ours: no text may get past this border as another error
        raise FileProblems(name, [Problem(1, 1, "", f"not readable as YAML ({error})")], text) from error
    if value is None:
        raise FileProblems(name, [*composer.problems, Problem(1, 1, "", "the file is empty")], text)
    if not isinstance(value, dict):
        got = "a list" if isinstance(value, list) else "a single value"
        message = f"expected keys and values at the top of the file, got {got}"
        raise FileProblems(name, [*composer.problems, Problem(root.line, root.column, "", message)], text)
    return Document(name, text, root, value, composer.problems)


@dataclass(slots=True)
class Node:
    """A value in the file and where it stands (from 1)."""

    line: int
    column: int
    content: str | int | float | bool | list[Node] | dict[str, Entry] | None


class Entry(NamedTuple):
    """A key (its position is what an unknown key points at) and its value."""

    key: Node
    value: Node


@dataclass(slots=True)
class Document:
    """A parsed file: values without positions for pydantic, nodes with positions for messages."""

    name: str
    text: str
    root: Node
    value: dict[str, Value]
    problems: list[Problem] = field(default_factory=list)
    """Found while parsing (duplicate keys); they come out with those of `validate`."""

    def validate(self, model: type[Model]) -> Model:
        """The model.

        Raises: FileProblems with everything that is wrong.
        """
        result = None
        problems = list(self.problems)
        try:
            result = model.model_validate(self.value)
        except ValidationError as error:
            for finding in yamlproblems.explain(error, model, self.value):
                problems.append(
                    self.problem(finding.path, finding.message, finding.suggestion, finding.at_key)
                )
        if problems or result is None:
            raise FileProblems(self.name, problems, self.text)
        return result

    def problem(
        self, path: Path, message: str, suggestion: str | None = None, at_key: bool = False
    ) -> Problem:
        """A problem at a path, for checks beyond the schema; `at_key` points at the key instead of its value.

        A key that is missing is named, and its mapping pointed at. Steps into what the file writes as a single
        value (`sites: local` for a list) are left out.
        """
        node = at = self.root
        named: Path = ()
        for step in path:
            content = node.content
            if isinstance(content, dict) and isinstance(step, str) and step in content:
                at = content[step].key if at_key else content[step].value
                node = content[step].value
            elif isinstance(content, list) and isinstance(step, int) and 0 <= step < len(content):
                node = at = content[step]
            else:
                named = (*named, step) if isinstance(content, dict) else named
                break
            named = (*named, step)
        return Problem(at.line, at.column, yamlproblems.dotted(named), message, suggestion)

    def failed(self, problems: Iterable[Problem]) -> FileProblems:
        """The exception for problems of this file."""
        return FileProblems(self.name, problems, self.text)


class _Composer:
    """Parser events to nodes. Recursion is bounded by MAX_DEPTH."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.text = text
        self.problems: list[Problem] = []
        self.anchors: dict[str, Node] = {}
        self.events: Iterator[Any] = iter(())

    def fail(
        self, line: int, column: int, path: Path, message: str, suggestion: str | None = None
    ) -> FileProblems:
        problem = Problem(line, column, yamlproblems.dotted(path), message, suggestion)
        return FileProblems(self.name, [*self.problems, problem], self.text)

    def document(self, events: Iterator[Any]) -> Node:
        self.events = events
        root: Node | None = None
        for event in events:
            if isinstance(event, yaml_events.DocumentStartEvent):
                if root is not None:
                    line, column = _position(event)
                    raise self.fail(line, column, (), "a second YAML document starts here; a file holds one")
                root = self.node(next(events), ())
        return root if root is not None else Node(1, 1, None)

    def node(self, event: Any, path: Path) -> Node:
        line, column = _position(event)
        if len(path) > MAX_DEPTH:
            raise self.fail(line, column, path[:3], f"nested more than {MAX_DEPTH} levels deep")
        if isinstance(event, yaml_events.AliasEvent):
            if (target := self.anchors.get(event.anchor)) is None:
                raise self.fail(
                    line, column, path, f"no anchor {shown(event.anchor)} stands before this alias"
                )
            return target
        if event.tag is not None:
            raise self.fail(line, column, path, f"YAML tags such as {shown(event.tag)} are not used here")
        if isinstance(event, yaml_events.ScalarEvent):
            node = Node(line, column, event.value if event.style else _plain_scalar(event.value))
        elif isinstance(event, yaml_events.SequenceStartEvent):
            node = Node(line, column, self.sequence(path))
        else:
            node = Node(line, column, self.mapping(path))
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def sequence(self, path: Path) -> list[Node]:
        items: list[Node] = []
        while not isinstance(event := next(self.events), yaml_events.SequenceEndEvent):
            items.append(self.node(event, (*path, len(items))))
        return items

    def mapping(self, path: Path) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        while not isinstance(event := next(self.events), yaml_events.MappingEndEvent):
            line, column = _position(event)
            if not isinstance(event, yaml_events.ScalarEvent):
                raise self.fail(line, column, path, "a key must be a single word or text")
            key = event.value
            if key == "<<" and not event.style:
                raise self.fail(line, column, path, "merge keys (<<) are not used here; write the keys out")
            value = self.node(next(self.events), (*path, key))
            if value.content is None:
                value.line, value.column = line, column  # the parser places "nothing" at whatever comes next
            if key in entries:
                first = entries[key].key.line
                message = f"this key is already given in line {first}"
                self.problems.append(Problem(line, column, yamlproblems.dotted((*path, key)), message))
                continue
            entries[key] = Entry(Node(line, column, key), value)
        return entries


class _Plain:
    """Nodes to plain values. Aliases are followed here, so here they are counted."""

    def __init__(self, composer: _Composer) -> None:
        self.composer = composer
        self.count = 0

    def value(self, node: Node, path: Path) -> Value:
        self.count += 1
        if self.count > MAX_VALUES or len(path) > MAX_DEPTH:
            message = f"more than {MAX_VALUES} values" if self.count > MAX_VALUES else "nested too deep"
            raise self.composer.fail(node.line, node.column, path[:1], f"{message} once aliases are followed")
        content = node.content
        if isinstance(content, list):
            return [self.value(item, (*path, index)) for index, item in enumerate(content)]
        if isinstance(content, dict):
            return {key: self.value(entry.value, (*path, key)) for key, entry in content.items()}
        return content


def _position(event: Any) -> tuple[int, int]:
    return event.start_mark.line + 1, event.start_mark.column + 1


_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_DECIMAL = re.compile(r"[-+]?[0-9]{1,18}")
_OCTAL = re.compile(r"0o[0-7]{1,20}")
_HEX = re.compile(r"0x[0-9a-fA-F]{1,15}")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")


def _plain_scalar(text: str) -> str | int | float | bool | None:
    """YAML 1.2's core schema (10.3.2); what overflows, `.inf` and `.nan` stay text: no key takes them."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _DECIMAL.fullmatch(text):
        return int(text)
    if _OCTAL.fullmatch(text) or _HEX.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text) and isfinite(number := float(text)):
        return number
    return text


_LINE_BREAK = re.compile("\r\n|[\r\n\x85\u2028\u2029]")
"""Where ruamel.yaml's reader counts a new line."""


def _line_and_column(text: str, index: int) -> tuple[int, int]:
    lines = _LINE_BREAK.split(text[:index])
    return len(lines), len(lines[-1]) + 1


def render(name: str, problems: Sequence[Problem], text: str) -> str:
    """Problems for people: one line each, below it the line of the file and a caret."""
    lines = _LINE_BREAK.split(text.removeprefix("\ufeff"))
    width = max((len(str(problem.line)) for problem in problems), default=1)
    output: list[str] = []
    for problem in problems:
        where = f"{name}:{problem.line}:{problem.column}:"
        path = f" {problem.path}:" if problem.path else ""
        hint = f" (did you mean {_quoted(problem.suggestion)}?)" if problem.suggestion else ""
        output.append(_printable(f"{where}{path} {problem.message}{hint}"))
        if text and problem.line <= len(lines):
            source, caret = _excerpt(lines[problem.line - 1], problem.column - 1)
            output.append(f"  {problem.line:>{width}} | {source}".rstrip())
            output.append(f"  {'':>{width}} | {caret}")
    return "\n".join(output)


def _quoted(text: str) -> str:
    return text if '"' in text else f'"{text}"' if "'" in text else f"'{text}'"


def _excerpt(line: str, column: int, width: int = 100) -> tuple[str, str]:
    """A line cut to `width` characters around a column, and the caret line below it."""
    start = max(0, min(column - width // 2, len(line) - width))
    before = _printable(line[start:column])
    source = before + _printable(line[column : start + width])
    if start:
        source, before = "..." + source, "..." + before
    if start + width < len(line):
        source += "..."
    # A wide (CJK) character takes two columns of a terminal.
    return source, " " * sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in before) + "^"


def _printable(text: str) -> str:
    """No control character of a file reaches a terminal; a tab takes one column."""
    return "".join(c if c.isprintable() else " " if c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
