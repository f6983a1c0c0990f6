"""The new process of an upgrade, as the old one starts it.

It gets the old one's environment, folder and user, so what a service manager set holds for it too. What it says
until it has taken over comes to the old process, which passes it on and keeps the end of it: should it not get that
far, those are the words that say why.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable

STDERR_VARIABLE = "TIDEGATE_STDERR"
"""The descriptor of the old process's standard error, for the new one to go on with."""
KEPT_BYTES = 4000
END_S = 1.0
"""How long a process may take to end after its last word."""
TAKE_OVER = "--take-over"


def successor_command() -> list[str]:
    """The command line of this process, for one that takes over from it.

    A script is started by its path, so that a new version that was installed there runs, whatever this process is.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != TAKE_OVER]
    script = sys.argv[0]
    if os.sep in script and os.access(script, os.X_OK):
        return [script, *arguments, TAKE_OVER]
    return [*sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1], *arguments, TAKE_OVER]


def own_stderr() -> None:
    """In the new process: from now on, speak for yourself."""
    handle = int(os.environ.pop(STDERR_VARIABLE, "-1"))
    if handle >= 0:
        sys.stderr.flush()
        os.dup2(handle, 2)
        os.close(handle)


class Successor:
    """A started process."""

    def __init__(self, command: list[str]) -> None:
        """Raises OSError."""
        self._tail = bytearray()
        stderr = os.dup(2)
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own command line
                command,
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[stderr],
                env={**os.environ, STDERR_VARIABLE: str(stderr)},
            )
        finally:
            os.close(stderr)
        self.pid = self._process.pid

    @property
    def said(self) -> str:
        """The end of what it has said."""
        return self._tail.decode(errors="replace").strip()

    def watch(self, silent: Callable[[], object]) -> None:
        """Pass on what it says; `silent` is called, in a thread, when it has taken over or ended."""
        threading.Thread(target=self._pass_on, args=(silent,), name="successor", daemon=True).start()

    def _pass_on(self, silent: Callable[[], object]) -> None:
        pipe = self._process.stderr
        assert pipe is not None
        with pipe:
            while data := os.read(pipe.fileno(), 65536):
                self._tail += data
                del self._tail[:-KEPT_BYTES]
                try:
                    os.write(2, data)
                except OSError:
                    pass  # nobody reads ours; it is kept for whoever asked
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            pass  # it lives, and speaks for itself
        try:
            silent()
        except RuntimeError:
            pass  # the loop is closed: this process has ended first

    def kill(self) -> None:
        """End it, if it has not ended."""
        self._process.kill()
        self._process.wait()

    def how_it_ended(self) -> str:
        """`ended with status 2`, `was killed by signal 9`."""
        status = self._process.poll()
        if status is None:
            return "fell silent"
        return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
