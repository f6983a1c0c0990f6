"""Official clients through the real proxy to a real vLLM with a tiny model.

What comes out is gibberish, so nothing here reads the text; that the API's shapes arrive whole, that nothing of the
meter's own questions leaks, and that every token is in the ledger, is what these tests are about.
"""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from proxy.endpoints import TABLE
from tests.e2e.clients import CHAT, MESSAGES, connect, events, stream, used
from tests.e2e.conftest import StartTidegate
from tests.e2e.tidegate_process import TidegateProcess
from tests.e2e.vllm_server import Counters, VllmServer

pytestmark = [pytest.mark.e2e, pytest.mark.vllm, pytest.mark.timeout(400)]

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def proxy(vllm_tiny: VllmServer, tidegate: StartTidegate) -> TidegateProcess:
    """The proxy with one real vLLM behind it."""
    return tidegate({"name": "tiny", "url": vllm_tiny.url}, aliases={"gpt-4": "tiny"})


@pytest.fixture
def client(proxy: TidegateProcess) -> Iterator[openai.OpenAI]:
    with connect(proxy) as found:
        yield found


# What the clients of our users do


def test_models_are_listed_with_aliases(client: openai.OpenAI) -> None:
    assert sorted(model.id for model in client.models.list()) == ["gpt-4", "tiny"]
    assert client.models.retrieve("tiny").model_dump()["max_model_len"] == 2048
    assert client.models.retrieve("gpt-4").id == "gpt-4"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("nope")
    assert error.value.code == "model_not_found"


def test_chat_in_one_piece(client: openai.OpenAI, proxy: TidegateProcess) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=20, temperature=0)
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 20
    assert answer.choices[0].message.content
    (row,) = proxy.rows(1)
    assert used(row) == (answer.usage.prompt_tokens, answer.usage.completion_tokens)
    assert (row["outcome"], row["usage_source"], row["backend"]) == ("ok", "reported", "tiny")


def test_an_alias_is_served_as_the_model_it_means(client: openai.OpenAI, proxy: TidegateProcess) -> None:
    assert client.chat.completions.create(model="gpt-4", messages=MESSAGES, max_tokens=4).usage
    (row,) = proxy.rows(1)
    assert (row["model"], row["served_model"]) == ("gpt-4", "tiny")


def test_a_stream_without_usage_shows_none(client: openai.OpenAI, proxy: TidegateProcess) -> None:
    with client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=30, stream=True, temperature=0
    ) as chunks:
        found = list(chunks)
    assert found
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in found)
    assert found[-1].choices[0].finish_reason in ("length", "stop")
    (row,) = proxy.rows(1)
    assert row["usage_source"] == "reported"
    assert row["prompt_tokens"] > 0
    assert 0 < row["completion_tokens"] <= 30


def test_not_even_the_word_usage_is_in_such_a_stream(proxy: TidegateProcess) -> None:
    with stream(proxy, max_tokens=30) as response:
        found = events(response)
    assert found[-1] == "[DONE]"
    assert len(found) > 5
    assert all("usage" not in json.loads(event) for event in found[:-1])


def test_usage_that_was_asked_for_comes_once_at_the_end(
    client: openai.OpenAI, proxy: TidegateProcess
) -> None:
    with client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=30,
        stream=True,
        temperature=0,
        stream_options={"include_usage": True},
    ) as chunks:
        found = list(chunks)
    *others, last = found
    assert last.choices == []
    assert last.usage is not None
    assert all(chunk.usage is None and chunk.choices for chunk in others)
    (row,) = proxy.rows(1)
    assert used(row) == (last.usage.prompt_tokens, last.usage.completion_tokens)


def test_running_usage_that_was_asked_for_is_in_every_event(proxy: TidegateProcess) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    with stream(proxy, max_tokens=30, stream_options=options) as response:
        *found, done = events(response)
    assert done == "[DONE]"
    counts = [json.loads(event)["usage"]["completion_tokens"] for event in found]
    assert counts == sorted(counts)
    (row,) = proxy.rows(1)
    assert row["completion_tokens"] == counts[-1]


