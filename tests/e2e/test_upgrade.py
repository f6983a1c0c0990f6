"""One process after the other, under load: nobody is refused, nobody is cut off, every token is counted once."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from benchmarks.processes import free_port
from proxy.scaling.supervisor import Record, read_record
from proxy.tasks import Tasks
from tests.e2e import backends as b
from tests.e2e.backends import answers, waits
from tests.e2e.conftest import StartTidegate
from tests.e2e.faults.figures import Figure
from tests.e2e.proxy_fixtures import HELLO, Answer, Client, StartBackend, chat, command, eventually
from tests.e2e.test_standby import answers as listens
from tests.e2e.test_standby import chat as asks
from tests.e2e.test_standby import standby, until
from tests.e2e.tidegate_process import COMMAND, TidegateProcess

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
TOKENS = 3
PATIENCE_S = 60.0


@pytest.fixture
def upgraded(tidegate: StartTidegate) -> Iterator[StartTidegate]:
    """Starts proxies on fixed ports; ends what they have started, which nobody else knows of."""
    started: list[TidegateProcess] = []

    def start(*backends: dict[str, Any], **config: Any) -> TidegateProcess:
        ports = {name: f"127.0.0.1:{free_port()}" for name in ("listen", "admin")}
        quiet = {
            "probing": {"enabled": False},
            "log": "off",
            "timeouts": {"drain": "1m", "between_tokens": "1h", "total": "1h"},
        }
        started.append(tidegate(*backends, **{**ports, **quiet, **config}))
        return started[-1]

    yield start
    for proxy in started:
        for number in (signal.SIGCONT, signal.SIGKILL):
            try:
                os.killpg(proxy.service.pid, number)  # a successor is of the same group
            except ProcessLookupError:
                pass


def section(url: str, **fields: Any) -> dict[str, Any]:
    return {"name": "a", "url": url, "models": ["m"], "slots": 64, **fields}


async def ended(pid: int) -> None:
    """Wait until a process that need not be our child has ended."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        ready, _, _ = await asyncio.to_thread(select.select, [handle], [], [], PATIENCE_S)
        assert ready, f"process {pid} still runs"
    finally:
        os.close(handle)


async def all_ended(proxy: TidegateProcess) -> None:
    """Stop the one that serves and wait for it and for the first one."""
    pid = proxy.serving
    os.kill(pid, signal.SIGTERM)
    await ended(pid)
    await asyncio.to_thread(proxy.service.process.wait, PATIENCE_S)


class Load:
    """Clients that keep their connections, and such that make one for each request; half of them stream."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.wrong: list[str] = []
        self.served = 0
        self.stopped = False
        self._tasks = Tasks()

    async def __aenter__(self) -> Load:
        self._sessions = [
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=close))
            for close in (True, False)
        ]
        self._clients = [
            self._tasks.spawn(self._ask(self._sessions[n % 2], n % 4 < 2), "client") for n in range(8)
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stopped = True
        await asyncio.gather(*self._clients)
        for session in self._sessions:
            await session.close()

    async def goes_on(self) -> None:
        """Wait until some more requests were served."""
        enough = self.served + 32
        await eventually(lambda: self.served > enough, PATIENCE_S)

    async def _ask(self, session: aiohttp.ClientSession, stream: bool) -> None:
        body = {"model": "m", "messages": HELLO, "stream": stream}
        while not self.stopped:
            try:
                async with session.post(f"{self.url}/v1/chat/completions", json=body) as response:
                    text = await response.text()
                    whole = text.endswith("data: [DONE]\n\n") if stream else '"usage"' in text
                    if response.status != 200 or not whole:
                        self.wrong.append(f"{response.status} {text[-200:]}")
            except aiohttp.ClientError as error:
                self.wrong.append(repr(error))
            self.served += 1


class Stream:
    """One stream that stays open until the backend is let go."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def begin(cls, proxy: TidegateProcess) -> Stream:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(chat(stream=True))
        await reader.readuntil(b"\n\n")
        return cls(reader, writer)

    async def rest(self) -> bytes:
        async with asyncio.timeout(PATIENCE_S):
            came = await self._reader.read()
        self._writer.close()
        return came


def complete(rest: bytes) -> bool:
    return rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


async def serves(proxy: TidegateProcess) -> bool:
    """Whether one request on a new connection is answered."""
    async with aiohttp.ClientSession() as session:
        body = {"model": "m", "messages": HELLO}
        async with session.post(f"{proxy.url}/v1/chat/completions", json=body) as response:
            return response.status == 200


