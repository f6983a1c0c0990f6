"""The event log's file. What stands in it: `tests/e2e/test_replay.py`."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from proxy.build import ConfigError
from proxy.config import Config
from proxy.eventlog import LogFile
from proxy.linewriter import BLOCK_LINES
from proxy.serve import Service


def a_record(number: int) -> dict[str, Any]:
    return {"n": number, "event": "poll", "at": number / 7}


def read_all(descriptor: int) -> list[dict[str, Any]]:
    """What comes until the other side closes."""
    with os.fdopen(descriptor) as file:
        return [json.loads(line) for line in file]


def test_a_disk_that_stands_still_stops_nobody_and_loses_nothing() -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    file = LogFile(writing)
    records = [a_record(number) for number in range(3000)]
    for record in records:
        file.record(record)
    file.finish()
    assert read_all(reading) == records


def test_a_disk_that_is_too_slow_ends_the_recording_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    reading, writing = os.pipe()
    file = LogFile(writing, most_pending=5, interval_s=60)
    for number in range(8):
        file.record(a_record(number))
    assert file.ended
    assert read_all(reading) == [a_record(number) for number in range(5)]
    (said,) = caplog.records
    assert said.levelname == "WARNING"
    assert said.getMessage() == "the event log ends here: its disk is too slow, 5 records wait to be written"


def test_a_disk_that_is_full_ends_the_recording_and_nothing_follows(caplog: pytest.LogCaptureFixture) -> None:
    file = LogFile(os.open("/dev/full", os.O_WRONLY), interval_s=60)
    for number in range(2 * BLOCK_LINES):
        file.record(a_record(number))
    assert file.close()
    (said,) = caplog.records  # of the first block alone: the second is not tried
    assert said.getMessage() == "the event log ends here: it cannot be written: no space left on device"
    assert file.ended


def test_a_record_that_json_has_not_ends_the_recording_behind_the_last_that_it_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = LogFile.create(tmp_path / "log")
    file.record(a_record(0))
    file.record({"n": 1, "model": "half \ud800"})
    file.record(a_record(2))
    file.close()
    assert [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()] == [a_record(0)]
    assert "the event log ends here: a record cannot be written: " in caplog.text


def test_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        LogFile.create(tmp_path / "log").close()
    finally:
        os.umask(umask)
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (file := tmp_path / "log").write_text("what was recorded before\n")
    (link := tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for path in (file, link):
        with pytest.raises(
            ConfigError, match="exists already, and is not overwritten: move it away, or give another"
        ):
            LogFile.create(path)
    assert file.read_text() == "what was recorded before\n"
    assert not (tmp_path / "elsewhere").exists()


def service(tmp_path: Path, **settings: Any) -> Service:
    config = {
        "listen": "127.0.0.1:0",
        "admin": "127.0.0.1:0",
        "state": str(tmp_path / "state"),
        "log": "off",
        "probing": {"enabled": False},
        "backends": [{"name": "a", "url": "http://127.0.0.1:1", "models": ["m"]}],
    }
    return Service(Config.model_validate(config | settings), record=tmp_path / "events.jsonl")


@pytest.mark.parametrize("key", ["listen", "admin"])
async def test_a_start_that_fails_leaves_no_file_behind(key: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        failing = service(tmp_path, **{key: f"127.0.0.1:{taken.getsockname()[1]}"})
        with pytest.raises(ConfigError, match="cannot listen"):
            await failing.start()
    await failing.stop()
    assert not (tmp_path / "events.jsonl").exists()


async def test_a_restart_keeps_what_was_recorded_and_opens_no_port(tmp_path: Path) -> None:
    first = service(tmp_path)
    await first.start()
    await first.stop()
    recorded = (tmp_path / "events.jsonl").read_text()
    assert recorded.count("\n") >= 2
    second = service(tmp_path)
    with pytest.raises(ConfigError, match=r"events\.jsonl exists already"):
        await second.start()
    assert not hasattr(second, "ports")
    await second.stop()
    assert (tmp_path / "events.jsonl").read_text() == recorded
