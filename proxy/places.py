"""Where a configuration has the proxy write: what is wrong with these places before anything is opened.

`check` and `serve` ask here alike. Nothing is connected to and nothing made, and whether the user may write there
is left to opening: `check` is often typed by another one.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from policies.units import BadValueError
from proxy.config import Config

DIRECTORY: Final = "directory"
FILE: Final = "file"
MISSING: Final = "missing"


def unusable_places(config: Config, before: Config | None = None) -> Iterator[BadValueError]:
    """What is wrong, with the key in the configuration. What is as it was `before` is in use, and not looked at."""
    if before is None or config.database != before.database:
        yield from _database(config.database)
    if before is None or config.state != before.state:
        yield from _state(config.state)
    if before is None or config.log != before.log:
        yield from _log(config.log)


def _database(url: str | None) -> Iterator[BadValueError]:
    if url is None:
        return
    # Imported here: without a URL nobody needs to know of databases.
    from proxy.database import OpenError, check_target

    try:
        check_target(url)
    except OpenError as error:
        yield BadValueError(str(error).removeprefix("database").lstrip(": "), at=("database",))


def _state(directory: Path) -> Iterator[BadValueError]:
    if _kind(directory) == FILE:
        yield BadValueError(f"{directory} is no directory", at=("state",))


def _log(where: str) -> Iterator[BadValueError]:
    if where in ("-", "off"):
        return
    folder = Path(where).parent
    if _kind(Path(where)) == DIRECTORY:
        yield BadValueError(f"{where} is a directory: name a file in it, `-` or `off`", at=("log",))
    elif _kind(folder) == MISSING:
        yield BadValueError(f"there is no directory {folder}: make it, or name another file", at=("log",))
    elif _kind(folder) == FILE:
        yield BadValueError(f"{folder} is no directory", at=("log",))


def _kind(path: Path) -> str:
    """Empty: this user cannot see it."""
    try:
        return DIRECTORY if stat.S_ISDIR(path.stat().st_mode) else FILE
    except (FileNotFoundError, NotADirectoryError):
        return MISSING
    except OSError:
        return ""