@pytest.mark.parametrize(
    "upgrades", [3, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
)
async def test_upgrades_under_load_fail_no_request(
    start_backend: StartBackend, upgraded: StartTidegate, upgrades: int, figure: Figure
) -> None:
    gate = asyncio.Event()
    backend = await start_backend(waits(gate, TOKENS), then=answers(TOKENS, gap_s=0.002))
    proxy = await asyncio.to_thread(upgraded, section(backend.url))
    stream = await Stream.begin(proxy)  # over all upgrades
    pids = {proxy.serving}
    async with Load(proxy.url) as load:
        for _ in range(upgrades):
            done = await asyncio.to_thread(proxy.upgrade, "--drain", "20m")
            assert done.returncode == 0, done.stderr
            pids.add(proxy.serving)
            await load.goes_on()
    assert load.wrong == [], len(load.wrong)
    assert len(pids) == upgrades + 1
    assert proxy.service.process.poll() is None  # it has its stream to end
    gate.set()
    assert complete(await stream.rest())
    await all_ended(proxy)
    rows = proxy.export()
    assert len(rows) == len({row["op"] for row in rows}) == load.served + 1
    assert {(row["outcome"], row["completion_tokens"]) for row in rows} == {("ok", TOKENS)}
    (line,) = proxy.usage()
    assert (line["requests"], line["completion_tokens"]) == (len(rows), TOKENS * len(rows))
    assert len(backend.received) == len(rows)
    assert len({row["instance"] for row in rows}) == 1
    assert not list((proxy.state_folder / "journal").rglob("*.journal"))
    figure("F22", 0, f"of {len(rows)} requests failed in {upgrades} upgrades")


async def test_a_connection_that_was_promised_to_stay_serves_once_more(
    start_backend: StartBackend, upgraded: StartTidegate
) -> None:
    gate = asyncio.Event()
    backend = await start_backend(answers(), waits(gate, TOKENS), then=answers(TOKENS))
    proxy = await asyncio.to_thread(upgraded, section(backend.url))
    idle, running = [Client(*await asyncio.open_connection("127.0.0.1", proxy.port)) for _ in range(2)]
    await idle.send(chat())
    assert "connection" not in (await idle.answer()).fields
    await running.send(chat(stream=True))
    found = Answer()
    parts = running.parts(found)
    await anext(parts)
    assert (await asyncio.to_thread(proxy.upgrade)).returncode == 0
    gate.set()
    async for _ in parts:
        pass
    assert found.complete
    assert "connection" not in found.fields
    for client in (idle, running):
        await client.send(chat())
        answer = await client.answer()
        assert (answer.status, answer.complete, answer.fields["connection"]) == (200, True, "close")
        assert await client.closed() == b""
        client.close()
    assert await asyncio.to_thread(proxy.service.process.wait, PATIENCE_S) == 0
    await all_ended(proxy)
    assert [row["outcome"] for row in proxy.export()] == ["ok"] * 4


async def test_a_key_that_the_old_process_still_runs_is_not_taken_by_the_new(
    start_backend: StartBackend, upgraded: StartTidegate
) -> None:
    async def again() -> str:
        client = Client(*await asyncio.open_connection("127.0.0.1", proxy.port))
        await client.send(request)
        code = (await client.answer()).code
        client.close()
        return code

    gate = asyncio.Event()
    backend = await start_backend(waits(gate, TOKENS), then=answers(TOKENS))
    proxy = await asyncio.to_thread(upgraded, section(backend.url))
    request = chat(None, "idempotency-key: order-7", stream=True)
    first = Client(*await asyncio.open_connection("127.0.0.1", proxy.port))
    await first.send(request)
    await eventually(lambda: backend.received)
    assert (await asyncio.to_thread(proxy.upgrade)).returncode == 0
    assert await again() == "idempotency_running"
    gate.set()
    assert (await first.answer()).complete
    first.close()
    assert await asyncio.to_thread(proxy.service.process.wait, PATIENCE_S) == 0
    assert await again() == "idempotency_spent"
    await all_ended(proxy)
    assert len(backend.received) == 1


async def test_a_new_process_that_cannot_start_changes_nothing(
    start_backend: StartBackend, upgraded: StartTidegate
) -> None:
    gate = asyncio.Event()
    backend = await start_backend(waits(gate, TOKENS), then=answers(TOKENS))
    proxy = await asyncio.to_thread(upgraded, section(backend.url))
    stream = await Stream.begin(proxy)
    first, good = proxy.serving, proxy.config_file.read_text()
    taken = socket.create_server(("127.0.0.1", 0))  # a changed address is bound anew
    busy = json.loads(good) | {"admin": f"127.0.0.1:{taken.getsockname()[1]}"}
    for bad, why in (
        ("backends: [", "the file ends too early"),
        (json.dumps(busy), "address already in use"),
    ):
        proxy.config_file.write_text(bad)
        done = await asyncio.to_thread(proxy.upgrade)
        assert done.returncode == 1
        assert (
            f"process {first} goes on, nothing was upgraded: the new process ended with status 2"
            in done.stderr
        )
        assert why in done.stderr
        assert proxy.serving == first
        assert await serves(proxy)
    taken.close()
    proxy.config_file.write_text(good)
    assert (await asyncio.to_thread(proxy.upgrade)).returncode == 0
    assert proxy.serving != first
    assert await serves(proxy)
    gate.set()
    assert complete(await stream.rest())
    await all_ended(proxy)
    assert [row["outcome"] for row in proxy.export()] == ["ok"] * 4


async def test_a_standby_that_starts_goes_on_starting_for_who_waits_in_the_old_process(
    upgraded: StartTidegate, tmp_path: Path
) -> None:
    def launched() -> Record | None:
        found = read_record(proxy.state_folder / "standbys" / "a")
        return found if found is not None and found.command[0] else None

    port, gate, tasks = free_port(), tmp_path / "gate", Tasks()
    script = 'while [ ! -e "$1" ]; do sleep 0.05; done; exec "$2" emulate --host "$3" --port "$4" --model m'
    command_line = ["sh", "-c", script, "sh", str(gate), str(COMMAND), "{host}", "{port}"]
    process = {"command": command_line, "grace": "1s"}
    proxy = await asyncio.to_thread(upgraded, standby(port, process=process), probing={}, currency="CNY")
    waits_there = tasks.spawn(asks(proxy), "client")
    row = await until(proxy, "starting")
    engine = await eventually(launched, PATIENCE_S)
    old = proxy.serving
    done = await asyncio.to_thread(proxy.upgrade, "--drain", "20m")
    assert done.returncode == 0, done.stderr
    assert (await until(proxy, "starting"))["run"] == row["run"]
    assert not waits_there.done()
    gate.touch()
    assert (await waits_there)["usage"]["completion_tokens"] == 2
    assert (await until(proxy, "ready"))["run"] == row["run"]
    assert (await asks(proxy))["usage"]["completion_tokens"] == 2
    await ended(old)
    lease = proxy.state_folder / "standbys" / "a.lease"
    before = lease.stat().st_mtime_ns
    await eventually(lambda: lease.stat().st_mtime_ns != before, PATIENCE_S)  # by who is left
    assert launched() == engine, "the same one"
    assert (await command("standby", "stop", "a", "--state", str(proxy.state_folder)))[0] == 0
    await until(proxy, "standby")
    assert not listens(port)
    status, out, _ = await command("standby", "history", "a", "--json", "--state", str(proxy.state_folder))
    assert status == 0
    moves = [move["event"] for move in json.loads(out)]
    assert moves == ["start", "prepared", "started", "stop", "drained", "stopped"]
    await all_ended(proxy)
    (line,) = json.loads(proxy.run("usage", "--capacity", "--json"))
    assert (line["runs"], line["cost"]) == (1, pytest.approx(line["seconds"], rel=1e-6))


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A backend that accepts and says nothing: a process that starts waits for its probe."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.settimeout(PATIENCE_S)
        yield sock


async def begun_upgrade(proxy: TidegateProcess, silent: socket.socket) -> tuple[asyncio.Task[Any], int]:
    """An upgrade whose new process has the sockets and is not ready. -> the command, and that process."""
    url = f"http://127.0.0.1:{silent.getsockname()[1]}"
    config = json.loads(proxy.config_file.read_text())
    held = {"name": "silent", "url": url, "models": ["none"]}
    change = {"backends": [*config["backends"], held], "probing": {"enabled": True}}
    proxy.config_file.write_text(json.dumps(config | change))
    upgrade = Tasks().spawn(asyncio.to_thread(proxy.upgrade), "tidegate upgrade")
    connection, _ = await asyncio.to_thread(silent.accept)
    connection.close()
    log = proxy.service.log_tail(100_000)
    return upgrade, int(log.rpartition("upgrade: process ")[2].split()[0])


@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGKILL, "was killed by signal 9"), (signal.SIGTERM, "told to stop")]
)
async def test_a_new_process_that_is_ended_before_it_is_ready_changes_nothing(
    start_backend: StartBackend,
    upgraded: StartTidegate,
    silent: socket.socket,
    number: signal.Signals,
    said: str,
) -> None:
    gate = asyncio.Event()
    backend = await start_backend(waits(gate, TOKENS), then=answers(TOKENS))
    proxy = await asyncio.to_thread(upgraded, section(backend.url))
    stream = await Stream.begin(proxy)
    first, good = proxy.serving, proxy.config_file.read_text()
    upgrade, new = await begun_upgrade(proxy, silent)
    os.kill(new, number)
    done = await upgrade
    assert done.returncode == 1
    assert f"process {first} goes on" in done.stderr
    assert said in done.stderr
    assert proxy.serving == first
    assert await serves(proxy)
    proxy.config_file.write_text(good)
    assert (await asyncio.to_thread(proxy.upgrade)).returncode == 0
    gate.set()
    assert complete(await stream.rest())
    await all_ended(proxy)
    assert [row["outcome"] for row in proxy.export()] == ["ok", "ok"]


