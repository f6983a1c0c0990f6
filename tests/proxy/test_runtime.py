"""What a request's head alone decides."""

from __future__ import annotations

import logging

import pytest

from proxy.access.keys import Key
from proxy.http1 import RequestHead
from tests.proxy.fakes import World

HINT = " API paths begin with /v1, so the base_url of an OpenAI client ends in /v1"


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        (b"/chat/completions", "/v1/chat/completions?" + HINT),
        (b"/chat/completions/", "/v1/chat/completions?" + HINT),
        (b"/completions?x=1", "/v1/completions?" + HINT),
        (b"/models", "/v1/models?" + HINT),
        (b"/v1/chat/completions/", "/v1/chat/completions?"),
        (b"/v1/responses/", "/v1/responses?"),
        (b"/v1/realtime/", "/v1/realtime?"),
        (b"/v1/v1/messages", "/v1/messages? The base_url of an Anthropic client ends before /v1"),
    ],
)
def test_a_path_beside_one_that_is_there_is_told_that(path: bytes, meant: str) -> None:
    admission = World("a").runtime.admit(RequestHead(b"POST", path, 1, keep_alive=True), "127.0.0.1")
    assert admission.error is not None
    assert admission.error.code == "not_found"
    asked = path.partition(b"?")[0].decode()
    assert admission.error.message == f"there is no path '{asked}' here: did you mean {meant}"


@pytest.mark.parametrize("path", [b"/health", b"/v1/nothing", b"/v1/modelsx", b"/", b"", b"/v1/v1/nothing"])
def test_no_other_path_is_guessed(path: bytes) -> None:
    admission = World("a").runtime.admit(RequestHead(b"POST", path, 1, keep_alive=True), "127.0.0.1")
    assert admission.error is not None
    assert admission.error.message == (
        f"there is no path '{path.decode()}' here; docs/api.md lists the endpoints"
    )


def test_a_long_path_is_not_repeated_whole() -> None:
    path = b"/v1/\xe4" + b"x" * 100 + b"?key=secret"
    admission = World("a").runtime.admit(RequestHead(b"GET", path, 1, keep_alive=True), "127.0.0.1")
    assert admission.error is not None
    assert admission.error.message == (
        rf"there is no path '/v1/\xe4{'x' * 59}' here; docs/api.md lists the endpoints"
    )


@pytest.mark.parametrize(
    ("target", "by_api_key", "field"),
    [
        (b"/v1/chat/completions", False, "Authorization: Bearer KEY"),
        (b"/v1/chat/completions", True, "x-api-key: KEY"),
        (b"/v1/messages", False, "x-api-key: KEY"),
        (b"/v1/models", True, "x-api-key: KEY"),
    ],
)
def test_a_wrong_key_is_asked_for_in_the_field_of_its_client(
    target: bytes, by_api_key: bool, field: str
) -> None:
    runtime = World("a", key=Key("abcdefghij", "acme")).runtime
    runtime.keys.empty = False
    runtime.keys.authenticate = lambda credential, now: None  # type: ignore[method-assign]
    value = b"x-api-key" if by_api_key else b"authorization"
    data = b"POST %b HTTP/1.1\r\nhost: x\r\n%b: wrong\r\ncontent-length: 0\r\n\r\n" % (target, value)
    parsed = runtime.grammar.parse(data, 0)
    assert isinstance(parsed, tuple)
    admission = runtime.admit(parsed[0], "127.0.0.1")
    assert admission.error is not None
    assert admission.error.message == f"no valid API key: send it as `{field}`"


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
