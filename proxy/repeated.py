"""The next event of a stream, known by the last one.

Nearly every event of a stream differs from the one before in two places: the text, and the counts of its running
usage, which have grown by the same step. What is equal has been read already, so it is compared and not read
again: an event that equals the expected one in every byte but its text, and whose text is the inside of one JSON
string, says what the meter would have found in it. Any other is the meter's to read, and to go by afterwards.

Nothing can hide in the text: it stands between a quote that opens a value and `",` or `"}`, every quote inside has
a backslash in front, and it holds no control character. So it adds neither a key nor an end of line.
"""

from __future__ import annotations

import re
from typing import Final

from proxy.http1 import SIZE_LINES

_TEXT_KEYS: Final = (b'"content":"', b'"text":"', b'"reasoning":"', b'"reasoning_content":"')
_TEXT: Final = re.compile(rb'"[a-z_]++":"((?:[^"\\\x00-\x1f]|\\[^\x00-\x1f])*+)"[,}]')
_COMPLETION: Final = b',"completion_tokens":'
_MAX_BYTES: Final = 4000
"""A longer event is not kept: there is one for each open stream. With a text it has a line in `SIZE_LINES`."""
_MAX_TEXT: Final = 64
"""Tokens are shorter. Longer text is faster to search for than to walk through byte by byte."""
_DECIMALS: Final = [b"%d" % number for number in range(10_000)]
"""A count is looked up in a third of the time that writing it takes."""
_COMMON: Final[dict[bytes, bytes]] = {}


class RepeatedEvent:
    """The last event of one stream, in the parts that the next one is expected to have."""

    __slots__ = ("_before", "_end", "_prompt", "_step", "_stripped_end", "_to_total", "completion")

    def __init__(self) -> None:
        self.completion = 0
        """Completion tokens that it reported."""
        self._step = 0
        """By how much that grows from event to event."""
        self._before = b""
        """The event up to its text; empty: nothing to go by."""
        self._to_total = b""
        """From behind its text to the total of its tokens."""
        self._end = b""
        """From behind the completion tokens to the end."""
        self._stripped_end = b""
        """From behind its text to the end, without usage."""
        self._prompt = 0

    def remember(
        self, raw: bytes, at: int, prompt: int, completion: int, step: int, details: bytes, rest: bytes
    ) -> None:
        """Keep an event that the meter has read: `raw` is one line `data: …` and the empty line.

        Its usage stands at `raw[at:]`, with `details` behind the completion tokens and `rest` behind the usage.
        """
        self._before = b""
        if step <= 0 or len(raw) > _MAX_BYTES or (text := _find_text(raw, at)) is None:
            return
        to_total = b',"usage":{"prompt_tokens":%d,"total_tokens":' % prompt
        end = b"%b}%b}\n\n" % (details, rest)
        if raw[at:] != b"%b%d%b%d%b" % (to_total, prompt + completion, _COMPLETION, completion, end):
            return  # it counts otherwise
        after = raw[text.end(1) : at]
        self._before = raw[: text.start(1)]
        self._to_total = _common(after + to_total)
        self._end = _common(end)
        self._stripped_end = _common(b"%b%b}\n\n" % (after, rest))
        self._prompt = prompt
        self.completion = completion
        self._step = step

    def recall(self, raw: bytes, chunked: bool) -> bytes:
        """-> the event without its usage if it is the expected one, else nothing; `chunked`: as one HTTP chunk."""
        before = self._before
        if not before or not raw.startswith(before):
            return b""
        completion = self.completion + self._step
        total = self._prompt + completion
        tail = b"%b%b%b%b%b" % (
            self._to_total,
            _DECIMALS[total] if total < len(_DECIMALS) else str(total).encode(),
            _COMPLETION,
            _DECIMALS[completion] if completion < len(_DECIMALS) else str(completion).encode(),
            self._end,
        )
        start, end = len(before), len(raw) - len(tail)
        if end < start or end > start + _MAX_TEXT or not raw.endswith(tail):
            return b""
        position = start
        while position < end:
            byte = raw[position]
            if byte == 92:  # a backslash takes the next byte with it
                position += 1
                byte = raw[position] if position < end else 0
            elif byte == 34:
                return b""
            if byte < 32:
                return b""
            position += 1
        self.completion = completion
        rest = self._stripped_end
        size = end + len(rest)
        if not chunked:
            return b"%b%b%b" % (before, raw[start:end], rest)
        # In one piece: a copy of the event for each layer would cost as much as reading it.
        return b"%b%b%b%b\r\n" % (SIZE_LINES[size], before, raw[start:end], rest)


def _common(value: bytes) -> bytes:
    """One object for what is equal in all streams of a model: it stays in the processor's cache."""
    if len(_COMMON) >= 1024:
        _COMMON.clear()
    return _COMMON.setdefault(value, value)


def _find_text(raw: bytes, end: int) -> re.Match[bytes] | None:
    """The text of an event. One search for each key is many times faster than one for all of them."""
    for key in _TEXT_KEYS:
        at = raw.find(key, 0, end)
        if at >= 0:
            return _TEXT.match(raw, at, end)
    return None
