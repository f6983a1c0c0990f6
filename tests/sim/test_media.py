"""What the emulated endpoints of sound and pictures do, and `/v1/realtime`."""

from __future__ import annotations

import base64
import json
import wave
from io import BytesIO
from typing import Any

import aiohttp
import pytest

from sim import tokens
from sim.media_api import HEARD, TOKENS_PER_PICTURE, picture, seconds_of, wave_header
from tests.sim.emulated import Client, client, events

TWO_SECONDS = bytes(2 * 32_000)


def upload(**fields: str) -> aiohttp.FormData:
    form = aiohttp.FormData({"model": "demo", **fields})
    form.add_field(
        "file", wave_header(len(TWO_SECONDS)) + TWO_SECONDS, filename="tide.wav", content_type="audio/wav"
    )
    return form


async def hear(http: Client, path: str = "transcriptions", **fields: str) -> aiohttp.ClientResponse:
    return await http.session.post(f"{http.server.url}/v1/audio/{path}", data=upload(**fields))


async def test_a_transcript_says_how_long_its_sound_was() -> None:
    async with client(media=True) as http:
        assert await (await hear(http)).json() == {"text": HEARD, "usage": {"type": "duration", "seconds": 2}}
        assert await (await hear(http, "translations")).json() == {"text": HEARD}
        verbose = await (await hear(http, response_format="verbose_json")).json()
    assert (verbose["duration"], verbose["text"]) == (2.0, HEARD)


async def test_a_streamed_transcript_has_the_usage_that_was_asked_for() -> None:
    async with client(media=True) as http:
        plain = events(await (await hear(http, stream="true")).read())
        last = events(await (await hear(http, stream="True", stream_include_usage="true")).read())
        asked = {"stream_include_usage": "true", "stream_continuous_usage_stats": "true"}
        every = events(await (await hear(http, stream="true", **asked)).read())
    assert "".join(event["choices"][0]["delta"]["content"] for event in plain) == HEARD
    assert not any("usage" in event for event in plain)
    count = len(tokens.split(HEARD))
    usage = {"prompt_tokens": 104, "total_tokens": 104 + count, "completion_tokens": count}
    assert [event.get("usage") for event in last[-2:]] == [None, usage]
    assert last[-1]["choices"] == []
    assert all("usage" in event for event in every)
    assert plain[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": "other"}, "does not exist"),
        ({"stream_include_usage": "true"}, "Stream options can only be defined when `stream=True`."),
    ],
)
async def test_a_wrong_transcript_is_refused(fields: dict[str, str], said: str) -> None:
    async with client(media=True) as http:
        answer = await hear(http, **fields)
        assert answer.status in (400, 404)
        assert said in (await answer.json())["error"]["message"]
        without = await http.post("/v1/audio/transcriptions", b"", headers={"Content-Type": "text/plain"})
        assert without.status == 400


async def test_speech_is_a_wave_and_grows_with_its_text() -> None:
    async with client(media=True) as http:
        sizes = []
        for text in ("sea", "The tide comes in."):
            answer = await http.post("/v1/audio/speech", {"model": "demo", "input": text, "voice": "x"})
            assert answer.content_type == "audio/wav"
            sound = await answer.read()
            with wave.open(BytesIO(wave_header(len(sound) - 44) + sound[44:])) as read:
                assert (read.getnchannels(), read.getframerate()) == (1, 16_000)
                sizes.append(read.getnframes())
    assert sizes[0] < sizes[1]


async def test_speech_in_events_ends_with_its_usage() -> None:
    async with client(media=True) as http:
        answer = await http.post(
            "/v1/audio/speech", {"model": "demo", "input": "sea", "stream_format": "sse"}
        )
        lines = (await answer.read()).decode().split("\n\n")[:-1]
    found = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert base64.b64decode(found[0]["audio"])
    assert found[-1]["type"] == "speech.audio.done"
    assert found[-1]["usage"]["output_tokens"] == 2


