"""For each endpoint: a body that its clients send, and what a vLLM answers, whole and as events.

Every answer reports 7 tokens of the prompt, 2 of them from the cache, and 5 of the answer, as far as its endpoint
has such figures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import orjson

from proxy.endpoints import Route
from tests.proxy.fakes import DONE, answer_body, event, usage_event
from tests.proxy.uploads import FORM_TYPE, upload

HELLO: list[Any] = [{"role": "user", "content": "hi"}]
RESPONSE_USAGE = {
    "input_tokens": 7,
    "input_tokens_details": {"cached_tokens": 2},
    "output_tokens": 5,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 12,
}
MESSAGE_USAGE = {
    "input_tokens": 4,
    "cache_creation_input_tokens": 1,
    "cache_read_input_tokens": 2,
    "output_tokens": 5,
}


def named(kind: str, **fields: Any) -> bytes:
    """An event with its name."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps({"type": kind, **fields}))


def response(status: str = "completed", *, name: str = "resp_1", **fields: Any) -> dict[str, Any]:
    """A response, with its usage once it has ended."""
    ended = status in ("completed", "incomplete", "failed")
    return {
        "id": name,
        "object": "response",
        "model": "m",
        "status": status,
        "background": False,
        "output": [],
        "usage": RESPONSE_USAGE if ended else None,
        **fields,
    }


def response_events(last: str = "completed", **fields: Any) -> list[bytes]:
    return [
        named("response.created", response=response("in_progress", **fields), sequence_number=0),
        named("response.in_progress", response=response("in_progress", **fields), sequence_number=1),
        named("response.output_text.delta", delta="hello", sequence_number=2),
        named("response.output_text.delta", delta=" you", sequence_number=3),
        named(f"response.{last}", response=response(last, **fields), sequence_number=4),
    ]


