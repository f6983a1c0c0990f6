"""A file of lines that two processes append to during an upgrade, each reading what the other writes."""

from __future__ import annotations

import os
from pathlib import Path


class AppendedFile:
    """What is new at the end of a file."""

    def __init__(self, path: Path, *, at_end: bool = False) -> None:
        """`at_end`: what is in it now is not new. Raises OSError."""
        self.path = path
        self._inode = self._offset = 0
        if at_end and path.exists():
            status = path.stat()
            self._inode, self._offset = status.st_ino, status.st_size

    def news(self) -> list[bytes]:
        """Whole lines that were appended since the last look, our own too; all, if the file was written anew.

        Raises OSError.
        """
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._inode:
                self._inode, self._offset = inode, 0
            file.seek(self._offset)
            data = file.read()
        whole = data.rfind(b"\n") + 1
        self._offset += whole
        return [line for line in data[:whole].split(b"\n") if line]
