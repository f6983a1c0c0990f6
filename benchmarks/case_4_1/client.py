"""The users of case 4.1: a closed loop of conversations over HTTP, streamed; every answer is checked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
import orjson

from benchmarks.case_4_1.report import Report, Section, reports, starts_s
from benchmarks.case_4_1.sites import LOCAL, MODEL

_SILENCE_S: Final = 120.0
_DATA: Final = b"data: "


class RunError(Exception):
    """A request was not answered as it has to be: the run measures nothing."""


@dataclass(slots=True)
class Seen:
    """What all users together saw."""

    report_s: list[float] = field(default_factory=list)
    """From the first request of each report to the end of its last, seconds of emulated time."""
    requests: list[tuple[str, int, int]] = field(default_factory=list)
    """(backend, prompt tokens, of them cached) of each."""


async def run(
    url: str, users: int, count: int, seed: int, speed: float, progress: Callable[[], None] = lambda: None
) -> Seen:
    """`count` reports of each user; `progress` hears of each. Raises RunError."""
    seen = Seen()
    timeout = aiohttp.ClientTimeout(total=None, sock_read=_SILENCE_S)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4.0)  # below a vLLM's own
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session:

        async def user(number: int, start_s: float) -> None:
            await asyncio.sleep(start_s / speed)
            for report in reports(number, count, seed):
                began = time.perf_counter()
                await _write(session, report, f"user-{number}", seen)
                seen.report_s.append((time.perf_counter() - began) * speed)
                progress()

        try:
            async with asyncio.TaskGroup() as group:
                for number, start_s in enumerate(starts_s(users)):
                    group.create_task(user(number, start_s))
        except* (aiohttp.ClientError, TimeoutError, RunError) as errors:
            raise RunError(str(errors.exceptions[0]) or type(errors.exceptions[0]).__name__) from None
    return seen


async def _write(session: aiohttp.ClientSession, report: Report, user: str, seen: Seen) -> None:
    messages: list[dict[str, str]] = []
    for section in report.sections:
        messages.append({"role": "user", "content": section.text})
        body = orjson.dumps(
            {
                "model": MODEL,
                "messages": messages,
                "max_tokens": section.output_tokens,
                "ignore_eos": True,
                "seed": report.number,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )
        headers = {"content-type": "application/json", "x-session-id": user}
        async with session.post("/v1/chat/completions", data=body, headers=headers) as response:
            data = await response.read()
            if response.status != 200:
                raise RunError(f"status {response.status}: {data[:300].decode(errors='replace')}")
            backend = response.headers.get("x-tidegate-backend", LOCAL.name)
        answer, cached = _read(data, section)
        messages.append({"role": "assistant", "content": answer})
        seen.requests.append((backend, section.prompt_tokens, cached))


def _read(data: bytes, section: Section) -> tuple[str, int]:
    """-> the text of a stream, and prompt tokens that were cached. Raises RunError: it is not what was asked."""
    events = [line[len(_DATA) :] for line in data.split(b"\n") if line.startswith(_DATA)]
    if not events or events[-1].strip() != b"[DONE]":
        raise RunError(f"a stream broke off: {data[-300:].decode(errors='replace')}")
    pieces: list[str] = []
    usage: dict[str, Any] = {}
    for event in map(orjson.loads, events[:-1]):
        for choice in event.get("choices", ()):
            pieces.append(choice["delta"].get("content") or "")
        usage = event.get("usage") or usage
    counted = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    if counted != (section.prompt_tokens, section.output_tokens):
        raise RunError(
            f"{counted} tokens of prompt and answer, not {section.prompt_tokens}, {section.output_tokens}"
        )
    details = usage.get("prompt_tokens_details") or {}
    return "".join(pieces), details.get("cached_tokens") or 0
