from __future__ import annotations

from math import exp
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.base import Reject
from policies.files import read_policy
from policies.shares import LEAST_MEAN, MEAN_TAU_S, MOST_KEPT, Shares
from policies.simple import WeightedQps
from policies.state import Fleet
from policies.valve import Valve
from tests.policies.builders import backend, decided, fleet, one_tier, release, request

SLOTS = 16


def holding(now: float = 0.0, **held: int) -> Shares:
    shares = Shares()
    for tenant, count in held.items():
        for _ in range(count):
            shares.take(tenant, 0, now)
    return shares


def test_the_mean_follows_what_is_held() -> None:
    shares = holding(a=3)
    use = shares.uses["a"]
    use.follow(MEAN_TAU_S)
    assert use.mean == pytest.approx(3 * (1 - exp(-1)))
    use.follow(1000.0)
    assert use.mean == pytest.approx(3.0)
    for _ in range(3):
        shares.give_back("a", 1000.0)
    use.follow(1000.0 + MEAN_TAU_S)
    assert use.mean == pytest.approx(3 * exp(-1))


def test_nothing_is_kept_from_one_who_is_alone_or_holds_less_than_a_share() -> None:
    assert holding(a=16).kept_from("a", 0, SLOTS, 1000.0) < 0
    assert holding(a=8, b=4).kept_from("b", 0, SLOTS, 1000.0) < 0
    assert holding(a=8, b=4).kept_from("a", 0, SLOTS, 1000.0) >= 0
    assert holding(a=8, b=4).kept_from("new", 0, SLOTS, 1000.0) < 0


def test_what_is_kept_is_the_use_of_the_others_and_two_deviations() -> None:
    shares = holding(a=60, b=4)
    assert shares.kept_from("a", 0, 100, 1e6) == 4  # 4 + 2 * 2, and b holds 4 of them
    for _ in range(4):
        shares.give_back("b", 1e6)
    assert shares.kept_from("a", 0, 100, 1e6) == 8
    assert shares.kept_from("a", 0, 16, 1e6) == 16 // MOST_KEPT
    assert shares.kept_from("a", 1, 100, 1e6) < 0  # b is less urgent
    assert shares.kept_from("a", 0, 100, 1e6 + 20 * MEAN_TAU_S) < 0  # b has gone
    assert "b" not in shares.uses


def test_who_holds_less_than_a_share_is_owed_one_by_who_holds_more() -> None:
    shares = holding(a=16)
    assert shares.owes("b", 0, SLOTS, 1.0)
    assert not shares.owes("a", 0, SLOTS, 1.0)
    assert not shares.owes("b", -1, SLOTS, 1.0)  # a is more urgent
    assert not holding(a=8, b=7, c=1).owes("b", 0, SLOTS, 1.0)
    assert not holding(a=5, b=1, c=5).owes("b", 0, SLOTS, 1.0)  # nobody has too much
    assert not Shares().owes("b", 0, SLOTS, 1.0)
    assert not holding(**{f"t{number}": 1 for number in range(SLOTS + 1)}).owes("b", 0, SLOTS, 1.0)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans(), st.floats(0.0, 20.0)), max_size=60))
def test_at_most_a_quarter_is_kept_and_counts_are_what_is_held(
    events: list[tuple[str, bool, float]],
) -> None:
    shares, held, now = Shares(), dict.fromkeys("abcd", 0), 0.0
    for tenant, comes, pause in events:
        now += pause
        if comes:
            shares.take(tenant, 0, now)
            held[tenant] += 1
        elif held[tenant]:
            shares.give_back(tenant, now)
            held[tenant] -= 1
        for one in "abcd":
            assert -1 <= shares.kept_from(one, 0, SLOTS, now) <= SLOTS // MOST_KEPT
        assert {name: use.held for name, use in shares.uses.items() if use.held} == {
            name: count for name, count in held.items() if count
        }
        assert all(use.mean >= 0.0 for use in shares.uses.values())


