"""What `../shared/conformance/sse_check.py` feeds: our reader as it wants one."""

from __future__ import annotations

from proxy.sse import EventReader


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
