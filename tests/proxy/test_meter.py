"""The meter reads the usage that an engine reports and cuts out what the client did not ask for, and nothing else.

The reference is a JSON round trip: whatever the shape of an event, what is passed on parses to the document that
came without its own `usage`, or is what came, byte for byte.
"""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from proxy.meter import Meter
from proxy.sse import Event, EventReader

# Events as engines write them

NASTY = st.sampled_from(
    [
        *(
            '"',
            "\\",
            '\\"',
            "\n",
            "\r\n",
            "\u2028",
            "\x00",
            "é",
            "日本",
            "😀",
            "{",
            "}",
            "}}",
            "[DONE]",
            "data: x\n\n",
            "null",
        ),
        *(
            ',"usage":{',
            '"usage":null',
            ',"usage":{"prompt_tokens":1,"total_tokens":1}}',
            '"choices":[]',
            '"choices":[{"index":7',
        ),
    ]
)
TEXT = st.lists(st.one_of(NASTY, st.text(max_size=5)), max_size=4).map("".join)
TOKENS = st.integers(0, 10**6)
DETAILS = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {},
        optional={
            "audio_tokens": st.none() | TOKENS,
            "cached_tokens": st.none() | TOKENS,
            "created_cache_tokens": TOKENS,
        },
    ),
)
VLLM_USAGE = st.fixed_dictionaries(
    {"prompt_tokens": TOKENS, "total_tokens": TOKENS},
    optional={
        "completion_tokens": TOKENS,
        "completion_tokens_details": DETAILS,
        "prompt_tokens_details": DETAILS,
    },
)
OTHER_USAGE = st.fixed_dictionaries(
    {"prompt_tokens": TOKENS, "completion_tokens": TOKENS, "total_tokens": TOKENS},
    optional={
        "prompt_tokens_details": DETAILS,
        "completion_tokens_details": st.fixed_dictionaries(
            {"reasoning_tokens": TOKENS, "cached_tokens": TOKENS}
        ),
        "service_tier": TEXT,
        "queue_time": st.floats(allow_nan=False, allow_infinity=False),
    },
)
ODD_USAGE = st.sampled_from(
    [{}, [], 0, "x", True, {"prompt_tokens": None}, {"prompt_tokens": 1.5, "completion_tokens": "3"}]
)
USAGE = st.one_of(VLLM_USAGE, VLLM_USAGE, OTHER_USAGE, st.none(), ODD_USAGE)

LOGPROBS = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {
            "content": st.lists(
                st.fixed_dictionaries({"token": TEXT, "logprob": st.floats(-50, 0)}), max_size=2
            )
        }
    ),
)
DELTA = st.fixed_dictionaries(
    {},
    optional={
        "role": st.just("assistant"),
        "content": st.none() | TEXT,
        "reasoning_content": TEXT,
        "tool_calls": st.lists(
            st.fixed_dictionaries(
                {"index": TOKENS, "function": st.fixed_dictionaries({"name": TEXT, "arguments": TEXT})}
            ),
            max_size=2,
        ),
        "usage": VLLM_USAGE,
    },
)
FINISH = st.sampled_from([None, "stop", "length", "tool_calls"])
CHAT_CHOICE = st.fixed_dictionaries(
    {"index": st.integers(0, 3), "delta": DELTA, "logprobs": LOGPROBS, "finish_reason": FINISH}
)
TEXT_CHOICE = st.fixed_dictionaries(
    {"index": st.integers(0, 3), "text": TEXT, "logprobs": st.none(), "finish_reason": FINISH}
)
CHOICES = st.lists(st.one_of(CHAT_CHOICE, TEXT_CHOICE), max_size=2)
EXTRA = st.fixed_dictionaries(
    {},
    optional={
        "system_fingerprint": st.none() | TEXT,
        "prompt_token_ids": st.none() | st.lists(TOKENS, max_size=3),
        "service_tier": TEXT,
        "metrics": st.fixed_dictionaries({"choices": st.just([]), "usage": VLLM_USAGE}),
        "usage_metadata": VLLM_USAGE,
        "error": st.none(),
        "x": st.booleans(),
    },
)
MISSING: Any = object()


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    """An event's document, its keys in any order that an engine may write."""
    head = {"id": draw(TEXT), "object": "chat.completion.chunk", "created": 1795455675, "model": "m"}
    document = {**head, "choices": draw(CHOICES)}
    if draw(st.booleans()):
        document |= draw(EXTRA)
    if draw(st.integers(0, 4)):
        document["usage"] = draw(USAGE)
    if draw(st.booleans()):
        document |= draw(EXTRA)
    if draw(st.integers(0, 4)) == 0:
        document = dict(draw(st.permutations(list(document.items()))))
    return document


