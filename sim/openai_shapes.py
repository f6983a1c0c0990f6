"""Response bodies and stream events of the emulated server: field for field and byte for byte as vLLM 0.32.

An event of a stream is assembled from a prefix that is fixed for the request, because a stream has hundreds of
them; whole bodies are built as dictionaries in vLLM's order of keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import orjson

from sim.answers import Answer, Channel

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Head:
    """What every event and body of one request repeats."""

    id: str
    created: int
    """Unix time."""
    model: str
    fingerprint: str
    prompt_tokens: int
    """Over all prompts of the request."""
    continuous_usage: bool = False
    include_usage: bool = False
    prompt_tokens_details: bool = False
    """Whether usage says how much of the prompt was in the prefix cache (`--enable-prompt-tokens-details`)."""

    def stream_prefix(self, kind: str) -> bytes:
        """The beginning of every event, up to the first choice."""
        fields = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return b"data: " + orjson.dumps(fields)[:-1] + b',"choices":['

    def usage(self, completion_tokens: int) -> dict[str, Any]:
        """The three counts."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
            "completion_tokens": completion_tokens,
        }


class CacheUse(NamedTuple):
    """What the prefix cache did for a request, tokens of its prompt."""

    cached: int = 0
    """That were in it."""
    created: int = 0
    """That are in it now."""


def named_event(name: str, document: dict[str, Any], *, sort: bool = False) -> bytes:
    """An event with a name; `sort`: its keys in alphabetical order."""
    if sort:
        document = dict(sorted(document.items()))
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(document) + b"\n\n"


class Shapes(Protocol):
    """The shapes of one endpoint for one request."""

    def first(self) -> list[bytes]:
        """Events that come with the first token, before any text."""

    def step(self, index: int, done: int, new: int, last: bool) -> list[bytes]:
        """Events for the tokens `done` to `done + new` of a choice; `last`: they complete the whole request."""

    def usage_event(self, completion_tokens: int, cache: CacheUse) -> bytes:
        """The event after the last choice, if usage was asked for."""

    def body(self, cache: CacheUse) -> bytes:
        """The whole answer at once."""


def _usage_suffix(head: Head, prompt_tokens: int, completion_tokens: int) -> bytes:
    if not head.continuous_usage:
        return b""
    return (
        f',"usage":{{"prompt_tokens":{prompt_tokens},"total_tokens":{prompt_tokens + completion_tokens},'
        f'"completion_tokens":{completion_tokens},"completion_tokens_details":null}}'
    ).encode()


def _fingerprint_suffix(head: Head, last: bool) -> bytes:
    """The last event before [DONE] carries the fingerprint; with `include_usage` that is the usage event."""
    if not last or head.include_usage:
        return b""
    return b',"system_fingerprint":' + orjson.dumps(head.fingerprint)


def _usage_event(prefix: bytes, head: Head, completion_tokens: int, details: dict[str, int]) -> bytes:
    usage = head.usage(completion_tokens)
    if head.prompt_tokens_details:
        usage["prompt_tokens_details"] = details
    fingerprint = orjson.dumps(head.fingerprint)
    return prefix + b'],"usage":' + orjson.dumps(usage) + b',"system_fingerprint":' + fingerprint + b"}\n\n"


def _whole_usage(head: Head, completion_tokens: int, details: dict[str, int | None]) -> dict[str, Any]:
    return head.usage(completion_tokens) | {
        "prompt_tokens_details": details if head.prompt_tokens_details else None,
        "completion_tokens_details": None,
    }


def _finish_fields(answer: Answer, reason: str) -> bytes:
    return b'"finish_reason":"' + reason.encode() + b'","stop_reason":' + orjson.dumps(answer.stop_reason)


