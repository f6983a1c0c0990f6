"""The round trip: what a handshake takes, and who is not there."""

from __future__ import annotations

import asyncio
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.base import Target, ask
from probes.network import Connect, MinFilter
from tests.probes.fake import FakeBackend


async def test_a_loopback_handshake_takes_time_too() -> None:
    async with FakeBackend() as backend:
        result = await ask(Connect(), Target("a", backend.url), 10.0)
    assert result.value is not None
    assert 0.0 < result.value <= result.duration_s


async def test_a_name_is_looked_up() -> None:
    async with FakeBackend() as backend:
        result = await ask(Connect(), Target("a", f"http://localhost:{backend.port}"), 10.0)
    assert result.ok


async def test_the_next_address_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeBackend() as backend, FakeBackend(listening=False) as closed:
        kind, here = socket.SOCK_STREAM, "127.0.0.1"
        found = [(socket.AF_INET, kind, 6, "", (here, port)) for port in (closed.port, backend.port)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        result = await ask(Connect(), Target("a", "http://two.example"), 10.0)
    assert result.ok


async def test_a_closed_port_refuses() -> None:
    async with FakeBackend(listening=False) as backend:
        result = await ask(Connect(), Target("a", backend.url), 10.0)
    assert (result.ok, result.reason) == (False, "TCP connect: Connection refused")


async def test_an_unknown_name_is_said_to_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    result = await ask(Connect(), Target("a", "http://no.example"), 10.0)
    assert (result.ok, result.reason) == (False, "TCP connect: name not resolved")


async def test_a_lookup_that_hangs_holds_one_thread_however_often_it_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lookups, answer = [], threading.Event()

    def slow(host: str, port: int, *, flags: int = 0, **_: object) -> list[object]:
        if flags & socket.AI_NUMERICHOST:
            raise socket.gaierror
        lookups.append(host)
        answer.wait(30.0)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    connect, target = Connect(), Target("a", "http://slow.example")
    try:
        for _ in range(5):
            assert not (await ask(connect, target, 0.005)).ok
        assert lookups == ["slow.example"]
    finally:
        answer.set()
    result = await ask(connect, target, 10.0)
    assert result.reason == "TCP connect: no address"
    await asyncio.sleep(0)  # the lookup that just ended makes room for the next
    await ask(connect, target, 10.0)
    assert lookups == ["slow.example"] * 2


@given(st.lists(st.floats(0, 1), min_size=1))
def test_law_the_filter_gives_the_least_of_the_last_five(values: list[float]) -> None:
    smallest = MinFilter()
    assert [smallest.add(value) for value in values] == [
        min(values[max(0, index - 4) : index + 1]) for index in range(len(values))
    ]