def test_tenants_that_came_once_are_forgotten() -> None:
    shares = Shares()
    for number in range(10_000):
        shares.take(f"t{number}", 0, float(number))
        shares.give_back(f"t{number}", number + 1.0)
    assert len(shares.uses) < 200
    assert LEAST_MEAN > 0.0


# In the valve


def flooded() -> tuple[Valve, Fleet]:
    """A backend most of whose slots a tenant holds that wants all; another tenant held four until just now."""
    homes = fleet(backend("a", slots=SLOTS))
    valve = Valve(one_tier(wait_s=10.0), homes)
    light = [valve.submit(request(f"l{number}", tenant="light"), 0.0) for number in range(4)]
    for number in range(SLOTS):
        valve.submit(request(f"f{number}", tenant="flood", arrived=100.0), 100.0)
    assert homes["a"].in_flight == SLOTS - 4
    for routing in light:
        release(homes, routing, 100.0)
    valve.poll(100.0)
    return valve, homes


def test_the_last_free_slots_are_kept_for_who_used_them() -> None:
    valve, homes = flooded()
    assert valve.poll(100.0) == []
    assert homes["a"].in_flight == SLOTS - 4
    assert decided(valve.submit(request("l", tenant="light", arrived=100.0), 100.0)) == "a"
    assert decided(valve.submit(request("f", tenant="flood", arrived=100.0), 100.0)) == "hold"


def test_a_second_attempt_takes_no_slot_that_is_kept_for_others() -> None:
    homes = fleet(backend("a", slots=SLOTS))
    valve = Valve(one_tier(), homes)
    light = [valve.submit(request(f"l{number}", tenant="light"), 0.0) for number in range(4)]
    flood = [valve.submit(request(f"f{number}", tenant="flood"), 100.0) for number in range(8)]
    for routing in light:
        release(homes, routing, 100.0)
    assert (homes["a"].in_flight, valve.queued) == (8, 0)
    second = [valve.hedge(routing.request, frozenset(), 100.0) for routing in flood]
    assert sum(routing is not None for routing in second) == SLOTS - SLOTS // MOST_KEPT - 8
    assert valve.hedge(light[0].request, frozenset(), 100.0) is not None


def test_one_who_is_owed_a_slot_is_sent_to_a_full_backend_and_not_beyond_its_overflow() -> None:
    homes = fleet(backend("a", slots=4))
    valve = Valve(one_tier(wait_s=10.0, overflow=1.25), homes)
    for number in range(5):
        valve.submit(request(f"f{number}", tenant="flood"), 0.0)
    assert (homes["a"].in_flight, valve.queued) == (4, 1)
    routing = valve.submit(request("l0", tenant="light"), 0.0)
    assert (decided(routing), routing.decided_by, homes["a"].in_flight) == ("a", "shares", 5)
    assert decided(valve.submit(request("l1", tenant="light"), 0.0)) == "hold"


def test_one_who_is_owed_a_slot_waits_where_its_policy_says_so() -> None:
    homes = fleet(backend("a", slots=4))
    limited = WeightedQps(Random(1), max_qps={"a": 4.0})
    valve = Valve(one_tier(limited, wait_s=10.0, overflow=2.0), homes)
    for number in range(3):
        valve.submit(request(f"f{number}", tenant="flood"), 0.0)
    assert decided(valve.submit(request("l0", tenant="light"), 0.0)) == "a"
    full = valve.submit(request("l1", tenant="light"), 0.0)
    assert (decided(full), valve.queued) == ("hold", 1)
    assert decided(valve.submit(request("other", tenant="other"), 0.0)) == "hold", "it is owed one, too"
    assert homes["a"].in_flight == 4
    assert decided(valve.submit(request("new", tenant="new"), 1.0)) == "a"


