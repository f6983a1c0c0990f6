from __future__ import annotations

from math import acos, cos, degrees, radians, sin
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.base import BackendView, Send
from policies.geo import EARTH_RADIUS_KM, Geo, ShortestPath, distance_km, parse_place
from tests.policies.driver import Driver, request

SUZHOU, NANJING, BEIJING = (31.30, 120.62), (32.06, 118.79), (39.90, 116.40)
latitudes = st.floats(-90, 90)
longitudes = st.floats(-180, 180)


def at(name: str, place: tuple[float, float] | None, **facts: Any) -> BackendView:
    return BackendView(**{"name": name, "site": name, "location": place, **facts})


def near(policy: Geo, pool: list[BackendView], location: str = "", now: float = 0.0) -> Send:
    labels = {"location": location} if location else {}
    decision = policy.choose(request(labels=labels), pool, now)
    assert isinstance(decision, Send)
    return decision


class TestDistance:
    @pytest.mark.parametrize(
        ("here", "there", "km"),
        [
            ((51.5074, -0.1278), (48.8566, 2.3522), 344),  # London, Paris
            ((40.7128, -74.0060), (35.6762, 139.6503), 10850),  # New York, Tokyo
            ((0.0, 179.5), (0.0, -179.5), 111),  # over the date line
            ((90.0, 0.0), (90.0, 123.0), 0),  # a pole has every longitude
            ((0.0, 0.0), (0.0, 180.0), 20015),  # antipodes
        ],
    )
    def test_known_distances(self, here: tuple[float, float], there: tuple[float, float], km: float) -> None:
        assert distance_km(here, there) == pytest.approx(km, rel=1e-3)

    @given(latitudes, longitudes, latitudes, longitudes)
    def test_agrees_with_the_law_of_cosines(self, a: float, b: float, c: float, d: float) -> None:
        cosine = sin(radians(a)) * sin(radians(c)) + cos(radians(a)) * cos(radians(c)) * cos(radians(d - b))
        assert distance_km((a, b), (c, d)) == distance_km((c, d), (a, b))
        assert abs(distance_km((a, b), (c, d)) - EARTH_RADIUS_KM * acos(max(-1, min(1, cosine)))) < 0.8

    @pytest.mark.parametrize(
        "text",
        ["", "x", "1", "1,", ",1", "1,2,3", "90.5,0", "-90.5,0", "0,180.5", "0,-180.5", "nan,0", "0,inf"],
    )
    def test_what_is_no_place(self, text: str) -> None:
        assert parse_place(text) is None

    @given(latitudes, longitudes)
    def test_every_place_can_be_written(self, latitude: float, longitude: float) -> None:
        assert parse_place(f"{latitude!r}, {longitude!r}") == (latitude, longitude)


class TestGeo:
    def test_takes_the_nearest_and_falls_back_outwards(self) -> None:
        pool = [at("beijing", BEIJING), at("nanjing", NANJING), at("unknown", None), at("suzhou", SUZHOU)]
        decision = near(Geo(Random(0)), pool, "31.2, 121.5")
        assert (decision.backend, decision.fallbacks) == ("suzhou", ("nanjing", "beijing", "unknown"))
        assert decision.scores == {"suzhou": 84, "nanjing": 274, "beijing": 1071}
        assert decision.reason == "nearest of 4"

    def test_requests_without_a_place_come_from_home(self) -> None:
        pool = [at("beijing", BEIJING), at("nanjing", NANJING)]
        policy = Geo(Random(0), home=[39, 116])
        assert near(policy, pool).backend == "beijing"
        assert near(policy, pool, "somewhere").backend == "beijing"
        assert near(policy, pool, "31.3,120.6").backend == "nanjing"

    def test_the_local_site_stands_at_home(self) -> None:
        pool = [at("beijing", BEIJING), at("appliance", None, site="local")]
        assert near(Geo(Random(0), home=SUZHOU), pool).backend == "appliance"
        assert near(Geo(Random(0), home=SUZHOU), pool, "39,116").backend == "beijing"
        assert near(Geo(Random(0)), pool, "31.3,120.6").backend == "beijing"
        pool[1].location = NANJING
        assert near(Geo(Random(0), home=BEIJING), pool, "31.3,120.6").backend == "appliance"

    def test_without_any_place_the_least_loaded_is_taken(self) -> None:
        pool = [at("beijing", BEIJING, in_flight=3), at("nanjing", NANJING, in_flight=1), at("x", None)]
        decision = near(Geo(Random(0)), pool)
        assert (decision.backend, decision.scores, decision.reason) == ("x", {}, "no place known")

    def test_of_one_site_the_least_loaded_then_each_in_turn(self) -> None:
        pool = [at(name, NANJING) for name in ("a", "b", "c")]
        policy = Geo(Random(0), home=SUZHOU)
        chosen = []
        for _ in range(4):
            chosen.append(near(policy, pool).backend)
            policy.dispatched(request(), next(b for b in pool if b.name == chosen[-1]), 0.0)
        assert chosen == ["a", "b", "c", "a"]
        pool[1].in_flight = 5
        assert near(policy, pool).fallbacks[-1] == "b"

    def test_full_backends_come_last(self) -> None:
        pool = [at("suzhou", SUZHOU, in_flight=32), at("nanjing", NANJING), at("beijing", BEIJING)]
        decision = near(Geo(Random(0)), pool, "31.3,120.6")
        assert (decision.backend, decision.fallbacks) == ("nanjing", ("beijing", "suzhou"))
        assert near(Geo(Random(0), skip_full=False), pool, "31.3,120.6").backend == "suzhou"

    def test_if_all_are_full_the_least_saturated_is_taken(self) -> None:
        pool = [at("suzhou", SUZHOU, in_flight=40), at("nanjing", NANJING, in_flight=33)]
        assert near(Geo(Random(0)), pool, "31.3,120.6").backend == "nanjing"

    @pytest.mark.parametrize("home", [[], [1.0], [1.0, 2.0, 3.0], [91.0, 0.0], [0.0, float("nan")]])
    def test_home_must_be_a_place(self, home: list[float]) -> None:
        with pytest.raises(ValueError, match="home must be"):
            Geo(Random(0), home=home)