async def test_a_new_process_that_is_killed_later_leaves_what_the_old_one_ends(
    start_backend: StartBackend, upgraded: StartTidegate
) -> None:
    gate = asyncio.Event()
    backend = await start_backend(waits(gate, TOKENS), b.stalls_midstream, then=answers(TOKENS))
    proxy = await asyncio.to_thread(upgraded, section(backend.url), durability="strict")
    stream = await Stream.begin(proxy)
    first = proxy.service
    assert (await asyncio.to_thread(proxy.upgrade)).returncode == 0
    lost = await Stream.begin(proxy)
    new = proxy.serving
    os.kill(new, signal.SIGKILL)
    await ended(new)
    assert not complete(await lost.rest())
    await asyncio.to_thread(proxy.start)  # though the first one still runs
    assert await serves(proxy)
    assert first.process.poll() is None
    gate.set()
    assert complete(await stream.rest())
    await asyncio.to_thread(first.process.wait, PATIENCE_S)
    await all_ended(proxy)
    outcomes = [(row["outcome"], row["completion_tokens"]) for row in proxy.export()]
    assert outcomes[0] == ("ok", TOKENS)
    assert outcomes[1][0] == "lost"
    assert outcomes[2:] == [("ok", TOKENS)]


async def test_an_old_process_that_is_killed_meanwhile_is_replaced_all_the_same(
    start_backend: StartBackend, upgraded: StartTidegate, silent: socket.socket
) -> None:
    backend = await start_backend(b.stalls_midstream, then=answers(TOKENS))
    proxy = await asyncio.to_thread(upgraded, section(backend.url), durability="strict")
    stream = await Stream.begin(proxy)
    upgrade, new = await begun_upgrade(proxy, silent)
    proxy.service.process.kill()
    await asyncio.to_thread(proxy.service.process.wait)
    # The port is open all the time: this request waits in the queue that both had.
    assert await serves(proxy)
    assert proxy.serving == new
    assert not complete(await stream.rest())
    done = await upgrade
    assert done.returncode == 1
    assert "has ended during the upgrade" in done.stderr
    rows = await asyncio.to_thread(proxy.rows, 2)  # while it runs: nobody has to start again for them
    assert sorted(row["outcome"] for row in rows) == ["lost", "ok"]
    os.kill(new, signal.SIGTERM)
    await ended(new)


