from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.match import Between, Hours, Match, Selector
from tests.policies.builders import backend, request


@pytest.mark.parametrize(
    ("conditions", "facts", "others"),
    [
        ({"models": ("qwen*", "m?")}, {"model": "qwen3-8b"}, {"model": "Qwen3"}),
        ({"models": ("qwen*", "m?")}, {"model": "m1"}, {"model": "m12"}),
        ({"models": ("m",)}, {"model": "m"}, {"model": "m\n"}),
        ({"tenants": frozenset({"acme"})}, {"tenant": "acme"}, {"tenant": "acme2"}),
        ({"data_classes": frozenset({"restricted"})}, {"data_class": "restricted"}, {"data_class": "public"}),
        ({"endpoints": frozenset({"chat"})}, {"endpoint": "chat"}, {"endpoint": "completions"}),
        ({"min_priority": 0}, {"priority": 0}, {"priority": -1}),
        ({"max_priority": 3}, {"priority": 3}, {"priority": 4}),
        ({"min_prompt_tokens": 10}, {"prompt_tokens": 10}, {"prompt_tokens": 9}),
        ({"max_prompt_tokens": 10}, {"prompt_tokens": 10}, {"prompt_tokens": 11}),
        ({"stream": False}, {"stream": False}, {"stream": True}),
        ({"stream": True}, {"stream": True}, {"stream": False}),
        ({"labels": {"team": "a"}}, {"labels": {"team": "a", "x": "y"}}, {"labels": {"team": "b"}}),
        ({"labels": {"team": "a", "x": "y"}}, {"labels": {"team": "a", "x": "y"}}, {"labels": {"team": "a"}}),
        ({"sla": frozenset({"gold", "silver"})}, {"labels": {"sla": "gold"}}, {"labels": {"sla": "bronze"}}),
        ({"sla": frozenset({"gold"})}, {"labels": {"sla": "gold"}}, {"labels": {"task": "gold"}}),
        ({"task": frozenset({"chat"})}, {"labels": {"task": "chat"}}, {"labels": {"sla": "chat"}}),
        ({"task": frozenset({"chat"})}, {"labels": {"task": "chat"}}, {}),
        ({"hours": Hours(60, 120)}, {"wall": 3600.0}, {"wall": 7200.0}),
    ],
)
def test_each_condition(conditions: dict[str, Any], facts: dict[str, Any], others: dict[str, Any]) -> None:
    assert Match(**conditions).accepts(request(**facts))
    assert not Match(**conditions).accepts(request(**others))


def test_all_conditions_must_hold_and_none_is_no_condition() -> None:
    both = Match(models=("m",), tenants=frozenset({"acme"}))
    assert both.accepts(request(tenant="acme"))
    assert not both.accepts(request(tenant="acme", model="n"))
    assert not both.accepts(request(tenant="other"))
    assert Match().accepts(request(model="anything", priority=-9, wall=1e9))


@pytest.mark.parametrize(
    ("selector", "accepted"),
    [
        (Selector(), ["a", "b", "c"]),
        (Selector(sites=frozenset({"home"})), ["a", "b"]),
        (Selector(sites=frozenset({"*"})), ["a", "b", "c"]),
        (Selector(sites=frozenset({"home"}), backends=frozenset({"b", "c"})), ["b"]),
        (Selector(labels={"card": "h20"}), ["b", "c"]),
        (Selector(labels={"card": "h20", "trust": "yes"}), ["c"]),
        (Selector(operators=frozenset({"x", "y"})), ["c"]),
        (Selector(price=Between(high=3.0)), ["b"]),
        (Selector(price=Between(3.5, 5.0)), ["c"]),
        (Selector(price_input=Between(high=1.0)), ["b", "c"]),
        (Selector(price_output=Between(2.0, 2.0)), ["b"]),
        (Selector(carbon=Between(high=600.0)), ["a", "c"]),
        (Selector(rtt=Between(high=0.05)), ["b"]),
        (Selector(rtt=Between(0.05, 9.0)), ["b", "c"]),
        (Selector(rtt=Between(low=0.0)), ["b", "c"]),
    ],
)
def test_selectors(selector: Selector, accepted: list[str]) -> None:
    views = [
        backend("a", site="home", carbon_gco2_kwh=600.0, price_output=0.0),
        backend("b", site="home", labels={"card": "h20"}, price_input=1.0, price_output=2.0, rtt_s=0.05),
        backend(
            "c",
            site="away",
            labels={"card": "h20", "trust": "yes"},
            operator="x",
            price_input=1.0,
            price_output=3.0,
            carbon_gco2_kwh=30.0,
            rtt_s=0.3,
        ),
    ]
    assert accepted == [view.name for view in views if selector.accepts(view)]
    anywhere = replace(selector, rtt=None)
    assert [selector.fits(view) for view in views] == [anywhere.accepts(view) for view in views]


MINUTES = st.integers(0, 1439)


@given(
    start=MINUTES,
    length=st.integers(1, 1440),
    weekdays=st.frozensets(st.integers(0, 6)),
    offset=st.integers(-14 * 3600, 14 * 3600),
    wall=st.floats(0, 4e9),
)
def test_hours_agree_with_the_calendar(
    start: int, length: int, weekdays: frozenset[int], offset: int, wall: float
) -> None:
    end = start + length
    hours = Hours(start, end if end <= 1440 else end - 1440, weekdays, offset)
    local = datetime.fromtimestamp(wall, timezone(timedelta(seconds=offset)))

    def started_on(day: datetime) -> bool:
        opening = day.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(minutes=start)
        inside = opening <= local < opening + timedelta(minutes=length)
        return inside and opening.weekday() in weekdays

    assert hours.contains(local.timestamp()) == (started_on(local) or started_on(local - timedelta(days=1)))


def test_a_window_past_midnight_belongs_to_the_day_it_starts_on() -> None:
    friday_night = Hours(22 * 60, 6 * 60, frozenset({4}))
    friday = datetime(2026, 7, 24, tzinfo=UTC)
    assert friday_night.contains((friday + timedelta(hours=23)).timestamp())
    assert friday_night.contains((friday + timedelta(hours=29)).timestamp())
    assert not friday_night.contains((friday + timedelta(hours=5)).timestamp())
    assert not friday_night.contains((friday + timedelta(hours=30)).timestamp())
