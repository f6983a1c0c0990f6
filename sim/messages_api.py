"""`/v1/messages` and its `count_tokens` of the emulated server: Anthropic's API, as vLLM serves it."""

from __future__ import annotations

import json
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

import orjson
from aiohttp import web
from pydantic import BaseModel

from sim.answers import Answer, Channel
from sim.completion import Completion
from sim.openai_request import (
    ChatRequest,
    FunctionDefinition,
    Message,
    NamedFunction,
    NamedToolChoice,
    RequestBase,
    RequestError,
    Tool,
    parse,
)
from sim.openai_shapes import CacheUse, named_event

if TYPE_CHECKING:
    from sim.openai_server import Face


class _Tool(BaseModel):
    name: str
    input_schema: dict[str, Any]


class _ToolChoice(BaseModel):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None


class _Message(BaseModel):
    role: str
    content: str | list[dict[str, Any]]


class CountTokensRequest(RequestBase):
    """Body of POST /v1/messages/count_tokens."""

    messages: list[_Message]
    system: str | list[dict[str, Any]] | None = None
    tools: list[_Tool] | None = None

    def chat_messages(self) -> list[Message]:
        """The conversation."""
        system = [Message(role="system", content=_text(self.system))] if self.system else []
        return system + [
            Message(role=message.role, content=_text(message.content)) for message in self.messages
        ]


