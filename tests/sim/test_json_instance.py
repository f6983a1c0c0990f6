from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sim.json_instance import FORMATS, LARGEST, UnsupportedSchemaError, from_pattern, minimal_instance

Schema = dict[str, Any]

names = st.sampled_from("abcdef")
leaves = st.one_of(
    st.just({}),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda low, width: {"type": "string", "minLength": low, "maxLength": low + width},
        st.integers(0, 9),
        st.integers(0, 3),
    ),
    st.sampled_from(sorted(FORMATS)).map(lambda name: {"type": "string", "format": name}),
    st.builds(
        lambda kind, low, width: {"type": kind, "minimum": low, "maximum": low + width},
        st.sampled_from(["integer", "number"]),
        st.integers(-50, 50),
        st.integers(0, 9),
    ),
    st.builds(
        lambda low, width: {"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": low + width},
        st.integers(-50, 50),
        st.floats(0.125, 4),
    ),
    st.builds(
        lambda step, low: {"multipleOf": step, "minimum": low}, st.integers(1, 9), st.integers(-30, 30)
    ),
    st.builds(lambda high: {"type": "integer", "exclusiveMaximum": high}, st.floats(-50, 50)),
    st.lists(st.one_of(st.none(), st.booleans(), st.integers(), names), min_size=1).map(
        lambda v: {"enum": v}
    ),
    st.integers().map(lambda value: {"const": value}),
    st.lists(st.sampled_from(["string", "integer", "null", "object", "array"]), min_size=1, unique=True).map(
        lambda kinds: {"type": kinds}
    ),
)


def nested(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    objects = st.builds(
        lambda properties, required, extra, least: {
            "type": "object",
            "properties": properties,
            "required": [*sorted(properties)[:required], *(["g"] if extra else [])],
            "additionalProperties": True if extra else (least == 0),
            "minProperties": min(least, len(properties)),
        },
        st.dictionaries(names, inner, max_size=4),
        st.integers(0, 4),
        st.booleans(),
        st.integers(0, 3),
    )
    arrays = st.builds(
        lambda items, least: {"type": "array", "items": items, "minItems": least}, inner, st.integers(0, 3)
    )
    tuples = st.builds(
        lambda prefix, items: {"type": "array", "prefixItems": prefix, "items": items, "minItems": 3},
        st.lists(inner, min_size=1, max_size=3),
        inner,
    )
    choices = st.lists(inner, min_size=1, max_size=3).map(lambda branches: {"anyOf": branches})
    references = inner.map(
        lambda schema: {"$defs": {"a/b~c": schema}, "allOf": [{"$ref": "#/$defs/a~1b~0c"}]}
    )
    return st.one_of(objects, arrays, tuples, choices, references)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.recursive(leaves, nested, max_leaves=8))
def test_an_instance_is_valid_and_json(schema: Schema) -> None:
    schema = _hoist(schema)
    instance = minimal_instance(schema)
    validator = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    validator.validate(json.loads(json.dumps(instance)))


def _hoist(schema: Schema) -> Schema:
    """References are relative to the root: move every definition there, under names of their own."""
    definitions: dict[str, Any] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, list):
            return [walk(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "$defs" in value:
            inner = walk(value["$defs"]["a/b~c"])
            name = f"d{len(definitions)}"
            definitions[name] = inner
            return {"$ref": f"#/$defs/{name}"}
        return {key: walk(item) for key, item in value.items()}

    return walk(schema) | {"$defs": definitions}


def test_only_what_is_required() -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 2},
            "age": {"type": "integer", "minimum": 18},
            "note": {},
        },
        "required": ["age", "name"],
        "additionalProperties": False,
    }
    assert minimal_instance(schema) == {"name": "aa", "age": 18}


def test_a_recursive_type_ends_where_it_can() -> None:
    node = {
        "type": "object",
        "properties": {
            "value": {"type": "integer"},
            "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
        },
        "required": ["value", "next"],
    }
    assert minimal_instance({"$ref": "#/$defs/node", "$defs": {"node": node}}) == {"value": 0, "next": None}
    tree = {
        "type": "object",
        "properties": {"children": {"type": "array", "items": {"$ref": "#"}}},
        "required": ["children"],
    }
    assert minimal_instance(tree) == {"children": []}


def test_parts_of_all_of_hold_together() -> None:
    schema = {
        "allOf": [
            {"type": ["object", "null"], "properties": {"a": {"minimum": 3}}, "required": ["a"]},
            {
                "type": "object",
                "properties": {"a": {"type": "integer", "minimum": 1}, "b": {}},
                "required": ["b"],
            },
        ]
    }
    assert minimal_instance(schema) == {"a": 3, "b": ""}


