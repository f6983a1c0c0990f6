"""The smallest plain instance of a JSON Schema, for answers that must have a shape.

Handled: type (also a list), const, enum, properties, required, additionalProperties, minProperties, items,
prefixItems, minItems, minLength, maxLength, pattern, the usual formats, numeric bounds, multipleOf, local $ref,
allOf (merged), anyOf and oneOf (the first branch that has an instance). What it does not handle it refuses with
`UnsupportedSchemaError`; it never returns an instance that it knows to be invalid.

A $ref that leads back into itself has no instance on that path, so a recursive type ends at the first branch
that does not recurse. `oneOf` takes the first branch without proving that no other matches too.
"""

from __future__ import annotations

import json
import re
from math import ceil, floor
from typing import Any, TypeAlias

Schema: TypeAlias = dict[str, Any]

FORMATS = {
    "date": "2026-01-31",
    "date-time": "2026-01-31T12:00:00Z",
    "time": "12:00:00Z",
    "duration": "PT1M",
    "email": "a@example.com",
    "hostname": "example.com",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "uri": "https://example.com/",
    "uuid": "00000000-0000-4000-8000-000000000000",
}

LARGEST = 10_000
"""The most values in an instance and characters in a string: a schema may ask for any number of them."""

_REFUSED = {
    "not",
    "if",
    "contains",
    "patternProperties",
    "propertyNames",
    "dependentRequired",
    "dependentSchemas",
    "unevaluatedProperties",
    "unevaluatedItems",
    "$dynamicRef",
}
_JSON_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "number": (int, float),
    "integer": int,
}
_LOWER_BOUNDS = {"minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"}
_UPPER_BOUNDS = {"maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"}
_NOTES = {"title", "description", "default", "examples", "$defs", "definitions", "$schema", "$id", "$comment"}


class UnsupportedSchemaError(ValueError):
    """The schema has no instance, or asks for something that this module does not handle."""


def minimal_instance(schema: Schema | bool) -> Any:
    """A minimal instance of a schema, as JSON values. Raises UnsupportedSchemaError."""
    try:
        return _Builder(schema).build(schema, frozenset())
    except UnsupportedSchemaError:
        raise
    except (TypeError, AttributeError, KeyError, IndexError, ArithmeticError, RecursionError) as error:
        raise UnsupportedSchemaError(f"not a well-formed schema ({error})") from error