def test_two_choices_are_metered_together(client: openai.OpenAI, proxy: TidegateProcess) -> None:
    whole = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=20, n=2, seed=1, extra_body={"ignore_eos": True}
    )
    assert [choice.index for choice in whole.choices] == [0, 1]
    with client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=20,
        n=2,
        seed=1,
        stream=True,
        extra_body={"ignore_eos": True},
    ) as chunks:
        assert {chunk.choices[0].index for chunk in chunks} == {0, 1}
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 40
    assert [used(row) for row in proxy.rows(2)] == [(whole.usage.prompt_tokens, 40)] * 2


def test_completions(client: openai.OpenAI, proxy: TidegateProcess) -> None:
    whole = client.completions.create(model="tiny", prompt="Once upon", max_tokens=12, temperature=0)
    with client.completions.create(
        model="tiny", prompt="Once upon", max_tokens=12, temperature=0, stream=True
    ) as chunks:
        found = list(chunks)
    assert "".join(chunk.choices[0].text for chunk in found) == whole.choices[0].text
    assert all(chunk.usage is None for chunk in found)
    assert whole.usage is not None
    assert [used(row) for row in proxy.rows(2)] == [
        (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    ] * 2


def test_a_forced_tool_comes_as_the_engine_sent_it(proxy: TidegateProcess, vllm_tiny: VllmServer) -> None:
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    tools: Any = [WEATHER]
    fields: dict[str, Any] = {"model": "tiny", "max_tokens": 60, "temperature": 0}
    found = []
    for url in (vllm_tiny.url, proxy.url):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            whole = client.chat.completions.create(
                messages=MESSAGES, tools=tools, tool_choice=choice, **fields
            )
            with client.chat.completions.create(
                messages=MESSAGES, tools=tools, tool_choice=choice, stream=True, **fields
            ) as chunks:
                deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
        calls: Any = whole.choices[0].message.tool_calls
        functions = [delta.function for delta in deltas if delta.function]
        names = [function.name for function in functions if function.name]
        found.append((calls[0].function, names, "".join(part.arguments or "" for part in functions)))
    assert found[1] == found[0]
    assert found[1][0].name == "weather"
    assert found[1][1] == ["weather"]
    assert all(row["usage_source"] == "reported" for row in proxy.rows(2))


async def test_the_asynchronous_client(proxy: TidegateProcess) -> None:
    async with openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key="none", max_retries=0) as client:
        whole = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=20, temperature=0
        )
        chunks = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=20, temperature=0, stream=True
        )
        found = [chunk async for chunk in chunks]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in found)
    assert text == whole.choices[0].message.content


def test_curl(proxy: TidegateProcess) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("NOT RUN: curl is not here")
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 5, "stream": True}
    done = subprocess.run(
        [curl, "-sS", "--noproxy", "*", "--json", json.dumps(body), f"{proxy.url}/v1/chat/completions"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.endswith("data: [DONE]\n\n")


def test_tokenize_and_back(proxy: TidegateProcess) -> None:
    def ask(path: str, body: dict[str, Any]) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=30)
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        found: dict[str, Any] = json.loads(connection.getresponse().read())
        connection.close()
        return found

    tokens = ask("/tokenize", {"model": "tiny", "prompt": "Hello there"})["tokens"]
    assert ask("/detokenize", {"model": "tiny", "tokens": tokens})["prompt"] == "Hello there"


# Bad input


def test_an_unknown_model_is_404(client: openai.OpenAI, vllm_tiny: VllmServer) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="nope", messages=MESSAGES)
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize("streamed", [False, True])
def test_too_long_is_400_and_no_fault_of_the_backend(
    client: openai.OpenAI, proxy: TidegateProcess, streamed: bool
) -> None:
    for _ in range(6):  # one more than open a breaker
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "word " * 3000}], stream=streamed
            )
        assert "2048" in error.value.message
    client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=2)
    rows = proxy.rows(7)
    assert [row["outcome"] for row in rows] == ["client_error"] * 6 + ["ok"]
    assert [used(row) for row in rows[:6]] == [(0, 0)] * 6


