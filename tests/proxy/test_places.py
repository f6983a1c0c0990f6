"""What is wrong with where the proxy is to write: `check` says so, and `serve` in the same words."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from proxy.cli import app
from proxy.config import Config, load_config
from proxy.database import OpenError, open_database
from proxy.places import unusable_places
from proxy.serve import Service

BASE = """\
backends: [{name: a, url: "http://127.0.0.1:9", models: [m]}]
listen: 127.0.0.1:0
admin: 127.0.0.1:0
probing: {enabled: false}
"""
WRONG = [
    (
        "database: mysql://me:hidden@c/d",
        "database: mysql://***@c/d: the ledger is kept in SQLite or PostgreSQL; write sqlite:///PATH or "
        "postgresql://USER:PASSWORD@HOST/NAME",
    ),
    (
        "database: postgresql://me:hidden@127.0.0.1:9/d?sslmod=verify-full",
        "database: postgresql+psycopg://***@127.0.0.1:9/d: its driver knows no parameter 'sslmod' "
        "(did you mean 'sslmode'?)",
    ),
    ("database: postgresql+asyncpg://me:hidden@c/d", "database: write postgresql://…"),
    ("log: nodir/x.log", "log: there is no directory {folder}/nodir: make it"),
    ("log: tidegate.yaml/x.log", "log: {folder}/tidegate.yaml is no directory"),
    ("log: .", "log: {folder} is a directory"),
    ("state: tidegate.yaml", "state: {folder}/tidegate.yaml is no directory"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command is typed."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("line", "said"), WRONG, ids=[line for line, _ in WRONG])
@pytest.mark.parametrize("command", ["check", "serve"])
def test_it_is_pointed_at_before_anything_is_opened(command: str, line: str, said: str, folder: Path) -> None:
    (folder / "tidegate.yaml").write_text(BASE + line + "\n")
    found = CliRunner().invoke(app, [command])
    key = line.partition(":")[0]
    words = said.format(folder=folder)
    assert found.exit_code == (1 if command == "check" else 2)
    assert f"tidegate.yaml:5:{len(key) + 3}: {words}" in found.stderr
    assert "hidden" not in found.output
    assert [file.name for file in folder.iterdir()] == ["tidegate.yaml"]


def test_commands_that_open_the_database_say_the_same() -> None:
    with pytest.raises(OpenError, match=r"knows no parameter 'sslmod' \(did you mean 'sslmode'\?\)"):
        open_database("postgresql://127.0.0.1:9/d?sslmod=require")


def test_right_places_are_accepted(folder: Path) -> None:
    for line in (
        "database: postgresql://me@127.0.0.1:9/d?sslmode=require&connect_timeout=3",
        "database: sqlite:///x.db",
        "log: x.log",
        "log: 'off'",
        "state: not/there/yet",
    ):
        (folder / "tidegate.yaml").write_text(BASE + line + "\n")
        assert list(unusable_places(load_config(folder / "tidegate.yaml"))) == []


async def test_what_is_in_use_refuses_no_reload(folder: Path) -> None:
    """Such as a log whose directory somebody has moved away."""
    (folder / "logs").mkdir()
    file = folder / "tidegate.yaml"
    file.write_text(BASE + "log: logs/x.log\n")
    service = Service(load_config(file), file)
    await service.start()
    (folder / "logs").rename(folder / "moved")
    assert service.reload()
    file.write_text(BASE + "log: other/x.log\n")
    assert not service.reload()
    await service.stop()


def test_what_this_user_cannot_see_may_be_right(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config.model_validate(
        {"backends": [{"name": "a", "url": "http://127.0.0.1:9"}], "log": "/var/log/hidden/x.log"}
    )

    def stat(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", stat)
    assert list(unusable_places(config)) == []
