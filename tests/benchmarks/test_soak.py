"""The judge of the soak finds every broken promise and only those; its clients read well; a minute of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from benchmarks import soak
from benchmarks.answers import AnswerError, ResponseReader
from benchmarks.soak_clients import _Told, tokens_of
from benchmarks.soak_verdict import Asked, Books, Growth, Held, broken, check_books, failures_of
from tests.proxy.endpoint_samples import MESSAGE_USAGE, RESPONSE_USAGE, message_events, response_events
from tests.proxy.fakes import DONE, chunked, error_event, event, usage_event

HELD = Held(files=40, threads=5, tasks=9)
FLAT = Growth(True, 900, 80.0, 80.1, 0.1)


def row(op: str, completion: int = 5, **fields: Any) -> dict[str, Any]:
    tokens = {"prompt_tokens": 7, "completion_tokens": completion, "usage_source": "reported"}
    return {"op": op, "status": 200, "outcome": "ok", "backend": "a", **tokens, **fields}


def answered(op: str, completion: int = 5, **fields: Any) -> Asked:
    return Asked("stream", op, 200, (7, completion), **{"complete": True, **fields})


def problems(asked: list[Asked], rows: list[dict[str, Any]], **generated: tuple[float, float]) -> list[str]:
    return broken(asked, check_books(asked, rows, generated), [FLAT], HELD, HELD)


def test_what_is_as_it_should_be() -> None:
    asked = [
        answered("a"),
        answered("b", complete=False, left=True, completion=3, running=True),
        answered("c", cut=True, running=True, completion=2),
        Asked("left stream", left=True),
        Asked("stranger", "z", 401, recorded=False, complete=True),
        Asked("limited", "d", 429, complete=True),
    ]
    rows = [
        row("a"),
        row("b", 4, outcome="client_gone"),
        row("c", 2, outcome="cut"),
        row("left", 0, status=0, outcome="client_gone"),
        row("d", 0, status=429, outcome="rejected", backend=""),
    ]
    assert problems(asked, rows, a=(100.0, 11.0)) == []
    assert check_books(asked, rows, {}).rows == 5


@pytest.mark.parametrize(
    ("asked", "rows", "what"),
    [
        (answered("a"), [], "missing"),
        (answered("a"), [row("a"), row("a")], "twice"),
        (answered("a"), [row("a"), row("b")], "unknown"),
        (answered("a"), [row("a", 4)], "wrong"),
        (answered("a"), [row("a", outcome="cut")], "wrong"),
        (answered("a", cut=True), [row("a")], "wrong"),
        (answered("a", cut=True, running=True), [row("a", 6, outcome="cut")], "wrong"),
        (answered("a", complete=False, left=True), [row("a", 4, outcome="client_gone")], "wrong"),
        (Asked("x", "a", 503, complete=True), [row("a", 0)], "wrong"),
    ],
)
def test_each_fault_of_the_ledger_is_found(asked: Asked, rows: list[dict[str, Any]], what: str) -> None:
    books = check_books([asked], rows, {})
    assert {name: getattr(books, name) for name in ("missing", "twice", "unknown", "wrong")}[what] == 1
    found = broken([asked, answered("good")], books, [FLAT], HELD, HELD)
    assert f"ledger: 1 {what}" in found


def test_no_more_is_billed_than_a_backend_generated() -> None:
    rows = [row("a"), row("b", 9, usage_source="estimated"), row("c", backend="elsewhere")]
    assert check_books([], rows, {"a": (7.0, 5.0)}).excess == 0
    assert check_books([], rows, {"a": (7.0, 4.0)}).excess == 1
    assert check_books([], rows, {"a": (5.0, 5.0)}).excess == 2


def test_what_clients_met_is_counted() -> None:
    asked = [Asked("stream", failure="status 404"), Asked("stream", failure="status 404"), answered("a")]
    assert failures_of(asked) == ["2 x stream: status 404"]
    assert broken([], Books(), [FLAT], HELD, HELD) == ["nothing was answered"]


def test_what_a_process_holds_at_the_end() -> None:
    assert Held(44, 11, 9).beyond(HELD) == []
    assert Held(45, 5, 9).beyond(HELD) == ["files: 45 at the end, 40 at the beginning"]
    assert Held(40, 12, 9).beyond(HELD) == ["threads: 12 at the end, 5 at the beginning"]
    assert Held(40, 5, 10, 1, 1, 1).beyond(HELD) == [
        "tasks: 10 at the end, 9 at the beginning",
        "connections: 1 at the end, 0 at the beginning",
        "exchanges: 1 at the end, 0 at the beginning",
        "queued: 1 at the end, 0 at the beginning",
    ]


def readings(seconds: int, mb_per_10_min: float) -> list[tuple[float, float]]:
    """Memory that rises at first, then evenly, with a peak now and then."""
    return [
        (float(at), 80 + min(at, 30) / 3 + at * mb_per_10_min / 600 + (at % 97 == 0) * 20)
        for at in range(seconds)
    ]


@pytest.mark.parametrize(("slope", "flat"), [(0.0, True), (0.8, True), (1.5, False), (-3.0, True)])
def test_memory_is_flat_or_grows(slope: float, flat: bool) -> None:
    growth = Growth.of(readings(1500, slope))
    assert growth.mb_per_10_min == pytest.approx(slope, abs=0.05)
    assert growth.is_flat is flat
    assert (broken([answered("a")], Books(), [growth], HELD, HELD) == []) is flat


def test_of_a_short_time_only_the_growth_is_looked_at() -> None:
    assert Growth.of(readings(150, 20.0)).is_flat
    assert not Growth.of(readings(150, 60.0)).is_flat
    young = Growth.of(readings(60, 60.0))
    assert (young.warm, young.is_flat) == (False, True)
    assert not Growth.of(readings(60, 200.0)).is_flat
    with pytest.raises(ValueError, match="too few"):
        Growth.of([(0.0, 80.0)] * 5)


# What clients read


def told(body: bytes, *, status: int = 200, kind: str = "text/event-stream", size: int = 7) -> Asked:
    one, response = Asked("x"), ResponseReader()
    reader = _Told(one)
    head = f"HTTP/1.1 {status} X\r\nx-request-id: op1\r\ncontent-type: {kind}\r\n"
    data = f"{head}transfer-encoding: chunked\r\n\r\n".encode() + chunked(body) + b"0\r\n\r\n"
    for at in range(0, len(data), size):
        reader.take(response.feed(data[at : at + size]), response)
    reader.end()
    return one


def test_whole_streams() -> None:
    chat = b"".join([event("x", completion=1), event("y", completion=5), usage_event(7, 5), DONE])
    for body in (chat, b"".join(response_events()), b"".join(message_events())):
        one = told(body)
        assert (one.op, one.status, one.tokens, one.complete, one.cut) == ("op1", 200, (7, 5), True, False)


def test_a_stream_that_says_that_it_is_cut() -> None:
    one = told(event("x", completion=1) + error_event())
    assert (one.complete, one.cut, one.tokens) == (True, True, (7, 1))
    assert told(b"".join(response_events("failed"))).cut


@pytest.mark.parametrize(
    "body",
    [
        event("x"),
        DONE + DONE,
        DONE + event("x"),
        error_event() + DONE,
        DONE[:-1],
        b"data: {\n\n" + DONE,
        b"data: []\n\n" + DONE,
    ],
)
def test_streams_without_an_honest_end(body: bytes) -> None:
    with pytest.raises(AnswerError):
        told(body)


def test_whole_answers_and_errors() -> None:
    answer = orjson.dumps({"usage": {"prompt_tokens": 7, "completion_tokens": 5}})
    assert told(answer, kind="application/json").tokens == (7, 5)
    assert told(b'{"error":{}}', status=503, kind="application/json").status == 503
    with pytest.raises(AnswerError, match="without an error"):
        told(b"{}", status=503, kind="application/json")
    with pytest.raises(AnswerError, match="no JSON"):
        told(b"<html>", status=503, kind="text/html")


def test_tokens_in_the_words_of_each_api() -> None:
    assert tokens_of({"prompt_tokens": 7, "total_tokens": 7}) == (7, 0)
    assert tokens_of(RESPONSE_USAGE) == (7, 5)
    assert tokens_of(MESSAGE_USAGE) == (7, 5)


def test_a_metric_is_summed_over_its_labels() -> None:
    page = '# HELP a\na{b="1"} 2.0\na{b="2"} 3\nab 7\na_total 9\n'
    assert (soak.metric(page, "a"), soak.metric(page, "ab"), soak.metric(page, "none")) == (5.0, 7.0, 0.0)


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_a_minute_of_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", "--minutes", "1", "--check", "--no-result"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
