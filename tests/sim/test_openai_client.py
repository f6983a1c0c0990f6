"""The official client against the emulator: what our users' programs do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import openai
import pydantic
import pytest
import pytest_asyncio
from openai.types.chat import ChatCompletionMessageParam

from sim.emulator import Emulator, EmulatorSettings, emulator

QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is a tide?"}]


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Emulator]:
    settings = EmulatorSettings(
        models=("demo", "demo-reasoning"), speed=100, api_keys=("k",), shutdown_timeout_s=1
    )
    async with emulator(settings) as running:
        yield running


@pytest_asyncio.fixture
async def client(server: Emulator) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0) as made:
        yield made


async def test_sync_client(server: Emulator) -> None:
    def talk() -> tuple[str, str, list[str]]:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0) as sync:
            whole = sync.chat.completions.create(model="demo", messages=QUESTION)
            stream = sync.chat.completions.create(model="demo", messages=QUESTION, stream=True)
            text = "".join(event.choices[0].delta.content or "" for event in stream)
            return whole.choices[0].message.content or "", text, [model.id for model in sync.models.list()]

    whole, streamed, models = await asyncio.to_thread(talk)
    assert whole == streamed != ""
    assert models == ["demo", "demo-reasoning"]


async def test_async_client(client: openai.AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(model="demo", messages=QUESTION, n=2)
    assert len(whole.choices) == 2
    assert whole.usage is not None
    stream = await client.chat.completions.create(
        model="demo", messages=QUESTION, n=2, stream=True, stream_options={"include_usage": True}
    )
    texts, usage = ["", ""], None
    async for event in stream:
        for choice in event.choices:
            texts[choice.index] += choice.delta.content or ""
        usage = event.usage or usage
    assert texts == [choice.message.content for choice in whole.choices]
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


async def test_completions(client: openai.AsyncOpenAI) -> None:
    whole = await client.completions.create(model="demo", prompt="Once", max_tokens=8)
    stream = await client.completions.create(model="demo", prompt="Once", max_tokens=8, stream=True)
    assert whole.choices[0].text == "".join([event.choices[0].text async for event in stream])


class Step(pydantic.BaseModel):
    explanation: str = pydantic.Field(min_length=3)
    next: Step | None


class Plan(pydantic.BaseModel):
    steps: list[Step] = pydantic.Field(min_length=2)
    ready: bool
    level: float = pydantic.Field(gt=1)


async def test_structured_output(client: openai.AsyncOpenAI) -> None:
    parsed = await client.chat.completions.parse(model="demo", messages=QUESTION, response_format=Plan)
    plan = parsed.choices[0].message.parsed
    assert plan is not None
    assert len(plan.steps) == 2


async def test_tools_in_a_stream(client: openai.AsyncOpenAI) -> None:
    tool = openai.pydantic_function_tool(Plan)
    async with client.chat.completions.stream(
        model="demo", messages=QUESTION, tools=[tool], tool_choice="required"
    ) as stream:
        final = await stream.get_final_completion()
    [choice] = final.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    [call] = choice.message.tool_calls
    assert call.function.name == "Plan"
    Plan.model_validate(json.loads(call.function.arguments))


async def test_reasoning(client: openai.AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(model="demo-reasoning", messages=QUESTION)
    assert whole.choices[0].message.reasoning_content  # type: ignore[attr-defined]


async def test_errors_are_the_ones_the_client_knows(server: Emulator, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        await client.chat.completions.create(model="nope", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="max_model_len"):
        await client.chat.completions.create(model="demo", messages=QUESTION, max_tokens=1_000_000)
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="wrong").models.list()
    assert server.engine.figures()[:2] == (0, 0)
