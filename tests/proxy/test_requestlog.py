from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import proxy.requestlog
from proxy.records import Row
from proxy.requestlog import WORDS, RequestLog
from tests.proxy.rows import a_row


@pytest.fixture
def log(tmp_path: Path) -> Iterator[RequestLog]:
    log = RequestLog.to(str(tmp_path / "log"))
    assert log is not None
    yield log
    log.close()


def written(log: RequestLog, tmp_path: Path) -> list[dict[str, Any]]:
    log.close()
    return [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]


def expected(request_id: str, row: Row) -> dict[str, Any]:
    names = {"key": "key_id", "usage": "usage_source"}
    figures = [
        "prompt_tokens",
        "cached_tokens",
        "completion_tokens",
        "queue_s",
        "ttft_s",
        "total_s",
        "overhead_s",
    ]
    same = [*figures, *WORDS]
    fields = {name: getattr(row, names.get(name, name)) for name in same}
    return {"time": row.arrived, "id": request_id, **fields}


def test_a_line_says_how_a_request_went(log: RequestLog, tmp_path: Path) -> None:
    rows = [a_row(tenant=f"t{i % 3}", status=200 + i % 2, total_s=i / 1000) for i in range(1000)]
    rows.append(replace(rows[0], ttft_s=None, code="overloaded", stream=False))
    for row in rows:
        log.write((f"id-{row.op}", row))
    assert written(log, tmp_path) == [expected(f"id-{row.op}", row) for row in rows]


def test_times_are_rounded_to_microseconds(log: RequestLog, tmp_path: Path) -> None:
    noise = {"arrived": 1795483696.5919738, "total_s": 0.0012300000000000001, "ttft_s": 0.0012299999999999998}
    log.write(("x", a_row(**noise, queue_s=1e-7, overhead_s=12345.6789012)))
    (line,) = written(log, tmp_path)
    assert [line[name] for name in ("time", "total_s", "ttft_s", "queue_s", "overhead_s")] == [
        1795483696.591974,
        0.00123,
        0.00123,
        0.0,
        12345.678901,
    ]


def test_other_lines_are_written_in_turn(log: RequestLog, tmp_path: Path) -> None:
    log.write({"a": 1})
    log.write(("x", row := a_row()))
    log.write({"b": [2]})
    assert written(log, tmp_path) == [{"a": 1}, expected("x", row), {"b": [2]}]


def test_what_json_has_not_stops_no_other_line(log: RequestLog, tmp_path: Path) -> None:
    log.write(("half \ud800", a_row(model="half \ud800 a pair")))
    log.write(("x", a_row(reason="\udfff")))
    log.write({"message": "\ud800", "of": b"bytes"})
    log.write({"last": 1})
    first, second, third, last = written(log, tmp_path)
    assert (first["id"], first["model"], second["reason"]) == ("half ?", "half ? a pair", "?")
    assert (third, last) == ({"message": "?", "of": "b'bytes'"}, {"last": 1})


def test_any_number_of_different_lines_needs_little_memory(
    log: RequestLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy.requestlog, "MAX_WORDS", 8)
    rows = [a_row(model=f"nothing-{i}", code="model_not_found") for i in range(100)]
    for row in rows:
        log.write(("x", row))
    assert [line["model"] for line in written(log, tmp_path)] == [row.model for row in rows]
    assert len(log._words) <= 8


def test_a_slow_reader_costs_lines_not_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RequestLog, "MAX_PENDING", 5)
    reading, writing = os.pipe()
    log = RequestLog(writing, interval_s=60)
    for number in range(8):
        log.write({"n": number})
    assert log.dropped == 3
    log.close()
    os.close(writing)
    with os.fdopen(reading) as reader:
        assert [json.loads(line)["n"] for line in reader] == [0, 1, 2, 3, 4]


def test_a_reader_that_is_gone_is_survived() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    log = RequestLog(writing, interval_s=60)
    log.write({"n": 1})
    log.close()
    os.close(writing)
    assert log.dropped == 1


def test_no_log_is_written_when_it_is_off() -> None:
    assert RequestLog.to("off") is None
