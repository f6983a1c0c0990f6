"""What the emulated `/v1/responses`, `/v1/messages` and endpoints of a pooling model do. Their shapes are compared
with a real vLLM's in `test_captures.py`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sim import tokens
from sim.pooling_api import vector
from tests.sim.emulated import HELLO, Client, client
from tests.sim.test_openai_server import WEATHER

ASK = {"model": "demo", "input": "Hello"}


async def post(http: Client, path: str, **fields: Any) -> dict[str, Any]:
    response = await http.post(path, fields)
    assert response.status == 200, await response.text()
    document: dict[str, Any] = await response.json()
    return document


async def stream(http: Client, path: str, **fields: Any) -> list[dict[str, Any]]:
    response = await http.post(path, fields | {"stream": True})
    lines = (await response.read()).decode().split("\n")
    found = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert names == [event["type"] for event in found]
    return found


async def test_a_response_streams_what_it_says_whole() -> None:
    async with client(speed=100) as http:
        whole = await post(http, "/v1/responses", **ASK)
        events = await stream(http, "/v1/responses", **ASK)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert text == whole["output"][0]["content"][0]["text"] != ""
    last = events[-1]["response"]
    assert last["usage"] == whole["usage"]
    assert whole["usage"]["input_tokens"] == len(tokens.chat_pieces([("user", "Hello")]))
    assert (whole["status"], last["status"]) == ("completed", "completed")


async def test_a_response_that_is_cut_is_incomplete() -> None:
    async with client() as http:
        whole = await post(http, "/v1/responses", **ASK, max_output_tokens=3)
    assert (whole["status"], whole["usage"]["output_tokens"]) == ("incomplete", 3)
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}


async def test_a_response_calls_a_forced_tool() -> None:
    tool = {"type": "function", **WEATHER["function"]}
    async with client(speed=100) as http:
        whole = await post(http, "/v1/responses", **ASK, tools=[tool], tool_choice="required")
        events = await stream(http, "/v1/responses", **ASK, tools=[tool], tool_choice="required")
    [call] = whole["output"]
    assert (call["type"], call["name"], json.loads(call["arguments"])) == (
        "function_call",
        "get_weather",
        {"city": "Paris"},
    )
    deltas = [e["delta"] for e in events if e["type"] == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call["arguments"]


async def test_a_response_is_kept_and_gone_on_from() -> None:
    async with client(speed=100) as http:
        first = await post(http, "/v1/responses", **ASK)
        again = await (await http.get(f"/v1/responses/{first['id']}")).json()
        second = await post(http, "/v1/responses", **ASK, previous_response_id=first["id"])
        unkept = await post(http, "/v1/responses", **ASK, store=False)
        missing = await http.get(f"/v1/responses/{unkept['id']}")
        assert missing.status == 404
    assert again == first
    assert second["usage"]["input_tokens"] > first["usage"]["total_tokens"]


async def test_a_background_response_ends_or_is_cancelled() -> None:
    async with client(speed=0.001) as http:  # it would take minutes
        queued = await post(http, "/v1/responses", **ASK, background=True)
        path = f"/v1/responses/{queued['id']}"
        assert (queued["status"], queued["usage"]) == ("queued", None)
        assert (await post(http, f"{path}/cancel"))["status"] == "cancelled"
        refused = await http.post(f"{path}/cancel", {})
        assert refused.status == 400
        assert (await (await http.get(path)).json())["status"] == "cancelled"


async def test_a_message_streams_what_it_says_whole() -> None:
    body = HELLO | {"max_tokens": 2000}
    async with client(speed=100) as http:
        whole = await post(http, "/v1/messages", **body)
        events = await stream(http, "/v1/messages", **body)
        count = await post(http, "/v1/messages/count_tokens", **HELLO)
    deltas = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(deltas) == whole["content"][0]["text"] != ""
    assert whole["stop_reason"] == "end_turn"
    assert events[-2]["usage"] == whole["usage"]
    assert (
        count["input_tokens"]
        == whole["usage"]["input_tokens"]
        == events[0]["message"]["usage"]["input_tokens"]
    )


async def test_a_message_calls_a_forced_tool() -> None:
    function = WEATHER["function"]
    tool = {"name": function["name"], "input_schema": function["parameters"]}
    body = HELLO | {"max_tokens": 99, "tools": [tool], "tool_choice": {"type": "any"}}
    async with client(speed=100) as http:
        whole = await post(http, "/v1/messages", **body)
        events = await stream(http, "/v1/messages", **body)
    [block] = whole["content"]
    assert (block["type"], block["input"], whole["stop_reason"]) == (
        "tool_use",
        {"city": "Paris"},
        "tool_use",
    )
    parts = [event["delta"]["partial_json"] for event in events if event["type"] == "content_block_delta"]
    assert json.loads("".join(parts)) == {"city": "Paris"}


async def test_a_message_for_an_unknown_model_is_refused_in_anthropics_shape() -> None:
    async with client() as http:
        response = await http.post("/v1/messages", HELLO | {"model": "x", "max_tokens": 5})
        document = await response.json()
    assert (response.status, document["type"], document["error"]["type"]) == (404, "error", "NotFoundError")


@pytest.mark.parametrize("path", ["/v1/embeddings", "/pooling", "/classify"])
async def test_a_pooling_model(path: str) -> None:
    async with client(pooling=True) as http:
        document = await post(http, path, model="demo", input=["one", "two three"])
        single = await post(http, path, model="demo", input="one")
        chat = await http.post("/v1/chat/completions", HELLO)
        assert chat.status == 404
    assert document["usage"]["prompt_tokens"] == document["usage"]["total_tokens"] == 3
    assert [row["index"] for row in document["data"]] == [0, 1]
    assert document["data"][0] == single["data"][0] != document["data"][1] | {"index": 0}


async def test_scores_and_ranks() -> None:
    async with client(pooling=True) as http:
        for path in ("/score", "/v1/score"):
            scores = await post(http, path, model="demo", text_1="q", text_2=["a", "b", "c"])
            assert [0 <= row["score"] <= 1 for row in scores["data"]] == [True] * 3
        for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
            ranks = await post(http, path, model="demo", query="q", documents=["a", "b", "c"], top_n=2)
            found = [row["relevance_score"] for row in ranks["results"]]
            assert found == sorted(found, reverse=True)
            assert len(found) == 2
            assert ranks["usage"] == {"prompt_tokens": 3, "total_tokens": 3}


def test_a_vector_has_length_one_and_follows_from_its_text() -> None:
    assert sum(number**2 for number in vector("x", 100)) == pytest.approx(1)
    assert vector("x", 8) == vector("x", 8) != vector("y", 8)
