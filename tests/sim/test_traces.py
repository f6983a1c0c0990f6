"""Traces are read as they are written, and what cannot be read is told."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.records import as_json
from proxy.reports import _write_csv
from sim.traces import FORM_NAMES, TraceError, read_workload, write_workload
from sim.traces.lines import KEPT_PROBLEMS, MOST_TOKENS
from sim.workload import Arrival, Workload
from sim.workload_summary import summarize
from tests.proxy.rows import a_row

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"
BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
MOONCAKE = '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}'
HEAD = '{"workload_version": 1, "name": "one", "unit_tokens": 16}'

GOOD = {
    "azure": [AZURE, "2023-11-16 18:15:46,374,44"],
    "burstgpt": [BURSTGPT, "5,ChatGPT,472,18,490,Conversation log"],
    "mooncake": [MOONCAKE],
    "export": ['{"op": "1", "arrived": 1.5, "prompt_tokens": 3, "completion_tokens": 4}'],
    "workload": [HEAD, '{"at_us": 1, "prompt_tokens": 3, "output_tokens": 4}'],
}
"""By form: lines that can be read."""


def write(path: Path, lines: Iterable[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "trace"


# Each form


def test_azure(trace: Path) -> None:
    lines = [AZURE, "2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50,396,109"]
    assert read_workload(write(trace, lines)).arrivals == [Arrival(0, 374, 44), Arrival(3_319_410, 396, 109)]


def test_azure_of_2024_has_a_zone(trace: Path) -> None:
    lines = [AZURE, "2024-05-10 00:00:00.009930+00:00,10,20", "2024-05-10 08:00:00.009931+08:00,11,21"]
    assert [arrival.at for arrival in read_workload(write(trace, lines))] == [0, 1]


def test_burstgpt_with_and_without_sessions(trace: Path) -> None:
    first = [BURSTGPT, "5,ChatGPT,472,18,490,Conversation log", "45.5,GPT-4,10,20,30,API log"]
    assert read_workload(write(trace, first)).arrivals == [
        Arrival(0, 472, 18, model="ChatGPT"),
        Arrival(40_500_000, 10, 20, model="GPT-4"),
    ]
    columns = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type"
    third = [columns, "19440110.0,1722ac82,43,GPT-4,906,446,1352,Conversation log"]
    assert read_workload(write(trace, third)).arrivals == [
        Arrival(0, 906, 446, model="GPT-4", session="1722ac82")
    ]


def test_mooncake_keeps_the_hashes_of_full_units(trace: Path) -> None:
    record = {"timestamp": 27, "input_length": 1100, "output_length": 9, "hash_ids": [46, 47, 48]}
    workload = read_workload(write(trace, [MOONCAKE, json.dumps(record)]))
    assert workload.unit_tokens == 512
    assert workload.arrivals == [Arrival(0, 600, 5, (1,)), Arrival(27_000, 1100, 9, (46, 47))]


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_an_export_becomes_a_workload(trace: Path, form: str) -> None:
    rows = [
        a_row(arrived=1_700_000_001.5, prefix=[1, 2**62, 3], prompt_tokens=1030),
        a_row(
            arrived=1_700_000_000.25, tenant="", served_model="", reason='two\nlines, "quoted"', session=""
        ),
        a_row(outcome="rejected", prompt_tokens=0, completion_tokens=0, prefix=[]),
    ]
    if form == "jsonl":
        trace.write_bytes(b"".join(as_json(row) + b"\n" for row in rows))
    else:
        file = io.BytesIO()
        _write_csv(file, rows, with_header=True)
        trace.write_bytes(file.getvalue())
    workload = read_workload(trace)
    assert workload.unit_tokens == 512
    assert workload.arrivals == [
        Arrival(0, 800, 128, (1,), model="small", data_class="internal"),
        Arrival(1_250_000, 1030, 128, (1, 2**62), "acme", "SmolLM2", "internal", session="5e55"),
    ]
    assert workload.left_out == 1
    assert "the request ended as 'rejected'" in str(workload.problems[0])


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
arrivals = st.builds(
    Arrival,
    at=st.integers(0, 10**12),
    prompt_tokens=st.integers(1, MOST_TOKENS),
    output_tokens=st.integers(1, MOST_TOKENS),
    tenant=words,
    model=st.just("") | words,
    data_class=st.sampled_from(["public", "internal"]),
    priority=st.integers(-5, 5),
    session=st.just("") | words,
    think=st.integers(-1, 10**9),
    labels=st.dictionaries(words, words, max_size=2).map(lambda labels: tuple(labels.items())),
    endpoint=st.sampled_from(["chat", "completions"]),
    stream=st.booleans(),
).flatmap(
    lambda one: st.lists(
        st.integers(0, 2**63 - 1), max_size=min(4, (one.prompt_tokens + one.output_tokens) // 16)
    ).map(lambda hashes: one._replace(hashes=tuple(hashes)))
)


@given(st.lists(arrivals, min_size=1, max_size=8), words)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read_back(tmp_path: Path, given: list[Arrival], name: str) -> None:
    workload = Workload(name, sorted(given, key=lambda arrival: arrival.at), 16)
    with (tmp_path / "own.jsonl").open("wb") as file:
        write_workload(workload, file)
    assert read_workload(tmp_path / "own.jsonl", strict=True) == workload


# What all forms have in common


@pytest.mark.parametrize("form", GOOD)
def test_a_form_is_recognised_compressed_or_not(trace: Path, form: str) -> None:
    write(trace, GOOD[form])
    plain = read_workload(trace)
    assert (len(plain), plain.left_out) == (1, 0)
    assert read_workload(trace, form) == plain
    trace.write_bytes(gzip.compress(b"\xef\xbb\xbf" + trace.read_bytes()))
    assert read_workload(trace) == plain


def test_arrivals_are_sorted_and_start_at_zero(trace: Path) -> None:
    lines = [BURSTGPT, "9,a,1,1,2,x", "7,b,1,1,2,x", "8,c,1,1,2,x", "7,d,1,1,2,x"]
    found = [(arrival.at, arrival.model) for arrival in read_workload(write(trace, lines))]
    assert found == [(0, "b"), (0, "d"), (1_000_000, "c"), (2_000_000, "a")]


def test_our_own_form_keeps_its_beginning(trace: Path) -> None:
    assert [arrival.at for arrival in read_workload(write(trace, GOOD["workload"]))] == [1]


BAD = [
    ("azure", "2023-11-16,1", "", "2 fields where 3 are expected"),
    ("azure", "yesterday,1,1", "TIMESTAMP", "expected a date and time, got 'yesterday'"),
    ("azure", "2023-11-16,x,1", "ContextTokens", "expected a whole number, got 'x'"),
    ("azure", "2023-11-16,1_0,1", "ContextTokens", "expected a whole number"),
    ("azure", "2023-11-16,١,1", "ContextTokens", "expected a whole number"),
    ("azure", "2023-11-16,1,-1", "GeneratedTokens", f"expected 0 to {MOST_TOKENS}, got -1"),
    ("azure", f"2023-11-16,1,{10**12}", "GeneratedTokens", f"expected 0 to {MOST_TOKENS}, got {10**12}"),
    ("azure", f"2023-11-16,1,{'9' * 5000}", "GeneratedTokens", "expected a whole number"),
    ("azure", '"2023-11-16,1,1', "TIMESTAMP", "expected a date and time"),
    ("burstgpt", "7,ChatGPT,0,0,0,API log", "Request tokens", "no tokens"),
    ("burstgpt", "7,ChatGPT,5,0,5,API log", "Response tokens", "no tokens"),
    ("burstgpt", "nan,ChatGPT,5,1,6,API log", "Timestamp", "got 'nan'"),
    ("burstgpt", "-1,ChatGPT,5,1,6,API log", "Timestamp", "got '-1'"),
    ("mooncake", "{", "", "not JSON"),
    ("mooncake", "[1]", "", "not a JSON object"),
    ("mooncake", MOONCAKE.replace('"timestamp": 0, ', ""), "timestamp", "is missing"),
    ("mooncake", MOONCAKE.replace("600", "true"), "input_length", "expected a whole number, got true"),
    ("mooncake", MOONCAKE.replace("600", "600.5"), "input_length", "expected a whole number, got 600.5"),
    ("mooncake", MOONCAKE.replace("[1, 2]", "[1, true]"), "hash_ids", "expected a list of whole numbers"),
    ("mooncake", MOONCAKE.replace("[1, 2]", "7"), "hash_ids", "expected a list of whole numbers"),
    ("mooncake", MOONCAKE.replace(', "hash_ids": [1, 2]', ""), "hash_ids", "is missing"),
    ("export", GOOD["export"][0].replace("1.5", '"x"'), "arrived", "expected a number, got 'x'"),
    ("export", GOOD["export"][0].replace("}", ', "tenant": 7}'), "tenant", "expected text, got 7"),
    ("export", GOOD["export"][0].replace("}", ', "prefix": "[1"}'), "prefix", "expected a list"),
    ("workload", GOOD["workload"][1].replace("}", ', "tennant": "a"}'), "tennant", "there is no such key"),
    ("workload", GOOD["workload"][1].replace("}", ', "hashes": [1]}'), "hashes", "more than the 0 units"),
    ("workload", GOOD["workload"][1].replace("}", ', "think_us": -2}'), "think_us", "expected -1 to"),
    (
        "workload",
        GOOD["workload"][1].replace("}", ', "labels": {"a": 1}}'),
        "labels",
        "expected a map of text",
    ),
    ("workload", GOOD["workload"][1].replace("}", ', "stream": 1}'), "stream", "expected true or false"),
]


@pytest.mark.parametrize(("form", "line", "column", "message"), BAD)
def test_a_line_that_cannot_be_read_is_left_out_and_told(
    trace: Path, form: str, line: str, column: str, message: str
) -> None:
    write(trace, [*GOOD[form], "", line, GOOD[form][-1]])
    workload = read_workload(trace)
    assert (len(workload), workload.left_out) == (2, 1)
    (problem,) = workload.problems
    assert (problem.file, problem.line, problem.column) == (str(trace), len(GOOD[form]) + 2, column)
    assert message in problem.message
    with pytest.raises(TraceError, match=f"line {len(GOOD[form]) + 2}"):
        read_workload(trace, strict=True)


EXPORT = "op,arrived,prompt_tokens,completion_tokens,prefix,reason"
PLAIN, LISTED = "1,1.5,3,4,,ok", '1,1.5,3,4,"[1, 2]",ok'
AZURE_ROW, BURSTGPT_ROW, SERVEGEN_ROW = "2023-11-16,1,1", "7,ChatGPT,5,1,6,API log", "0,0,0.01,1,Gamma,1,1"
SERVEGEN = "client,window_start_s,rate_rps,cv,pattern,p1,p2"

BAD_QUOTES = [
    # Forms without quotes: a line each.
    (AZURE, AZURE_ROW, ['"2023-11-16,1,1'], 3, 1, "TIMESTAMP", "expected a date"),
    (AZURE, AZURE_ROW, ['2023-11-16,1,"1', '2023-11-16,1,1"'], 3, 2, "GeneratedTokens", "expected a whole"),
    (BURSTGPT, BURSTGPT_ROW, ['"7,ChatGPT,5,1,6,x'], 3, 1, "Timestamp", "got '\"7'"),
    (BURSTGPT, BURSTGPT_ROW, ['7,x,"5,1,6,x', '7,x",5,1",6,x'], 3, 2, "Request tokens", "expected a whole"),
    (SERVEGEN, SERVEGEN_ROW, ['"0,0,0.01,1,Gamma,1,1'], 3, 1, "client", "expected a whole"),
    (SERVEGEN, SERVEGEN_ROW, ['0,0,0.01,1,"Gamma,1,1', '0,0,0.01,1,Gamma",1,1'], 3, 2, "pattern", "Weibull"),
    # An export: never closed, a later quote that does not fit, one that does.
    (
        EXPORT,
        PLAIN,
        ['1,1.5,3,4,,"here'],
        1,
        3,
        "reason",
        "never closed: everything to the end is left out, 3 l",
    ),
    (EXPORT, PLAIN, ['"1,1.5,3,4,,here'], 1, 3, "op", "never closed"),
    (EXPORT, LISTED, ['1,1.5,3,4,,"here'], 2, 2, "reason", "not CSV: ',' expected after '\"', in 2 lines"),
    (EXPORT, PLAIN, ['1,1.5,3,4,"[1]"2,'], 3, 1, "prefix", "not CSV: ',' expected after '\"'"),
    (
        EXPORT,
        PLAIN,
        ['1,1.5,3,4,,"here', PLAIN, '3,1.5,3,4,,and there"'],
        3,
        3,
        "reason",
        "hold 3 lines that l",
    ),
    (
        EXPORT,
        PLAIN,
        ['"1,1.5,3,4,,here', '2",1.5,3,4,,there'],
        3,
        2,
        "op",
        "hold 2 lines that look like rows",
    ),
    (
        EXPORT,
        PLAIN,
        ['1,1.5,3,4,",here', '2,1.5,3,4,",there'],
        3,
        2,
        "prefix",
        "hold 2 lines that look like rows",
    ),
    (
        EXPORT,
        PLAIN,
        ['1,1.5,3,"4,,here', '2,1.5",3,4,,there'],
        3,
        2,
        "",
        "8 fields where 6 are expected, in 2",
    ),
    (EXPORT, PLAIN, ['1,never,3,4,,"two\nlines"'], 3, 2, "arrived", "expected a number"),
]
"""(columns, a good row, bad ones, good rows that are read, lines that are left out, column, message)."""


@pytest.mark.parametrize(("columns", "good", "bad", "read", "left_out", "column", "message"), BAD_QUOTES)
def test_a_quote_that_is_not_meant_swallows_nothing(
    tmp_path: Path,
    columns: str,
    good: str,
    bad: list[str],
    read: int,
    left_out: int,
    column: str,
    message: str,
) -> None:
    path = write(tmp_path / "some_rates.csv", [columns, good, *bad, good, good])
    lengths = {"c": 0, "t": 0, "input_tokens": [1, 1], "output_tokens": [1, 1]}
    write(tmp_path / "some_lengths.jsonl", ['{"quantiles": [0, 1]}', json.dumps(lengths)])
    requests = 6 if columns == SERVEGEN else 1
    workload = read_workload(path)
    assert (len(workload), workload.left_out) == (read * requests, left_out)
    assert (workload.problems[0].line, workload.problems[0].column) == (3, column)
    assert message in workload.problems[0].message
    with pytest.raises(TraceError, match="line 3"):
        read_workload(path, strict=True)


@pytest.mark.parametrize("rows", [1000, 20_000])
def test_an_open_quote_costs_what_it_holds_however_long(trace: Path, rows: int) -> None:
    """What holds too much for a field ends earlier."""
    lines = [PLAIN] * rows
    lines[3] = '4,1.5,3,4,,"here'
    workload = read_workload(write(trace, [EXPORT, *lines]))
    assert len(workload) + workload.left_out == rows
    assert (len(workload) == 3) == (rows == 1000)
    assert (workload.problems[0].line, workload.problems[0].column) == (5, "reason")


@given(
    st.lists(st.sampled_from([PLAIN, LISTED, "1,1.5,3,4,,"]), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 25)), min_size=1, max_size=2),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_row_is_read_or_counted_wherever_quotes_come(
    tmp_path: Path, rows: list[str], quotes: list[tuple[int, int]]
) -> None:
    for row, at in quotes:
        row %= len(rows)
        rows[row] = f'{rows[row][:at]}"{rows[row][at:]}'
    path = write(tmp_path / "quoted.csv", [EXPORT, PLAIN, *rows])
    workload = read_workload(path)
    assert len(workload) + workload.left_out == 1 + len(rows)


def test_text_of_several_lines_is_no_mistake(trace: Path) -> None:
    texts = ['"two\nlines"', '"one, two\n\nand ""three"", four"', '"a\r\nb"']
    workload = read_workload(write(trace, [EXPORT, *(f"1,1.5,3,4,,{text}" for text in texts)]))
    assert (len(workload), workload.left_out) == (3, 0)


@pytest.mark.parametrize(
    ("name", "left_out", "message"), [('"more', 3, "a quote is never closed"), ('"more"s', 1, "not CSV: ")]
)
def test_names_of_columns_with_wrong_quotes_leave_nothing(
    trace: Path, name: str, left_out: int, message: str
) -> None:
    write(trace, [f"{EXPORT},{name}", PLAIN, PLAIN])
    with pytest.raises(
        TraceError, match=rf"no request in it; {left_out} lines left out, first .*line 1: {message}"
    ):
        read_workload(trace)


def test_all_are_counted_and_the_first_few_kept(trace: Path) -> None:
    workload = read_workload(write(trace, [*GOOD["azure"], *["x,1,1"] * 50]))
    assert (len(workload), workload.left_out) == (1, 50)
    assert [problem.line for problem in workload.problems] == list(range(3, 3 + KEPT_PROBLEMS))


@pytest.mark.parametrize(
    ("content", "form", "message"),
    [
        (b"", None, "the file is empty"),
        (b"a,b\n1,2\n", None, r"azure \(TIMESTAMP, ContextTokens.*got 'a, b'"),
        (b'{"a": 1}\n', None, "expected one of these with their columns.*got 'a'"),
        (b"{\n", None, "got 'not JSON"),
        (b"a,b\n1,2\n", "azure", "form azure needs the columns .*: no TIMESTAMP, "),
        (b"a,b\n1,2\n", "vidur", "there is no form 'vidur': azure, "),
        (AZURE.encode() + b"\n", None, "no request in it; 0 lines left out"),
        (AZURE.encode() + b"\nx,1,1\n", None, "1 lines left out, first .*line 2, TIMESTAMP"),
        (GOOD["azure"][0].encode(), "workload", "no head of a workload"),
        (HEAD.replace("1", "2", 1).encode(), None, "no head of a workload"),
        (HEAD.replace("16", "-1").encode(), None, "line 1, unit_tokens: expected 0 to"),
        (gzip.compress("\n".join(GOOD["azure"]).encode(), mtime=0)[:-9], None, "damaged or cut short"),
        (b"\x1f\x8b then nothing of the kind", None, "damaged or cut short"),
    ],
)
def test_a_file_that_cannot_be_used(trace: Path, content: bytes, form: str | None, message: str) -> None:
    trace.write_bytes(content)
    with pytest.raises(TraceError, match=message):
        read_workload(trace, form)


def test_a_file_that_is_not_there(trace: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_workload(trace)


fields = st.sampled_from(["", "1", "-1", "0", "1e400", "9" * 40, "nan", '"', "\x00", "é", "2023-11-16", "[]"])
rows = st.lists(fields, max_size=7).map(",".join)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=3,
)
keys = st.sampled_from(["timestamp", "input_length", "hash_ids", "arrived", "at_us", "hashes", "think_us"])
objects = st.dictionaries(keys, values, max_size=4).map(json.dumps)


@given(st.sampled_from(list(GOOD)), st.lists(rows | objects | st.text(max_size=8), max_size=5), st.binary())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_follows_is_read_or_counted(tmp_path: Path, form: str, lines: list[str], end: bytes) -> None:
    path = tmp_path / "noise"
    path.write_bytes("\n".join([*GOOD[form], *lines, ""]).encode() + end)
    workload = read_workload(path)
    assert len(workload) >= 1
    assert len(workload.problems) == min(workload.left_out, KEPT_PROBLEMS)
    assert [arrival.at for arrival in workload] == sorted(arrival.at for arrival in workload)
    for arrival in workload:
        assert arrival.at >= 0
        assert 1 <= arrival.prompt_tokens <= MOST_TOKENS
        assert 1 <= arrival.output_tokens <= MOST_TOKENS


@given(st.binary(max_size=200), st.sampled_from([None, *FORM_NAMES]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_noise_is_refused_in_words(tmp_path: Path, content: bytes, form: str | None) -> None:
    path = tmp_path / "noise"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=r".") as refused:
        read_workload(path, form)
    assert "\n" not in str(refused.value)


# The public traces


@pytest.mark.shared
def test_the_azure_trace(shared: Path) -> None:
    path = shared / "data" / "azure" / "AzureLLMInferenceTrace_2023_conv.csv.gz"
    figures = summarize(read_workload(path, strict=True))
    assert figures.requests == 19_366
    assert figures.rate_rps == pytest.approx(5.53, abs=0.005)
    assert figures.gap_cv == pytest.approx(1.09, abs=0.005)
    assert figures.span_s / 60 == pytest.approx(58.4, abs=0.05)
    prompt, output = figures.prompt_tokens, figures.output_tokens
    assert (round(prompt.mean), round(prompt.p95), prompt.max) == (1155, 4083, 14_050)
    assert (round(output.mean), round(output.p95), output.max) == (211, 451, 1000)


@pytest.mark.shared
def test_the_mooncake_trace(shared: Path) -> None:
    path = shared / "data" / "mooncake" / "conversation_trace.jsonl.gz"
    figures = summarize(read_workload(path, strict=True))
    assert figures.requests == 12_031
    assert figures.rate_rps == pytest.approx(3.40, abs=0.005)
    assert (round(figures.prompt_tokens.mean), figures.prompt_tokens.max) == (12_035, 126_195)
    assert (round(figures.output_tokens.mean), figures.output_tokens.max) == (343, 2000)
    assert figures.prefix.blocks == pytest.approx(0.366, abs=0.0005)
    # 37.4 % with the pieces at the ends of prompts, which full units leave out.
    assert figures.prefix.tokens == pytest.approx(0.374, abs=0.001)
