"""Reads answers and tells the right ones from the others.

Two layers, both without I/O: `ResponseReader` takes HTTP/1.1 apart, `EventReader` the events of a stream. What is
not exactly as `benchmarks.mock_backend` says it raises `AnswerError`.
"""

from __future__ import annotations

import gzip
import re
from dataclasses import dataclass, field

import orjson

from benchmarks.shapes import answer_text


class AnswerError(Exception):
    """The answer is not what it should be; the text is the reason, the same for all answers of its kind."""


_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[ \t]*chunked", re.IGNORECASE)
_CHUNK_SIZE = re.compile(rb"[0-9a-fA-F]{1,8}")
_CLOSE = re.compile(rb"\r\nconnection:[ \t]*close", re.IGNORECASE)


class ResponseReader:
    """Reads one HTTP/1.1 response, bytes in, body bytes out; framed by length or by chunks."""

    def __init__(self) -> None:
        self.head = b""
        self.complete = False
        self._received = b""
        self._left = 0
        """Body bytes of the message or of the chunk that are still to come."""
        self._chunked = False
        self._in_chunk = False

    @property
    def status(self) -> int:
        """The status code; 0 before the head is there."""
        return int(self.head[9:12]) if self.head else 0

    @property
    def closes(self) -> bool:
        """Whether the server said that it closes the connection after this answer."""
        return bool(_CLOSE.search(self.head))

    def field(self, name: str) -> str:
        """The value of a response header field, empty if there is none."""
        found = re.search(rb"\r\n%b:[ \t]*([^\r]*)" % name.encode(), self.head, re.IGNORECASE)
        return found[1].decode("latin-1") if found else ""

    def content(self, pieces: list[bytes]) -> bytes:
        """The body from what `feed` returned; unpacked, since LiteLLM packs it for who can read that."""
        body = b"".join(pieces)
        return gzip.decompress(body) if self.field("content-encoding") == "gzip" else body

    def feed(self, data: bytes) -> bytes:
        """Take what came in; returns the bytes of the body in it. Raises AnswerError on broken framing."""
        if self.complete:
            raise AnswerError("bytes after the end")
        received = self._received + data if self._received else data
        self._received = b""
        if not self.head:
            end = received.find(b"\r\n\r\n")
            if end < 0:
                self._received = received
                return b""
            self.head = received[: end + 2]
            received = received[end + 4 :]
            self._read_framing()
            if self.complete:
                if received:
                    raise AnswerError("bytes after the end")
                return b""
        return self._feed_chunks(received) if self._chunked else self._feed_length(received)

    def _read_framing(self) -> None:
        if _CHUNKED.search(self.head):
            self._chunked = True
            return
        length = _LENGTH.search(self.head)
        if length is None:
            raise AnswerError("answer without length")
        self._left = int(length[1])
        self.complete = self._left == 0

    def _feed_length(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise AnswerError("bytes after the end")
        self.complete = self._left == 0
        return data

    def _feed_chunks(self, data: bytes) -> bytes:
        pieces = []
        at = 0
        while at < len(data):
            if self._left:
                piece = data[at : at + self._left]
                at += len(piece)
                self._left -= len(piece)
                pieces.append(piece)
            elif self._in_chunk:
                if not data.startswith(b"\r\n", at):
                    if data[at:] == b"\r":
                        self._received = b"\r"
                        break
                    raise AnswerError("broken chunk")
                at += 2
                self._in_chunk = False
            else:
                end = data.find(b"\r\n", at)
                if end < 0:
                    self._received = data[at:]
                    break
                if _CHUNK_SIZE.fullmatch(data, at, end) is None:
                    raise AnswerError("broken chunk")
                self._left = int(data[at:end], 16)
                if self._left == 0:
                    self._end_chunks(data, at, end)
                    break
                self._in_chunk = True
                at = end + 2
        return b"".join(pieces)

    def _end_chunks(self, data: bytes, at: int, end: int) -> None:
        """The last chunk begins at `at`: no proxy here sends trailers, so an empty line must follow."""
        rest = data[end + 2 :]
        if len(rest) < 2:
            self._received = data[at:]
        elif rest == b"\r\n":
            self.complete = True
        else:
            raise AnswerError("bytes after the end")


@dataclass
class Expected:
    """What the answer to one request must be."""

    seed: int
    tokens: int
    usage: bool = False
    """Whether the client asked for usage in its stream."""
    stamped: bool = False
    """Whether the words are send times, as `mock_backend --stamp` writes them."""

    def check_chat(self, body: bytes) -> None:
        """Raise AnswerError unless this is the whole, right answer to a request without a stream."""
        try:
            answer = orjson.loads(body)
            choice = answer["choices"][0]
            content, completion_tokens = choice["message"]["content"], answer["usage"]["completion_tokens"]
        except (ValueError, LookupError, TypeError):
            raise AnswerError("not a chat completion") from None
        if content != answer_text(self.seed, self.tokens):
            raise AnswerError("wrong text")
        if completion_tokens != self.tokens:
            raise AnswerError("wrong usage")


@dataclass
class EventReader:
    """Reads the events of one streamed answer and checks each against what was expected."""

    expected: Expected
    words: list[str] = field(default_factory=list)
    """The text of each token event so far."""
    done: bool = False
    _received: bytes = b""
    _usage: dict[str, int] | None = None

    def feed(self, data: bytes) -> int:
        """Take bytes of the body; returns how many tokens were in them. Raises AnswerError on a wrong event."""
        *events, self._received = (self._received + data).split(b"\n\n")
        before = len(self.words)
        for event in events:
            if event.startswith(b"data: "):
                self._read(event[6:])
            elif event and not event.startswith(b":"):
                raise AnswerError("not an event")
        return len(self.words) - before

    def _read(self, data: bytes) -> None:
        if self.done:
            raise AnswerError("event after [DONE]")
        if data == b"[DONE]":
            self.done = True
            return
        try:
            event = orjson.loads(data)
        except ValueError:
            raise AnswerError("event is not JSON") from None
        if "error" in event:
            raise AnswerError("error event")
        usage = event.get("usage")
        if usage is not None:
            if not self.expected.usage:
                raise AnswerError("usage that was not asked for")
            self._usage = usage
        for choice in event.get("choices", ()):
            content = choice["delta"].get("content")
            if content:
                self.words.append(content)

    def finish(self) -> None:
        """The body has ended: raise AnswerError unless everything was there."""
        expected = self.expected
        if not self.done:
            raise AnswerError("stream without [DONE]")
        if expected.stamped:
            if len("".join(self.words).split()) != expected.tokens:
                raise AnswerError("wrong number of tokens")
        elif "".join(self.words) != answer_text(expected.seed, expected.tokens):
            raise AnswerError("wrong text")
        if expected.usage and (self._usage is None or self._usage["completion_tokens"] != expected.tokens):
            raise AnswerError("wrong usage")
