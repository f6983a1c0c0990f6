"""What is read of the bodies of responses, messages and inputs, what is refused, and what goes on to a backend."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from proxy.errors import RequestError
from proxy.openai import RequestBody, body_for_backend, read_body
from tests.proxy.endpoint_samples import HELLO

ASK = {"model": "m", "input": "hi"}
TALK = {"model": "m", "messages": HELLO}
URL = {"type": "image_url", "image_url": {"url": "http://10.0.0.1/x"}}


def read(endpoint: str, document: Any, **options: Any) -> RequestBody:
    return read_body(endpoint, orjson.dumps(document), **options)


def refused(endpoint: str, document: Any) -> tuple[str, str | None]:
    with pytest.raises(RequestError) as caught:
        read(endpoint, document)
    return caught.value.code, caught.value.param


def test_responses() -> None:
    body = read(
        "responses",
        ASK | {"stream": True, "max_output_tokens": 9, "user": "u", "previous_response_id": "resp_1"},
    )
    assert (body.stream, body.max_tokens, body.session, body.previous_response) == (True, 9, "u", "resp_1")
    assert read("responses", ASK | {"prompt_cache_key": "k", "user": "u"}).session == "k"


def test_messages() -> None:
    body = read("messages", TALK | {"stream": True, "max_tokens": 9, "metadata": {"user_id": "u"}})
    assert (body.stream, body.max_tokens, body.session) == (True, 9, "u")


def test_the_tokens_of_an_input() -> None:
    for given, tokens in (([1, 2, 3], 3), ([[1, 2], [3]], 3)):
        assert read("embeddings", ASK | {"input": given}).prompt_tokens == tokens
    assert read("embeddings", ASK | {"input": ["x" * 4000]}).prompt_tokens in range(1000, 1030)
    assert not read("embeddings", ASK | {"stream": True}).stream


@pytest.mark.parametrize(
    ("endpoint", "fields", "fault"),
    [
        ("responses", {"input": None}, ("missing_field", "input")),
        ("responses", {"input": 5}, ("invalid_value", "input")),
        ("responses", {"stream": "yes"}, ("invalid_value", "stream")),
        ("responses", {"max_output_tokens": -1}, ("invalid_value", "max_output_tokens")),
        ("responses", {"previous_response_id": 5}, ("invalid_value", "previous_response_id")),
        ("responses", {"previous_response_id": "a/b"}, ("invalid_value", "previous_response_id")),
        ("responses", {"model": None}, ("missing_field", "model")),
        ("messages", {"messages": None}, ("missing_field", "messages")),
        ("messages", {"messages": "hi"}, ("invalid_value", "messages")),
        ("messages", {"max_tokens": "many"}, ("invalid_value", "max_tokens")),
        ("count-tokens", {"messages": None}, ("missing_field", "messages")),
    ],
)
def test_what_is_wrong_is_named(endpoint: str, fields: dict[str, Any], fault: tuple[str, str]) -> None:
    assert refused(endpoint, ASK | TALK | fields) == fault


@pytest.mark.parametrize(
    ("endpoint", "fields"),
    [
        ("responses", {"input": [{"role": "user", "content": [URL]}]}),
        ("responses", {"input": [{"content": [{"type": "input_image", "image_url": "https://x/y"}]}]}),
        ("responses", {"input": [{"content": [{"type": "input_file", "file_url": "https://x/y"}]}]}),
        ("responses", {"tools": [{"type": "mcp", "server_url": "http://10.0.0.1"}]}),
        ("messages", {"mcp_servers": [{"type": "url", "name": "x", "url": "http://10.0.0.1"}]}),
        ("count-tokens", {"mcp_servers": [{"type": "url", "name": "x", "url": "http://10.0.0.1"}]}),
        ("messages", {"messages": [{"content": [{"source": {"type": "url", "url": "http://x"}}]}]}),
        ("messages", {"messages": [{"content": [{"type": "tool_result", "content": [URL]}]}]}),
        ("messages", {"system": [URL]}),
        ("count-tokens", {"messages": [{"content": [URL]}]}),
        ("embeddings", {"messages": [{"role": "user", "content": [URL]}]}),
        ("embeddings", {"input": [{"content": [URL]}]}),
        ("rerank", {"query": {"content": [URL]}}),
        ("rerank", {"documents": [{"content": [URL]}]}),
        ("rerank", {"documents": [URL]}),
        ("score", {"text_2": {"content": [URL]}}),
        ("pooling", {"data": {"url": "http://10.0.0.1"}}),
    ],
)
def test_urls_that_an_engine_would_fetch_are_refused(endpoint: str, fields: dict[str, Any]) -> None:
    document = ASK | TALK | fields
    code, _ = refused(endpoint, document)
    assert code == "media_url"
    if fields.keys().isdisjoint({"tools", "mcp_servers"}):
        assert read(endpoint, document, media_urls=True).model == "m"


@pytest.mark.parametrize("endpoint", ["responses", "messages", "embeddings", "count-tokens"])
def test_no_usage_is_asked_for_where_it_comes_by_itself(endpoint: str) -> None:
    document = ASK | TALK | {"stream": True, "stream_options": {"include_obfuscation": False}}
    body = read(endpoint, document)
    assert body_for_backend(body, model="m", continuous=True) == body.raw
    sent = orjson.loads(body_for_backend(body, model="other", continuous=True, cache_salt="s"))
    assert sent == document | {"model": "other", "cache_salt": "s"}
    salted = body_for_backend(body, model="m", continuous=True, cache_salt="s")
    assert orjson.loads(salted) == document | {"cache_salt": "s"}


def test_fields_that_reach_into_an_engine_are_removed() -> None:
    body = read("responses", ASK | {"request_id": "resp_of_another", "priority": -5, "cache_salt": "x"})
    assert orjson.loads(body_for_backend(body, model="m", continuous=True)) == ASK
