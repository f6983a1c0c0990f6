"""One at a time, and whoever ends lets go."""

from __future__ import annotations

from pathlib import Path

from proxy.scaling.filelock import FileLock


def test_one_at_a_time(tmp_path: Path) -> None:
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert first.taken()
    assert first.taken()
    assert not second.taken()
    first.release()
    assert second.taken()
    assert not first.taken()
    second.release()
    second.release()
