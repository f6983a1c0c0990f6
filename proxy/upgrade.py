"""Replacing the running process by a new one: no connection refused, no stream cut, no token lost.

    tidegate upgrade      old process                      new process
    ask ────────────────> starts it with --take-over ────> reads its configuration
                          sockets and lock <────────────── asks for them
                          ───────────────────────────────> opens ledger and journal, probes, accepts
                          stops accepting, drains <─────── ready
                          <───── go, or not ─────────────> goes on alone

They talk over a Unix socket in the state directory, mode 0600, that answers to the same user and to root.
Descriptors travel as SCM_RIGHTS (unix(7)): both processes then have the same sockets with the same queue of
connections that nobody has accepted yet, so there is no moment at which nobody listens.

Until `ready` the old process serves as if nothing were; if the new one ends before that, for whatever reason, it
goes on. If the old one ends instead, the new one goes on alone: it has all it needs.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import struct
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from proxy.build import ConfigError
from proxy.config import Config
from proxy.listeners import Listeners
from proxy.readable import in_words
from proxy.successor import Successor

log = logging.getLogger("tidegate")

SOCKET_FILE = "upgrade.sock"
MESSAGE_BYTES = 64 * 1024
MOST_DESCRIPTORS = 32
ACCEPT_PAUSE_S = 1.0
"""After an accept that failed."""
ANSWER_S = 10.0
"""How long either side waits for what the other can say at once."""
START_S = 300.0
"""How long a new process may take until it is ready: a large database is checked first."""


class UpgradeError(ConfigError):
    """Nothing was upgraded; the message says why."""


class Host(Protocol):
    """What the running process lets be done with itself."""

    state: Path
    command: list[str]
    """What starts its successor."""

    def refuses_upgrade(self) -> str:
        """Why it cannot be replaced now; empty: it can."""

    def offered(self) -> tuple[int, list[tuple[str, str, int]]]:
        """Its lock, and of each listening socket its key in the configuration, the configured address, the
        descriptor."""

    def publish(self) -> None:
        """Be the process that the state directory tells of."""

    def hand_over(self, pid: int, drain_s: float | None) -> dict[str, Any]:
        """To process `pid`: accept nothing any more, and drain. -> what to tell of it."""


class UpgradeSocket:
    """The running process's end. All of it belongs to the event loop."""

    def __init__(
        self, host: Host, spawn: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]]
    ) -> None:
        """`spawn` keeps tasks, and ends them with the process."""
        self._host = host
        self._spawn = spawn
        self._loop = asyncio.get_running_loop()
        self._accepting: asyncio.Task[None] | None = None
        self._successor: Successor | None = None
        self._taken_by = 0
        """The process that takes over now."""
        self._outcome: asyncio.Future[dict[str, Any]] | None = None
        self._drain_s: float | None = None
        self._handed_over = False

    def open(self) -> None:
        """Listen, in the place of whoever did. Raises OSError."""
        sock = socket.socket(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        try:
            os.fchmod(sock.fileno(), 0o600)  # Linux makes the file with it
            with _short(self._host.state) as folder:
                fresh = f"{SOCKET_FILE}.{os.getpid()}"
                Path(folder, fresh).unlink(missing_ok=True)
                sock.bind(f"{folder}/{fresh}")
                sock.listen()
                os.replace(f"{folder}/{fresh}", f"{folder}/{SOCKET_FILE}")
        except OSError:
            sock.close()
            raise
        self.close()
        self._accepting = self._spawn(self._accept(sock), "upgrade socket")
        self._accepting.add_done_callback(lambda _: sock.close())  # also if it is cancelled before it begins

    def close(self) -> None:
        """Answer nobody any more who has not asked yet."""
        if self._accepting is not None:
            self._accepting.cancel()
            self._accepting = None

    async def _accept(self, sock: socket.socket) -> None:
        while True:
            try:
                connection, _ = await self._loop.sock_accept(sock)
            except OSError as error:  # no file descriptors are left, most likely
                log.warning("upgrade: a connection could not be accepted: %s", in_words(error))
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            connection.setblocking(False)
            self._spawn(self._answer(connection), "upgrade")

    async def _answer(self, connection: socket.socket) -> None:
        with connection:
            pid, uid = peer(connection)
            if uid not in (0, os.geteuid()):
                log.warning("upgrade: process %d of user %d was refused", pid, uid)
                return
            message = await self._receive(connection, ANSWER_S)
            asked = message.get("ask")
            refusal = self._host.refuses_upgrade()
            if not refusal and self._taken_by:
                refusal = f"process {self._taken_by} is already taking over"
            elif not refusal and self._outcome is not None and asked == "upgrade":
                refusal = "an upgrade is already under way"
            elif not refusal and self._successor is not None and self._successor.pid != pid:
                refusal = f"process {self._successor.pid} was started to take over"
            if refusal:
                _send(connection, {"error": refusal})
            elif asked == "upgrade":
                _send(connection, await self._upgrade(message.get("drain")))
            elif asked == "take over":
                await self._hand_over(connection, pid)

    async def _upgrade(self, drain_s: float | None) -> dict[str, Any]:
        """Start the successor and wait for what becomes of it."""
        self._drain_s = drain_s
        self._outcome = outcome = self._loop.create_future()
        try:
            self._successor = successor = await asyncio.to_thread(Successor, self._host.command)
            log.info("upgrade: process %d is to take over", successor.pid)
            successor.watch(lambda: self._loop.call_soon_threadsafe(self._ended, successor))
            await asyncio.wait({outcome}, timeout=START_S)
            late = f"the new process was not ready within {START_S:g} s and was ended"
            told: dict[str, Any] = outcome.result() if outcome.done() else self._failed(late)
            return told
        except OSError as error:
            return self._failed(f"the new process cannot be started: {in_words(error)}")
        finally:
            if self._successor is not None and not self._handed_over:
                self._successor.kill()
            self._successor = self._outcome = self._drain_s = None

    def _ended(self, successor: Successor) -> None:
        """It is silent: gone, unless it has taken over."""
        if successor is self._successor and self._outcome is not None and not self._outcome.done():
            reason = f"the new process {successor.how_it_ended()}"
            self._outcome.set_result(self._failed(f"{reason}, and said:\n{successor.said}"))

    def _failed(self, reason: str) -> dict[str, Any]:
        log.error("upgrade failed, this process goes on: %s", reason.partition("\n")[0])
        return {"error": reason}

    async def _hand_over(self, connection: socket.socket, pid: int) -> None:
        host = self._host
        self._taken_by = pid
        try:
            lock, sockets = host.offered()
            told = {"sockets": [(name, configured) for name, configured, _ in sockets]}
            handles = [lock, *(descriptor for _, _, descriptor in sockets)]
            socket.send_fds(connection, [json.dumps(told).encode()], handles)
            ready = await self._receive(connection, START_S)
            if not ready:
                log.error("upgrade: process %d ended before it was ready, this one goes on", pid)
                _send(connection, {"go": False, "reason": "has waited long enough and goes on"})
                host.publish()
                return
            if refusal := host.refuses_upgrade():
                _send(connection, {"go": False, "reason": refusal})
                return
            told = host.hand_over(pid, self._drain_s)
            self._handed_over = True
            _send(connection, {"go": True})
            log.info("upgrade: process %d has taken over", pid)
            if self._outcome is not None and not self._outcome.done():
                self._outcome.set_result({"pid": pid, **told})
        finally:
            self._taken_by = 0

    async def _receive(self, connection: socket.socket, within_s: float) -> dict[str, Any]:
        """The next message; empty: there is none."""
        try:
            async with asyncio.timeout(within_s):
                found = json.loads(await self._loop.sock_recv(connection, MESSAGE_BYTES) or b"{}")
        except (OSError, ValueError, TimeoutError):
            return {}
        return found if isinstance(found, dict) else {}


class Predecessor:
    """The new process's end: the one that it takes over from. Its methods block."""

    def __init__(
        self, connection: socket.socket, lock: int, sockets: list[tuple[str, str, socket.socket]]
    ) -> None:
        self._connection = connection
        self.lock = lock
        self._sockets = sockets

    @classmethod
    def of(cls, state: Path) -> Predecessor | None:
        """Ask the process that serves on a state directory for its sockets; None: there is none. Raises
        UpgradeError: it refuses."""
        connection = _connect(state)
        if connection is None:
            return None
        _send(connection, {"ask": "take over"})
        try:
            message, handles, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, MOST_DESCRIPTORS)
        except OSError:
            message, handles = b"", []
        for handle in handles:
            os.set_inheritable(handle, False)
        if not message:  # it has died, or is of another user
            connection.close()
            return None
        told = json.loads(message)
        if "error" in told:
            connection.close()
            raise UpgradeError(f"the running process cannot be replaced now: {told['error']}")
        lock, *rest = handles
        named = zip(told["sockets"], rest, strict=True)
        return cls(
            connection, lock, [(name, at, socket.socket(fileno=handle)) for (name, at), handle in named]
        )

    def sockets(self, config: Config) -> Listeners:
        """Those whose configured address is still the same; the others are closed, and stay the old process's."""
        taken: Listeners = {}
        for name, address, sock in self._sockets:
            if getattr(config, name) == address:
                taken.setdefault(name, []).append(sock)
            else:
                sock.close()
        return taken

    def leave(self) -> None:
        """Take over nothing: the other process goes on."""
        self._connection.close()

    def ready(self) -> str:
        """Tell that this process serves. -> why it must not; empty: it goes on, alone from now on."""
        with self._connection:
            try:
                _send(self._connection, {"ready": os.getpid()})
                answer = json.loads(self._connection.recv(MESSAGE_BYTES) or b"{}")
            except OSError:
                answer = {}  # it has died: somebody has to go on
            return "" if answer.get("go", True) else str(answer.get("reason"))


