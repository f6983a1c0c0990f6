from __future__ import annotations

from collections import Counter
from dataclasses import asdict

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.records import (
    COLUMNS,
    DETAIL,
    FIELDS,
    HEAD,
    MOST_NANO,
    MOST_TOKENS,
    OperationIds,
    Row,
    from_head,
    from_values,
    to_head,
    to_values,
)
from tests.proxy.rows import a_row


def test_every_field_is_saved_once() -> None:
    saved = Counter((*COLUMNS, *DETAIL))
    assert set(saved) - {"arrived_us"} == set(FIELDS) - {"arrived"}
    assert set(saved.values()) == {1}


def test_a_row_comes_back_whole() -> None:
    row = a_row()
    assert from_values(to_values(row)) == row
    assert from_values(orjson.loads(orjson.dumps(to_values(row)))) == row


def test_a_row_of_defaults_comes_back_whole() -> None:
    row = from_values(to_values(Row("x")))
    row.prefix, row.candidates = tuple(row.prefix), tuple(row.candidates)
    assert row == Row("x")


def test_the_head_says_whose_request_it_was() -> None:
    row = a_row()
    head = from_head(orjson.loads(orjson.dumps(to_head(row))))
    assert {name: getattr(head, name) for name in HEAD} == {name: getattr(row, name) for name in HEAD}
    assert {getattr(head, name) for name in FIELDS if name.endswith("_tokens") and name != "max_tokens"} == {
        0
    }


def test_an_older_row_with_fewer_details_takes_defaults() -> None:
    values = list(to_values(a_row()))
    values[-1] = orjson.dumps(orjson.loads(values[-1])[:-5]).decode()
    row = from_values(values)
    assert (row.queue_s, row.overhead_s, row.hedge) == (0.0, 0.0, "")
    assert (row.audio_s, row.unmetered) == (None, "")
    assert row.body_bytes == 1100


@given(st.floats(min_value=0, max_value=4e9))
def test_arrival_is_kept_to_the_microsecond(arrived: float) -> None:
    assert from_values(to_values(a_row(arrived=arrived))).arrived == pytest.approx(arrived, abs=1e-6, rel=0)


@given(st.sampled_from(["queue_s", "ttft_s", "total_s", "overhead_s"]), st.floats(min_value=0, max_value=1e5))
def test_times_are_kept_to_the_microsecond_and_no_further(name: str, seconds: float) -> None:
    kept = getattr(from_values(to_values(a_row(**{name: seconds}))), name)
    assert kept == pytest.approx(seconds, abs=0.6e-6, rel=0)
    assert kept == round(kept, 6)


@given(st.sampled_from([name for name in FIELDS if name.endswith("_tokens")]), st.integers())
def test_token_counts_are_bounded(name: str, count: int) -> None:
    row = from_values(to_values(a_row(**{name: count})))
    if name in COLUMNS:
        assert getattr(row, name) == max(0, min(count, MOST_TOKENS))
    assert orjson.dumps(to_values(row))


def test_cost_is_bounded() -> None:
    assert from_values(to_values(a_row(cost_nano=2**70))).cost_nano == MOST_NANO
    assert from_values(to_values(a_row(cost_nano=-1))).cost_nano == 0


def test_foreign_values_are_made_to_fit() -> None:
    row = a_row(
        prompt_tokens=np.int64(7),
        ttft_s=np.float64(0.5),
        candidates=[[np.float64(1.5), np.int64(3)]],
        model="half \ud800 a pair",
        max_tokens=2**80,
        rule=b"bytes",
    )
    back = from_values(orjson.loads(orjson.dumps(to_values(row))))
    assert (back.prompt_tokens, back.ttft_s, back.candidates) == (7, 0.5, [[1.5, 3]])
    assert (back.model, back.max_tokens, back.rule) == ("half ? a pair", 2**63 - 1, "b'bytes'")


def test_making_values_leaves_the_row_alone() -> None:
    row = a_row(prompt_tokens=2**40)
    before = asdict(row)
    to_values(row)
    assert asdict(row) == before


@given(st.lists(st.floats(min_value=-5000, max_value=5000), max_size=50))
def test_operation_ids_grow_whatever_the_clock_does(jumps: list[float]) -> None:
    moments = iter([1.7e9, *(1.7e9 + jump for jump in jumps)])
    ids = OperationIds(lambda: next(moments))
    minted = [ids.mint() for _ in range(len(jumps) + 1)]
    assert minted == sorted(set(minted))
    assert {len(op) for op in minted} == {25}


def test_operation_ids_within_a_millisecond_do_not_run_out() -> None:
    ids = OperationIds(lambda: 1.7e9)
    minted = [ids.mint() for _ in range(10_000)]
    assert minted == sorted(set(minted))


def test_operation_ids_of_two_processes_at_one_moment_differ() -> None:
    one, other = OperationIds(lambda: 1.7e9), OperationIds(lambda: 1.7e9)
    assert one.mint() != other.mint()
