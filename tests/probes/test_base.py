"""When a probe's word counts: thresholds, deadlines, and what may be configured."""

from __future__ import annotations

import asyncio
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.base import Hysteresis, ProbeError, ProbeResult, Target, Timing, ask


class Scripted:
    """A probe that does one thing."""

    asks = "GET /it"

    def __init__(self, outcome: object) -> None:
        self._outcome = outcome

    async def __call__(self, target: Target) -> object:
        if isinstance(self._outcome, Exception):
            raise self._outcome
        if self._outcome == "hang":
            await asyncio.Event().wait()
        return self._outcome


TARGET = Target("a", "http://127.0.0.1:1")


async def put(outcome: object, timeout_s: float = 10.0) -> ProbeResult[object]:
    return await ask(Scripted(outcome), TARGET, timeout_s)


async def test_ask_returns_what_was_learnt() -> None:
    result = await put({"x": 1})
    assert (result.ok, result.reason, result.value, result.status) == (True, "", {"x": 1}, None)
    assert result.duration_s >= 0


async def test_ask_turns_a_slow_answer_into_a_failure() -> None:
    result = await put("hang", timeout_s=0.01)
    assert (result.ok, result.reason) == (False, "GET /it: no answer within 0.01 s")


async def test_ask_keeps_the_reason_and_the_status_of_a_refusal() -> None:
    result = await put(ProbeError("503", 503))
    assert (result.ok, result.reason, result.status) == (False, "GET /it: 503", 503)


async def test_ask_counts_a_fault_of_ours_as_a_failure_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "tidegate.probes"):
        result = await put(ZeroDivisionError("oops"))
    assert (result.ok, result.reason) == (False, "GET /it: ZeroDivisionError")
    assert "probe GET /it of backend a" in caplog.text


async def test_ask_can_be_cancelled() -> None:
    task = asyncio.get_running_loop().create_task(put("hang"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def replay(results: list[bool], up: int = 2, down: int = 3) -> list[bool]:
    """State after each result."""
    hysteresis = Hysteresis(up, down)
    states = []
    for ok in results:
        hysteresis.record(ok)
        states.append(hysteresis.is_up)
    return states


@pytest.mark.parametrize(
    ("results", "states"),
    [
        ("+--+", "++++"),  # two failures are a blip
        ("+---", "+++-"),
        ("+----++", "+++---+"),
        ("+---+-+-++", "+++------+"),
        ("-", "-"),  # the first decides alone
        ("-++", "--+"),
        ("-+-++", "----+"),
    ],
)
def test_thresholds(results: str, states: str) -> None:
    assert replay([mark == "+" for mark in results]) == [mark == "+" for mark in states]


results_and_thresholds = st.tuples(st.lists(st.booleans(), min_size=1), st.integers(1, 5), st.integers(1, 5))


@given(results_and_thresholds)
def test_law_it_moves_only_after_enough_results_in_a_row(case: tuple[list[bool], int, int]) -> None:
    results, up, down = case
    hysteresis = Hysteresis(up, down)
    for index, ok in enumerate(results):
        before = hysteresis.is_up
        moved = hysteresis.record(ok)
        assert moved == (hysteresis.is_up != before)
        if moved and index:
            needed = up if hysteresis.is_up else down
            assert results[max(0, index + 1 - needed) : index + 1] == [hysteresis.is_up] * needed


@given(results_and_thresholds)
def test_law_enough_results_in_a_row_always_win(case: tuple[list[bool], int, int]) -> None:
    results, up, down = case
    assert replay([*results, *[True] * up], up, down)[-1]
    assert not replay([*results, *[False] * down], up, down)[-1]


@given(st.integers(2, 5), st.integers(2, 5), st.booleans())
def test_law_alternating_results_move_nothing(up: int, down: int, first: bool) -> None:
    assert set(replay([first, *[not first, first] * 20], up, down)) == {first}


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("timeout_s", 2.0, "shorter than the interval"),
        ("interval_s", 0.0, "positive"),
        ("metrics_idle_s", -1.0, "positive"),
        ("up", 0, "at least 1"),
        ("down", 0, "at least 1"),
        ("jitter", 1.0, "jitter"),
    ],
)
def test_impossible_timing_is_refused(field: str, value: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Timing(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://127.0.0.1:8000", ("127.0.0.1", 8000)),
        ("https://nj.example", ("nj.example", 443)),
        ("http://nj.example/llm", ("nj.example", 80)),
        ("http://[::1]:9", ("::1", 9)),
    ],
)
def test_where_a_target_is(url: str, address: tuple[str, int]) -> None:
    assert Target("a", url).address == address


@pytest.mark.parametrize("url", ["ftp://a", "127.0.0.1:8000", "http://", "http://user:geheim@a"])
def test_a_url_that_cannot_be_probed_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ValueError, match="backend a") as caught:
        Target("a", url)
    assert "geheim" not in str(caught.value)


def test_a_target_never_shows_its_key() -> None:
    assert "geheim" not in repr(Target("a", "http://a", headers={"Authorization": "Bearer geheim"}))
