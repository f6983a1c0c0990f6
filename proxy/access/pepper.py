"""The pepper: the key of the hash that API keys are stored under, kept apart from the database."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path
from stat import S_IMODE

PEPPER_FILE = "pepper"
PEPPER_BYTES = 32


class PepperError(RuntimeError):
    """The pepper cannot be used: readable by others, of another length, or of another database."""


def load_pepper(directory: Path) -> bytes:
    """The 32 bytes of the file `pepper` in the state directory, made on first use.

    It appears whole or not at all, and processes that start together agree on one. Raises PepperError when
    the file can be read by others than its owner or has another length, OSError when it cannot be read or
    made.
    """
    path = directory / PEPPER_FILE
    if not path.exists():
        _make_pepper(path)
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        pepper = file.read(PEPPER_BYTES + 1)
    if status.st_mode & 0o077:
        mode = S_IMODE(status.st_mode)
        raise PepperError(f"{path} has mode {mode:04o}, which lets others read it: chmod 600 {path}")
    if len(pepper) != PEPPER_BYTES:
        raise PepperError(f"{path} must hold exactly {PEPPER_BYTES} bytes: restore it from a backup")
    return pepper


def _make_pepper(path: Path) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{PEPPER_FILE}-", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(PEPPER_BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # unlike rename, never replaces: the first one wins
        except FileExistsError:
            pass
    finally:
        os.unlink(temporary)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
