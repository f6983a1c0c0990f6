"""What is expected of demand, and how sure the forecast is of it."""

from __future__ import annotations

from collections.abc import Callable
from math import isclose, pi, sin
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.demand import DAY, LEAST_ERRORS, Ahead, Forecast, Trend

START = 1_764_000_000 // 86400 * 86400


def played(curve: Callable[[int], float], minutes: int, horizon_s: float = 300.0) -> Forecast:
    """A forecast that has seen a demand, by minute, and was asked all the while."""
    forecast = Forecast()
    for minute in range(minutes + 1):
        forecast.note(curve(minute), START + minute * 60)
        if minute % 60 == 0:
            forecast.ahead(horizon_s, 0.9)
    return forecast


def asked(forecast: Forecast, horizon_s: float = 300.0, quantile: float = 0.9) -> Ahead:
    found = forecast.ahead(horizon_s, quantile)
    assert found is not None
    return found


def test_nothing_is_forecast_until_its_errors_are_known() -> None:
    assert Forecast().ahead(300.0, 0.9) is None
    assert played(lambda _: 10.0, LEAST_ERRORS + 3).ahead(300.0, 0.9) is None
    assert played(lambda _: 10.0, LEAST_ERRORS + 6).ahead(300.0, 0.9) is not None


def test_what_stays_is_expected_to_stay_without_a_margin() -> None:
    found = asked(played(lambda _: 100.0, 200))
    assert found == (100.0, 100.0, 100.0)
    assert found.margin == 0.0


def test_nothing_is_expected_of_nothing() -> None:
    forecast = played(lambda minute: 100.0 if minute < 100 else 0.0, 200)
    found = asked(forecast)
    assert found.expected == 0.0
    assert found.high == 0.0
    assert found.margin == 0.0


def rush(minute: int) -> float:
    """100 at night, 300 by day, with half an hour between them from 8:00 on."""
    at = minute % DAY
    return 100.0 if at < 480 or at >= 1200 else min(100.0 + (at - 480) * 200 / 30, 300.0)


def test_the_second_day_knows_the_rush_before_it_comes() -> None:
    before = 477
    first = asked(played(rush, before), 900.0)
    assert first.expected == 100.0
    assert first.more == 0.0
    second = asked(played(rush, DAY + before), 900.0)
    assert second.expected > 120.0
    assert second.more == second.expected - 100.0
    assert second.high >= rush(before + 15)


def test_the_season_is_corrected_by_what_is_now() -> None:
    twice = asked(played(lambda minute: rush(minute) * (2 if minute >= DAY else 1), DAY + 477), 900.0)
    once = asked(played(rush, DAY + 477), 900.0)
    assert twice.expected == pytest.approx(2 * once.expected, rel=1e-6)


@pytest.mark.parametrize("night", [0.0, 1.0])
def test_a_rush_out_of_almost_nothing_is_expected_as_it_was(night: float) -> None:
    def office(minute: int) -> float:
        return 1000.0 if 480 <= minute % DAY < 600 else night

    assert asked(played(office, DAY + 470), 300.0).expected == night
    assert asked(played(office, DAY + 479), 300.0).expected == 1000.0
    # And on a day without it, it is not expected once its time is there.
    assert (
        asked(played(lambda minute: office(minute) if minute < DAY else night, DAY + 490), 300.0).expected
        == night
    )


def evening(minute: int) -> float:
    """Calm, but for bursts to three times as much between 20:00 and 23:00."""
    bursty = 1200 <= minute % DAY < 1380 and minute % 10 == 0
    return 300.0 if bursty else 100.0


def test_the_margin_is_small_in_calm_hours_and_large_where_it_was_bursty_the_day_before() -> None:
    calm = asked(played(evening, DAY + 600), 300.0, 0.95)
    before = asked(played(evening, DAY + 1200), 300.0, 0.95)
    assert calm.margin == 0.0
    assert before.high >= 290.0, "the first burst of the evening is not known yet, but yesterday's are"


