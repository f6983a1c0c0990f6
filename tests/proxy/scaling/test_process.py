"""The provider `process` with real processes: what it launches, what it says of them, and that nothing is left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from benchmarks.processes import free_port
from proxy.scaling import process as process_module
from proxy.scaling.facts import Facts
from proxy.scaling.process import ProcessProvider, command_of
from proxy.scaling.provider import Presence, ProviderError
from proxy.scaling.sections import ProcessSection, StandbySection
from proxy.scaling.supervisor import Order, Record, is_locked, left_of, path_of, read_record
from tests.proxy.scaling.home import PATIENCE_S, Call, Home, at_home, ended

COMM = Path("/proc/self/comm").read_text().strip() if sys.platform == "linux" else ""
ROOT = Path(__file__).parents[3]
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="NOT RUN: processes are kept on Linux only"),
    pytest.mark.timeout(300),  # each takes a second, on a machine that has one
]


class Place:
    """One standby's directory, and providers for it."""

    def __init__(self, directory: Path, home: Home, keep: Callable[[ProcessProvider], None]) -> None:
        self.home = home
        self.facts = Facts("a.b", f"http://127.0.0.1:{free_port()}", ("m",), directory=directory / "standbys")
        self.prefix = self.facts.directory / "a.b"
        self._keep = keep

    def provider(self, *arguments: str, lease_s: float = 30.0, **fields: Any) -> ProcessProvider:
        fields = {"command": self.home.command(*arguments), "grace": 20.0, **fields}
        made = ProcessProvider(standby(**fields), self.facts, lease_s=lease_s)
        self._keep(made)
        return made

    @property
    def record(self) -> Record:
        record = read_record(self.prefix)
        assert record is not None
        return record

    async def over(self) -> None:
        """Wait until the supervisor has ended, and its guard."""
        supervisor = self.record.supervisor[0]
        await ended(supervisor)
        while is_locked(self.prefix):  # noqa: ASYNC110 - of the guard we know nothing
            await asyncio.sleep(0.01)


def standby(**fields: Any) -> StandbySection:
    return StandbySection(process=ProcessSection(**fields))


@pytest_asyncio.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        home = await stack.enter_async_context(at_home())

        def keep(provider: ProcessProvider) -> None:
            stack.push_async_callback(provider.close)
            stack.push_async_callback(provider.stop, "")

        yield Place(tmp_path, home, keep)


# From nothing to an engine, and back


async def test_what_is_launched_knows_where_it_is_to_answer(place: Place) -> None:
    provider = place.provider("--listen", "{host}", "{port}", environment={"X_PORT": "{port}"})
    await provider.start("run-1")
    engine = await place.home.call()
    assert await engine.line() == "listens"
    port = place.facts.url.rpartition(":")[2]
    assert engine.arguments[-2:] == ["127.0.0.1", port]
    assert engine.environment["X_PORT"] == port
    assert (engine.environment["TIDEGATE_STANDBY"], engine.environment["TIDEGATE_RUN"]) == ("a.b", "run-1")
    status = await provider.status()
    assert (status.presence, status.run) == (Presence.RUNNING, "run-1")
    await provider.stop("run-1")
    assert await engine.line() is None
    assert not is_locked(place.prefix)
    assert (await provider.status()).presence is Presence.ABSENT
    assert (await provider.status()).detail == ""


async def test_one_run_is_launched_once_whoever_asks(place: Place) -> None:
    first, second = place.provider(), place.provider()
    await asyncio.gather(*(provider.start("run-1") for provider in (first, second, first, second)))
    engine = await place.home.call()
    launched = place.record
    await first.start("run-1")
    assert place.record == launched
    with pytest.raises(ProviderError, match="run-1 of it is still there"):
        await second.start("run-2")
    await second.stop("run-2")
    await engine.ended()
    assert place.home.nobody_else()


async def test_a_start_that_was_cancelled_anywhere_can_be_repeated(place: Place) -> None:
    provider = place.provider()
    for turns in (1, 5):
        task = asyncio.get_running_loop().create_task(provider.start(f"run-{turns}"))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await provider.start(f"run-{turns}")
        engine = await place.home.call()
        assert place.record.command[0] == engine.pid
        await provider.stop("")
        await engine.ended()
    assert place.home.nobody_else()


