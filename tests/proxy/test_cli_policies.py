"""`tidegate policies`, as typed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import typer
from typer.testing import CliRunner, Result

import policies
from policies import POLICIES, PolicyError, guide
from policies.files import library_names, library_policy
from proxy.cli_policies import policies as command

app = typer.Typer()
app.command()(command)


def typed(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_everything_is_listed_with_its_wish_and_files_come_first() -> None:
    shown = typed().stdout
    lines = [line.split(maxsplit=1) for line in shown.splitlines() if line.startswith("  ")]
    assert lines == [[name, wish] for name, wish in (*guide.FILES.items(), *guide.POLICIES.items())]
    assert "other packages" not in shown
    assert max(map(len, shown.splitlines())) <= 116


def test_a_file_is_shown_as_it_is_so_that_it_can_be_copied() -> None:
    for name in library_names():
        assert typed(name).stdout == library_policy(name)


def test_a_policy_is_shown_with_all_of_its_parameters() -> None:
    for name in POLICIES:
        shown = typed(name).stdout
        assert f"If you want {guide.POLICIES[name]}." in shown
        for one in policies.parameters(name):
            assert f"  {one.name} ({one.takes})\n      {one.doc}\n" in shown
    assert typed("random").stdout.endswith("It takes no parameters.\n")
    assert "pick: {policy: geo, home: ...}" in typed("geo").stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("night-on-remot", "is called 'night-on-remot'; did you mean 'night-on-remote'?\n"),
        ("least-laod", "is called 'least-laod'; did you mean 'least-load'?\n"),
        ("night", "is called 'night'; `tidegate policies` lists what there is\n"),
        ("nowhere:X", "policy nowhere:X cannot be imported from nowhere:X: No module named 'nowhere'"),
    ],
)
def test_a_name_that_is_none_is_told(name: str, message: str) -> None:
    found = typed(name)
    assert (found.exit_code, found.stdout) == (2, "")
    assert message in found.stderr


def test_policies_of_other_packages_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    def summary(name: str) -> str:
        if name == "broken":
            raise PolicyError("policy broken cannot be imported")
        return f"What {name} does."

    listed: Sequence[str] = [*POLICIES, "broken", "own"]
    monkeypatch.setattr(policies, "names", lambda: listed)
    monkeypatch.setattr(policies, "summary", summary)
    _, found = typed().stdout.split("Policies of other packages\n")
    assert found.startswith("  broken  policy broken cannot be imported\n  own     What own does.\n")
    assert typed("tests.policies.test_registry:First").stdout == (
        "tests.policies.test_registry:First: What tests.policies.test_registry:First does.\n"
        "It takes no parameters.\n"
    )
