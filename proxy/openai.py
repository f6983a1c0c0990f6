"""What a request body says, and the body that goes on to a backend.

The body is parsed whole, since smuggling hides in what is skipped, and checked as far as a decision or the meter
depends on it; everything else is the engine's to judge. Two parsers may disagree on duplicate keys, so those are
refused. What goes on is the client's own bytes with our fields spliced in, or, where fields must be taken out or
replaced, the parsed document written anew.

The fast parser keeps the last of duplicate keys and makes floats of integers beyond 64 bits. What it writes differs
from what it read then, so only a body that it would write otherwise is read a second time, by the exact one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

import orjson

from policies.lengths import EXPECTED_TOKENS
from proxy.bodies import (
    ENGINE_FIELDS,
    FETCHED_FIELDS,
    MEDIA_FIELDS,
    count,
    is_fetched,
    read_other,
    session,
)
from proxy.endpoints import ANY_BODY, BY_NAME, CHAT_BODY, IMAGE_BODY, PROMPT_BODY, SPEECH_BODY
from proxy.errors import RequestError
from proxy.forms import form_for_backend, read_fields
from proxy.meter import BYTES_PER_TOKEN
from proxy.multipart import Form

LONGEST_MODEL_NAME: Final = 256
"""Characters: what a client invents is kept in rows and records."""


@dataclass(slots=True)
class RequestBody:
    """One body, read and checked."""

    raw: bytes
    document: dict[str, Any]
    model: str
    stream: bool = False
    include_usage: bool = False
    """The client asked for the usage at the end of the stream."""
    every_event: bool = False
    """The client asked for running usage in every event."""
    prompts: int = 1
    choices: int = 1
    """Over all prompts."""
    max_tokens: int = 0
    prompt_tokens: int = 0
    session: str = ""
    background: bool = False
    """It goes on without its client, so a second attempt would be one generation more."""
    previous_response: str = ""
    """Id of the stored response that this request goes on from."""
    asks_usage: bool = True
    """The usage of a stream is asked for by `stream_options`."""
    must_rewrite: bool = False
    """Holds fields that must not go on as they are."""
    form: Form | None = None
    """It is an upload, and this its fields; `document` is empty."""
    digest: str = ""
    """Its `request_hash`, if it came with an `Idempotency-Key`."""

    @property
    def expected_tokens(self) -> int:
        """Forecast of the answer's length over all choices, tokens."""
        length = self.max_tokens or EXPECTED_TOKENS
        return min(length, EXPECTED_TOKENS) * self.choices

    @property
    def reserved_tokens(self) -> int:
        """What a key's limits set aside for the answer: the longest the client allows, over all choices; the
        forecast where it sets no limit."""
        return (self.max_tokens or EXPECTED_TOKENS) * self.choices


_LARGE_BODY_BYTES: Final = 256 * 1024
_HUGE_BODY_BYTES: Final = 4 * 1024 * 1024
_MANY_CONTAINERS: Final = 5_000

COUNTED_BODY_BYTES: Final = 16 * 1024
"""In a larger one its parts are counted before it is parsed. A parser does not let others run before it is done."""
MOST_CONTAINERS: Final = 50_000
"""Objects and lists in one body; conversations have hundreds. Each costs up to a microsecond of everybody."""
MOST_VALUES: Final = 1_000_000
"""Values in one body, roughly: a prompt of token numbers has one for each. They cost 0.05 µs each."""
MOST_CHOICES: Final = 16_384
"""Of `n` and `best_of`: vLLM's own default limit. Beyond, forecasts of load would be nonsense."""


def is_slow_to_read(raw: bytes) -> bool:
    """Whether reading a body may take longer than other requests should wait: in a thread, then.

    A long text is no reason: it is read in a millisecond, and a thread that asks for the interpreter gets it from a
    busy loop only several milliseconds later.
    """
    size = len(raw)
    return size > _HUGE_BODY_BYTES or (
        size > _LARGE_BODY_BYTES and raw.count(b"{") + raw.count(b"[") > _MANY_CONTAINERS
    )


def read_body(endpoint: str, raw: bytes, *, media_urls: bool = False) -> RequestBody:
    """Parse and check a body. Raises RequestError that names the field at fault.

    `media_urls`: whether this client may have the engine fetch URLs.
    """
    document = read_document(raw)
    body = RequestBody(raw, document, model_name(document.get("model")))
    kind = BY_NAME[endpoint].body
    if kind == CHAT_BODY:
        _read_chat(body, document)
        _read_generation(body, document)
    elif kind == PROMPT_BODY:
        _read_prompt(body, document)
        _read_generation(body, document)
    else:
        read_other(kind, body, document)
    if not ENGINE_FIELDS.isdisjoint(document):
        body.must_rewrite = True
    if not media_urls:
        if kind in (CHAT_BODY, ANY_BODY, PROMPT_BODY):
            _refuse_media_urls(document.get("messages"))
        elif kind in (SPEECH_BODY, IMAGE_BODY):
            _refuse_fetched(document)
        else:
            for field in MEDIA_FIELDS[kind]:
                _refuse_media_urls(document.get(field), field)
    return body