async def test_a_stop_comes_after_a_launch_that_nobody_waits_for_any_more(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = place.provider()
    spawn, reached, goes_on = provider._spawn, threading.Event(), threading.Event()

    def slow(order: Order) -> bool:
        reached.set()
        assert goes_on.wait(PATIENCE_S)
        return spawn(order)

    monkeypatch.setattr(provider, "_spawn", slow)
    loop = asyncio.get_running_loop()
    starting = loop.create_task(provider.start("run-1"))
    assert await asyncio.to_thread(reached.wait, PATIENCE_S)
    starting.cancel()
    stopping = loop.create_task(provider.stop("run-1"))
    await asyncio.wait({starting, stopping}, timeout=0.1)
    assert not stopping.done()
    goes_on.set()
    await stopping
    assert (await provider.status()).presence is Presence.ABSENT
    assert not is_locked(place.prefix)


async def test_it_may_end_its_work_after_sigterm(place: Place) -> None:
    provider = place.provider("--polite")
    await provider.start("r")
    engine = await place.home.call()
    await provider.stop("r")
    assert await engine.line() == "asked"
    assert place.record.code == 0


async def test_one_that_does_not_end_is_killed_with_all_that_it_started(place: Place) -> None:
    provider = place.provider("--stubborn", "--family", grace=0.1)
    await provider.start("r")
    family = [await place.home.call() for _ in range(3)]
    assert sorted(member.who for member in family) == ["child", "engine", "stranger"]
    await provider.stop("r")
    assert [await member.line() for member in family] == [None] * 3
    assert place.record.code == -signal.SIGKILL


async def test_a_stop_that_was_cancelled_goes_on_and_can_be_repeated(place: Place) -> None:
    provider = place.provider("--polite")
    await provider.start("r")
    engine = await place.home.call()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await provider.stop("r")
    await provider.stop("r")
    await engine.ended()
    await provider.stop("r")


# What goes wrong


async def test_an_engine_that_dies_is_absent_and_its_last_words_are_told(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "no GPU; HF_TOKEN=hf_topsecret and sk-backend-key"
    place.facts = replace(place.facts, key="sk-backend-key")
    provider = place.provider("--say", said, "--exit", "3", "--family")
    await provider.start("r")
    family = [await place.home.call() for _ in range(3)]
    for member in family:
        if member.who == "engine":
            member.go_on()
    for member in family:
        await member.ended()  # a server's workers are nothing without it
    await place.over()
    status = await provider.status()
    assert status.presence is Presence.ABSENT
    assert "ended with exit code 3" in status.detail
    assert "no GPU; HF_TOKEN=*** and ***" in status.detail.replace("************", "***")
    assert "topsecret" not in status.detail
    assert "sk-backend" not in status.detail
    await provider.start("r2")
    assert (await place.home.call()).environment["TIDEGATE_RUN"] == "r2"


async def test_one_that_ends_at_once_has_not_started(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "EARLY_S", 30.0)  # the test takes as long as the shell
    provider = place.provider(command=["sh", "-c", "echo unknown flag >&2; echo password: abc; exit 2"])
    with pytest.raises(ProviderError) as error:
        await provider.start("r")
    assert str(error.value).startswith("`sh` ended with exit code 2 at once:\nunknown flag\npassword:")
    assert "abc" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"command": ["no-such-command-here"]}, "no-such-command-here"),
        ({"command": ["./no-such-file"]}, "no-such-file"),
        ({"command": ["/etc/passwd"]}, "/etc/passwd cannot be run: permission denied"),
        ({"command": ["/etc"]}, "/etc cannot be run: permission denied"),
        ({"command": ["true"], "directory": Path("/no/such")}, "/no/such"),
        ({"command": ["echo", "\0"]}, "null"),
    ],
)
async def test_what_cannot_be_run_is_an_error_that_names_it(
    place: Place, fields: dict[str, Any], message: str
) -> None:
    provider = place.provider(**fields)
    with pytest.raises(ProviderError, match=message):
        await provider.start("r")
    status = await provider.status()
    assert status.presence is Presence.ABSENT
    assert "cannot be run" in status.detail


async def test_a_port_in_use_is_an_error_that_names_who_has_it(place: Place) -> None:
    provider = place.provider()
    port = int(place.facts.url.rpartition(":")[2])
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", port)
    with pytest.raises(ProviderError, match=f"port {port} is in use by {COMM}, process {os.getpid()}"):
        await provider.start("r")
    server.close()
    await server.wait_closed()
    await provider.start("r")
    await place.home.call()


async def test_a_state_directory_that_cannot_be_written_is_an_error(place: Place) -> None:
    place.facts.directory.parent.joinpath("standbys").write_text("a file")
    provider = place.provider()
    with pytest.raises(ProviderError, match="standbys"):
        await provider.start("r")
    assert (await provider.status()).presence is Presence.UNKNOWN
    place.facts.directory.unlink()


