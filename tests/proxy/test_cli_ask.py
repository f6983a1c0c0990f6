from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from typer.testing import CliRunner, Result

from proxy import cli_ask
from proxy.admin.http import state
from proxy.ask import AskError
from proxy.cli import app
from tests.proxy.fakes import World
from tests.proxy.test_ask import answering

STATE = orjson.dumps(state(World("a").runtime, 0.0))


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


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("bakends: []\n", "tidegate-data"),
        ("backends: [\n", "tidegate-data"),
        ("backends: [\nstate: 'my state' # ours\n", "my state"),
        ("state: elsewhere\nbackends: 7\n", "elsewhere"),
    ],
)
def test_a_broken_file_does_not_hide_the_proxy_that_runs_on(
    text: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tidegate.yaml").write_text(text)
    found = tidegate("status")
    assert found.exit_code == 2
    assert "tidegate.yaml cannot be used (--admin HOST:PORT needs no file):\n" in found.stderr
    (tmp_path / place).mkdir()
    with answering(200, STATE) as address:
        (tmp_path / place / "ports.json").write_text(orjson.dumps({"admin": address}).decode())
        found = tidegate("status")
    assert (found.exit_code, found.stderr) == (
        0,
        f"note: tidegate.yaml cannot be used as it is: this is the proxy that runs on {place}\n",
    )
    assert found.stdout.startswith(f"proxy at {address}: ready")


# Status


def test_status_asks_the_admin_port() -> None:
    with answering(200, STATE) as address:
        found = tidegate("status", "--admin", address)
    assert (found.exit_code, found.stderr) == (0, "")
    assert found.stdout.startswith(f"proxy at {address}: ready, running for ")
    with answering(200, STATE) as address:
        found = tidegate("status", "--admin", address, "--json")
    assert orjson.loads(found.stdout) == orjson.loads(STATE)


def test_what_is_no_terminal_gets_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    keys = orjson.loads(STATE) | {"keys": {"trouble": "connection refused, " * 10 + "at last"}}
    with answering(200, orjson.dumps(keys)) as address:
        found = tidegate("status", "--admin", address)
    assert any(line.startswith("! keys") and line.endswith("at last") for line in found.stdout.splitlines())


def test_a_watch_looks_again_until_it_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            raise KeyboardInterrupt

    answers = iter(
        [orjson.loads(STATE), orjson.loads(STATE), AskError("no proxy answers"), orjson.loads(STATE)]
    )

    def ask(address: str, path: str) -> Any:
        assert (address, path) == ("127.0.0.1:1", "/state")
        answer = next(answers)
        if isinstance(answer, AskError):
            raise answer
        return answer

    monkeypatch.setattr(cli_ask.time, "sleep", sleep)
    monkeypatch.setattr("proxy.ask.ask", ask)
    found = tidegate("status", "--watch", "--admin", "127.0.0.1:1")
    assert found.exit_code == 0
    assert slept == [1.0, 1.0, 1.0]
    first, second, third = found.stdout.splitlines()
    assert first == third
    assert first.startswith("a 0.00 (0/8)  spill closed")
    assert second == "no proxy answers"


def test_status_without_a_proxy_says_so() -> None:
    found = tidegate("status", "--state", "nowhere")
    assert (found.exit_code, found.stdout) == (1, "")
    assert "no proxy is running on nowhere" in found.stderr
    found = tidegate("status", "--watch", "--json")
    assert (found.exit_code, found.stderr) == (2, "tidegate: give --watch or --json, not both\n")
