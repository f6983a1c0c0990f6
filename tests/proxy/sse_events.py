"""Event streams for tests, and our reader as `../shared/conformance/sse_check.py` wants one."""

from __future__ import annotations

import re

from proxy.sse import EventReader

BOM = b"\xef\xbb\xbf"


def canonical(stream: bytes) -> bytes:
    """A CR that is the last byte of a read may end an event: an LF in the next read is dropped. So all line ends
    become LF here, and blank lines that mean nothing are left out."""
    return re.sub(rb"\n\n+", b"\n\n", re.sub(rb"\r\n?", b"\n", stream)).lstrip(b"\n")


def is_bom(stream: bytes) -> bool:
    """Whether there is no more of the stream than the beginning of a byte order mark."""
    return len(stream) < 3 and BOM.startswith(stream)


class Reader:
    """Events as (name, data), those that dispatch nothing left out."""

    def __init__(self) -> None:
        self._reader = EventReader()

    def feed(self, chunk: bytes) -> list[tuple[str | None, str]]:
        return [
            (event.name.decode("utf-8", "replace") or None, event.data.decode("utf-8", "replace"))
            for event in self._reader.feed(chunk)
            if event.data is not None
        ]
