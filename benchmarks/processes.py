"""Starts the processes of a benchmark, measures what they use, and ends every one of them.

CPU time is user plus system of a process and all its descendants, ended ones included. It is read from each
process's CPU clock (nanoseconds; clock_getcpuclockid(3)), because `/proc/PID/stat` counts in steps of 10 ms; only
what ended descendants used comes from there.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import psutil

ROOT = Path(__file__).resolve().parent.parent

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PR_SET_PDEATHSIG = 1
_CPUCLOCK_SCHED = 2
_LIBC = ctypes.CDLL(None, use_errno=True)


class StartError(Exception):
    """A process ended, or did not get ready in time; the text has the end of its log."""


def cpu_seconds(pid: int) -> float:
    """User plus system time used so far by a process and all its descendants, seconds.

    Descendants that ended count once their parent has waited for them. Raises ProcessLookupError if `pid` is gone.
    """
    total = 0.0
    for process in (pid, *(child.pid for child in descendants(pid))):
        try:
            total += time.clock_gettime(((~process) << 3) | _CPUCLOCK_SCHED)
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            if process == pid:
                raise ProcessLookupError(pid) from None
            continue  # ended between two looks
        total += (int(fields[13]) + int(fields[14])) / _TICKS_PER_S
    return total


def descendants(pid: int) -> list[psutil.Process]:
    """The living children of a process, and their children."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def memory_bytes(pid: int) -> int:
    """Proportional set size of a process and its descendants, bytes: shared pages count once."""
    total = 0
    for process in (pid, *(child.pid for child in descendants(pid))):
        try:
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
        except OSError:
            continue
        total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) * 1024
    return total


def machine_cpu_seconds() -> float:
    """CPU time that all processes of the machine have used since it started, seconds (idle and stolen excluded)."""
    user, nice, system, _idle, _wait, interrupt, soft, *_ = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + interrupt + soft) / _TICKS_PER_S


def free_port() -> int:
    """A port of the loopback address that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def raise_open_files(wanted: int) -> int:
    """Raise this process's limit of open files, for its children too, as far as allowed; returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        if hard < wanted and os.geteuid() == 0:
            hard = wanted
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


@dataclass(frozen=True)
class Cores:
    """Which core each part of a benchmark runs on: the proxy has one for itself if there are two."""

    proxy: int
    backend: int
    load: int

    @classmethod
    def of_machine(cls) -> Cores:
        """The cores this process may use, shared out."""
        first, *others = sorted(os.sched_getaffinity(0))
        others = others or [first]
        return cls(first, others[0], others[-1])


@dataclass
class Service:
    """A running process of a benchmark."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    ports: tuple[int, ...] = ()

    @property
    def pid(self) -> int:
        """The id of its first process."""
        return self.process.pid

    def cpu_seconds(self) -> float:
        """CPU time used so far, descendants included, seconds."""
        return cpu_seconds(self.pid)

    def memory_bytes(self) -> int:
        """Memory in use, descendants included, bytes (PSS)."""
        return memory_bytes(self.pid)

    def log_tail(self, size: int = 2000) -> str:
        """The end of what it printed."""
        return self.log.read_text(errors="replace")[-size:] if self.log.exists() else ""


class Services:
    """The processes one benchmark started; leaving the block ends them all, and so does this process's death."""

    def __init__(self, folder: Path, niceness: int = 0) -> None:
        """`folder`: where their logs and files go; must exist. `niceness`: of all of them, if it may be set."""
        self.folder = folder
        self._niceness = niceness
        self._running: list[Service] = []

    def __enter__(self) -> Services:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ended = [
            f"{service.name}: {code}"
            for service in self._running
            if (code := service.process.poll()) is not None
        ]
        if isinstance(error, StartError) and ended:
            error.args = (f"{error}\nended by themselves or killed by others: {', '.join(ended)}",)
        for service in reversed(self._running[:]):
            self.stop(service)

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        core: int | None = None,
        environment: dict[str, str] | None = None,
        stdout: int | IO[bytes] | None = None,
    ) -> Service:
        """Start a command in a process group of its own, pinned to one core if given; its output goes to a log."""
        log = self.folder / f"{name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output if stdout is None else stdout,
                stderr=output,
                start_new_session=True,
                preexec_fn=_child_setup(core, self._niceness),
            )
        service = Service(name, process, log)
        self._running.append(service)
        return service

    def start_mock(self, *options: str, core: int | None = None, name: str = "mock") -> Service:
        """Start `benchmarks.mock_backend` with these options; its ports are those of the service."""
        command = [sys.executable, "-m", "benchmarks.mock_backend", *options]
        service = self.start(name, command, core=core, stdout=subprocess.PIPE)
        assert service.process.stdout is not None
        line = service.process.stdout.readline()
        if not line:
            raise StartError(f"{name} did not start:\n{service.log_tail()}")
        service.ports = tuple(json.loads(line)["ports"])
        return service

    def run(self, name: str, command: Sequence[str], *, core: int | None = None, timeout_s: float) -> bytes:
        """Run a command to its end and return what it printed; raises StartError if it fails or takes too long."""
        service = self.start(name, command, core=core, stdout=subprocess.PIPE)
        try:
            output, _ = service.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise StartError(f"{name} was not done after {timeout_s:.0f} s:\n{service.log_tail()}") from None
        finally:
            self.stop(service)
        if service.process.returncode:
            raise StartError(f"{name} failed with {service.process.returncode}:\n{service.log_tail()}")
        return output

    def stop(self, service: Service, timeout_s: float = 5.0) -> None:
        """End a process and all it started: SIGTERM, and SIGKILL to what is left after `timeout_s`."""
        if service.process.poll() is None:  # an ended process's id may be somebody else's by now
            members = descendants(service.pid)
            _signal_group(service.pid, signal.SIGTERM)
            try:
                service.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                _signal_group(service.pid, signal.SIGKILL)
                service.process.wait()
            for member in members:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            psutil.wait_procs(members, timeout=1.0)
        if service.process.stdout is not None:
            service.process.stdout.close()
        if service in self._running:
            self._running.remove(service)

    def kill(self, service: Service) -> None:
        """End a process and its group at once with SIGKILL, as a crash would."""
        _signal_group(service.pid, signal.SIGKILL)
        service.process.wait()
        self._running.remove(service)


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _child_setup(core: int | None, niceness: int) -> Callable[[], None]:
    """What a child does before it becomes its program: pin itself, and ask to be ended when its parent ends."""

    def setup() -> None:
        if core is not None:
            os.sched_setaffinity(0, {core})
        with contextlib.suppress(PermissionError):
            os.nice(niceness)
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return setup


def hurry(pid: int, priority: int) -> None:
    """Let a process run before all ordinary ones of its core, where this user may say so.

    For the parts of a benchmark whose own waiting for a core would be taken for the proxy's delay.
    """
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(pid, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(priority))


def hurry_all(pid: int, priority: int) -> None:
    """`hurry` for every thread that a process and its descendants have now."""
    for process in (pid, *(child.pid for child in descendants(pid))):
        for thread in os.listdir(f"/proc/{process}/task"):
            hurry(int(thread), priority)


def ask_mock(service: Service, path: str) -> list[Any]:
    """The JSON at a path of each backend of a mock; raises StartError if one does not answer."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    answers = []
    for port in service.ports:
        try:
            with opener.open(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
                answers.append(json.load(answer))
        except OSError as error:
            ended = service.process.poll()
            state = "still running" if ended is None else f"ended with {ended}"
            raise StartError(f"{service.name}, {state}: {error}\n{service.log_tail()}") from None
    return answers
