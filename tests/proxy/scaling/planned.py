"""A real proxy with standbys that nobody looks after, its admin port and its ledger, for tests of plans."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import typer
from typer.testing import CliRunner

from policies.scaling import Step
from policies.standby import Event, Standby
from proxy.cli import register
from proxy.config import Config
from proxy.records import to_values
from proxy.scaling.planning import Planning
from proxy.scaling.service import Standbys
from proxy.serve import Service
from tests.proxy.rows import a_row, empty_database

COMMANDS = typer.Typer()
for group in ("plans", "templates"):
    register(COMMANDS, group)
STEP = Step("nj", Event.START, "demand of 900 tokens is above 80% of 1000", {"demand": 900.0})


def standby(name: str, site: str, **section: Any) -> dict[str, Any]:
    return {
        "name": name,
        "url": "http://127.0.0.1:9",
        "site": site,
        "models": ["qwen3-32b"],
        "slots": 8,
        "standby": {"command": {"command": ["true"]}, "cost_per_hour": 10.0, **section},
    }


class Proxy:
    """One with two standbys, and what a test asks of it."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.state = str(service.state)

    @property
    def planning(self) -> Planning:
        found = self.service.runtime.planning
        assert found is not None
        return found

    def pays(self, amount: float, site: str = "nanjing") -> None:
        """A request at this site has cost so much, and is in the ledger."""
        row = a_row(
            site=site, backend="nj", currency="CNY", cost_nano=round(amount * 1e9), arrived=time.time()
        )
        self.service.runtime.ledger._put([to_values(row)])

    async def turn(self) -> None:
        await self.planning.turn()

    def uses(self, **scaling: Any) -> None:
        """A reload changes these keys of `scaling`."""
        config = self.planning.config
        written = config.scaling.model_dump(exclude_unset=True) | scaling
        changed = type(config.scaling).model_validate(written)
        self.planning.use(config.model_copy(update={"scaling": changed}))

    async def lives(self, one: Standby, *events: Event, plan: str = "") -> None:
        """A standby makes these moves."""
        for event in events:
            move = one.move(event, f"it is to {event}", time.time(), plan)
            assert move is not None
            self.planning.moved(move)
        await self.turn()

    async def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        fields = {"content-type": "application/json", **headers}
        url = f"http://{self.service.ports.admin}{path}"
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, url, data=data, headers=fields) as response,
        ):
            return response.status, await response.json()

    async def says(self, *arguments: str, status: int = 0) -> str:
        """What `tidegate ...` says to this proxy."""
        found = await asyncio.to_thread(CliRunner().invoke, COMMANDS, [*arguments, "--state", self.state])
        assert found.exit_code == status, (found.output, found.exception)
        return found.stdout + found.stderr


Start = Callable[..., Awaitable[Proxy]]


@pytest.fixture
async def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Start]:
    """Starts a proxy whose standbys nobody looks after: the test says what becomes of them."""
    monkeypatch.setattr(Standbys, "begin", lambda self: None)
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    empty_database(state).dispose()
    async with AsyncExitStack() as stack:

        async def one(**scaling: Any) -> Proxy:
            config = Config.model_validate(
                {
                    "listen": "127.0.0.1:0",
                    "admin": "127.0.0.1:0",
                    "state": state,
                    "log": "off",
                    "currency": "CNY",
                    "sites": {"nanjing": {}, "xian": {}},
                    "backends": [
                        standby("nj", "nanjing", card="H20"),
                        standby("xa", "xian", cost_per_hour=4.0),
                    ],
                    "scaling": scaling,
                }
            )
            service = Service(config)
            await service.start()
            stack.push_async_callback(service.stop)
            return Proxy(service)

        yield one
