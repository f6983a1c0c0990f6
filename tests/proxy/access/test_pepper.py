from __future__ import annotations

import stat
import threading
from pathlib import Path

import pytest

from proxy.access.pepper import PepperError, load_pepper


def test_the_pepper_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    pepper = load_pepper(tmp_path)
    assert len(pepper) == 32
    assert pepper != bytes(32)
    assert load_pepper(tmp_path) == pepper
    assert stat.S_IMODE((tmp_path / "pepper").stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["pepper"]


def test_peppers_differ(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert load_pepper(tmp_path / "a") != load_pepper(tmp_path / "b")


def test_processes_that_start_together_agree(tmp_path: Path) -> None:
    for attempt in range(10):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        together = threading.Barrier(6)
        peppers: list[bytes] = []

        def start(directory: Path = directory, together: threading.Barrier = together) -> None:
            together.wait()
            peppers.append(load_pepper(directory))  # noqa: B023 - joined before the next round

        threads = [threading.Thread(target=start) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(peppers) == 6
        assert set(peppers) == {(directory / "pepper").read_bytes()}
        assert [file.name for file in directory.iterdir()] == ["pepper"]


def test_the_later_of_two_makers_takes_the_first_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_pepper(tmp_path)
    monkeypatch.setattr(Path, "exists", lambda _: False)  # it looked a moment too early
    assert load_pepper(tmp_path) == first
    assert [file.name for file in tmp_path.iterdir()] == ["pepper"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_pepper_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    load_pepper(tmp_path)
    (tmp_path / "pepper").chmod(mode)
    with pytest.raises(PepperError, match=f"{mode:04o}.*chmod 600"):
        load_pepper(tmp_path)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_pepper_of_another_length_is_refused_and_not_replaced(tmp_path: Path, length: int) -> None:
    path = tmp_path / "pepper"
    path.touch(mode=0o600)
    path.write_bytes(b"\x8e" * length)
    with pytest.raises(PepperError, match="32 bytes") as caught:
        load_pepper(tmp_path)
    assert "8e" not in str(caught.value)
    assert "\x8e" not in str(caught.value)
    assert path.read_bytes() == b"\x8e" * length