async def test_pictures() -> None:
    async with client(media=True) as http:
        answer = await http.post("/v1/images/generations", {"model": "demo", "prompt": "a tide", "n": 2})
        document = await answer.json()
        streamed = await http.post("/v1/images/generations", {"model": "demo", "prompt": "x", "stream": True})
        last = json.loads((await streamed.read()).partition(b"data: ")[2])
        too_many = await http.post("/v1/images/generations", {"model": "demo", "prompt": "x", "n": 11})
        form = upload(prompt="a tide", n="1")
        form.add_field("image", picture(), filename="tide.png", content_type="image/png")
        edited = await http.session.post(f"{http.server.url}/v1/images/edits", data=form)
        assert len((await edited.json())["data"]) == 1
        without = await http.session.post(f"{http.server.url}/v1/images/variations", data=upload())
    assert [base64.b64decode(one["b64_json"]) for one in document["data"]] == [picture()] * 2
    assert document["usage"]["output_tokens"] == 2 * TOKENS_PER_PICTURE
    assert last["type"] == "image_generation.completed"
    assert (too_many.status, without.status) == (400, 400)


def test_the_length_of_a_sound_is_in_its_header() -> None:
    assert seconds_of(wave_header(32_000) + bytes(32_000)) == 1.0
    assert seconds_of(bytes(16_000)) == 0.5


async def test_what_serves_sound_makes_no_text() -> None:
    async with client(media=True) as http:
        assert (await http.post("/v1/chat/completions", {})).status == 404
    async with client() as http:
        assert (await hear(http)).status == 404


# Realtime


async def talk(http: Client, *said: dict[str, Any], until: str) -> list[dict[str, Any]]:
    """Say it all; the events up to the first of a kind."""
    heard = []
    async with http.session.ws_connect(f"{http.server.url}/v1/realtime?model=demo") as socket:
        for event in said:
            await socket.send_json(event)
        async for message in socket:
            heard.append(message.json())
            if heard[-1]["type"] == until:
                break
    return heard


async def test_sound_that_is_sent_in_pieces_is_heard() -> None:
    piece = base64.b64encode(bytes(32_000)).decode()
    append = {"type": "input_audio_buffer.append", "audio": piece}
    commit = {"type": "input_audio_buffer.commit"}
    async with client(media=True) as http:
        heard = await talk(
            http,
            {"type": "session.update", "model": "demo"},
            commit,
            append,
            append,
            {**commit, "final": True},
            until="transcription.done",
        )
    assert heard[0]["type"] == "session.created"
    assert "".join(event["delta"] for event in heard[1:-1]) == heard[-1]["text"] == HEARD
    assert heard[-1]["usage"]["prompt_tokens"] == 100


async def test_a_message_of_text_is_answered() -> None:
    item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "What is a tide?"}]}
    async with client(media=True) as http:
        heard = await talk(
            http,
            {"type": "conversation.item.create", "item": item},
            {"type": "response.create"},
            until="response.done",
        )
    usage = heard[-1]["response"]["usage"]
    assert usage["input_tokens"] == len(tokens.split("What is a tide?"))
    assert usage["output_tokens"] == len(tokens.split(HEARD))


@pytest.mark.parametrize(
    ("event", "code"),
    [
        ({"type": "input_audio_buffer.commit"}, "model_not_validated"),
        ({"type": "input_audio_buffer.append", "audio": "?"}, "invalid_audio"),
        ({"type": "session.update"}, "invalid_event"),
        ({"type": "session.update", "model": "other"}, "processing_error"),
        ({"type": "hello"}, "unknown_event"),
        ([], "invalid_json"),
    ],
)
async def test_a_wrong_event_is_told_and_the_session_goes_on(event: Any, code: str) -> None:
    async with client(media=True) as http:
        heard = await talk(http, event, until="error")
    assert heard[-1]["code"] == code
