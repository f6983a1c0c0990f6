"""Reading vLLM's page of metrics: figures old and new, many rows, garbage, any cut."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.active import new_session
from probes.base import Sample, Target, ask
from probes.engine import METRICS_LIMIT, Metrics, parse_metrics
from tests.probes.fake import Clock, FakeBackend, RawServer, metrics_page

NEW = b"""\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting{engine="0",model_name="m"} 5.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 5.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 638.0
vllm:prefix_cache_queries_created{engine="0",model_name="m"} 1.7954556714636445e+09
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 319.0
vllm:cache_config_info{block_size="128",kv_cache_max_concurrency="22.75",num_gpu_blocks="364"} 1.0
http_requests_total{handler="/v1/models"} 1.0
"""

OLD = b"""\
vllm:num_requests_running{model_name="m"} 3.0
vllm:num_requests_waiting{model_name="m"} 5.0
vllm:gpu_cache_usage_perc{model_name="m"} 0.25
vllm:gpu_prefix_cache_queries{model_name="m"} 638.0
vllm:gpu_prefix_cache_hits{model_name="m"} 319.0
vllm:cache_config_info{block_size="16",num_gpu_blocks="364"} 1.0
"""


def test_new_names() -> None:
    assert parse_metrics(NEW, 7.0) == Sample(
        at=7.0,
        running=3,
        waiting=5,
        kv_use=0.25,
        max_concurrency=22.75,
        kv_tokens=364 * 128,
        prefix_queries=638,
        prefix_hits=319,
    )


def test_old_names() -> None:
    assert parse_metrics(OLD, 7.0) == Sample(
        at=7.0,
        running=3,
        waiting=5,
        kv_use=0.25,
        max_concurrency=None,
        kv_tokens=364 * 16,
        prefix_queries=638,
        prefix_hits=319,
    )


def test_both_names_count_once() -> None:
    sample = parse_metrics(
        OLD.replace(b"gpu_cache_usage_perc{model_name", b"num_other{model_name") + NEW, 0.0
    )
    assert sample is not None
    assert (sample.prefix_queries, sample.prefix_hits, sample.kv_use) == (638, 319, 0.25)
    page = b"vllm:gpu_cache_usage_perc 0.9\nvllm:kv_cache_usage_perc 0.25\n"
    sample = parse_metrics(page, 0.0)
    assert sample is not None
    assert sample.kv_use == 0.25


def test_many_ranks_and_models_are_summed_and_the_fullest_cache_counts() -> None:
    page = b"".join(
        b'vllm:num_requests_running{engine="%d",model_name="m"} %d\n'
        b'vllm:num_requests_waiting{engine="%d",model_name="m"} %d\n'
        b'vllm:kv_cache_usage_perc{engine="%d",model_name="m"} 0.%d\n'
        b'vllm:cache_config_info{engine="%d",kv_cache_max_concurrency="4.5",kv_cache_size_tokens="700"} 1.0\n'
        % (rank, rank + 1, rank, rank, rank, 9 - rank, rank)
        for rank in range(4)
    )
    assert parse_metrics(page, 0.0) == Sample(
        at=0.0, running=10, waiting=6, kv_use=0.9, max_concurrency=18.0, kv_tokens=2800
    )


@pytest.mark.parametrize(
    "line",
    [
        b"vllm:num_requests_running 4",
        b"vllm:num_requests_running{} 4",
        b'vllm:num_requests_running{model_name="a b} 9 {c"} 4',
        b'vllm:num_requests_running{model_name="quote \\" brace } comma , 9"} 4',
        b'vllm:num_requests_running{model_name="m"}\t4.0e0 1795455672000',
        b'vllm:num_requests_running{model_name="m"} 4 # {trace="x"} 0.67',
        b'vllm:num_requests_running{model_name="m"} 4\r',
    ],
)
def test_odd_but_legal_lines(line: bytes) -> None:
    sample = parse_metrics(b"# x\n" + line + b"\nother 1\n", 0.0)
    assert sample is not None
    assert sample.running == 4


@pytest.mark.parametrize(
    "line",
    [
        b"vllm:num_requests_running NaN",
        b"vllm:num_requests_running +Inf",
        b"vllm:num_requests_running -1",
        b"vllm:num_requests_running 1e400",
        b"vllm:num_requests_running 1e300",
        b"vllm:num_requests_running 1_0",
        b"vllm:num_requests_running 0x10",
        b"vllm:num_requests_running 1.2.3",
        b"vllm:num_requests_running " + b"9" * 100,
        b"vllm:num_requests_running",
        b"vllm:num_requests_running_total 4",
        b"xvllm:num_requests_running 4",
        b" vllm:num_requests_running 4",
        b'vllm:num_requests_running{model_name="m} 4',
        b'# vllm:num_requests_running{model_name="m"} 4',
        b'# a comment\tvllm:num_requests_running{model_name="m"} 4',
    ],
)
def test_what_makes_no_sense_is_left_out(line: bytes) -> None:
    assert parse_metrics(line + b"\n", 0.0) is None
    sample = parse_metrics(b"vllm:num_requests_running 2\n" + line + b"\nvllm:num_requests_waiting 3\n", 0.0)
    assert sample is not None
    assert (sample.running, sample.waiting) == (2, 3)


def test_kv_use_is_at_most_one() -> None:
    sample = parse_metrics(b"vllm:kv_cache_usage_perc 37.0\n", 0.0)
    assert sample is not None
    assert sample.kv_use == 1.0


def test_a_page_without_an_engines_load_is_no_sample() -> None:
    assert parse_metrics(b"", 0.0) is None
    assert parse_metrics(b"process_open_fds 34.0\nvllm:prefix_cache_hits_total 3\n", 0.0) is None


@given(st.integers(0, len(NEW)))
def test_law_a_cut_page_reads_as_its_whole_lines(cut: int) -> None:
    whole = NEW[:cut][: NEW[:cut].rfind(b"\n") + 1]
    assert parse_metrics(NEW[:cut], 0.0) == parse_metrics(whole, 0.0)


FRAGMENTS = [
    b"vllm:num_requests_running",
    b"vllm:cache_config_info",
    b"{",
    b"}",
    b'"',
    b"\\",
    b"\n",
    b" ",
    b"1e9",
]


@given(
    st.one_of(st.binary(), st.lists(st.sampled_from([*FRAGMENTS, b"NaN", b"-", b"=", b","])).map(b"".join))
)
def test_law_nothing_raises_and_figures_stay_in_their_bounds(page: bytes) -> None:
    sample = parse_metrics(page, 0.0)
    if sample is not None:
        assert sample.running >= 0
        assert sample.waiting >= 0
        assert 0.0 <= sample.kv_use <= 1.0


@given(
    st.integers(0, 500), st.integers(0, 500), st.floats(0, 1), st.lists(st.binary(max_size=40), max_size=20)
)
def test_law_other_lines_change_nothing(
    running: int, waiting: int, kv_use: float, others: list[bytes]
) -> None:
    noise = b"".join(b"x" + line.replace(b"\n", b"") + b"\n" for line in others)
    page = metrics_page(running, waiting, kv_use)
    assert parse_metrics(noise + page + noise, 1.0) == parse_metrics(page, 1.0)


@pytest.mark.parametrize(
    "unit", [b'vllm:num_requests_running{a="', b"vllm:num_requests_running{", b"{}", b'\\"', b'"']
)
def test_huge_lines_are_read_in_linear_time(unit: bytes) -> None:
    # Backtracking over a megabyte would take hours: the suite's time limit is the assertion.
    page = b'vllm:num_requests_running{a="' + unit * (METRICS_LIMIT // len(unit))
    assert parse_metrics(page, 0.0) is None


async def scrape(url: str) -> tuple[Sample | None, str]:
    async with new_session() as session:
        result = await ask(Metrics(session, Clock(5.0)), Target("a", url), 30.0)
    return result.value, result.reason


async def test_scraping_notes_when_it_asked() -> None:
    async with FakeBackend(metrics=NEW) as backend:
        assert await scrape(backend.url) == (parse_metrics(NEW, 5.0), "")


async def test_a_whole_page_needs_no_last_line_end() -> None:
    async with FakeBackend(metrics=b"vllm:num_requests_running 12") as backend:
        sample, _ = await scrape(backend.url)
    assert sample is not None
    assert sample.running == 12


async def test_other_servers_have_no_figures() -> None:
    async with FakeBackend(metrics=404) as backend:
        assert await scrape(backend.url) == (None, "GET /metrics: 404")
    async with FakeBackend(metrics=b"<html>") as backend:
        assert await scrape(backend.url) == (None, "GET /metrics: no figures of vLLM's on the page")


async def test_a_page_that_is_cut_or_endless_is_none() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"
    async with RawServer(head + b"vllm:num_requests_running 1") as url:
        assert await scrape(url) == (None, "GET /metrics: answer cut short")
    async with FakeBackend(metrics=b"x" * (METRICS_LIMIT + 1)) as backend:
        assert await scrape(backend.url) == (None, f"GET /metrics: answer longer than {METRICS_LIMIT} bytes")


async def test_nobody_there() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert await scrape(f"http://127.0.0.1:{closed.getsockname()[1]}") == (
            None,
            "GET /metrics: Connection refused",
        )


CAPTURES = Path(__file__).parents[3] / "shared" / "vllm" / "captures"


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("metrics.txt", (0, 0, 22.75, 638.0)),
        ("smollm2/metrics.response.http", (0, 0, 22.75, 638.0)),
        ("tiny_die/metrics_queueing.txt", (2, 4, 1024.0, 39.0)),
    ],
)
def test_pages_of_a_real_vllm(name: str, figures: tuple[int, int, float, float]) -> None:
    path = CAPTURES / name
    if not path.exists():
        pytest.skip(f"{name}: no captures of a real vLLM beside this checkout")
    sample = parse_metrics(path.read_bytes(), 0.0)
    assert sample is not None
    assert (sample.running, sample.waiting, sample.max_concurrency, sample.prefix_queries) == figures
