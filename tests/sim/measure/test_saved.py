"""Reports come back as they were written, or are refused with file and place."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from sim.measure.endpoint import Facts
from sim.measure.level import Level
from sim.measure.prompts import Prefix
from sim.measure.saved import is_report, read_report
from sim.measure.sweep import Plan, Report, Series
from sim.measure.verdict import Capacity, Sla
from sim.measure.wire import Api
from tests.sim.measure.fake_server import record


def report() -> Report:
    """With all that may be absent, and all that may be there."""
    plan = Plan(
        (1, 4), 100, 10, prefixes=(Prefix.COLD, Prefix.WARM), sla=Sla(ttft_s=2.0), search=True, seed=7
    )
    levels = [
        Level.of(1, [replace(record(), cached_tokens=64), record(tokens=1)], 1.0, 0.5),
        Level.of(4, [record(error="timeout", ttft=None, e2e=None, tokens=None)], 1.0, interrupted=True),
    ]
    made = Report("http://x", "m", Api.COMPLETIONS, False, Facts("0.32.0", 8192, 65536, True), plan)
    made.series = [
        Series(Prefix.COLD, levels, knee=1, capacity=Capacity(1, 4)),
        Series(Prefix.WARM, [Level.of(1, [record()], 1.0, warm_up_error="status 503: full")]),
    ]
    return made


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
@pytest.mark.parametrize("option", [orjson.OPT_INDENT_2, 0])
def test_a_report_comes_back_as_it_was(tmp_path: Path, name: str, option: int) -> None:
    path = tmp_path / name
    data = orjson.dumps(report(), option=option)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    assert is_report(path)
    assert read_report(path) == replace(report(), began=read_report(path).began)


def test_other_files_are_told_by_their_names() -> None:
    assert not any(is_report(Path(name)) for name in ("a.jsonl", "a.jsonl.gz", "a.csv", "a.json.csv", "json"))


def changed(**fields: Any) -> bytes:
    document = orjson.loads(orjson.dumps(report()))
    document["series"][0]["levels"][0] |= fields
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n"series": [,]}', r"a\.json, line 2: is not one JSON document.*\.jsonl"),
        (b'{"queued_ts": 1}\n{"queued_ts": 2}\n', r"a\.json, line 2: is not one JSON document.*\.jsonl"),
        (b"[]", r"a\.json: the file is not as `tidegate bench --json` writes it"),
        (b"{}", r"a\.json: url is not as `tidegate bench --json` writes it: Field required"),
        (changed(ttft_s="slow"), r"a\.json: series\.0\.levels\.0\.ttft_s is not as"),
        (b"\n\xff", r"a\.json, line 2: is not UTF-8 text"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_report(path)
