"""`tidegate explain --request` where no proxy runs: what the configuration would do while all is idle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from proxy.access.keys import create_key, revoke_key
from proxy.access.pepper import load_pepper
from proxy.cli import app
from tests.proxy.rows import empty_database
from tests.proxy.test_check import CAPACITY, PROFILE

CONFIG = """\
admin: 127.0.0.1:1
state: data
policy: policy.yaml
aliases: {gpt: m-1}
backends:
  - {name: appliance, url: "http://127.0.0.1:8000", slots: 24}
  - {name: nj, url: "https://nj.example:8443", site: nanjing, models: [m-1, m-2]}
sites: {nanjing: {data_classes: [public]}}
"""
POLICY = """\
rules:
  - name: night on remote
    when: {time: 22:00-06:00}
    prefer: [{site: nanjing}, {site: local}]
  - name: everything else
    prefer: [{site: local, spill: {enter: 85%, leave: 70%}}, {site: "*"}]
"""
BODY: dict[str, Any] = {"model": "m-1", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tidegate.yaml").write_text(CONFIG)
    (tmp_path / "policy.yaml").write_text(POLICY)
    (tmp_path / "r.json").write_text(json.dumps(BODY))
    return tmp_path


def explain(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, ["explain", *arguments], input=stdin)


def test_the_file_is_told_as_if_all_were_idle() -> None:
    found = explain("--request", "r.json", "--at", "12:00")
    assert (found.exit_code, found.stderr) == (0, "")
    lines = [line.strip() for line in found.stdout.splitlines()]
    assert lines[:4] == [
        "now: sent to appliance",
        "note: no proxy runs: every backend is taken to be up and idle, and nothing of a key to be used yet",
        "note: taken to serve m-1, for nobody has asked them: appliance",
        "note: taken to have 32 slots: nj",
    ]
    assert "appliance: 0 of 24 slots in use, saturation 0.00" in lines
    assert "nj is no candidate: of a later tier" in lines
    assert explain("-r", "r.json", "--at", "23:00").stdout.startswith("now: sent to nj\n")
    piped = explain("-r", "-", "--at", "23:00", "--json", stdin=json.dumps({**BODY, "model": "gpt"}))
    assert json.loads(piped.stdout)["request"]["served_model"] == "m-1"


def test_what_needs_a_round_trip_is_told_not_to_be_known(folder: Path) -> None:
    (folder / "policy.yaml").write_text("rules: [{name: all, prefer: [{rtt: {max: 50ms}}, {site: '*'}]}]")
    found = explain("-r", "r.json").stdout
    assert "\n  note: no round trip is measured, so no backend is inside of any bounds of `rtt`\n" in found


def test_slots_may_come_from_a_profile(folder: Path) -> None:
    (folder / "a.yaml").write_text(PROFILE + CAPACITY)
    (folder / "tidegate.yaml").write_text(CONFIG.replace("slots: 24", "profile: a.yaml"))
    found = json.loads(explain("-r", "r.json", "--at", "12:00", "--json").stdout)
    assert found["decisions"][0]["candidates"][0]["slots"] == 17


def test_a_key_is_looked_up_where_keys_are_kept(folder: Path) -> None:
    (folder / "data").mkdir()
    engine = empty_database(folder / "data")
    key, made = create_key(engine, load_pepper(folder / "data"), tenant="acme", data_class="internal")
    for given in (key, made.id):
        shown = json.loads(explain("-r", "r.json", "--key", given, "--json").stdout)
        assert shown["request"]["tenant"] == "acme"
        assert shown["decisions"][0]["removed"] == {"nj": "nanjing does not accept data class internal"}
    revoke_key(engine, made.id)
    found = explain("-r", "r.json", "--key", made.id)
    assert found.exit_code == 1
    assert found.stderr == (
        f"tidegate: a client would get 401 invalid_api_key: no valid API key has the id '{made.id}'\n"
    )
    assert "this is no whole API key" in explain("-r", "r.json", "--key", key[:-1]).stderr


def test_what_a_key_says_may_be_given() -> None:
    options = ("--tenant", "x", "--data-class", "secret", "--label", "a=b", "--priority", "4")
    shown = json.loads(explain("-r", "r.json", *options, "--json").stdout)["request"]
    assert (shown["tenant"], shown["data_class"], shown["labels"], shown["priority"]) == (
        "x",
        "secret",
        {"a": "b"},
        4,
    )


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 2, "name the id of a request, as in `tidegate explain ID`, or give --request FILE"),
        (["x", "-r", "r.json"], 2, "give the id of a request that was, or --request with one that might be"),
        (["x", "--at", "23:00"], 2, "--at is for --request: what was, is known"),
        (["-r", "r.json", "--session", "\udcff"], 2, "--session: this is not UTF-8"),
        (["-r", "none.json"], 2, "none.json: no such file or directory"),
        (["-r", "r.json", "--endpoint", "nowhere"], 1, "endpoint: no endpoint with a JSON body is called"),
        (["-r", "r.json", "--at", "soon"], 1, "at: expected a time such as 23:00"),
        (["-r", "tidegate.yaml"], 1, "a client would get 400 invalid_json: the body is not valid JSON"),
        (
            ["-r", "r.json", "--admin", "127.0.0.1:1"],
            1,
            "no proxy answers at 127.0.0.1:1: connection refused",
        ),
    ],
)
def test_what_is_wrong_is_told(arguments: list[str], status: int, said: str) -> None:
    found = explain(*arguments)
    assert (found.exit_code, found.stdout) == (status, "")
    assert said in found.stderr


def test_an_error_of_the_api_is_json_in_its_dialect() -> None:
    found = explain("-r", "-", "--json", "--endpoint", "messages", stdin="{")
    assert found.exit_code == 1
    assert json.loads(found.stdout)["type"] == "error"
    assert "a client would get 400 invalid_request_error: " in found.stderr


def test_a_policy_that_cannot_be_used_is_told_with_its_place(folder: Path) -> None:
    (folder / "policy.yaml").write_text("rules: [{nam: x}]")
    found = explain("-r", "r.json")
    assert found.exit_code == 2
    assert "policy.yaml:1:" in found.stderr


def test_without_a_file_and_without_a_proxy_nobody_can_say(folder: Path) -> None:
    (folder / "tidegate.yaml").unlink()
    found = explain("-r", "r.json", "--state", "nowhere")
    assert (found.exit_code, found.stderr) == (
        1,
        "tidegate: no proxy is running on nowhere: it would have left ports.json there\n",
    )
