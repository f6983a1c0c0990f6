"""Tokens counted while they flow.

Backends are asked to report usage in every event of a stream. What is kept is the last value seen, never a sum
and never a count of events (an event may carry several tokens or none); each figure only grows, since engines
have reported less for a moment during chunked prefill. So when a stream breaks off, the last value is exact for
what came until then. With several choices vLLM's running usage is that of the event's own choice, and only the
last event has the sum: until then the sum is taken here, of the last value of each. Usage that the client did not
ask for is cut out again.

Cutting without a JSON round trip: inside a JSON string a quote is always escaped, so the bytes `,"usage":{` can
only be a key, at any depth. If nothing but plain values follows the object that they open, none of which holds a
brace, then the last brace closes the document, so the key stands at depth 1. That is the shape vLLM writes, in
events that are one line of data; everything else is parsed.
"""

from __future__ import annotations

import re
from typing import Any, Final

import orjson

from proxy.errors import error_event
from proxy.repeated import RepeatedEvent
from proxy.sse import Event

_USAGE_KEY: Final = b',"usage":{'
# vLLM's compact usage at the end of an event: no strings inside, so no brace can hide in one.
_USAGE_TAIL: Final = re.compile(
    rb',"usage":\{"prompt_tokens":([0-9]{1,12}+),"total_tokens":[0-9]{1,12}+(?:,"completion_tokens":([0-9]{1,12}+))?+'
    rb'((?:,"(?!completion_tokens")[a-z_]++":(?:null|[0-9]{1,12}+|\{(?:"[a-z_]++":(?:null|[0-9]{1,12}+),?+)*+\}))*+)\}'
    rb'((?:,"(?!error")[a-z_]++":(?:null|true|false|[0-9]{1,12}+|"[A-Za-z0-9._\-]*+"))*+)\}'
)
_USAGE_ANYWHERE: Final = re.compile(rb'"usage"\s*+:\s*+(\{(?:[^{}]|\{[^{}]*+\})*+\})')
_LONGEST_USAGE: Final = 1024
_TOKENS: Final = frozenset(("prompt_tokens", "input_tokens", "total_tokens"))
_FINISH_KEY: Final = b'"finish_reason"'
_FINISH_REASON: Final = re.compile(_FINISH_KEY + rb'\s*+:\s*+"')
_CHOICE_INDEX: Final = re.compile(rb'"choices": ?+\[\{"index": ?+([0-9]{1,4}+)')
_CACHED: Final = re.compile(
    rb'"prompt_tokens_details":\{(?:"(?!cached_tokens")[a-z_]++":(?:null|[0-9]++),)*+"cached_tokens":([0-9]{1,12}+)'
)
_SHORTEST_CACHED: Final = len(b',"prompt_tokens_details":{"cached_tokens":0}')
_NO_CHOICES: Final = b'"choices":[]'

_LINE_START: Final = len(b"data: ")
_LINE_OVERHEAD: Final = len(b"data: \n\n")

ABORTED: Final = b'"finish_reason":"abort"'
"""vLLM ends a request so when it has to stop (SIGTERM, `/sleep`, `/pause`): whole in shape, not in content."""

BYTES_PER_TOKEN: Final = 4
"""For estimates where a backend reports nothing: about four bytes of English text a token."""


