"""`/v1/responses` of the emulated server, as a vLLM with `VLLM_ENABLE_RESPONSES_API_STORE=1` serves it.

Responses are kept, so that they can be fetched and gone on from; one in the background can be cancelled. A stream
tells of its response before the prompt is read; the other events come with the tokens.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import orjson
from aiohttp import web
from pydantic import BaseModel

from sim.answers import Answer, Channel
from sim.completion import Completion
from sim.openai_request import (
    ChatRequest,
    FunctionDefinition,
    JsonSchemaFormat,
    Message,
    NamedFunction,
    NamedToolChoice,
    RequestBase,
    RequestError,
    ResponseFormat,
    Tool,
    parse,
)
from sim.openai_shapes import CacheUse, named_event

if TYPE_CHECKING:
    from sim.openai_server import Face

MOST_STORED = 1000


class _Text(BaseModel):
    format: dict[str, Any] | None = None


class ResponsesRequest(RequestBase):
    """Body of POST /v1/responses."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    stream: bool | None = False
    store: bool | None = True
    background: bool | None = False
    previous_response_id: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[dict[str, Any]] = []  # noqa: RUF012 - pydantic copies it
    tool_choice: str | dict[str, Any] = "auto"
    text: _Text | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    seed: int | None = None

    def chat(self, before: Sequence[Message]) -> ChatRequest:
        """The chat that it is; `before`: the conversation that it goes on from."""
        messages = [Message(role="system", content=self.instructions)] if self.instructions else []
        messages += [*before, *self.messages()]
        functions = [
            Tool(function=FunctionDefinition(name=tool["name"], parameters=tool.get("parameters")))
            for tool in self.tools
            if tool.get("type") == "function"
        ]
        choice: Any = self.tool_choice
        if isinstance(choice, dict):
            choice = NamedToolChoice(function=NamedFunction(name=str(choice.get("name"))))
        wanted = None
        if self.text is not None and (form := self.text.format) is not None:
            described = None
            if form["type"] == "json_schema":
                described = JsonSchemaFormat(name=form["name"], schema=form.get("schema"))
            wanted = ResponseFormat(type=form["type"], json_schema=described)
        return ChatRequest(
            model=self.model,
            messages=messages,
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stream=self.stream,
            tools=functions or None,
            tool_choice=choice if functions else None,
            response_format=wanted,
            cache_salt=self.cache_salt,
            seed=self.seed,
        )

    def messages(self) -> list[Message]:
        """The input as messages."""
        if isinstance(self.input, str):
            return [Message(role="user", content=self.input)]
        return [Message(role=str(item.get("role", "tool")), content=_text_of(item)) for item in self.input]


def _text_of(item: dict[str, Any]) -> str:
    content = item.get("content", item.get("output", item.get("arguments", "")))
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content)
    return str(content)


