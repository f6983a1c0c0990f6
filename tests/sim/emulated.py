"""A client of the emulated server, for tests."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from sim.emulator import Emulator, EmulatorSettings, emulator, plain_profile
from sim.generation import EngineFigures, Generation, SequencePlan

HELLO = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}]}


class Client:
    """A server and a session with it."""

    def __init__(self, server: Emulator, session: aiohttp.ClientSession) -> None:
        self.server = server
        self.session = session

    async def get(self, path: str, **kwargs: Any) -> aiohttp.ClientResponse:
        return await self.session.get(self.server.url + path, **kwargs)

    async def post(self, path: str, body: Any, **kwargs: Any) -> aiohttp.ClientResponse:
        data = body if isinstance(body, bytes) else json.dumps(body)
        return await self.session.post(self.server.url + path, data=data, **kwargs)

    async def chat(self, **fields: Any) -> dict[str, Any]:
        response = await self.post("/v1/chat/completions", HELLO | fields)
        assert response.status == 200, await response.text()
        body: dict[str, Any] = await response.json()
        return body

    async def events(self, path: str = "/v1/chat/completions", **fields: Any) -> list[dict[str, Any]]:
        response = await self.post(path, HELLO | fields | {"stream": True})
        assert response.status == 200, await response.text()
        return events(await response.read())

    async def metrics(self) -> dict[str, float]:
        """Sum over each sample name, and by reason for those that have one."""
        text = await (await self.get("/metrics")).text()
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name = sample.name + sample.labels.get("finished_reason", "")
                found[name] = found.get(name, 0.0) + sample.value
        return found


def events(data: bytes) -> list[dict[str, Any]]:
    *lines, done, end = data.decode().split("\n\n")
    assert done == "data: [DONE]"
    assert end == ""
    return [json.loads(line.removeprefix("data: ")) for line in lines]


class ManualEngine:
    """An engine for one request, which the test drives by hand."""

    def __init__(self) -> None:
        self.generation = Generation([], 0.0)

    def submit(self, plans: Iterable[SequencePlan]) -> Generation:
        self.generation = Generation(plans, 0.0)
        return self.generation

    def advance(self, *steps: tuple[int, int]) -> None:
        """(sequence index, new tokens), all within one turn of the loop."""
        for index, new in steps:
            self.generation.sequences[index].advance(new, 0.0)

    def cancel(self, generation: Generation) -> None:
        pass

    def figures(self) -> EngineFigures:
        return EngineFigures(0, 0, 0.0)


_PLAIN = frozenset(inspect.signature(plain_profile).parameters)


@asynccontextmanager
async def client(**settings: Any) -> AsyncIterator[Client]:
    """`settings`: of `EmulatorSettings`, and of `plain_profile`."""
    plain = {name: settings.pop(name) for name in _PLAIN & settings.keys()}
    chosen: dict[str, Any] = {
        "speed": 100.0,
        "shutdown_timeout_s": 1.0,
        "profile": plain_profile(**plain),
    } | settings
    async with emulator(EmulatorSettings(**chosen)) as server, aiohttp.ClientSession() as session:
        yield Client(server, session)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another connection brings about; the test's own timeout is the bound."""
    while not condition():  # noqa: ASYNC110 - an engine has no event to wait for
        await asyncio.sleep(0.001)


def content(found: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for event in found for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content") or "" for choice in choices)
