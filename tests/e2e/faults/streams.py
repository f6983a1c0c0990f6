"""Clients of a proxy that is a process: what each has read, and when."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from typing import Any, TypeVar

import aiohttp

from proxy.database import DATABASE_FILE
from proxy.tasks import Tasks
from tests.e2e.proxy_fixtures import Answer, Client, chat
from tests.e2e.tidegate_process import TidegateProcess

T = TypeVar("T")

RUNNING_USAGE = {"include_usage": True, "continuous_usage_stats": True}


class Heard(Answer):
    """An answer while it comes."""

    def __init__(self) -> None:
        super().__init__()
        self.at: list[float] = []
        """When each part was read, monotonic."""

    @property
    def backend(self) -> str:
        """Empty: no head has come yet."""
        return self.fields.get("x-tidegate-backend", "")

    @property
    def tokens(self) -> int:
        """Of the answer, as the last whole event that was read says."""
        whole = self.body.rpartition(b"\n\n")[0]
        _, found, rest = whole.rpartition(b'"completion_tokens":')
        return int(rest.partition(b"}")[0].partition(b",")[0]) if found else 0

    @property
    def longest_gap_s(self) -> float:
        """Between two parts."""
        return max((b - a for a, b in zip(self.at, self.at[1:], strict=False)), default=0.0)

    @property
    def cut(self) -> bool:
        """Whether it ended as a stream does that was cut: in one error event, and properly as HTTP."""
        return (
            self.complete
            and len(self.errors) == 1
            and "error" in json.loads(self.events[-1])
            and b"[DONE]" not in self.body
        )


class Clients:
    """Requests that run beside the test, each on a connection of its own."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.heard: list[Heard] = []
        self._tasks = Tasks()
        self._running: list[asyncio.Task[None]] = []

    def start(self, *lines: str, leave_after: int = 0, **fields: Any) -> Heard:
        """A chat; `leave_after`: tokens of a stream behind which the client leaves; 0: it stays."""
        heard = Heard()
        self.heard.append(heard)
        self._running.append(self._tasks.spawn(self._ask(heard, lines, leave_after, fields), "client"))
        return heard

    def stream(self, tokens: int, *lines: str, leave_after: int = 0, **fields: Any) -> Heard:
        """A stream of exactly so many tokens that says with each how many there were."""
        given = {"stream": True, "max_tokens": tokens, "ignore_eos": True, "stream_options": RUNNING_USAGE}
        return self.start(*lines, leave_after=leave_after, **given, **fields)

    async def ended(self, within_s: float = 30.0) -> list[Heard]:
        """Wait for all of them."""
        async with asyncio.timeout(within_s):
            await asyncio.gather(*self._running)
        return self.heard

    async def _ask(
        self, heard: Heard, lines: tuple[str, ...], leave_after: int, fields: dict[str, Any]
    ) -> None:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        try:
            await client.send(chat(None, *lines, **fields))
            async for _ in client.parts(heard):
                heard.at.append(time.monotonic())
                if leave_after and heard.tokens >= leave_after:
                    break
        finally:
            client.reset()


async def ask(port: int, *lines: str, **fields: Any) -> Heard:
    """One chat to its end."""
    clients = Clients(port)
    clients.start(*lines, **fields)
    (heard,) = await clients.ended()
    return heard


async def until(ask: Callable[[], Awaitable[T]], within_s: float = 10.0) -> T:
    """Ask over and over; returns the first true answer. TimeoutError if it takes longer."""
    async with asyncio.timeout(within_s):
        while not (found := await ask()):  # noqa: ASYNC110 - another process has no event to wait for
            await asyncio.sleep(0.01)
    return found


async def readiness(proxy: TidegateProcess) -> int:
    """The status of `/readyz`."""
    async with aiohttp.ClientSession() as session, session.get(f"{proxy.admin}/readyz") as response:
        return response.status


async def rows(proxy: TidegateProcess, count: int) -> dict[str, dict[str, Any]]:
    """The rows of its SQLite ledger by operation, as soon as there are `count`. TimeoutError: there are less."""

    async def enough() -> list[sqlite3.Row]:
        found = ledger.execute("SELECT * FROM ledger").fetchall()
        return found if len(found) >= count else []

    file = proxy.state_folder / DATABASE_FILE
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as ledger:
        ledger.row_factory = sqlite3.Row
        found = await until(enough)
    by_operation = {row["op"]: dict(row) for row in found}
    assert len(by_operation) == len(found), "one is there twice"
    return by_operation
