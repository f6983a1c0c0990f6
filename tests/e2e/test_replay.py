"""The simulator's router decides as the proxy does: a real proxy on real sockets records what happens to it, and
the log is replayed. Each scene says what its log must hold, so that none passes with nothing in it."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from random import Random
from typing import Any, Protocol

import pytest

import policies
from proxy.tasks import Tasks
from sim.replay import Comparison, compare, read_log
from tests.e2e import backends as b
from tests.e2e.backends import Behaviour, Wire, answers, dead_port, status, waits
from tests.e2e.proxy_fixtures import (
    Answer,
    MakeKey,
    Proxy,
    StartBackend,
    StartProxy,
    chat,
    command,
    eventually,
)

pytestmark = pytest.mark.e2e


class Recorded:
    """A proxy that records, and what becomes of its log."""

    def __init__(self, proxy: Proxy, file: Path, tasks: Tasks) -> None:
        self.proxy = proxy
        self.file = file
        self._tasks = tasks
        self._running: list[asyncio.Task[Answer]] = []

    def start(self, *lines: str, **fields: Any) -> asyncio.Task[Answer]:
        """A request beside the test."""
        task = self._tasks.spawn(self.proxy.chat(*lines, **fields), "client")
        self._running.append(task)
        return task

    async def replayed(self) -> Comparison:
        """Let all end, stop the proxy and replay its log: all must be equal."""
        for task in self._running:
            await task
        await self.proxy.idle()
        await self.proxy.service.stop()
        found = compare(read_log(self.file))
        assert found.difference is None, found.difference.text
        assert found.end
        assert found.decisions >= found.requests > 0
        return found

    def counts(self) -> Counter[str]:
        """How many records there are of each event, of decisions by who decided, of holds, of refusals by code."""
        counts: Counter[str] = Counter()
        for record in read_log(self.file):
            if "event" in record:
                counts[record["event"]] += 1
            else:
                counts[record["decided_by"]] += 1
                counts["hold"] += "hold" in record
                counts[record.get("reject", "")] += 1
        return counts


class Record(Protocol):
    def __call__(self, *backends: Any, **config: Any) -> Awaitable[Recorded]: ...


@pytest.fixture
async def record(
    start_proxy: StartProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[Record]:
    """Starts a proxy that records, and finds no fault of its own while it does."""
    tasks = Tasks()

    async def start(*backends: Any, **config: Any) -> Recorded:
        file = tmp_path / "events.jsonl"
        return Recorded(await start_proxy(*backends, record=file, **config), file, tasks)

    yield start
    await tasks.cancel_all()
    assert not [record.getMessage() for record in caplog.records if record.exc_info]


def policy(folder: Path, text: str) -> str:
    file = folder / "policy.yaml"
    file.write_text(text)
    return str(file)


def erratic(seed: int) -> Behaviour:
    """Each request otherwise: well, slowly, not at all."""
    chance = Random(seed)
    ways = [
        *[answers(3), answers(5, gap_s=0.004), answers(2, gap_s=0.02)] * 3,
        *(status(500), status(429, b"", b"retry-after: 1"), b.resets_before_head, b.resets_midstream),
        *(b.error_event_first, b.closes_midstream, status(400)),
    ]

    async def behave(wire: Wire) -> None:
        await chance.choice(ways)(wire)

    return behave


PICKS = {
    **{name: name for name in policies.names() if name not in ("geo", "shortest-path")},
    "geo": "geo",
    "shortest-path": "shortest-path",
    "weighted-qps with a limit": "{policy: weighted-qps, max_qps: {a: 20, b: 30, c: 10}}",
}


@pytest.mark.parametrize("pick", PICKS)
async def test_every_policy_decides_alike_while_backends_fail(
    pick: str, start_backend: StartBackend, record: Record, tmp_path: Path
) -> None:
    chance = Random(pick)
    sections = [
        {
            "url": (await start_backend(then=erratic(number))).url,
            "site": site,
            "slots": 2 + number,
            "weight": number,
        }
        for number, site in enumerate(("local", "near", "far"))
    ]
    sites = {"near": {"location": [31.2, 121.5]}, "far": {"location": [39.9, 116.4]}}
    rules = f"rules: [{{name: all, pick: {PICKS[pick]}, queue: {{wait: 300ms, depth: 6}}}}]"
    run = await record(
        *sections,
        sites=sites,
        policy=policy(tmp_path, rules),
        probing={"interval": "200ms", "timeout": "150ms"},
        timeouts={"first_token": "200ms", "answer": "200ms", "between_tokens": "200ms"},
    )
    await eventually(lambda: all(backend.rtt_s for backend in run.proxy.runtime.fleet))
    for number in range(60):
        fields = {"user": f"u{number % 7}"} if number % 3 else {}
        task = run.start(stream=number % 4 != 0, max_tokens=number % 5 + 1, **fields)
        if number % 3 == 0:
            await asyncio.sleep(chance.uniform(0.0, 0.02))
        if number % 10 == 9:
            await task
    await run.replayed()
    counts = run.counts()
    assert counts["arrival"] == 60
    assert counts["failed"] > 0
    assert counts["figures"] > 0


async def test_spilling_decides_alike(start_backend: StartBackend, record: Record, tmp_path: Path) -> None:
    gate = asyncio.Event()
    local, remote = await start_backend(then=waits(gate)), await start_backend(then=waits(gate))
    run = await record({"url": local.url, "slots": 3}, remote)
    for _ in range(6):
        run.start()
    await eventually(lambda: (local.running, remote.running) == (3, 3))
    gate.set()
    await run.proxy.idle()
    for _ in range(3):
        assert (await run.proxy.chat()).backend == "a"
    await run.replayed()
    log = read_log(run.file)
    assert [record["tier"] for record in log if "send" in record] == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    assert any(record.get("spilling") for record in log)


async def test_holds_decide_alike_whatever_ends_them(
    start_backend: StartBackend, record: Record, tmp_path: Path
) -> None:
    gate = asyncio.Event()
    backend = await start_backend(then=waits(gate))
    rules = "rules: [{name: all, pick: least-load, queue: {wait: 10s, depth: 3}}]"
    run = await record(
        {"url": backend.url, "slots": 1},
        policy=policy(tmp_path, rules),
        timeouts={"total": "900ms"},
    )
    proxy = run.proxy
    run.start()
    await eventually(lambda: backend.running == 1)
    leaves = await proxy.connect()
    await leaves.send(chat(stream=True))
    late = run.start()
    run.start()
    await eventually(lambda: proxy.runtime.valve.queued == 3)
    assert (await run.start()).code == "queue_full"
    leaves.reset()
    await eventually(lambda: proxy.runtime.valve.queued == 2)
    assert (await late).code == "queue_timeout"
    await proxy.idle()
    gate.set()
    for _ in range(5):  # and some that capacity ends
        run.start(stream=True)
    await run.replayed()
    counts = run.counts()
    assert counts["queue_full"] >= 1
    assert counts["queue_timeout"] >= 1
    assert counts["hold"] >= 4


async def test_a_wait_that_is_over_decides_alike(
    start_backend: StartBackend, record: Record, tmp_path: Path
) -> None:
    gate = asyncio.Event()
    backend = await start_backend(then=waits(gate))
    rules = "rules: [{name: all, pick: power-of-two, queue: {wait: 100ms, depth: 9, overflow: 400%}}]"
    run = await record({"url": backend.url, "slots": 1}, policy=policy(tmp_path, rules))
    for _ in range(4):
        run.start()
    await eventually(lambda: backend.running == 4)
    gate.set()
    await run.replayed()
    assert run.counts()["wait over"] == 3


async def test_breakers_and_trials_decide_alike(
    start_backend: StartBackend, record: Record, tmp_path: Path
) -> None:
    good = await start_backend()
    run = await record({"url": f"http://127.0.0.1:{dead_port()}"}, good, retries={"per_second": 0})
    found = [await run.proxy.chat() for _ in range(30)]
    assert {answer.status for answer in found} == {200, 502}  # the retry budget is a share of the requests
    assert not run.proxy.backend("a").available
    await run.replayed()
    counts = run.counts()
    assert counts["failed"] == 5
    assert counts["fallback"] >= 1


async def test_a_backend_that_is_back_after_a_pause_or_a_probe_decides_alike(
    start_backend: StartBackend, record: Record, tmp_path: Path
) -> None:
    full = await start_backend(status(503, b"", b"retry-after: 1"))
    mortal = await start_backend()
    run = await record(full, mortal, probing={"interval": "100ms", "timeout": "90ms"})
    proxy = run.proxy
    assert (await proxy.chat()).backend == "b"
    assert not proxy.backend("a").available
    await mortal.stop()
    assert (await proxy.chat()).status in (502, 503)
    await eventually(lambda: not proxy.backend("b").probed_up)
    await eventually(lambda: proxy.backend("a").available)
    assert (await proxy.chat()).backend == "a"
    await mortal.start()
    await eventually(lambda: proxy.backend("b").available)
    assert (await proxy.chat()).status == 200
    await run.replayed()
    counts = run.counts()
    assert counts["refresh"] >= 3


async def test_pipelined_requests_that_come_amid_an_end_decide_alike(
    start_backend: StartBackend, record: Record, tmp_path: Path
) -> None:
    """A request that is refused out of the queue ends amid a poll; what came behind it on its connection begins
    there."""
    gate = asyncio.Event()
    backend = await start_backend(then=waits(gate))
    rules = "rules: [{name: all, pick: random, queue: {wait: 10s, depth: 4}}]"
    run = await record(
        {"url": backend.url, "slots": 1},
        policy=policy(tmp_path, rules),
        timeouts={"total": "500ms"},
    )
    run.start()
    await eventually(lambda: backend.running == 1)
    clients = [await run.proxy.connect() for _ in range(3)]
    for client in clients:
        await client.send(chat() + chat(model="unknown") + chat())
    await eventually(lambda: run.proxy.runtime.valve.queued == 3)
    for client in clients:
        codes = [(await client.answer()).code for _ in range(3)]
        assert codes[1] == "model_not_found"
    gate.set()
    await run.replayed()
    assert any("within" in record for record in read_log(run.file))


async def test_a_log_holds_no_secret_no_prompt_and_no_session(
    start_backend: StartBackend, record: Record, make_key: MakeKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEGATE_TEST_KEY", "sk-backend")
    key = make_key(tenant="acme")
    backend = await start_backend()
    run = await record({"url": backend.url, "api_key_env": "TIDEGATE_TEST_KEY"})
    answer = await run.proxy.chat(
        key, "x-session-id: my-session", messages=[{"role": "user", "content": "my prompt"}]
    )
    row = await run.proxy.row(answer)
    await run.replayed()
    text = run.file.read_text()
    for secret in ("my-session", "my prompt", "sk-backend", key.rpartition(" ")[2], str(backend.port)):
        assert secret not in text
    facts = next(record["request"] for record in read_log(run.file) if record.get("event") == "arrival")
    assert (facts["session"], facts["tenant"]) == (row.session, "acme")


async def test_a_log_ends_at_a_reload(start_backend: StartBackend, record: Record, tmp_path: Path) -> None:
    config = tmp_path / "tidegate.yaml"
    run = await record(await start_backend(), file=config)
    await run.proxy.chat()
    config.write_text(json.dumps(json.loads(config.read_text()) | {"aliases": {"n": "m"}}))
    assert run.proxy.service.reload()
    assert (await run.proxy.chat()).status == 200
    found = await run.replayed()
    assert (found.requests, found.end) == (1, "the configuration was reloaded")


async def test_a_disk_that_fails_ends_the_log_and_nothing_else(
    start_backend: StartBackend, start_proxy: StartProxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = await start_proxy(await start_backend(), record=Path("/dev/full"))
    assert (await proxy.chat()).status == 200
    await proxy.service.stop()
    assert "the event log ends here" in caplog.text


async def test_the_command_says_what_is_equal_and_what_is_not(
    start_backend: StartBackend, record: Record, tmp_path: Path
) -> None:
    run = await record(await start_backend(), await start_backend())
    for _ in range(4):
        await run.proxy.chat()
    await run.replayed()
    code, out, _ = await command("replay", str(run.file))
    assert (code, out.splitlines()[0]) == (0, "4 decisions over 4 requests are equal")
    run.file.write_text(run.file.read_text().replace('"send":"a"', '"send":"b"', 1))
    code, out, _ = await command("replay", str(run.file))
    assert code == 1
    assert out.startswith("0 decisions over 1 requests are equal")
    assert '"send":"b"' in out
    for bad in ("", "{", "7", '{"event":"start","format":0}', "{}\n{\n{}"):
        run.file.write_text(bad)
        code, _, complaint = await command("replay", str(run.file))
        assert (code, complaint.count("\n")) == (2, 1)
    assert (await command("replay", str(tmp_path / "none")))[0] == 2
