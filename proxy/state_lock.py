"""Which processes may use a state directory, and which of its journals each writes.

One process serves: it holds the lock of the file `lock`. The lock belongs to the open file, not to the process, so
it is handed over with the listening sockets, and is never free in between.

A process that has handed over still writes the ends of what runs, into the journal it has: one folder, one writer.
The next one therefore writes another: `journal` itself, or `journal/2`, `journal/3`, ..., the first that nobody has
locked. What lies in a folder that nobody has locked was left by a process that is gone.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

from proxy.journal import Journal, JournalLockedError
from proxy.ledger import Ledger

log = logging.getLogger("tidegate")

LOCK_FILE = "lock"
LOOK_S = 1.0
"""How often a journal is looked at that another process still writes."""
LONGEST_LOOK_S = 60.0
"""And one that could not be taken over, at last."""


def lock_state(state: Path) -> int:
    """Lock a state directory and return the open file that holds the lock. Raises JournalLockedError, OSError."""
    handle = os.open(state / LOCK_FILE, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise JournalLockedError(
            f"{state} is in use by another tidegate; give this one a state directory of its own, "
            "or replace that one with `tidegate upgrade`"
        ) from None
    except OSError:
        os.close(handle)
        raise
    return handle


def open_journal(state: Path) -> Journal:
    """The first journal of a state directory that nobody writes. All have the same instance id."""
    first = state / "journal"
    for number in count(1):
        try:
            journal = Journal(first if number == 1 else first / str(number))
        except JournalLockedError:
            continue
        journal.instance = _instance(first) or journal.instance
        return journal
    raise AssertionError("unreachable")


def other_journals(state: Path, own: Journal) -> list[Path]:
    """Folders of the journals of a state directory, but for our own."""
    first = state / "journal"
    folders = [first, *sorted(path for path in first.iterdir() if path.name.isdigit() and path.is_dir())]
    return [path for path in folders if path != own.directory]


async def adopt_when_left(
    ledger: Ledger, folders: Sequence[Path], then: Sequence[Callable[[], None]] = ()
) -> None:
    """Take what their writers leave in these journals, as soon as they have ended: nothing if they ended well.

    What cannot be taken now (the database is away, a journal is damaged) is tried again and again. `then`: what to
    do when all writers have ended.
    """
    waiting = dict.fromkeys(folders, "")
    """What was said of each that its writer has left."""
    steps, pause_s = list(then), LOOK_S
    while waiting:
        await asyncio.sleep(pause_s)
        for folder in list(waiting):
            try:
                left = await asyncio.to_thread(ledger.adopt, folder)
            except Exception as error:
                if not waiting[folder]:
                    log.exception("%s cannot be taken over now, it is tried again", folder)
                waiting[folder] = repr(error)
                continue
            if left is not None:
                del waiting[folder]
        if all(waiting.values()):  # nobody writes there any more
            while steps:
                steps.pop(0)()
            pause_s = min(2 * pause_s, LONGEST_LOOK_S)


def _instance(first: Path) -> str:
    return (first / "lock").read_text(encoding="ascii", errors="replace").strip()
