from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from math import ceil
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.access.keys import Key
from proxy.access.limits import Limits, Refusal, Reservation, month_bounds

NOVEMBER = datetime(2025, 11, 10, 12, tzinfo=UTC).timestamp()
DECEMBER = datetime(2025, 12, 1, tzinfo=UTC).timestamp()


def key(**limits: Any) -> Key:
    return Key(id="abcdefghij", tenant="acme", **limits)


def admit(
    limits: Limits, of: Key, tokens: int = 0, cost: int = 0, now: float = 0.0, wall: float = NOVEMBER
) -> Reservation:
    answer = limits.admit(of, tokens, cost, now, wall)
    assert isinstance(answer, Reservation), answer
    return answer


def refuse(
    limits: Limits, of: Key, tokens: int = 0, cost: int = 0, now: float = 0.0, wall: float = NOVEMBER
) -> Refusal:
    answer = limits.admit(of, tokens, cost, now, wall)
    assert isinstance(answer, Refusal)
    return answer


# -- laws, for any sequence of admissions, ends and clocks


@dataclass
class Admit:
    tokens: int
    cost: int


@dataclass
class Settle:
    which: int
    tokens: int
    cost: int


@dataclass
class Clock:
    seconds: float


operations = st.lists(
    st.one_of(
        st.builds(Admit, st.integers(0, 120), st.integers(0, 60)),
        st.builds(Settle, st.integers(0, 20), st.integers(0, 160), st.integers(0, 80)),
        st.builds(
            Clock, st.floats(-10, 70) | st.sampled_from([0.25, 0.5, 1.0, 59.25, 59.75, 60.0, 60.5, 61.0])
        ),
    ),
    max_size=60,
)


@dataclass
class Held:
    reservation: Reservation
    tokens: int
    cost: int
    charge: list[float]


class Model:
    """Keeps every use with its exact time, as `Limits` does not."""

    def __init__(self) -> None:
        self.requests: list[float] = []
        self.charges: list[list[float]] = []
        """[time, tokens], changed when a request gives back."""
        self.request_clock = 0.0
        self.token_clock = 0.0
        self.spent = 0
        self.held: list[Held] = []

    def requests_since(self, seconds: float) -> int:
        return sum(1 for at in self.requests if at >= self.request_clock - seconds)

    def tokens_since(self, seconds: float) -> float:
        return sum(tokens for at, tokens in self.charges if at >= self.token_clock - seconds)

    @property
    def committed(self) -> int:
        return self.spent + sum(held.cost for held in self.held)


