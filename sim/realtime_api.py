"""`/v1/realtime` of the emulated server, a WebSocket: vLLM's transcripts of sound that is sent in pieces, and
OpenAI's answers to messages of text (`response.create`), which a vLLM does not give.
"""

from __future__ import annotations

import base64
import binascii
import math
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import orjson
from aiohttp import WSMsgType, web

from sim import tokens
from sim.generation import SequencePlan
from sim.media_api import HEARD, TOKENS_PER_S
from sim.openai_request import RequestError

if TYPE_CHECKING:
    from sim.openai_server import Face

SAMPLE_RATE = 16_000
"""Of what is sent, one channel of 16 bits."""
LARGEST_MESSAGE = 16 * 1024 * 1024


class RealtimeApi:
    """The endpoint."""

    def __init__(self, face: Face) -> None:
        self._face = face

    def add_routes(self, app: web.Application) -> None:
        """Add the path."""
        app.router.add_get("/v1/realtime", self._connect, allow_head=False)

    async def _connect(self, request: web.Request) -> web.StreamResponse:
        self._face.check_model(request.query.get("model"))
        socket = web.WebSocketResponse(protocols=("realtime",), max_msg_size=LARGEST_MESSAGE)
        await socket.prepare(request)
        await _Session(self._face, socket).run()
        return socket


class _Session:
    """One connection."""

    def __init__(self, face: Face, socket: web.WebSocketResponse) -> None:
        self._face = face
        self._socket = socket
        self._ready = False
        """A model was named."""
        self._sound = 0
        """Bytes that wait for their transcript."""
        self._said: list[str] = []
        """Pieces of the conversation's text."""

    async def run(self) -> None:
        """Answer until the client leaves."""
        await self._send("session.created", id=f"sess-{uuid4().hex[:16]}", created=int(time.time()))
        async for message in self._socket:
            if message.type is not WSMsgType.TEXT:
                continue
            try:
                event = orjson.loads(message.data)
                if not isinstance(event, dict):
                    raise ValueError("an event is an object")
            except ValueError:
                await self._fail("Invalid JSON", "invalid_json")
                continue
            try:
                await self._handle(str(event.get("type")), event)
            except RequestError as error:
                await self._fail(error.message, "processing_error")

    async def _handle(self, kind: str, event: dict[str, Any]) -> None:
        match kind:
            case "session.update":
                await self._update(event)
            case "input_audio_buffer.append":
                try:
                    self._sound += len(base64.b64decode(str(event.get("audio")), validate=True))
                except binascii.Error:
                    await self._fail("Invalid audio data", "invalid_audio")
            case "input_audio_buffer.commit" if not self._ready:
                await self._fail("Model not validated: send a session.update event.", "model_not_validated")
            case "input_audio_buffer.commit":
                if event.get("final"):
                    await self._transcribe()
            case "conversation.item.create":
                content = event.get("item", {}).get("content", ())
                self._said += tokens.split("".join(str(part.get("text", "")) for part in content))
            case "response.create":
                await self._respond()
            case _:
                await self._fail(f"Unknown event type: {kind}", "unknown_event")

    async def _update(self, event: dict[str, Any]) -> None:
        session = event.get("session")
        model = event.get("model") or (session.get("model") if isinstance(session, dict) else None)
        if model is None and session is None:
            await self._fail("Missing required field: model", "invalid_event")
            return
        self._face.check_model(model)
        self._ready = True
        if session is not None:
            await self._send("session.updated", session=session)

    async def _transcribe(self) -> None:
        seconds, self._sound = self._sound / (2 * SAMPLE_RATE), 0
        usage = await self._say("transcription.delta", max(math.ceil(seconds * TOKENS_PER_S), 1))
        await self._send("transcription.done", text=HEARD, usage=usage)

    async def _respond(self) -> None:
        name = f"resp_{uuid4().hex[:16]}"
        response: dict[str, Any] = {
            "id": name,
            "object": "realtime.response",
            "status": "in_progress",
            "output": [],
        }
        await self._send("response.created", response=response)
        usage = await self._say("response.output_text.delta", max(len(self._said), 1))
        self._said += tokens.split(HEARD)
        response["status"] = "completed"
        response["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "output_tokens": usage["completion_tokens"],
            "total_tokens": usage["total_tokens"],
        }
        await self._send("response.done", response=response)

    async def _say(self, kind: str, prompt_tokens: int) -> dict[str, int]:
        """Send the one text there is, as the engine makes it. -> its usage."""
        pieces, done = tokens.split(HEARD), 0
        if prompt_tokens + len(pieces) > self._face.settings.max_model_len:
            raise RequestError(
                400, "BadRequestError", "The session is longer than the model's context.", None
            )
        plan = SequencePlan(prompt_tokens, len(pieces), len(pieces), "stop")
        async with aclosing(self._face.generate([plan])) as steps:
            async for step in steps:
                new = sum(count for _, count in step)
                await self._send(kind, delta="".join(pieces[done : done + new]))
                done += new
        return {
            "prompt_tokens": prompt_tokens,
            "total_tokens": prompt_tokens + len(pieces),
            "completion_tokens": len(pieces),
        }

    async def _send(self, kind: str, **fields: Any) -> None:
        await self._socket.send_str(orjson.dumps({"type": kind, **fields}).decode())

    async def _fail(self, message: str, code: str) -> None:
        await self._send("error", error=message, code=code)
