"""Connections end when they are old or have carried enough, behind an answer and never within one."""

from __future__ import annotations

import time

import pytest

from tests.e2e import backends as b
from tests.e2e.proxy_fixtures import StartBackend, StartProxy, chat, eventually

pytestmark = pytest.mark.e2e


async def test_a_connection_carries_so_many_requests(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend()
    proxy = await start_proxy(backend, limits={"requests": 2}, timeouts={"backend_idle": "60s"})
    client = await proxy.connect()
    await client.send(chat() + chat(stream=True))
    first, second = await client.answer(), await client.answer()
    assert first.status == 200
    assert "connection" not in first.fields
    assert (second.status, second.fields["connection"], second.done) == (200, "close", True)
    assert await client.closed() == b""
    for _ in range(2):
        assert (await proxy.chat()).status == 200
    assert backend.connections == 2
    await eventually(lambda: backend.open == 0)
    await proxy.idle()


async def test_a_client_connection_that_is_old_ends_behind_its_answer(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    proxy = await start_proxy(await start_backend(), timeouts={"connection": "1h", "idle": "2h"})
    client = await proxy.connect()
    await client.send(chat())
    assert "connection" not in (await client.answer()).fields
    proxy.runtime.now = lambda: time.monotonic() + 3600.0
    await client.send(chat())
    assert (await client.answer()).fields["connection"] == "close"
    assert await client.closed() == b""


async def test_a_backend_connection_that_is_old_is_not_kept(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend(then=b.answers(2, gap_s=0.02))
    proxy = await start_proxy(backend, timeouts={"connection": "10ms", "backend_idle": "60s"})
    for _ in range(3):
        assert (await proxy.chat(stream=True)).done
    assert backend.connections == 3
    await eventually(lambda: backend.open == 0)
