"""Endpoints of sound and pictures (`--runner media`). Transcripts are in vLLM's shapes; speech and pictures, which
a vLLM alone does not make, in OpenAI's.

What is heard and drawn is always the same. How many tokens it has follows from what was sent; its time, from them.
"""

from __future__ import annotations

import base64
import math
import struct
import time
import zlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

import orjson
from aiohttp import web
from aiohttp.web_request import FileField

from sim import tokens
from sim.completion import Completion
from sim.generation import SequencePlan
from sim.openai_request import RequestBase, RequestError, bad_value, parse
from sim.openai_shapes import CacheUse

if TYPE_CHECKING:
    from sim.openai_server import Face

HEARD = "The tide comes in, stays for a while, and goes out again."
TOKENS_PER_S = 50
"""Of sound: Whisper has 1500 in half a minute."""
SAMPLE_RATE = 16_000
"""Of speech, one channel of 16 bits."""
SAMPLES_PER_TOKEN = 1280
TOKENS_PER_PICTURE = 64


def picture() -> bytes:
    """A PNG of one blue point."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    row = zlib.compress(b"\0\0\x60\xa0")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")


def wave_header(size: int) -> bytes:
    """In front of `size` bytes of speech; 0: nobody knows how many."""
    size = size or 0xFFFFFFFF - 36
    riff = struct.pack("<4sI4s", b"RIFF", size + 36, b"WAVE")
    shape = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16)
    return riff + shape + struct.pack("<4sI", b"data", size)


def seconds_of(sound: bytes) -> float:
    """How long a WAV lasts; anything else as if it were speech without a header."""
    if len(sound) >= 44 and sound[:4] == b"RIFF" and sound[8:12] == b"WAVE":
        rate = int.from_bytes(sound[28:32], "little")
        return (len(sound) - 44) / rate if rate else 0.0
    return len(sound) / (2 * SAMPLE_RATE)


class SpeechRequest(RequestBase):
    """Body of /v1/audio/speech."""

    input: str
    voice: str | None = None
    response_format: Literal["wav", "pcm"] = "wav"
    stream_format: Literal["audio", "sse"] = "audio"


class ImageRequest(RequestBase):
    """Body of /v1/images/generations."""

    prompt: str
    n: int = 1
    stream: bool | None = False


class TranscriptShapes:
    """Events and body of one transcript."""

    def __init__(self, kind: str, model: str, seconds: float, fields: dict[str, Any]) -> None:
        """`kind`: `transcription` or `translation`."""
        self.pieces = tokens.split(HEARD)
        self.prompt_tokens = math.ceil(seconds * TOKENS_PER_S) + 4  # the task is told in four
        self._kind = kind
        self._seconds = seconds
        self._fields = fields
        self._head = {
            "id": f"{kind}-{uuid4().hex[:16]}",
            "object": f"{kind}.chunk",
            "created": int(time.time()),
            "model": model,
        }

    def first(self) -> list[bytes]:
        """Nothing comes before the text."""
        return []

    def step(self, index: int, done: int, new: int, last: bool) -> list[bytes]:
        """One event."""
        choice: dict[str, Any] = {"delta": {"content": "".join(self.pieces[done : done + new])}}
        if done + new == len(self.pieces):
            choice |= {"finish_reason": "stop", "stop_reason": None}
        document = {**self._head, "choices": [choice]}
        if is_true(self._fields.get("stream_include_usage")) and is_true(
            self._fields.get("stream_continuous_usage_stats")
        ):
            document["usage"] = self._usage(done + new)
        return [b"data: " + orjson.dumps(document) + b"\n\n"]

    def usage_event(self, completion_tokens: int, cache: CacheUse) -> bytes:
        """The event behind the text."""
        document = {**self._head, "choices": [], "usage": self._usage(completion_tokens)}
        return b"data: " + orjson.dumps(document) + b"\n\n"

    def body(self, cache: CacheUse) -> bytes:
        """The whole transcript."""
        document: dict[str, Any] = {"text": HEARD}
        if self._fields.get("response_format") == "verbose_json":
            language = self._fields.get("language") or "en"
            document = {"duration": self._seconds, "language": language, "text": HEARD, "segments": []}
        elif self._kind == "transcription":
            document["usage"] = {"type": "duration", "seconds": math.ceil(self._seconds)}
        return orjson.dumps(document)

    def _usage(self, completion_tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
            "completion_tokens": completion_tokens,
        }


class MediaApi:
    """The endpoints."""

    def __init__(self, face: Face) -> None:
        self._face = face

    def add_routes(self, app: web.Application) -> None:
        """Add the paths."""
        app.router.add_post("/v1/audio/transcriptions", self._transcribe)
        app.router.add_post("/v1/audio/translations", self._translate)
        app.router.add_post("/v1/audio/speech", self._speak)
        app.router.add_post("/v1/images/generations", self._draw)
        app.router.add_post("/v1/images/edits", self._edit)
        app.router.add_post("/v1/images/variations", self._vary)

    # Sound

    async def _transcribe(self, request: web.Request) -> web.StreamResponse:
        return await self._hear(request, "transcription")

    async def _translate(self, request: web.Request) -> web.StreamResponse:
        return await self._hear(request, "translation")

    async def _hear(self, request: web.Request, kind: str) -> web.StreamResponse:
        fields = await self._form(request)
        stream = is_true(fields.get("stream"))
        if not stream and is_true(fields.get("stream_include_usage")):
            message = "Stream options can only be defined when `stream=True`."
            raise bad_value("stream_include_usage", True, message)
        shapes = TranscriptShapes(
            kind, self._face.settings.models[0], seconds_of(_file(fields, "file")), fields
        )
        plan = self._plan(shapes.prompt_tokens, len(shapes.pieces))
        usage = is_true(fields.get("stream_include_usage"))
        return await self._face.serve(request, Completion(shapes, [plan], stream, usage, 0))

    async def _speak(self, request: web.Request) -> web.StreamResponse:
        body = parse(SpeechRequest, await request.read())
        self._face.check_model(body.model)
        pieces = tokens.split(body.input)
        plan = self._plan(len(pieces), max(2 * len(pieces), 1))
        if body.stream_format == "sse":
            return await self._speak_in_events(request, plan)
        wave = body.response_format == "wav"
        response = web.StreamResponse(headers={"Content-Type": "audio/wav" if wave else "audio/pcm"})
        async with aclosing(self._spoken(plan)) as spoken:
            async for sound in spoken:
                if not response.prepared:
                    await response.prepare(request)
                    if wave:
                        await response.write(wave_header(0))
                await response.write(sound)
        await response.write_eof()
        return response

    async def _speak_in_events(self, request: web.Request, plan: SequencePlan) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        async with aclosing(self._spoken(plan)) as spoken:
            async for sound in spoken:
                delta = {"type": "speech.audio.delta", "audio": base64.b64encode(sound).decode()}
                await response.write(b"data: " + orjson.dumps(delta) + b"\n\n")
        done = {"type": "speech.audio.done", "usage": _usage(plan)}
        await response.write(b"data: " + orjson.dumps(done) + b"\n\n")
        await response.write_eof()
        return response

    async def _spoken(self, plan: SequencePlan) -> AsyncGenerator[bytes, None]:
        """Silence, as fast as the engine makes it."""
        async with aclosing(self._face.generate([plan])) as steps:
            async for step in steps:
                yield bytes(2 * SAMPLES_PER_TOKEN * sum(new for _, new in step))

    # Pictures

    async def _draw(self, request: web.Request) -> web.StreamResponse:
        body = parse(ImageRequest, await request.read())
        self._face.check_model(body.model)
        return await self._drawn(request, body.prompt, body.n, bool(body.stream), "image_generation")

    async def _edit(self, request: web.Request) -> web.StreamResponse:
        fields = await self._form(request)
        _file(fields, "image[]" if "image[]" in fields else "image")
        stream = is_true(fields.get("stream"))
        return await self._drawn(request, str(fields.get("prompt", "")), _n(fields), stream, "image_edit")

    async def _vary(self, request: web.Request) -> web.StreamResponse:
        fields = await self._form(request)
        _file(fields, "image")
        return await self._drawn(request, "", _n(fields), False, "image_edit")

    async def _drawn(
        self, request: web.Request, prompt: str, count: int, stream: bool, kind: str
    ) -> web.StreamResponse:
        if not 1 <= count <= 10:
            raise bad_value("n", count, "n must be between 1 and 10.")
        plan = self._plan(max(len(tokens.split(prompt)), 1), TOKENS_PER_PICTURE * count)
        image, created = base64.b64encode(picture()).decode(), int(time.time())
        if not stream:
            await self._face.compute([plan])
            document = {"created": created, "data": [{"b64_json": image}] * count, "usage": _usage(plan)}
            return web.Response(body=orjson.dumps(document), content_type="application/json")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        await self._face.compute([plan])
        document = {"b64_json": image, "created_at": created, "output_format": "png", "usage": _usage(plan)}
        name = f"{kind}.completed"
        event = b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps({"type": name, **document}))
        await response.write(event)
        await response.write_eof()
        return response

    # All

    async def _form(self, request: web.Request) -> dict[str, Any]:
        fields = dict(await request.post())
        self._face.check_model(str(fields["model"]) if "model" in fields else None)
        return fields

    def _plan(self, prompt_tokens: int, output_tokens: int) -> SequencePlan:
        """Raises RequestError (400) if it is too long."""
        longest = self._face.settings.max_model_len
        if prompt_tokens + output_tokens > longest:
            message = f"This model's maximum context length is {longest} tokens."
            raise RequestError(400, "BadRequestError", message, "input_tokens")
        return SequencePlan(prompt_tokens, output_tokens, output_tokens, "stop")


def is_true(value: object) -> bool:
    """A flag of a form, as pydantic reads it."""
    return isinstance(value, str) and value.lower() in ("true", "1", "on", "yes", "t", "y")


def _n(fields: dict[str, Any]) -> int:
    value = str(fields.get("n", "1"))
    if not value.isdecimal():
        raise bad_value("n", value, "n must be a whole number.")
    return int(value)


def _file(fields: dict[str, Any], name: str) -> bytes:
    """The content of an uploaded file. Raises RequestError (400)."""
    found = fields.get(name)
    if not isinstance(found, FileField):
        raise RequestError(400, "Bad Request", f"{name}: a file is required.", f"body.{name}")
    return found.file.read()


def _usage(plan: SequencePlan) -> dict[str, Any]:
    return {
        "input_tokens": plan.prompt_tokens,
        "output_tokens": plan.output_tokens,
        "total_tokens": plan.prompt_tokens + plan.output_tokens,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": plan.prompt_tokens},
    }
