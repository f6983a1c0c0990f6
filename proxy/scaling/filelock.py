"""A lock that a process has until it ends, whichever way."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class FileLock:
    """Of one file, which is made if it is not there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle = -1

    def taken(self) -> bool:
        """Take it. False: another has it. Raises OSError."""
        if self._handle >= 0:
            return True
        handle = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return False
        except OSError:
            os.close(handle)
            raise
        self._handle = handle
        return True

    def release(self) -> None:
        """Let another have it."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