def path(policy: ShortestPath, pool: list[BackendView], now: float = 100.0, **facts: Any) -> Send:
    decision = policy.choose(request(**facts), pool, now)
    assert isinstance(decision, Send)
    return decision


def used(policy: ShortestPath, pool: list[BackendView], now: float = 100.0) -> ShortestPath:
    for backend in pool:
        policy.dispatched(request(), backend, now)
    return policy


class TestShortestPath:
    def test_adds_round_trip_transfer_and_queue(self) -> None:
        pool = [
            BackendView("near", rtt_s=0.001, ttft_s=0.301, bandwidth=1e9),
            BackendView("far", rtt_s=0.040, ttft_s=0.140, bandwidth=1e7),
        ]
        decision = path(used(ShortestPath(Random(0)), pool), pool, body_bytes=1_000_000)
        assert decision.scores == pytest.approx({"near": 0.001 + 0.001 + 0.3, "far": 0.04 + 0.1 + 0.1})
        assert (decision.backend, decision.fallbacks) == ("far", ("near",))
        decision = path(used(ShortestPath(Random(0)), pool), pool, body_bytes=2_000_000)
        assert decision.backend == "near"

    def test_requests_ahead_of_a_slot_are_waited_for(self) -> None:
        full = BackendView("full", slots=4, in_flight=5, ttft_s=0.2, tpot_s=0.02)
        pool = [full, BackendView("slow", ttft_s=2.0, tpot_s=0.02)]
        policy = used(ShortestPath(Random(0)), pool)
        decision = path(policy, pool, expected_tokens=100)
        # Two must leave before this one is served, by four at a time that take 0.2 + 100 * 0.02 s.
        assert decision.scores["full"] == pytest.approx(0.2 + 2 / 4 * 2.2)
        assert decision.backend == "full"
        assert path(policy, pool, expected_tokens=200).backend == "slow"
        assert path(policy, pool, expected_tokens=0).scores["full"] == pytest.approx(0.2 + 0.5 * (0.2 + 5.12))

    def test_the_engine_s_queue_counts_while_fresh(self) -> None:
        busy = BackendView("busy", slots=4, ttft_s=0.2, tpot_s=0.02, waiting=8, sampled_at=99.0)
        pool = [busy, BackendView("slow", ttft_s=0.5, tpot_s=0.02)]
        policy = used(ShortestPath(Random(0)), pool)
        assert path(policy, pool).scores["busy"] == pytest.approx(0.2 + 8 / 4 * 2.2)
        busy.sampled_at = 98.0
        assert path(policy, pool).scores["busy"] > 1.0
        busy.sampled_at = 97.9
        assert path(policy, pool).scores["busy"] == pytest.approx(0.2)

    def test_a_class_of_business_has_its_own_weights(self) -> None:
        pool = [
            BackendView("close", rtt_s=0.005, ttft_s=0.205, bandwidth=1e6),
            BackendView("fast", rtt_s=0.080, ttft_s=0.180, bandwidth=1e8),
        ]
        classes = {
            "chat": {"rtt": 9},
            "batch": {"rtt": 0.0, "transfer": 0.0},
            "default": {"queue": 0, "rtt": 0},
        }
        policy = used(ShortestPath(Random(0), classes=classes), pool)
        chat = path(policy, pool, labels={"business": "chat"}, body_bytes=100_000)
        assert chat.scores == pytest.approx({"close": 0.045 + 0.1 + 0.2, "fast": 0.72 + 0.001 + 0.1})
        batch = path(policy, pool, labels={"business": "batch"}, body_bytes=100_000)
        assert batch.scores == pytest.approx({"close": 0.2, "fast": 0.1})
        for labels in ({}, {"business": "unheard of"}):
            other = path(policy, pool, labels=labels, body_bytes=100_000)
            assert other.scores == pytest.approx({"close": 0.1, "fast": 0.001})

    def test_the_unmeasured_is_tried_by_one_request_at_a_time(self) -> None:
        known, new = BackendView("known", rtt_s=0.1, ttft_s=0.3, in_flight=3), BackendView("new", rtt_s=0.15)
        policy = used(ShortestPath(Random(0)), [known])
        assert path(policy, [known, new]).backend == "new"
        new.in_flight = 1
        decision = path(policy, [known, new])
        assert decision.backend == "known"
        assert decision.scores["new"] == pytest.approx(0.35)

    def test_what_others_measured_is_tried_like_the_unmeasured(self) -> None:
        known, idle = BackendView("known", ttft_s=0.2, in_flight=3), BackendView("idle", ttft_s=9.0)
        policy = used(ShortestPath(Random(0)), [known])
        assert path(policy, [known, idle]).scores["idle"] == 0.0
        assert path(used(policy, [idle]), [known, idle]).scores["idle"] == 9.0

    def test_waiting_costs_something_before_anything_is_measured(self) -> None:
        close, far = BackendView("close", slots=2, in_flight=2), BackendView("far", rtt_s=0.3)
        assert path(ShortestPath(Random(0)), [close, far]).backend == "far"
        close.in_flight = 1
        assert path(ShortestPath(Random(0)), [close, far]).backend == "close"

    def test_one_that_was_slow_once_is_tried_again(self) -> None:
        good, bad = BackendView("good", ttft_s=0.2, in_flight=2), BackendView("bad", ttft_s=2.0)
        policy = used(ShortestPath(Random(0)), [good, bad])
        assert path(policy, [good, bad], now=130.0).backend == "good"
        assert path(policy, [good, bad], now=250.0).backend == "bad"
        policy.dispatched(request(), bad, 250.0)
        bad.in_flight = 1
        assert path(policy, [good, bad], now=900.0).backend == "good"

    def test_costs_that_are_nearly_alike_go_by_load(self) -> None:
        pool = [
            BackendView("b0", ttft_s=0.200, in_flight=9),
            BackendView("b1", ttft_s=0.215, in_flight=4),
            BackendView("b2", ttft_s=0.240, in_flight=1),
        ]
        assert path(ShortestPath(Random(0)), pool).backend == "b1"
        assert path(ShortestPath(Random(0)), pool).fallbacks == ("b0", "b2")

    def test_a_slow_backend_gets_little_a_recovered_one_its_share(self) -> None:
        """A brown-out: TTFT of one of four grows tenfold for a while; the driver's own TTFT is 0.2 to 0.3 s."""
        driver = Driver(ShortestPath(Random(0)), 4)
        driver.run(400)
        for _ in range(10):
            driver.fleet["b0"].observe_ttft(2.5, driver.now)
            driver.fleet["b0"].ttft_s = 2.5
            slow = driver.run(40)
            assert slow["b0"] <= 2
        driver.run(2000)
        assert driver.run(400)["b0"] >= 80

    @pytest.mark.parametrize(
        ("classes", "message"),
        [
            ({"chat": {"rttt": 1.0}}, "class chat has no weight 'rttt'; it has rtt, transfer, queue"),
            ({"chat": {"rtt": -1.0}}, "weight rtt of class chat must be 0 or more, not -1"),
            ({"chat": {"queue": float("inf")}}, "weight queue of class chat must be 0 or more, not inf"),
        ],
    )
    def test_wrong_weights_are_named(self, classes: dict[str, dict[str, float]], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ShortestPath(Random(0), classes=classes)


def test_degrees_are_what_is_meant() -> None:
    quarter = distance_km((0.0, 0.0), (0.0, degrees(radians(90.0))))
    assert quarter == 10008