def read_document(raw: bytes) -> dict[str, Any]:
    """The object in a body. Raises RequestError for what is none, for duplicate keys and for too many values."""
    if len(raw) > COUNTED_BODY_BYTES and _has_too_many_parts(raw):
        message = f"more than {MOST_CONTAINERS} objects and lists, or {MOST_VALUES} values, in one body"
        raise RequestError("invalid_json", message)
    try:
        document = orjson.loads(raw)
        canonical = orjson.dumps(document) == raw
    except orjson.JSONDecodeError as error:
        raise RequestError("invalid_json", f"the body is not valid JSON: {error}") from None
    except orjson.JSONEncodeError:
        raise RequestError("invalid_json", "the body is nested too deeply") from None
    if type(document) is not dict:
        raise RequestError("invalid_json", "the body must be a JSON object")
    return document if canonical else _read_exactly(raw)


def read_form(endpoint: str, raw: bytes, content_type: bytes, *, media_urls: bool = False) -> RequestBody:
    """As `read_body`, for an upload. `content_type`: value of the field, which has the boundary."""
    form = Form(raw, content_type)
    body = RequestBody(raw, {}, model_name(form.text("model")))
    read_fields(BY_NAME[endpoint], body, form, media_urls=media_urls)
    return body


def model_name(model: Any) -> str:
    """What a client calls its model. Raises RequestError."""
    if type(model) is not str or not model:
        if model is None:
            raise RequestError("missing_field", "you must provide a model parameter", "model")
        raise RequestError("invalid_value", "model must be a non-empty string", "model")
    if len(model) > LONGEST_MODEL_NAME:
        message = f"the name of a model has at most {LONGEST_MODEL_NAME} characters"
        raise RequestError("invalid_value", message, "model")
    return model


_PIECE_BYTES: Final = 64 * 1024
"""What is looked at before others may run: a millisecond, or three if it is full of texts."""


def _has_too_many_parts(raw: bytes) -> bool:
    containers, values = _count_parts(raw)
    if containers <= MOST_CONTAINERS and values <= MOST_VALUES:
        return False
    containers, values = parts_outside_texts(raw)  # which may be full of what looks like them
    return containers > MOST_CONTAINERS or values > MOST_VALUES


def _count_parts(raw: bytes) -> tuple[int, int]:
    """-> containers that begin, and commas."""
    return raw.count(b"{") + raw.count(b"["), raw.count(b",")


def parts_outside_texts(raw: bytes, piece_bytes: int = _PIECE_BYTES) -> tuple[int, int]:
    """Containers and commas of a JSON document without what stands in its texts; until there are too many."""
    containers = values = start = inside = 0
    while start < len(raw) and containers <= MOST_CONTAINERS and values <= MOST_VALUES:
        piece = raw[start : start + piece_bytes]
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2:  # what it escapes belongs to it
            piece = raw[start : start + piece_bytes + 1]
        start += len(piece)
        pieces = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        more = _count_parts(b"".join(pieces[inside::2]))
        containers, values = containers + more[0], values + more[1]
        inside = (inside + len(pieces) - 1) % 2
    return containers, values


def _read_exactly(raw: bytes) -> dict[str, Any]:
    """The object in `raw`, its integers as they are. Raises RequestError for duplicate keys at any depth."""
    try:
        document: dict[str, Any] = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise RequestError("invalid_json", f"the body is not valid JSON: {error}") from None
    return document


