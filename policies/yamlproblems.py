"""From a parser's and pydantic's findings to sentences an admin can act on.

A message says what was expected and what stands there, in the words of the file and not of the program.
Unknown names get the nearest known one as a suggestion; known keys come from the model's own JSON Schema, so
nothing is listed twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any, NamedTuple, TypeAlias

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml.error import MarkedYAMLError

from policies.units import BadValueError, shown

Path: TypeAlias = tuple[str | int, ...]

MAX_FINDINGS = 100


class Finding(NamedTuple):
    """A problem before it has a position."""

    path: Path
    message: str
    suggestion: str | None = None
    at_key: bool = False
    """Point at the key, not at its value."""


def dotted(path: Path) -> str:
    """`("rules", 1, "when")` -> `rules[1].when`."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif re.fullmatch(r"[\w*-]{1,60}", step):
            text += f".{step}" if text else step
        else:
            text += f"[{shown(step)}]"
    return text


def closest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that was probably meant, if any is near enough."""
    by_plain = {name.lower().replace("-", "_"): name for name in known}
    matches = get_close_matches(word.lower().replace("-", "_"), by_plain, n=1, cutoff=cutoff)
    return by_plain[matches[0]] if matches else None


def listed(words: Iterable[str], last: str = "or") -> str:
    """`a, b or c`."""
    *head, tail = list(words)
    return f"{', '.join(head)} {last} {tail}" if head else tail


# --- YAML syntax ---------------------------------------------------------------------------------------


def syntax(error: MarkedYAMLError) -> tuple[int, int, str, str | None]:
    """Line, column, message and suggestion for what ruamel.yaml could not parse."""
    problem, context = error.problem or "", error.context or ""
    mark, opened = error.problem_mark or error.context_mark, error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)
    opened_line = opened.line + 1 if opened is not None else line

    if "scanning an alias" in context and opened is not None:
        return opened_line, opened.column + 1, "a bare * starts an alias in YAML; put it in quotes", '"*"'
    if "scanning a quoted scalar" in context or "double-quoted" in context:
        if "end of stream" in problem or "document separator" in problem:
            return opened_line, opened.column + 1 if opened else 1, "this quote is never closed", None
        return line, column, f"{problem.removeprefix('found ')} in quoted text", None
    if "\\t" in problem:
        return line, column, "a tab cannot indent in YAML; use spaces", None
    if unusable := re.match(r"found character '(.)' that cannot start", problem):
        return line, column, f"a value cannot start with {unusable[1]}; put it in quotes", None
    if "mapping values are not allowed" in problem:
        return (
            line,
            column,
            "a ':' cannot stand here: check the indentation, or put text with ': ' in quotes",
            None,
        )
    if "sequence entries are not allowed" in problem:
        return line, column, "a list item '- ' cannot stand here; start it on a line of its own", None
    if "could not find expected ':'" in problem:
        return opened_line, opened.column + 1 if opened else 1, "expected a ':' after this key", None
    if "found '<stream end>'" in problem:
        return line, column, "the file ends too early: a bracket is still open", None
    if bracket := re.match(r"expected ',' or '([]}])'", problem):
        return (
            line,
            column,
            f"expected ',' or '{bracket[1]}': the bracket of line {opened_line} is still open",
            None,
        )
    if closing := re.search(r"found '([]}])'", problem):
        return line, column, f"this '{closing[1]}' closes nothing", None
    if "expected <block end>" in problem:
        message = (
            f"this does not fit the block that starts in line {opened_line}: check indentation and quotes"
        )
        return line, column, message, None
    return line, column, f"not valid YAML: {problem or context or 'unreadable'}", None


# --- pydantic ------------------------------------------------------------------------------------------


_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "dict_type": "keys and values",
    "mapping_type": "keys and values",
    "model_type": "keys and values",
    "model_attributes_type": "keys and values",
    "dataclass_type": "keys and values",
    "url_type": "a URL such as http://127.0.0.1:8000",
    "url_parsing": "a URL such as http://127.0.0.1:8000",
}

_CHOICES = frozenset({"literal_error", "enum"})

_BOUNDS = {
    "greater_than": ("must be more than", "gt"),
    "greater_than_equal": ("must be at least", "ge"),
    "less_than": ("must be less than", "lt"),
    "less_than_equal": ("must be at most", "le"),
}


class _Located(NamedTuple):
    """A pydantic error with the part of its location that is in the file."""

    path: Path
    union_at: Path | None
    """Where a union began whose branch this error is about."""
    error: ErrorDetails

    @property
    def is_mismatch(self) -> bool:
        """The whole value is of the wrong kind, so that another branch may fit better."""
        return self.error["type"] in _EXPECTED or self.error["type"] in _CHOICES

    @property
    def expected(self) -> str:
        """What a mismatch expected."""
        kind = self.error["type"]
        return str(self.error["ctx"]["expected"]) if kind in _CHOICES else _EXPECTED[kind]


def explain(error: ValidationError, model: type[BaseModel], value: object) -> list[Finding]:
    """Pydantic's findings about `value`, as findings for people; at most MAX_FINDINGS."""
    details = error.errors(include_url=False)
    located = [_locate(detail, value) for detail in details[:MAX_FINDINGS]]
    schema = model.model_json_schema() if any(d["type"] == "extra_forbidden" for d in details) else {}
    findings = _unknown_keys(located, schema, value)
    meant = {(*finding.path[:-1], finding.suggestion) for finding in findings}
    for one in _without_wrong_branches(located):
        if one.error["type"] == "missing":
            path = (*one.path, one.error["loc"][-1])
            if path not in meant:  # the misspelt key beside it says it already
                findings.append(Finding(path, "this key is required"))
        elif one.error["type"] != "extra_forbidden" and not _only_looks_short(one.error):
            findings.append(_finding(one))
    findings += _merged_type_errors(located)
    if len(details) > MAX_FINDINGS:
        findings.append(Finding((), f"{len(details) - MAX_FINDINGS} more problems are not shown"))
    return findings