class Meter:
    """The tokens of one attempt."""

    __slots__ = (
        "_by_choice",
        "_by_prompt",
        "_per_prompt",
        "_repeated",
        "_scanned",
        "cached",
        "client_fault",
        "completion",
        "done",
        "failed",
        "fault",
        "finished",
        "prompt",
        "reported",
        "text_bytes",
        "unread",
    )

    def __init__(self, choices: int = 1, prompts: int = 1) -> None:
        """`choices`: over all prompts; a request for completions may bring several."""
        self._by_choice: dict[int, int] | None = {} if choices > 1 else None
        """Completion tokens by index of the choice, where there are several."""
        self._by_prompt: dict[int, int] | None = {} if prompts > 1 else None
        self._per_prompt = max(choices // prompts, 1)
        self._repeated = RepeatedEvent()
        self._scanned = b""
        """End of what `piece` has seen."""
        self.prompt = 0
        self.cached = 0
        self.completion = 0
        self.reported = False
        """Whether the backend reported usage at all."""
        self.text_bytes = 0
        """Bytes of answer text seen while nothing was reported."""
        self.done = False
        """`[DONE]` was seen."""
        self.finished = 0
        """Choices whose finish reason was seen in a stream."""
        self.failed = False
        """The backend sent an error event, or says that it aborted the request."""
        self.client_fault = 0
        """Its status if it was the client's own (400 to 499)."""
        self.fault = b""
        """What it said then."""
        self.unread = False
        """An event was too large to read, so it may have been the end of its stream."""

    @property
    def usage(self) -> tuple[int, int, int]:
        """(prompt, cached, completion) tokens as last reported."""
        return self.prompt, self.cached, self.completion

    def take(self, usage: Any) -> None:
        """A usage object as parsed from JSON, OpenAI's field names; anything else is ignored."""
        if not isinstance(usage, dict):
            return
        details = usage.get("prompt_tokens_details")
        self._take(
            usage.get("prompt_tokens"),
            details.get("cached_tokens") if isinstance(details, dict) else None,
            usage.get("completion_tokens"),
        )

    def _take(self, prompt: Any, cached: Any, completion: Any) -> None:
        self.reported = True
        if type(prompt) is int and prompt > self.prompt:
            self.prompt = prompt
        if type(cached) is int and cached > self.cached:
            self.cached = cached
        if type(completion) is int and completion > self.completion:
            self.completion = completion

    def _matched(self, match: re.Match[bytes], event: bytes = b"") -> None:
        """Usage in vLLM's compact form; `event`: the event it stands in, where running usage may be a part."""
        prompt, completion, details, _ = match.groups()
        self.reported = True
        prompt_tokens, tokens = int(prompt), int(completion or 0)
        if event and self._by_choice is not None:
            prompt_tokens, tokens = self._sums(event, prompt_tokens, tokens)
        if prompt_tokens > self.prompt:
            self.prompt = prompt_tokens
        if tokens > self.completion:
            self.completion = tokens
        if (
            len(details) >= _SHORTEST_CACHED
            and (cached := _CACHED.search(details)) is not None
            and (tokens := int(cached[1])) > self.cached
        ):
            self.cached = tokens

    def body(self, body: bytes) -> None:
        """A whole JSON answer."""
        at = body.rfind(_USAGE_KEY)
        if at >= 0 and (match := _USAGE_TAIL.fullmatch(body, at)) is not None:
            self._matched(match)
            return
        try:
            answer = orjson.loads(body)
        except orjson.JSONDecodeError:
            return
        if not isinstance(answer, dict):
            return
        if (usage := answer.get("usage")) is not None:
            self.take(usage)
        else:
            self.text_bytes += _text_bytes(answer.get("choices"))

    def piece(self, payload: bytes) -> None:
        """A piece of an answer that is too long to keep, or encoded: whatever usage passes by is taken."""
        if self._take_passing(payload).find(ABORTED) >= 0:
            self.failed = True
        self.text_bytes += len(payload)

    def skim(self, payload: bytes) -> None:
        """A piece of an event that is too large to read: likewise, but most of it is no text."""
        self.unread = True
        self._take_passing(payload)

    def _take_passing(self, payload: bytes) -> bytes:
        """-> what was looked through."""
        window = self._scanned + payload
        for match in _USAGE_ANYWHERE.finditer(window):
            try:
                usage = orjson.loads(match[1])
            except orjson.JSONDecodeError:
                continue
            if not _TOKENS.isdisjoint(usage):
                self.take(usage)
        self._scanned = window[-_LONGEST_USAGE:]
        return window

    def recall(self, raw: bytes, chunked: bool = False) -> bytes:
        """Read an event that is like the last one. -> the bytes for a client that did not ask for running usage;
        empty: it is another, and `event` has to read it.

        `raw`: what would be `Event.raw`, if it is one event. `chunked`: answer with one HTTP chunk.
        """
        repeated = self._repeated
        out = repeated.recall(raw, chunked)
        if out and repeated.completion > self.completion:
            self.completion = repeated.completion
        return out

    def event(self, event: Event, *, include_usage: bool, every_event: bool) -> bytes:
        """Read one event of a stream. -> the bytes for the client; empty: the event is not for it.

        `include_usage`: the client asked for the last event with the usage; `every_event`: for running usage.
        """
        data = event.data
        if data is None:
            if event.unread:
                self.skim(event.raw)
            return event.raw
        if not every_event and (out := self.recall(event.raw)):
            return out
        if data.find(ABORTED) >= 0:
            self._parsed(event, data, include_usage=True, every_event=True)
            self.failed = True
            return error_event("backend_error", "the backend aborted the request")
        at = data.find(_FINISH_KEY)  # many times faster than a search for the expression
        while at >= 0:
            if _FINISH_REASON.match(data, at) is not None:
                self.finished += 1
                break
            at = data.find(_FINISH_KEY, at + 1)
        at = data.rfind(_USAGE_KEY)
        if at >= 0:
            match = _USAGE_TAIL.fullmatch(data, at)
            if match is None or len(event.raw) != len(data) + _LINE_OVERHEAD:
                return self._parsed(event, data, include_usage=include_usage, every_event=every_event)
            before = self.completion
            self._matched(match, data)
            if every_event:
                return event.raw
            no_choices = data.find(_NO_CHOICES, 0, at)
            if no_choices < 0:
                if self._by_choice is None:
                    step = self.completion - before
                    _, _, details, rest = match.groups()
                    self._repeated.remember(
                        event.raw, at + _LINE_START, self.prompt, self.completion, step, details, rest
                    )
                return b"data: %b%b}\n\n" % (data[:at], match[4])
            if no_choices + len(_NO_CHOICES) == at:
                return event.raw if include_usage else b""
            return self._parsed(event, data, include_usage=include_usage, every_event=every_event)
        if data == b"[DONE]":
            self.done = True
            return event.raw
        return self._parsed(event, data, include_usage=include_usage, every_event=every_event)

    def _parsed(self, event: Event, data: bytes, *, include_usage: bool, every_event: bool) -> bytes:
        """Any other event: read as JSON, its usage taken and, where it was not asked for, removed."""
        try:
            document = orjson.loads(data)
        except orjson.JSONDecodeError:
            return event.raw
        if not isinstance(document, dict):
            return event.raw
        if (error := document.get("error")) is not None:
            self.failed = True
            code = error.get("code") if isinstance(error, dict) else None
            if type(code) is int and 400 <= code < 500:
                self.client_fault, self.fault = code, data
        choices = document.get("choices")
        if "usage" not in document:
            if not self.reported:
                self.text_bytes += _text_bytes(choices)
            return event.raw
        usage = document["usage"]
        if usage is None:
            # The shape of OpenAI's own servers for clients that asked; it says nothing.
            if not self.reported:
                self.text_bytes += _text_bytes(choices)
        else:
            if self._by_choice is not None and isinstance(usage, dict):
                prompt, tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
                if type(prompt) is int and type(tokens) is int:
                    prompt, tokens = self._sums(data, prompt, tokens)
                    usage = {**usage, "prompt_tokens": prompt, "completion_tokens": tokens}
            self.take(usage)
        if every_event or (include_usage and (choices == [] or usage is None)):
            return event.raw
        if choices == [] and usage is not None:
            return event.raw if include_usage else b""
        del document["usage"]
        name = b"event: %b\n" % event.name if event.name else b""
        try:
            return b"%bdata: %b\n\n" % (name, orjson.dumps(document))
        except orjson.JSONEncodeError:  # it reads deeper nesting than it writes
            return event.raw

    def _sums(self, data: bytes, prompt: int, completion: int) -> tuple[int, int]:
        """Tokens over all prompts and choices, when this event reports those of its own."""
        assert self._by_choice is not None
        match = _CHOICE_INDEX.search(data)
        if match is None:
            return prompt, completion  # the last event, with the sums
        index = int(match[1])
        self._by_choice[index] = max(self._by_choice.get(index, 0), completion)
        if self._by_prompt is not None:
            number = index // self._per_prompt
            self._by_prompt[number] = max(self._by_prompt.get(number, 0), prompt)
            prompt = sum(self._by_prompt.values())
        return prompt, sum(self._by_choice.values())

    def answers(self, events: list[Event]) -> bool:
        """Whether any of these is a piece of the answer. Else they say that the backend lives, and no more."""
        return any(event.data for event in events)

    def withholds(self, event: Event) -> bool:
        """Whether an event in front of all others commits nothing, and is kept: here, none is."""
        return False

    def preface(self) -> bytes:
        """The events that were kept."""
        return b""

    def next_sequence(self) -> int:
        """Number for an event of ours, where events are numbered."""
        return 0

    def estimate_completion(self) -> int:
        """Tokens of the answer for a backend that reports nothing, from the bytes of its text."""
        return -(-self.text_bytes // BYTES_PER_TOKEN)


def _text_bytes(choices: Any) -> int:
    """Bytes of content, reasoning and tool arguments in the choices of one event or answer."""
    if not isinstance(choices, list):
        return 0
    size = 0
    for choice in choices:
        if not isinstance(choice, dict):
            continue
        message = choice.get("delta") or choice.get("message")
        if isinstance(message, dict):
            for field in ("content", "reasoning_content", "reasoning"):
                if isinstance(text := message.get(field), str):
                    size += len(text.encode("utf-8", "surrogatepass"))
            calls = message.get("tool_calls")
            for call in calls if isinstance(calls, list) else ():
                function = call.get("function") if isinstance(call, dict) else None
                if isinstance(function, dict) and isinstance(text := function.get("arguments"), str):
                    size += len(text.encode("utf-8", "surrogatepass"))
        elif isinstance(text := choice.get("text"), str):
            size += len(text.encode("utf-8", "surrogatepass"))
    return size
