"""What a request's head alone decides."""

from __future__ import annotations

import logging

import pytest

from proxy.access.keys import Key
from proxy.endpoints import TABLE
from proxy.http1 import RequestHead
from tests.proxy.fakes import World

HINT = "API paths begin with /v1, so the base_url of an OpenAI client ends in /v1"


@pytest.mark.parametrize(
    ("path", "hinted"),
    [
        (b"/chat/completions", True),
        (b"/completions?x=1", True),
        (b"/models", True),
        (b"/models/m", True),
        (b"/health", False),
        (b"/v1/nothing", False),
        (b"/v1/v1/chat/completions", False),
        (b"/v1/modelsx", False),
    ],
)
def test_a_base_url_without_v1_gets_a_hint(path: bytes, hinted: bool) -> None:
    admission = World("a").runtime.admit(RequestHead(b"POST", path, 1, keep_alive=True), "127.0.0.1")
    assert admission.error is not None
    assert admission.error.code == "not_found"
    assert (HINT in admission.error.message) == hinted


def test_a_path_that_is_not_there_is_named_beside_those_that_are() -> None:
    path = b"/v1/\xe4" + b"x" * 100 + b"?key=secret"
    admission = World("a").runtime.admit(RequestHead(b"GET", path, 1, keep_alive=True), "127.0.0.1")
    assert admission.error is not None
    assert admission.error.message == (
        rf"there is no path '/v1/\xe4{'x' * 59}' here, but "
        f"{', '.join(dict.fromkeys(route.path for route in TABLE))} and /v1/models"
    )


def test_models_behind_the_wall_of_a_data_class_are_not_listed() -> None:
    world = World("a", "b", aliases={"alias": "far"})
    world.backend("b").models = frozenset({"far"})
    assert list(world.runtime.models(None)) == ["alias", "far", "m"]
    assert list(world.runtime.models(Key("abcdefghij", "acme", data_class="internal"))) == ["m"]


def test_an_alias_that_leads_nowhere_is_told_once_all_models_are_known(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World("a", "b", aliases={"good": "m", "bad": "demmo"})
    runtime, late = world.runtime, world.backend("b")

    def told() -> list[str]:
        with caplog.at_level(logging.WARNING):
            runtime.sweep(world.loop.now)
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return messages

    late.models_unknown = "not asked yet"
    assert told() == []
    late.models_unknown = ""
    runtime.fleet.version += 1
    warning = "the alias 'bad' stands for 'demmo', which no backend serves"
    assert told() == [warning]
    runtime.fleet.version += 1
    assert told() == []
    runtime.use(runtime.built)
    assert told() == [warning]
    late.models = frozenset({"demmo"})
    runtime.use(runtime.built)
    assert told() == []
