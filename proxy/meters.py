"""Tokens of the endpoints whose usage comes in certain events only, or for the prompt only.

`proxy/meter.py` is the meter of chats and completions, whose backends report usage in every event. Those of
`/v1/responses` and `/v1/messages` report it at the end, so a stream that breaks off before has its prompt's tokens,
if they were told, and an estimate of the answer's from the bytes of its text. Clients of these endpoints always get
the usage, so nothing is cut out of an event.

Their first events come before any token: `response.created` before the prompt is even read. They commit nothing:
they are kept until the next event, so that up to there another backend can be tried.
"""

from __future__ import annotations

from typing import Any, Final

import orjson

from proxy.dialects import translated
from proxy.endpoints import ANTHROPIC, INPUT, MEDIA, MESSAGES, RESPONSES, SESSION, STORED, Route
from proxy.media import MediaMeter, SessionMeter
from proxy.meter import Meter
from proxy.sse import Event

MOST_WITHHELD: Final = 256 * 1024
"""Bytes of events that are kept before the first one that counts."""

_ENDED: Final = frozenset(
    ("response.completed", "response.incomplete", "response.failed", "response.cancelled")
)
_ENDED_STATUSES: Final = frozenset(("completed", "incomplete", "failed", "cancelled"))


class EventMeter(Meter):
    """What both kinds of event stream share."""

    __slots__ = ("_sequence", "_withheld", "_withheld_bytes", "background", "ended", "response_id")

    def __init__(self) -> None:
        super().__init__()
        self._withheld: list[bytes] = []
        self._withheld_bytes = 0
        self._sequence = -1
        self.response_id = ""
        self.background = False
        """It goes on without its client."""
        self.ended = False
        """Nothing more will be added to it."""

    def recall(self, raw: bytes, chunked: bool = False) -> bytes:
        """No event is known by the last one: see `Meter.recall`."""
        return b""

    def event(self, event: Event, *, include_usage: bool, every_event: bool) -> bytes:
        """Read one event. -> the bytes for the client."""
        document = _document(event.data)
        if document is None:
            if event.unread:
                self.skim(event.raw)
            return event.raw
        if type(number := document.get("sequence_number")) is int:
            self._sequence = number
        kind = document.get("type")
        if kind == "error" or (document.get("error") is not None and kind is None):
            return self._failed(event, document)
        if type(kind) is str:
            self._read(kind, document)
        return event.raw

    def answers(self, events: list[Event]) -> bool:
        """Whether any of these is a piece of the answer, as no `ping` is, wherever it stands."""
        for event in events:
            if event.data:
                document = _document(event.data)
                if document is None or not self._is_prelude(document):
                    return True
        return False

    def withholds(self, event: Event) -> bool:
        """Whether an event in front of all others commits nothing; it is kept then."""
        document = _document(event.data)
        if document is None or not self._is_prelude(document):
            return False
        self._withheld_bytes += len(event.raw)
        if self._withheld_bytes > MOST_WITHHELD:
            return False
        self._withheld.append(self.event(event, include_usage=True, every_event=True))
        return True

    def preface(self) -> bytes:
        """The events that were kept, once."""
        withheld, self._withheld = b"".join(self._withheld), []
        return withheld

    def next_sequence(self) -> int:
        """Number for an event of ours."""
        return self._sequence + 1

    def _is_prelude(self, document: dict[str, Any]) -> bool:
        raise NotImplementedError

    def _read(self, kind: str, document: dict[str, Any]) -> None:
        raise NotImplementedError

    def _failed(self, event: Event, document: dict[str, Any]) -> bytes:
        self.failed = True
        error = document.get("error")
        code = error.get("code") if isinstance(error, dict) else None
        if type(code) is int and 400 <= code < 500:
            self.client_fault, self.fault = code, _written({"error": error}) or event.data or b""
        return event.raw