@given(
    operations,
    st.none() | st.integers(1, 8),
    st.none() | st.integers(1, 400),
    st.none() | st.integers(1, 4),
    st.none() | st.integers(1, 300),
)
def test_laws_of_admission(
    steps: list[Admit | Settle | Clock],
    rpm: int | None,
    tpm: int | None,
    concurrency: int | None,
    budget: int | None,
) -> None:
    limits = Limits(NOVEMBER)
    limited = key(rpm=rpm, tpm=tpm, concurrency=concurrency, budget_nano=budget)
    model = Model()
    now = 100.0
    for step in steps:
        if isinstance(step, Clock):
            now += step.seconds
        elif isinstance(step, Admit):
            model.request_clock = max(model.request_clock, now)
            model.token_clock = max(model.token_clock, now)
            # What must be refused: a minute is full. What must not: even a second more of the past would fit.
            over = (
                (concurrency is not None and len(model.held) >= concurrency)
                or (rpm is not None and model.requests_since(60) + 1 > rpm)
                or (tpm is not None and model.tokens_since(60) + step.tokens > tpm)
                or (budget is not None and model.committed + max(step.cost, 1) > budget)
            )
            fits = (
                (concurrency is None or len(model.held) < concurrency)
                and (rpm is None or model.requests_since(61) + 1 <= rpm)
                and (tpm is None or model.tokens_since(61) + step.tokens <= tpm)
                and (budget is None or model.committed + max(step.cost, 1) <= budget)
            )
            answer = limits.admit(limited, step.tokens, step.cost, now, NOVEMBER)
            if isinstance(answer, Refusal):
                assert not fits, answer
                continue
            assert not over
            model.requests.append(model.request_clock)
            charge = [model.token_clock, step.tokens]
            model.charges.append(charge)
            model.held.append(Held(answer, step.tokens, step.cost, charge))
        elif model.held:
            held = model.held.pop(step.which % len(model.held))
            limits.settle(held.reservation, step.tokens, step.cost, now)
            limits.settle(held.reservation, 10**6, 10**6, now)  # a second time: nothing
            model.spent += step.cost
            if step.tokens <= held.tokens:
                held.charge[1] = step.tokens
            elif tpm is not None:
                model.token_clock = max(model.token_clock, now)
                model.charges.append([model.token_clock, step.tokens - held.tokens])
        usage = limits.usage(limited, NOVEMBER)
        if rpm or tpm or concurrency or budget:
            assert usage.running == len(model.held)
        if budget is not None:
            assert usage.month.spent == model.spent
            assert usage.month.spent + usage.month.reserved == model.committed
        for window in (usage.requests, usage.tokens):
            assert window.total == sum(window.by_second.values())
            assert list(window.by_second) == sorted(window.by_second)
            assert len(window.by_second) <= 61
            assert all(used > 0 for used in window.by_second.values())
    for held in model.held:
        limits.settle(held.reservation, 0, 0, now)
    assert limits.usage(limited, NOVEMBER).running == 0
    assert limits.usage(limited, NOVEMBER).month.reserved == 0


@given(
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50)), max_size=30),
    st.integers(1, 120),
    st.integers(1, 10),
    st.integers(1, 100),
)
def test_a_request_that_waits_as_advised_is_admitted(
    uses: list[tuple[float, int]], tokens: int, rpm: int, tpm: int
) -> None:
    limits = Limits(NOVEMBER)
    limited = key(rpm=rpm, tpm=tpm)
    now = 0.0
    for pause, used in uses:
        now += pause
        limits.admit(limited, used, 0, now, NOVEMBER)
    answer = limits.admit(limited, tokens, 0, now, NOVEMBER)
    if isinstance(answer, Refusal):
        if answer.retry_after_s is None:
            assert tokens > tpm
        else:
            assert 0 < answer.retry_after_s <= 61
            admit(limits, limited, tokens, now=now + ceil(answer.retry_after_s))


@given(
    st.lists(st.sampled_from([0.25, 0.75, 1.0, 20.0, 59.25, 59.75, 60.25]), max_size=40), st.integers(1, 3)
)
def test_no_span_of_60_seconds_holds_more_than_the_limit(pauses: list[float], rpm: int) -> None:
    limits = Limits(NOVEMBER)
    limited = key(rpm=rpm)
    now = 0.0
    admitted: list[float] = []
    for pause in pauses:
        now += pause
        if isinstance(limits.admit(limited, 0, 0, now, NOVEMBER), Reservation):
            admitted.append(now)
        else:
            assert now - admitted[-rpm] < 61, "a minute and a second later it must pass"
    for earlier, later in zip(admitted, admitted[rpm:], strict=False):
        assert later - earlier > 60


# -- one thing at a time


def test_the_whole_limit_may_be_used_at_once_and_comes_back_a_minute_later() -> None:
    limits = Limits(NOVEMBER)
    limited = key(rpm=3)
    for _ in range(3):
        admit(limits, limited, now=10.9)
    refusal = refuse(limits, limited, now=10.9)
    assert refusal.code == "rate_limit_requests"
    assert refusal.retry_after_s == pytest.approx(60.1)
    refuse(limits, limited, now=70.999)
    admit(limits, limited, now=71.0)


