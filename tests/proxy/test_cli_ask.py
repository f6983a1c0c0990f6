from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from proxy.cli import app


def tidegate(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_explain_names_what_cannot_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = tidegate("explain", "x", "--state", "elsewhere")
    assert (found.exit_code, found.stdout) == (1, "")
    assert found.stderr == "tidegate: no proxy is running on elsewhere: it would have left ports.json there\n"
    found = tidegate("explain", "x", "--admin", "18481")
    assert found.exit_code == 1
    assert "did you mean 127.0.0.1:18481?" in found.stderr
    (tmp_path / "tidegate.yaml").write_text("backends: [{name: a, url: 'http://a'}]\nadmin: 127.0.0.1:0\n")
    found = tidegate("explain", "x")
    assert f"no proxy is running on {tmp_path / 'tidegate-data'}" in found.stderr