def ask_for_upgrade(state: Path, drain_s: float | None) -> dict[str, Any]:
    """Have the process that serves on a state directory replaced; blocks until it is.

    -> `pid` of the new process, `old` that of the old one, `running` requests that this still ends, and `drain`:
    seconds they have. Raises UpgradeError.
    """
    connection = _connect(state)
    if connection is None:
        raise UpgradeError(f"no proxy is running on {state}: start it with `tidegate serve`")
    with connection:
        old, _ = peer(connection)
        _send(connection, {"ask": "upgrade", "drain": drain_s})
        connection.settimeout(START_S + ANSWER_S)
        try:
            told: dict[str, Any] = json.loads(connection.recv(MESSAGE_BYTES) or b"{}")
        except OSError as error:
            raise UpgradeError(f"process {old} does not answer: {error}") from None
    if not told:
        raise UpgradeError(
            f"process {old} has ended during the upgrade: `tidegate status` shows whether the new one serves"
        )
    if "error" in told:
        raise UpgradeError(f"process {old} goes on, nothing was upgraded: {told['error']}")
    return {"old": old, **told}


def peer(connection: socket.socket) -> tuple[int, int]:
    """Process and user at the other end of a Unix socket, as the kernel knows them."""
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def _connect(state: Path) -> socket.socket | None:
    """None: nobody listens there. Raises UpgradeError: this user may not ask."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    connection.settimeout(ANSWER_S)
    try:
        with _short(state) as folder:
            connection.connect(f"{folder}/{SOCKET_FILE}")
    except PermissionError:
        connection.close()
        raise UpgradeError(f"{state} belongs to another user: ask as that user, or as root") from None
    except OSError:
        connection.close()
        return None
    return connection


@contextmanager
def _short(directory: Path) -> Iterator[str]:
    """A short name of a directory: that of a Unix socket may have 107 bytes."""
    handle = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{handle}"
    finally:
        os.close(handle)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Say it, if anybody listens."""
    with suppress(OSError):
        connection.send(json.dumps(message).encode())