class ResponsesMeter(EventMeter):
    """`/v1/responses`: usage stands in the response, which the last event holds whole."""

    __slots__ = ("_stored",)

    def __init__(self, stored: bool = False) -> None:
        """`stored`: it was made before, so that it has failed says nothing of its backend now."""
        super().__init__()
        self._stored = stored

    def take(self, usage: Any) -> None:
        """A usage object; anything else is ignored."""
        if not isinstance(usage, dict):
            return
        details = usage.get("input_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, dict) else None
        self._take(usage.get("input_tokens"), cached, usage.get("output_tokens"))

    def body(self, body: bytes) -> None:
        """A whole response."""
        document = _document(body)
        if document is not None:
            self._take_response(document)
            if not self.reported:
                self.text_bytes += _output_bytes(document.get("output"))

    def piece(self, payload: bytes) -> None:
        """A piece of one that is too long to keep: its id stands at its beginning."""
        if not self.response_id and not self.text_bytes:
            self.response_id = _leading_id(payload)
        super().piece(payload)

    def skim(self, payload: bytes) -> None:
        """A piece of an event that is too large to read: only the last one of all has usage."""
        super().skim(payload)
        self.ended = self.ended or self.reported

    def _is_prelude(self, document: dict[str, Any]) -> bool:
        if document.get("type") not in ("response.created", "response.queued", "response.in_progress"):
            return False
        response = document.get("response")
        # Who lets it run in the background wants its id, not its first token.
        return not (isinstance(response, dict) and response.get("background") is True)

    def _read(self, kind: str, document: dict[str, Any]) -> None:
        if type(delta := document.get("delta")) is str:
            self.text_bytes += _size(delta)
            return
        response = document.get("response")
        if isinstance(response, dict):
            self._take_response(response)
        if kind in _ENDED:
            self.ended = True
            if kind == "response.failed" and not self._stored:
                self.failed = True
            else:
                self.done = True

    def _take_response(self, response: dict[str, Any]) -> None:
        if type(name := response.get("id")) is str:
            self.response_id = name
        self.background = response.get("background") is True
        self.ended = response.get("status") in _ENDED_STATUSES
        self.take(response.get("usage"))


class MessagesMeter(EventMeter):
    """`/v1/messages`: usage comes in `message_start` and `message_delta`; of each field the last value counts.

    `input_tokens` are those that no cache had: the prompt's are the sum with both kinds of cached ones
    (https://docs.anthropic.com/en/api/messages#response-usage).
    """

    __slots__ = ("_created", "_input")

    def __init__(self) -> None:
        super().__init__()
        self._input = 0
        self._created = 0

    def take(self, usage: Any) -> None:
        """A usage object, or a part of one; anything else is ignored."""
        if not isinstance(usage, dict):
            return
        if type(tokens := usage.get("input_tokens")) is int and tokens >= 0:
            self._input = tokens
        if type(tokens := usage.get("cache_creation_input_tokens")) is int and tokens >= 0:
            self._created = tokens
        if type(tokens := usage.get("cache_read_input_tokens")) is int and tokens >= 0:
            self.cached = tokens
        if type(tokens := usage.get("output_tokens")) is int and tokens >= 0:
            self.completion = tokens
        self.prompt = self._input + self._created + self.cached

    def body(self, body: bytes) -> None:
        """A whole message."""
        document = _document(body)
        if document is None:
            return
        if isinstance(usage := document.get("usage"), dict):
            self.take(usage)
            self.reported = True
        else:
            self.text_bytes += _content_bytes(document.get("content"))

    def _take_passing(self, payload: bytes) -> bytes:
        window = super()._take_passing(payload)
        self.reported = self.reported or self.completion > 0
        return window

    def _is_prelude(self, document: dict[str, Any]) -> bool:
        return document.get("type") in ("message_start", "ping")

    def _read(self, kind: str, document: dict[str, Any]) -> None:
        if kind == "content_block_delta":
            delta = document.get("delta")
            if isinstance(delta, dict):
                for field in ("text", "thinking", "partial_json"):
                    if type(text := delta.get(field)) is str:
                        self.text_bytes += _size(text)
        elif kind == "message_start":
            message = document.get("message")
            if isinstance(message, dict):
                self.take(message.get("usage"))
        elif kind == "message_delta":
            if isinstance(usage := document.get("usage"), dict):
                self.take(usage)
                self.reported = True
        elif kind == "message_stop":
            self.done = True

    def _failed(self, event: Event, document: dict[str, Any]) -> bytes:
        raw = super()._failed(event, document)
        if document.get("type") == "error":
            return raw
        return b"event: error\ndata: %b\n\n" % translated(ANTHROPIC, 500, event.data or b"")


class InputMeter(Meter):
    """Embeddings, scores and the like: `prompt_tokens`, or only their total."""

    __slots__ = ()

    def take(self, usage: Any) -> None:
        """A usage object; anything else is ignored."""
        if not isinstance(usage, dict):
            return
        tokens = usage.get("prompt_tokens")
        super().take(usage if tokens is not None else {**usage, "prompt_tokens": usage.get("total_tokens")})


def new_meter(route: Route, choices: int = 1, prompts: int = 1) -> Meter:
    """The meter of an endpoint."""
    kind = route.metering
    if kind in (RESPONSES, STORED):
        return ResponsesMeter(kind == STORED)
    if kind == MESSAGES:
        return MessagesMeter()
    if kind == INPUT:
        return InputMeter()
    if kind == MEDIA:
        return MediaMeter()
    if kind == SESSION:
        return SessionMeter()
    return Meter(choices, prompts)


def _document(data: bytes | None) -> dict[str, Any] | None:
    if not data:
        return None
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return document if isinstance(document, dict) else None


def _leading_id(payload: bytes) -> str:
    start = payload[:64].replace(b" ", b"")
    if not start.startswith(b'{"id":"'):
        return ""
    return start[7:].partition(b'"')[0].decode("ascii", "replace")


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _output_bytes(output: Any) -> int:
    """Bytes of text and arguments in the items of a response."""
    size = 0
    for item in output if isinstance(output, list) else ():
        if isinstance(item, dict):
            size += _content_bytes(item.get("content"))
            if type(text := item.get("arguments")) is str:
                size += _size(text)
    return size


def _content_bytes(content: Any) -> int:
    """Bytes of the text of content blocks."""
    size = 0
    for block in content if isinstance(content, list) else ():
        if isinstance(block, dict):
            for field in ("text", "thinking"):
                if type(text := block.get(field)) is str:
                    size += _size(text)
            if isinstance(block.get("input"), dict):
                size += len(_written(block["input"]))
    return size


def _written(value: Any) -> bytes:
    """As JSON; empty: it is nested more deeply than is written, though not than is read."""
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:
        return b""