def _locate(error: ErrorDetails, value: Any) -> _Located:
    path: Path = ()
    union_at: Path | None = None
    names_missing_key = error["type"] == "missing"
    for index, step in enumerate(error["loc"]):
        if _holds(value, step):
            path = (*path, step)
            value = value[step]
        elif (
            union_at is None
            and step != "[key]"
            and not (names_missing_key and index == len(error["loc"]) - 1)
        ):
            union_at = path
    return _Located(path, union_at, error)


def _holds(value: object, step: str | int) -> bool:
    if isinstance(step, int):
        return isinstance(value, list) and step < len(value)
    return isinstance(value, dict) and step in value


def _without_wrong_branches(located: list[_Located]) -> Iterator[_Located]:
    """Without the type errors at a union's own place: they are merged, or another branch fits better."""
    for one in located:
        if one.union_at is None or one.path != one.union_at or not one.is_mismatch:
            yield one


def _only_looks_short(error: ErrorDetails) -> bool:
    """Pydantic also calls a list too short whose entries it refused one by one."""
    got = error["input"]
    return error["type"] == "too_short" and isinstance(got, list) and len(got) >= error["ctx"]["min_length"]


def _merged_type_errors(located: list[_Located]) -> Iterator[Finding]:
    """`expected a number or text, got a list`: one finding for a union none of whose branches fits."""
    places = {one.union_at: one for one in located if one.union_at is not None}
    for place, first in places.items():
        group = [one for one in located if one.union_at == place]
        if all(one.path == place and one.is_mismatch for one in group):
            expected = list(dict.fromkeys(one.expected for one in group))
            yield _mismatch(first.path, expected, first.error["input"])


def _unknown_keys(located: list[_Located], schema: dict[str, Any], value: object) -> list[Finding]:
    findings = []
    for path, _, error in located:
        if error["type"] != "extra_forbidden":
            continue
        *parent, key = path
        known = _known_keys(schema, parent)
        unused = [name for name in known if name not in _value_at(value, parent)]
        homes = _homes(schema, str(key))
        suggestion = closest(str(key), unused, cutoff=0.8 if homes else 0.6)
        message = "unknown key"
        if homes:
            message = f"unknown key here; it belongs {listed(homes)}"
        elif suggestion is None and known:
            message = f"unknown key; known here: {', '.join(known)}"
        findings.append(Finding(path, message, suggestion, at_key=True))
    return findings