@pytest.mark.parametrize(
    ("parts", "instance"),
    [
        ([{"enum": ["a", "b"]}, {"enum": ["b", "c"]}], "b"),
        ([{"type": "integer", "maximum": -3}, {"maximum": -5}], -5),
        ([{"anyOf": [{"const": 1}, {"const": 2}]}, {"anyOf": [{"const": 1}]}], 1),
        ([{"type": "array", "items": {"type": "integer"}}, {"minItems": 1, "items": {"minimum": 4}}], [4]),
        ([True, {"type": "null"}], None),
        ([{"$ref": "#/$defs/least"}, {"$ref": "#/$defs/odd"}], 7),
        ([{"title": "A", "type": "boolean"}, {"title": "B"}], False),
    ],
)
def test_all_of_merges(parts: list[Any], instance: Any) -> None:
    definitions = {"least": {"type": "integer", "minimum": 5}, "odd": {"enum": [7, 9]}}
    assert minimal_instance({"allOf": parts, "$defs": definitions}) == instance


def test_a_schema_without_a_type_has_the_one_its_keywords_speak_of() -> None:
    assert minimal_instance({"properties": {"a": {}}, "required": ["a"]}) == {"a": ""}
    assert minimal_instance({"minItems": 1}) == [""]
    assert minimal_instance({"maximum": -1}) == -1
    assert minimal_instance({}) == ""


def test_branches_keep_what_stands_beside_them() -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"type": "string"}},
        "oneOf": [{"properties": {"kind": {"const": "cat"}}, "required": ["kind"]}, {"required": ["other"]}],
    }
    assert minimal_instance(schema) == {"kind": "cat"}


@pytest.mark.parametrize(
    "pattern",
    ["^[A-Z]{3}-[0-9]{4}$", r"^\d+\.\d*$", "^(yes|no)$", "^a?b+(cd){2}$", r"^\w+@\w+\.com$", "x", "^.{5}$"],
)
def test_patterns(pattern: str) -> None:
    assert re.search(pattern, from_pattern(pattern))
    assert re.search(pattern, minimal_instance({"type": "string", "pattern": pattern}))


@pytest.mark.parametrize(
    "schema",
    [
        False,
        {"type": "object", "required": ["a"], "additionalProperties": False},
        {"type": "integer", "minimum": 2, "maximum": 1},
        {"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 2},
        {"type": "string", "minLength": 3, "maxLength": 2},
        {"type": "array", "minItems": 3, "maxItems": 2},
        {"enum": []},
        {"enum": ["a"], "type": "integer"},
        {"enum": [1], "const": 2},
        {"type": "wrong"},
        {"not": {}},
        {"$ref": "#/nowhere"},
        {"$ref": "https://example.com/schema"},
        {"$ref": "#"},
        {"anyOf": []},
        {"allOf": [{"type": "string"}, {"type": "integer"}]},
        {"allOf": [{"pattern": "a"}, {"pattern": "b"}]},
        {"allOf": [False, {"type": "string"}]},
        {"$ref": "#/enum", "enum": []},
        {"type": "string", "pattern": "["},
        {"type": "string", "pattern": r"^(?=a)b\1"},
        {"type": "string", "pattern": "(a{9999}){9999}"},
        {"type": "string", "minLength": LARGEST * 1000},
        {"type": "array", "minItems": LARGEST * 1000},
        {"type": "object", "minProperties": LARGEST * 1000},
        {"type": "array", "minItems": 5000, "items": {"type": "array", "minItems": 5000}},
        {"type": "string", "minLength": "three"},
        {"type": "object", "properties": ["a"], "required": ["a"]},
        {"multipleOf": 0, "minimum": 1},
        {"type": "array", "minItems": 2, "uniqueItems": True},
    ],
)
def test_what_cannot_be_honoured_is_refused(schema: Any) -> None:
    with pytest.raises(UnsupportedSchemaError):
        minimal_instance(schema)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                ["type", "properties", "required", "items", "minItems", "anyOf", "$ref", "enum", "pattern"]
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)


@given(
    st.dictionaries(
        st.sampled_from(["type", "properties", "required", "items", "minItems", "allOf", "$ref"]), json_values
    )
)
def test_malformed_schemas_are_refused_and_nothing_else(schema: Schema) -> None:
    try:
        json.dumps(minimal_instance(schema))
    except UnsupportedSchemaError:
        pass
