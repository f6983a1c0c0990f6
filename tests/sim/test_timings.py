"""Files of measured times are read as they are meant, or refused with file, line and column."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from sim.timings import Level, Timing, TimingsError, looks_like_milliseconds, read_measured

REQUEST: dict[str, Any] = {
    "arrival_s": 5.0,
    "prompt_tokens": 100,
    "output_tokens": 11,
    "ttft_s": 0.25,
    "e2e_s": 1.5,
}
BY_VLLM: dict[str, Any] = {
    "queued_ts": 7.0,
    "input_toks": 100,
    "output_toks": 11,
    "first_token_ts": 7.25,
    "last_token_ts": 8.5,
}
LEVEL: dict[str, Any] = {
    "concurrency": 4,
    "prompt_tokens": 100,
    "output_tokens": 11,
    "ttft_s": 0.25,
    "tpot_s": 0.125,
}


def written(path: Path, *rows: dict[str, Any]) -> Path:
    """As CSV or as JSON lines, by the name."""
    if ".csv" in path.name:
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    else:
        lines = [json.dumps(row) for row in rows]
    text = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.csv.gz", "a.jsonl.gz"])
def test_all_three_tables_are_read_in_every_form(tmp_path: Path, name: str) -> None:
    request = Timing(0, 100, 11, 250_000.0, 1_500_000.0)
    assert read_measured(written(tmp_path / name, REQUEST)) == [request]
    assert read_measured(written(tmp_path / name, BY_VLLM)) == [request]
    level = Level(4, 100, 11, 250_000.0, 125_000.0)
    assert read_measured(written(tmp_path / name, LEVEL, LEVEL)) == [level, level]


def test_requests_come_in_order_of_arrival_from_the_first_one(tmp_path: Path) -> None:
    late = REQUEST | {"arrival_s": 6.5, "prompt_tokens": 2}
    read = read_measured(written(tmp_path / "a.csv", late, REQUEST))
    assert [(row.at, row.prompt_tokens) for row in read if isinstance(row, Timing)] == [
        (0, 100),
        (1_500_000, 2),
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_byte_order_mark_does_not_matter(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, LEVEL)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_measured(path)) == 1


def test_empty_lines_and_other_columns_do_not_matter(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", REQUEST | {"note": "x"})
    path.write_text(f"\n{path.read_text()}\n\n")
    assert len(read_measured(path)) == 1


@pytest.mark.parametrize(
    ("change", "column", "message"),
    [
        ({"arrival_s": None}, "arrival_s", "is missing"),
        ({"arrival_s": "noon"}, "arrival_s", "must be a number, not 'noon'"),
        ({"arrival_s": "nan"}, "arrival_s", "must be a number"),
        ({"prompt_tokens": 0}, "prompt_tokens", "whole number of at least 1, not 0"),
        ({"prompt_tokens": True}, "prompt_tokens", "must be a number, not True"),
        ({"output_tokens": 1.5}, "output_tokens", "whole number of at least 1, not 1.5"),
        ({"ttft_s": 0}, "ttft_s", "must be above 0, not 0"),
        ({"e2e_s": 0.25}, "e2e_s", "the last token comes after the first"),
        ({"e2e_s": 0.1}, "e2e_s", "the last token comes after the first"),
    ],
)
def test_a_bad_value_is_named_by_file_line_and_column(
    tmp_path: Path, change: dict[str, Any], column: str, message: str
) -> None:
    path = written(tmp_path / "a.jsonl", REQUEST, REQUEST | change)
    with pytest.raises(TimingsError) as caught:
        read_measured(path)
    assert str(caught.value).startswith(f"{path}, line 2, {column}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "column"),
    [({"first_token_ts": 7.0}, "first_token_ts"), ({"last_token_ts": 7.25}, "last_token_ts")],
)
def test_vllms_own_times_are_in_order(tmp_path: Path, change: dict[str, Any], column: str) -> None:
    with pytest.raises(TimingsError, match=f"line 1, {column}: must be above 7"):
        read_measured(written(tmp_path / "a.jsonl", BY_VLLM | change))


def test_lines_of_a_csv_count_its_header(tmp_path: Path) -> None:
    with pytest.raises(TimingsError, match=r"a\.csv, line 3, tpot_s: must be above 0, not -1"):
        read_measured(written(tmp_path / "a.csv", LEVEL, LEVEL | {"tpot_s": -1}))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (Level(4, 10, 10, 1e6, 25e6), "the level of 4 users has 25 s for each token"),
        (Level(4, 10, 10, 1.2e9, 1e5), "the level of 4 users has a TTFT of 1200 s"),
        (Timing(3_000_000, 10, 10, 1e6, 19.1e6), "the request at 3 s has 2.01111 s for each token"),
        (Level(4, 10, 10, 9e8, 9e5), ""),
        (Level(4, 10, 1, 1e6, 25e6), ""),
        (Timing(0, 10, 10, 9e8, 9.01e8), ""),
    ],
)
def test_milliseconds_that_were_taken_for_seconds_are_seen(row: Level | Timing, said: str) -> None:
    found = looks_like_milliseconds([row])  # type: ignore[list-item]
    assert found.startswith(said)
    assert ("are these milliseconds?" in found) is bool(said)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "line 1: the file has no rows"),
        ("a.csv", b"concurrency\n", "line 1: the file has no rows"),
        ("a.jsonl", b"\n{}x\n", "line 2: is not JSON: extra data, at character 3"),
        ("a.jsonl", b"[1]\n", "line 1: is not a JSON object"),
        ("a.csv", b'queued_ts\n"1\n', "is not CSV"),
        ("a.jsonl", b"\xff", "line 1: is not UTF-8 text"),
        (
            "a.csv",
            b"Arrival_s,prompt_tokens\n1,2\n",
            "line 1: its columns are .*arrival_s, .*'Arrival_s', 'prompt_tokens'",
        ),
        ("a.csv", b"concurrency;ttft_s\n1;2\n", "none of these forms: .*tpot_s; it has 'concurrency;ttft_s'"),
        ("a.jsonl", b'\n{"users": 1}\n', "line 2: its columns are .*'users'"),
        ("a.jsonl", b"\n" * 9000 + b"\xe6\xbd\n{}", "line 9001: is not UTF-8 text"),
        ("a.jsonl.gz", gzip.compress(b"\n\n\xff", mtime=0), "line 3: is not UTF-8 text"),
        ("a.csv", b"queued_ts\n1\n\xff\n2\n", "line 3: is not UTF-8 text"),
        ("a.jsonl.gz", b"{}", "the file is not whole gzip"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9], "the file is not whole gzip"),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TimingsError, match=message):
        read_measured(path)
