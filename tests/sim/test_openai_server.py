"""The emulated endpoints over real sockets: shapes, counts and errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import takewhile
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from sim import tokens
from sim.engine import EngineSettings, StepCost
from sim.faults import Faults
from sim.openai_server import Face, FaceSettings
from sim.vllm_metrics import VllmMetrics
from tests.sim.emulated import HELLO, ManualEngine, client, content, events


async def test_small_endpoints() -> None:
    async with client() as http:
        for path in ("/health", "/ping"):
            response = await http.get(path)
            assert (response.status, await response.read()) == (200, b"")
        assert (await http.post("/ping", b"")).status == 200
        assert await (await http.get("/version")).json() == {"version": "0.32.0"}
        assert await (await http.get("/load")).json() == {"server_load": 0}


async def test_models_lists_every_name() -> None:
    async with client(models=("demo", "alias"), max_model_len=2048) as http:
        listed = await (await http.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [(row["id"], row["root"], row["max_model_len"]) for row in listed["data"]] == [
        ("demo", "demo", 2048),
        ("alias", "demo", 2048),
    ]


async def test_a_whole_answer() -> None:
    async with client() as http:
        body = await http.chat(max_tokens=6, ignore_eos=True)
        again = await http.chat(max_tokens=6, ignore_eos=True)
    assert body["object"] == "chat.completion"
    [choice] = body["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["role"] == "assistant"
    assert choice["logprobs"] is None
    assert "tool_calls" not in choice["message"]
    assert len(tokens.split(choice["message"]["content"])) == 6
    prompt = len(tokens.chat_pieces([("user", "Hello")]))
    assert body["usage"]["prompt_tokens"] == prompt
    assert body["usage"]["completion_tokens"] == 6
    assert body["usage"]["total_tokens"] == prompt + 6
    assert again["choices"] == body["choices"]
    assert again["id"] != body["id"]


@asynccontextmanager
async def driven() -> AsyncIterator[tuple[str, ManualEngine]]:
    """A server whose engine the test drives by hand: its address and the engine."""
    engine = ManualEngine()
    settings = EngineSettings(StepCost(1.0, 0.0, 0.0, 0.0), kv_tokens=1600)
    metrics = VllmMetrics("demo", settings, max_model_len=100)
    metrics.watch(engine.figures)
    faults = Faults(asyncio.get_running_loop().call_later)
    face = Face(FaceSettings(("demo",), max_model_len=100), engine, metrics, faults)
    runner = web.AppRunner(face.application())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0]
    try:
        yield f"http://{host}:{port}", engine
    finally:
        await runner.cleanup()


async def test_the_bytes_of_a_stream() -> None:
    body = HELLO | {"n": 2, "max_tokens": 3, "ignore_eos": True, "stream": True}
    async with driven() as (url, engine), aiohttp.ClientSession() as session:
        response = await session.post(f"{url}/v1/chat/completions", json=body, headers={"X-Request-Id": "r1"})
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert response.headers["Transfer-Encoding"] == "chunked"
        seen = b""
        # One token of the first choice; one of the second; two of each at once, which come merged.
        for steps, count in (([(0, 1)], 3), ([(1, 1)], 1), ([(0, 1), (1, 2), (0, 1)], 3)):
            engine.advance(*steps)
            for _ in range(count):
                seen += await response.content.readuntil(b"\n\n")
        assert await response.content.read() == b""
    created = events(seen)[0]["created"]
    kind = "chat.completion.chunk"
    head = f'data: {{"id":"chatcmpl-r1","object":"{kind}","created":{created},"model":"demo","choices":['
    role = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
    nulls = '"prompt_token_ids":null,"prompt_text":null'
    text = '"logprobs":null,"finish_reason":null,"token_ids":null}]'
    end = '"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null}]'
    one, two = (tokens.split(content(events(seen), index)) for index in (0, 1))
    fingerprint = events(seen)[-1]["system_fingerprint"]
    assert seen.decode() == (
        f'{head}{{"index":0,{role},{nulls}}}\n\n'
        f'{head}{{"index":1,{role},{nulls}}}\n\n'
        f'{head}{{"index":0,"delta":{{"content":"{one[0]}"}},{text}}}\n\n'
        f'{head}{{"index":1,"delta":{{"content":"{two[0]}"}},{text}}}\n\n'
        f'{head}{{"index":0,"delta":{{"content":"{one[1]}{one[2]}"}},{end}}}\n\n'
        f'{head}{{"index":1,"delta":{{"content":"{two[1]}{two[2]}"}},{end},"system_fingerprint":"{fingerprint}"}}\n\n'
        "data: [DONE]\n\n"
    )


async def test_a_stream_says_what_the_whole_answer_says() -> None:
    async with client() as http:
        body = await http.chat()
        found = await http.events(stream_options={"include_usage": True})
    assert content(found) == body["choices"][0]["message"]["content"]
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert found[-2]["choices"][0]["finish_reason"] == body["choices"][0]["finish_reason"] == "stop"
    assert found[-2]["choices"][0]["delta"] == {} or found[-2]["choices"][0]["delta"]["content"]
    assert found[-1]["choices"] == []
    for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert found[-1]["usage"][key] == body["usage"][key]
    assert all("usage" not in event for event in found[:-1])
    assert ["system_fingerprint" in event for event in found] == [False] * (len(found) - 1) + [True]


async def test_continuous_usage_counts_up_to_the_end() -> None:
    async with client(speed=5) as http:
        found = await http.events(
            max_tokens=8,
            ignore_eos=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
        )
    counts = [event["usage"]["completion_tokens"] for event in found]
    assert counts[0] == 0
    assert counts[-2:] == [8, 8]
    assert counts == sorted(counts)
    for event in found[1:-1]:
        seen = len(tokens.split(content(found[: found.index(event) + 1])))
        assert event["usage"]["completion_tokens"] == seen
        assert event["usage"]["completion_tokens_details"] is None


async def test_several_choices_are_summed_at_the_end() -> None:
    async with client(speed=5) as http:
        found = await http.events(
            n=2,
            max_tokens=10,
            ignore_eos=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
        )
        whole = await http.chat(n=2, max_tokens=10, ignore_eos=True)
    assert [event["choices"][0]["index"] for event in found[:2]] == [0, 1]
    assert content(found, 0) != content(found, 1)
    assert [choice["message"]["content"] for choice in whole["choices"]] == [
        content(found, 0),
        content(found, 1),
    ]
    # Running usage is the choice's own, the last one is the sum: as vLLM does it.
    ends = [event for event in found if event["choices"] and event["choices"][0]["finish_reason"]]
    assert [event["usage"]["completion_tokens"] for event in [*ends, found[-1]]] == [10, 10, 20]
    assert found[-1]["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]
    assert whole["usage"]["completion_tokens"] == 20


async def test_stop_strings_in_streams_and_whole_answers() -> None:
    async with client() as http:
        full = (await http.chat())["choices"][0]["message"]["content"]
        stop = full[20:24]
        body = await http.chat(stop=[stop])
        found = await http.events(stop=[stop], stream_options={"include_usage": True})
        kept = await http.chat(stop=stop, include_stop_str_in_output=True)
    [choice] = body["choices"]
    expected = full[: full.index(stop)]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == (
        expected,
        "stop",
        stop,
    )
    assert content(found) == expected
    assert found[-2]["choices"][0]["stop_reason"] == stop
    assert found[-1]["usage"]["completion_tokens"] == body["usage"]["completion_tokens"]
    assert kept["choices"][0]["message"]["content"] == expected + stop


async def test_completions() -> None:
    async with client() as http:
        response = await http.post(
            "/v1/completions",
            {"model": "demo", "prompt": ["One", "Two three"], "n": 2, "max_tokens": 3, "echo": True},
        )
        body = await response.json()
        found = await http.events(
            "/v1/completions",
            prompt=tokens.encode(tokens.split("Two three")),
            max_tokens=3,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
        )
    assert body["object"] == "text_completion"
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["choices"][1]["text"].startswith("One")
    assert body["choices"][2]["text"].startswith("Two three")
    assert body["usage"] | {"prompt_tokens_details": 0} == {
        "prompt_tokens": 3,
        "total_tokens": 15,
        "completion_tokens": 12,
        "prompt_tokens_details": 0,
        "completion_tokens_details": None,
    }
    text = "".join(choice["text"] for event in found for choice in event["choices"])
    assert "Two three" + text == body["choices"][2]["text"]
    assert found[-1]["usage"]["prompt_tokens"] == 2
    assert found[-2]["usage"]["completion_tokens"] == 3
    assert found[0]["id"].startswith("cmpl-")


async def test_completions_have_sixteen_tokens_unless_told() -> None:
    async with client() as http:
        body = await (await http.post("/v1/completions", {"prompt": "Hi", "ignore_eos": True})).json()
    assert body["usage"]["completion_tokens"] == 16


async def test_tokenize_and_back() -> None:
    async with client(max_model_len=2048) as http:
        plain = await (await http.post("/tokenize", {"model": "demo", "prompt": "Hello world"})).json()
        chat = await (
            await http.post("/tokenize", {"messages": HELLO["messages"], "return_token_strs": True})
        ).json()
        back = await (await http.post("/detokenize", {"tokens": plain["tokens"]})).json()
        usage = (await http.chat(max_tokens=1))["usage"]
        neither = await http.post("/tokenize", {"model": "demo"})
    assert plain | {"tokens": []} == {"count": 2, "max_model_len": 2048, "tokens": [], "token_strs": None}
    assert len(plain["tokens"]) == 2
    assert chat["count"] == usage["prompt_tokens"] == len(chat["token_strs"])
    assert back == {"prompt": "Hello world"}
    assert neither.status == 400


async def test_a_rendered_prompt_is_that_of_the_answer_in_short_ids() -> None:
    path = "/v1/chat/completions/render"
    longer = {**HELLO, "messages": [*HELLO["messages"], {"role": "user", "content": "And more"}]}
    async with client(max_model_len=64) as http:
        rendered = await (await http.post(path, {**HELLO, "cache_salt": "s", "temperature": 0.5})).json()
        further = await (await http.post(path, longer)).json()
        usage = (await http.chat(max_tokens=1))["usage"]
        stranger = await http.post(path, {**HELLO, "model": "stranger"})
        too_long = await http.post(path, {**HELLO, "messages": [{"role": "user", "content": "a b " * 99}]})
    ids = rendered["token_ids"]
    assert len(ids) == usage["prompt_tokens"]
    assert all(0 <= number < 2**31 for number in ids)
    pairs = zip(ids, further["token_ids"], strict=False)
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    assert len(ids) // 2 < shared < len(further["token_ids"])
    assert (rendered["cache_salt"], rendered["sampling_params"]["temperature"]) == ("s", 0.5)
    assert (stranger.status, too_long.status) == (404, 400)


async def test_reasoning_models_reason_first() -> None:
    async with client(models=("demo", "demo-reasoning")) as http:
        body = await http.chat(model="demo-reasoning")
        found = await http.events(model="demo-reasoning", stream_options={"include_usage": True})
        plain = await http.chat()
    message = body["choices"][0]["message"]
    assert message["reasoning"] == message["reasoning_content"] != ""
    assert body["model"] == "demo"
    thought = "".join(
        choice["delta"].get("reasoning_content", "") for event in found for choice in event["choices"]
    )
    assert thought == message["reasoning"]
    assert content(found) == message["content"]
    length = len(tokens.split(thought)) + len(tokens.split(message["content"])) + 1
    assert found[-1]["usage"]["completion_tokens"] == body["usage"]["completion_tokens"] == length
    assert plain["choices"][0]["message"]["reasoning"] is None
    assert "reasoning_content" not in plain["choices"][0]["message"]


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
        },
    },
}


@pytest.mark.parametrize(
    ("choice", "finish"),
    [("required", "tool_calls"), ({"type": "function", "function": {"name": "get_weather"}}, "stop")],
)
async def test_forced_tools(choice: Any, finish: str) -> None:
    async with client() as http:
        body = await http.chat(tools=[WEATHER], tool_choice=choice)
        found = await http.events(tools=[WEATHER], tool_choice=choice, stream_options={"include_usage": True})
    [whole] = body["choices"]
    [call] = whole["message"]["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    assert whole["message"]["content"] == ""
    assert whole["finish_reason"] == finish
    calls = [
        call
        for event in found
        for choice in event["choices"]
        for call in choice["delta"].get("tool_calls", [])
    ]
    assert calls[0]["type"] == "function"
    assert calls[0]["function"] == {"name": "get_weather"}
    assert "".join(call["function"].get("arguments", "") for call in calls) == '{"city": "Paris"}'
    assert found[-2]["choices"][0]["finish_reason"] == finish
    assert found[-1]["usage"]["completion_tokens"] == body["usage"]["completion_tokens"]


async def test_json_answers() -> None:
    schema = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 3}}, "required": ["age"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    async with client() as http:
        body = await http.chat(response_format=wanted)
        anything = await http.chat(response_format={"type": "json_object"})
        refused = await http.post(
            "/v1/chat/completions",
            HELLO
            | {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"not": {}}},
                }
            },
        )
        error = (await refused.json())["error"]
    assert json.loads(body["choices"][0]["message"]["content"]) == {"age": 3}
    assert json.loads(anything["choices"][0]["message"]["content"]) == {}
    assert (refused.status, error["type"], error["param"]) == (400, "BadRequestError", "response_format")
    assert "'not'" in error["message"]


# Errors


async def test_unknown_paths_and_methods() -> None:
    async with client() as http:
        missing = await http.get("/v1/models/demo")
        wrong = await http.get("/v1/chat/completions")
        head = await http.session.head(http.server.url + "/health")
        assert (missing.status, await missing.json()) == (404, {"detail": "Not Found"})
        assert (wrong.status, await wrong.json()) == (405, {"detail": "Method Not Allowed"})
        assert wrong.headers["Allow"] == "POST"
        assert head.status == 405


@pytest.mark.parametrize(
    ("body", "status", "kind", "param", "words"),
    [
        (b'{"model":', 400, "Bad Request", "body.9", "Expecting value"),
        (b"\xff", 400, "Bad Request", None, "error parsing the body"),
        (b"", 400, "Bad Request", "body.0", "Expecting value"),
        ({"model": "demo"}, 400, "Bad Request", "body.messages", "Field required"),
        ([1], 400, "Bad Request", "body", "valid dictionary"),
        (HELLO | {"max_tokens": "many"}, 400, "Bad Request", "body.max_tokens", "valid integer"),
        (HELLO | {"messages": [{}]}, 400, "Bad Request", "body.messages.0.role", "Field required"),
        (HELLO | {"stream_options": {}}, 400, "Bad Request", "body", "stream=True"),
        (
            HELLO | {"model": "nope"},
            404,
            "NotFoundError",
            "model",
            "`nope` does not exist. Valid aliases: demo.",
        ),
        (
            HELLO | {"temperature": -1},
            400,
            "BadRequestError",
            "temperature",
            "got -1.0. (parameter=temperature",
        ),
        (HELLO | {"top_p": 0}, 400, "BadRequestError", "top_p", "top_p must be"),
        (HELLO | {"n": 0}, 400, "BadRequestError", "n", "at least 1"),
        (HELLO | {"n": 100_000}, 400, "BadRequestError", "n", "at most"),
        (HELLO | {"max_tokens": 0}, 400, "BadRequestError", "max_tokens", "at least 1"),
        (
            HELLO | {"max_tokens": 9000, "stream": True},
            400,
            "BadRequestError",
            "max_tokens",
            "max_model_len=100",
        ),
        (
            HELLO | {"max_tokens": 95},
            400,
            "BadRequestError",
            "input_tokens",
            "you requested 95 output tokens",
        ),
        (
            {"messages": [{"role": "user", "content": "word " * 200}], "stream": True},
            *(400, "BadRequestError", "input_tokens", "at least 101 input tokens"),
        ),
        (HELLO | {"tool_choice": "required"}, 400, "BadRequestError", "tool_choice", "`tools` must be set"),
        (
            HELLO | {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}},
            *(400, "BadRequestError", "tool_choice", "does not match"),
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            *(400, "BadRequestError", "messages", "image_url"),
        ),
    ],
)
async def test_bad_requests(body: Any, status: int, kind: str, param: str, words: str) -> None:
    async with client(max_model_len=100) as http:
        response = await http.post("/v1/chat/completions", body)
        error = (await response.json())["error"]
        assert http.server.engine.figures()[:2] == (0, 0)
    assert (response.status, error["code"], error["type"], error["param"]) == (status, status, kind, param)
    assert words in error["message"]


async def test_keys_guard_the_api_and_nothing_else() -> None:
    async with client(api_keys=("k1", "k2")) as http:
        for headers in (
            {},
            {"Authorization": "Bearer k3"},
            {"Authorization": "k1"},
            {"Authorization": "Basic k1"},
        ):
            for path in ("/v1/models", "/v1/nothing"):
                response = await http.get(path, headers=headers)
                assert (response.status, await response.read()) == (401, b'{"error":"Unauthorized"}')
        for key in ("k1", "k2"):
            assert (await http.get("/v1/models", headers={"Authorization": f"Bearer {key}"})).status == 200
        assert (await http.get("/metrics")).status == 200
        assert (await http.post("/tokenize", {"prompt": "a"})).status == 200


async def test_message_content_may_come_in_parts() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    async with client() as http:
        body = await http.chat(messages=[{"role": "user", "content": parts}], max_tokens=1)
    assert body["usage"]["prompt_tokens"] == len(tokens.chat_pieces([("user", "Hel\nlo")]))