def compact(document: Any) -> str:
    return orjson.dumps(document).decode()


def pretty(document: Any) -> str:
    return json.dumps(document, indent=1)


WRITERS = st.sampled_from(
    [compact, compact, compact, json.dumps, pretty, lambda d: json.dumps(d, ensure_ascii=False)]
)
FRAMES = st.sampled_from(
    ["data: {}\n\n"] * 4
    + ["data:{}\n\n", "data: {}\r\n\r\n", "event: x\ndata: {}\n\n", ": c\ndata: {}\nid: 1\n\n"]
)


def framed(frame: str, text: str) -> bytes:
    """An event; further lines of data get their field name."""
    return frame.replace("{}", text.replace("\n", "\ndata: ")).encode()


def only(stream: bytes) -> Event:
    (event,) = EventReader().feed(stream)
    return event


def expected(document: dict[str, Any], *, include_usage: bool, every_event: bool) -> Any:
    """What the client gets: the document, what is left of it, or MISSING for nothing."""
    usage = document.get("usage", MISSING)
    if usage is MISSING or every_event:
        return document
    if include_usage and (document["choices"] == [] or usage is None):
        return document
    if document["choices"] == [] and usage is not None:
        return MISSING
    return {key: value for key, value in document.items() if key != "usage"}


def read_usage(usage: Any) -> tuple[int, int, int]:
    """(prompt, cached, completion) tokens that one usage object says."""
    if not isinstance(usage, dict):
        return 0, 0, 0
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    figures = usage.get("prompt_tokens"), cached, usage.get("completion_tokens")
    prompt, cached, completion = (figure if type(figure) is int else 0 for figure in figures)
    return prompt, cached, completion


ASKED = st.sampled_from([(False, False), (True, False), (True, True)])


@settings(max_examples=600)
@given(documents(), WRITERS, FRAMES, ASKED)
def test_the_cut_is_a_json_round_trip(
    document: dict[str, Any], write: Any, frame: str, asked: tuple[bool, bool]
) -> None:
    include_usage, every_event = asked
    event = only(framed(frame, write(document)))
    assert event.data is not None
    meter = Meter()
    out = meter.event(event, include_usage=include_usage, every_event=every_event)
    wanted = expected(document, include_usage=include_usage, every_event=every_event)
    if wanted is MISSING:
        assert out == b""
    elif wanted is document:
        assert out == event.raw
    else:
        sent = only(out)
        assert sent.data is not None
        assert (sent.name, json.loads(sent.data)) == (event.name, wanted)
    usage = document.get("usage")
    assert meter.usage == read_usage(usage)
    assert meter.reported == isinstance(usage, dict)
    assert not meter.failed
    assert not meter.done


@settings(max_examples=200)
@given(st.lists(USAGE, min_size=1, max_size=6), WRITERS)
def test_each_figure_only_grows(usages: list[Any], write: Any) -> None:
    meter = Meter()
    seen = [(0, 0, 0)]
    for usage in usages:
        document = {"choices": [{"index": 0, "delta": {"content": "x"}}], "usage": usage}
        meter.event(only(framed("data: {}\n\n", write(document))), include_usage=False, every_event=False)
        seen.append(read_usage(usage))
        assert meter.usage == tuple(map(max, *seen))


@given(documents(), WRITERS)
def test_a_whole_answer(document: dict[str, Any], write: Any) -> None:
    meter = Meter()
    meter.body(write(document).encode())
    assert meter.usage == read_usage(document.get("usage"))
    assert meter.reported == isinstance(document.get("usage"), dict)