def _write(document: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(document)
    except orjson.JSONEncodeError:  # an integer beyond 64 bits
        return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise RequestError("duplicate_key", f"the key {name[:64]!r} stands twice", name[:64])
            seen.add(name)
    return document


def _read_chat(body: RequestBody, document: dict[str, Any]) -> None:
    messages = document.get("messages")
    if type(messages) is not list:
        code = "missing_field" if messages is None else "invalid_value"
        raise RequestError(code, "messages must be a list", "messages")
    for message in messages:
        if type(message) is not dict:
            where = f"messages[{messages.index(message)}]"
            raise RequestError("invalid_value", "each message must be an object", where)
    body.prompt_tokens = len(body.raw) // BYTES_PER_TOKEN


def _read_prompt(body: RequestBody, document: dict[str, Any]) -> None:
    prompt = document.get("prompt")
    if prompt is None and "prompt_embeds" not in document:
        raise RequestError("missing_field", "you must provide a prompt", "prompt")
    if prompt is not None and type(prompt) not in (str, list):
        raise RequestError("invalid_value", "prompt must be a string or a list", "prompt")
    if type(prompt) is list and prompt and type(prompt[0]) is not int:
        body.prompts = body.choices = len(prompt)
    if type(prompt) is list and prompt and type(prompt[0]) is int:
        body.prompt_tokens = len(prompt)
    elif type(prompt) is list and prompt and type(prompt[0]) is list:
        body.prompt_tokens = sum(len(tokens) for tokens in prompt if type(tokens) is list)
    else:
        body.prompt_tokens = len(body.raw) // BYTES_PER_TOKEN


def _read_generation(body: RequestBody, document: dict[str, Any]) -> None:
    """Fields common to chat and completions."""
    stream = document.get("stream")
    if stream is not None:
        if type(stream) is not bool:
            raise RequestError("invalid_value", "stream must be true or false", "stream")
        body.stream = stream
    if "stream_options" in document:
        options = document["stream_options"]
        if options is not None:
            if type(options) is not dict:
                raise RequestError("invalid_value", "stream_options must be an object", "stream_options")
            for name in ("include_usage", "continuous_usage_stats"):
                if type(options.get(name)) not in (bool, type(None)):
                    raise RequestError(
                        "invalid_value", f"{name} must be true or false", f"stream_options.{name}"
                    )
            if not body.stream:
                raise RequestError("invalid_value", "stream_options needs stream: true", "stream_options")
            body.include_usage = bool(options.get("include_usage"))
            body.every_event = body.include_usage and bool(options.get("continuous_usage_stats"))
        body.must_rewrite = True
    if not _COUNTS.isdisjoint(document):
        several = max(count(document, "n", 1, MOST_CHOICES), count(document, "best_of", 1, MOST_CHOICES))
        body.choices = body.prompts * several
        body.max_tokens = count(document, "max_completion_tokens", 0) or count(document, "max_tokens", 0)
    body.session = session(document)


_COUNTS: Final = frozenset(("n", "best_of", "max_tokens", "max_completion_tokens"))


def _refuse_media_urls(messages: Any, field: str = "messages") -> None:
    """An engine that fetches URLs for a client is a way into its network: only data: URLs pass."""
    if field != "messages" and type(messages) is dict:
        messages = [messages]
    if type(messages) is not list:
        return
    for number, message in enumerate(messages):
        content = message.get("content") if type(message) is dict else None
        if content is None and field != "messages":
            content = message  # a part itself, such as an image among texts to embed
        for part_number, part in enumerate(content if type(content) is list else [content]):
            if has_remote_url(part, 0):
                where = f"{field}[{number}].content[{part_number}]"
                raise RequestError("media_url", "media must be sent inline as a data: URL", where)


def _refuse_fetched(document: dict[str, Any]) -> None:
    """The same where sound and pictures stand in fields of their own."""
    for name, value in document.items():
        remote = type(value) is str if name == "url" or name.endswith("_url") else False
        if (
            (remote and value[:5].lower() != "data:")
            or (name in FETCHED_FIELDS and is_fetched(value))
            or (type(value) in (dict, list) and has_remote_url(value, 0))
        ):
            raise RequestError("media_url", "media must be sent inline as a data: URL", name)


def has_remote_url(value: Any, depth: int = 0) -> bool:
    """Whether any `url` or `*_url` inside is no data: URL, or something stands too deep to be looked at."""
    if depth > 8:
        return True
    if type(value) is dict:
        for name, inner in value.items():
            if (name == "url" or name.endswith("_url")) and type(inner) is str:
                if inner[:5].lower() != "data:":
                    return True
            elif type(inner) in (dict, list) and has_remote_url(inner, depth + 1):
                return True
    elif type(value) is list:
        return any(has_remote_url(inner, depth + 1) for inner in value)
    return False


_ASK_USAGE: Final = b'"stream_options":{"include_usage":true,"continuous_usage_stats":true}'
_ASK_FINAL_USAGE: Final = b'"stream_options":{"include_usage":true}'


def body_for_backend(body: RequestBody, *, model: str, continuous: bool, cache_salt: str = "") -> bytes:
    """The body as one backend shall see it.

    `continuous`: the backend knows `continuous_usage_stats` (vLLM does, OpenAI's own servers refuse it).
    `cache_salt`: separates this tenant's prefix cache from others'; empty: the backend does not know it.
    """
    if body.must_rewrite or model != body.model:
        if body.form is not None:
            return form_for_backend(body, body.form, model=model, continuous=continuous)
        document = {name: value for name, value in body.document.items() if name not in ENGINE_FIELDS}
        document["model"] = model
        if not body.asks_usage:
            document.pop("request_id", None)
        else:
            document.pop("stream_options", None)
        if body.stream and body.asks_usage:
            options = dict(body.document.get("stream_options") or {})
            options["include_usage"] = True
            if continuous:
                options["continuous_usage_stats"] = True
            else:
                options.pop("continuous_usage_stats", None)
            document["stream_options"] = options
        if cache_salt:
            document["cache_salt"] = cache_salt
        return _write(document)
    raw = body.raw
    stream = body.stream and body.asks_usage
    if not stream and not cache_salt:
        return raw
    at = raw.index(b"{") + 1
    added = (_ASK_USAGE if continuous else _ASK_FINAL_USAGE) if stream else b""
    if cache_salt:
        salt = b'"cache_salt":"%b"' % cache_salt.encode("ascii")
        added = b"%b,%b" % (added, salt) if added else salt
    return b"%b%b,%b" % (raw[:at], added, raw[at:])
