"""The simulator's router decides as the proxy does: a real proxy on real sockets records what happens to it, and
the log is replayed. Each scene says what its log must hold, so that none passes with nothing in it."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from random import Random
from typing import Any, Protocol

import pytest

import policies
from proxy.tasks import Tasks
from sim.record_forms import damage
from sim.recording import BadLogError, Recording
from sim.replay import Comparison, compare
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
from tests.sim.damage import NEVER, changed, kind_of, places

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
        found = compare(Recording(self.file))
        assert found.difference is None, found.difference.text
        assert found.end
        assert found.decisions >= found.requests > 0
        return found

    def counts(self) -> Counter[str]:
        """How many records there are of each event, of decisions by who decided, of holds, of refusals by code."""
        counts: Counter[str] = Counter()
        for record in Recording(self.file):
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
        file = config.pop("record", tmp_path / "events.jsonl")
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
    log = list(Recording(run.file))
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
    (left,) = [op for op, exchange in proxy.runtime.held.items() if exchange.row.stream]
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
    records = list(Recording(run.file))
    place = next(n for n, one in enumerate(records) if one.get("event") == "ended" and one["request"] == left)
    earlier = {one["at"] for one in records[:place] if "at" in one}
    assert records[place]["at"] > max(earlier), "it has the time at which its client left, not that of a poll"


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
    assert any("within" in record for record in Recording(run.file))


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
    facts = next(record["request"] for record in Recording(run.file) if record.get("event") == "arrival")
    assert (facts["session"], facts["tenant"]) == (row.session, "acme")


async def test_a_log_says_that_models_are_unknown_and_not_why(
    start_backend: StartBackend, record: Record
) -> None:
    run = await record(await start_backend(), await start_backend())
    backend = run.proxy.backend("b")
    backend.models, backend.models_unknown = frozenset(), "TLS: no certificate for 'gpu.example'"
    await eventually(lambda: '"models_unknown":"unknown"' in run.file.read_text())
    assert (await run.proxy.chat()).backend == "a"
    await run.replayed()
    assert "gpu.example" not in run.file.read_text()


def is_open(file: Path) -> bool:
    """Whether this process has it open."""
    return str(file) in [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]


async def test_a_log_ends_at_a_reload_and_is_whole_then(
    start_backend: StartBackend, record: Record, tmp_path: Path
) -> None:
    config = tmp_path / "tidegate.yaml"
    run = await record(await start_backend(), file=config)
    await run.proxy.chat()
    assert is_open(run.file)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"aliases": {"n": "m"}}))
    assert run.proxy.service.reload()
    await eventually(lambda: not is_open(run.file))
    text = run.file.read_text()
    assert (await run.proxy.chat()).status == 200
    found = await run.replayed()
    assert (found.requests, found.end) == (1, "the configuration was reloaded")
    assert run.file.read_text() == text


async def test_what_has_happened_is_in_the_file_while_the_proxy_runs(
    start_backend: StartBackend, record: Record
) -> None:
    run = await record(await start_backend())
    await run.proxy.chat()
    await run.proxy.idle()
    await eventually(lambda: '"freed"' in run.file.read_text())
    found = compare(Recording(run.file))  # as after a kill
    assert (found.requests, found.difference, found.end) == (1, None, "")
    await run.replayed()


def put_in_place(monkeypatch: pytest.MonkeyPatch, path: Path, descriptor: int) -> None:
    """Whoever makes the file `path` gets `descriptor` instead."""
    make = os.open

    def made(name: Any, *how: Any, **options: Any) -> int:
        return descriptor if name == path else make(name, *how, **options)

    monkeypatch.setattr(os, "open", made)


async def test_a_disk_that_is_full_ends_the_log_and_nothing_else(
    start_backend: StartBackend,
    record: Record,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    put_in_place(monkeypatch, tmp_file := Path("/nowhere/events.jsonl"), os.open("/dev/full", os.O_WRONLY))
    run = await record(await start_backend(), record=tmp_file)
    assert (await run.proxy.chat()).status == 200
    await eventually(lambda: "the event log ends here: it cannot be written: no space left" in caplog.text)
    assert (await run.proxy.chat()).status == 200
    await run.proxy.service.stop()


async def test_a_disk_that_stands_still_delays_no_request(
    start_backend: StartBackend, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    put_in_place(monkeypatch, tmp_path / "events.jsonl", writing)
    run = await record(await start_backend())
    for _ in range(30):  # about 1 kB each
        assert (await run.proxy.chat()).status == 200
    await run.proxy.idle()

    def read() -> bytes:
        with os.fdopen(reading, "rb") as pipe:
            return pipe.read()

    _, recorded = await asyncio.gather(run.proxy.service.stop(), asyncio.to_thread(read))
    (file := tmp_path / "read.jsonl").write_bytes(recorded)
    found = compare(Recording(file))
    assert (found.requests, found.difference, found.end) == (30, None, "the proxy was stopped")


async def test_a_recording_that_is_damaged_anywhere_is_refused_with_the_line(
    start_backend: StartBackend, record: Record, tmp_path: Path
) -> None:
    rules = "rules: [{name: all, pick: least-load, queue: {wait: 50ms, depth: 2}}]"
    run = await record(
        *[{"url": (await start_backend(then=erratic(number))).url, "slots": 1} for number in range(2)],
        policy=policy(tmp_path, rules),
        probing={"interval": "100ms", "timeout": "90ms"},
    )
    await eventually(lambda: all(backend.rtt_s for backend in run.proxy.runtime.fleet))
    for number in range(30):
        run.start(stream=number % 2 == 0)
        if number % 8 == 7:
            await asyncio.sleep(0.02)
    await run.replayed()
    records = list(Recording(run.file))
    assert {kind_of(one) for one in records} >= {
        "start",
        "arrival",
        "ended",
        "figures",
        "send",
        "hold",
        "end",
    }
    for place, path in places(records):
        assert str(path[0]) in damage(changed(records, place, path, NEVER)[place])
    for place in {kind_of(one): one["n"] for one in records}.values():
        with pytest.raises(BadLogError, match=f"line {place + 1}: n"):
            compare(changed(records, place, ("n",), NEVER))


async def test_the_command_says_what_is_equal_and_what_is_not(
    start_backend: StartBackend, record: Record, tmp_path: Path
) -> None:
    run = await record(await start_backend(), await start_backend())
    for _ in range(4):
        await run.proxy.chat()
    await run.replayed()
    code, out, _ = await command("replay", str(run.file))
    assert (code, out.splitlines()[0]) == (0, "4 decisions over 4 requests are equal")
    whole = run.file.read_text()
    run.file.write_text(whole.replace('"send":"a"', '"send":"b"', 1))
    code, out, _ = await command("replay", str(run.file))
    assert code == 1
    assert out.startswith("0 decisions over 1 requests are equal")
    assert '"send":"b"' in out
    run.file.write_text(whole[: whole.index('"fallbacks"')])
    code, out, complaint = await command("replay", str(run.file))
    assert (code, out) == (1, "0 decisions over 1 requests are equal\nthe log breaks off in line 3\n")
    assert complaint == "tidegate: nothing was compared: the log has no decision\n"
    run.file.write_text(whole.replace('"request":{', '"request":7,"was":{', 1))
    code, _, complaint = await command("replay", str(run.file))
    assert code == 2
    assert complaint.startswith(f"tidegate: {run.file} cannot be replayed: line 2: ")
    for bad in ("", "{", "7", '{"event":"start","format":0}', "{}\n{\n{}"):
        run.file.write_text(bad)
        code, _, complaint = await command("replay", str(run.file))
        assert (code, complaint.count("\n")) == (2, 1)
    assert (await command("replay", str(tmp_path / "none")))[0] == 2
