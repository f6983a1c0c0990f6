"""Commands fail in one line that says which file, and why."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from sim.command_errors import error_text, fail


def test_a_file_is_named_without_the_number_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        (tmp_path / "x").read_text()
    assert error_text(missing.value) == f"{tmp_path}/x: no such file or directory"
    (tmp_path / "x").write_bytes(b"\xff")
    with pytest.raises(UnicodeDecodeError) as binary:
        (tmp_path / "x").read_text(encoding="utf-8")
    assert error_text(binary.value) == "the file is not UTF-8 text"
    assert error_text(FileNotFoundError("no profile is named 'y'")) == "no profile is named 'y'"


def test_the_end_has_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended:
        fail("it rains", 3)
    assert ended.value.exit_code == 3
    assert capsys.readouterr().err == "tidegate: it rains\n"