def test_a_refused_request_uses_nothing() -> None:
    limits = Limits(NOVEMBER)
    limited = key(rpm=10, tpm=100, concurrency=5, budget_nano=50)
    held = admit(limits, limited, tokens=60, cost=20)
    for tokens, cost in ((50, 0), (0, 31)):
        refuse(limits, limited, tokens=tokens, cost=cost)
    usage = limits.usage(limited, NOVEMBER)
    assert (usage.requests.total, usage.tokens.total, usage.running, usage.month.reserved) == (1, 60, 1, 20)
    limits.settle(held, 60, 20, 0.0)
    assert usage.running == 0


def test_tokens_not_used_are_given_back() -> None:
    limits = Limits(NOVEMBER)
    limited = key(tpm=100)
    held = admit(limits, limited, tokens=90)
    assert refuse(limits, limited, tokens=20).code == "rate_limit_tokens"
    limits.settle(held, 80, 0, now=1.0)
    admit(limits, limited, tokens=20, now=1.0)


def test_tokens_that_left_the_window_are_not_given_back_twice() -> None:
    limits = Limits(NOVEMBER)
    limited = key(tpm=100)
    held = admit(limits, limited, tokens=100, now=0.0)
    admit(limits, limited, tokens=100, now=61.0)
    limits.settle(held, 0, 0, now=62.0)
    refuse(limits, limited, tokens=1, now=62.0)


def test_overshoot_is_the_excess_of_the_request_that_overshot() -> None:
    limits = Limits(NOVEMBER)
    limited = key(tpm=100)
    first, second = admit(limits, limited, tokens=50), admit(limits, limited, tokens=50)
    limits.settle(first, 50, 0, now=30.0)
    limits.settle(second, 75, 0, now=30.0)
    assert limits.usage(limited, NOVEMBER).tokens.total == 125
    # The excess counts from the end of the request, for a minute like any other use.
    assert refuse(limits, limited, tokens=80, now=61.0).retry_after_s == 30.0
    admit(limits, limited, tokens=75, now=61.0)


def test_a_request_larger_than_the_limit_is_told_that_waiting_is_vain() -> None:
    limits = Limits(NOVEMBER)
    refusal = refuse(limits, key(tpm=100), tokens=101)
    assert (refusal.code, refusal.retry_after_s) == ("rate_limit_tokens", None)
    assert "101" in refusal.message
    assert "100" in refusal.message
    refusal = refuse(limits, key(budget_nano=100), cost=101)
    assert (refusal.code, refusal.retry_after_s) == ("budget", None)


def test_concurrency() -> None:
    limits = Limits(NOVEMBER)
    limited = key(concurrency=2)
    first = admit(limits, limited)
    admit(limits, limited)
    refusal = refuse(limits, limited)
    assert (refusal.code, refusal.retry_after_s) == ("concurrency", 1.0)
    limits.settle(first, 0, 0, 0.0)
    limits.settle(first, 0, 0, 0.0)
    admit(limits, limited)
    refuse(limits, limited)


def test_the_advice_is_that_of_the_longest_wait() -> None:
    limits = Limits(NOVEMBER)
    limited = key(rpm=1, concurrency=1, budget_nano=10)
    held = admit(limits, limited, cost=5)
    assert refuse(limits, limited, cost=5).code == "rate_limit_requests"
    limits.settle(held, 0, 10, 0.0)
    refusal = refuse(limits, limited, cost=5)
    assert refusal.code == "budget"
    assert refusal.retry_after_s == DECEMBER - NOVEMBER


def test_budget_is_exact_to_the_nano() -> None:
    limits = Limits(NOVEMBER)
    limited = key(budget_nano=50_000_000_001)
    limits.settle(admit(limits, limited, cost=50_000_000_000), 0, 50_000_000_000, 0.0)
    assert refuse(limits, limited, cost=2).code == "budget"
    limits.settle(admit(limits, limited, cost=1), 0, 1, 0.0)
    assert refuse(limits, limited, cost=0).code == "budget"


