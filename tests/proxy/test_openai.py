"""What a body says, what is wrong with it, and what goes on to a backend."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.lengths import EXPECTED_TOKENS
from proxy.errors import RequestError
from proxy.openai import (
    ENGINE_FIELDS,
    MOST_CONTAINERS,
    MOST_VALUES,
    RequestBody,
    body_for_backend,
    is_slow_to_read,
    parts_outside_texts,
    read_body,
)

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}


def read(document: Any, endpoint: str = "chat", **options: Any) -> RequestBody:
    raw = document if isinstance(document, bytes) else orjson.dumps(document)
    return read_body(endpoint, raw, **options)


def refused(document: Any, endpoint: str = "chat") -> tuple[str, str | None]:
    """Code and field that a body is refused with."""
    with pytest.raises(RequestError) as caught:
        read(document, endpoint)
    assert caught.value.status == 400
    assert caught.value.message
    return caught.value.code, caught.value.param


# What it says


def test_a_plain_request() -> None:
    body = read(CHAT)
    assert (body.model, body.stream, body.choices, body.max_tokens, body.session) == ("m", False, 1, 0, "")
    assert (body.include_usage, body.every_event, body.must_rewrite) == (False, False, False)
    assert body.expected_tokens == EXPECTED_TOKENS


def test_a_stream_and_its_usage() -> None:
    assert read({**CHAT, "stream": True}).stream
    for options, asked in (
        ({}, (False, False)),
        ({"include_usage": True}, (True, False)),
        ({"include_usage": None}, (False, False)),
        ({"include_usage": True, "continuous_usage_stats": True}, (True, True)),
        ({"include_usage": False, "continuous_usage_stats": True}, (False, False)),
    ):
        body = read({**CHAT, "stream": True, "stream_options": options})
        assert (body.include_usage, body.every_event) == asked
    assert not read({**CHAT, "stream": True, "stream_options": None}).include_usage


def test_lengths() -> None:
    assert read({**CHAT, "max_tokens": 5}).expected_tokens == 5
    assert read({**CHAT, "max_tokens": 5, "n": 3}).expected_tokens == 15
    assert read({**TEXT, "best_of": 3, "n": 2}, "completions").choices == 3
    assert read({**CHAT, "max_tokens": 10**6}).expected_tokens == EXPECTED_TOKENS
    assert read({**CHAT, "max_tokens": 9, "max_completion_tokens": 5}).max_tokens == 5
    assert read({**CHAT, "max_tokens": None, "n": None}).choices == 1


def test_prompt_tokens() -> None:
    assert read({**CHAT, "messages": [{"content": "x" * 4000}]}).prompt_tokens in range(1000, 1030)
    for prompt, tokens in (([1, 2, 3], 3), ([[1, 2], [3]], 3), ([], 9), ("x" * 4000, 1010)):
        body = read({**TEXT, "prompt": prompt}, "completions")
        assert abs(body.prompt_tokens - tokens) < 10
    assert read({"model": "m", "prompt": "x" * 4000}, "tokenize").prompt_tokens in range(1000, 1030)


def test_sessions() -> None:
    assert read({**CHAT, "user": "u"}).session == "u"
    assert read({**CHAT, "user": "u", "prompt_cache_key": "k"}).session == "k"
    assert read({**CHAT, "user": "u", "prompt_cache_key": ""}).session == "u"
    assert read({**CHAT, "user": 5}).session == ""
    assert len(read({**CHAT, "user": "u" * 1000}).session) == 256


# What is wrong with it


@pytest.mark.parametrize(
    "raw",
    [
        *(
            b"",
            b" ",
            b"{",
            b"[]",
            b"null",
            b'"x"',
            b"5",
            b'{"model":"m",}',
            b"{'model':'m'}",
            b'{"model":NaN}',
        ),
        *(
            b'{"model":Infinity}',
            b'{"model":1e400}',
            b'{"model":-1e400}',
            b'{"model":01}',
            b'{"model":"\xff"}',
        ),
        *(
            b'{"model":"\\ud800"}',
            b'{"model":"a\nb"}',
            b'\xef\xbb\xbf{"model":"m"}',
            b'{"model":"m"} x',
            b"\x00",
        ),
        *(
            '{"model":"m"}'.encode("utf-16"),
            b'{"model":' + b"1" * 400 + b"}",
            b'{"a":' * 300 + b"1" + b"}" * 300,
        ),
        *(b"[" * 100_000, b'{"a":' * 100_000, b'{"model":"m","messages":' + b"[" * 300 + b"]" * 300 + b"}"),
    ],
)
def test_invalid_json(raw: bytes) -> None:
    for endpoint in ("chat", "completions", "tokenize"):
        assert refused(raw, endpoint) == ("invalid_json", None)


def test_nesting_that_any_parser_can_read() -> None:
    deep: Any = "x"
    for _ in range(200):
        deep = [deep]
    assert read({**CHAT, "metadata": deep}).model == "m"


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        (b'{"model":"m","messages":[],"model":"n"}', "model"),
        (b'{"model":"m","messages":[],"mod\\u0065l":"n"}', "model"),
        (b'{"model":"m","messages":[],"\\u006dodel" : "n"}', "model"),
        (b'{"model":"m","messages":[{"role":"user","role":"system"}]}', "role"),
        (b'{"model":"m","messages":[],"a":[[{"b":{"c":1,"c":1}}]]}', "c"),
        (b'{\n "model": "m",\n "messages": [],\n "stream": true,\n "stream": false\n}', "stream"),
        (b'{"model":"m","messages":[],"":1,"":2}', ""),
        (b'{"model":"m","messages":[],"\xc3\xa9":1,"\\u00e9":2}', "é"),
    ],
)
def test_duplicate_keys(raw: bytes, key: str) -> None:
    assert refused(raw) == ("duplicate_key", key)


def test_keys_that_only_look_like_duplicates() -> None:
    read(b'{"model":"m","messages":[{"role":"user"},{"role":"user"}],"Model":1,"e\xcc\x81":1,"\xc3\xa9":2}')


@pytest.mark.parametrize(
    ("changes", "endpoint", "expected"),
    [
        ({"model": None}, "chat", ("missing_field", "model")),
        ({"model": ""}, "chat", ("invalid_value", "model")),
        ({"model": 5}, "chat", ("invalid_value", "model")),
        ({"model": ["m"]}, "tokenize", ("invalid_value", "model")),
        ({"messages": None}, "chat", ("missing_field", "messages")),
        ({"messages": "hi"}, "chat", ("invalid_value", "messages")),
        ({"messages": {}}, "chat", ("invalid_value", "messages")),
        ({"messages": [{}, "hi"]}, "chat", ("invalid_value", "messages[1]")),
        ({"messages": [None]}, "chat", ("invalid_value", "messages[0]")),
        ({"prompt": None}, "completions", ("missing_field", "prompt")),
        ({"prompt": 5}, "completions", ("invalid_value", "prompt")),
        ({"prompt": {}}, "completions", ("invalid_value", "prompt")),
        ({"stream": "true"}, "chat", ("invalid_value", "stream")),
        ({"stream": 1}, "completions", ("invalid_value", "stream")),
        ({"stream_options": {}}, "chat", ("invalid_value", "stream_options")),
        ({"stream": False, "stream_options": {}}, "chat", ("invalid_value", "stream_options")),
        ({"stream": True, "stream_options": []}, "chat", ("invalid_value", "stream_options")),
        ({"stream": True, "stream_options": True}, "chat", ("invalid_value", "stream_options")),
        (
            {"stream": True, "stream_options": {"include_usage": 1}},
            "chat",
            ("invalid_value", "stream_options.include_usage"),
        ),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": "x"}},
            "chat",
            ("invalid_value", "stream_options.continuous_usage_stats"),
        ),
        ({"n": 0}, "chat", ("invalid_value", "n")),
        ({"n": "2"}, "chat", ("invalid_value", "n")),
        ({"n": True}, "chat", ("invalid_value", "n")),
        ({"best_of": 0}, "completions", ("invalid_value", "best_of")),
        ({"max_tokens": -1}, "chat", ("invalid_value", "max_tokens")),
        ({"max_tokens": 1.5}, "chat", ("invalid_value", "max_tokens")),
        ({"max_tokens": 2**40}, "chat", ("invalid_value", "max_tokens")),
        ({"max_completion_tokens": []}, "chat", ("invalid_value", "max_completion_tokens")),
    ],
)
def test_wrong_fields_are_named(changes: dict[str, Any], endpoint: str, expected: tuple[str, str]) -> None:
    good = CHAT if endpoint == "chat" else TEXT
    assert refused({**good, **changes}, endpoint) == expected
    assert refused(json.dumps({**good, **changes}).encode(), endpoint) == expected


def test_missing_fields_are_named() -> None:
    for endpoint, good, names in (
        ("chat", CHAT, ("model", "messages")),
        ("completions", TEXT, ("model", "prompt")),
    ):
        for name in names:
            rest = {key: value for key, value in good.items() if key != name}
            assert refused(rest, endpoint) == ("missing_field", name)
    assert read({"model": "m", "prompt_embeds": "eA=="}, "completions").model == "m"


def test_a_long_text_is_no_reason_for_a_thread() -> None:
    def body(content: object) -> bytes:
        return orjson.dumps({"model": "m", "messages": [{"role": "user", "content": content}]})

    assert not is_slow_to_read(body("x" * 1_000_000))
    assert not is_slow_to_read(body([{"type": "text", "text": ""}] * 1_000))
    assert is_slow_to_read(body([{"type": "text", "text": "x" * 60}] * 6_000))
    assert is_slow_to_read(body("x" * 5_000_000))


def test_a_number_beyond_64_bits_is_a_number() -> None:
    assert refused(b'{"model":"m","messages":[],"max_tokens":%d}' % 2**70) == ("invalid_value", "max_tokens")


# Media


def part(url: str, kind: str = "image_url") -> dict[str, Any]:
    return {"type": kind, kind: {"url": url}}


@pytest.mark.parametrize(
    "content",
    [
        [part("http://169.254.169.254/")],
        [{"type": "text", "text": "x"}, part("https://example.com/a.png")],
        [part("file:///etc/passwd", "audio_url")],
        [part("//example.com/a", "video_url")],
        [part(" data:image/png;base64,eA==")],
        [part("")],
        [{"type": "image_url", "image_url": "http://example.com/"}],
        [{"type": "input_image", "image_url": "http://example.com/"}],
        [{"type": "image", "source": {"type": "url", "url": "http://example.com/"}}],
        [{"type": "x", "x": [[{"file_url": "http://example.com/"}]]}],
        part("http://example.com/"),
    ],
)
def test_engines_fetch_nothing_for_clients(content: Any) -> None:
    document = {**CHAT, "messages": [{"role": "user", "content": "x"}, {"role": "user", "content": content}]}
    number = 1 if isinstance(content, list) and len(content) > 1 else 0
    for raw in (orjson.dumps(document), json.dumps(document).encode(), escaped(document)):
        for endpoint in ("chat", "tokenize"):
            assert refused(raw, endpoint) == ("media_url", f"messages[1].content[{number}]")
    assert read(document, media_urls=True).model == "m"


def escaped(document: Any) -> bytes:
    """JSON in which every letter of a string is an escape."""

    def escape(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ",".join(f"{escape(key)}:{escape(inner)}" for key, inner in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ",".join(map(escape, value)) + "]"
        return '"' + "".join(f"\\u{ord(character):04x}" for character in value) + '"'

    return escape(document).encode()


def test_media_may_come_with_the_request() -> None:
    for content in (
        [part("data:image/png;base64,eA=="), part("DATA:audio/wav;base64,eA==", "audio_url")],
        [{"type": "text", "text": 'see "url": http://example.com'}],
        "http://example.com",
        None,
    ):
        assert read({**CHAT, "messages": [{"role": "user", "content": content}]}).model == "m"


def test_nesting_hides_no_url() -> None:
    inner: Any = part("http://example.com/")
    for _ in range(50):
        inner = {"x": [inner]}
    assert refused({**CHAT, "messages": [{"role": "user", "content": [inner]}]})[0] == "media_url"


# What goes on


def sent(document: Any, endpoint: str = "chat", **options: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"model": "m", "continuous": True, **options}
    result: dict[str, Any] = json.loads(body_for_backend(read(document, endpoint), **settings))
    return result


def test_what_needs_no_change_goes_on_byte_for_byte() -> None:
    for raw in (
        orjson.dumps(CHAT),
        b' {\n "model":"m", "messages":[ ] , "x": 1e2}',
        b'{"model":"m","messages":[],"seed":%d}' % 2**80,
    ):
        assert body_for_backend(read(raw), model="m", continuous=True) == raw


@pytest.mark.parametrize("name", sorted(ENGINE_FIELDS))
def test_fields_that_reach_into_the_engine_are_removed(name: str) -> None:
    for endpoint, good in (("chat", CHAT), ("completions", TEXT), ("tokenize", TEXT)):
        assert sent({**good, name: {"x": 1}}, endpoint) == good
        assert sent(escaped({**good, name: "x"}), endpoint) == good
    assert sent({**CHAT, "x": {name: 1}}) == {**CHAT, "x": {name: 1}}


def test_our_cache_salt_replaces_the_clients() -> None:
    assert sent({**CHAT, "cache_salt": "theirs"}, cache_salt="ours") == {**CHAT, "cache_salt": "ours"}
    assert sent(CHAT, cache_salt="ours") == {**CHAT, "cache_salt": "ours"}
    assert body_for_backend(read(CHAT), model="m", continuous=True, cache_salt="s").endswith(
        orjson.dumps(CHAT)[1:]
    )


def test_the_name_of_the_model_is_the_backends() -> None:
    assert sent(CHAT, model="served") == {**CHAT, "model": "served"}


def test_usage_is_asked_for() -> None:
    streaming = {**CHAT, "stream": True}
    both = {"include_usage": True, "continuous_usage_stats": True}
    one = {"include_usage": True}
    assert sent(CHAT) == CHAT
    for asked in (
        {},
        {"include_usage": False},
        one,
        both,
        {"include_usage": True, "continuous_usage_stats": False},
    ):
        assert sent({**streaming, "stream_options": asked}) == {**streaming, "stream_options": both}
        assert sent({**streaming, "stream_options": asked}, continuous=False) == {
            **streaming,
            "stream_options": one,
        }
    assert sent(streaming) == {**streaming, "stream_options": both}
    assert sent(streaming, continuous=False) == {**streaming, "stream_options": one}
    assert sent({**streaming, "stream_options": {"chunk": 5}})["stream_options"] == {"chunk": 5, **both}
    assert sent({**CHAT, "stream": False, "stream_options": None}) == {**CHAT, "stream": False}


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
FIELDS = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["m", "alias", "é"]),
        "messages": st.just([{"role": "user", "content": 'a "quoted" \\ é'}]),
    },
    optional={
        "stream": st.sampled_from([True, False, None]),
        "seed": st.integers(-(2**80), 2**80),
        "temperature": st.floats(0, 2),
        "logit_bias": st.dictionaries(st.text(max_size=3), st.floats(-100, 100), max_size=2),
        "priority": st.integers(),
        "cache_salt": st.text(),
        "vllm_xargs": JSON,
        "metadata": JSON,
        "n": st.integers(1, 3),
    },
)
STREAM_OPTIONS = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {},
        optional={
            "include_usage": st.booleans() | st.none(),
            "continuous_usage_stats": st.booleans(),
            "x": JSON,
        },
    ),
)
WRITERS = st.sampled_from(
    [
        lambda document: json.dumps(document, ensure_ascii=False, separators=(",", ":")),
        json.dumps,
        lambda document: json.dumps(document, indent=2),
        lambda document: json.dumps(document, separators=(",", ":")),
    ]
)


@settings(max_examples=400)
@given(
    FIELDS,
    STREAM_OPTIONS,
    WRITERS,
    st.booleans(),
    st.sampled_from(["", "salt"]),
    st.sampled_from(["m", "served"]),
)
def test_a_backend_gets_the_clients_document_with_known_differences(
    document: dict[str, Any], options: Any, write: Any, continuous: bool, salt: str, model: str
) -> None:
    if document.get("stream"):
        document["stream_options"] = options
    raw = write(document).encode()
    got = body_for_backend(read(raw), model=model, continuous=continuous, cache_salt=salt)

    expected = {name: value for name, value in document.items() if name not in ENGINE_FIELDS}
    expected["model"] = model
    expected.pop("stream_options", None)
    if document.get("stream"):
        asked = {**(options or {}), "include_usage": True}
        asked.pop("continuous_usage_stats", None)
        expected["stream_options"] = {**asked, "continuous_usage_stats": True} if continuous else asked
    if salt:
        expected["cache_salt"] = salt
    assert exact(json.loads(got, object_pairs_hook=unique)) == exact(expected)


def exact(value: Any) -> Any:
    """A value to compare without 1 == 1.0 == True."""
    if isinstance(value, dict):
        return {name: exact(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [exact(inner) for inner in value]
    return type(value).__name__, value


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len({name for name, _ in pairs}) == len(pairs), "a key stands twice"
    return dict(pairs)


@settings(max_examples=300)
@given(
    st.one_of(st.binary(max_size=60), JSON.map(json.dumps).map(str.encode)),
    st.sampled_from(["chat", "completions", "tokenize"]),
)
def test_any_body_is_read_or_refused(raw: bytes, endpoint: str) -> None:
    for data in (raw, b'{"model":"m","prompt":"x","messages":[],"x":' + raw + b"}"):
        try:
            body = read_body(endpoint, data)
        except RequestError:
            continue
        json.loads(body_for_backend(body, model="other", continuous=True, cache_salt="s"))


def test_the_name_of_a_model_is_bounded() -> None:
    document = {"model": "m" * 257, "messages": []}
    with pytest.raises(RequestError) as caught:
        read_body("chat", orjson.dumps(document))
    assert (caught.value.code, caught.value.param) == ("invalid_value", "model")


@pytest.mark.parametrize(
    ("prompt", "prompts"), [("a", 1), (["a", "b"], 2), ([1, 2, 3], 1), ([[1, 2], [3]], 2)]
)
def test_each_prompt_of_a_list_has_choices_of_its_own(prompt: object, prompts: int) -> None:
    body = read_body("completions", orjson.dumps({"model": "m", "prompt": prompt, "n": 3, "max_tokens": 10}))
    assert (body.prompts, body.choices, body.reserved_tokens) == (prompts, 3 * prompts, 30 * prompts)


def test_a_body_of_very_many_objects_is_refused_and_text_that_looks_like_one_is_not() -> None:
    many = {**CHAT, "metadata": [{}] * (MOST_CONTAINERS + 1)}
    assert refused(many)[0] == "invalid_json"
    numbers = {"model": "m", "prompt": [1] * (MOST_VALUES + 2)}
    with pytest.raises(RequestError, match="values"):
        read_body("completions", orjson.dumps(numbers))
    text = "," * (MOST_VALUES + 1) + "{[" * MOST_CONTAINERS + '\\"{'
    assert read({"model": "m", "messages": [{"role": "user", "content": text}]}).model == "m"


TEXTS = st.lists(st.sampled_from(['"', "\\", "{", "[", ",", "a", "é"]), max_size=12).map("".join)
DOCUMENTS = st.recursive(
    st.one_of(st.none(), st.integers(-9, 9), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
)


def counted(document: object) -> tuple[int, int]:
    """Containers and commas of a document that is written without spaces."""
    inner = list(
        document.values() if isinstance(document, dict) else document if isinstance(document, list) else ()
    )
    counts = [counted(one) for one in inner]
    own = (int(isinstance(document, dict | list)), max(0, len(inner) - 1))
    return own[0] + sum(count[0] for count in counts), own[1] + sum(count[1] for count in counts)


@given(DOCUMENTS, st.integers(1, 20))
def test_law_parts_are_counted_outside_of_texts_wherever_they_are_cut(document: object, piece: int) -> None:
    assert parts_outside_texts(orjson.dumps(document), piece) == counted(document)