# Who is killed


async def killed_supervisor(place: Place, provider: ProcessProvider) -> list[Call]:
    await provider.start("r")
    family = [await place.home.call() for _ in range(3)]
    os.kill(place.record.supervisor[0], signal.SIGKILL)
    return family


async def test_with_its_supervisor_dies_all_that_it_kept(place: Place) -> None:
    provider = place.provider("--stubborn", "--family")
    for member in await killed_supervisor(place, provider):
        if member.who != "stranger":
            await member.ended()
    await place.over()
    status = await provider.status()
    assert status.presence is Presence.ABSENT
    assert "its supervisor was killed" in status.detail


def guard_of(place: Place) -> int:
    """The child of the supervisor that is not its command."""
    supervisor, command = place.record.supervisor[0], place.record.command[0]
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    return next((int(pid) for pid in children if int(pid) != command), 0)


async def test_a_guard_that_is_killed_is_replaced(place: Place) -> None:
    provider = place.provider("--stubborn", "--family")
    await provider.start("r")
    family = [await place.home.call() for _ in range(3)]
    first = guard_of(place)
    os.kill(first, signal.SIGKILL)
    await ended(first)
    while guard_of(place) in (0, first):  # noqa: ASYNC110 - it does not call
        await asyncio.sleep(0.01)
    os.kill(place.record.supervisor[0], signal.SIGKILL)
    for member in family:
        if member.who != "stranger":
            await member.ended()
    await place.over()


async def test_what_supervisor_and_guard_left_is_seen_and_ended_by_a_stop(place: Place) -> None:
    provider = place.provider("--stubborn", "--family")
    await provider.start("r")
    family = {member.who: member for member in [await place.home.call() for _ in range(3)]}
    guard = guard_of(place)
    os.kill(guard, signal.SIGSTOP)
    os.kill(place.record.supervisor[0], signal.SIGKILL)
    await family["engine"].ended()  # by Linux
    os.kill(guard, signal.SIGKILL)
    await place.over()
    status = await provider.status()
    assert status.presence is Presence.UNKNOWN
    assert str(family["child"].pid) in status.detail
    await provider.stop("r")
    assert await family["child"].line() is None
    assert (await provider.status()).presence is Presence.ABSENT


async def test_a_start_ends_what_was_left_first(place: Place) -> None:
    provider = place.provider("--stubborn", "--family", grace=0.1)
    await provider.start("r")
    family = {member.who: member for member in [await place.home.call() for _ in range(3)]}
    guard = guard_of(place)
    os.kill(guard, signal.SIGSTOP)
    os.kill(place.record.supervisor[0], signal.SIGKILL)
    os.kill(guard, signal.SIGKILL)
    await place.over()
    await provider.start("r2")
    assert await family["child"].line() is None
    assert [(await place.home.call()).environment.get("TIDEGATE_RUN") for _ in range(2)]


def test_a_process_id_that_is_used_again_gets_no_signal() -> None:
    other = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    began = process_module.supervisor.identity(other.pid)[1]
    process_module._signal((other.pid, began - 1))
    out, _ = other.communicate(b"here", timeout=30)
    assert (out, other.returncode) == (b"here", 0)
    process_module._signal((other.pid, began))  # gone


# The proxy's own end


async def test_an_engine_survives_the_proxy_and_is_taken_over(place: Place) -> None:
    proxy = await elsewhere(place, "run-7", 30.0)
    engine = await place.home.call()
    proxy.kill()
    await proxy.wait()
    provider = place.provider()
    status = await provider.status()
    assert (status.presence, status.run) == (Presence.RUNNING, "run-7")
    await provider.start("run-7")
    assert place.record.command[0] == engine.pid
    await provider.stop("run-7")
    await engine.ended()
    assert place.home.nobody_else()


async def test_without_a_proxy_nothing_is_left(place: Place) -> None:
    proxy = await elsewhere(place, "r", 0.3, "--family")
    family = [await place.home.call() for _ in range(3)]
    proxy.kill()
    await proxy.wait()
    for member in family:
        await member.ended()
    await place.over()
    assert place.record.reason == "no Tidegate wanted it any more"
    assert "no Tidegate wanted it any more" in (await place.provider().status()).detail


