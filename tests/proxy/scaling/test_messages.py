"""The document of both directions says what the code does: every route, every field, and examples that hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from openapi_spec_validator import validate
from ruamel.yaml import YAML

from proxy.admin.platform import platform_routes
from proxy.scaling import messages
from proxy.scaling.messages import MessageError, ScaleRequest, read_message
from tests.proxy.scaling.openapi import FILE, MODELS, written
from tests.proxy.scaling.served import CONFIG, Serving

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    found: dict[str, Any] = YAML(typ="safe").load(FILE.read_text(encoding="utf-8"))
    return found


def operations(document: dict[str, Any], tag: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if isinstance(operation, dict) and tag in operation.get("tags", ()):
                yield method.upper(), path, operation


def test_it_is_an_openapi_document(document: dict[str, Any]) -> None:
    validate(document)


def test_its_schemas_are_those_of_the_code() -> None:
    assert FILE.read_text(encoding="utf-8") == written(), "python -m tests.proxy.scaling.openapi"


def test_every_route_of_the_admin_port_is_in_it(document: dict[str, Any], tmp_path: Path) -> None:
    routes = {(route.method, route.path) for route in platform_routes(Serving(CONFIG, tmp_path).platform)}
    assert {(method, path) for method, path, _ in operations(document, "push")} == routes


def test_every_route_of_the_platform_is_in_it(document: dict[str, Any]) -> None:
    """Those of the reference scheduler; `test_scheduler_example` shows that we ask for no others."""
    from examples.scheduler.scheduler import ROUTES

    assert {(method, path) for method, path, _ in operations(document, "ask")} == set(ROUTES)


def test_examples_hold_and_are_read(document: dict[str, Any]) -> None:
    models = {model.__name__: model for model in MODELS}
    seen = set()
    for _, _, operation in [*operations(document, "push"), *operations(document, "ask")]:
        content = operation.get("requestBody") or operation["responses"].get("200", {})
        media = content.get("content", {}).get("application/json", {})
        if "example" not in media:
            continue
        name = media["schema"]["$ref"].rpartition("/")[2]
        schema = {**media["schema"], "components": document["components"]}
        jsonschema.Draft202012Validator(schema).validate(media["example"])
        models[name].model_validate(media["example"])
        seen.add(name)
    assert seen == set(models)


def test_every_field_is_described(document: dict[str, Any]) -> None:
    schema = document["components"]["schemas"]["Placement"]["properties"]
    assert schema["ttl_s"]["description"]
    assert set(schema) == set(messages.Placement.model_fields)


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        (b"{", "", "not JSON"),
        (b"[]", "", "a JSON object"),
        (b'{"id": "r"}', "model", "required"),
        (
            b'{"id":"r","model":"m","demand":{"requests":-1,"tokens":1},"expires":1}',
            "demand.requests",
            "least",
        ),
        (b'{"id":"r","modle":"m","demand":{"requests":1,"tokens":1},"expires":1}', "modle", "did you mean"),
        (b'{"id":"\xff"}', "", "not JSON"),
        (b'{"id": "r", "expires": 1e999}', "", "not JSON"),
    ],
)
def test_what_is_wrong_is_named(body: bytes, field: str, message: str) -> None:
    with pytest.raises(MessageError, match=message) as raised:
        read_message(body, ScaleRequest)
    assert raised.value.field == field