class _Builder:
    def __init__(self, root: Schema | bool) -> None:
        self._root = root
        self._built = 0

    def build(self, schema: Schema | bool, open_refs: frozenset[str]) -> Any:
        """`open_refs`: the references being followed, to end recursion."""
        self._built += 1
        if self._built > LARGEST:
            raise UnsupportedSchemaError(f"its smallest instance has more than {LARGEST} values")
        if schema is True:
            return ""
        if not isinstance(schema, dict):
            raise UnsupportedSchemaError("nothing is an instance of the schema `false`")
        refused = _REFUSED & schema.keys()
        if refused:
            raise UnsupportedSchemaError(f"keyword {min(refused)!r} is not supported")
        if "$ref" in schema:
            reference = str(schema["$ref"])
            if reference in open_refs:
                raise UnsupportedSchemaError(f"{reference} requires itself")
            rest = {key: value for key, value in schema.items() if key != "$ref"}
            return self.build(_merge(rest, self._resolve(reference)), open_refs | {reference})
        if "allOf" in schema:
            merged: Schema | bool = {key: value for key, value in schema.items() if key != "allOf"}
            for part in schema["allOf"]:
                merged = _merge(merged, part)
            return self.build(merged, open_refs)
        for choice in ("anyOf", "oneOf"):
            if choice in schema:
                return self._first_branch(schema, choice, open_refs)
        return self._plain(schema, open_refs)

    def _resolve(self, reference: str) -> Schema | bool:
        if reference != "#" and not reference.startswith("#/"):
            raise UnsupportedSchemaError(
                f"only references into the same schema are supported, not {reference!r}"
            )
        target: Any = self._root
        for part in reference[2:].split("/") if len(reference) > 1 else ():
            key = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(target, dict) or key not in target:
                raise UnsupportedSchemaError(f"reference {reference!r} leads nowhere")
            target = target[key]
        if not isinstance(target, dict | bool):
            raise UnsupportedSchemaError(f"reference {reference!r} does not lead to a schema")
        return target

    def _first_branch(self, schema: Schema, choice: str, open_refs: frozenset[str]) -> Any:
        rest = {key: value for key, value in schema.items() if key != choice}
        problems = []
        for branch in schema[choice]:
            try:
                return self.build(_merge(rest, branch), open_refs)
            except UnsupportedSchemaError as error:
                problems.append(str(error))
        raise UnsupportedSchemaError(f"no branch of {choice} has an instance: {'; '.join(problems)}")

    def _plain(self, schema: Schema, open_refs: frozenset[str]) -> Any:
        types = _types(schema)
        if "const" in schema or "enum" in schema:
            values = schema["enum"] if "enum" in schema else [schema["const"]]
            for value in values:
                if "const" in schema and value != schema["const"]:
                    continue
                if not types or any(_is_type(value, name) for name in types):
                    return value
            raise UnsupportedSchemaError("no value of the enum has the type asked for")
        problems = []
        for name in types or [_implied_type(schema)]:
            try:
                return self._of_type(name, schema, open_refs)
            except UnsupportedSchemaError as error:
                problems.append(str(error))
        raise UnsupportedSchemaError("; ".join(problems))

    def _of_type(self, name: str, schema: Schema, open_refs: frozenset[str]) -> Any:
        if name == "object":
            return self._object(schema, open_refs)
        if name == "array":
            return self._array(schema, open_refs)
        if name == "string":
            return _string(schema)
        if name in ("integer", "number"):
            return _number(schema, whole=name == "integer")
        if name == "boolean":
            return False
        if name == "null":
            return None
        raise UnsupportedSchemaError(f"type {name!r} is not a JSON type")

    def _object(self, schema: Schema, open_refs: frozenset[str]) -> dict[str, Any]:
        properties: dict[str, Any] = schema.get("properties", {})
        additional: Schema | bool = schema.get("additionalProperties", True)
        required = set(schema.get("required", ()))
        # In the order of the properties, as a model would write them.
        names = list(
            dict.fromkeys([*(name for name in properties if name in required), *schema.get("required", ())])
        )
        least = min(schema.get("minProperties", 0), LARGEST + 1)
        spare = dict.fromkeys([*properties, *(f"property_{number}" for number in range(least))])
        names += [name for name in spare if name not in required][: max(0, least - len(names))]
        if len(names) > schema.get("maxProperties", len(names)):
            raise UnsupportedSchemaError("more properties are required than maxProperties allows")
        return {name: self.build(properties.get(name, additional), open_refs) for name in names}

    def _array(self, schema: Schema, open_refs: frozenset[str]) -> list[Any]:
        least = schema.get("minItems", 0)
        if least > schema.get("maxItems", least):
            raise UnsupportedSchemaError("minItems is greater than maxItems")
        if least > 1 and schema.get("uniqueItems"):
            raise UnsupportedSchemaError("uniqueItems with minItems above 1 is not supported")
        prefix = schema.get("prefixItems", [])
        rest = schema.get("items", True)
        return [
            self.build(prefix[position] if position < len(prefix) else rest, open_refs)
            for position in range(least)
        ]


def _merge(one: Schema | bool, other: Schema | bool) -> Schema | bool:
    """A schema whose instances are instances of both."""
    if isinstance(one, bool) or isinstance(other, bool):
        if one is True:
            return other
        return one if other is True else False
    merged = dict(one)
    for key, value in other.items():
        if key not in merged or merged[key] == value or key in _NOTES:
            merged.setdefault(key, value)
        elif key == "properties":
            shared = {
                name: _merge(merged[key][name], value[name]) for name in merged[key].keys() & value.keys()
            }
            merged[key] = {**merged[key], **value, **shared}
        elif key == "required":
            merged[key] = list(dict.fromkeys([*merged[key], *value]))
        elif key == "type":
            merged[key] = [name for name in _types(merged) if name in _types(other)]
            if not merged[key]:
                return False
        elif key == "enum":
            merged[key] = [item for item in merged[key] if item in value]
        elif key in _LOWER_BOUNDS:
            merged[key] = max(merged[key], value)
        elif key in _UPPER_BOUNDS:
            merged[key] = min(merged[key], value)
        elif key in ("items", "additionalProperties"):
            merged[key] = _merge(merged[key], value)
        elif key == "allOf":
            merged[key] = [*merged[key], *value]
        elif key in ("anyOf", "oneOf"):
            if len(merged[key]) * len(value) > LARGEST:
                raise UnsupportedSchemaError(f"two lists of {key} have too many combinations")
            merged[key] = [{"allOf": [mine, yours]} for mine in merged[key] for yours in value]
        elif key == "$ref":
            merged["allOf"] = [*merged.get("allOf", []), {"$ref": value}]
        else:
            raise UnsupportedSchemaError(f"two different values for {key!r} cannot be merged")
    return merged


