"""A small process that keeps one command: started by Tidegate, and not ended with it.

    python supervisor.py PREFIX        PREFIX is STATE/standbys/NAME; the order, as JSON, comes on standard input

    PREFIX.lock     locked as long as anything may be left of the command: there is never a second one
    PREFIX.json     what runs, for whoever comes next
    PREFIX.lease    touched while a Tidegate lives; not touched for a while, the command is ended
    PREFIX.log      what the command says, and PREFIX.log.1 what it said before

SIGTERM ends the command: SIGTERM for it, and after its grace SIGKILL for all that descends from it. Descendants
that lose their parent become children of the supervisor, so it knows when the last one is gone.

Should the supervisor itself be killed, Linux kills the command, and a second process, the guard, kills what
descends from it. The lock belongs to both, so it is free only after that. Whoever kills supervisor and guard at the
same instant leaves descendants; they carry `MARK` in their environment, by which the next start or stop ends them.

Only the standard library is imported: this has to start fast and to stay small.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn

MARK: Final = "TIDEGATE_SUPERVISED"
"""Environment variable of all that descends from a supervised command; its value is the prefix."""
LEASE_S: Final = 30.0
"""Nobody has touched the lease for so long: nobody wants the command."""
LAST_GRACE_S: Final = 10.0
"""Grace at most of a command that nobody wants: with the proxy, its streams have ended."""
LOG_BYTES: Final = 16 * 1024 * 1024
"""Of a log, before it becomes the one before."""
ASKED: Final = "asked to end"
"""The reason in the record of what was stopped."""
LOCK_S: Final = 2.0
"""Whoever looks whether the lock is free holds it for an instant."""
_TURN_S: Final = 1.0
_PIECE: Final = 64 * 1024
_PR_SET_PDEATHSIG: Final = 1  # prctl(2)
_PR_SET_CHILD_SUBREAPER: Final = 36


@dataclass(frozen=True, slots=True)
class Order:
    """What to launch."""

    run: str
    command: list[str]
    environment: dict[str, str]
    directory: str
    grace_s: float
    lease_s: float = LEASE_S


@dataclass(slots=True)
class Record:
    """The file PREFIX.json."""

    run: str
    state: str
    """`running`, `stopping` or `ended`."""
    supervisor: tuple[int, int] = (0, 0)
    """Process id, and when that process began, in clock ticks since the system's start: ids are used again."""
    command: tuple[int, int] = (0, 0)
    code: int | None = None
    """Exit code; below zero: the signal that ended it."""
    reason: str = ""
    """Why it was ended; empty: it ended by itself, or has not."""
    wall: float = 0.0
    """Unix time of the last change."""


def path_of(prefix: Path, suffix: str) -> Path:
    """`with_suffix` would take what stands behind a dot of the name."""
    return prefix.parent / f"{prefix.name}.{suffix}"


def read_record(prefix: Path) -> Record | None:
    """What is known of the last run; None: there was none, or it cannot be read."""
    try:
        fields = json.loads(path_of(prefix, "json").read_bytes())
        fields["supervisor"], fields["command"] = tuple(fields["supervisor"]), tuple(fields["command"])
        return Record(**fields)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write_record(prefix: Path, record: Record) -> None:
    """All of it or nothing. Raises OSError."""
    record.wall = time.time()
    written = path_of(prefix, "json.new")
    written.write_text(json.dumps(asdict(record)), encoding="utf-8")
    written.replace(path_of(prefix, "json"))


