"""`POST /explain` and `tidegate explain --request`, asked of a real proxy over real sockets."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from proxy.tasks import Tasks
from sim.recording import Recording
from sim.replay import compare
from tests.e2e.backends import waits
from tests.e2e.proxy_fixtures import (
    Answer,
    MakeKey,
    Proxy,
    StartBackend,
    StartProxy,
    chat_body,
    command,
    eventually,
)

pytestmark = pytest.mark.e2e

POLICY = """\
rules:
  - name: vip stays
    when: {tenant: [vip]}
    sites: [local]
    pick: least-load
  - name: others
    prefer: [{site: local, spill: {enter: 60%, leave: 40%}}, {site: "*"}]
    pick: random
    queue: {wait: 20s, depth: 2}
"""


async def post(proxy: Proxy, body: bytes, **query: str) -> tuple[int, Any]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{proxy.admin}/explain", data=body, params=query) as response,
    ):
        return response.status, await response.json()


async def test_what_would_happen_is_told_and_leaves_no_trace(
    start_backend: StartBackend, start_proxy: StartProxy, tmp_path: Path
) -> None:
    """Local and remote fill, two wait, the queue is full: each time what is told is what happens next, and the log
    of it all is replayed to the last decision."""
    (tmp_path / "policy.yaml").write_text(POLICY)
    release = asyncio.Event()
    backends = [await start_backend(then=waits(release)) for _ in range(3)]
    log = tmp_path / "events.jsonl"
    proxy = await start_proxy(
        *({"url": backend.url, "slots": 2} for backend in backends),
        policy=str(tmp_path / "policy.yaml"),
        record=log,
        seed=5,
    )
    tasks, running = Tasks(), list[asyncio.Task[Answer]]()
    told: list[dict[str, Any]] = []
    runtime = proxy.runtime
    for number in range(9):
        before = await proxy.state()
        for _ in range(3):
            status, shown = await post(proxy, chat_body())
            assert status == 200
        after = await proxy.state()
        for one in (before, after):
            one.pop("uptime_s")
            one["queue"].pop("oldest_s")
            for flag in one["spill"]:
                flag.pop("moved_s_ago")
        assert after == before
        told.append(shown)
        running.append(tasks.spawn(proxy.chat(), "client"))
        served = min(number + 1, 6)
        await eventually(lambda served=served: sum(one.in_flight for one in runtime.fleet) == served)
        await eventually(
            lambda number=number: runtime.valve.queued + len(runtime.observer.recent) == max(number - 5, 0)
        )
    release.set()
    found = [await task for task in running]
    for shown, answer in zip(told[:6], found, strict=False):
        assert shown["decisions"][0]["backend"] == answer.backend
    assert [shown["queue"] and shown["queue"]["waiting"] for shown in told[5:8]] == [None, 0, 1]
    assert told[8]["answer"]["code"] == found[8].code == "queue_full"
    assert told[8]["answer"]["message"] == found[8].json["error"]["message"]
    await proxy.idle()
    await proxy.service.stop()
    same = compare(Recording(log))
    assert same.difference is None
    assert same.requests == 9


async def test_a_bad_body_gets_the_error_that_a_client_gets(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    proxy = await start_proxy(await start_backend())
    for body in (b"{", chat_body(n=0), b'{"model": "m", "model": "m"}', b" " * 70_000 + b"[]"):
        status, shown = await post(proxy, body)
        found = await proxy.ask(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b"
            % (len(body), body)
        )
        assert (status, shown) == (found.status, found.json)
    status, shown = await post(proxy, chat_body(messages=7), endpoint="messages")
    assert (status, shown["type"], shown["error"]["type"]) == (400, "error", "invalid_request_error")
    status, shown = await post(proxy, chat_body(), endpoint="speach")
    assert (status, list(shown["error"])) == (400, ["message"])


async def test_a_body_beyond_the_limit_is_not_read(
    start_backend: StartBackend, start_proxy: StartProxy
) -> None:
    proxy = await start_proxy(await start_backend(), limits={"body": "64KiB"})
    status, shown = await post(proxy, chat_body(x="y" * 70_000))
    assert (status, shown["error"]["code"]) == (413, "body_too_large")
    assert shown["error"]["message"] == "a body may have 65536 bytes"


async def test_the_command_asks_the_running_proxy(
    start_backend: StartBackend, start_proxy: StartProxy, make_key: MakeKey, tmp_path: Path
) -> None:
    key = make_key(tenant="vip", data_class="internal").removeprefix("authorization: Bearer ")
    (tmp_path / "policy.yaml").write_text(POLICY)
    proxy = await start_proxy(
        await start_backend(), await start_backend(), policy=str(tmp_path / "policy.yaml")
    )
    request = tmp_path / "r.json"
    request.write_bytes(chat_body())
    asks = ("explain", "--request", str(request), "--state", str(proxy.state_folder))
    code, text, complaint = await command(*asks, "--key", key)
    assert (code, complaint) == (0, "")
    assert text.startswith("now: sent to a\n  tenant vip, model m, data class internal\n")
    assert "\n  rule 'vip stays' matches\n" in text
    assert "\n    b is out: away does not accept data class internal\n" in text
    code, by_id, _ = await command(*asks, "--key", key.split("_")[1], "--json")
    assert code == 0
    shown = json.loads(by_id)
    assert shown["request"]["key_id"] == key.split("_")[1]
    assert shown["decisions"][0]["removed"] == {"b": "away does not accept data class internal"}
    request.write_bytes(b"{")
    code, text, complaint = await command(*asks)
    assert (code, text) == (1, "")
    assert complaint.startswith("tidegate: a client would get 400 invalid_json: the body is not valid JSON: ")
    # The API's port is no admin port, though it answers in the shape of its errors.
    code, _, complaint = await command("explain", "-r", str(request), "--admin", proxy.service.ports.listen)
    assert "is not the admin port of tidegate" in complaint
