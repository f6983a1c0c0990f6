"""What the two processes of an upgrade say to each other. Real processes do in tests/e2e/test_upgrade.py."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from stat import S_IMODE
from typing import Any

import pytest
from typer.testing import CliRunner

from proxy import upgrade
from proxy.cli import app
from proxy.config import Config
from proxy.listeners import bind, host_port
from proxy.state_lock import lock_state
from proxy.tasks import Tasks
from proxy.upgrade import SOCKET_FILE, Predecessor, UpgradeError, UpgradeSocket, ask_for_upgrade


class FakeHost:
    """A running process."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.command = [sys.executable, "-c", "import sys; sys.exit('cannot start')"]
        self.refusal = ""
        self.lock = lock_state(state)
        self.sockets = [bind("listen", "127.0.0.1:0")[0], bind("admin", "127.0.0.1:0")[0]]
        self.published = 0
        self.handed_over: list[tuple[int, float | None]] = []
        self.changed = asyncio.Event()

    def refuses_upgrade(self) -> str:
        return self.refusal

    def offered(self) -> tuple[int, list[tuple[str, str, int]]]:
        names = ("listen", "admin")
        return self.lock, [
            (name, "127.0.0.1:0", sock.fileno()) for name, sock in zip(names, self.sockets, strict=True)
        ]

    def publish(self) -> None:
        self.published += 1
        self.changed.set()

    def hand_over(self, pid: int, drain_s: float | None) -> dict[str, Any]:
        self.handed_over.append((pid, drain_s))
        self.refusal = "it is stopping"
        return {"running": 3, "drain": 30.0}


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[FakeHost]:
    state = tmp_path / ("a long name " * 10)  # beyond what a Unix socket may be called
    state.mkdir()
    host = FakeHost(state)
    tasks = Tasks()
    UpgradeSocket(host, tasks.spawn).open()
    yield host
    await tasks.cancel_all()
    os.close(host.lock)
    for sock in host.sockets:
        sock.close()


def config(**fields: Any) -> Config:
    defaults = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0"}
    return Config.model_validate(
        defaults | fields | {"backends": [{"name": "a", "url": "http://127.0.0.1:1"}]}
    )


async def taken(host: FakeHost) -> Predecessor:
    predecessor = await asyncio.to_thread(Predecessor.of, host.state)
    assert predecessor is not None
    return predecessor


def close(predecessor: Predecessor) -> dict[str, list[socket.socket]]:
    """Close what was taken over. -> it"""
    found = predecessor.sockets(config())
    for sock in [*found.get("listen", ()), *found.get("admin", ())]:
        sock.close()
    os.close(predecessor.lock)
    return found


async def test_sockets_and_lock_pass_and_the_old_process_drains(host: FakeHost) -> None:
    predecessor = await taken(host)
    sockets = predecessor.sockets(config())
    found = {name: [host_port(sock) for sock in some] for name, some in sockets.items()}
    assert found == {"listen": [host_port(host.sockets[0])], "admin": [host_port(host.sockets[1])]}
    assert os.fstat(predecessor.lock).st_ino == os.fstat(host.lock).st_ino
    assert not os.get_inheritable(predecessor.lock)
    assert host.handed_over == []
    assert await asyncio.to_thread(predecessor.ready) == ""
    assert host.handed_over == [(os.getpid(), None)]
    with pytest.raises(UpgradeError, match="it is stopping"):
        await asyncio.to_thread(Predecessor.of, host.state)
    for sock in [*sockets["listen"], *sockets["admin"]]:
        sock.close()
    os.close(predecessor.lock)


async def test_a_changed_address_is_not_taken_over(host: FakeHost) -> None:
    predecessor = await taken(host)
    sockets = predecessor.sockets(config(admin="127.0.0.1:9"))
    assert list(sockets) == ["listen"]
    sockets["listen"][0].close()
    os.close(predecessor.lock)
    predecessor._connection.close()


async def test_who_ends_before_it_is_ready_has_changed_nothing(host: FakeHost) -> None:
    predecessor = await taken(host)
    with pytest.raises(UpgradeError, match="is already taking over"):
        await asyncio.to_thread(Predecessor.of, host.state)
    close(predecessor)
    predecessor._connection.close()
    async with asyncio.timeout(20):
        await host.changed.wait()  # the old process is the one to be asked again
    assert host.handed_over == []
    second = await taken(host)
    close(second)
    assert await asyncio.to_thread(second.ready) == ""


async def test_who_is_ready_after_a_stop_must_not_go_on(host: FakeHost) -> None:
    predecessor = await taken(host)
    host.refusal = "it is stopping"
    assert await asyncio.to_thread(predecessor.ready) == "it is stopping"
    assert host.handed_over == []
    close(predecessor)


