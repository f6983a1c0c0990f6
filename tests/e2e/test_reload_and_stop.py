"""Reloading under load, which nobody is to notice, and stopping, at which everybody is to get an end."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from proxy.tasks import Tasks
from tests.e2e import backends as b
from tests.e2e.backends import answers, waits
from tests.e2e.conftest import StartTidegate
from tests.e2e.faults.figures import Figure
from tests.e2e.proxy_fixtures import (
    HELLO,
    Answer,
    Proxy,
    StartBackend,
    StartProxy,
    bound,
    chat,
    chat_body,
    eventually,
)

pytestmark = pytest.mark.e2e


def rewrite(file: Path, change: dict[str, Any]) -> None:
    """Change a configuration as an editor does: a new file in the old one's place."""
    fresh = file.with_suffix(".new")
    fresh.write_text(json.dumps(json.loads(file.read_text()) | change))
    fresh.replace(file)


async def test_a_changed_file_is_read_and_a_bad_one_is_not(
    start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    file = tmp_path / "tidegate.yaml"
    proxy = await start_proxy(await start_backend(), file=file)
    assert (await proxy.chat(model="gpt-4")).status == 404
    rewrite(file, {"aliases": {"gpt-4": "m"}})
    await eventually(lambda: proxy.runtime.observer.reloads_ok == 1)
    assert (await proxy.chat(model="gpt-4")).status == 200

    good = file.read_text()
    file.write_text("{")
    await eventually(lambda: proxy.runtime.observer.reloads_failed == 1)
    for bad in ('{"listen": 7}', good.replace('"aliases"', '"alliases"'), good.replace('"m"', "{}", 1)):
        file.write_text(bad)
        assert not proxy.service.reload()
        assert (await proxy.chat(model="gpt-4")).status == 200
    metrics = (await proxy.get("/metrics"))[1]
    assert b"tidegate_config_last_reload_successful 0.0" in metrics
    file.write_text(good)
    await eventually(lambda: proxy.runtime.observer.reload_ok)
    observer = proxy.runtime.observer
    assert (observer.reloads_ok, observer.reloads_failed) == (2, 4)  # nothing is read twice
    assert b"tidegate_config_last_reload_successful 1.0" in (await proxy.get("/metrics"))[1]


async def test_a_file_with_one_mistake_changes_nothing_at_all(
    start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    file = tmp_path / "tidegate.yaml"
    backend = await start_backend()
    proxy = await start_proxy({"url": backend.url, "slots": 4}, file=file)
    endpoint = proxy.runtime.endpoints["a"]
    section = json.loads(file.read_text())["backends"][0]
    rewrite(
        file, {"backends": [section | {"slots": 9, "models": ["n"], "weight": 7}], "policy": "no-such-policy"}
    )
    assert not proxy.service.reload()
    state = proxy.backend("a")
    assert (state.slots, set(state.models), state.weight) == (4, {"m"}, 1.0)
    assert proxy.runtime.endpoints["a"] is endpoint
    rewrite(file, {"policy": "local-first"})
    assert proxy.service.reload()
    state = proxy.backend("a")
    assert (state.slots, set(state.models), state.weight) == (9, {"n"}, 7.0)


async def test_a_policy_file_is_watched_too(
    start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    rules = tmp_path / "policy.yaml"
    rules.write_text("rules: [{name: all, sites: [local], pick: least-load}]")
    proxy = await start_proxy(
        await start_backend(), await start_backend(), file=tmp_path / "tidegate.yaml", policy=str(rules)
    )
    assert (await proxy.chat()).backend == "a"
    rules.write_text("rules: [{name: all, sites: [remote], pick: least-load}]")
    await eventually(lambda: proxy.runtime.observer.reloads_ok)
    assert (await proxy.chat()).backend == "b"


async def test_a_rotated_backend_key_is_taken_up(
    start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("first")
    backend = await start_backend()
    proxy = await start_proxy(
        {"url": backend.url, "api_key_file": str(secret)}, file=tmp_path / "tidegate.yaml"
    )
    await proxy.chat()
    secret.write_text("second")
    assert proxy.service.reload()
    await proxy.chat()
    assert [r.fields["authorization"] for r in backend.received] == ["Bearer first", "Bearer second"]


async def test_what_runs_on_a_removed_backend_ends_there(
    start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    gate = asyncio.Event()
    old, new = await start_backend(then=waits(gate, 5)), await start_backend()
    file = tmp_path / "tidegate.yaml"
    proxy = await start_proxy({"url": old.url, "slots": 1}, file=file)
    first, second = await proxy.connect(), await proxy.connect()
    await first.send(chat(stream=True))
    await eventually(lambda: old.running)
    await second.send(chat(stream=True))
    await eventually(lambda: proxy.runtime.held)
    section = json.loads(file.read_text())["backends"][0]
    rewrite(file, {"backends": [section | {"name": "z", "url": new.url}]})
    assert proxy.service.reload()
    held = await second.answer()  # it waits no more: another may serve it
    assert (held.backend, held.done) == ("z", True)
    gate.set()
    answer = await first.answer()
    assert (answer.backend, answer.text, answer.done) == ("a", "xxxxx", True)
    assert (await proxy.row(answer)).outcome == "ok"
    await eventually(lambda: old.open == 0)  # its connections are not kept
    await proxy.idle()


async def test_an_unchanged_backend_keeps_counts_and_connections(
    start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    gate = asyncio.Event()
    backend = await start_backend(answers(), waits(gate), then=answers())
    file = tmp_path / "tidegate.yaml"
    proxy = await start_proxy(backend, file=file)
    await proxy.chat()
    client = await proxy.connect()
    await client.send(chat(stream=True))
    await eventually(lambda: proxy.backend("a").in_flight == 1)
    rewrite(file, {"aliases": {"x": "m"}})
    assert proxy.service.reload()
    assert (proxy.backend("a").in_flight, proxy.backend("a").ok) == (1, 1)
    gate.set()
    assert (await client.answer()).done
    await proxy.chat()
    assert backend.connections == 1
    await proxy.idle()


class Load:
    """Clients that ask one request after the other until they are told to stop."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.wrong: list[str] = []
        self.served = 0
        self._stop = False
        self._tasks = Tasks()

    async def run(self, session: aiohttp.ClientSession, stream: bool) -> None:
        body = {"model": "m", "messages": HELLO, "stream": stream}
        while not self._stop:
            try:
                async with session.post(f"{self.url}/v1/chat/completions", json=body) as response:
                    text = await response.text()
                    whole = text.endswith("data: [DONE]\n\n") if stream else '"usage"' in text
                    if response.status != 200 or not whole:
                        self.wrong.append(f"{response.status} {text[-200:]}")
            except aiohttp.ClientError as error:
                self.wrong.append(repr(error))
            self.served += 1

    async def during(self, action: Any) -> None:
        async with aiohttp.ClientSession() as session:
            clients = [self._tasks.spawn(self.run(session, n % 2 == 0), "client") for n in range(8)]
            await action()
            self._stop = True
            await asyncio.gather(*clients)


async def test_reloads_by_signal_under_load_fail_no_request(
    start_backend: StartBackend, tidegate: StartTidegate, figure: Figure
) -> None:
    first, second = await start_backend(then=answers(3, gap_s=0.002)), await start_backend()
    sections = [
        {"name": "a", "url": first.url, "models": ["m"], "slots": 3},
        {"name": "b", "url": second.url, "models": ["m"], "slots": 3, "site": "far"},
    ]
    proxy = await asyncio.to_thread(
        tidegate, *sections, sites={"far": {}}, probing={"enabled": False}, log="off"
    )
    load, fresh = Load(proxy.url), proxy.config_file.with_suffix(".new")

    async def reload_often() -> None:
        for turn in range(12):
            if turn % 4 == 2:
                text = "backends: ["
            else:
                change = {"backends": sections[:1] if turn % 2 else sections, "aliases": {f"x{turn}": "m"}}
                text = json.dumps(config | change)
            fresh.write_text(text)
            fresh.rename(proxy.config_file)  # at once: its watcher may look at any time
            proxy.reload()
            enough = load.served + 16
            await eventually(partial(lambda least: load.served > least, enough))
        log = proxy.service.log_tail(100_000)
        assert (log.count("Z reloaded:"), log.count("Z reload refused")) == (9, 3)

    config = json.loads(proxy.config_file.read_text())
    await load.during(reload_often)
    assert load.wrong == []
    assert load.served > 12 * 16
    assert second.received
    await asyncio.to_thread(proxy.stop)
    assert len(proxy.export()) == load.served
    figure("F22", 0, f"of {load.served} requests failed in 12 reloads")


async def drain(proxy: Proxy) -> asyncio.Task[None]:
    task = Tasks().spawn(proxy.service.stop(), "stop")
    await eventually(lambda: proxy.runtime.draining)
    return task


async def test_stopping_lets_what_runs_end_and_takes_nothing_new(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    gate = asyncio.Event()
    backend = await start_backend(answers(), then=waits(gate, 4))
    proxy = await start_proxy({"url": backend.url, "slots": 1}, timeouts={"drain": "20s"})
    idle, running, waiting, sending = [await proxy.connect() for _ in range(4)]
    await idle.send(chat())
    assert (await idle.answer()).status == 200
    await running.send(chat(stream=True))
    await eventually(lambda: backend.running)
    await waiting.send(chat(stream=True))
    await eventually(lambda: proxy.runtime.held)
    late = chat(chat_body(user="late"))
    await sending.send(late[:-4])
    assert (await proxy.get("/readyz"))[0] == 200
    stopping = await drain(proxy)
    assert await idle.closed() == b""
    status, body = await proxy.get("/readyz")
    assert (status, json.loads(body)["reason"]) == (503, "shutting down")
    assert (await proxy.get("/healthz"))[0] == 200
    with pytest.raises(ConnectionRefusedError):
        await proxy.connect()
    await sending.send(late[-4:])
    gate.set()
    for client in (running, waiting, sending):
        answer = await client.answer()
        assert (answer.status, answer.complete) == (200, True)
        assert await client.closed() == b""
    await stopping
    assert not (proxy.state_folder / "ports.json").exists()


async def test_a_request_that_is_still_being_sent_is_served_while_the_proxy_stops(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    proxy = await start_proxy(await start_backend(), timeouts={"drain": "20s"})
    in_head, in_body = await proxy.connect(), await proxy.connect()
    whole = chat()
    await in_head.send(whole[:20])
    await in_body.send(whole[:-3])
    await eventually(lambda: sum(client.receiving for client in proxy.runtime.clients) == 2)
    stopping = await drain(proxy)
    await in_head.send(whole[20:])
    await in_body.send(whole[-3:])
    for client in (in_head, in_body):
        assert (await client.answer()).status == 200
    await stopping


async def test_what_does_not_end_in_time_is_ended_with_an_error(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend(b.stalls_midstream, b.stalls)
    proxy = await start_proxy({"url": backend.url, "slots": 2}, timeouts={"drain": "200ms"})
    clients = [await proxy.connect() for _ in range(3)]
    found = Answer()
    await clients[0].send(chat(stream=True))
    await clients[0].first(found)
    for client in clients[1:]:
        await client.send(chat())
    await eventually(lambda: backend.running == 2 and proxy.runtime.held)
    stopping = await drain(proxy)
    rest = await clients[0].closed()
    assert rest.count(b'"shutting_down"') == 1
    assert b"[DONE]" not in rest
    assert rest.endswith(b"0\r\n\r\n")
    for client in clients[1:]:
        answer = await client.answer()
        assert (answer.status, answer.code, answer.fields["connection"]) == (503, "shutting_down", "close")
    await stopping
    rows = [record.row for record in proxy.runtime.observer.recent]
    assert [row.outcome for row in rows] == ["shutdown"] * 3
    assert sorted(row.completion_tokens for row in rows) == [0, 0, 2]
    assert backend.aborted == 2


async def test_a_slow_reader_may_finish_while_the_proxy_stops(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    size = 900 * 1024
    backend = await start_backend(b.status(200, b'{"x":"' + b"x" * size + b'"}'))
    proxy = await start_proxy(backend, timeouts={"drain": "20s"})
    client = await proxy.connect(receive_buffer=4096)
    (connection,) = await eventually(lambda: list(proxy.runtime.clients))
    # The system would take all of it, and go on sending after our end.
    connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    await client.send(chat())
    await eventually(lambda: proxy.runtime.observer.recent)  # for the exchange it is over
    assert connection.unsent > 500 * 1024
    stopping = await drain(proxy)
    await asyncio.sleep(1.3)
    answer = await client.answer()
    assert (answer.status, answer.complete, len(answer.body)) == (200, True, size + 8)
    await stopping


async def test_sigterm_drains_and_a_second_one_ends_at_once(
    start_backend: StartBackend, tidegate: StartTidegate
) -> None:
    gate = asyncio.Event()
    backend = await start_backend(waits(gate, 5), then=b.stalls_midstream)
    section = {"name": "a", "url": backend.url, "models": ["m"]}
    proxy = await asyncio.to_thread(tidegate, section, probing={"enabled": False}, log="off")
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(chat(stream=True))
    await reader.readuntil(b"\n\n")
    proxy.service.process.send_signal(signal.SIGTERM)

    await eventually(lambda: "draining" in proxy.service.log_tail())
    with pytest.raises(OSError):
        await asyncio.open_connection("127.0.0.1", proxy.port)
    gate.set()
    assert (await reader.read()).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert await asyncio.to_thread(proxy.service.process.wait, 20) == 0
    writer.transport.abort()
    row = proxy.export()[0]
    assert (row["outcome"], row["completion_tokens"]) == ("ok", 5)

    await asyncio.to_thread(proxy.start)
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(chat(stream=True))
    await reader.readuntil(b"\n\n")
    begun = time.monotonic()
    proxy.service.process.send_signal(signal.SIGTERM)
    await eventually(lambda: proxy.service.log_tail().count("draining") == 2)
    proxy.service.process.send_signal(signal.SIGINT)
    rest = await reader.read()
    assert rest.count(b'"shutting_down"') == 1
    assert await asyncio.to_thread(proxy.service.process.wait, 20) == 0
    assert time.monotonic() - begun < bound(3.0)
    writer.transport.abort()
    assert [row["outcome"] for row in proxy.export()] == ["ok", "shutdown"]


async def test_a_request_whose_large_body_is_still_being_read_is_served(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    backend = await start_backend(answers())
    proxy = await start_proxy(backend, timeouts={"drain": "20s"})
    client = await proxy.connect()
    messages = [{"role": "user", "content": "x"}] * 20_000 + [{"role": "user", "content": "y" * 4_000_000}]
    await client.send(chat(chat_body(messages=messages)))
    await eventually(lambda: any(task.get_name() == "read body" for task in asyncio.all_tasks()))
    stopping = await drain(proxy)
    assert (await client.answer()).status == 200
    await stopping
    assert len(backend.received) == 1
