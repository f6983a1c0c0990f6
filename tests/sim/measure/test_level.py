"""Figures of a level, against ones computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.measure.level import Level, RequestRecord, Summary
from sim.measure.wire import Answer
from tests.sim.measure.fake_server import record, records


def test_a_record_measures_from_sending() -> None:
    answer = Answer()
    answer.first_at, answer.last_at, answer.prompt_tokens, answer.output_tokens = 10.5, 12.5, 7, 5
    found = RequestRecord.of(answer, sent_at=10.0, began_at=8.0)
    assert found == RequestRecord(2.0, 0.5, 0.5, 2.5, 7, 5, None, "")


@pytest.mark.parametrize("tokens", [1, None])
def test_one_token_has_no_time_to_the_next(tokens: int | None) -> None:
    answer = Answer()
    answer.first_at = answer.last_at = 1.0
    answer.output_tokens = tokens
    assert RequestRecord.of(answer, 0.0, 0.0).tpot_s is None


def test_figures_by_hand() -> None:
    requests = records([(0.0, 0.2, 1.2, 11), (0.0, 0.4, 2.4, 11), (1.5, 0.3, 1.1, 5)])
    level = Level.of(2, requests, duration_s=3.0, cpu_s=0.3)
    assert (level.completed, level.failed, level.errors) == (3, 0, {})
    assert (level.prompt_tokens, level.output_tokens) == (300, 27)
    assert level.output_tokens_per_s == pytest.approx(9.0)
    assert level.output_tokens_per_s_per_user == pytest.approx(4.5)
    assert level.requests_per_s == pytest.approx(1.0)
    assert level.request_output_tokens_per_s == pytest.approx((11 / 1.2 + 11 / 2.4 + 5 / 1.1) / 3)
    assert level.ttft_s is not None
    assert level.tpot_s is not None
    assert level.e2e_s is not None
    assert level.ttft_s.mean == pytest.approx(0.3)
    assert level.tpot_s.mean == pytest.approx((0.1 + 0.2 + 0.2) / 3)
    assert (level.ttft_s.p50, level.ttft_s.p90) == pytest.approx((0.3, 0.38))
    assert level.tpot_s.p50 == pytest.approx(0.2)
    assert level.e2e_s.p99 == pytest.approx(1.2 + 0.98 * 1.2)
    assert level.client_cpu == pytest.approx(0.1)


def test_steady_throughput_ends_with_the_last_request() -> None:
    # At 1.5 s the first has its 11 tokens; the second, 1.1 s after its first token, 1 + 10 * 1.1/2 of them.
    requests = records([(0.0, 0.2, 1.2, 11), (0.0, 0.4, 2.4, 11), (1.5, 0.3, 1.1, 5)])
    assert Level.of(2, requests, 3.0).steady_output_tokens_per_s == pytest.approx((11 + 6.5) / 1.5)


def test_without_a_second_round_nothing_is_steady() -> None:
    requests = records([(0.0, 0.2, 1.2, 11), (0.001, 0.4, 2.4, 11)])
    assert Level.of(2, requests, 3.0).steady_output_tokens_per_s is None


def test_failures_are_counted_and_change_no_figure() -> None:
    good = records([(0.0, 0.2, 1.2, 11), (1.2, 0.2, 1.2, 11)])
    bad = [
        record(error="status 500: no"),
        record(ttft=99.0, e2e=100.0, error="the stream was cut"),
        record(ttft=None, e2e=None, tokens=None, prompt=None, error="status 500: no"),
    ]
    clean, mixed = Level.of(1, good, 3.0), Level.of(1, good + bad, 3.0)
    assert (mixed.completed, mixed.failed) == (2, 3)
    assert mixed.errors == {"status 500: no": 2, "the stream was cut": 1}
    assert mixed.ttft_s == clean.ttft_s
    assert mixed.tpot_s == clean.tpot_s
    assert mixed.output_tokens_per_s == clean.output_tokens_per_s


def test_a_level_in_which_everything_failed_has_no_figures() -> None:
    level = Level.of(4, [record(ttft=None, e2e=None, tokens=None, error="timeout")], 1.0)
    assert (level.ttft_s, level.tpot_s, level.e2e_s, level.request_output_tokens_per_s) == (None,) * 4
    assert level.output_tokens_per_s == 0.0


def test_a_level_takes_time() -> None:
    with pytest.raises(ValueError, match="takes time"):
        Level.of(1, [], 0.0)


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_percentiles_are_in_order_and_within_the_values(values: list[float]) -> None:
    found = Summary.of(values)
    assert found is not None
    assert min(values) <= found.p50 <= found.p90 <= found.p99 <= max(values)
    assert found.p50 == pytest.approx(float(np.median(values)))


@given(st.floats(0, 1), st.floats(0, 10), st.integers(1, 100), st.lists(st.floats(-1, 15), min_size=2))
def test_tokens_only_become_more(ttft: float, rest: float, tokens: int, times: list[float]) -> None:
    one = record(0.0, ttft, ttft + rest, tokens)
    counts = [one.tokens_by(at) for at in sorted(times)]
    assert counts == sorted(counts)
    assert one.tokens_by(ttft + rest) == tokens
    assert one.tokens_by(-1.0) == 0