def test_budget_that_is_only_reserved_may_come_back_soon() -> None:
    limits = Limits(NOVEMBER)
    limited = key(budget_nano=100)
    held = admit(limits, limited, cost=90)
    assert refuse(limits, limited, cost=20).retry_after_s == 1.0
    limits.settle(held, 0, 80, 0.0)
    admit(limits, limited, cost=20)


def test_a_new_month_begins_with_nothing_spent_and_old_requests_count_in_the_old_one() -> None:
    limits = Limits(NOVEMBER)
    limited = key(budget_nano=100)
    held = admit(limits, limited, cost=60, wall=DECEMBER - 0.001)
    refuse(limits, limited, cost=60, wall=DECEMBER - 0.001)
    other = admit(limits, limited, cost=100, wall=DECEMBER)
    limits.settle(held, 0, 70, 0.0)
    month = limits.usage(limited, DECEMBER).month
    assert (month.spent, month.reserved) == (0, 100)
    limits.settle(other, 0, 99, 0.0)
    assert (month.spent, month.reserved) == (99, 0)


def test_a_wall_clock_that_goes_back_over_the_end_of_a_month_gives_no_second_budget() -> None:
    limits = Limits(NOVEMBER)
    limited = key(budget_nano=100)
    admit(limits, limited, cost=100, wall=DECEMBER)
    refuse(limits, limited, cost=1, wall=DECEMBER - 1)
    refuse(limits, limited, cost=1, wall=DECEMBER + 1)


def test_a_clock_that_goes_back_empties_no_window() -> None:
    limits = Limits(NOVEMBER)
    limited = key(rpm=2)
    admit(limits, limited, now=100.0)
    admit(limits, limited, now=40.0)
    assert refuse(limits, limited, now=40.0).retry_after_s == 121.0
    refuse(limits, limited, now=160.9)
    admit(limits, limited, now=161.0)


def test_what_was_spent_this_month_is_loaded_at_start() -> None:
    asked: list[float] = []

    def spent(since: float) -> Mapping[str, int]:
        asked.append(since)
        return {"abcdefghij": 60, "otherkey00": 5}

    limits = Limits(NOVEMBER, spent)
    limited = key(budget_nano=100)
    refuse(limits, limited, cost=41)
    admit(limits, limited, cost=40)
    admit(limits, limited, cost=100, wall=DECEMBER)
    assert asked == [datetime(2025, 11, 1, tzinfo=UTC).timestamp()]


def test_another_currency_is_counted_by_itself() -> None:
    limits = Limits(NOVEMBER, lambda since: {"abcdefghij": 60})
    limited = key(budget_nano=100)
    running = admit(limits, limited, cost=40)
    limits.change_currency("USD", "CNY")
    limits.settle(running, 0, 40, 0.0)
    admit(limits, limited, cost=100)
    refuse(limits, limited, cost=1)
    limits.change_currency("CNY", "USD")
    refuse(limits, limited, cost=1)  # what was a mistake grants nothing anew
    admit(limits, limited, cost=100, wall=DECEMBER)
    limits.change_currency("USD", "CNY")
    admit(limits, limited, cost=100, wall=DECEMBER)


def test_months_follow_the_configured_zone() -> None:
    shanghai = ZoneInfo("Asia/Shanghai")
    begin, end = month_bounds(datetime(2025, 12, 31, 23, tzinfo=UTC).timestamp(), shanghai)
    assert begin == datetime(2025, 12, 31, 16, tzinfo=UTC).timestamp()
    assert end == datetime(2026, 1, 31, 16, tzinfo=UTC).timestamp()


@given(st.floats(0, 4e9), st.sampled_from(["UTC", "Europe/Berlin", "America/St_Johns"]))
def test_month_bounds_hold_their_time(wall: float, zone: str) -> None:
    begin, end = month_bounds(wall, ZoneInfo(zone))
    assert begin <= wall < end
    assert month_bounds(end, ZoneInfo(zone))[0] == end


