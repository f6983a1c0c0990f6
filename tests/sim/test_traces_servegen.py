"""What is drawn from ServeGen's parameters has their rates, gaps and lengths."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sim.traces import Span, TraceError, read_workload
from sim.traces.servegen import read_columns

COLUMNS = "client,window_start_s,rate_rps,cv,pattern,p1,p2"
LEVELS = [0, 0.5, 1.0]


def write(folder: Path, rows: list[str], lengths: list[object]) -> Path:
    """A trace of two files; -> that of the rates."""
    rates = folder / "some_rates.csv"
    rates.write_text("\n".join([COLUMNS, *rows]))
    head = {"quantiles": LEVELS}
    (folder / "some_lengths.jsonl").write_text("\n".join(json.dumps(one) for one in [head, *lengths]))
    return rates


def lengths(client: int, start: int = 0, prompt: int = 100, output: int = 10) -> dict[str, object]:
    return {
        "c": client,
        "t": start,
        "input_tokens": [prompt, prompt * 2, prompt * 10],
        "output_tokens": [output, output * 2, output * 10],
    }


def test_a_window_has_as_many_requests_as_its_rate_says(tmp_path: Path) -> None:
    """Whatever the fitted gaps average to: here 1000 s and 1 ms."""
    rows = [
        "0,0,0.5,1,Gamma,1,1000",
        "0,600,2,1,Weibull,1,0.001",
        "7,600,0.1,1,Gamma,0.01,5",
        "7,1200,0,1,Gamma,1,1",
    ]
    path = write(tmp_path, rows, [lengths(0), lengths(7)])
    workload = read_workload(path, span=Span(duration_s=1800), strict=True)
    counts = Counter((arrival.tenant, arrival.at // 600_000_000) for arrival in workload)
    assert counts == {("client-0", 0): 300, ("client-0", 1): 1200, ("client-7", 1): 60}
    assert [arrival.at for arrival in workload] == sorted(arrival.at for arrival in workload)


@pytest.mark.parametrize(
    ("pattern", "shape", "cv"), [("Gamma", 1.0, 1.0), ("Gamma", 0.25, 2.0), ("Weibull", 0.5, 5**0.5)]
)
def test_gaps_are_distributed_as_fitted(tmp_path: Path, pattern: str, shape: float, cv: float) -> None:
    path = write(tmp_path, [f"0,0,100,{cv},{pattern},{shape},3"], [lengths(0)])
    gaps = np.diff([arrival.at for arrival in read_workload(path)])
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_lengths_are_those_of_the_client_and_the_time(tmp_path: Path) -> None:
    rows = ["0,0,10,1,Gamma,1,1", "0,21600,10,1,Gamma,1,1", "3,0,10,1,Gamma,1,1"]
    path = write(
        tmp_path,
        rows,
        [lengths(0, 21600, prompt=3000), lengths(0), {"c": 0, "t": 43200}, lengths(3, 43200, prompt=10**5)],
    )
    early = read_workload(path, span=Span(duration_s=600))
    late = read_workload(path, span=Span(start_s=21600, duration_s=600))
    own = [arrival.prompt_tokens for arrival in early if arrival.tenant == "client-0"]
    assert 100 <= min(own) < max(own) <= 1000
    # Half below the quantile of level 0.5, within five standard deviations.
    assert abs(sum(one <= 200 for one in own) - 3000) < 5 * (6000 * 0.25) ** 0.5
    assert min(arrival.prompt_tokens for arrival in late) >= 3000
    assert min(arrival.prompt_tokens for arrival in early if arrival.tenant == "client-3") >= 10**5


def test_a_request_is_the_same_in_every_span_and_another_with_another_seed(tmp_path: Path) -> None:
    path = write(tmp_path, ["0,0,1,1,Gamma,1,1", "0,600,1,1,Gamma,1,1"], [lengths(0)])
    whole = read_workload(path, span=Span(duration_s=1200))
    part = read_workload(path, span=Span(start_s=300, duration_s=600))
    inside = [one for one in whole if 300_000_000 <= one.at < 900_000_000]
    assert [one._replace(at=one.at + 300_000_000) for one in part] == inside
    assert read_workload(path, span=Span(duration_s=1200)) == whole
    assert read_workload(path, span=Span(duration_s=1200, seed=1)).arrivals != whole.arrivals


def test_clients_without_lengths_are_left_out_or_borrow_some(tmp_path: Path) -> None:
    path = write(tmp_path, ["0,0,1,1,Gamma,1,1", "5,0,2,1,Gamma,1,1"], [lengths(0), {"c": 5, "t": 0}])
    workload = read_workload(path)
    assert Counter(arrival.tenant for arrival in workload) == {"client-0": 600}
    assert [str(problem) for problem in workload.problems] == [
        f"{path}, line 3, client: 5 has no lengths: 1200 requests are missing"
    ]
    assert (workload.missing, workload.missing_share) == (1200, 1200 / 1800)
    part = read_workload(path, span=Span(start_s=300, duration_s=600))
    assert part.missing == 600
    with pytest.raises(TraceError, match="5 has no lengths"):
        read_workload(path, strict=True)
    borrowing = read_workload(path, span=Span(borrow_lengths=True))
    assert Counter(arrival.tenant for arrival in borrowing) == {"client-0": 600, "client-5": 1200}
    assert (borrowing.left_out, borrowing.missing_share) == (0, 0.0)
    assert [one for one in borrowing if one.tenant == "client-0"] == workload.arrivals


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ("0,0,-1,1,Gamma,1,1", "rate_rps"),
        ("0,0,1,1,Pareto,1,1", "pattern"),
        ("0,0,1,1,Gamma,0,1", "p1"),
        ("0,0,1,1,Gamma,1,nan", "p2"),
        ("x,0,1,1,Gamma,1,1", "client"),
        ("0,0,1,1,Gamma,1", ""),
    ],
)
def test_rows_that_cannot_be_read(tmp_path: Path, row: str, column: str) -> None:
    workload = read_workload(write(tmp_path, ["0,0,1,1,Gamma,1,1", row], [lengths(0)]))
    assert (len(workload), workload.left_out) == (600, 1)
    assert (workload.problems[0].line, workload.problems[0].column) == (3, column)


@pytest.mark.parametrize(
    "broken",
    [
        {"c": 0, "t": 600, "input_tokens": [1, 2], "output_tokens": [1, 2, 3]},
        {"c": 0, "t": 600, "input_tokens": [1, 3, 2], "output_tokens": [1, 2, 3]},
        {"c": 0, "t": 600, "input_tokens": [1, 2, 10**12], "output_tokens": [1, 2, 3]},
        {"c": 0, "t": 600, "input_tokens": ["a", 2, 3], "output_tokens": [1, 2, 3]},
        {"c": 0, "t": 600, "input_tokens": [1, [2], 3], "output_tokens": [1, 2, 3]},
        {"c": 0, "t": 600, "input_tokens": [1, 2, 3]},
    ],
)
def test_lengths_that_cannot_be_read(tmp_path: Path, broken: dict[str, object]) -> None:
    workload = read_workload(write(tmp_path, ["0,0,1,1,Gamma,1,1"], [lengths(0), broken]))
    assert (len(workload), workload.left_out) == (600, 1)
    assert workload.problems[0].file.endswith("some_lengths.jsonl")
    assert workload.problems[0].line == 3


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    path = write(tmp_path, ["0,600,1,1,Gamma,1,1"], [lengths(0)])
    with pytest.raises(TraceError, match="the trace is 1200 seconds long"):
        read_workload(path, span=Span(start_s=5000))
    with pytest.raises(TraceError, match="no requests in this span; 600 are of clients without lengths"):
        read_workload(write(tmp_path, ["5,0,1,1,Gamma,1,1"], [lengths(0)]))
    path = write(tmp_path, ["0,600,1,1,Gamma,1,1"], [lengths(0)])
    with pytest.raises(ValueError, match="longer than zero"):
        Span(duration_s=0)
    busy = write(tmp_path, [f"{client},0,99999,1,Gamma,1,1" for client in range(2)], [lengths(0), lengths(1)])
    with pytest.raises(TraceError, match="119998800 requests are in this span"):
        read_workload(busy)
    with pytest.raises(TraceError, match="no client has lengths"):
        read_workload(write(tmp_path, ["0,0,1,1,Gamma,1,1"], []))
    (tmp_path / "some_lengths.jsonl").write_text("{}")
    with pytest.raises(TraceError, match="line 1: quantiles is missing"):
        read_workload(path)
    (tmp_path / "some_lengths.jsonl").unlink()
    with pytest.raises(TraceError, match=r"some_lengths\.jsonl or some_lengths\.jsonl\.gz is missing"):
        read_workload(path)


def test_a_window_whose_gaps_are_all_too_small_to_tell(tmp_path: Path) -> None:
    path = write(tmp_path, ["0,0,0.005,9,Gamma,1e-6,1"], [lengths(0)])
    assert len(read_workload(path)) == 3


def test_a_share_of_the_requests_is_drawn_of_every_client(tmp_path: Path) -> None:
    """A client with less than one request in a window is not rounded away, and none has more than its share."""
    rows = [
        f"{client},{at},{rate},1,Gamma,1,1"
        for at in range(0, 60_000, 600)
        for client, rate in ((0, 2), (1, 0.1))
    ]
    path = write(tmp_path, rows, [lengths(0), lengths(1)])
    workload = read_workload(path, span=Span(duration_s=60_000, share=0.01))
    counts = Counter(arrival.tenant for arrival in workload)
    assert counts["client-0"] == 1200, "twelve in each window"
    assert 45 <= counts["client-1"] <= 75, "0.6 in each"
    assert len(read_workload(path, span=Span(duration_s=60_000))) == 100 * 1260
    with pytest.raises(ValueError, match="a share of its requests above 0"):
        Span(share=0)


def test_requests_without_lengths_take_those_of_others_by_their_requests(tmp_path: Path) -> None:
    rows = ["0,0,3,1,Gamma,1,1", "1,0,1,1,Gamma,1,1", "2,0,2,1,Gamma,1,1"]
    path = write(tmp_path, rows, [lengths(0, prompt=100, output=1), lengths(1, prompt=10_000, output=500)])
    workload = read_workload(path, span=Span(duration_s=600, pool_lengths=True))
    assert workload.missing == 0
    taken = [arrival for arrival in workload if arrival.tenant == "client-2"]
    assert len(taken) == 1200
    of_second = [arrival for arrival in taken if arrival.prompt_tokens >= 10_000]
    assert len(of_second) / len(taken) == pytest.approx(0.25, abs=0.05)
    assert min(arrival.output_tokens for arrival in of_second) >= 500, "prompt and answer are of one client"
    assert {arrival.prompt_tokens < 2000 for arrival in workload if arrival.tenant == "client-0"} == {True}


def test_columns_are_the_same_requests(tmp_path: Path) -> None:
    rows = ["0,0,3,1,Gamma,1,1", "1,600,1,1,Weibull,1,1", "2,0,2,1,Gamma,1,1"]
    path = write(tmp_path, rows, [lengths(0, prompt=100, output=1), lengths(1, prompt=10_000, output=500)])
    span = Span(start_s=100, duration_s=900, pool_lengths=True, share=0.5)
    found = [zip(*(column.tolist() for column in part), strict=True) for part in read_columns(path, span)]
    workload = read_workload(path, span=span)
    expected = sorted((one.at, one.prompt_tokens, one.output_tokens) for one in workload)
    assert sorted(row for part in found for row in part) == expected
    assert len(expected) > 500


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "span", "left_out"),
    [
        ("deepseek-r1", Span(start_s=36_000, duration_s=1800), 0),
        ("m-small", Span(start_s=102_000, duration_s=600), 5),
    ],
)
def test_the_public_traces(shared: Path, name: str, span: Span, left_out: int) -> None:
    path = shared / "data" / "servegen" / f"{name}_rates.csv.gz"
    workload = read_workload(path, span=span)
    expected: Counter[str] = Counter()
    with gzip.open(path, "rt", newline="") as file:
        for row in csv.DictReader(file):
            if span.start_s <= int(row["window_start_s"]) < span.start_s + span.duration_s:
                expected[f"client-{row['client']}"] += round(float(row["rate_rps"]) * 600)
    missing = sum(expected.pop(f"client-{client}", 0) for client in (1, 5, 8, 11, 38)) if left_out else 0
    assert Counter(arrival.tenant for arrival in workload) == +expected
    assert (workload.left_out, workload.missing) == (left_out, missing)
