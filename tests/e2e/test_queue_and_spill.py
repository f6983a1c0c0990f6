"""Full backends, on real sockets: spilling to remote sites, waiting, and being turned away."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from proxy.tasks import Tasks
from tests.e2e.backends import Backend, Wire, waits
from tests.e2e.proxy_fixtures import Answer, Proxy, StartBackend, StartProxy, eventually

pytestmark = pytest.mark.e2e


def policy(folder: Path, text: str) -> str:
    file = folder / "policy.yaml"
    file.write_text(text)
    return str(file)


class Running:
    """Requests that run beside the test."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self._tasks = Tasks()
        self.all: list[asyncio.Task[Answer]] = []

    def start(self, *lines: str, **fields: Any) -> asyncio.Task[Answer]:
        task = self._tasks.spawn(self.proxy.chat(*lines, **fields), "client")
        self.all.append(task)
        return task

    async def fill(self, backend: Backend, count: int) -> None:
        """Send so many requests and wait until the backend runs them."""
        for _ in range(count):
            self.start()
        await eventually(lambda: backend.running == count)

    async def answers(self) -> list[Answer]:
        return [await task for task in self.all]


async def test_a_request_is_held_until_a_slot_comes_free(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    gate = asyncio.Event()
    backend = await start_backend(waits(gate))
    proxy = await start_proxy({"url": backend.url, "slots": 1})
    running = Running(proxy)
    await running.fill(backend, 1)
    held = running.start(stream=True)
    await eventually(lambda: proxy.runtime.valve.queued == 1)
    state = await proxy.state()
    assert (state["queue"]["waiting"], state["queue"]["by_tenant"]) == (1, {"default": 1})
    await asyncio.sleep(0.15)
    gate.set()
    answer = await held
    assert (answer.status, answer.done) == (200, True)
    assert int(answer.fields["x-tidegate-queue-ms"]) >= 100
    row = await proxy.row(answer)
    assert row.queue_s >= 0.1
    assert row.ttft_s is not None
    assert row.ttft_s >= row.queue_s  # the wait is part of it
    await proxy.idle()


async def test_held_requests_are_served_in_order_and_never_more_than_fit(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    most = 0
    gate = asyncio.Event()

    async def counted(wire: Wire) -> None:
        nonlocal most
        most = max(most, backend.running)
        await gate.wait()
        await wire.whole(200, wire.request.answer(1))

    backend = await start_backend(then=counted)
    proxy = await start_proxy({"url": backend.url, "slots": 2})
    running = Running(proxy)
    await running.fill(backend, 2)
    for number in range(10):
        running.start(user=f"u{number}")
        await eventually(partial(lambda waiting: proxy.runtime.valve.queued == waiting, number + 1))
    gate.set()
    assert {answer.status for answer in await running.answers()} == {200}
    assert most == 2
    assert [r.document["user"] for r in backend.received[2:]] == [f"u{number}" for number in range(10)]
    await proxy.idle()


async def test_waiting_ends_in_queue_timeout_or_queue_full(
    start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    gate = asyncio.Event()
    backend = await start_backend(then=waits(gate))
    rules = "rules: [{name: all, pick: least-load, queue: {wait: 10s, depth: 2}}]"
    proxy = await start_proxy(
        {"url": backend.url, "slots": 1}, policy=policy(tmp_path, rules), timeouts={"total": "600ms"}
    )
    running = Running(proxy)
    await running.fill(backend, 1)
    waiting = [running.start(), running.start()]
    await eventually(lambda: proxy.runtime.valve.queued == 2)
    turned_away = await running.start()
    assert (turned_away.status, turned_away.code) == (429, "queue_full")
    assert int(turned_away.fields["retry-after"]) >= 1
    for task in waiting:
        answer = await task
        assert (answer.status, answer.code) == (503, "queue_timeout")
        assert int(answer.fields["retry-after"]) >= 1
    first = await running.all[0]
    assert (first.status, first.code) == (504, "backend_timeout")
    await proxy.idle()
    assert proxy.backend("a").failed == 0


async def test_a_hold_ends_at_any_backend_rather_than_in_an_error(
    start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    gate = asyncio.Event()
    backend = await start_backend(then=waits(gate))
    rules = "rules: [{name: all, pick: least-load, queue: {wait: 200ms, depth: 2}}]"
    proxy = await start_proxy({"url": backend.url, "slots": 1}, policy=policy(tmp_path, rules))
    running = Running(proxy)
    await running.fill(backend, 1)
    running.start()
    await eventually(lambda: backend.running == 2)
    gate.set()
    assert {answer.status for answer in await running.answers()} == {200}


async def test_what_local_cannot_take_goes_to_a_remote_site_and_comes_back(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    gate = asyncio.Event()
    local, remote = await start_backend(then=waits(gate)), await start_backend(then=waits(gate))
    proxy = await start_proxy({"url": local.url, "slots": 4}, remote)
    running = Running(proxy)
    await running.fill(local, 4)
    for _ in range(3):
        running.start()
    await eventually(lambda: remote.running == 3)
    state = await proxy.state()
    spill = state["spill"][0]
    assert (spill["open"], spill["openings"], spill["backends"]) == (True, 1, ["a"])
    by_name = {backend["name"]: backend for backend in state["backends"]}
    assert (by_name["a"]["saturation"], by_name["b"]["in_flight"]) == (1.0, 3)
    gate.set()
    await running.answers()
    await proxy.idle()
    state = await proxy.state()
    assert {backend["name"]: backend["spilled"] for backend in state["backends"]} == {"a": 0, "b": 3}
    for _ in range(3):
        assert (await proxy.chat()).backend == "a"
    proxy.runtime.poll(proxy.runtime.now())
    assert not (await proxy.state())["spill"][0]["open"]
    answers = await running.answers()
    assert sorted(answer.backend for answer in answers) == ["a"] * 4 + ["b"] * 3


async def test_a_session_stays_where_it_was(
    start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    backends = [await start_backend() for _ in range(4)]
    proxy = await start_proxy(
        *[{"url": backend.url, "site": "local"} for backend in backends],
        policy=policy(tmp_path, "rules: [{name: all, pick: session-affinity}]"),
    )
    homes: dict[str, set[str]] = {}
    for turn in range(4):
        for number in range(12):
            name = f"s{number}"
            header = [f"x-session-id: {name}"] if turn % 2 else []
            fields = {} if turn % 2 else {"user": name}
            homes.setdefault(name, set()).add((await proxy.chat(*header, **fields)).backend)
    assert {len(home) for home in homes.values()} == {1}
    assert len(set.union(*homes.values())) > 1