async def test_an_old_process_that_is_killed_while_it_drains_has_its_requests_recorded(
    start_backend: StartBackend, upgraded: StartTidegate
) -> None:
    backend = await start_backend(b.stalls_midstream, then=answers(TOKENS))
    proxy = await asyncio.to_thread(upgraded, section(backend.url), durability="strict")
    stream = await Stream.begin(proxy)
    assert (await asyncio.to_thread(proxy.upgrade)).returncode == 0
    assert await serves(proxy)
    assert len(await asyncio.to_thread(proxy.rows, 1)) == 1  # the running one is not taken for a lost one
    proxy.service.process.kill()
    await asyncio.to_thread(proxy.service.process.wait)
    assert not complete(await stream.rest())
    rows = await asyncio.to_thread(proxy.rows, 2)
    assert [row["outcome"] for row in rows] == ["lost", "ok"]
    new = proxy.serving
    os.kill(new, signal.SIGTERM)
    await ended(new)


async def test_a_stop_during_an_upgrade_stops_both(
    start_backend: StartBackend, upgraded: StartTidegate, silent: socket.socket
) -> None:
    proxy = await asyncio.to_thread(upgraded, section((await start_backend(then=answers())).url))
    upgrade, new = await begun_upgrade(proxy, silent)
    proxy.service.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(proxy.service.process.wait, PATIENCE_S) == 0
    await ended(new)
    assert (await upgrade).returncode == 1
    with pytest.raises(OSError):
        await asyncio.open_connection("127.0.0.1", proxy.port)


