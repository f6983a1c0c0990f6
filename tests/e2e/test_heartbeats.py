"""Heartbeats before the clients that people use: each reads its answer as if there had been none, and raises its
own exception when there is no answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import anthropic
import httpx
import litellm
import openai
import pytest
from langchain_openai import ChatOpenAI

from policies.base import Outcome, RequestFacts
from proxy.heartbeat import HEARTBEAT
from proxy.records import Row
from proxy.tasks import Tasks
from sim.emulator import Emulator, EmulatorSettings, emulator
from tests.e2e.proxy_fixtures import HELLO, Proxy, StartProxy, chat, eventually
from tests.e2e.test_clients import curl

pytestmark = pytest.mark.e2e

QUESTION: list[Any] = HELLO
TOKENS = 12
BEATS = 2

Ask: TypeAlias = Callable[[str], Awaitable[str]]
"""A client's streamed question to the proxy at a URL. -> the text of the answer."""


async def by_openai(url: str) -> str:
    text = ""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        chunks = await client.chat.completions.create(
            model="m", messages=QUESTION, max_tokens=TOKENS, stream=True
        )
        async for chunk in chunks:
            text += chunk.choices[0].delta.content or ""
    return text


async def by_openai_in_a_thread(url: str) -> str:
    """Its other client, which reads the lines by other code."""

    def talk() -> str:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            chunks = client.chat.completions.create(
                model="m", messages=QUESTION, max_tokens=TOKENS, stream=True
            )
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    return await asyncio.to_thread(talk)


async def by_openai_responses(url: str) -> str:
    text = ""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        events = await client.responses.create(
            model="m", input=QUESTION[0]["content"], max_output_tokens=TOKENS, stream=True
        )
        async for event in events:
            if event.type == "response.output_text.delta":
                text += event.delta
    return text


async def by_anthropic(url: str) -> str:
    text = ""
    async with (
        anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client,
        client.messages.stream(model="m", messages=QUESTION, max_tokens=TOKENS) as stream,
    ):
        async for piece in stream.text_stream:
            text += piece
    return text


async def by_langchain(url: str) -> str:
    options: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": "none", "model": "m", "max_tokens": TOKENS}
    async with httpx.AsyncClient() as connections:  # its own outlives the loop
        model = ChatOpenAI(**options, max_retries=0, http_async_client=connections)
        return "".join([str(chunk.content) async for chunk in model.astream(QUESTION[0]["content"])])


async def by_litellm(url: str) -> str:
    chunks: Any = await litellm.acompletion(
        model="openai/m",
        messages=QUESTION,
        max_tokens=TOKENS,
        stream=True,
        api_base=f"{url}/v1",
        api_key="none",
        num_retries=0,
    )
    return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])


CLIENTS = [
    by_openai,
    by_openai_in_a_thread,
    by_openai_responses,
    by_anthropic,
    by_langchain,
    by_litellm,
]
each = pytest.mark.parametrize("ask", CLIENTS, ids=lambda ask: ask.__name__)


@pytest.fixture
async def engine() -> AsyncIterator[Emulator]:
    settings = EmulatorSettings(models=("m",), speed=100, shutdown_timeout_s=0.1)
    async with emulator(settings) as running:
        yield running


@pytest.fixture
async def proxy(engine: Emulator, start_proxy: StartProxy) -> Proxy:
    """Deadlines are looked at four times a second, so it beats as often."""
    return await start_proxy({"url": engine.url, "slots": 1}, timeouts={"heartbeat": "1ms"})


@contextmanager
def full(proxy: Proxy) -> Iterator[None]:
    """Meanwhile the only slot is taken."""
    runtime = proxy.runtime
    lease = runtime.fleet.lease(RequestFacts("somebody", "m"), "a", runtime.now())
    try:
        yield
    finally:
        runtime.fleet.release(lease, Outcome.IGNORED, runtime.now())
        runtime.poll(runtime.now())


async def beaten(proxy: Proxy) -> None:
    """Wait until who is held has had some heartbeats."""
    times: set[float] = set()

    def enough() -> bool:
        times.update(exchange.beat_at for exchange in proxy.runtime.held.values() if exchange.head_sent)
        return len(times) >= BEATS

    await eventually(enough)


def row_of_the_last(proxy: Proxy) -> Row:
    row: Row = proxy.runtime.observer.recent[-1].row
    return row


@each
async def test_a_client_reads_its_answer_behind_them(ask: Ask, proxy: Proxy) -> None:
    expected = await ask(proxy.url)
    assert expected
    tasks = Tasks()
    with full(proxy):
        asking = tasks.spawn(ask(proxy.url), "client")
        await beaten(proxy)
    assert await asking == expected
    await proxy.idle()
    row = row_of_the_last(proxy)
    assert (row.outcome, row.status, row.completion_tokens) == ("ok", 200, TOKENS)
    assert row.queue_s > 0


@each
async def test_a_client_raises_its_own_error_behind_them(
    ask: Ask, engine: Emulator, start_proxy: StartProxy
) -> None:
    timeouts = {"heartbeat": "1ms", "total": "600ms"}
    proxy = await start_proxy({"url": engine.url, "slots": 1}, timeouts=timeouts)
    with full(proxy), pytest.raises(Exception, match="deadline passed while it was held") as raised:
        await ask(proxy.url)
    assert type(raised.value).__module__.partition(".")[0] in ("openai", "anthropic", "litellm")
    await proxy.idle()
    row = row_of_the_last(proxy)
    assert (row.outcome, row.status, row.code, row.usage_source) == ("rejected", 200, "queue_timeout", "none")


async def test_curl_shows_them(proxy: Proxy) -> None:
    tasks = Tasks()
    with full(proxy):
        arguments = ("-N", "-i", f"{proxy.url}/v1/chat/completions", "-d")
        body = chat(stream=True, max_tokens=TOKENS).partition(b"\r\n\r\n")[2].decode()
        asking = tasks.spawn(curl(*arguments, body), "curl")
        await beaten(proxy)
    code, text = await asking
    assert code == 0
    head, _, events = text.partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 200 OK")
    assert "content-type: text/event-stream" in head
    assert "x-tidegate-backend" not in head
    assert events.startswith(HEARTBEAT.decode() * BEATS)
    assert events.endswith("data: [DONE]\n\n")


async def test_a_client_that_leaves_while_it_is_held_frees_its_place(proxy: Proxy) -> None:
    with full(proxy):
        client = await proxy.connect()
        await client.send(chat(stream=True))
        await beaten(proxy)
        client.reset()
        await eventually(lambda: not proxy.runtime.held)
    row = row_of_the_last(proxy)
    assert (row.outcome, row.status, row.attempts, row.usage_source) == ("client_gone", 200, 0, "none")
    await proxy.idle()