def _types(schema: Schema) -> list[str]:
    declared = schema.get("type", [])
    return [declared] if isinstance(declared, str) else list(declared)


def _implied_type(schema: Schema) -> str:
    """The type that the keywords speak of, where none is named."""
    for name, keywords in (
        ("object", {"properties", "required", "additionalProperties", "minProperties"}),
        ("array", {"items", "prefixItems", "minItems"}),
        ("number", {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}),
    ):
        if keywords & schema.keys():
            return name
    return "string"


def _is_type(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if name == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _JSON_TYPES.get(name, ()))


def _string(schema: Schema) -> str:
    shortest, longest = schema.get("minLength", 0), schema.get("maxLength")
    if shortest > LARGEST:
        raise UnsupportedSchemaError(f"minLength above {LARGEST} is not supported")
    if "pattern" in schema:
        text = from_pattern(str(schema["pattern"]))
    elif schema.get("format") in FORMATS:
        text = FORMATS[schema["format"]]
    else:
        text = "a" * shortest
    if len(text) < shortest or (longest is not None and len(text) > longest):
        raise UnsupportedSchemaError("minLength or maxLength with this pattern or format is not supported")
    return text


def _number(schema: Schema, whole: bool) -> int | float:
    """The value nearest to zero inside the bounds, rounded to what is asked for."""
    step = schema.get("multipleOf", 1)
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    candidates: list[int | float] = [0]
    for bound in (low, above):
        if bound is not None:
            candidates += [ceil(bound / step) * step, (floor(bound / step) + 1) * step]
    for bound in (high, below):
        if bound is not None:
            candidates += [floor(bound / step) * step, (ceil(bound / step) - 1) * step]
    if "multipleOf" not in schema and not whole:
        candidates += [bound for bound in (low, high) if bound is not None]
        floors = [bound for bound in (low, above) if bound is not None]
        ceilings = [bound for bound in (high, below) if bound is not None]
        if floors and ceilings:
            candidates.append((max(floors) + min(ceilings)) / 2)
    for value in candidates:
        if (
            (low is None or value >= low)
            and (high is None or value <= high)
            and (above is None or value > above)
            and (below is None or value < below)
            and (not whole or float(value).is_integer())
        ):
            return int(value) if whole or float(value).is_integer() else value
    raise UnsupportedSchemaError(f"no number fits {json.dumps(schema)}")


def from_pattern(pattern: str) -> str:
    """A short text that a pattern matches, for the plain part of the syntax. Raises UnsupportedSchemaError.

    Handled: literals, classes, `.`, groups, alternatives (the first), repetition (the fewest), anchors.
    """
    try:
        parsed = re._parser.parse(pattern)  # type: ignore[attr-defined]
        text = "".join(_match(operator, argument) for operator, argument in parsed)
        found = re.search(pattern, text)
    except (re.error, KeyError) as error:
        raise UnsupportedSchemaError(f"pattern {pattern!r} is not supported") from error
    if found is None:
        raise UnsupportedSchemaError(f"pattern {pattern!r} is not supported")
    return text


_CLASS_MEMBERS = {"CATEGORY_DIGIT": "0", "CATEGORY_WORD": "a", "CATEGORY_SPACE": " "}


def _match(operator: Any, argument: Any) -> str:
    """A text for one node of a parsed pattern; KeyError for a node that is not handled."""
    name = str(operator)
    if name == "LITERAL":
        return chr(argument)
    if name == "ANY":
        return "a"
    if name == "AT":
        return ""
    if name == "IN":
        kind, value = argument[0]
        if str(kind) == "RANGE":
            return chr(value[0])
        return _match(kind, value)
    if name == "CATEGORY":
        return _CLASS_MEMBERS[str(argument)]
    if name in ("MAX_REPEAT", "MIN_REPEAT"):
        fewest, _, inner = argument
        text = "".join(_match(*node) for node in inner)
        if len(text) * fewest > LARGEST:
            raise KeyError(name)
        return text * int(fewest)
    if name == "SUBPATTERN":
        return "".join(_match(*node) for node in argument[-1])
    if name == "BRANCH":
        return "".join(_match(*node) for node in argument[1][0])
    raise KeyError(name)
