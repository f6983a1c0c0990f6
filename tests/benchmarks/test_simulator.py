from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import simulator


def test_what_was_played_is_read() -> None:
    assert simulator.played([sys.executable, "-c", 'print(\'[{"name": "engine"}]\')']) == [{"name": "engine"}]


def test_why_the_playing_failed_is_shown(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho no such trace >&2\nexit 3\n")
    failing.chmod(0o755)
    monkeypatch.setattr(simulator, "DATA", tmp_path)
    monkeypatch.setattr(sys, "executable", str(failing))
    monkeypatch.setattr(sys, "argv", ["simulator", "--pure", "--no-result"])
    assert simulator.main() == 2
    assert capfd.readouterr().err == "no such trace\nthe process that plays failed with 3\n"
