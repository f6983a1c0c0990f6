"""Tokens of sound and pictures, where a backend tells them; no estimate where it does not.

Engines differ here. For a transcription OpenAI's own models report tokens, a vLLM reports the seconds of sound, or,
in a stream that was asked for it, tokens as for a chat. Speech and most pictures come without any figure. The bytes
of such an answer say nothing of what it cost, so its row has no tokens, but why (`unmetered`), and the seconds if
they are known.
"""

from __future__ import annotations

from typing import Any, Final

import orjson

from proxy import records
from proxy.meter import Meter
from proxy.records import Row
from proxy.sse import Event

LONGEST_S: Final = 1e9
"""Seconds; a backend that tells of more is lying."""

_ENDS: Final = (".done", ".completed")
"""How the names of those events end that are the last, or the last of one picture."""


class MediaMeter(Meter):
    """Answers of `/v1/audio` and `/v1/images`: whole, as events, or bytes."""

    __slots__ = ("audio_s",)

    def __init__(self) -> None:
        super().__init__()
        self.audio_s: float | None = None
        """Seconds of sound that were read, if the backend counts them."""

    def take(self, usage: Any) -> None:
        """A usage object: of tokens, by OpenAI's newer or older names, or of seconds; anything else is ignored."""
        if not isinstance(usage, dict):
            return
        if "input_tokens" in usage or "output_tokens" in usage:
            self._take(usage.get("input_tokens"), cached_tokens(usage), usage.get("output_tokens"))
        elif "prompt_tokens" in usage or "completion_tokens" in usage:
            super().take(usage)
        else:
            self._heard(usage.get("seconds"))

    def body(self, body: bytes) -> None:
        """A whole answer; one that is text and no JSON tells nothing."""
        document = _document(body)
        if document is not None:
            self.take(document.get("usage"))
            self._heard(document.get("duration"))

    def event(self, event: Event, *, include_usage: bool, every_event: bool) -> bytes:
        """Read one event. -> the bytes for the client."""
        document = _document(event.data)
        kind = None if document is None else document.get("type")
        if document is None or type(kind) is not str:  # as those of a chat
            return super().event(event, include_usage=include_usage, every_event=every_event)
        if kind == "error":
            super().event(event, include_usage=True, every_event=True)
            self.failed = True
        elif kind.endswith(_ENDS):
            self.finished += 1
            self.take(document.get("usage"))
        return event.raw

    def estimate_completion(self) -> int:
        """None."""
        return 0

    def _heard(self, seconds: Any) -> None:
        if type(seconds) in (int, float) and 0 <= seconds <= LONGEST_S:
            self.audio_s = float(seconds)


class SessionMeter(Meter):
    """A WebSocket of `/v1/realtime`: the sum over its answers, each of which tells its usage at its end."""

    __slots__ = ()

    def message(self, text: bytes) -> None:
        """Read one message of the backend's."""
        if text.find(b'"usage"') < 0:
            return
        document = _document(text)
        if document is None:
            return
        kind, usage = document.get("type"), document.get("usage")
        if kind == "response.done":
            response = document.get("response")
            usage = response.get("usage") if isinstance(response, dict) else None
        elif kind != "transcription.done":  # vLLM's
            return
        if isinstance(usage, dict):
            self.reported = True
            self.prompt += _count(usage, "input_tokens", "prompt_tokens")
            self.completion += _count(usage, "output_tokens", "completion_tokens")
            cached = cached_tokens(usage)
            if type(cached) is int and cached > 0:
                self.cached += cached

    def estimate_completion(self) -> int:
        """None."""
        return 0


def cached_tokens(usage: dict[str, Any]) -> Any:
    """Those of the prompt that a cache had, by any of the names that OpenAI has for them."""
    for name in ("input_tokens_details", "input_token_details", "prompt_tokens_details"):
        if isinstance(details := usage.get(name), dict):
            return details.get("cached_tokens")
    return None


def say_why_unmetered(row: Row, meter: Meter) -> None:
    """Complete the row of an answer that may have no tokens."""
    seconds = meter.audio_s if isinstance(meter, MediaMeter) else None
    row.audio_s = seconds
    if row.usage_source == "none" and row.outcome == records.OK:
        row.unmetered = "no usage was reported" if seconds is None else "seconds were reported, no tokens"


def _count(usage: dict[str, Any], *names: str) -> int:
    for name in names:
        if type(count := usage.get(name)) is int and count > 0:
            return count
    return 0


def _document(data: bytes | None) -> dict[str, Any] | None:
    if not data:
        return None
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return document if isinstance(document, dict) else None