class ResponsesShapes:
    """Events and body of one response."""

    def __init__(
        self, request: ResponsesRequest, answer: Answer, model: str, prompt_tokens: int, details: bool
    ) -> None:
        self.id = request.request_id or f"resp_{uuid4().hex[:16]}"
        self._request = request
        self._answer = answer
        self._model = model
        self._prompt_tokens = prompt_tokens
        self._details = details
        self._created = int(time.time())
        self._number = -1
        called = answer.tool is not None
        self._item_id = f"{'fc' if called else 'msg'}_{uuid4().hex[:16]}"
        self._call_id = f"call_{uuid4().hex[:16]}"
        self._text = answer.text(Channel.ARGUMENTS if called else Channel.CONTENT)

    # sim.openai_shapes.Shapes

    def prelude(self) -> list[bytes]:
        """Events that come before the prompt is read."""
        return [
            self._event(f"response.{kind}", response=self.document("in_progress"))
            for kind in ("created", "in_progress")
        ]

    def first(self) -> list[bytes]:
        """Events in front of the text."""
        events = [
            self._event("response.output_item.added", item=self._item("in_progress", ""), output_index=0)
        ]
        if self._answer.tool is None:
            part = {"annotations": [], "text": "", "type": "output_text", "logprobs": []}
            events.append(self._part_event("response.content_part.added", part=part))
        return events

    def step(self, index: int, done: int, new: int, last: bool) -> list[bytes]:
        """An event for the tokens `done` to `done + new`."""
        called = self._answer.tool is not None
        channels = (Channel.ARGUMENTS,) if called else (Channel.CONTENT, Channel.END)
        taken = self._answer.tokens[done : done + new]
        text = "".join(text for channel, text in taken if channel in channels)
        if not text:
            return []
        if called:
            kind = "response.function_call_arguments.delta"
            return [self._event(kind, delta=text, item_id=self._item_id, output_index=0)]
        return [self._part_event("response.output_text.delta", delta=text, logprobs=[])]

    def usage_event(self, completion_tokens: int, cache: CacheUse) -> bytes:
        """The events behind the text, the whole response the last of them."""
        item = self._item("completed", self._text)
        if self._answer.tool is not None:
            kind = "response.function_call_arguments.done"
            events = [
                self._event(
                    kind,
                    arguments=self._text,
                    item_id=self._item_id,
                    name=self._answer.tool,
                    output_index=0,
                )
            ]
        else:
            events = [
                self._part_event("response.output_text.done", logprobs=[], text=self._text),
                self._part_event("response.content_part.done", part=item["content"][0]),
            ]
        events.append(self._event("response.output_item.done", item=item, output_index=0))
        events.append(self._event("response.completed", response=self.document("ended", cache)))
        return b"".join(events)

    def body(self, cache: CacheUse) -> bytes:
        """The response."""
        return orjson.dumps(self.document("ended", cache))

    def document(self, status: str, cache: CacheUse | None = None) -> dict[str, Any]:
        """The response at one moment; `ended`: as its answer says."""
        request, answer = self._request, self._answer
        cut = answer.finish_reason == "length"
        ended = status == "ended"
        if ended:
            status = "incomplete" if cut else "completed"
        choice = request.tool_choice if request.tools else "none"
        return {
            "id": self.id,
            "created_at": self._created,
            "incomplete_details": {"reason": "max_output_tokens"} if ended and cut else None,
            "instructions": request.instructions,
            "metadata": request.metadata,
            "model": self._model,
            "object": "response",
            "output": [self._item("completed", self._text)] if ended else [],
            "parallel_tool_calls": True,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "tool_choice": choice,
            "tools": request.tools,
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "background": bool(request.background),
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": None,
            "previous_response_id": request.previous_response_id,
            "prompt": None,
            "reasoning": None,
            "service_tier": "auto",
            "status": status,
            "text": {"format": request.text.format} if request.text and request.text.format else None,
            "top_logprobs": None,
            "truncation": "disabled",
            "usage": self._usage(cache or CacheUse()) if ended else None,
            "user": request.user,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "input_messages": None,
            "output_messages": None,
        }

    def _usage(self, cache: CacheUse) -> dict[str, Any]:
        tokens = len(self._answer.tokens)
        cached = cache if self._details else CacheUse()
        return {
            "input_tokens": self._prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": cached.cached,
                "cache_write_tokens": cached.created,
                "input_tokens_per_turn": [],
                "cached_tokens_per_turn": [],
            },
            "output_tokens": tokens,
            "output_tokens_details": {
                "reasoning_tokens": 0,
                "tool_output_tokens": 0,
                "output_tokens_per_turn": [],
                "tool_output_tokens_per_turn": [],
            },
            "total_tokens": self._prompt_tokens + tokens,
        }

    def _item(self, status: str, text: str) -> dict[str, Any]:
        if self._answer.tool is not None:
            return {
                "arguments": text,
                "call_id": self._call_id,
                "name": self._answer.tool,
                "type": "function_call",
                "id": self._item_id,
                "status": status,
            }
        part: dict[str, Any] = {"annotations": [], "text": text, "type": "output_text", "logprobs": None}
        return {
            "id": self._item_id,
            "content": [part] if status == "completed" else [],
            "role": "assistant",
            "status": status,
            "type": "message",
            "phase": None,
        }

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return named_event(kind, fields | {"sequence_number": self._number, "type": kind}, sort=True)

    def _part_event(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, content_index=0, item_id=self._item_id, output_index=0, **fields)


