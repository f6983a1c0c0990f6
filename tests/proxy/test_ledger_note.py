from __future__ import annotations

import stat
from pathlib import Path

import pytest

from proxy.ledger_note import NOTE_FILE, note_database, noted_database

URL = "postgresql://tidegate:se%40cret@db.example/ledger?sslmode=verify-full&password=hidden"


def test_the_note_has_no_password_and_one_reader(tmp_path: Path) -> None:
    note_database(tmp_path, URL)
    assert noted_database(tmp_path) == "postgresql://tidegate:***@db.example/ledger"
    text = (tmp_path / NOTE_FILE).read_text()
    assert "cret" not in text
    assert "hidden" not in text
    assert stat.S_IMODE((tmp_path / NOTE_FILE).stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [NOTE_FILE]


@pytest.mark.parametrize("usual", [None, "sqlite:///{}/tidegate.db"])
def test_a_ledger_in_the_directory_itself_needs_no_note(usual: str | None, tmp_path: Path) -> None:
    note_database(tmp_path, URL)
    note_database(tmp_path, usual and usual.format(tmp_path))
    assert noted_database(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    note_database(tmp_path, f"sqlite:///{tmp_path}/elsewhere/tidegate.db")
    assert noted_database(tmp_path) == f"sqlite:///{tmp_path}/elsewhere/tidegate.db"


@pytest.mark.parametrize("text", ["", "{}", "[]", '"x"', "\xff"])
def test_what_is_no_note_notes_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / NOTE_FILE).write_text(text, encoding="latin-1")
    assert noted_database(tmp_path) is None
