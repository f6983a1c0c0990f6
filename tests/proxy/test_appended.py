"""Lines that another process appends."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.appended import AppendedFile


@pytest.mark.parametrize("at_end", [False, True])
def test_each_whole_line_comes_once(tmp_path: Path, at_end: bool) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"old\n")
    lines = AppendedFile(path, at_end=at_end)
    assert lines.news() == ([] if at_end else [b"old"])
    assert lines.news() == []
    with path.open("ab", buffering=0) as file:
        file.write(b"a\nhal")
        assert lines.news() == [b"a"]
        file.write(b"f\n\nb\n")
        assert lines.news() == [b"half", b"b"]


def test_a_file_that_is_written_anew_comes_again(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    lines = AppendedFile(path)
    assert lines.news() == []
    path.write_bytes(b"a\nb\n")
    assert lines.news() == [b"a", b"b"]
    (tmp_path / "new").write_bytes(b"b\n")
    (tmp_path / "new").replace(path)
    assert lines.news() == [b"b"]