@given(st.binary(max_size=80))
def test_anything_else_goes_on_as_it_is(data: bytes) -> None:
    assume(b"abort" not in data)
    raw = b"data: " + data + b"\n\n"
    for event in (
        Event(raw, data),
        Event(raw, None),
        Event(raw, b'{"choices":' + data),
        Event(raw, data + b',"usage":{}}'),
    ):
        meter = Meter()
        assert meter.event(event, include_usage=False, every_event=False) == raw
        assert meter.usage == (0, 0, 0)
        meter.body(data)


KEYS = st.one_of(
    TEXT,
    st.sampled_from(
        [
            "choices",
            "usage",
            "error",
            "delta",
            "message",
            "tool_calls",
            "function",
            "arguments",
            "content",
            "text",
        ]
    ),
)
JSON = st.recursive(
    st.none() | st.booleans() | TOKENS | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300)
@given(JSON, ASKED)
def test_no_document_upsets_it(document: Any, asked: tuple[bool, bool]) -> None:
    meter = Meter()
    data = orjson.dumps(document)
    meter.event(only(b"data: " + data + b"\n\n"), include_usage=asked[0], every_event=asked[1])
    meter.body(data)
    assert min(meter.usage) >= 0
    assert meter.estimate_completion() >= 0


# By example

USED = b'"usage":{"prompt_tokens":7,"total_tokens":10,"completion_tokens":3}'
TOKEN = b'{"id":"c","choices":[{"index":0,"delta":{"content":"x"}}],' + USED + b"}"
LAST = b'{"id":"c","choices":[],' + USED + b"}"


def relay(
    data: bytes, meter: Meter | None = None, *, include_usage: bool = False, every_event: bool = False
) -> bytes:
    meter = meter or Meter()
    return meter.event(only(b"data: " + data + b"\n\n"), include_usage=include_usage, every_event=every_event)


def test_who_asked_for_nothing_gets_no_usage() -> None:
    assert relay(TOKEN) == b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
    assert relay(LAST) == b""


@pytest.mark.parametrize(
    "frame",
    [
        *(b"data:%b\n\n", b"data: %b\r\n\r\n", b"data: %b\r\r", b": c\ndata: %b\n\n", b"data: %b\nid: 5\n\n"),
        *(
            b"event: x\ndata: %b\n\n",
            b"data: %b\nevent: x\n\n",
            b"data:\ndata: %b\n\n",
            b"data: %b\ndata: \n\n",
        ),
    ],
)
@pytest.mark.parametrize("token", [TOKEN, TOKEN.replace(b',"choices"', b',\ndata: "choices"')])
def test_events_in_any_frame(frame: bytes, token: bytes) -> None:
    event = only(frame % token)
    meter = Meter()
    sent = only(meter.event(event, include_usage=False, every_event=False))
    assert (sent.name, json.loads(sent.data or b"")) == (
        event.name,
        {"id": "c", "choices": [{"index": 0, "delta": {"content": "x"}}]},
    )
    assert meter.usage == (7, 0, 3)


def test_who_asked_for_usage_gets_it_at_the_end() -> None:
    assert b"usage" not in relay(TOKEN, include_usage=True)
    assert relay(LAST, include_usage=True) == b"data: " + LAST + b"\n\n"


def test_who_asked_for_running_usage_gets_every_byte() -> None:
    for data in (TOKEN, LAST):
        assert relay(data, include_usage=True, every_event=True) == b"data: " + data + b"\n\n"


def test_the_null_of_those_who_asked_stays() -> None:
    data = b'{"choices":[{"index":0,"delta":{"content":"x"}}],"usage":null}'
    assert relay(data, include_usage=True) == b"data: " + data + b"\n\n"
    assert json.loads(only(relay(data)).data or b"") == {"choices": [{"index": 0, "delta": {"content": "x"}}]}


def test_done() -> None:
    meter = Meter()
    assert relay(b"[DONE]", meter) == b"data: [DONE]\n\n"
    assert meter.done


@pytest.mark.parametrize(
    "data", [b'{"error":{"message":"x","code":500}}', b'{"error":"x"}', b'{"object":"error","error":{}}']
)
def test_an_error_event(data: bytes) -> None:
    meter = Meter()
    assert relay(data, meter) == b"data: " + data + b"\n\n"
    assert meter.failed


