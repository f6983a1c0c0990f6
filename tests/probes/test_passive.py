"""Which endings count against a backend, and how long it is left alone when it says that it is full."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime, formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.base import Outcome, RequestFacts
from policies.state import Backend, Fleet
from probes.passive import (
    BACKOFF_DEFAULT_S,
    BACKOFF_MAX_S,
    AttemptError,
    backoff_s,
    outcome_of,
    tried_elsewhere,
)

OK, FAILED, IGNORED = Outcome.OK, Outcome.FAILED, Outcome.IGNORED


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (AttemptError.CONNECT, FAILED),
        (AttemptError.TLS, FAILED),
        (AttemptError.RESET, FAILED),
        (AttemptError.FIRST_TOKEN_TIMEOUT, FAILED),
        (AttemptError.STALLED, FAILED),
        (AttemptError.MALFORMED, FAILED),
        (AttemptError.ERROR_EVENT, FAILED),
        (AttemptError.STALE_CONNECTION, IGNORED),
        (AttemptError.CLIENT_GONE, IGNORED),
        (AttemptError.CLIENT_SLOW, IGNORED),
        (AttemptError.DEADLINE, IGNORED),
        (AttemptError.SHUTDOWN, IGNORED),
    ],
)
def test_errors(error: AttemptError, outcome: Outcome) -> None:
    assert outcome_of(error) is outcome


def test_every_error_has_its_row_above() -> None:
    marks = test_errors.pytestmark  # type: ignore[attr-defined]
    assert {row[0] for row in marks[0].args[1]} == set(AttemptError)


@pytest.mark.parametrize(
    ("status", "retry_after", "outcome"),
    [
        (200, False, OK),
        (204, False, OK),
        (101, False, IGNORED),
        (307, False, IGNORED),
        (400, False, IGNORED),
        (401, False, IGNORED),
        (404, False, IGNORED),
        (408, False, IGNORED),
        (429, False, IGNORED),
        (429, True, IGNORED),
        (500, False, FAILED),
        (500, True, FAILED),
        (501, False, IGNORED),
        (502, False, FAILED),
        (503, False, FAILED),
        (503, True, IGNORED),
        (504, False, FAILED),
        (529, False, FAILED),
    ],
)
def test_statuses(status: int, retry_after: bool, outcome: Outcome) -> None:
    assert outcome_of(status, retry_after) is outcome


@given(st.integers(400, 499), st.booleans())
def test_law_no_4xx_counts_against_a_backend(status: int, retry_after: bool) -> None:
    assert outcome_of(status, retry_after) is IGNORED


def test_what_another_backend_may_answer_better() -> None:
    found = {status for status in range(100, 600) if tried_elsewhere(status)}
    assert found == {*range(300, 400), 401, 403, 408, 429, *range(500, 600)}


@given(st.integers(100, 999), st.booleans())
def test_law_whatever_counts_against_a_backend_is_tried_elsewhere(status: int, retry_after: bool) -> None:
    assert tried_elsewhere(status) or outcome_of(status, retry_after) is not FAILED


WALL = datetime(2026, 11, 23, 17, 41, tzinfo=UTC)


@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [
        (None, BACKOFF_DEFAULT_S),
        ("3", 3.0),
        (" 3 ", 3.0),
        ("0", 0.0),
        ("86400", BACKOFF_MAX_S),
        ("9" * 5000, BACKOFF_MAX_S),
        ("0" * 20 + "5", 0.0),
        (format_datetime(WALL + timedelta(seconds=7), usegmt=True), 7.0),
        (format_datetime(WALL - timedelta(seconds=7), usegmt=True), 0.0),
        (format_datetime(WALL + timedelta(days=7), usegmt=True), BACKOFF_MAX_S),
        ("soon", BACKOFF_DEFAULT_S),
        ("", BACKOFF_DEFAULT_S),
        ("-5", BACKOFF_DEFAULT_S),
        ("1.5", BACKOFF_DEFAULT_S),
        ("٣", BACKOFF_DEFAULT_S),
    ],
)
def test_how_long(retry_after: str | None, seconds: float) -> None:
    assert backoff_s(429, retry_after, WALL.timestamp()) == seconds


@pytest.mark.parametrize(("status", "retry_after"), [(503, None), (500, "3"), (200, "3"), (404, "3")])
def test_no_reason_to_back_off(status: int, retry_after: str | None) -> None:
    assert backoff_s(status, retry_after, 0.0) == 0.0


@given(st.text(), st.floats(0, 4e9))
def test_law_any_value_gives_a_short_time(text: str, wall: float) -> None:
    assert 0.0 <= backoff_s(503, text, wall) <= BACKOFF_MAX_S


@given(st.integers(0, 4_000_000_000), st.integers(0, 4_000_000_000))
def test_law_any_date_gives_a_short_time(then: int, wall: int) -> None:
    assert backoff_s(429, formatdate(then, usegmt=True), float(wall)) == min(
        max(then - wall, 0.0), BACKOFF_MAX_S
    )


def test_a_full_backend_rests_and_its_breaker_stays_closed() -> None:
    fleet = Fleet([Backend(name="a", models=frozenset("m"))])
    for _ in range(20):
        lease = fleet.lease(RequestFacts(id="r", model="m"), "a", 100.0)
        fleet.release(lease, outcome_of(503, retry_after=True), 100.0)
    assert fleet.back_off("a", 3.0, 100.0)
    assert not fleet["a"].available
    assert not fleet.back_off("a", 1.0, 100.5)  # a shorter one does not cut a longer one
    assert not fleet.refresh(102.9)
    assert fleet.refresh(103.0)
    assert fleet["a"].available
    assert fleet["a"].breaker.state(103.0) == "closed"
