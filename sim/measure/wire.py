"""What goes over the wire: the shape of a request, and a streamed answer while it comes."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final

import orjson

MOST_SAID: Final = 200
"""Characters of what a server says of an error."""


class Api(StrEnum):
    """Which of OpenAI's two endpoints is asked."""

    CHAT = "chat"
    COMPLETIONS = "completions"

    @property
    def path(self) -> str:
        """Of its requests."""
        return "/v1/chat/completions" if self is Api.CHAT else "/v1/completions"

    def prompt(self, text: str) -> dict[str, Any]:
        """The field of a body that carries the prompt."""
        return {"messages": [{"role": "user", "content": text}]} if self is Api.CHAT else {"prompt": text}


class Answer:
    """Takes the bytes of a stream of server-sent events, in any pieces, with the time at which they came."""

    __slots__ = (
        "_rest",
        "cached_tokens",
        "done",
        "error",
        "first_at",
        "last_at",
        "output_tokens",
        "prompt_tokens",
        "retry_after",
    )

    def __init__(self) -> None:
        self.first_at: float | None = None
        """When the first token came; None: not yet. Seconds, by the clock of who feeds it."""
        self.last_at: float | None = None
        """When the latest one came."""
        self.prompt_tokens: int | None = None
        """As reported; None: not reported. So are the other counts."""
        self.output_tokens: int | None = None
        self.cached_tokens: int | None = None
        """Of the prompt, from the server's prefix cache."""
        self.done = False
        """Whether the end of the stream was announced."""
        self.error = ""
        """What is wrong with it; empty: nothing so far."""
        self.retry_after = ""
        """The header, where the server refused."""
        self._rest = b""

    def feed(self, data: bytes, at: float) -> None:
        """Read what came at `at`."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and not self.error:
                self._event(line[5:].strip(), at)

    def close(self) -> None:
        """The connection has nothing more: say what is missing."""
        if self.error:
            return
        if not self.done:
            self.error = "the stream was cut"
        elif self.first_at is None:
            self.error = "the stream had no token"
        elif not self.output_tokens:
            self.error = "the server reported no usage"

    def _event(self, data: bytes, at: float) -> None:
        if data == b"[DONE]":
            self.done = True
            return
        try:
            event = orjson.loads(data)
            if "error" in event:
                self.error = f"error event: {message_of(event)}"
                return
            if (choices := event.get("choices")) and not _announces_only(choices[0]):
                if self.first_at is None:
                    self.first_at = at
                self.last_at = at
            if usage := event.get("usage"):
                self.prompt_tokens = int(usage["prompt_tokens"])
                self.output_tokens = int(usage["completion_tokens"])
                details = usage.get("prompt_tokens_details") or {}
                if (cached := details.get("cached_tokens")) is not None:
                    self.cached_tokens = int(cached)
        except (ValueError, LookupError, TypeError, AttributeError):
            self.error = "an event is not what OpenAI's are"


def _announces_only(choice: dict[str, Any]) -> bool:
    """Whether an event of a chat brings its role and no token: some servers send it before the first one."""
    delta = choice.get("delta") or {}
    return (
        "role" in delta
        and not choice.get("finish_reason")
        and not any(value for key, value in delta.items() if key != "role")
    )


def message_of(body: object) -> str:
    """What an error in any of the usual shapes says, in one short line."""
    found = body
    for key in ("error", "message", "detail"):
        if isinstance(found, dict):
            found = found.get(key, found)
    text = " ".join(str(found).split())
    if len(text) <= MOST_SAID:
        return text
    words, _, _ = text[: MOST_SAID - 3].rpartition(" ")
    return f"{words} ..." if words else text[:MOST_SAID]
