"""Server-sent events as the HTML standard reads them, keeping each event's own bytes.

A relay needs both: what an event says, and the bytes it came in, so that what is not changed goes on as it was.
Lines end in LF, CRLF or CR and in nothing else; one byte order mark at the very beginning is dropped; an event
without its blank line at the end of the stream was never finished and is not dispatched.
(WHATWG HTML, section 9.2.6 "Interpreting an event stream".)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_BOM: Final = b"\xef\xbb\xbf"
MAX_EVENT_BYTES: Final = 4 * 1024 * 1024
"""An event that grows beyond this is passed on unread, in pieces, so that memory stays bounded."""


@dataclass(slots=True)
class Event:
    """One block of lines up to and including its blank line."""

    raw: bytes
    data: bytes | None
    """The `data` lines joined by LF; None: a block that dispatches nothing (comments, `retry`), or a piece of
    one that is too large to read."""
    name: bytes = b""
    """Value of `event`; empty: `message`."""
    unread: bool = False
    """It is a piece of one that is too large to read, the last one included."""


class EventReader:
    """Feed it bytes in any pieces; it answers with the events that became complete."""

    __slots__ = (
        "_at_start",
        "_block",
        "_cut_line",
        "_data",
        "_has_data",
        "_held",
        "_name",
        "_pending",
        "_swallow_lf",
        "_too_long",
    )

    def __init__(self) -> None:
        self._at_start = True
        self._pending = bytearray()
        """The line that has not ended."""
        self._block: list[bytes] = []
        """Raw lines of the event that has not ended."""
        self._held = 0
        """Bytes in both."""
        self._data: list[bytes] = []
        self._has_data = False
        self._name = b""
        self._swallow_lf = False
        """The last line ended in CR: an LF that follows belongs to it."""
        self._too_long = False
        """The beginning of the event has been passed on unread."""
        self._cut_line = False
        """And so has the beginning of the line."""

    @property
    def unfinished(self) -> bool:
        """Whether bytes of an event that has not ended are held."""
        return bool(self._pending or self._block or self._too_long)

    @property
    def cut_short(self) -> bool:
        """Whether the beginning of an event that has not ended has been passed on."""
        return self._too_long

    @property
    def between_events(self) -> bool:
        """Whether the next byte begins an event (or, at the very beginning, is a byte order mark)."""
        return not (self._held or self._swallow_lf or self._too_long or self._pending)

    def feed(self, chunk: bytes) -> list[Event]:
        """-> complete events, in order."""
        if (
            self.between_events
            and chunk.startswith(b"data: ")
            and chunk.endswith(b"\n\n")
            and chunk.find(b"\r") < 0
        ):
            # The usual read: whole events of one `data` line each.
            self._at_start = False
            if chunk.find(b"\n") == len(chunk) - 2:
                return [Event(chunk, chunk[6:-2])]
            events = _plain_events(chunk)
            if events is not None:
                return events
        return self._feed_lines(chunk)

    def _feed_lines(self, chunk: bytes) -> list[Event]:
        if self._at_start:
            chunk = bytes(self._pending) + chunk
            self._pending.clear()
            if len(chunk) < 3 and _BOM.startswith(chunk):
                self._pending += chunk
                return []
            self._at_start = False
            chunk = chunk.removeprefix(_BOM)
        if self._swallow_lf and chunk:
            self._swallow_lf = False
            if chunk[0] == 10:
                if self._block:
                    self._block[-1] += b"\n"
                    self._held += 1
                # Else the blank line before it is gone already: a stray LF would end an empty event, so drop it.
                chunk = chunk[1:]
        events: list[Event] = []
        position = 0
        size = len(chunk)
        lf = cr = -1  # the next of each; looked for once, even where the other is found many times before it
        while position < size:
            if lf < position and (lf := chunk.find(b"\n", position)) < 0:
                lf = size
            if cr < position and (cr := chunk.find(b"\r", position)) < 0:
                cr = size
            end = lf if lf < cr else cr
            if end == size:
                break
            behind = end + 1
            if end == cr:
                if behind == size:
                    self._swallow_lf = True
                elif chunk[behind] == 10:
                    behind += 1
            self._line(chunk[position:end], chunk[end:behind], events)
            position = behind
        rest = chunk[position:]
        if rest:
            self._pending += rest
            self._held += len(rest)
        if self._held > MAX_EVENT_BYTES:
            self._give_up(events)
        return events

    def _line(self, line: bytes, ending: bytes, events: list[Event]) -> None:
        self._held += len(line) + len(ending)
        if self._pending:
            line = bytes(self._pending) + line
            self._pending.clear()
        self._block.append(line + ending)
        unread = self._too_long
        if unread:
            if line or self._cut_line:
                self._cut_line = False
                return
            self._too_long = False
        if not line:
            raw = b"".join(self._block)
            data = b"\n".join(self._data) if self._has_data else None
            events.append(Event(raw, data, self._name, unread))
            self._block, self._data, self._has_data, self._name, self._held = [], [], False, b"", 0
            return
        field, _, value = line.partition(b":")
        if field == b"data":
            self._data.append(value.removeprefix(b" "))
            self._has_data = True
        elif field == b"event":
            self._name = value.removeprefix(b" ")

    def _give_up(self, events: list[Event]) -> None:
        """Pass on the beginning of an event that is too long to keep; its rest follows as it comes."""
        events.append(Event(b"".join(self._block) + bytes(self._pending), None, b"", True))
        self._too_long = True
        if self._pending:
            self._cut_line = True
        self._pending.clear()
        self._block, self._held = [], 0
        self._data, self._has_data = [], False


def _plain_events(chunk: bytes) -> list[Event] | None:
    """Events of exactly one `data: ` line each; None when the chunk holds anything else."""
    events = []
    blank = False
    for line in chunk[:-1].split(b"\n"):  # by one byte: C finds that far faster than two
        if blank:
            if line:
                return None
        elif line.startswith(b"data: "):
            events.append(Event(line + b"\n\n", line[6:]))
        else:
            return None
        blank = not blank
    return events
