"""The provider `process`: a command on this machine, or a vLLM.

The command is kept by a supervisor (`supervisor.py`) that outlives the proxy, so that a restart or an upgrade costs
no engine. What there is of a standby is told by the supervisor's lock and its record, never by a process id alone.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from policies.units import BadValueError
from policies.yamlproblems import closest
from proxy.masking import masked_output, secret_values
from proxy.scaling import supervisor
from proxy.scaling.facts import Facts
from proxy.scaling.ports import why_not
from proxy.scaling.provider import Presence, ProviderError, Status
from proxy.scaling.sections import ProcessSection, StandbySection, VllmRecipe
from proxy.scaling.supervisor import Order, Record, is_locked, left_of, path_of, read_record
from proxy.tasks import Tasks

log = logging.getLogger("tidegate")

TOUCH_S: Final = 5.0
"""How often the lease is renewed."""
EARLY_S: Final = 0.3
"""A command that ends within this has failed to start."""
LAUNCH_S: Final = 20.0
"""A supervisor that says nothing for so long will not."""
LOOK_S: Final = 0.05
"""How often a stop looks whether the lock is free."""
KILL_S: Final = 5.0
"""From SIGKILL until we say that it did nothing."""
LAST_LINES: Final = 10
"""Of the log, in a message."""
PLACEHOLDERS: Final = ("host", "port")
OURS: Final = {
    "--host": "it comes from the backend's url",
    "--port": "it comes from the backend's url",
    "--served-model-name": "it comes from the backend's models",
    "--api-key": "others read command lines: it comes from the backend's api_key_env or api_key_file",
}
"""Arguments of `vllm serve` that the recipe sets, and why they cannot be given."""
_PLACEHOLDER: Final = re.compile(r"(?<!\$)\{([A-Za-z_]+)\}")
"""`${HOME}` is a shell's."""


T = TypeVar("T")
R = TypeVar("R")


