"""The supervisor's parts that need no process: its lease, its log, its record. The rest is in `test_process.py`."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from proxy.scaling import supervisor as module
from proxy.scaling.supervisor import Log, Order, Record, Supervisor, is_locked, lock, path_of, read_record

ORDER = Order("r", ["true"], {}, "/", grace_s=30.0)


class Clock:
    """Moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


class Leased:
    """A supervisor that looks once a second whether somebody has touched its lease."""

    def __init__(self, folder: Path, clock: Clock, order: Order = ORDER) -> None:
        self.clock = clock
        self.supervisor = Supervisor(folder / "a", order, told=-1)
        self._lease = path_of(folder / "a", "lease")
        self._touched = 0

    def touch(self) -> None:
        self._lease.touch()
        self._touched += 1
        os.utime(self._lease, ns=(self._touched, self._touched))

    def looks(self, seconds: int, step: float = 1.0) -> bool:
        """Whether the command may go on after so many looks."""
        for _ in range(seconds):
            self.clock.now += step
            self.supervisor._watch_lease()
        return not self.supervisor._reason


@pytest.fixture
def leased(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Leased:
    return Leased(tmp_path, Clock(monkeypatch))


def test_a_lease_that_is_renewed_holds_for_ever(leased: Leased) -> None:
    for _ in range(100):
        leased.touch()
        assert leased.looks(30)


def test_a_lease_that_is_not_renewed_ends_after_its_time(leased: Leased) -> None:
    leased.touch()
    assert leased.looks(31)  # the first look saw it change
    assert not leased.looks(1)


def test_a_lease_that_is_gone_is_not_renewed(leased: Leased) -> None:
    assert not leased.looks(31)


def test_neither_a_frozen_machine_nor_a_set_clock_ends_a_lease(leased: Leased) -> None:
    leased.touch()
    assert leased.looks(1)
    assert leased.looks(10, step=3600.0)
    leased.touch()  # to any other time, an earlier one as well
    assert leased.looks(31)


def test_nobody_waits_long_for_what_nobody_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together with the lease it is gone within a minute."""
    leased = Leased(tmp_path, Clock(monkeypatch), Order("r", ["true"], {}, "/", grace_s=3600.0))
    assert not leased.looks(31)
    assert leased.supervisor._grace_s == module.LAST_GRACE_S
    assert module.LEASE_S + module.LAST_GRACE_S < 50


def test_a_log_is_bounded_and_keeps_the_newest(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    log = Log(path, most=100)
    for number in range(1000):
        log.write(f"line {number:04}\n".encode())
    kept = path_of(path, "1").read_bytes() + path.read_bytes()
    assert kept.endswith(b"line 0999\n")
    assert 100 <= len(kept) <= 200
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.log", "a.log.1"]
    assert Log(path, most=100)._size == path.stat().st_size
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_log_on_a_full_disk_loses_lines_and_nothing_else(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("NOT RUN: there is no /dev/full")
    (tmp_path / "a.log").symlink_to(full)
    log = Log(tmp_path / "a.log")
    log.write(b"lost")
    assert log._size == 0


def test_a_log_that_cannot_be_begun_anew_now_is_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.log"
    log = Log(path, most=10)
    log.write(b"0123456789")
    with monkeypatch.context() as patched:
        patched.setattr(module.os, "open", full)
        log.write(b"lost")
        log.write(b"lost too")
    os.fstat(log._file)  # still ours: a handle that was closed would soon be somebody else's
    log.write(b"kept")
    assert (path_of(path, "1").read_bytes(), path.read_bytes()) == (b"0123456789", b"kept")


def test_a_lock_is_of_one_and_looking_takes_nothing(tmp_path: Path) -> None:
    prefix = tmp_path / "a"
    assert not is_locked(prefix)
    held = lock(prefix)
    assert held is not None
    assert is_locked(prefix)
    assert lock(prefix) is None
    fcntl.flock(held, fcntl.LOCK_UN)
    os.close(held)
    assert not is_locked(prefix)


@pytest.mark.parametrize(
    "damaged", [b"", b"{", b"[]", b'{"run": 1}', b'{"supervisor": 1, "command": 2}', b"\xff"]
)
def test_a_damaged_record_is_none(tmp_path: Path, damaged: bytes) -> None:
    prefix = tmp_path / "a"
    module.write_record(prefix, Record("r", "running", (1, 2), (3, 4)))
    found = read_record(prefix)
    assert found is not None
    assert (found.supervisor, found.command) == ((1, 2), (3, 4))
    path_of(prefix, "json").write_bytes(damaged)
    assert read_record(prefix) is None


def test_it_imports_the_standard_library_alone() -> None:
    code = (
        f"import sys; sys.path.append({str(Path(module.__file__).parent)!r}); import supervisor; "
        "print(*{name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) == {"supervisor", "__main__"}