def lock(prefix: Path) -> int | None:
    """Lock a standby; the open file that holds the lock. None: somebody else has it. Raises OSError."""
    handle = os.open(path_of(prefix, "lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:
        os.close(handle)
        raise
    return handle


def is_locked(prefix: Path) -> bool:
    """Whether something may be left of a standby. Raises OSError."""
    try:
        handle = os.open(path_of(prefix, "lock"), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def identity(pid: int) -> tuple[int, int]:
    """Process id and when it began; (0, 0) if there is none."""
    fields = _fields(pid)
    return (pid, int(fields[19])) if fields else (0, 0)


def left_of(prefix: Path, session: int = 0, parent: int = 0) -> list[int]:
    """Processes that carry the mark of a standby, or are in this session, or children of this one; but ourselves.

    A session's id is not used again while one of its processes lives: only they may ask by it.
    """
    mark = f"{MARK}={prefix}".encode()
    own, found = os.getpid(), []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == own:
            continue
        fields = _fields(int(name))
        if not fields or fields[0] in "ZX":
            continue
        if (parent and int(fields[1]) == parent) or (session and int(fields[3]) == session):
            found.append(int(name))
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                environment = file.read()
        except OSError:  # another user's, or gone
            continue
        if mark in environment.split(b"\0"):
            found.append(int(name))
    return found


def kill(pids: list[int]) -> None:
    """SIGKILL, for those that still are."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def _fields(pid: int) -> list[str]:
    """Of /proc/PID/stat, from the state on; empty: there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


class Log:
    """A log of bounded size."""

    def __init__(self, path: Path, most: int = LOG_BYTES) -> None:
        """Raises OSError."""
        self._path = path
        self._most = most
        self._open()

    def write(self, data: bytes) -> None:
        """Append. What a full disk does not take is lost: a command must not hang on its log."""
        try:
            if self._size + len(data) > self._most:
                with suppress(FileNotFoundError):  # it was renamed, and could not be begun anew
                    self._path.replace(path_of(self._path, "1"))
                old = self._file
                self._open()
                os.close(old)
            os.write(self._file, data)
            self._size += len(data)
        except OSError:
            pass

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(self._path, flags, 0o600)
        self._size = os.fstat(self._file).st_size


class Supervisor:
    """Launches one command and keeps it until its end."""

    def __init__(self, prefix: Path, order: Order, told: int) -> None:
        """`told`: pipe to whoever waits for the start."""
        self._prefix = prefix
        self._order = order
        self._told = told
        self._record = Record(order.run, "running", identity(os.getpid()))
        self._lease = path_of(prefix, "lease")
        self._process: subprocess.Popen[bytes] | None = None
        self._guard = 0
        self._guard_pipe = -1
        self._kill_at: float | None = None
        self._reason = ""
        """Why it is to be ended; empty: it is not."""
        self._grace_s = order.grace_s
        self._seen = 0
        self._looked_at = time.monotonic()
        self._unseen_s = 0.0
        """How long nobody has touched the lease."""

    def start(self) -> None:
        """Launch it. Raises OSError or ValueError: it cannot be, and nothing runs."""
        signal.signal(signal.SIGTERM, self._asked)
        signal.signal(signal.SIGINT, self._asked)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # wakes `run`
        write_record(self._prefix, self._record)  # before there is anything to know of
        self._log = Log(path_of(self._prefix, "log"))
        self._log.write(f"--- {time.strftime('%F %T')} {self._order.run}\n".encode())
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        parent = os.getpid()

        def die_with_parent() -> None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)  # it was gone before we asked

        self._output, inlet = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._output, False)
        self._spawn_guard()
        try:
            self._process = subprocess.Popen(  # noqa: S603 - what the configuration says
                self._order.command,
                cwd=self._order.directory,
                env={**self._order.environment, MARK: str(self._prefix)},
                stdin=subprocess.DEVNULL,
                stdout=inlet,
                stderr=inlet,
                process_group=0,
                preexec_fn=die_with_parent,  # safe: this process has one thread
            )
        finally:
            os.close(inlet)
        self._record.command = identity(self._process.pid)
        self._save()

    def run(self) -> dict[str, Any]:
        """Keep it until nothing of it is left; what is then to be told."""
        woken, waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        tell(self._told, {"started": True})
        poll = select.poll()
        poll.register(woken, select.POLLIN)
        poll.register(self._output, select.POLLIN)
        while self._reap():
            self._watch_lease()
            self._end()
            for handle, _ in poll.poll(1000 * self._pause()):
                if handle == woken:
                    _drained(woken)
                elif self._read() is None:
                    poll.unregister(self._output)
        self._kill_all()
        while self._read():
            pass
        self._record.state = "ended"
        assert self._process is not None
        self._record.code = self._process.returncode
        self._save()
        self._dismiss_guard()
        return {"ended": self._record.code}

    def failed(self, reason: str, where: str) -> dict[str, Any]:
        """It could not be launched; what is then to be told."""
        self._record.state, self._record.reason = "ended", f"{where} cannot be run: {reason}"
        self._dismiss_guard()
        try:
            write_record(self._prefix, self._record)
        except OSError:  # the reason itself, more often than not
            pass
        return {"failed": self._record.reason}

    def _dismiss_guard(self) -> None:
        """Nothing is left that it would have to end."""
        if not self._guard:
            return
        try:
            os.write(self._guard_pipe, b"q")
        except BrokenPipeError:  # it was killed
            pass
        os.waitpid(self._guard, 0)

    # The command

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self._reason = self._reason or ASKED

    def _watch_lease(self) -> None:
        try:
            seen = self._lease.stat().st_mtime_ns
        except OSError:
            seen = self._seen
        now = time.monotonic()
        # A turn in which this process, or the whole machine, was frozen says little of Tidegate.
        turn_s, self._looked_at = min(now - self._looked_at, 2 * _TURN_S), now
        self._unseen_s = self._unseen_s + turn_s if seen == self._seen else 0.0
        self._seen = seen
        if self._unseen_s > self._order.lease_s and not self._reason:
            self._reason = "no Tidegate wanted it any more"
            self._grace_s = min(self._order.grace_s, LAST_GRACE_S)

    def _end(self) -> None:
        """If it is to be ended: ask it to, or kill it if it was asked and had its grace."""
        if not self._reason:
            return
        assert self._process is not None
        if self._kill_at is None:
            self._kill_at = time.monotonic() + self._grace_s
            os.kill(
                self._process.pid, signal.SIGTERM
            )  # it tells its own: a group's would end workers at once
            self._record.state, self._record.reason = "stopping", self._reason
            self._save()
        elif time.monotonic() >= self._kill_at:
            os.killpg(self._process.pid, signal.SIGKILL)

    def _pause(self) -> float:
        if self._kill_at is None:
            return min(_TURN_S, self._order.lease_s / 4)
        return min(_TURN_S, max(self._kill_at - time.monotonic(), 0.01))

    def _reap(self) -> bool:
        """Whether it still runs."""
        assert self._process is not None
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == self._process.pid:
                self._process.returncode = os.waitstatus_to_exitcode(status)
            elif pid and pid == self._guard:
                os.close(self._guard_pipe)
                self._spawn_guard()
            elif not pid:
                return self._process.returncode is None

    def _kill_all(self) -> None:
        """What the command has left: it may have begun sessions of its own."""
        assert self._process is not None
        while left := [pid for pid in left_of(self._prefix, os.getpid(), os.getpid()) if pid != self._guard]:
            kill(left)
            time.sleep(0.02)
            self._reap()

    def _read(self) -> bytes | None:
        """What it says next; None: nobody will say anything any more."""
        try:
            data = os.read(self._output, _PIECE)
        except BlockingIOError:
            return b""
        self._log.write(data)
        return data or None

    def _save(self) -> None:
        try:
            write_record(self._prefix, self._record)
        except OSError as error:  # the lock says what matters
            self._log.write(f"--- {path_of(self._prefix, 'json')}: {error.strerror}\n".encode())

    # The guard

    def _spawn_guard(self) -> None:
        outlet, self._guard_pipe = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            os.close(self._guard_pipe)
            os.close(self._told)
            _guard(self._prefix, self._record, outlet, os.getppid())
        os.close(outlet)
        self._guard = pid


def _guard(prefix: Path, record: Record, pipe: int, session: int) -> NoReturn:
    """Wait until the supervisor is gone without a word, then end what it kept."""
    os.setpgid(0, 0)  # a signal for the supervisor's group is none for its guard
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)
    if os.read(pipe, 1):
        os._exit(0)
    while left := left_of(prefix, session):
        kill(left)
        time.sleep(0.02)
    last = read_record(prefix) or record
    last.state, last.reason = "ended", "its supervisor was killed"
    try:
        write_record(prefix, last)
    finally:
        os._exit(0)


def tell(pipe: int, what: dict[str, Any]) -> None:
    """A line for whoever waits for the start, if anybody does."""
    try:
        os.write(pipe, json.dumps(what).encode() + b"\n")
    except OSError:
        pass


def _drained(pipe: int) -> None:
    try:
        while os.read(pipe, 4096):
            pass
    except BlockingIOError:
        pass


def main() -> int:
    """Returns at once, as the parent of the process that stays."""
    prefix = Path(sys.argv[1])
    order = Order(**json.load(sys.stdin))
    told = os.dup(1)
    os.set_inheritable(told, False)
    if os.fork():
        os._exit(0)
    os.setsid()
    os.chdir("/")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    until = time.monotonic() + LOCK_S
    while (held := lock(prefix)) is None:
        if time.monotonic() > until:
            tell(told, {"locked": True})
            return 1
        time.sleep(0.02)
    supervisor = Supervisor(prefix, order, told)
    try:
        supervisor.start()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        where = str(getattr(error, "filename", None) or order.command[0])
        last = supervisor.failed(reason, where)
    else:
        last = supervisor.run()
    os.close(held)  # first: whoever is told may start the next one
    tell(told, last)
    return 0


if __name__ == "__main__":
    sys.exit(main())