def test_a_key_without_limits_costs_no_memory() -> None:
    limits = Limits(NOVEMBER)
    free = key()
    held = admit(limits, free, tokens=10**9, cost=10**18)
    limits.settle(held, 1, 1, 0.0)
    assert len(limits) == 0
    assert limits.headers(free, 0.0) == b""


def test_state_of_revoked_keys_is_dropped_and_their_requests_still_end() -> None:
    limits = Limits(NOVEMBER)
    gone, stays = key(rpm=5), Key(id="stays00000", tenant="acme", rpm=5)
    held = admit(limits, gone)
    admit(limits, stays)
    limits.keep({"stays00000", "new0000000"})
    assert len(limits) == 1
    limits.settle(held, 5, 5, 0.0)
    assert len(limits) == 1


def test_headers() -> None:
    limits = Limits(NOVEMBER)
    limited = key(rpm=60, tpm=1000, concurrency=2)
    assert limits.headers(limited, 5.0) == (
        b"x-ratelimit-limit-requests: 60\r\n"
        b"x-ratelimit-remaining-requests: 60\r\n"
        b"x-ratelimit-reset-requests: 0s\r\n"
        b"x-ratelimit-limit-tokens: 1000\r\n"
        b"x-ratelimit-remaining-tokens: 1000\r\n"
        b"x-ratelimit-reset-tokens: 0s\r\n"
    )
    assert len(limits) == 0
    held = admit(limits, limited, tokens=400, now=5.0)
    assert b"remaining-requests: 59\r\nx-ratelimit-reset-requests: 1m1s\r\n" in limits.headers(limited, 5.0)
    assert b"remaining-tokens: 600\r\nx-ratelimit-reset-tokens: 58s\r\n" in limits.headers(limited, 8.5)
    limits.settle(admit(limits, limited, tokens=600, now=9.0), 0, 0, now=9.5)
    assert b"remaining-tokens: 600\r\nx-ratelimit-reset-tokens: 57s\r\n" in limits.headers(limited, 9.5)
    limits.settle(held, 1400, 0, now=10.0)
    assert b"remaining-tokens: 0\r\nx-ratelimit-reset-tokens: 1m1s\r\n" in limits.headers(limited, 10.0)
    assert b"remaining-tokens: 1000\r\nx-ratelimit-reset-tokens: 0s\r\n" in limits.headers(limited, 71.0)


def test_headers_name_only_the_limits_there_are() -> None:
    limits = Limits(NOVEMBER)
    assert b"tokens" not in limits.headers(key(rpm=1), 0.0)
    assert b"requests" not in limits.headers(key(tpm=1), 0.0)
    assert limits.headers(key(concurrency=1, budget_nano=1), 0.0) == b""


@pytest.mark.parametrize("tokens", [0, 5, 11])
@pytest.mark.parametrize("cost", [0, 70, 200])
@pytest.mark.parametrize("wall", [0.0, 40 * 86_400.0])
def test_what_is_foreseen_is_what_comes(tokens: int, cost: int, wall: float) -> None:
    """Whatever a key has used, and in the next month: the same refusal, or none; and foreseeing keeps nothing."""
    for limit in ({"rpm": 2}, {"tpm": 10}, {"concurrency": 1}, {"budget_nano": 100}, {}):
        key = Key("k", "acme", **limit)  # type: ignore[arg-type]
        for used in range(4):
            limits = Limits(0.0)
            for _ in range(used):
                limits.admit(key, 4, 60, 10.0, 0.0)
            kept = len(limits)
            foreseen = limits.foresee(key, tokens, cost, 20.0, wall)
            assert len(limits) == kept
            came = limits.admit(key, tokens, cost, 20.0, wall)
            assert foreseen == (came if isinstance(came, Refusal) else None)
