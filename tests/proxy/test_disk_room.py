from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from proxy import disk_room
from proxy.database import OpenError
from proxy.disk_room import MIB, told_if_full

CONFIG = """\
listen: 127.0.0.1:0
admin: 127.0.0.1:0
log: "off"
probing: {enabled: false}
backends: [{name: a, url: "http://127.0.0.1:9", models: [m]}]
state: disk/state
"""
ON_SMALL_DISK = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size="$0" tmpfs disk && eval "$1"')
TIDEGATE = f"{sys.executable} -m proxy.cli"


@pytest.mark.parametrize(
    ("size", "before", "free"),
    [("14m", "", 13), ("14m", "mkdir -m 700 disk/state; head -c 20m /dev/zero > disk/x 2>&-;", 0)],
    ids=["new", "full"],
)
@pytest.mark.parametrize("command", ["serve", "keys create --tenant acme"])
def test_a_disk_that_is_full_is_called_so(
    command: str, size: str, before: str, free: int, tmp_path: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("NOT RUN: no mount namespace can be made; run it as root")
    (tmp_path / "disk").mkdir()
    (tmp_path / "tidegate.yaml").write_text(CONFIG)
    ended = subprocess.run(
        (*ON_SMALL_DISK, size, f"{before} exec {TIDEGATE} {command}"),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if free and command != "serve":
        assert ended.returncode == 0, "there is room for a key"
        return
    last = ended.stderr.splitlines()[-1]
    assert last == f"tidegate: {tmp_path}/disk/state is on a full disk: {free} MiB free, 24 MiB needed"
    assert ended.returncode == 2


def full(code: int) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize(
    ("error", "free", "is_full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 24 * MIB - 1, True),
        (OSError(errno.ENOSPC, "No space left on device"), 24 * MIB, False),
        (OSError(errno.EACCES, "Permission denied"), 0, False),
        (full(sqlite3.SQLITE_FULL), 20 * MIB, True),
        (full(sqlite3.SQLITE_IOERR_WRITE), MIB - 1, True),
        (full(sqlite3.SQLITE_IOERR_WRITE), MIB, False),
        (full(sqlite3.SQLITE_CORRUPT), 0, False),
    ],
)
def test_what_has_another_reason_keeps_it(
    error: Exception, free: int, is_full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_room, "_free", lambda _: free)

    def fails(wrapped: bool) -> None:
        with told_if_full(tmp_path):
            if wrapped:
                raise OpenError("database: it failed") from error
            raise error

    for wrapped in (False, True):
        with pytest.raises((OpenError, type(error))) as caught:
            fails(wrapped)
        told = f"{tmp_path} is on a full disk: {free // MIB} MiB free, 24 MiB needed"
        assert (str(caught.value) == told) == is_full