class MessagesRequest(CountTokensRequest):
    """Body of POST /v1/messages."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = False
    temperature: float | None = None
    top_p: float | None = None
    tool_choice: _ToolChoice | None = None
    cache_salt: str | None = None

    def chat(self) -> ChatRequest:
        """The chat that it is."""
        choice: Any = None
        if self.tool_choice is not None and self.tools:
            choice = {"any": "required", "auto": "auto", "none": "none"}.get(self.tool_choice.type)
            if self.tool_choice.type == "tool":
                choice = NamedToolChoice(function=NamedFunction(name=self.tool_choice.name or ""))
        tools = [
            Tool(function=FunctionDefinition(name=tool.name, parameters=tool.input_schema))
            for tool in self.tools or ()
        ]
        return ChatRequest(
            model=self.model,
            messages=self.chat_messages(),
            max_tokens=self.max_tokens,
            stop=(self.stop_sequences or [])[:4],
            stream=self.stream,
            temperature=self.temperature,
            top_p=self.top_p,
            tools=tools or None,
            tool_choice=choice,
            cache_salt=self.cache_salt,
        )


def _text(content: str | list[dict[str, Any]]) -> str:
    """The text of content blocks, those of tools as JSON."""
    if isinstance(content, str):
        return content
    texts = []
    for block in content:
        inner = block.get("text", block.get("content", block.get("input", "")))
        texts.append(inner if isinstance(inner, str) else json.dumps(inner))
    return "\n".join(texts)


class MessagesShapes:
    """Events and body of one message."""

    def __init__(self, answer: Answer, model: str, prompt_tokens: int, details: bool) -> None:
        self._answer = answer
        self._model = model
        self._prompt_tokens = prompt_tokens
        self._details = details
        self._id = f"chatcmpl-{uuid4().hex[:16]}"
        self._tool_id = f"chatcmpl-tool-{uuid4().hex[:16]}"
        self._block = -1
        self._channel: Channel | None = None

    def first(self) -> list[bytes]:
        """The message without its content."""
        usage = {"input_tokens": self._prompt_tokens, "output_tokens": 0}
        message = self._head() | {
            "content": [],
            "model": self._model,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        return [_event("message_start", message=message)]

    def step(self, index: int, done: int, new: int, last: bool) -> list[bytes]:
        """Events for the tokens `done` to `done + new`; a block for each channel."""
        events = []
        taken = self._answer.tokens[done : done + new]
        for channel, run in groupby(taken, key=lambda token: token[0]):
            text = "".join(text for _, text in run)
            if channel is Channel.END:
                channel = Channel.CONTENT
            if channel is Channel.TOOL_NAME:
                channel = Channel.ARGUMENTS
            elif not text:
                continue
            if channel is not self._channel:
                events += [*self._end_block(), self._begin_block(channel)]
            if text:
                delta = {"type": _DELTAS[channel][0], _DELTAS[channel][1]: text}
                events.append(_event("content_block_delta", delta=delta, index=self._block))
        return events

    def usage_event(self, completion_tokens: int, cache: CacheUse) -> bytes:
        """The events behind the content."""
        reason, sequence = self._stop()
        events = [
            *self._end_block(),
            _event(
                "message_delta",
                delta={"stop_reason": reason, "stop_sequence": sequence},
                usage=self._usage(cache),
            ),
            _event("message_stop"),
        ]
        return b"".join(events)

    def body(self, cache: CacheUse) -> bytes:
        """The whole message."""
        answer = self._answer
        content: list[dict[str, Any]] = []
        if answer.tool is not None:
            arguments = json.loads(answer.text(Channel.ARGUMENTS) or "{}")
            content.append({"type": "tool_use", "id": self._tool_id, "name": answer.tool, "input": arguments})
        else:
            content.append({"type": "text", "text": answer.text(Channel.CONTENT)})
        reason, sequence = self._stop()
        stop = {"stop_reason": reason} | ({"stop_sequence": sequence} if sequence else {})
        return orjson.dumps(
            self._head() | {"content": content, "model": self._model} | stop | {"usage": self._usage(cache)}
        )

    def _head(self) -> dict[str, Any]:
        return {"id": self._id, "type": "message", "role": "assistant"}

    def _begin_block(self, channel: Channel) -> bytes:
        self._channel = channel
        self._block += 1
        block: dict[str, Any] = {"type": "text", "text": ""}
        if channel is Channel.ARGUMENTS:
            block = {"type": "tool_use", "id": self._tool_id, "name": self._answer.tool, "input": {}}
        elif channel is Channel.REASONING:
            block = {"type": "thinking", "thinking": "", "signature": ""}
        return _event("content_block_start", content_block=block, index=self._block)

    def _end_block(self) -> list[bytes]:
        return [] if self._channel is None else [_event("content_block_stop", index=self._block)]

    def _stop(self) -> tuple[str, str | None]:
        answer = self._answer
        if answer.stop_reason is not None:
            return "stop_sequence", answer.stop_reason
        if answer.finish_reason == "length":
            return "max_tokens", None
        return ("end_turn" if answer.tool is None else "tool_use"), None

    def _usage(self, cache: CacheUse) -> dict[str, int]:
        tokens = len(self._answer.tokens)
        if not self._details:
            return {"input_tokens": self._prompt_tokens, "output_tokens": tokens}
        return {
            "input_tokens": self._prompt_tokens - cache.cached - cache.created,
            "output_tokens": tokens,
            "cache_creation_input_tokens": cache.created,
            "cache_read_input_tokens": cache.cached,
        }


_DELTAS = {
    Channel.CONTENT: ("text_delta", "text"),
    Channel.REASONING: ("thinking_delta", "thinking"),
    Channel.ARGUMENTS: ("input_json_delta", "partial_json"),
}


def _event(kind: str, **fields: Any) -> bytes:
    return named_event(kind, {"type": kind, **fields})


class MessagesApi:
    """The two endpoints. What is found wrong behind the parsing of a body has Anthropic's shape, as in vLLM."""

    def __init__(self, face: Face) -> None:
        self._face = face

    def add_routes(self, app: web.Application) -> None:
        """Add the paths."""
        app.router.add_post("/v1/messages", self._create)
        app.router.add_post("/v1/messages/count_tokens", self._count)

    async def _create(self, request: web.Request) -> web.StreamResponse:
        body = parse(MessagesRequest, await request.read())
        try:
            self._face.check_model(body.model)
            planned = await self._face.plan_chat(body.chat())
        except RequestError as error:
            return _refusal(error)
        settings = self._face.settings
        shapes = MessagesShapes(
            planned.answers[0], settings.models[0], len(planned.pieces), settings.prompt_tokens_details
        )
        cacheable = self._face.cacheable(planned.plans)
        completion = Completion(shapes, planned.plans, bool(body.stream), True, cacheable, end=b"")
        return await self._face.serve(request, completion)

    async def _count(self, request: web.Request) -> web.StreamResponse:
        body = parse(CountTokensRequest, await request.read())
        try:
            self._face.check_model(body.model)
        except RequestError as error:
            return _refusal(error)
        count = len(ChatRequest(model=body.model, messages=body.chat_messages()).pieces())
        document = {"input_tokens": count, "context_management": {"original_input_tokens": count}}
        return web.Response(body=orjson.dumps(document), content_type="application/json")


def _refusal(error: RequestError) -> web.Response:
    document = {"type": "error", "error": {"type": error.kind, "message": error.message}}
    return web.Response(status=error.status, body=orjson.dumps(document), content_type="application/json")
