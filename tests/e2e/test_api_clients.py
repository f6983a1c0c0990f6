"""Clients of the other endpoints, through the proxy to the emulated engine: the official ones of OpenAI (responses,
embeddings) and Anthropic, and LiteLLM. Each request leaves one row, with the tokens that its client was told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import anthropic
import openai
import pytest

from proxy.records import Row
from sim.emulator import Emulator, EmulatorSettings, emulator
from tests.e2e.backends import dead_port
from tests.e2e.proxy_fixtures import MakeKey, Proxy, StartProxy, eventually

pytestmark = pytest.mark.e2e

QUESTION: list[Any] = [{"role": "user", "content": "What is a tide?"}]
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
}


@pytest.fixture
async def engine() -> AsyncIterator[Emulator]:
    settings = EmulatorSettings(
        models=("m",), speed=100, shutdown_timeout_s=0.1, prompt_tokens_details=True, control=True
    )
    async with emulator(settings) as running:
        yield running


@pytest.fixture
async def pooling() -> AsyncIterator[Emulator]:
    settings = EmulatorSettings(models=("vectors",), speed=100, shutdown_timeout_s=0.1, pooling=True)
    async with emulator(settings) as running:
        yield running


@pytest.fixture
def key(make_key: MakeKey) -> str:
    return make_key(tenant="acme", rpm=1000).removeprefix("authorization: Bearer ")


@pytest.fixture
async def proxy(engine: Emulator, pooling: Emulator, key: str, start_proxy: StartProxy) -> Proxy:
    return await start_proxy(
        {"url": engine.url}, {"url": pooling.url, "models": ["vectors"]}, aliases={"gpt-4": "m"}
    )


@pytest.fixture
async def client(proxy: Proxy, key: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key=key, max_retries=0) as made:
        yield made


@pytest.fixture
async def claude(proxy: Proxy, key: str) -> AsyncIterator[anthropic.AsyncAnthropic]:
    """It sends its key in `x-api-key`."""
    async with anthropic.AsyncAnthropic(base_url=proxy.url, api_key=key, max_retries=0) as made:
        yield made


async def rows(proxy: Proxy) -> list[Row]:
    """Those of all requests, the first one first."""
    await proxy.idle()
    return [record.row for record in proxy.runtime.observer.recent]


def used(row: Row) -> tuple[int, int]:
    return row.prompt_tokens, row.completion_tokens


# Responses


async def test_responses(proxy: Proxy, client: openai.AsyncOpenAI) -> None:
    whole = await client.responses.create(model="gpt-4", input="What is a tide?")
    text, last = "", None
    async for event in await client.responses.create(model="m", input="What is a tide?", stream=True):
        if event.type == "response.output_text.delta":
            text += event.delta
        last = event
    assert text == whole.output_text != ""
    assert last is not None
    assert last.type == "response.completed"
    assert whole.usage is not None
    assert last.response.usage is not None
    first, second = await rows(proxy)
    assert used(first) == (whole.usage.input_tokens, whole.usage.output_tokens)
    assert used(second) == (last.response.usage.input_tokens, last.response.usage.output_tokens)
    assert (first.outcome, second.outcome, second.usage_source) == ("ok", "ok", "reported")
    assert second.ttft_s is not None


async def test_stored_responses(proxy: Proxy, client: openai.AsyncOpenAI, make_key: MakeKey) -> None:
    made = await client.responses.create(model="m", input="What is a tide?")
    assert await client.responses.retrieve(made.id) == made
    again = await client.responses.create(model="m", input="Why?", previous_response_id=made.id)
    assert again.previous_response_id == made.id
    with pytest.raises(openai.BadRequestError, match="synchronous"):
        await client.responses.cancel(made.id)
    other = make_key(tenant="other").removeprefix("authorization: Bearer ")
    await eventually(lambda: len(proxy.runtime.keys.ids) == 2)
    async with openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key=other, max_retries=0) as stranger:
        with pytest.raises(openai.NotFoundError, match="there is no response"):
            await stranger.responses.retrieve(made.id)
    found = {row.endpoint: used(row) for row in await rows(proxy) if row.endpoint != "responses"}
    assert found == {"responses-get": (0, 0), "responses-cancel": (0, 0)}


async def test_stored_responses_are_found_after_a_restart(
    engine: Emulator, start_proxy: StartProxy, key: str
) -> None:
    first = await start_proxy({"url": engine.url})
    async with openai.AsyncOpenAI(base_url=f"{first.url}/v1", api_key=key) as client:
        made = await client.responses.create(model="m", input="What is a tide?")
    await first.service.stop()
    second = await start_proxy({"url": engine.url})
    async with openai.AsyncOpenAI(base_url=f"{second.url}/v1", api_key=key, max_retries=0) as client:
        assert await client.responses.retrieve(made.id) == made


async def test_a_background_response_is_counted_once(proxy: Proxy, client: openai.AsyncOpenAI) -> None:
    made = await client.responses.create(model="m", input="What is a tide?", background=True)
    async with asyncio.timeout(30):
        found = made
        while found.status == "queued":
            found = await client.responses.retrieve(made.id)
    await client.responses.retrieve(made.id)
    assert found.usage is not None
    counted = [row.completion_tokens for row in await rows(proxy)]
    assert counted[-2:] == [found.usage.output_tokens, 0]
    assert sum(counted) == found.usage.output_tokens


async def test_a_response_that_breaks_off_raises(
    engine: Emulator, proxy: Proxy, client: openai.AsyncOpenAI
) -> None:
    async with aiohttp.ClientSession() as session:
        await session.post(f"{engine.url}/emulator/fault", json={"kind": "cut", "share": 1})
    stream = await client.responses.create(model="m", input="What is a tide?", stream=True)
    with pytest.raises(openai.APIError, match="closed the connection"):
        _ = [event async for event in stream]
    [row] = await rows(proxy)
    assert (row.outcome, row.usage_source) == ("cut", "estimated")
    assert row.completion_tokens > 0


# Messages


async def test_messages(proxy: Proxy, claude: anthropic.AsyncAnthropic) -> None:
    whole = await claude.messages.create(model="m", max_tokens=2000, messages=QUESTION)
    async with claude.messages.stream(model="m", max_tokens=2000, messages=QUESTION) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        final = await stream.get_final_message()
    assert [block.text for block in whole.content if block.type == "text"] == [text]
    counted = await claude.messages.count_tokens(model="m", messages=QUESTION)
    first, second, third = await rows(proxy)
    for row, message in ((first, whole), (second, final)):
        usage = message.usage
        cached = usage.cache_read_input_tokens or 0
        prompt = usage.input_tokens + cached + (usage.cache_creation_input_tokens or 0)
        assert (row.prompt_tokens, row.cached_tokens) == (prompt, cached)
        assert (row.completion_tokens, row.outcome) == (usage.output_tokens, "ok")
        assert counted.input_tokens == prompt
    assert (used(third), third.usage_source) == ((0, 0), "none")


async def test_messages_with_tools(claude: anthropic.AsyncAnthropic) -> None:
    tools: Any = [{"name": "weather", "input_schema": WEATHER}]
    whole = await claude.messages.create(
        model="m", max_tokens=99, messages=QUESTION, tools=tools, tool_choice={"type": "any"}
    )
    async with claude.messages.stream(
        model="m", max_tokens=99, messages=QUESTION, tools=tools, tool_choice={"type": "any"}
    ) as stream:
        final = await stream.get_final_message()
    for message in (whole, final):
        [block] = message.content
        assert block.type == "tool_use"
        assert block.input == {"city": "Paris"}


async def test_errors_are_anthropics_own_exceptions(proxy: Proxy, claude: anthropic.AsyncAnthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        await claude.messages.create(model="x", max_tokens=9, messages=QUESTION)
    assert missing.value.body == {
        "type": "error",
        "error": {"type": "not_found_error", "message": "the model 'x' does not exist"},
    }
    with pytest.raises(anthropic.BadRequestError, match="maximum context"):  # the engine's own
        await claude.messages.create(
            model="m", max_tokens=8000, messages=[QUESTION[0] | {"content": "x " * 999}]
        )
    async with anthropic.AsyncAnthropic(base_url=proxy.url, api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(anthropic.AuthenticationError):
            await stranger.messages.create(model="m", max_tokens=9, messages=QUESTION)


async def test_a_message_that_breaks_off_raises(
    engine: Emulator, proxy: Proxy, claude: anthropic.AsyncAnthropic
) -> None:
    async with aiohttp.ClientSession() as session:
        await session.post(f"{engine.url}/emulator/fault", json={"kind": "cut", "share": 1})
    async with claude.messages.stream(model="m", max_tokens=999, messages=QUESTION) as stream:
        with pytest.raises(anthropic.APIStatusError, match="closed the connection"):
            await stream.get_final_message()
    [row] = await rows(proxy)
    assert (row.outcome, row.usage_source) == ("cut", "estimated")
    assert row.prompt_tokens > 0
    assert row.completion_tokens > 0


async def test_a_backend_that_cannot_be_reached_is_an_api_error(key: str, start_proxy: StartProxy) -> None:
    proxy = await start_proxy({"url": f"http://127.0.0.1:{dead_port()}"})
    async with anthropic.AsyncAnthropic(base_url=proxy.url, api_key=key, max_retries=0) as client:
        with pytest.raises(anthropic.InternalServerError) as caught:
            await client.messages.create(model="m", max_tokens=9, messages=QUESTION)
    assert caught.value.status_code == 500


# Embeddings and their kin


async def test_embeddings(proxy: Proxy, client: openai.AsyncOpenAI) -> None:
    for form in ("float", "base64"):
        found = await client.embeddings.create(
            model="vectors", input=["one", "two three"], encoding_format=form
        )
        assert found.usage.prompt_tokens == 3
    assert [used(row) for row in await rows(proxy)] == [(3, 0), (3, 0)]
    with pytest.raises(openai.NotFoundError):
        await client.embeddings.create(model="m", input="one")  # that backend makes text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/rerank", {"query": "q", "documents": ["a", "b"]}),
        ("/rerank", {"query": "q", "documents": ["a", "b"]}),
        ("/v2/rerank", {"query": "q", "documents": ["a", "b"]}),
        ("/v1/score", {"text_1": "q", "text_2": ["a", "b"]}),
        ("/score", {"text_1": "q", "text_2": ["a", "b"]}),
        ("/pooling", {"input": "one"}),
        ("/classify", {"input": "one"}),
    ],
)
async def test_pooling(path: str, body: dict[str, Any], proxy: Proxy, key: str) -> None:
    fields = {"authorization": f"Bearer {key}"}
    async with (
        aiohttp.ClientSession(headers=fields) as session,
        session.post(proxy.url + path, json={"model": "vectors", **body}) as response,
    ):
        document = await response.json()
        assert response.status == 200
    [row] = await rows(proxy)
    assert row.prompt_tokens == document["usage"]["prompt_tokens"] > 0
    assert row.usage_source == "reported"


# LiteLLM


async def test_litellm(proxy: Proxy, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    options: dict[str, Any] = {"api_base": f"{proxy.url}/v1", "api_key": key, "num_retries": 0}
    try:
        whole: Any = await litellm.acompletion(model="openai/m", messages=QUESTION, **options)
        stream: Any = await litellm.acompletion(model="openai/m", messages=QUESTION, stream=True, **options)
        text = "".join([part.choices[0].delta.content or "" async for part in stream])
        vectors: Any = await litellm.aembedding(
            model="openai/vectors", input=["one"], encoding_format="float", **options
        )
        message: Any = await litellm.acompletion(
            model="anthropic/m", messages=QUESTION, max_tokens=99, api_base=proxy.url, api_key=key
        )
        with pytest.raises(litellm.NotFoundError):
            await litellm.acompletion(model="openai/x", messages=QUESTION, **options)
    finally:
        await litellm.close_litellm_async_clients()
    assert text == whole.choices[0].message.content != ""
    first, second, third, fourth, last = await rows(proxy)
    assert used(first) == used(second) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    assert used(third) == (vectors.usage.prompt_tokens, 0)
    assert used(fourth) == (message.usage.prompt_tokens, message.usage.completion_tokens)
    assert [row.endpoint for row in (first, third, fourth)] == ["chat", "embeddings", "messages"]
    assert last.code == "model_not_found"