class ProcessProvider:
    """Launches one command and ends it."""

    def __init__(self, section: StandbySection, facts: Facts, *, lease_s: float = supervisor.LEASE_S) -> None:
        """`lease_s`: how long the command may go on without us."""
        if section.process is None:
            raise ValueError("not a standby of a process")
        self._section = section.process
        self._facts = facts
        self._lease_s = lease_s
        self._prefix = facts.directory.absolute() / facts.name
        self._turn = threading.Lock()
        """A launch that nobody waits for any more goes on in its thread: what ends it has to come after it."""
        self._tasks = Tasks()
        self._secrets = secret_values({**os.environ, **self._section.environment})
        if facts.key is not None:
            self._secrets.append(facts.key)

    @staticmethod
    def check(section: StandbySection, facts: Facts) -> Iterator[BadValueError]:
        """What cannot work, each with its place in the section."""
        if section.process is not None:
            for problem in _wrong(section.process, facts):
                problem.at = ("process", *problem.at)
                yield problem

    async def prepare(self, run: str) -> None:
        """See that what is to be launched is there. Raises ProviderError."""
        problems = await asyncio.to_thread(lambda: list(_wrong(self._section, self._facts)))
        if problems:
            raise ProviderError("; ".join(problem.message for problem in problems))

    async def start(self, run: str) -> None:
        """Launch it, unless this run was. Raises ProviderError."""
        self._renew()
        await asyncio.to_thread(self._alone, self._launch, run)

    async def stop(self, run: str) -> None:
        """SIGTERM, then SIGKILL after its grace; returns when nothing of it is left. Raises ProviderError."""
        told: tuple[int, int] | None = None
        while True:
            told = await asyncio.to_thread(self._alone, self._end, told)
            if told is None:
                return
            await asyncio.sleep(LOOK_S)

    async def status(self) -> Status:
        """What lock and record say."""
        try:
            status = await asyncio.to_thread(self._status)
        except OSError as error:
            return Status(Presence.UNKNOWN, detail=f"{error.filename}: {(error.strerror or '').lower()}")
        if status.presence is not Presence.ABSENT:
            self._renew()
        return status

    async def close(self) -> None:
        """Renew the lease no longer. What runs goes on, and ends if nobody renews it in time."""
        await self._tasks.cancel_all()

    # The lease

    def _renew(self) -> None:
        if not self._tasks:
            self._tasks.spawn(self._renewing(), f"lease of {self._facts.name}")

    async def _renewing(self) -> None:
        told = False
        while True:
            try:
                self._touch()
                told = False
            except OSError as error:
                if not told:
                    log.warning("%s: the lease of its process cannot be renewed: %s", self._facts.name, error)
                told = True
            await asyncio.sleep(min(TOUCH_S, self._lease_s / 6))

    def _touch(self) -> None:
        lease = path_of(self._prefix, "lease")
        lease.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lease.touch(mode=0o600)

    # What may take a moment: called in threads

    def _alone(self, work: Callable[[T], R], about: T) -> R:
        with self._turn:
            return work(about)

    def _launch(self, run: str) -> None:
        try:
            self._touch()
            until = time.monotonic() + supervisor.LOCK_S
            while (held := supervisor.lock(self._prefix)) is None:
                record = read_record(self._prefix)
                if record is not None and record.run == run and _runs(record):
                    return
                if time.monotonic() > until:
                    of = f"run {record.run} of it" if record is not None else "another run of it"
                    raise ProviderError(f"{of} is still there: it has to be stopped first")
                time.sleep(LOOK_S)
            try:
                _kill_all(self._prefix)  # first: it may have the port
                host, port = address(self._facts.url)
                if problem := why_not(host, port):
                    raise ProviderError(problem)
            finally:
                os.close(held)
            if not self._spawn(self._order(run)):
                self._launch(run)  # another start was faster: of this run, or one that is in the way
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise ProviderError(f"{where}{(error.strerror or str(error)).lower()}") from None

    def _spawn(self, order: Order) -> bool:
        """Whether it was launched; else there is one already."""
        process = subprocess.Popen(  # noqa: S603 - our own
            # Isolated: nothing of our own environment is to change what it imports.
            [sys.executable, "-I", "-S", supervisor.__file__, str(self._prefix)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={name: value for name, value in os.environ.items() if name != supervisor.MARK},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        with process, process.stdout as said:
            with process.stdin as told:
                told.write(json.dumps(_fields(order)).encode())
            answer = _line(said, LAUNCH_S)
            if answer is None:
                raise ProviderError("its supervisor did not start")
            if "failed" in answer:
                raise ProviderError(answer["failed"])
            if "locked" in answer:
                return False
            if (ended := _line(said, EARLY_S)) is not None:
                name = os.path.basename(order.command[0])
                raise ProviderError(f"`{name}` {_how(ended['ended'])} at once{self._last_lines()}")
        return True

    def _order(self, run: str) -> Order:
        command, environment = command_of(self._section, self._facts)
        return Order(
            run,
            command,
            {**os.environ, **environment, "TIDEGATE_STANDBY": self._facts.name, "TIDEGATE_RUN": run},
            str(_directory(self._section, self._facts)),
            self._section.grace,
            self._lease_s,
        )

    def _end(self, told: tuple[int, int] | None) -> tuple[int, int] | None:
        """End what is left, or have it ended; the supervisor that was told so. None: nothing is left."""
        try:
            if not path_of(self._prefix, "lock").exists():
                return None
            held = supervisor.lock(self._prefix)
            record = read_record(self._prefix)
            if held is None:
                found = record.supervisor if record is not None else (0, 0)
                if found != told and found[0]:
                    _signal(found)
                return found
            try:
                _kill_all(self._prefix)
                if record is not None and record.state != "ended":
                    record.state, record.reason = "ended", "its supervisor was killed"
                    supervisor.write_record(self._prefix, record)
            finally:
                os.close(held)
        except OSError as error:
            raise ProviderError(f"{error.filename}: {(error.strerror or '').lower()}") from None
        return None

    def _status(self) -> Status:
        locked = is_locked(self._prefix)
        record = read_record(self._prefix)
        if locked:
            if record is None or record.state == "ended":
                return Status(Presence.UNKNOWN, detail="it begins or ends just now")
            if not _is_there(record.supervisor):
                detail = "its supervisor was killed, and what it kept is being ended"
                return Status(Presence.UNKNOWN, record.run, detail=detail)
            if not record.command[0]:
                return Status(Presence.STARTING, record.run)
            stopping = record.state == "stopping"
            return Status(Presence.RUNNING, record.run, detail="it is being stopped" if stopping else "")
        if (record is None or record.state != "ended") and (left := left_of(self._prefix)):
            detail = f"processes of it are left that nobody keeps, {left[0]} among them: a stop ends them"
            return Status(Presence.UNKNOWN, detail=detail)
        return Status(Presence.ABSENT, detail=self._death(record))

    def _death(self, record: Record | None) -> str:
        """Why what ran does not; empty: as it should be."""
        if record is None or record.reason == supervisor.ASKED:
            return ""
        at = datetime.fromtimestamp(record.wall).astimezone().isoformat(" ", "seconds")
        if record.reason:
            return f"ended {at}: {record.reason}"
        if record.code is None:
            return f"its supervisor was killed, some time after {at}{self._last_lines()}"
        return f"{_how(record.code)}, {at}{self._last_lines()}"

    def _last_lines(self) -> str:
        try:
            with path_of(self._prefix, "log").open("rb") as file:
                file.seek(max(file.seek(0, os.SEEK_END) - 8192, 0))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        said = text.rpartition("\n--- ")[2] if text.startswith("--- ") or "\n--- " in text else text
        lines = [line for line in masked_output(said, self._secrets).splitlines()[1:] if line.strip()]
        return ":\n" + "\n".join(lines[-LAST_LINES:]) if lines else ""


def command_of(section: ProcessSection, facts: Facts) -> tuple[list[str], dict[str, str]]:
    """What is launched, and the variables it gets besides our own."""
    host, port = address(facts.url)
    values = {"host": host, "port": str(port)}

    def filled(text: str) -> str:
        return _PLACEHOLDER.sub(lambda match: values[match[1]], text)

    environment = {name: filled(value) for name, value in section.environment.items()}
    if section.command is not None:
        return [filled(argument) for argument in section.command], environment
    recipe = section.vllm
    assert recipe is not None
    if facts.key is not None:
        environment["VLLM_API_KEY"] = facts.key
    # A vLLM that is not told how long its streams may take to end abandons them, and their connections hang.
    drain = max(int(section.grace * 0.8), 1)
    command = [recipe.executable, "serve", recipe.model, "--host", host, "--port", str(port)]
    command += ["--served-model-name", *facts.models, "--shutdown-timeout", str(drain)]
    return command + [filled(argument) for argument in recipe.arguments], environment


def address(url: str) -> tuple[str, int]:
    """Host and port of a backend's URL."""
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


# What cannot work


def _wrong(section: ProcessSection, facts: Facts) -> Iterator[BadValueError]:
    if sys.platform != "linux":
        yield BadValueError("processes are kept on Linux only: use `command` or `webhook`")
        return
    if facts.url.startswith("unix:"):
        yield BadValueError(
            f"'{facts.name}' is launched with a host and a port: give its url one, as in http://127.0.0.1:8001"
        )
        return
    host, _ = address(facts.url)
    if _is_address(host) and (problem := why_not(host, 0)):
        yield BadValueError(f"{problem}, where its url says that it answers")
    directory = section.directory
    if directory is not None and not directory.is_dir():
        yield BadValueError(f"there is no directory {directory}", at=("directory",))
    where, executable = ("command", 0), ""
    texts: list[tuple[tuple[str | int, ...], str]] = []
    if section.command is not None:
        executable = section.command[0]
        texts += [(("command", number), text) for number, text in enumerate(section.command)]
    elif section.vllm is not None:
        executable = section.vllm.executable
        yield from _wrong_recipe(section.vllm, _directory(section, facts))
        texts += [(("vllm", "arguments", number), text) for number, text in enumerate(section.vllm.arguments)]
    if problem := _not_runnable(executable, section, facts):
        yield BadValueError(problem, at=where if section.vllm is None else ("vllm", "executable"))
    texts += [(("environment", name), text) for name, text in section.environment.items()]
    for at, text in texts:
        for name in _PLACEHOLDER.findall(text):
            if name not in PLACEHOLDERS:
                meant = closest(name, PLACEHOLDERS)
                suggestion = f"{{{meant}}}" if meant else None
                message = f"no placeholder is called {{{name}}}: there are {{host}} and {{port}}"
                yield BadValueError(message, suggestion, at=at)


def _wrong_recipe(recipe: VllmRecipe, directory: Path) -> Iterator[BadValueError]:
    for number, argument in enumerate(recipe.arguments):
        name = argument.partition("=")[0]
        if name in OURS:
            yield BadValueError(
                f"{name} is set by the recipe: {OURS[name]}", at=("vllm", "arguments", number)
            )
    model = directory / recipe.model
    if recipe.model.startswith(("/", "./", "../")) and not model.is_dir():
        yield BadValueError(f"there is no model folder {model}", at=("vllm", "model"))
    elif model.is_dir() and not any(model.glob("*.json")):
        yield BadValueError(f"{model} is no model folder: it has no config.json", at=("vllm", "model"))


def _not_runnable(executable: str, section: ProcessSection, facts: Facts) -> str:
    """Why it cannot be run; empty: it can."""
    if "/" in executable:
        file = _directory(section, facts) / executable
        if file.is_dir():
            return f"{file} is a directory"
        if not file.exists():
            return f"there is no file {file}"
        return "" if os.access(file, os.X_OK) else f"{file} is not executable: chmod +x {file}"
    path = section.environment.get("PATH", os.environ.get("PATH"))
    if shutil.which(executable, path=path) is None:
        return f"no command '{executable}' is found on PATH: give its whole path"
    return ""


def _is_address(host: str) -> bool:
    """Whether nobody has to be asked for what it stands for."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return True


def _directory(section: ProcessSection, facts: Facts) -> Path:
    """Where it runs."""
    return section.directory if section.directory is not None else facts.directory.absolute().parent


# Processes


def _fields(order: Order) -> dict[str, Any]:
    return {name: getattr(order, name) for name in order.__slots__}


def _line(pipe: Any, timeout_s: float) -> dict[str, Any] | None:
    """The next line of a supervisor; None: there is none, or none in time."""
    until, data = time.monotonic() + timeout_s, b""
    while not data.endswith(b"\n"):
        ready, _, _ = select.select([pipe], [], [], max(until - time.monotonic(), 0.0))
        if not ready or not (piece := os.read(pipe.fileno(), 1)):
            return None
        data += piece
    answer: dict[str, Any] = json.loads(data)
    return answer


def _how(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _is_there(process: tuple[int, int]) -> bool:
    return supervisor.identity(process[0]) == process


def _runs(record: Record) -> bool:
    """Whether it was launched, and nobody ends it."""
    return record.state == "running" and record.command[0] > 0 and _is_there(record.supervisor)


def _signal(process: tuple[int, int]) -> None:
    """SIGTERM, if it is still the process that it was."""
    try:
        handle = os.pidfd_open(process[0])
    except ProcessLookupError:
        return
    try:
        if _is_there(process):
            signal.pidfd_send_signal(handle, signal.SIGTERM)
    except ProcessLookupError:
        pass
    finally:
        os.close(handle)


def _kill_all(prefix: Path) -> None:
    """End what carries the mark of a standby; its lock is held."""
    until = time.monotonic() + KILL_S
    while left := left_of(prefix):
        if time.monotonic() > until:
            raise ProviderError(f"process {left[0]} of it does not end, though killed: see what it waits for")
        supervisor.kill(left)
        time.sleep(LOOK_S)