def test_a_higher_quantile_never_expects_less() -> None:
    random = Random(1)
    values = [random.expovariate(0.01) for _ in range(500)]
    forecast = played(values.__getitem__, 499)
    highs = [asked(forecast, 300.0, quantile).high for quantile in (0.5, 0.8, 0.9, 0.99)]
    assert highs == sorted(highs)
    assert highs[0] < highs[-1]


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.95])
def test_the_quantile_is_kept(quantile: float) -> None:
    """Of a demand that is alike all day, so large a share of the highest minutes stays below the forecast."""
    random = Random(f"{quantile}")
    values = [100.0 + 50.0 * random.random() for _ in range(3 * DAY)]
    forecast = Forecast()
    kept = cases = 0
    highs: list[float] = []
    for minute, value in enumerate(values):
        forecast.note(value, START + minute * 60)
        found = forecast.ahead(300.0, quantile)
        highs.append(found.high if found is not None else 0.0)
        if minute >= DAY and minute + 5 < len(values):
            kept += highs[minute] >= max(values[minute : minute + 5])
            cases += 1
    assert kept / cases >= quantile - 0.05


def test_another_horizon_judges_the_past_anew() -> None:
    def wave(minute: int) -> float:
        return 100.0 + 80.0 * sin(2 * pi * minute / 60)

    forecast = played(wave, 600, 300.0)
    fresh = played(wave, 600, 1800.0)
    assert forecast.ahead(1800.0, 0.9) == fresh.ahead(1800.0, 0.9)
    assert asked(forecast, 1800.0).high > asked(played(wave, 600), 300.0).high


def test_a_gap_tells_nothing() -> None:
    """What was not seen is no demand of zero."""
    forecast = played(lambda _: 100.0, 100)
    forecast.note(100.0, START + 300 * 60)
    for minute in range(301, 400):
        forecast.note(100.0, START + minute * 60)
    assert asked(forecast) == (100.0, 100.0, 100.0)


@pytest.mark.parametrize("jump", [-3600.0, -60.0, -2 * 86400.0, 30 * 86400.0])
def test_a_clock_that_is_set_is_survived(jump: float) -> None:
    forecast = played(lambda _: 100.0, 200)
    for minute in range(200):
        forecast.note(100.0, START + 200 * 60 + jump + minute * 60)
    found = forecast.ahead(300.0, 0.9)
    assert found is None or found == (100.0, 100.0, 100.0)


@given(
    values=st.lists(st.floats(0.0, 1e9), min_size=60, max_size=150),
    steps=st.integers(1, 50),
    horizon=st.floats(1.0, 3600.0),
)
def test_it_is_never_below_what_is_expected(values: list[float], steps: int, horizon: float) -> None:
    forecast = Forecast()
    for at, value in enumerate(values):
        forecast.note(value, START + at * 20.0 * steps)
        found = forecast.ahead(horizon, 0.9)
        assert found is None or found.high >= found.expected >= 0.0


def test_a_line_goes_on() -> None:
    trend = Trend()
    assert trend.at(100.0) == 0.0
    for at in range(0, 121, 5):
        trend.note(1.0 + at / 100, float(at))
    assert isclose(trend.at(320.0), 4.2)


def test_a_short_past_has_no_trend() -> None:
    trend = Trend()
    for at in range(0, 50, 5):
        trend.note(float(at), float(at))
    assert trend.at(1000.0) == 45.0


def test_a_time_that_falls_ends_at_zero() -> None:
    trend = Trend()
    for at in range(0, 121, 5):
        trend.note(130.0 - at, float(at))
    assert trend.at(500.0) == 0.0


def test_what_is_older_than_five_minutes_is_forgotten() -> None:
    trend = Trend()
    for at in range(0, 1201, 5):
        trend.note(float(at) if at < 600 else 600.0, float(at))
    assert isclose(trend.at(2000.0), 600.0)
