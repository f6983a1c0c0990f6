"""The provider `command`: a script that starts and stops a standby.

It is called with one more argument, `prepare`, `start`, `stop` or `status`, and finds in its environment
`TIDEGATE_STANDBY` (name), `TIDEGATE_RUN` (the same over all calls of one run; empty for `status`), `TIDEGATE_URL`
(where the engine is to answer) and what is to run there: `TIDEGATE_IMAGE`, `TIDEGATE_ARGUMENTS` and
`TIDEGATE_ENVIRONMENT`, empty where that is not known. Exit 0 is done; anything else is an error, and the last lines
of its standard error say why. What it leaves running goes on, but should write to a file of its own: nobody reads
what it says after the script's end.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import inf
from typing import Final

from policies.units import BadValueError
from proxy.masking import masked_output, secret_values
from proxy.scaling.facts import Facts
from proxy.scaling.images import Launch
from proxy.scaling.provider import STATUS_WITHIN_S, Presence, ProviderError, Status
from proxy.scaling.sections import StandbySection
from proxy.scaling.statusbody import read_status

MOST_OUTPUT_BYTES: Final = 1 << 20
"""Of standard output, and of standard error: more than that is an error."""
LAST_LINES: Final = 5
"""Of standard error, in an error message."""
_PIECE: Final = 64 * 1024


class CommandProvider:
    """Starts and stops one standby by a script."""

    def __init__(self, section: StandbySection, facts: Facts) -> None:
        if section.command is None:
            raise ValueError("not a standby with a command")
        self._standby = section
        self._section = section.command
        self._facts = facts

    @staticmethod
    def check(section: StandbySection, facts: Facts) -> Iterator[BadValueError]:
        """What cannot work: the script is not there, or cannot be run."""
        if section.command is not None and shutil.which(executable := section.command.command[0]) is None:
            there = os.path.exists(executable)
            why = "may not be executed (chmod +x)" if there else "is not there, or not in PATH"
            yield BadValueError(f"{executable} {why}", at=("command", "command"))

    async def prepare(self, run: str) -> None:
        """Raises ProviderError."""
        await self._call("prepare", run, self._standby.prepare_timeout)

    async def start(self, run: str) -> None:
        """Raises ProviderError."""
        await self._call("start", run, self._standby.start_timeout)

    async def stop(self, run: str) -> None:
        """Raises ProviderError."""
        await self._call("stop", run, self._standby.stop_timeout)

    async def status(self) -> Status:
        """What the script says. `UNKNOWN`: it could not be asked."""
        try:
            return read_status(await self._call("status", "", STATUS_WITHIN_S)).status()
        except ProviderError as error:
            return Status(Presence.UNKNOWN, detail=str(error))

    async def close(self) -> None:
        """There is nothing to close."""

    async def _call(self, operation: str, run: str, most_s: float) -> str:
        """What it wrote to standard output."""
        section = self._section
        within_s = min(section.timeout or inf, most_s)
        environment = {
            **os.environ,
            **section.environment,
            "TIDEGATE_STANDBY": self._facts.name,
            "TIDEGATE_RUN": run,
            "TIDEGATE_URL": self._facts.url,
            **_told(self._facts.launch() or Launch()),
        }
        shown = f"`{os.path.basename(section.command[0])} {operation}`"
        output, errors = _Pipe(), _Pipe()
        try:
            try:
                process = await asyncio.create_subprocess_exec(
                    *section.command,
                    operation,
                    env=environment,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output.inlet,
                    stderr=errors.inlet,
                    start_new_session=True,
                )
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                raise ProviderError(f"{section.command[0]} cannot be run: {reason.lower()}") from None
            problem = await self._watched(process, within_s, output, errors)
        finally:
            output.close()
            errors.close()
        if problem or process.returncode:
            code = process.returncode or 0
            how = problem or (f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}")
            raise ProviderError(f"{shown} {how}{_last_lines(errors.text(), environment)}")
        return output.text()

    async def _watched(self, process: asyncio.subprocess.Process, within_s: float, *pipes: _Pipe) -> str:
        """Wait for its end. Why it was ended; empty: it was not."""
        for pipe in pipes:
            pipe.read(partial(_end, process.pid))
        try:
            async with asyncio.timeout(within_s):
                await process.wait()
        except TimeoutError:
            return f"took longer than {within_s:g} s and was ended"
        finally:
            if process.returncode is None:
                _end(process.pid)
                # Not cancelled once more: after SIGKILL it takes no time.
                await asyncio.shield(process.wait())
        for pipe in pipes:
            pipe.drain()
        return "wrote too much and was ended" if any(pipe.full for pipe in pipes) else ""


def _told(launch: Launch) -> dict[str, str]:
    """What is to run, for a shell: lists are quoted for `eval`."""
    return {
        "TIDEGATE_IMAGE": launch.image,
        "TIDEGATE_ARGUMENTS": shlex.join((*launch.command, *launch.arguments)),
        "TIDEGATE_ENVIRONMENT": shlex.join(f"{name}={value}" for name, value in launch.environment.items()),
    }


def _end(group: int) -> None:
    """Kill a script and all that it started."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass


class _Pipe:
    """One of a child's outputs. Its end is the end of the child, also if a grandchild keeps it open."""

    def __init__(self) -> None:
        self._outlet, self.inlet = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._outlet, False)
        self._data = bytearray()
        self._on_full: Callable[[], None] | None = None
        self._open = True
        self.full = False

    def read(self, on_full: Callable[[], None]) -> None:
        """From now on, in the loop. `on_full`: what to do when there is too much."""
        os.close(self.inlet)
        self.inlet = -1
        self._on_full = on_full
        asyncio.get_running_loop().add_reader(self._outlet, self._some)

    def drain(self) -> None:
        """Take what is in it now."""
        while self._open and not self.full and self._some():
            pass

    def _some(self) -> bool:
        """Whether there was some."""
        try:
            piece = os.read(self._outlet, _PIECE)
        except BlockingIOError:
            return False
        if not piece:
            self._stop()
            return False
        self._data += piece
        if len(self._data) > MOST_OUTPUT_BYTES:
            self.full = True
            self._stop()
            if self._on_full is not None:
                self._on_full()
        return True

    def _stop(self) -> None:
        if self._open and self._on_full is not None:
            asyncio.get_running_loop().remove_reader(self._outlet)
        self._open = False

    def text(self) -> str:
        return self._data.decode("utf-8", "replace")

    def close(self) -> None:
        self._stop()
        for handle in (self._outlet, self.inlet):
            if handle >= 0:
                os.close(handle)


def _last_lines(text: str, environment: Mapping[str, str]) -> str:
    lines = [line for line in text.splitlines() if line.strip()][-LAST_LINES:]
    if not lines:
        return ""
    shown = masked_output("\n".join(lines), secret_values(environment))
    return (
        ": " + "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in shown)[:2000]
    )