class ChatShapes:
    """/v1/chat/completions."""

    def __init__(
        self, head: Head, answers: Sequence[Answer], tool_ids: Sequence[str], forced_any_tool: bool
    ) -> None:
        """`forced_any_tool`: `tool_choice` was `required`, which changes the finish reason; naming one does not."""
        self._head = head
        self._answers = answers
        self._tool_ids = tool_ids
        self._forced_any_tool = forced_any_tool
        self._prefix = head.stream_prefix("chat.completion.chunk")

    def first(self) -> list[bytes]:
        """The role of every choice."""
        usage = _usage_suffix(self._head, self._head.prompt_tokens, 0)
        return [
            self._prefix
            + b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
            % index
            + usage
            + b',"prompt_token_ids":null,"prompt_text":null}\n\n'
            for index in range(len(self._answers))
        ]

    def step(self, index: int, done: int, new: int, last: bool) -> list[bytes]:
        """One event for each run of tokens of one channel; usage is the choice's own count."""
        answer = self._answers[index]
        complete = done + new == len(answer.tokens)
        events = []
        count = done
        for channel, run in groupby(answer.tokens[done : done + new], key=lambda token: token[0]):
            texts = [text for _, text in run]
            count += len(texts)
            final = complete and count == len(answer.tokens)
            finish = b'"finish_reason":null'
            if final:
                finish = _finish_fields(answer, self._finish_reason(answer))
            events.append(
                self._prefix
                + b'{"index":%d,"delta":%b,"logprobs":null,%b,"token_ids":null}]'
                % (index, self._delta(index, channel, "".join(texts)), finish)
                + _usage_suffix(self._head, self._head.prompt_tokens, count)
                + _fingerprint_suffix(self._head, last and final)
                + b"}\n\n"
            )
        return events

    def usage_event(self, completion_tokens: int, cache: CacheUse) -> bytes:
        """Usage over all choices."""
        details = {"cached_tokens": cache.cached, "created_cache_tokens": cache.created}
        return _usage_event(self._prefix, self._head, completion_tokens, details)

    def body(self, cache: CacheUse) -> bytes:
        """The whole answer at once."""
        details = {
            "cached_tokens": cache.cached,
            "created_cache_tokens": cache.created,
            "multimodal_tokens": None,
        }
        completion_tokens = sum(len(answer.tokens) for answer in self._answers)
        return orjson.dumps(
            {
                "id": self._head.id,
                "object": "chat.completion",
                "created": self._head.created,
                "model": self._head.model,
                "choices": [self._choice(index, answer) for index, answer in enumerate(self._answers)],
                "service_tier": None,
                "system_fingerprint": self._head.fingerprint,
                "usage": _whole_usage(self._head, completion_tokens, details),
                "prompt_logprobs": None,
                "prompt_token_ids": None,
                "prompt_text": None,
                "kv_transfer_params": None,
                "ec_transfer_params": None,
                "metrics": None,
            }
        )

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": answer.text(Channel.CONTENT),
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
        }
        if answer.tool is not None:
            function = {"name": answer.tool, "arguments": answer.text(Channel.ARGUMENTS)}
            message["tool_calls"] = [{"id": self._tool_ids[index], "type": "function", "function": function}]
        reasoning = answer.text(Channel.REASONING) or None
        message["reasoning"] = reasoning
        if reasoning is not None:
            message["reasoning_content"] = reasoning
        return {
            "index": index,
            "message": message,
            "logprobs": None,
            "finish_reason": self._finish_reason(answer),
            "stop_reason": answer.stop_reason,
            "token_ids": None,
            "routed_experts": None,
        }

    def _finish_reason(self, answer: Answer) -> str:
        if answer.tool is not None and self._forced_any_tool and answer.finish_reason == "stop":
            return "tool_calls"
        return answer.finish_reason

    def _delta(self, index: int, channel: Channel, text: str) -> bytes:
        if channel is Channel.CONTENT or (text and channel is Channel.END):
            return b'{"content":' + orjson.dumps(text) + b"}"
        if channel is Channel.REASONING:
            quoted = orjson.dumps(text)
            return b'{"reasoning":' + quoted + b',"reasoning_content":' + quoted + b"}"
        if channel is Channel.TOOL_NAME:
            name = {"name": self._answers[index].tool}
            call = {"id": self._tool_ids[index], "type": "function", "index": 0, "function": name}
            return orjson.dumps({"content": None, "tool_calls": [call]})
        if channel is Channel.ARGUMENTS:
            return orjson.dumps(
                {"content": None, "tool_calls": [{"index": 0, "function": {"arguments": text}}]}
            )
        return b"{}"


class CompletionShapes:
    """/v1/completions. A body may carry several prompts; choice `i` belongs to prompt `i // n`."""

    def __init__(
        self, head: Head, answers: Sequence[Answer], prompt_tokens: Sequence[int], echo: Sequence[str]
    ) -> None:
        """`prompt_tokens` and `echo` (text to repeat before the answer) by choice."""
        self._head = head
        self._answers = answers
        self._prompt_tokens = prompt_tokens
        self._echo = echo
        self._prefix = head.stream_prefix("text_completion")

    def first(self) -> list[bytes]:
        """There is no role."""
        return []

    def step(self, index: int, done: int, new: int, last: bool) -> list[bytes]:
        """One event; usage is the choice's own count."""
        answer = self._answers[index]
        text = "".join(text for _, text in answer.tokens[done : done + new])
        if done == 0:
            text = self._echo[index] + text
        finish = b'"finish_reason":null,"stop_reason":null'
        if done + new == len(answer.tokens):
            finish = _finish_fields(answer, answer.finish_reason)
        return [
            self._prefix
            + b'{"index":%d,"text":%b,"logprobs":null,%b,"prompt_token_ids":null,"token_ids":null}]'
            % (index, orjson.dumps(text), finish)
            + _usage_suffix(self._head, self._prompt_tokens[index], done + new)
            + _fingerprint_suffix(self._head, last)
            + b"}\n\n"
        ]

    def usage_event(self, completion_tokens: int, cache: CacheUse) -> bytes:
        """Usage over all choices."""
        return _usage_event(self._prefix, self._head, completion_tokens, {"cached_tokens": cache.cached})

    def body(self, cache: CacheUse) -> bytes:
        """The whole answer at once."""
        details = {
            "cached_tokens": cache.cached,
            "created_cache_tokens": None,
            "multimodal_tokens": None,
        }
        completion_tokens = sum(len(answer.tokens) for answer in self._answers)
        return orjson.dumps(
            {
                "id": self._head.id,
                "object": "text_completion",
                "created": self._head.created,
                "model": self._head.model,
                "choices": [self._choice(index, answer) for index, answer in enumerate(self._answers)],
                "service_tier": None,
                "system_fingerprint": self._head.fingerprint,
                "usage": _whole_usage(self._head, completion_tokens, details),
                "kv_transfer_params": None,
                "ec_transfer_params": None,
                "metrics": None,
            }
        )

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        return {
            "index": index,
            "text": self._echo[index] + answer.text(Channel.CONTENT),
            "logprobs": None,
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
            "token_ids": None,
            "prompt_logprobs": None,
            "prompt_token_ids": None,
            "routed_experts": None,
        }
