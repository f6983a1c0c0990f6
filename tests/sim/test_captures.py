"""The emulator's answers have the structure of those a real vLLM gave, event for event.

Structure: keys in order, and the type of every value that is not null in one and null in the other by nature.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from sim.faults import Fault, FaultKind
from sim.openai_request import ChatRequest, CompletionRequest, DetokenizeRequest, StreamOptions
from tests.sim.emulated import HELLO, client

CAPTURES = Path(__file__).parents[3] / "shared" / "vllm" / "captures" / "smollm2"

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not CAPTURES.is_dir(), reason=f"NOT COMPARED with a real vLLM: {CAPTURES} is absent"),
]


def request_of(name: str) -> tuple[str, str, bytes]:
    """Method, path and body of a captured request."""
    head, _, body = (CAPTURES / f"{name}.request.http").read_bytes().partition(b"\r\n\r\n")
    method, path, _ = head.decode().split("\r\n")[0].split(" ")
    return method, path, body


def reply_of(name: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body (without chunk framing) of a captured reply."""
    head, _, body = (CAPTURES / f"{name}.response.http").read_bytes().partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {key.lower(): value for key, value in (line.split(": ", 1) for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        whole = b""
        while body:
            size, _, body = body.partition(b"\r\n")
            whole, body = whole + body[: int(size, 16)], body[int(size, 16) + 2 :]
        body = whole
    return int(first.split(" ")[1]), headers, body


def structure(value: Any) -> Any:
    """Keys in order and types of values."""
    if isinstance(value, dict):
        return [(key, structure(item)) for key, item in value.items()]
    if isinstance(value, list):
        return [structure(item) for item in value[:1]]
    return type(value).__name__


def events(body: bytes) -> list[Any]:
    lines = body.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [structure(json.loads(line.removeprefix("data: "))) for line in lines[:-2]]


async def ask(name: str) -> tuple[int, str, bytes]:
    """What the emulator says to a captured request: status, content type, body."""
    method, path, body = request_of(name)
    settings = {"models": ("smollm2",), "max_model_len": 2048, "speed": 20, "prompt_tokens_details": True}
    async with client(**settings) as http:
        response = await http.session.request(method, http.server.url + path, data=body or None)
        return response.status, response.headers.get("Content-Type", ""), await response.read()


@pytest.mark.parametrize(
    "name",
    [
        *("err_400_bad_json", "err_400_no_messages", "err_400_stream_too_long", "err_400_temperature"),
        *("err_404_model", "err_404_path", "err_405", "err_413ish", "models_one", "embeddings"),
        *("version", "load", "health", "ping"),
    ],
)
async def test_the_same_bytes(name: str) -> None:
    status, kind, body = await ask(name)
    expected, headers, real = reply_of(name)
    assert (status, body) == (expected, real)
    if body:
        assert kind == headers["content-type"]


@pytest.mark.parametrize(
    "name",
    [
        *(
            "chat_nonstream",
            "chat_stop",
            "chat_max_completion_tokens",
            "chat_json_schema",
            "chat_tool_required",
        ),
        *("completions", "models", "tokenize", "tokenize_chat", "detokenize"),
        *("responses", "messages", "messages_count_tokens"),
    ],
)
async def test_the_same_structure(name: str) -> None:
    status, kind, body = await ask(name)
    expected, headers, real = reply_of(name)
    assert (status, kind) == (expected, headers["content-type"])
    theirs, ours = json.loads(real), json.loads(body)
    for reply in (theirs, ours):
        # A real model stops where it likes.
        for choice in reply.get("choices", ()):
            choice["stop_reason"] = None
    assert structure(ours) == structure(theirs)


STREAMS = [
    *("chat_stream", "chat_stream_usage", "chat_stream_usage_continuous", "chat_stream_n2"),
    *("chat_tool_required_stream", "completions_stream_usage"),
]


def known_events(path: str) -> list[Any]:
    """Every structure of an event that any captured stream of an endpoint has."""
    return [event for name in STREAMS if request_of(name)[1] == path for event in events(reply_of(name)[2])]


@pytest.mark.parametrize("name", STREAMS)
async def test_the_same_events(name: str) -> None:
    status, kind, body = await ask(name)
    expected, headers, real = reply_of(name)
    assert (status, kind) == (expected, headers["content-type"])
    ours, theirs = events(body), events(real)
    if "chat" in name:
        assert ours[0] == theirs[0]
    known = known_events(request_of(name)[1])
    unknown = [event for event in ours[:-1] if event not in known]
    assert unknown == []
    assert [key for key, _ in ours[-1]] == [key for key, _ in theirs[-1]]


@pytest.mark.parametrize("name", ["responses_stream", "messages_stream"])
async def test_the_same_named_events(name: str) -> None:
    def named(body: bytes) -> list[tuple[str, Any]]:
        found: list[tuple[str, Any]] = []
        for block in body.decode().strip().split("\n\n"):
            event, data = block.strip().split("\n")
            kind = event.removeprefix("event: ")
            shape = structure(json.loads(data.removeprefix("data: ")))
            if not found or found[-1] != (kind, shape):  # as many deltas as a model likes
                found.append((kind, shape))
        return found

    status, kind, body = await ask(name)
    expected, headers, real = reply_of(name)
    assert (status, kind) == (expected, headers["content-type"])
    assert named(body) == named(real)


async def test_metrics_have_names_labels_and_buckets_of_the_real_ones() -> None:
    _, _, body = await ask("metrics")
    _, _, real = reply_of("metrics")

    def samples(page: bytes) -> set[str]:
        lines = (line for line in page.decode().splitlines() if line.startswith("vllm:"))
        return {line.rpartition(" ")[0] for line in lines if not line.startswith("vllm:cache_config_info")}

    def types(page: bytes) -> set[str]:
        return {line for line in page.decode().splitlines() if line.startswith("# TYPE vllm:")}

    assert samples(body) <= samples(real)
    assert types(body) <= types(real)


async def test_an_engine_that_fails_says_the_same_bytes() -> None:
    died = CAPTURES.parent / "tiny_die"
    *_, error, done, _ = (died / "stream_when_engine_dies.response.txt").read_bytes().split(b"\n\n")
    whole = (died / "nonstream_when_engine_dies.response.txt").read_bytes().partition(b"\r\n\r\n")[2]
    async with client(faults=(Fault(kind=FaultKind.ERROR_EVENT),)) as http:
        stream = await http.post("/v1/chat/completions", HELLO | {"stream": True})
        *_, our_error, our_done, _ = (await stream.read()).split(b"\n\n")
        refused = await http.post("/v1/chat/completions", HELLO)
        assert (refused.status, await refused.read()) == (500, whole)
    assert (stream.status, our_error, our_done) == (200, error, done)


# Bounds of the fields that are checked

_BOUNDS = ("minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems")


def forms(schema: dict[str, Any]) -> set[str]:
    """What a field may be: each of its types with its bounds; what an object holds is not looked at."""
    if "anyOf" in schema:
        return set[str]().union(*(forms(one) for one in schema["anyOf"]))
    if "$ref" in schema:
        return {"object"}
    if "enum" in schema or "const" in schema:
        return {f"{value!r}" for value in schema.get("enum", [schema.get("const")])}
    bounds = "".join(f" {name} {float(schema[name])}" for name in _BOUNDS if name in schema)
    items = f" of {sorted(forms(schema['items']))}" if "items" in schema else ""
    return {f"{schema['type']}{bounds}{items}"}


@pytest.mark.parametrize(
    ("ours", "theirs", "absent"),
    [
        (ChatRequest, "ChatCompletionRequest", {}),
        # Without `prompt_embeds`, a prompt has to be there.
        (CompletionRequest, "CompletionRequest", {"prompt": {"null"}}),
        (DetokenizeRequest, "DetokenizeRequest", {}),
        (StreamOptions, "StreamOptions", {}),
    ],
)
def test_fields_have_the_bounds_of_the_real_ones(
    ours: type[BaseModel], theirs: str, absent: dict[str, set[str]]
) -> None:
    captured = json.loads((CAPTURES.parent / "openapi_default.json").read_bytes())
    real = captured["components"]["schemas"][theirs]["properties"]
    schema = ours.model_json_schema()["properties"]
    assert schema.keys() <= real.keys()
    for name, field in schema.items():
        assert forms(field) | absent.get(name, set()) == forms(real[name]), name
