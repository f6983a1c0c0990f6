"""Bodies of the endpoints besides chats and completions: what a decision or the meter needs of each.

All the rest is the engine's to judge, as in `proxy/openai.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from proxy.endpoints import (
    ANY_BODY,
    COUNT_BODY,
    IMAGE_BODY,
    INPUT_BODY,
    MESSAGES_BODY,
    RESPONSE_ID,
    RESPONSES_BODY,
    SPEECH_BODY,
)
from proxy.errors import RequestError
from proxy.meter import BYTES_PER_TOKEN

if TYPE_CHECKING:
    from proxy.openai import RequestBody

ENGINE_FIELDS: Final = frozenset(("cache_salt", "priority", "kv_transfer_params", "vllm_xargs"))
"""Fields by which a client could reach into the engine: other tenants' cache, the queue, other hosts. Removed."""

FETCHED_FIELDS: Final = frozenset(
    ("audio", "file", "image", "images", "input_reference", "mask", "ref_audio", "video")
)
"""Fields of sound and pictures that some engines take as a URL, besides `url` and `..._url`."""

LONGEST_SESSION: Final = 256
"""Characters."""


def count(document: dict[str, Any], name: str, least: int, most: int = 2**31) -> int:
    """A whole number, `least` if it is not given. Raises RequestError."""
    value = document.get(name)
    if value is None:
        return least
    if type(value) is not int or value < least:
        raise RequestError("invalid_value", f"{name} must be a whole number of at least {least}", name)
    if value > most:
        raise RequestError("invalid_value", f"{name} is too large: at most {most}", name)
    return value


def flag(document: dict[str, Any], name: str) -> bool:
    """true or false, the latter if it is not given. Raises RequestError."""
    value = document.get(name)
    if type(value) not in (bool, type(None)):
        raise RequestError("invalid_value", f"{name} must be true or false", name)
    return bool(value)


def session(document: dict[str, Any]) -> str:
    """By which field of OpenAI's APIs requests belong together; empty: by none."""
    for name in ("prompt_cache_key", "user"):
        value = document.get(name)
        if type(value) is str and value:
            return value[:LONGEST_SESSION]
    return ""


def _read_responses(body: RequestBody, document: dict[str, Any]) -> None:
    given = document.get("input")
    if given is None:
        raise RequestError("missing_field", "you must provide an input", "input")
    if type(given) not in (str, list):
        raise RequestError("invalid_value", "input must be a string or a list", "input")
    body.stream = flag(document, "stream")
    body.background = flag(document, "background")
    body.max_tokens = count(document, "max_output_tokens", 0)
    previous = document.get("previous_response_id")
    if previous is not None:
        if type(previous) is not str or RESPONSE_ID.fullmatch(previous) is None:
            raise RequestError(
                "invalid_value", "previous_response_id must be the id of a response", "previous_response_id"
            )
        body.previous_response = previous
    body.session = session(document)
    # With it a client could take the name of somebody else's response.
    body.must_rewrite = "request_id" in document
    _refuse_servers(document.get("tools"))


def _refuse_servers(tools: Any) -> None:
    """An engine that calls a tool server for a client is a way into its network."""
    for number, tool in enumerate(tools if type(tools) is list else ()):
        if type(tool) is dict and type(tool.get("server_url")) is str:
            raise RequestError(
                "media_url", "tools on servers are not reachable here", f"tools[{number}].server_url"
            )


def _refuse_mcp_servers(document: dict[str, Any]) -> None:
    """The same in Anthropic's shape."""
    if document.get("mcp_servers"):
        raise RequestError("media_url", "tools on servers are not reachable here", "mcp_servers")


def _read_messages(body: RequestBody, document: dict[str, Any]) -> None:
    _read_conversation(document)
    body.stream = flag(document, "stream")
    body.max_tokens = count(document, "max_tokens", 0)
    metadata = document.get("metadata")
    user = metadata.get("user_id") if type(metadata) is dict else None
    if type(user) is str:
        body.session = user[:LONGEST_SESSION]


def _read_count(body: RequestBody, document: dict[str, Any]) -> None:
    _read_conversation(document)


def _read_conversation(document: dict[str, Any]) -> None:
    messages = document.get("messages")
    if type(messages) is not list:
        code = "missing_field" if messages is None else "invalid_value"
        raise RequestError(code, "messages must be a list", "messages")
    _refuse_mcp_servers(document)


def _read_input(body: RequestBody, document: dict[str, Any]) -> None:
    given = document.get("input")
    if type(given) is list and given and type(given[0]) is int:
        body.prompt_tokens = len(given)
    elif type(given) is list and given and type(given[0]) is list:
        body.prompt_tokens = sum(len(tokens) for tokens in given if type(tokens) is list)


def _read_speech(body: RequestBody, document: dict[str, Any]) -> None:
    body.stream = flag(document, "stream") or document.get("stream_format") == "sse"
    _read_text(body, document.get("input"))


def _read_image(body: RequestBody, document: dict[str, Any]) -> None:
    body.stream = flag(document, "stream")
    body.session = session(document)
    _read_text(body, document.get("prompt"))


def _read_text(body: RequestBody, text: Any) -> None:
    """The prompt; what else is there may be sound or pictures."""
    size = len(text.encode("utf-8", "replace")) if type(text) is str else 0
    body.prompt_tokens = max(-(-size // BYTES_PER_TOKEN), 1)


def _read_any(body: RequestBody, document: dict[str, Any]) -> None:
    pass


_READERS: Final[dict[str, Callable[[RequestBody, dict[str, Any]], None]]] = {
    RESPONSES_BODY: _read_responses,
    MESSAGES_BODY: _read_messages,
    COUNT_BODY: _read_count,
    INPUT_BODY: _read_input,
    SPEECH_BODY: _read_speech,
    IMAGE_BODY: _read_image,
    ANY_BODY: _read_any,
}

MEDIA_FIELDS: Final[dict[str, tuple[str, ...]]] = {
    RESPONSES_BODY: ("input",),
    MESSAGES_BODY: ("messages", "system"),
    COUNT_BODY: ("messages", "system"),
    INPUT_BODY: (
        *("messages", "input", "query", "queries", "documents", "items", "text_1", "text_2"),
        *("data_1", "data_2", "data"),
    ),
    SPEECH_BODY: (),
    IMAGE_BODY: (),
}
"""Fields that may hold media, besides `messages` of a chat and `FETCHED_FIELDS`."""

# Some parsers of URLs skip blanks and control characters, in front and within (WHATWG URL, section 4.4).
_SKIPPED: Final = r"\s\x00-\x1f\x7f-\x9f\ufeff"
_SCHEME: Final = re.compile(rf"[{_SKIPPED}]*+(?!data:)[a-z][a-z0-9+.\-{_SKIPPED}]*+:", re.IGNORECASE)


def is_fetched(value: Any) -> bool:
    """Whether a field of `FETCHED_FIELDS` names something that an engine would fetch."""
    if type(value) is list:
        return any(is_fetched(inner) for inner in value)
    return type(value) is str and _SCHEME.match(value) is not None


def read_other(kind: str, body: RequestBody, document: dict[str, Any]) -> None:
    """Read a body of another kind than chats and completions. Raises RequestError."""
    body.asks_usage = False
    _READERS[kind](body, document)
    if not body.prompt_tokens:
        body.prompt_tokens = len(body.raw) // BYTES_PER_TOKEN