def _finding(one: _Located) -> Finding:
    path, error = one.path, one.error
    kind, got, context = error["type"], error["input"], error.get("ctx", {})
    at_key = error["loc"][-1:] == ("[key]",)
    if kind == "value_error":
        cause = context["error"]
        if isinstance(cause, BadValueError):
            return Finding((*path, *cause.at), cause.message, cause.suggestion, at_key)
        return Finding(path, str(cause), None, at_key)
    if one.is_mismatch:
        return _mismatch(path, [one.expected], got, at_key)
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return Finding(path, f"{words} {_bound(context[bound], got)}, got {shown(got)}")
    if kind == "too_short":
        count = context["min_length"]
        return Finding(path, f"needs at least {count} {'entry' if count == 1 else 'entries'}")
    if kind == "too_long":
        return Finding(path, f"takes at most {context['max_length']} entries, got {context['actual_length']}")
    if kind == "string_too_short":
        return Finding(path, "must not be empty" if not got else f"is too short: {shown(got)}")
    if kind == "string_too_long":
        return Finding(path, f"takes at most {context['max_length']} characters")
    message = error["msg"][:1].lower() + error["msg"][1:]
    return Finding(path, f"{message.replace('input should be', 'expected')}, got {shown(got)}", None, at_key)


def _bound(bound: float, got: object) -> str:
    """In the unit of what was given: `64MiB` beside `10MiB`."""
    if isinstance(got, str) and got.endswith("B"):
        for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
            if bound >= size and bound % size == 0:
                return f"{bound / size:g}{unit}"
    return f"{bound:.15g}"


def _mismatch(path: Path, expected: list[str], got: object, at_key: bool = False) -> Finding:
    message = f"expected {listed(expected)}, got {shown(got)}"
    suggestion = None
    if options := re.findall(r"'([^']*)'", " ".join(expected)):
        suggestion = closest(got, options) if isinstance(got, str) else None
    elif isinstance(got, str | int | float) and len(str(got)) <= 60:
        # The two slips that YAML invites: a number where text is meant, one entry where a list is.
        suggestion = (
            {"text": f'"{shown(got)}"', "a list": f"[{got}]"}.get(expected[0]) if len(expected) == 1 else None
        )
    return Finding(path, message, suggestion, at_key)


# --- the model's own JSON Schema -----------------------------------------------------------------------


def _value_at(value: Any, path: Iterable[str | int]) -> Any:
    for step in path:
        value = value[step]
    return value


def _known_keys(schema: dict[str, Any], path: Iterable[str | int]) -> list[str]:
    """The keys that may stand in the mapping at a path."""
    here = list(_branches(schema, schema))
    for step in path:
        here = [
            branch for each in here for child in _children(each, step) for branch in _branches(child, schema)
        ]
    return list(dict.fromkeys(key for each in here for key in each.get("properties", ())))


def _branches(schema: Any, root: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A schema with its `$ref` and alternatives opened."""
    if not isinstance(schema, dict):
        return
    if "$ref" in schema:
        yield from _branches(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
        return
    yield schema
    for alternatives in ("anyOf", "oneOf", "allOf"):
        for alternative in schema.get(alternatives, ()):
            yield from _branches(alternative, root)


def _children(schema: dict[str, Any], step: str | int) -> Iterator[Any]:
    if isinstance(step, int):
        yield schema.get("items")
    elif step in schema.get("properties", {}):
        yield schema["properties"][step]
    else:
        yield schema.get("additionalProperties")


def _homes(schema: dict[str, Any], key: str) -> list[str]:
    """Where else in the file a key is known: `prefer[]`. For keys that were indented wrongly."""
    homes: list[str] = []

    def visit(node: Any, place: str, above: tuple[str, ...]) -> None:
        for branch in _branches(node, schema):
            if branch.get("title") in above:
                continue
            inside = (*above, branch["title"]) if branch.get("properties") and "title" in branch else above
            if key in branch.get("properties", ()):
                homes.append(f"in {place}" if place else "at the top level")
            for name, child in branch.get("properties", {}).items():
                visit(child, f"{place}.{name}" if place else name, inside)
            visit(branch.get("items"), f"{place}[]", inside)
            visit(branch.get("additionalProperties"), f"{place}.*", inside)

    visit(schema, "", ())
    return list(dict.fromkeys(homes))
