"""The commands as typed, where they need no running proxy."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest
from typer.testing import CliRunner, Result

import proxy.reports
from proxy.cli import _logging, app, main
from proxy.database import open_database
from proxy.ledger import _Insert
from proxy.records import to_values
from tests.proxy.rows import a_row


@pytest.fixture(autouse=True)
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with an empty ledger."""
    monkeypatch.chdir(tmp_path)
    open_database(tmp_path / "tidegate-data").dispose()


def tidegate(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


# Usage


def test_usage_of_nothing_says_so_and_of_when() -> None:
    assert tidegate("usage").stdout == "no requests in this ledger\n"
    found = tidegate("usage", "--since", "2026-11-01", "--until", "2026-11-08T12:30")
    assert found.stdout == "no requests from 2026-11-01 00:00 to 2026-11-08 12:30 UTC\n"
    found = tidegate("usage", "--since", "7d")
    assert re.fullmatch(r"no requests from \d{4}-\d\d-\d\d \d\d:\d\d UTC until now\n", found.stdout)
    assert tidegate("usage", "--until", "2026-11-08").stdout == "no requests to 2026-11-08 00:00 UTC\n"


@pytest.mark.parametrize("columns", [None, "60"])
def test_the_money_stands_in_every_table(
    columns: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no terminal, a line is as long as it is; `COLUMNS` is as good as one."""
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    else:
        monkeypatch.delenv("COLUMNS", raising=False)
    engine = open_database(tmp_path / "tidegate-data")
    tenant = "a-tenant-with-a-name-of-more-than-half-a-line"
    row = a_row(tenant=tenant, backend="a-backend-far-away", currency="CNY", cost_nano=1_234_567_890_123)
    _Insert(engine).rows([to_values(row)])
    engine.dispose()
    text = tidegate("usage", "--by", "tenant,backend").stdout
    assert "1,234.5679" in text
    (heading,) = [line for line in text.splitlines() if "tenant " in line]
    if columns:
        assert tenant[:40] in text
        assert all(len(line) <= 60 for line in text.splitlines())
    else:
        assert "cost CNY" in heading
        assert any(tenant in line and "1,234.5679" in line for line in text.splitlines())


def test_for_scripts_nothing_stays_what_it_was() -> None:
    assert json.loads(tidegate("usage", "--json").stdout) == []
    assert tidegate("usage", "--csv").stdout.startswith("requests,errors,")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("usage", "--json", "--csv"), "give --json or --csv, not both"),
        (
            ("usage", "--since", "1d", "--until", "2d"),
            "--since 1d is not before --until 2d: nothing lies from",
        ),
        (("export", "--since", "2026-11-02", "--until", "2026-11-01"), "--since 2026-11-02 is not before"),
        (("usage", "--since", "2026-11-02", "--until", "2026-11-02"), "is not before"),
        (("usage", "--since", "soon"), "--since: 'soon' is neither a duration"),
        (("export", "--until", "soon"), "--until: 'soon' is neither a duration"),
        (("usage", "--by", "colour"), "--by: cannot sum by 'colour'; there are tenant, "),
        (("usage", "--by", "tenant,day,tenant"), "--by: 'tenant' is named twice"),
        (("usage", "--since", "999999w"), "--since: '999999w' lies outside the calendar"),
        (("usage", "--until", "9999-12-31T23:00:00-05:00"), "lies outside the calendar"),
        (("export", "-o", "nowhere/rows.jsonl"), "nowhere/rows.jsonl: no such file or directory"),
        (("usage", "--config", "nowhere.yaml"), "nowhere.yaml: no such file or directory"),
        (("usage", "--state", "nowhere"), "there is no ledger in nowhere: name its configuration"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_words(arguments: tuple[str, ...], said: str) -> None:
    found = tidegate(*arguments)
    assert (found.exit_code, found.stdout) == (2, "")
    assert found.stderr.startswith("tidegate: ")
    assert said in found.stderr
    assert "Errno" not in found.stderr


def test_an_export_onto_a_full_disk_names_the_file() -> None:
    engine = open_database("tidegate-data")
    _Insert(engine).rows([to_values(a_row())])
    engine.dispose()
    found = tidegate("export", "-o", "/dev/full")
    assert (found.exit_code, found.stderr.splitlines()[-1]) == (
        2,
        "tidegate: /dev/full: no space left on device",
    )


def test_what_no_command_catches_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(proxy.reports, "usage_json", full)
    monkeypatch.setattr(sys, "argv", ["tidegate", "usage", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code, capsys.readouterr().err) == (2, "tidegate: no space left on device\n")


# Serve


def test_messages_have_a_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", logging.INFO)
    monkeypatch.setattr(time, "time", lambda: 1_795_733_401.1239)
    monkeypatch.setattr(time, "time_ns", lambda: 1_795_733_401_123_900_000)
    _logging()
    logging.getLogger("tidegate").warning("the tide is %s", "in")
    assert capsys.readouterr().err == "W 2026-11-26T22:50:01.123Z the tide is in\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("--listen", "18480"),
            "listen: an address is HOST:PORT, got '18480' (did you mean 127.0.0.1:18480?)",
        ),
        (
            ("--local", "http://127.0.0.1:2/v1"),
            "--local: a backend's URL goes without /v1: requests bring it along (did you mean "
            "http://127.0.0.1:2?)",
        ),
        (
            ("--remote", "nj=nj.example"),
            "--remote: a URL begins with http:// or https:// and names a host, or is unix:/PATH, got 'nj.example'",
        ),
        (("--policy", "nowhere.yaml"), "nowhere.yaml: no such file or directory"),
    ],
)
def test_serve_says_what_stands_in_the_way(arguments: tuple[str, ...], said: str) -> None:
    found = tidegate("serve", "--local", "http://127.0.0.1:1", *arguments)
    assert (found.exit_code, found.stderr.splitlines()[-1]) == (2, f"tidegate: {said}")


@pytest.mark.parametrize(
    ("rest", "says"),
    [
        ("state: elsewhere\n", "says"),
        ("database: 'sqlite:///other.db'\n", "says"),
        ("state: [\n", "cannot be used as it is, but says"),
    ],
)
def test_flags_begin_no_second_state_beside_a_file(rest: str, says: str) -> None:
    Path("tidegate.yaml").write_text(f"backends: [{{name: a, url: 'http://a.test'}}]\n{rest}")
    found = tidegate("serve", "--local", "http://127.0.0.1:1")
    assert (found.exit_code, found.stdout) == (2, "")
    assert found.stderr.startswith(f"tidegate: tidegate.yaml in this folder {says} where keys and ledger are")
    assert "give --config tidegate.yaml instead, or say where they are with --state DIRECTORY" in found.stderr
    _is_let_through("--state", "tidegate-data")


def test_flags_beside_a_file_with_the_same_state_are_no_matter() -> None:
    Path("tidegate.yaml").write_text("backends: [{name: a, url: 'http://a.test'}]\n")
    _is_let_through()


def _is_let_through(*arguments: str) -> None:
    """It comes as far as the policy, which is not there."""
    found = tidegate("serve", "--local", "http://127.0.0.1:1", "--policy", "nowhere.yaml", *arguments)
    assert found.stderr.splitlines()[-1] == "tidegate: nowhere.yaml: no such file or directory"


def test_an_open_proxy_says_which_keys_it_lacks() -> None:
    found = tidegate("serve", "--local", "http://127.0.0.1:1", "--listen", "0.0.0.0:0", "--state", "my state")
    assert (found.exit_code, found.stderr.splitlines()[-1]) == (
        2,
        "tidegate: without keys the proxy listens on loopback only, not on 0.0.0.0:0: make one first with "
        "`tidegate keys create --tenant NAME --state 'my state'`",
    )