def message(**fields: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": "hello"}]
    return {"id": "msg_1", "type": "message", "role": "assistant", "content": content, "model": "m", **fields}


def message_events() -> list[bytes]:
    # vLLM counts the whole prompt first, and takes off at the end what the cache had.
    start = message(content=[], usage={"input_tokens": 7, "output_tokens": 0})
    return [
        named("message_start", message=start),
        named("ping"),
        named("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        named("content_block_delta", index=0, delta={"type": "text_delta", "text": "hello"}),
        named("content_block_delta", index=0, delta={"type": "text_delta", "text": " you"}),
        named("content_block_stop", index=0),
        named("message_delta", delta={"stop_reason": "end_turn"}, usage=MESSAGE_USAGE),
        named("message_stop"),
    ]


USAGE = {**RESPONSE_USAGE, "type": "tokens"}


def media_events(kind: str, last: str) -> list[bytes]:
    """Events of sound or a picture, in OpenAI's shape."""
    return [
        named(kind, delta="hello", b64_json="AAAA"),
        named(kind, delta=" you", b64_json="AAAA"),
        named(last, usage=USAGE),
    ]


TRANSCRIPT = media_events("transcript.text.delta", "transcript.text.done")
SPEECH = media_events("speech.audio.delta", "speech.audio.done")
PICTURES = media_events("image_generation.partial_image", "image_generation.completed")
EDITS = media_events("image_edit.partial_image", "image_edit.completed")
PICTURE = {"created": 1, "data": [{"b64_json": "AAAA"}], "usage": USAGE}


@dataclass
class Sample:
    """One endpoint's."""

    answer: Any
    body: dict[str, Any] = field(default_factory=dict)
    """Besides `model`; fields of text where it is an upload, which has a file too."""
    tokens: tuple[int, int, int] = (0, 0, 0)
    """Of the prompt, from the cache, of the answer: what the row must have."""
    events: list[bytes] = field(default_factory=list)
    begin: int = 0
    """Events in front of the first that commits."""
    partial: tuple[int, int, int, str] = (0, 0, 0, "none")
    """What the row has if only the first of the events that commit came: tokens as above, and their source."""


def pooled(**fields: Any) -> dict[str, Any]:
    return {"object": "list", "model": "m", "usage": {"prompt_tokens": 7, "total_tokens": 7}, **fields}


CHAT = orjson.loads(answer_body())
CHAT["usage"]["prompt_tokens_details"] = {"cached_tokens": 2}
TEXT = b'data: {"id":"c","choices":[{"index":0,"text":"hello","finish_reason":null}]'
CHAT_EVENTS = [event("hello", completion=1), event(" you", completion=5), usage_event(7, 5), DONE]
TEXT_EVENTS = [
    TEXT + b',"usage":{"prompt_tokens":7,"total_tokens":8,"completion_tokens":1}}\n\n',
    TEXT + b',"usage":{"prompt_tokens":7,"total_tokens":12,"completion_tokens":5}}\n\n',
    DONE,
]
QUERY = {"query": "q", "documents": ["a", "b"]}

SAMPLES: dict[str, Sample] = {
    "chat": Sample(CHAT, {"messages": HELLO}, (7, 2, 5), CHAT_EVENTS, 0, (7, 0, 1, "reported")),
    "completions": Sample(CHAT, {"prompt": "hi"}, (7, 2, 5), TEXT_EVENTS, 0, (7, 0, 1, "reported")),
    "responses": Sample(
        response(), {"input": "hi"}, (7, 2, 5), response_events(), 2, (10, 0, 2, "estimated")
    ),
    "responses-get": Sample(response(), tokens=(7, 2, 5)),
    "responses-delete": Sample({"id": "resp_1", "deleted": True}),
    "responses-cancel": Sample(response(), tokens=(7, 2, 5)),
    "messages": Sample(
        message(usage=MESSAGE_USAGE),
        {"messages": HELLO, "max_tokens": 16},
        (7, 2, 5),
        message_events(),
        2,
        (7, 0, 0, "estimated"),
    ),
    "count-tokens": Sample({"input_tokens": 7}, {"messages": HELLO}),
    "embeddings": Sample(pooled(data=[{"embedding": [0.5]}]), {"input": "hi"}, (7, 0, 0)),
    "rerank": Sample({"id": "r", "usage": {"total_tokens": 7}, "results": []}, QUERY, (7, 0, 0)),
    "score": Sample(pooled(data=[{"score": 0.5}]), {"text_1": "a", "text_2": "b"}, (7, 0, 0)),
    "pooling": Sample(pooled(data=[{"data": [0.5]}]), {"input": "hi"}, (7, 0, 0)),
    "classify": Sample(pooled(data=[{"label": "x"}]), {"input": "hi"}, (7, 0, 0)),
    "tokenize": Sample({"count": 1, "tokens": [1]}, {"prompt": "hi"}),
    "detokenize": Sample({"prompt": "hi"}, {"tokens": [1]}),
    "transcriptions": Sample({"text": "sea", "usage": USAGE}, {"prompt": "hi"}, (7, 2, 5), TRANSCRIPT),
    "translations": Sample({"text": "sea", "usage": USAGE}, {}, (7, 2, 5), TRANSCRIPT),
    "speech": Sample({"audio": "AAAA", "usage": USAGE}, {"input": "hi", "voice": "x"}, (7, 2, 5), SPEECH),
    "images": Sample(PICTURE, {"prompt": "hi"}, (7, 2, 5), PICTURES),
    "image-edits": Sample(PICTURE, {"prompt": "hi"}, (7, 2, 5), EDITS),
    "image-variations": Sample(PICTURE, {}, (7, 2, 5)),
    "realtime": Sample({}, {}, (7, 2, 5)),  # of its answers, in test_realtime.py
}


def sent(route: Route, document: dict[str, Any]) -> tuple[bytes, bytes]:
    """The body of a request with these fields, and the header lines that say what it is."""
    if route.stored:
        return b"", b""
    if not route.form:
        return orjson.dumps(document), b""
    fields = {name: str(value).lower() if value is True else value for name, value in document.items()}
    return upload(**fields), b"content-type: %b\r\n" % FORM_TYPE