async def test_a_proxy_that_lives_keeps_it(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease is over after 0.5 s; it is touched 20 times, each a twelfth of a second apart."""
    touched = asyncio.Semaphore(0)
    touch = ProcessProvider._touch

    def counted(self: ProcessProvider) -> None:
        touch(self)
        touched.release()

    monkeypatch.setattr(ProcessProvider, "_touch", counted)
    provider = place.provider(lease_s=2.0)
    await provider.start("r")
    engine = await place.home.call()
    first = provider._tasks
    for _ in range(10):
        await touched.acquire()
    assert len(first) == 1
    assert (await provider.status()).presence is Presence.RUNNING
    await provider.close()
    await engine.ended()


async def elsewhere(place: Place, run: str, lease_s: float, *arguments: str) -> asyncio.subprocess.Process:
    """Another process starts it, and lives on."""
    code = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from proxy.scaling.facts import Facts\n"
        "from proxy.scaling.process import ProcessProvider\n"
        "from proxy.scaling.sections import StandbySection\n"
        "async def main():\n"
        f"    facts = Facts('a.b', {place.facts.url!r}, ('m',), directory=Path({str(place.facts.directory)!r}))\n"
        f"    section = StandbySection(process={{'command': {place.home.command(*arguments)!r}}})\n"
        f"    provider = ProcessProvider(section, facts, lease_s={lease_s})\n"
        f"    await provider.start({run!r})\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    return await asyncio.create_subprocess_exec(sys.executable, "-c", code, cwd=ROOT)


# What it is made of


def test_the_recipe_of_a_vllm() -> None:
    section = ProcessSection.model_validate(
        {"vllm": {"model": "org/m", "arguments": ["--max-model-len", "16384"]}, "grace": 30}
    )
    facts = Facts("a", "http://[::1]:8001", ("m", "alias"), key="sk-1")
    command, environment = command_of(section, facts)
    assert command == [
        *("vllm", "serve", "org/m", "--host", "::1", "--port", "8001"),
        *("--served-model-name", "m", "alias", "--shutdown-timeout", "24", "--max-model-len", "16384"),
    ]
    assert environment == {"VLLM_API_KEY": "sk-1"}
    assert command_of(section, replace(facts, key=None))[1] == {}


def test_braces_of_others_stay_as_they_are() -> None:
    section = ProcessSection(command=["sh", "-c", 'echo ${HOME} {"a": {}} {port}'])
    facts = Facts("a", "http://localhost", ("m",))
    assert command_of(section, facts)[0][2] == 'echo ${HOME} {"a": {}} 80'
    assert not list(ProcessProvider.check(StandbySection(process=section), facts))


@pytest.mark.parametrize(
    ("fields", "url", "at", "message"),
    [
        ({"command": ["true"]}, "unix:/run/a.sock", (), "give its url one"),
        ({"command": ["true"]}, "http://192.0.2.1:80", (), "192.0.2.1 is not an address of this machine"),
        ({"command": ["no-such-command"]}, None, ("command", 0), "give its whole path"),
        ({"command": ["./no-such"]}, None, ("command", 0), "there is no file"),
        ({"command": ["/etc/passwd"]}, None, ("command", 0), "chmod"),
        ({"command": ["true", "{prot}"]}, None, ("command", 1), "no placeholder is called {prot}"),
        ({"command": ["true"], "environment": {"P": "{x}"}}, None, ("environment", "P"), "{x}"),
        ({"command": ["true"], "directory": "/no/such"}, None, ("directory",), "there is no directory"),
        ({"vllm": {"model": "m"}}, None, ("vllm", "executable"), "no command 'vllm'"),
        ({"vllm": {"model": "/no/m", "executable": "true"}}, None, ("vllm", "model"), "no model folder"),
        ({"vllm": {"model": "/etc/ssl", "executable": "true"}}, None, ("vllm", "model"), "no config.json"),
        (
            {"vllm": {"model": "m", "executable": "true", "arguments": ["--api-key=sk-1"]}},
            None,
            ("vllm", "arguments", 0),
            "others read command lines",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_it_is_tried(
    fields: dict[str, Any], url: str | None, at: tuple[str | int, ...], message: str
) -> None:
    section = StandbySection.model_validate({"process": fields})
    facts = Facts("a", url or "http://127.0.0.1:8001", ("m",))
    (problem,) = ProcessProvider.check(section, facts)
    assert problem.at == ("process", *at)
    assert message in problem.message


async def test_preparing_says_the_same(place: Place) -> None:
    provider = place.provider(command=["no-such-command"])
    with pytest.raises(ProviderError, match="no command 'no-such-command' is found"):
        await provider.prepare("r")
    await place.provider().prepare("r")


def test_files_are_named_by_the_whole_name(tmp_path: Path) -> None:
    assert path_of(tmp_path / "a.b", "lock") == tmp_path / "a.b.lock"
    assert left_of(tmp_path / "nobody") == []