@pytest.mark.parametrize("error", [b'"x"', b'{"message":"x"}', b"5", b"true"])
def test_an_error_beside_usage(error: bytes) -> None:
    for data in (LAST, TOKEN):
        meter = Meter()
        relay(data[:-1] + b',"error":' + error + b"}", meter)
        assert meter.failed
        assert meter.usage == (7, 0, 3)


def test_no_error() -> None:
    meter = Meter()
    relay(b'{"error":null,"choices":[{"delta":{"content":"\\"error\\":{}"}}]}', meter)
    assert not meter.failed


def test_choices_report_one_by_one_and_are_summed() -> None:
    meter = Meter(2)

    def event(index: int, tokens: int) -> None:
        document = {
            "choices": [{"index": index, "delta": {"content": "x"}}],
            "usage": {"prompt_tokens": 7, "total_tokens": 7 + tokens, "completion_tokens": tokens},
        }
        for write in (compact, json.dumps):
            relay(write(document).encode(), meter)

    for index, tokens, total in ((0, 1, 1), (1, 1, 2), (0, 2, 3), (0, 1, 3), (1, 5, 7)):
        event(index, tokens)
        assert meter.usage == (7, 0, total)
    relay(LAST.replace(b'"completion_tokens":3', b'"completion_tokens":9'), meter)
    assert meter.usage == (7, 0, 9)


def test_prompts_report_one_by_one_and_are_summed() -> None:
    meter = Meter(choices=4, prompts=2)
    for index, tokens, usage in (
        (0, 1, (7, 0, 1)),
        (1, 2, (7, 0, 3)),
        (2, 1, (14, 0, 4)),
        (3, 5, (14, 0, 9)),
    ):
        document = {
            "choices": [{"index": index, "text": "x"}],
            "usage": {"prompt_tokens": 7, "total_tokens": 7 + tokens, "completion_tokens": tokens},
        }
        relay(compact(document).encode(), meter)
        assert meter.usage == usage


def test_an_estimate_where_nothing_is_reported() -> None:
    meter = Meter()
    relay(
        b'{"choices":[{"delta":{"content":"12345678"}},{"text":"1"},{"message":{"reasoning_content":"1234"}}]}',
        meter,
    )
    relay(
        b'{"choices":[{"delta":{"tool_calls":[{"function":{"name":"f","arguments":"{\\"a\\":1}"}}]}}]}', meter
    )
    assert (meter.text_bytes, meter.estimate_completion()) == (8 + 1 + 4 + 7, 5)
    assert not meter.reported
    relay(LAST, meter)
    relay(b'{"choices":[{"delta":{"content":"12345678"}}]}', meter)
    assert meter.text_bytes == 20


@pytest.mark.parametrize(
    "choice",
    [
        b'{"delta":{"tool_calls":5}}',
        b'{"delta":{"tool_calls":[5,{"function":5}]}}',
        b"5",
        b'{"delta":5}',
        b'{"text":5}',
    ],
)
def test_garbage_in_choices(choice: bytes) -> None:
    meter = Meter()
    relay(b'{"choices":[' + choice + b"]}", meter)
    assert meter.text_bytes == 0


@pytest.mark.parametrize(
    "details",
    [
        b'{"cached_tokens":4}',
        b'{"cached_tokens":4,"created_cache_tokens":9}',
        b'{"created_cache_tokens":9,"cached_tokens":4}',
        b'{"audio_tokens":null,"cached_tokens":4,"x":5}',
        b'{"audio_tokens": null, "cached_tokens": 4}',
    ],
)
def test_cached_tokens(details: bytes) -> None:
    for body in (False, True):
        meter = Meter()
        data = LAST.replace(b"}", b',"prompt_tokens_details":' + details + b"}", 1)
        if body:
            meter.body(data)
        else:
            relay(data, meter)
        assert meter.usage == (7, 4, 3)


def test_cached_tokens_are_those_of_the_prompt() -> None:
    meter = Meter()
    relay(
        b'{"choices":[],"usage":{"prompt_tokens":7,"total_tokens":8,"completion_tokens":1,'
        b'"completion_tokens_details":{"cached_tokens":6},"prompt_tokens_details":{"audio_tokens":null,"cached_tokens":4}}}',
        meter,
    )
    assert meter.usage == (7, 4, 1)
