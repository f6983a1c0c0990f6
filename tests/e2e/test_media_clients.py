"""Sound, pictures and WebSockets through the proxy to the emulated engine, by the official client and by
`websockets`. Each request leaves one row, with the tokens that its client was told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from proxy.records import Row
from sim import tokens
from sim.emulator import Emulator, EmulatorSettings, emulator
from sim.media_api import HEARD, picture, wave_header
from tests.e2e.proxy_fixtures import MakeKey, Proxy, StartProxy, eventually

pytestmark = pytest.mark.e2e

SOUND = ("tide.wav", wave_header(64_000) + bytes(64_000), "audio/wav")
PICTURE = ("tide.png", picture(), "image/png")


@pytest.fixture
async def engine() -> AsyncIterator[Emulator]:
    settings = EmulatorSettings(models=("m",), speed=100, shutdown_timeout_s=0.1, media=True)
    async with emulator(settings) as running:
        yield running


@pytest.fixture
def key(make_key: MakeKey) -> str:
    return make_key(tenant="acme", rpm=1000).removeprefix("authorization: Bearer ")


@pytest.fixture
async def proxy(engine: Emulator, key: str, start_proxy: StartProxy) -> Proxy:
    return await start_proxy({"url": engine.url}, aliases={"whisper-1": "m"})


@pytest.fixture
async def client(proxy: Proxy, key: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key=key, max_retries=0) as made:
        yield made


async def rows(proxy: Proxy) -> list[Row]:
    await proxy.idle()
    return [record.row for record in proxy.runtime.observer.recent]


def used(row: Row) -> tuple[str, int, int]:
    return row.usage_source, row.prompt_tokens, row.completion_tokens


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # of translations
async def test_transcriptions(proxy: Proxy, client: openai.AsyncOpenAI) -> None:
    whole = await client.audio.transcriptions.create(model="whisper-1", file=SOUND)
    translated = await client.audio.translations.create(model="m", file=SOUND)
    assert whole.text == translated.text == HEARD
    stream = await client.audio.transcriptions.create(model="whisper-1", file=SOUND, stream=True)
    chunks: list[Any] = [event async for event in stream]
    assert "".join(chunk.choices[0]["delta"]["content"] for chunk in chunks) == HEARD
    assert all(getattr(chunk, "usage", None) is None for chunk in chunks)
    first, second, third = await rows(proxy)
    assert (first.audio_s, first.unmetered) == (2.0, "seconds were reported, no tokens")
    assert (second.audio_s, second.unmetered) == (None, "no usage was reported")
    assert used(first) == used(second) == ("none", 0, 0)
    assert used(third) == ("reported", 104, len(tokens.split(HEARD)))
    assert {row.served_model for row in (first, second, third)} == {"m"}
    assert {row.outcome for row in (first, second, third)} == {"ok"}


async def test_a_large_upload_arrives_whole(proxy: Proxy, client: openai.AsyncOpenAI) -> None:
    size = 6_400_000
    sound = ("tide.wav", wave_header(size) + bytes(size), "audio/wav")
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        await client.audio.transcriptions.create(model="whisper-1", file=sound)
    [row] = await rows(proxy)
    assert row.body_bytes > size
    assert row.outcome == "client_error"


async def test_an_upload_that_is_too_large_is_413(
    engine: Emulator, key: str, start_proxy: StartProxy
) -> None:
    proxy = await start_proxy({"url": engine.url}, limits={"body": 16384})
    async with openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key=key, max_retries=0) as client:
        with pytest.raises(openai.APIStatusError, match="a body may have 16384 bytes") as refused:
            await client.audio.transcriptions.create(model="m", file=SOUND)
    assert refused.value.status_code == 413


async def test_speech(proxy: Proxy, client: openai.AsyncOpenAI) -> None:
    spoken = client.audio.speech.with_streaming_response.create(
        model="m", input="The tide comes in.", voice="alloy", response_format="wav"
    )
    async with spoken as response:
        sound = b"".join([piece async for piece in response.iter_bytes()])
    assert response.headers["content-type"] == "audio/wav"
    assert sound[:4] == b"RIFF"
    assert len(sound) > 44
    [row] = await rows(proxy)
    assert (row.endpoint, row.outcome, row.unmetered) == ("speech", "ok", "no usage was reported")


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # of variations
async def test_pictures(proxy: Proxy, client: openai.AsyncOpenAI) -> None:
    made = await client.images.generate(model="m", prompt="a tide")
    edited = await client.images.edit(model="m", image=[PICTURE, PICTURE], prompt="a higher tide")
    varied = await client.images.create_variation(model="m", image=PICTURE)
    for answer in (made, edited, varied):
        assert answer.data is not None
        assert answer.data[0].b64_json
    async for event in await client.images.generate(model="m", prompt="a tide", stream=True):
        assert event.type == "image_generation.completed"
    found = await rows(proxy)
    assert [row.endpoint for row in found] == ["images", "image-edits", "image-variations", "images"]
    for row, answer in zip(found, (made, edited, varied), strict=False):
        assert answer.usage is not None
        assert used(row) == ("reported", answer.usage.input_tokens, answer.usage.output_tokens)
    assert used(found[3]) == used(found[0])


# Realtime


async def test_the_official_client_talks(proxy: Proxy, client: openai.AsyncOpenAI) -> None:
    answered: list[Any] = []
    async with client.realtime.connect(model="whisper-1") as connection:
        await connection.session.update(session={"type": "realtime", "model": "m"})
        for text in ("What is a tide?", "Why?"):
            await connection.conversation.item.create(
                item={"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}
            )
            await connection.response.create()
            async for event in connection:
                if event.type == "response.done":
                    answered.append(event.response.usage)
                    break
    [row] = await rows(proxy)
    assert (row.endpoint, row.status, row.outcome, row.served_model) == ("realtime", 101, "ok", "m")
    assert used(row) == (
        "reported",
        sum(usage.input_tokens for usage in answered),
        sum(usage.output_tokens for usage in answered),
    )


def dial(proxy: Proxy, key: str, **options: Any) -> Any:
    """As browsers do: the key is a subprotocol, compression is offered."""
    url = f"ws://{proxy.service.ports.listen}/v1/realtime?model=m"
    return connect(url, subprotocols=["realtime", f"openai-insecure-api-key.{key}"], **options)


async def said(socket: ClientConnection) -> list[str]:
    """All that still comes."""
    return [str(message) async for message in socket]


async def test_a_browsers_key_is_taken(proxy: Proxy, key: str) -> None:
    async with dial(proxy, key, origin="https://app.example") as socket:
        assert socket.subprotocol == "realtime"
        assert not socket.protocol.extensions
        assert "session.created" in str(await socket.recv())
        await socket.ping()
    [row] = await rows(proxy)
    assert (row.tenant, row.outcome, row.unmetered) == ("acme", "ok", "no usage was reported")


async def test_a_wrong_key_and_a_wrong_model_are_refused(proxy: Proxy, key: str) -> None:
    with pytest.raises(InvalidStatus) as refused:
        await dial(proxy, key[:-1])
    assert refused.value.response.status_code == 401
    url = f"ws://{proxy.service.ports.listen}/v1/realtime?model=other"
    with pytest.raises(InvalidStatus) as refused:
        await connect(url, additional_headers={"Authorization": f"Bearer {key}"})
    assert refused.value.response.status_code == 404


async def test_a_stop_ends_a_session_in_a_close_frame(proxy: Proxy, key: str) -> None:
    async with dial(proxy, key) as socket:
        await socket.recv()
        stopped = asyncio.ensure_future(proxy.service.stop())  # noqa: TID251 - awaited below
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()
        await stopped
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1001
    [record] = proxy.runtime.observer.recent
    assert record.row.outcome == "shutdown"


async def test_a_drain_lets_a_session_end(engine: Emulator, key: str, start_proxy: StartProxy) -> None:
    proxy = await start_proxy({"url": engine.url}, timeouts={"drain": 60})
    async with dial(proxy, key) as socket:
        await socket.recv()
        stopped = asyncio.ensure_future(proxy.service.stop())  # noqa: TID251 - awaited below
        await eventually(lambda: proxy.runtime.draining)
        await socket.send('{"type":"response.create"}')
        while "response.done" not in str(await socket.recv()):
            pass
        assert not stopped.done()
    await stopped
    [record] = proxy.runtime.observer.recent
    assert (record.row.outcome, record.row.completion_tokens) == ("ok", len(tokens.split(HEARD)))


async def test_a_backend_that_dies_is_told_in_a_close_frame(proxy: Proxy, engine: Emulator, key: str) -> None:
    async with dial(proxy, key) as socket:
        await socket.recv()
        [exchange] = proxy.runtime.exchanges
        exchange.connection.transport.abort()
        with pytest.raises(ConnectionClosed) as closed:
            await said(socket)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1014
    [row] = await rows(proxy)
    assert (row.outcome, row.code) == ("cut", "backend_reset")


async def test_a_client_that_vanishes_ends_its_session(proxy: Proxy, key: str) -> None:
    async with dial(proxy, key) as socket:
        await socket.recv()
        socket.transport.abort()
        [row] = await rows(proxy)
    assert row.outcome == "client_gone"
