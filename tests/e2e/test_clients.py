"""The clients that people use, through the proxy to the emulated engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pydantic
import pytest

from sim.emulator import Emulator, EmulatorSettings, emulator
from tests.e2e.proxy_fixtures import MakeKey, Proxy, StartProxy, chat_body, eventually

pytestmark = pytest.mark.e2e

QUESTION: list[Any] = [{"role": "user", "content": "What is a tide?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
        },
    },
}


@pytest.fixture
async def engine() -> AsyncIterator[Emulator]:
    settings = EmulatorSettings(models=("m",), speed=100, api_keys=("engine-key",), shutdown_timeout_s=0.1)
    async with emulator(settings) as running:
        yield running


@pytest.fixture
async def proxy(
    engine: Emulator, start_proxy: StartProxy, make_key: MakeKey, monkeypatch: pytest.MonkeyPatch
) -> Proxy:
    """With a key for the client, and one for the engine."""
    monkeypatch.setenv("ENGINE_KEY", "engine-key")
    monkeypatch.setenv(
        "OPENAI_API_KEY", make_key(tenant="acme", rpm=1000).removeprefix("authorization: Bearer ")
    )
    return await start_proxy(
        {"url": engine.url, "api_key_env": "ENGINE_KEY", "models": "auto"},
        aliases={"gpt-4": "m"},
        probing={"interval": 60, "timeout": 30},
    )


@pytest.fixture
async def client(proxy: Proxy) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", max_retries=0) as made:
        yield made


async def test_the_sync_client(proxy: Proxy) -> None:
    def talk() -> None:
        with openai.OpenAI(base_url=f"{proxy.url}/v1", max_retries=0) as client:
            whole = client.chat.completions.create(model="gpt-4", messages=QUESTION)
            stream = client.chat.completions.create(model="gpt-4", messages=QUESTION, stream=True)
            events = list(stream)
            assert (
                "".join(e.choices[0].delta.content or "" for e in events) == whole.choices[0].message.content
            )
            assert [event.usage for event in events] == [None] * len(events)
            assert [model.id for model in client.models.list()] == ["gpt-4", "m"]
            assert client.models.retrieve("m").id == "m"
            completion = client.completions.create(model="m", prompt="Once", max_tokens=5)
            assert completion.usage is not None
            assert completion.usage.completion_tokens == 5

    await asyncio.to_thread(talk)
    await proxy.idle()


async def test_a_raw_response_shows_where_it_came_from(proxy: Proxy, client: openai.AsyncOpenAI) -> None:
    response = await client.chat.completions.with_raw_response.create(model="m", messages=QUESTION)
    assert response.headers["x-tidegate-backend"] == "a"
    assert response.headers["x-ratelimit-limit-requests"] == "1000"
    row = await proxy.row_of(response.headers["x-request-id"])
    parsed = response.parse()
    assert parsed.usage is not None
    assert (row.prompt_tokens, row.completion_tokens) == (
        parsed.usage.prompt_tokens,
        parsed.usage.completion_tokens,
    )


@pytest.mark.parametrize("usage", [None, False, True])
async def test_streams_with_and_without_usage_and_two_choices(
    usage: bool | None, proxy: Proxy, client: openai.AsyncOpenAI
) -> None:
    options: dict[str, Any] = {} if usage is None else {"stream_options": {"include_usage": usage}}
    whole = await client.chat.completions.create(model="m", messages=QUESTION, n=2)
    texts, found = ["", ""], []
    stream = await client.chat.completions.create(model="m", messages=QUESTION, n=2, stream=True, **options)
    async for event in stream:
        for choice in event.choices:
            texts[choice.index] += choice.delta.content or ""
        found += [event.usage] if event.usage is not None else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert whole.usage is not None
    assert [u.completion_tokens for u in found] == ([whole.usage.completion_tokens] if usage else [])
    await proxy.idle()
    rows = [record.row for record in proxy.runtime.observer.recent]
    assert {(row.prompt_tokens, row.completion_tokens) for row in rows} == {
        (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    }
    assert {row.outcome for row in rows} == {"ok"}


async def test_tools(client: openai.AsyncOpenAI) -> None:
    forced: Any = {"type": "function", "function": {"name": "weather"}}
    whole = await client.chat.completions.create(
        model="m", messages=QUESTION, tools=[WEATHER], tool_choice=forced
    )
    calls = whole.choices[0].message.tool_calls
    assert calls is not None
    arguments = getattr(calls[0], "function").arguments  # noqa: B009 - a union of kinds of calls
    assert json.loads(arguments)["city"] in ("Paris", "Rome")
    streamed = ""
    async for event in await client.chat.completions.create(
        model="m", messages=QUESTION, tools=[WEATHER], tool_choice=forced, stream=True
    ):
        for call in event.choices[0].delta.tool_calls or ():
            if call.function is not None:
                streamed += call.function.arguments or ""
    assert json.loads(streamed) == json.loads(arguments)


class Tide(pydantic.BaseModel):
    height_m: float
    rising: bool


async def test_structured_output(client: openai.AsyncOpenAI) -> None:
    parsed = await client.chat.completions.parse(model="m", messages=QUESTION, response_format=Tide)
    assert isinstance(parsed.choices[0].message.parsed, Tide)
    async with client.chat.completions.stream(model="m", messages=QUESTION, response_format=Tide) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.parsed == parsed.choices[0].message.parsed


async def test_errors_arrive_as_the_clients_own_exceptions(proxy: Proxy, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="none", messages=QUESTION)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError):
        await client.chat.completions.create(model="m", messages=QUESTION, n=0)
    with pytest.raises(openai.AuthenticationError) as refused:
        await client.with_options(api_key="sk-wrong").models.list()
    assert refused.value.code == "invalid_api_key"


async def test_a_stream_that_is_closed_early_frees_its_slot(
    proxy: Proxy, engine: Emulator, client: openai.AsyncOpenAI
) -> None:
    stream = await client.chat.completions.create(model="m", messages=QUESTION, stream=True, max_tokens=4000)
    async for _ in stream:
        break
    await stream.close()
    await proxy.idle()
    await eventually(lambda: engine.engine.figures().running == 0)


async def curl(*arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *("curl", "-sS", "--max-time", "20", *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode()


@pytest.mark.parametrize("version", ["--http1.1", "--http1.0"])
async def test_curl(version: str, proxy: Proxy, client: openai.AsyncOpenAI) -> None:
    url, key = f"{proxy.url}/v1/chat/completions", f"Authorization: Bearer {client.api_key}"
    common = (version, "-H", key, "-H", "Content-Type: application/json")
    code, text = await curl(*common, url, "-d", chat_body(max_tokens=5).decode())
    assert (code, json.loads(text)["usage"]["completion_tokens"]) == (0, 5)
    code, text = await curl(*common, "-N", url, "-d", chat_body(max_tokens=5, stream=True).decode())
    assert code == 0
    assert text.endswith("data: [DONE]\n\n")
    big = chat_body(max_tokens=5, user="x" * 200_000).decode()
    code, text = await curl(*common, "-H", "Expect: 100-continue", url, "--data-binary", "@-")
    assert (code, json.loads(text)["error"]["code"]) == (0, "invalid_json")  # nothing was sent
    two = (url, url, "-w", "%{num_connects}\n", "-d", big[:100_000])
    code, text = await curl(*common, *two)
    assert code == 0
    if version == "--http1.1":
        assert text.endswith("0\n")  # the second on the connection of the first
    code, text = await curl(*common, "-I", f"{proxy.url}/v1/models")
    assert (code, text.splitlines()[0]) == (0, "HTTP/1.1 200 OK")