ALLOWED = {
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
}
DISGUISES = (
    *("//metrics", "/./metrics", "/v1/../metrics", "/%6detrics", "/metrics?x=1", "/metrics/", "/METRICS"),
    *("/v1/chat/completions/../../sleep", "/v1/chat/completions/", "/v1/chat/completions%2f..%2f..%2fsleep"),
    *("/v1/models/../../sleep", "/v1/models/..%2f..%2fsleep", "/tokenize/../sleep", "/sleep;x", "/sleep%00"),
)


@pytest.mark.shared
def test_an_engines_control_endpoints_are_out_of_reach(
    vllm_tiny: VllmServer, tidegate: StartTidegate, shared: Path
) -> None:
    proxy = tidegate({"name": "tiny", "url": vllm_tiny.url, "models": ["tiny"]}, probing={"enabled": False})
    captured = json.loads((shared / "vllm" / "captures" / "vllm_routes.json").read_text())
    known = {
        (method, path.replace("{", "").replace("}", ""))
        for paths in captured.values()
        if isinstance(paths, dict)
        for path, methods in paths.items()
        for method in methods
    }
    routes = known - ALLOWED - {(route.method, route.path) for route in TABLE} | {
        (method, path) for path in DISGUISES for method in ("GET", "POST")
    }
    assert len(routes) > 70
    before = len(vllm_tiny.requests_logged())
    found = {}
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=30)
    for method, path in sorted(routes):
        connection.request(method, path, b'{"model":"tiny"}' if method == "POST" else None)
        response = connection.getresponse()
        response.read()
        found[method, path] = response.status
    connection.close()
    assert {route: status for route, status in found.items() if status != 404} == {
        (method, path): 405  # they look like the name of a model, or the id of a response, to ask for
        for method, path in found
        if method == "POST" and (path.startswith("/v1/models/") or path == "/v1/responses/render")
    }
    with connect(proxy) as client:
        client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=2)
    assert vllm_tiny.requests_logged()[before:] == [CHAT]


# Every token


def test_the_ledger_counts_what_the_engine_counts(proxy: TidegateProcess, vllm_tiny: VllmServer) -> None:
    before = vllm_tiny.counters()

    def one(number: int) -> None:
        with connect(proxy) as client:
            fields: dict[str, Any] = {"model": "tiny", "max_tokens": 5 + 7 * number}
            if number % 2:
                fields["stream"] = True
                if number % 4 == 1:
                    fields["stream_options"] = {"include_usage": True}
            if number % 3 == 0:
                answer: Any = client.completions.create(prompt="a " * number, **fields)
            else:
                words: Any = [{"role": "user", "content": f"{number} " * (1 + 20 * number)}]
                answer = client.chat.completions.create(messages=words, **fields)
            if number % 2:
                for _ in answer:
                    pass

    threads = [threading.Thread(target=one, args=(number,)) for number in range(1, 25)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = proxy.rows(len(threads))
    engine = vllm_tiny.counters() - before
    assert {row["outcome"] for row in rows} == {"ok"}
    assert {row["usage_source"] for row in rows} == {"reported"}
    in_rows = Counters(
        sum(row["prompt_tokens"] for row in rows), sum(row["completion_tokens"] for row in rows)
    )
    assert in_rows == engine
    (line,) = proxy.usage("backend")
    assert Counters(line["prompt_tokens"], line["completion_tokens"]) == engine
    assert (line["backend"], line["requests"], line["errors"]) == ("tiny", len(threads), 0)