class ResponsesApi:
    """The four endpoints."""

    def __init__(self, face: Face) -> None:
        self._face = face
        self._documents: dict[str, dict[str, Any]] = {}
        """What is kept, by id, the oldest first."""
        self._said: dict[str, list[Message]] = {}
        self._running: dict[str, asyncio.Task[None]] = {}

    def add_routes(self, app: web.Application) -> None:
        """Add the paths."""
        app.router.add_post("/v1/responses", self._create)
        app.router.add_get("/v1/responses/{id}", self._retrieve, allow_head=False)
        app.router.add_post("/v1/responses/{id}/cancel", self._cancel)

    async def _create(self, request: web.Request) -> web.StreamResponse:
        body = parse(ResponsesRequest, await request.read())
        self._face.check_model(body.model)
        before: list[Message] = []
        if body.previous_response_id is not None:
            self._find(body.previous_response_id)
            before = self._said[body.previous_response_id]
        chat = body.chat(before)
        planned = await self._face.plan_chat(chat)
        settings = self._face.settings
        shapes = ResponsesShapes(
            body,
            planned.answers[0],
            settings.models[0],
            len(planned.pieces),
            settings.prompt_tokens_details,
        )
        completion = Completion(
            shapes,
            planned.plans,
            stream=bool(body.stream),
            usage=True,
            cacheable=self._face.cacheable(planned.plans),
            prelude=tuple(shapes.prelude()) if body.stream else (),
            end=b"",
        )
        if body.store:
            answer = planned.answers[0]
            text = answer.text(Channel.CONTENT) or answer.text(Channel.ARGUMENTS)
            self._said[shapes.id] = [*before, *body.messages(), Message(role="assistant", content=text)]
        if not body.background:
            reply = await self._face.serve(request, completion)
            if body.store:
                self._keep(shapes.id, shapes.document("ended"))
            return reply
        self._keep(shapes.id, shapes.document("queued"))
        task = asyncio.get_running_loop().create_task(self._work(shapes, completion))
        self._running[shapes.id] = task
        task.add_done_callback(lambda _: self._running.pop(shapes.id, None))
        return _json(self._documents[shapes.id])

    async def _work(self, shapes: ResponsesShapes, completion: Completion) -> None:
        """Do a background response."""
        await self._face.compute(completion.plans)
        self._documents[shapes.id] = shapes.document("ended")

    def _keep(self, name: str, document: dict[str, Any]) -> None:
        self._documents[name] = document
        while len(self._documents) > MOST_STORED:
            oldest = next(iter(self._documents))
            del self._documents[oldest], self._said[oldest]

    def _find(self, name: str) -> dict[str, Any]:
        document = self._documents.get(name)
        if document is None:
            message = f"Response with id '{name}' not found."
            raise RequestError(404, "invalid_request_error", message, "response_id")
        return document

    async def _retrieve(self, request: web.Request) -> web.StreamResponse:
        return _json(self._find(request.match_info["id"]))

    async def _cancel(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["id"]
        document = self._find(name)
        if document["status"] not in ("queued", "in_progress"):
            message = "Cannot cancel a synchronous response."
            raise RequestError(400, "invalid_request_error", message, "response_id")
        document["status"] = "cancelled"
        if (task := self._running.get(name)) is not None:
            task.cancel()
        return _json(document)


def _json(document: dict[str, Any]) -> web.Response:
    return web.Response(body=json.dumps(document, separators=(",", ":")), content_type="application/json")
