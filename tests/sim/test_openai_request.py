"""What the emulated server refuses, and that it never answers anything but vLLM's JSON."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable
from typing import Any

import pytest

from sim import openai_server
from sim.answers import Answer, Wish, compose
from sim.generation import Generation, SequencePlan
from sim.openai_shapes import ChatShapes
from tests.sim.emulated import HELLO, Client, client, until

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


async def refused(http: Client, path: str, body: Any) -> dict[str, Any]:
    """The error of a 400."""
    response = await http.post(path, body)
    assert (response.status, response.content_type) == (400, "application/json"), await response.text()
    error: dict[str, Any] = (await response.json())["error"]
    assert error["code"] == 400
    assert http.server.engine.figures()[:2] == (0, 0)
    return error


@pytest.mark.parametrize("prompt", ["", [], ["a", ""], [[]], [[300], []]])
async def test_no_prompt_may_be_empty(prompt: Any) -> None:
    async with client() as http:
        error = await refused(http, COMPLETIONS, {"prompt": prompt})
    assert (error["type"], error["param"]) == ("BadRequestError", "prompt")


@pytest.mark.parametrize("depth", [5000, 100_000])
@pytest.mark.parametrize("closed", [True, False])
async def test_json_may_be_nested_too_deep(depth: int, closed: bool) -> None:
    body = b'{"messages":' + b"[" * depth + (b"]" * depth + b"}" if closed else b"")
    async with client() as http:
        error = await refused(http, CHAT, body)
    assert error["type"] == "Bad Request"


async def raw(http: Client, head: bytes) -> bytes:
    """What comes back for a chat request with a header of any bytes."""
    body = json.dumps(HELLO | {"max_tokens": 1}).encode()
    reader, writer = await asyncio.open_connection(http.server.host, http.server.port)
    writer.write(b"POST %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" % CHAT.encode())
    writer.write(b"%b\r\nContent-Length: %d\r\n\r\n%b" % (head, len(body), body))
    answer = await reader.read()
    writer.close()
    return answer


@pytest.mark.parametrize(("given", "meant"), [(b"r1", "r1"), (b"\xff", "ÿ"), ("ü".encode(), "Ã¼")])
async def test_a_request_id_of_any_bytes(given: bytes, meant: str) -> None:
    async with client() as http:
        answer = await raw(http, b"X-Request-Id: " + given)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert json.loads(body)["id"] == f"chatcmpl-{meant}"


# Values


@pytest.mark.parametrize(
    ("path", "fields", "param", "words"),
    [
        (CHAT, {"cache_salt": ""}, "body.cache_salt", "at least 1"),
        (CHAT, {"cache_salt": "s" * 1025}, "body.cache_salt", "at most 1024"),
        (CHAT, {"request_id": None}, "body.request_id", "valid string"),
        (CHAT, {"seed": 2**63}, "body.seed", "less than or equal"),
        (CHAT, {"min_tokens": -1}, None, "min_tokens must be greater than or equal to 0, got -1."),
        (CHAT, {"min_tokens": 6, "max_tokens": 5}, None, "less than or equal to max_tokens=5, got 6."),
        (CHAT, {"min_tokens": 1000}, None, "min_tokens must be less than or equal to max_tokens="),
        (COMPLETIONS, {"prompt": "a", "n": None}, "body.n", "valid integer"),
    ],
)
async def test_values_out_of_bounds(path: str, fields: dict[str, Any], param: str | None, words: str) -> None:
    async with client(max_model_len=100) as http:
        error = await refused(http, path, HELLO | fields)
    assert words in error["message"]
    assert error["param"] == param


@pytest.mark.parametrize("prompt", [[-1], [[300], [300, -1]]])
async def test_token_ids_are_not_negative(prompt: Any) -> None:
    async with client() as http:
        error = await refused(http, COMPLETIONS, {"prompt": prompt})
    assert "greater than or equal to 0" in error["message"]


@pytest.mark.parametrize(
    "fields",
    [{"n": None}, {"cache_salt": "s" * 1024}, {"min_tokens": 5, "max_tokens": 5}, {"seed": 2**63 - 1}],
)
async def test_values_at_their_bounds(fields: dict[str, Any]) -> None:
    async with client() as http:
        body = await http.chat(**fields)
    assert len(body["choices"]) == 1


# The emulator's own faults


@pytest.mark.parametrize("stream", [True, False])
async def test_its_own_failure_is_told_as_vllm_tells_one(
    stream: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(plans: Iterable[SequencePlan]) -> Generation:
        raise RuntimeError("out of paper")

    async with client() as http:
        monkeypatch.setattr(http.server.engine, "submit", fail)
        response = await http.post(CHAT, HELLO | {"stream": stream})
        error = (await response.json())["error"]
        assert await (await http.get("/load")).json() == {"server_load": 0}
    assert (response.status, error["code"], error["type"]) == (500, 500, "InternalServerError")
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert "out of paper" in caplog.text


async def test_a_stream_that_fails_half_way_says_so_and_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(shapes: ChatShapes, index: int, done: int, new: int, last: bool) -> list[bytes]:
        raise RuntimeError("out of ink")

    monkeypatch.setattr(ChatShapes, "step", fail)
    async with client() as http:
        response = await http.post(CHAT, HELLO | {"stream": True})
        *_, error, done, end = (await response.read()).decode().split("\n\n")
        assert http.server.engine.figures()[:2] == (0, 0)
    assert response.status == 200
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == 500
    assert (done, end) == ("data: [DONE]", "")
    assert "out of ink" in caplog.text


# Long answers


async def test_others_go_on_while_a_long_answer_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    planned, others = [0], [0]

    def endless(wish: Wish, seed: str) -> Any:
        while not others[0]:
            planned[0] += 1
            yield
        return compose(wish, seed)

    monkeypatch.setattr(openai_server, "composing", endless)
    async with client() as http, asyncio.TaskGroup() as group:
        asking = group.create_task(http.chat(max_tokens=3))
        await until(lambda: planned[0] > 0)
        assert (await http.get("/health")).status == 200
        assert await (await http.get("/load")).json() == {"server_load": 1}
        others[0] = 1
        assert (await asking)["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("stop", [(), ("no such text",)])
def test_a_long_answer_is_planned_in_pieces(stop: tuple[str, ...]) -> None:
    wish = Wish(room=50_000, ignore_eos=True, stop=stop)
    steps = openai_server.composing(wish, "a")
    pauses = 0
    try:
        while True:
            next(steps)
            pauses += 1
    except StopIteration as done:
        answer: Answer = done.value
    assert len(answer.tokens) == 50_000
    assert answer == compose(wish, "a")
    assert pauses == pytest.approx(50 * (1 + len(stop)), abs=2)


# vLLM's `--max-num-queued-reqs`


async def test_a_full_queue_refuses_with_503() -> None:
    async with client(slots=1, tpot_s=1000, ttft_s=1000, max_num_queued_reqs=3) as http:
        endless = HELLO | {"max_tokens": 700, "ignore_eos": True, "stream": True}
        two = await http.post(CHAT, endless | {"n": 2})
        assert two.status == 200
        refused = await http.post(CHAT, endless | {"n": 2})
        error = (await refused.json())["error"]
        one = await http.post(CHAT, endless)
        assert one.status == 200
        assert (await http.post(COMPLETIONS, {"prompt": "a"})).status == 503
        assert http.server.engine.figures()[:2] == (1, 2)
        assert (await http.metrics())["vllm:admission_rejections_total"] == 2
        two.close()
        await until(lambda: http.server.engine.figures().waiting == 1)
        again = await http.post(CHAT, endless | {"n": 2})
        assert again.status == 200
        for response in (one, again):
            response.close()
    assert (refused.status, error["code"]) == (503, 503)