async def test_a_drain_that_was_given_long_ends_at_a_stop(
    start_backend: StartBackend, upgraded: StartTidegate
) -> None:
    backend = await start_backend(then=b.stalls_midstream)
    proxy = await asyncio.to_thread(upgraded, section(backend.url), timeouts={"drain": "200ms"})
    stream = await Stream.begin(proxy)
    assert (await asyncio.to_thread(proxy.upgrade, "--drain", "1h")).returncode == 0
    proxy.service.process.send_signal(signal.SIGTERM)
    assert (await stream.rest()).count(b'"shutting_down"') == 1
    assert await asyncio.to_thread(proxy.service.process.wait, PATIENCE_S) == 0
    await all_ended(proxy)


async def test_without_a_proxy_or_beside_one(start_backend: StartBackend, upgraded: StartTidegate) -> None:
    proxy = await asyncio.to_thread(upgraded, section((await start_backend(then=answers())).url))
    assert (await asyncio.to_thread(proxy.upgrade)).returncode == 0
    await asyncio.to_thread(proxy.service.process.wait, PATIENCE_S)
    elsewhere = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
    status, _, complaint = await command("serve", "--config", str(proxy.config_file), *elsewhere)
    assert status == 2
    assert "in use by another tidegate" in complaint
    await all_ended(proxy)
    done = await asyncio.to_thread(proxy.upgrade)
    assert done.returncode == 1
    assert "no proxy is running" in done.stderr


@pytest.fixture
def systemd() -> Iterator[tuple[socket.socket, str]]:
    """Where a service tells systemd how it is: the socket, and its name."""
    name = f"@tidegate-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name.replace("@", "\0"))
        sock.settimeout(PATIENCE_S)
        yield sock, name


async def test_systemd_gives_the_sockets_and_hears_how_it_goes(
    start_backend: StartBackend, systemd: tuple[socket.socket, str], tmp_path: Path
) -> None:
    async def told() -> list[str]:
        return (await asyncio.to_thread(systemd[0].recv, 1000)).decode().split("\n")

    backend = await start_backend(then=answers())
    config = tmp_path / "tidegate.yaml"
    fields = {"state": str(tmp_path / "state"), "probing": {"enabled": False}, "log": "off"}
    fields |= {"listen": "127.0.0.1:1", "admin": "127.0.0.1:2"}  # nobody listens there
    config.write_text(json.dumps({**fields, "backends": [section(backend.url)]}))
    with socket.create_server(("127.0.0.1", 0)) as api, socket.create_server(("127.0.0.1", 0)) as admin:
        ports = [f"127.0.0.1:{sock.getsockname()[1]}" for sock in (api, admin)]
        handles = [os.dup(sock.fileno()) for sock in (admin, api)]
        for handle in handles:
            os.set_inheritable(handle, True)
        script = (
            f"exec env LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=admin:tidegate.socket "
            f"{COMMAND} serve --config {config} 3<&{handles[0]} 4<&{handles[1]}"
        )
        process = await asyncio.create_subprocess_exec(
            "bash",
            "-c",
            script,
            pass_fds=handles,
            env={**os.environ, "NOTIFY_SOCKET": systemd[1]},
        )
        for handle in handles:
            os.close(handle)
        assert await told() == ["READY=1"]
        assert json.loads((tmp_path / "state" / "ports.json").read_text())["listen"] == ports[0]
        async with aiohttp.ClientSession() as session:
            body = {"model": "m", "messages": HELLO}
            async with session.post(f"http://{ports[0]}/v1/chat/completions", json=body) as response:
                assert response.status == 200
            async with session.get(f"http://{ports[1]}/readyz") as response:
                assert response.status == 200
        process.send_signal(signal.SIGHUP)
        assert (await told())[0] == "RELOADING=1"
        assert await told() == ["READY=1"]
        assert (await command("upgrade", "--config", str(config)))[0] == 0
        new = json.loads((tmp_path / "state" / "ports.json").read_text())["pid"]
        said = [await told(), await told()]
        assert sorted(said) == [[f"MAINPID={new}"], ["READY=1"]]
        assert await process.wait() == 0
        os.kill(new, signal.SIGTERM)
        assert await told() == ["STOPPING=1"]
        await ended(new)
