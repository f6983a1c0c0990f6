"""The request log: one JSON line per request."""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from typing import Any, Final

import orjson

from proxy.records import Row


class RequestLog:
    """JSON lines, written by a thread of their own: a slow disk or pipe never stops the loop.

    When the reader falls behind by more than `MAX_PENDING` lines, lines are dropped and counted; the ledger has
    them all.
    """

    MAX_PENDING: Final = 100_000

    def __init__(self, descriptor: int, interval_s: float = 0.1) -> None:
        self.dropped = 0
        self._descriptor = descriptor
        self._interval_s = interval_s
        self._lines: deque[tuple[str, Row] | dict[str, Any]] = deque()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="request log", daemon=True)
        self._thread.start()

    @classmethod
    def to(cls, where: str) -> RequestLog | None:
        """`-`: standard output; `off`: none; else a file that is appended to. Raises OSError."""
        if where == "off":
            return None
        if where == "-":
            return cls(sys.stdout.fileno())
        return cls(os.open(where, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640))

    def write(self, line: tuple[str, Row] | dict[str, Any]) -> None:
        """A finished request (its id and row), or any other line; it is put into words in the thread."""
        if len(self._lines) >= self.MAX_PENDING:
            self.dropped += 1
        else:
            self._lines.append(line)

    def close(self) -> None:
        """Write what is left and end."""
        self._stop.set()
        self._thread.join(timeout=2.0)

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        lines = self._lines
        while lines:
            block = [_encode(lines.popleft()) for _ in range(min(len(lines), 100))]
            data = memoryview(b"\n".join(block) + b"\n")
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError:
                self.dropped += len(block)
                return


def _encode(line: tuple[str, Row] | dict[str, Any]) -> bytes:
    return orjson.dumps(line if isinstance(line, dict) else _log_line(*line))


def _log_line(request_id: str, row: Row) -> dict[str, Any]:
    return {
        "time": row.arrived,
        "id": request_id,
        "tenant": row.tenant,
        "key": row.key_id,
        "endpoint": row.endpoint,
        "model": row.model,
        "stream": row.stream,
        "status": row.status,
        "outcome": row.outcome,
        "code": row.code,
        "backend": row.backend,
        "site": row.site,
        "rule": row.rule,
        "policy": row.policy,
        "reason": row.reason,
        "attempts": row.attempts,
        "prompt_tokens": row.prompt_tokens,
        "cached_tokens": row.cached_tokens,
        "completion_tokens": row.completion_tokens,
        "usage": row.usage_source,
        "queue_s": row.queue_s,
        "ttft_s": row.ttft_s,
        "total_s": row.total_s,
        "overhead_s": row.overhead_s,
    }
