"""The endpoints: which paths reach a backend, and what is special about each.

`TABLE` is the only place that lists them. Routing, reading of bodies, metering, the dialect of errors and the table
in docs/api.md come from it, and `tests/proxy/test_endpoints.py` holds every row to the same laws. Nothing else
reaches a backend: an engine's control endpoints stay out of reach.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

OPENAI: Final = "openai"
ANTHROPIC: Final = "anthropic"
"""Dialects: the shape of errors (`proxy/dialects.py`)."""

NO_USAGE: Final = "none"
RUNNING: Final = "running"
"""Usage is asked for in every event of a stream, and cut out again (`proxy/meter.py`)."""
RESPONSES: Final = "responses"
MESSAGES: Final = "messages"
"""Usage comes in certain events of a stream (`proxy/meters.py`)."""
INPUT: Final = "input"
"""Only the prompt has tokens: the answer is numbers."""
STORED: Final = "stored"
"""A response that was made before: its usage counts only if nobody has seen it yet."""
MEDIA: Final = "media"
"""Sound and pictures: tokens where the backend tells them, and no estimate where it does not (`proxy/media.py`)."""
SESSION: Final = "session"
"""The same of a WebSocket, where each answer has its usage."""

METERINGS: Final = (NO_USAGE, RUNNING, RESPONSES, MESSAGES, INPUT, STORED, MEDIA, SESSION)

CHAT_BODY: Final = "chat"
PROMPT_BODY: Final = "prompt"
RESPONSES_BODY: Final = "responses"
MESSAGES_BODY: Final = "messages"
COUNT_BODY: Final = "count"
INPUT_BODY: Final = "input"
SPEECH_BODY: Final = "speech"
IMAGE_BODY: Final = "image"
FORM_BODY: Final = "form"
ANY_BODY: Final = "any"
NO_BODY: Final = "none"
WEBSOCKET: Final = "websocket"
"""How a body is read (`proxy/openai.py`, `proxy/bodies.py`, `proxy/forms.py`); a WebSocket has none."""


@dataclass(slots=True)
class Route:
    """One endpoint."""

    name: str
    """As policies, rows and metrics have it."""
    method: str
    path: str
    """`{id}` stands for the id of a stored response."""
    body: str
    metering: str
    dialect: str = OPENAI
    streams: bool = False
    """Whether a client may ask for events."""
    aliases: tuple[str, ...] = ()
    """Further paths of the same endpoint; backends get the one that was asked for."""
    unmetered: str = ""
    """Why there is no usage; empty: there is."""

    # What follows of it, worked out once: every request asks.
    generates: bool = field(init=False)
    """Whether an engine makes tokens for it."""
    withholds: bool = field(init=False)
    """Whether its streams begin with events that say nothing yet."""
    stores: bool = field(init=False)
    """Whether its answers can be asked for later."""
    stored: bool = field(init=False)
    """Whether it is about such an answer."""
    salted: bool = field(init=False)
    """Whether an engine takes a `cache_salt` with it."""
    form: bool = field(init=False)
    """Whether its body is an upload, `multipart/form-data`."""
    media: bool = field(init=False)
    """Whether a backend may well report no tokens."""

    def __post_init__(self) -> None:
        kind = self.metering
        self.generates = kind in (RUNNING, RESPONSES, MESSAGES)
        self.withholds = kind in (RESPONSES, MESSAGES)
        self.stores = kind == RESPONSES
        self.stored = self.body == NO_BODY
        self.salted = self.generates or kind == INPUT
        self.form = self.body == FORM_BODY
        self.media = kind in (MEDIA, SESSION)


_COUNTS = "nothing is computed but a count"
_TEXT = "text is turned into numbers or back, without a model"

TABLE: Final[tuple[Route, ...]] = (
    Route("chat", "POST", "/v1/chat/completions", CHAT_BODY, RUNNING, streams=True),
    Route("completions", "POST", "/v1/completions", PROMPT_BODY, RUNNING, streams=True),
    Route("responses", "POST", "/v1/responses", RESPONSES_BODY, RESPONSES, streams=True),
    Route("responses-get", "GET", "/v1/responses/{id}", NO_BODY, STORED, streams=True),
    Route(
        "responses-delete",
        "DELETE",
        "/v1/responses/{id}",
        NO_BODY,
        NO_USAGE,
        unmetered="nothing is generated",
    ),
    Route("responses-cancel", "POST", "/v1/responses/{id}/cancel", NO_BODY, STORED),
    Route("messages", "POST", "/v1/messages", MESSAGES_BODY, MESSAGES, ANTHROPIC, streams=True),
    Route(
        "count-tokens",
        "POST",
        "/v1/messages/count_tokens",
        COUNT_BODY,
        NO_USAGE,
        ANTHROPIC,
        unmetered=_COUNTS,
    ),
    Route("embeddings", "POST", "/v1/embeddings", INPUT_BODY, INPUT),
    Route("rerank", "POST", "/v1/rerank", INPUT_BODY, INPUT, aliases=("/rerank", "/v2/rerank")),
    Route("score", "POST", "/v1/score", INPUT_BODY, INPUT, aliases=("/score",)),
    Route("pooling", "POST", "/pooling", INPUT_BODY, INPUT),
    Route("classify", "POST", "/classify", INPUT_BODY, INPUT),
    Route("tokenize", "POST", "/tokenize", ANY_BODY, NO_USAGE, unmetered=_TEXT),
    Route("detokenize", "POST", "/detokenize", ANY_BODY, NO_USAGE, unmetered=_TEXT),
    Route("transcriptions", "POST", "/v1/audio/transcriptions", FORM_BODY, MEDIA, streams=True),
    Route("translations", "POST", "/v1/audio/translations", FORM_BODY, MEDIA, streams=True),
    Route("speech", "POST", "/v1/audio/speech", SPEECH_BODY, MEDIA, streams=True),
    Route("images", "POST", "/v1/images/generations", IMAGE_BODY, MEDIA, streams=True),
    Route("image-edits", "POST", "/v1/images/edits", FORM_BODY, MEDIA, streams=True),
    Route("image-variations", "POST", "/v1/images/variations", FORM_BODY, MEDIA),
    Route("realtime", "GET", "/v1/realtime", WEBSOCKET, SESSION),
)

FORWARD: Final = Route("forward", "*", "*", ANY_BODY, NO_USAGE, unmetered="it is passed on unread")
"""For conformance tests only: whatever comes."""

BY_NAME: Final[dict[str, Route]] = {route.name: route for route in (*TABLE, FORWARD)}

BY_PATH: Final[dict[bytes, Route]] = {
    path.encode(): route
    for route in TABLE
    for path in (route.path, *route.aliases)
    if "{id}" not in path and route.body != WEBSOCKET
}
"""Those whose path is fixed; each takes POST and nothing else."""

_WEBSOCKETS: Final = {route.path.encode(): route for route in TABLE if route.body == WEBSOCKET}

RESPONSE_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
"""Ids of responses that are kept, and looked up."""

_ANSWERED_HERE: Final = (b"/v1/models",)

_STORED_PATH: Final = re.compile(
    rb"(/v1/responses/([A-Za-z0-9_-]{1,128})(/cancel)?)(?:\?[A-Za-z0-9_=&.,%\[\]-]*)?"
)
_STORED: Final = {
    (route.method.encode(), b"/cancel" if route.path.endswith("/cancel") else None): route
    for route in TABLE
    if "{id}" in route.path
}


def find(method: bytes, path: bytes) -> Route | str:
    """The endpoint of a request; else the methods that its path takes; empty: there is no such path."""
    route = BY_PATH.get(path) or _WEBSOCKETS.get(path)
    if route is not None:
        return route if method == route.method.encode() else route.method
    match = _STORED_PATH.fullmatch(path)
    if match is None:
        return ""
    route = _STORED.get((method, match[3]))
    if route is not None:
        return route
    return ", ".join(known.decode() for known, action in _STORED if action == match[3])


def stored_id(target: bytes) -> str:
    """The id of the response that a target names; empty: its query holds what none of the parameters needs."""
    match = _STORED_PATH.fullmatch(target)
    return "" if match is None else match[2].decode()


def no_such_path(path: bytes) -> str:
    """What to say of a path that is not there: which one may be meant."""
    bare = path.rstrip(b"/")
    without_v1 = bare.startswith(b"/v1/v1/")
    for meant in (bare, b"/v1" + bare, bare[3:] if without_v1 else bare):
        if meant in BY_PATH or meant in _WEBSOCKETS or meant in _ANSWERED_HERE:
            break
    else:
        return f"there is no path {path[:64].decode('latin-1')!a} here; docs/api.md lists the endpoints"
    message = f"there is no path {path[:64].decode('latin-1')!a} here: did you mean {meant.decode()}?"
    if meant == b"/v1" + bare:
        message += " API paths begin with /v1, so the base_url of an OpenAI client ends in /v1"
    elif meant != bare:
        message += " The base_url of an Anthropic client ends before /v1"
    return message


def dialect_of(target: bytes) -> str:
    """The dialect in which a request expects its errors, also one that is refused for its head."""
    path = target.partition(b"?")[0]
    return ANTHROPIC if path == b"/v1/messages" or path.startswith(b"/v1/messages/") else OPENAI
