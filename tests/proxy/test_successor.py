"""Starting the process that takes over, and hearing of one that cannot."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from proxy.successor import KEPT_BYTES, Successor, own_stderr, successor_command


def run(program: str, capfd: pytest.CaptureFixture[str]) -> tuple[Successor, str]:
    """-> the ended process, and what came on our standard error."""
    successor = Successor([sys.executable, "-c", program])
    silent = threading.Event()
    successor.watch(silent.set)
    assert silent.wait(30)
    return successor, capfd.readouterr().err


def test_the_last_words_are_passed_on_and_kept(capfd: pytest.CaptureFixture[str]) -> None:
    successor, passed_on = run("import sys; sys.exit('no such file')", capfd)
    assert successor.said == passed_on.strip() == "no such file"
    assert successor.how_it_ended() == "ended with status 1"


def test_of_many_words_the_end_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    successor, passed_on = run("import sys; sys.exit('x' * 100_000 + 'end')", capfd)
    assert len(passed_on) == 100_004
    assert len(successor.said) < KEPT_BYTES
    assert successor.said.endswith("xxend")


def test_a_killed_one_says_by_what(capfd: pytest.CaptureFixture[str]) -> None:
    successor, _ = run("import os; os.kill(os.getpid(), 9)", capfd)
    assert successor.how_it_ended() == "was killed by signal 9"


def test_who_has_taken_over_speaks_for_itself(capfd: pytest.CaptureFixture[str]) -> None:
    program = (
        "import sys; from proxy.successor import own_stderr; print('before', file=sys.stderr); own_stderr();"
        "print('after', file=sys.stderr, flush=True); sys.stdin.read()"
    )
    successor, passed_on = run(program, capfd)
    assert successor.said == "before"
    assert "after" in passed_on
    successor.kill()


def test_a_process_that_nobody_upgrades_to_keeps_its_standard_error(
    capfd: pytest.CaptureFixture[str],
) -> None:
    own_stderr()
    print("here", file=sys.stderr)
    assert capfd.readouterr().err == "here\n"


def test_a_script_is_started_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "tidegate"
    script.touch(0o755)
    monkeypatch.setattr(sys, "argv", [str(script), "serve", "--take-over", "-c", "x.yaml"])
    assert successor_command() == [str(script), "serve", "-c", "x.yaml", "--take-over"]


def test_a_module_is_started_by_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "cli.py"
    module.touch(0o644)
    monkeypatch.setattr(sys, "argv", [str(module), "serve", "-c", "x.yaml"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "-m", "proxy.cli", "serve", "-c", "x.yaml"])
    expected = ["python", "-X", "dev", "-m", "proxy.cli", "serve", "-c", "x.yaml", "--take-over"]
    assert successor_command() == expected