def test_one_that_the_policy_holds_is_owed_nothing_elsewhere() -> None:
    homes = fleet(backend("a", slots=8), backend("b", slots=2))
    limited = WeightedQps(Random(1), max_qps={"a": 1.0})
    valve = Valve(one_tier(limited, wait_s=10.0, overflow=2.0), homes)
    for number in range(3):
        assert decided(valve.submit(request(f"f{number}", tenant="flood"), 0.0)) != "hold"
    light = valve.submit(request("l", tenant="light"), 0.0)
    assert (decided(light), light.decided_by) == ("hold", "chooser")
    assert (homes["a"].in_flight, homes["b"].in_flight) == (1, 2)


def test_one_who_is_owed_a_slot_goes_through_the_tiers_and_past_no_bounds_of_a_host() -> None:
    text = "[{name: all, prefer: [{site: local, host: {cpu: {max: 50%}}}, {site: '*'}], queue: {wait: 5s}}]"
    homes = fleet(backend("local", slots=2), backend("away", slots=2))
    valve = Valve(read_policy(f"rules: {text}", "test").rules, homes)
    for number in range(4):
        valve.submit(request(f"f{number}", tenant="flood", arrived=1.0), 1.0)
    homes["local"].host, homes["local"].host_at = {"cpu": 0.9}, 2.0
    assert decided(valve.submit(request("l", tenant="light", arrived=2.0), 2.0)) == "away"


def test_one_who_is_owed_a_slot_does_not_take_an_idle_backend_whose_host_is_busy() -> None:
    text = "[{name: all, prefer: [{site: local, host: {cpu: {max: 50%}}}], queue: {wait: 5s}}]"
    homes = fleet(backend("local", slots=4))
    valve = Valve(read_policy(f"rules: {text}", "test").rules, homes)
    for number in range(3):
        valve.submit(request(f"f{number}", tenant="flood", arrived=1.0), 1.0)
    homes["local"].host, homes["local"].host_at = {"cpu": 0.9}, 2.0
    assert decided(valve.submit(request("l", tenant="light", arrived=2.0), 2.0)) == "hold"


def test_after_its_wait_a_tenant_with_more_than_its_share_is_refused() -> None:
    valve, _ = flooded()
    answers = valve.poll(110.0)
    assert [answer.request.tenant for answer in answers] == ["flood"] * 4
    refused = [answer.decision for answer in answers if isinstance(answer.decision, Reject)]
    assert {decision.code for decision in refused} == {"queue_timeout"}
    assert len(refused) == len(answers)


def test_after_its_wait_nobody_is_sent_beyond_the_overflow() -> None:
    homes = fleet(backend("a", slots=4))
    valve = Valve(one_tier(wait_s=10.0, overflow=1.5), homes)
    for number in range(8):
        valve.submit(request(f"r{number}"), 0.0)
    answers = valve.poll(10.0)
    assert sorted(decided(answer) for answer in answers) == ["a", "a", "queue_timeout", "queue_timeout"]
    assert homes["a"].in_flight == 6


def test_one_that_would_wait_too_long_is_refused_at_once_with_the_forecast() -> None:
    homes = fleet(backend("a", slots=1))
    valve = Valve(one_tier(wait_s=10.0, overflow=1.0), homes)
    running = valve.submit(request("r"), 0.0)
    now = 0.0
    for number in range(3):
        assert decided(valve.submit(request(f"h{number}", arrived=now), now)) == "hold"
    for _ in range(2):  # one is served every two seconds
        now += 2.0
        release(homes, running, now)
        (running,) = valve.poll(now)
    codes = [decided(valve.submit(request(f"x{number}", arrived=now), now)) for number in range(9)]
    assert codes[0] == "hold"
    assert codes[-1] == "queue_full"
    refused = valve.submit(request("last", arrived=now), now).decision
    assert isinstance(refused, Reject)
    assert "would wait" in refused.reason
    assert 6.0 < (refused.retry_after_s or 0.0) < 10.0
    other = valve.submit(request("o", tenant="other", arrived=now), now)
    assert decided(other) == "hold"  # its own line is short
