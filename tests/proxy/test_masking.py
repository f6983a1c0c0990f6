"""A secret in the wrong place is not shown with the mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import URL

from policies.yamlfile import FileProblems, Problem
from proxy.config import load_config
from proxy.masking import database_shown, masked_output, secret_values, without_secrets

SECRET = "sk-live-4eC39Hq"


@pytest.mark.parametrize(
    "backend",
    [
        "{name: a, url: 'http://a', api_key: %s}",
        "{name: a, url: 'http://a', api_key_env: %s}",
        '{name: a, "api_key":"%s", url: 7}',
        "{api_token: %s, name: a, url: ftp://a}",
        "{name: a, url: 'http://user:%s@a'}",
        "{name: a, url: 'ftp://user:%s@a'}",
        "{name: a, url: 'http://a', password: [%s]}",
        "\n    name: a\n    url: http://a\n    api_key: a, %s # x",
        "\n    name: a\n    url: http://a\n    api_key_env:\n      %s",
        "{name: a, url: 'http://a', api_key: %s",  # a bracket is missing
        "{name: a, url: 'http://a', slots: none, labels: {Secret: %s}}",
    ],
)
def test_no_mistake_shows_the_secret_beside_it(tmp_path: Path, backend: str) -> None:
    path = tmp_path / "tidegate.yaml"
    path.write_text(f"backends:\n  - {backend % SECRET}\n")
    with pytest.raises(FileProblems) as caught:
        load_config(path)
    shown = f"{caught.value} {caught.value.problems}"
    assert "sk-live" not in shown
    assert str(path) in shown


def test_the_caret_stays_where_it_was_and_the_rest_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "tidegate.yaml"
    path.write_text("backends:\n  - {name: a, api_key_env: KEY, slts: 3, url: 'http://a'}\n")
    with pytest.raises(FileProblems) as caught:
        load_config(path)
    assert str(caught.value).splitlines()[1:] == [
        "  2 |   - {name: a, api_key_env: ***, slts: 3, url: 'http://a'}",
        "    |                                 ^",
    ]


def test_tokens_that_are_no_secrets_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "tidegate.yaml"
    path.write_text("backends: [{name: a, url: 'http://a'}]\ntimeouts: {first_token: soon}\n")
    with pytest.raises(FileProblems, match="got 'soon'") as caught:
        load_config(path)
    assert "timeouts: {first_token: soon}" in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "when: {prompt_tokens: {min: 5000, max: 100}}",
        "pick: {policy: cost, joules_per_token: none}",
        "pick: {policy: gorgo, ms_per_token: fast}",
        "kv_tokens: 7, max_num_batched_tokens: 8, tokens_per_s: 9",
    ],
)
def test_counts_of_tokens_are_no_secrets(line: str) -> None:
    problem = Problem(1, 1, "rules[0].when.prompt_tokens", "wrong, got 7")
    shown = without_secrets(FileProblems("p.yaml", [problem], line))
    assert (shown.text, shown.problems) == (line, [problem])


@pytest.mark.parametrize("key", ["token", "hf_token", "api_tokens", "token_file", "system_token"])
def test_tokens_that_open_something_are_secrets(key: str) -> None:
    problem = Problem(1, 1, key, f"wrong, got '{SECRET}'")
    shown = without_secrets(FileProblems("p.yaml", [problem], f"{{{key}: {SECRET}, name: a}}"))
    assert SECRET not in f"{shown} {shown.text} {shown.problems}"
    assert ", name: a}" in shown.text


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        ("postgresql://tide:s3cret@db:5432/ledger", "postgresql://tide:***@db:5432/ledger"),
        ("postgresql://db/ledger?password=s3cret", "postgresql://db/ledger"),
        ("sqlite:////var/lib/ledger.db", "sqlite:////var/lib/ledger.db"),
        ("postgresql://tide:s3cret@db:port/ledger", "postgresql://***"),
        (URL.create("postgresql", "tide", "s3cret", "db"), "postgresql://tide:***@db"),
        (Path("/var/lib/tidegate"), "/var/lib/tidegate"),
    ],
)
def test_databases_are_shown_without_passwords(target: str | Path | URL, shown: str) -> None:
    assert database_shown(target) == shown


def test_what_a_command_says_is_shown_without_secrets() -> None:
    said = "API_KEY=abcdef Bearer xyzzy-1\npassword: hunter22\nusing c1oudt0ken, max_tokens=5, exit 3"
    shown = masked_output(said, secret_values({"CLOUD_TOKEN": "c1oudt0ken", "HOME": "exit 3", "A_KEY": ""}))
    assert not [secret for secret in ("abcdef", "xyzzy", "hunter22", "c1oudt0ken") if secret in shown]
    assert "max_tokens=5, exit 3" in shown
    assert shown.count("\n") == 2