async def test_who_cannot_start_is_told_of(host: FakeHost) -> None:
    for _ in range(2):  # and may be tried again
        with pytest.raises(UpgradeError) as caught:
            await asyncio.to_thread(ask_for_upgrade, host.state, None)
        assert str(caught.value) == (
            f"process {os.getpid()} goes on, nothing was upgraded: "
            "the new process ended with status 1, and said:\ncannot start"
        )
    host.command = ["/no/such/command"]
    with pytest.raises(UpgradeError, match=r"cannot be started: .*no such file"):
        await asyncio.to_thread(ask_for_upgrade, host.state, None)
    host.refusal = "it records an event log"
    with pytest.raises(UpgradeError, match="event log"):
        await asyncio.to_thread(ask_for_upgrade, host.state, None)
    assert host.handed_over == []


async def test_who_is_not_ready_in_time_is_ended(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upgrade, "START_S", 0.0)
    host.command = [sys.executable, "-c", "import sys; sys.stdin.read(); import time; time.sleep(600)"]
    with pytest.raises(UpgradeError, match="was not ready within 0 s and was ended"):
        await asyncio.to_thread(ask_for_upgrade, host.state, None)


async def test_other_users_are_not_answered(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    assert S_IMODE((host.state / SOCKET_FILE).stat().st_mode) == 0o600
    monkeypatch.setattr(upgrade, "peer", lambda connection: (4711, os.geteuid() + 1))
    assert await asyncio.to_thread(Predecessor.of, host.state) is None
    assert host.handed_over == []


async def test_a_stop_in_the_same_turn_leaves_no_socket_open(tmp_path: Path) -> None:
    host, tasks = FakeHost(tmp_path), Tasks()
    UpgradeSocket(host, tasks.spawn).open()
    await tasks.cancel_all()  # before it has begun to accept
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client,
        pytest.raises(ConnectionRefusedError),
    ):
        client.connect(str(tmp_path / SOCKET_FILE))
    os.close(host.lock)
    for sock in host.sockets:
        sock.close()


@pytest.mark.parametrize("message", [b"", b"{", b"[1]", b'{"ask": "everything"}', b"\xff", b"[" * 60_000])
async def test_what_is_no_question_is_not_answered(host: FakeHost, message: bytes) -> None:
    connection = upgrade._connect(host.state)
    assert connection is not None
    with connection:
        await asyncio.to_thread(connection.send, message)
        assert await asyncio.to_thread(connection.recv, 100) == b""
    close(predecessor := await taken(host))  # others are
    assert await asyncio.to_thread(predecessor.ready) == ""


def test_without_a_running_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Predecessor.of(tmp_path) is None
    with pytest.raises(UpgradeError, match="no proxy is running"):
        ask_for_upgrade(tmp_path, None)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:  # one that died has left its name
        monkeypatch.chdir(tmp_path)
        sock.bind(SOCKET_FILE)
    assert Predecessor.of(tmp_path) is None


async def test_an_answer_that_never_comes(tmp_path: Path) -> None:
    """The old process dies after it was asked."""
    folder = os.open(tmp_path, os.O_PATH)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(f"/proc/self/fd/{folder}/{SOCKET_FILE}")
        os.close(folder)
        sock.listen()

        def die() -> Any:
            connection, _ = sock.accept()
            with connection:
                return json.loads(connection.recv(1000))

        dying = asyncio.get_running_loop().run_in_executor(None, die)
        assert await asyncio.to_thread(Predecessor.of, tmp_path) is None
        assert await dying == {"ask": "take over"}
        dying = asyncio.get_running_loop().run_in_executor(None, die)
        with pytest.raises(UpgradeError, match="has ended during the upgrade"):
            await asyncio.to_thread(ask_for_upgrade, tmp_path, 60.0)
        assert await dying == {"ask": "upgrade", "drain": 60.0}


@pytest.mark.parametrize(
    ("running", "said"),
    [
        (0, "process 2 serves; process 1 has no request to end\n"),
        (1, "process 2 serves; process 1 still ends 1 request, for 30 s at most\n"),
        (7, "process 2 serves; process 1 still ends 7 requests, for 30 s at most\n"),
    ],
)
def test_the_command_says_what_is_still_to_end(
    running: int, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = {"pid": 2, "old": 1, "running": running, "drain": 30.0}
    monkeypatch.setattr("proxy.upgrade.ask_for_upgrade", lambda state, drain_s: told)
    assert CliRunner().invoke(app, ["upgrade", "--state", str(tmp_path)]).stdout == said
